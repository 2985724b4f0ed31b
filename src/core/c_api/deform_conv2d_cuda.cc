#include "core/c_api/deform_conv2d_cuda.h"

#include <cublas_v2.h>
#include <cuda_runtime.h>

#include <map>
#include <set>
#include <string>
#include <vector>

#include "core/c_api/params_of.h"
#include "core/deform_conv2d.h"

namespace deform_conv {
namespace {

// Stream-ordered memory and cuBLAS.
class ToolkitDevice : public GpuDevice {
 public:
  ToolkitDevice(cudaStream_t stream, const DeformConvProblem& problem)
      : stream_(stream),
        allow_tf32_(problem.allow_tf32 != 0),
        columns_bytes_(problem.columns_bytes),
        deterministic_(problem.deterministic != 0),
        path_(static_cast<KernelPath>(problem.path)) {}

  ~ToolkitDevice() override {
    for (void* memory : allocated_) cudaFreeAsync(memory, stream_);
  }

  void* stream() override { return stream_; }

  int64_t columns_bytes() const override {
    return columns_bytes_ > 0 ? columns_bytes_ : GpuDevice::columns_bytes();
  }

  bool deterministic() const override { return deterministic_; }

  bool allow_tf32() const override { return allow_tf32_; }

  KernelPath path() const override { return path_; }

  std::string Allocate(int64_t bytes, void** memory) override {
    KeepFreedMemory();
    const cudaError_t error = cudaMallocAsync(memory, bytes, stream_);
    if (error != cudaSuccess) {
      cudaGetLastError();  // forgets it: whoever asks next would take it for its own
      return "cannot allocate " + std::to_string(bytes) + " bytes: " + cudaGetErrorString(error);
    }
    allocated_.push_back(*memory);
    return "";
  }

  // cuBLAS is column-major: there, a row-major matrix is its transpose, and c^T = b^T a^T.
  std::string Gemm(ElementType type, GemmForm form, int64_t count, const MatrixBatch<const void>& a,
                   const MatrixBatch<const void>& b, const MatrixBatch<void>& c,
                   bool accumulate) override {
    // A handle belongs to the device that is current when it is made.
    static thread_local std::map<int, cublasHandle_t> handles;
    const int device = CurrentDevice();
    auto found = handles.find(device);
    if (found == handles.end()) {
      cublasHandle_t made;
      if (cublasCreate(&made) != CUBLAS_STATUS_SUCCESS) return "cuBLAS cannot be started";
      found = handles.emplace(device, made).first;
    }
    const cublasHandle_t handle = found->second;
    cublasSetStream(handle, stream_);
    const float one = 1, beta = accumulate ? 1 : 0;
    const double one_double = 1, beta_double = accumulate ? 1 : 0;
    const bool is_double = type == ElementType::kDouble;
    const cudaDataType_t data_types[] = {CUDA_R_32F, CUDA_R_64F, CUDA_R_16F, CUDA_R_16BF};
    const cudaDataType_t data_type = data_types[static_cast<int>(type)];
    const cublasComputeType_t compute_type = is_double ? CUBLAS_COMPUTE_64F
                                             : type == ElementType::kFloat && allow_tf32_
                                                 ? CUBLAS_COMPUTE_32F_FAST_TF32
                                                 : CUBLAS_COMPUTE_32F;
    const int64_t k = form == GemmForm::kTransposeA ? a.first.rows : a.first.cols;
    const cublasStatus_t status = cublasGemmStridedBatchedEx(
        handle, form == GemmForm::kTransposeB ? CUBLAS_OP_T : CUBLAS_OP_N,
        form == GemmForm::kTransposeA ? CUBLAS_OP_T : CUBLAS_OP_N, static_cast<int>(c.first.cols),
        static_cast<int>(c.first.rows), static_cast<int>(k),
        is_double ? static_cast<const void*>(&one_double) : &one, b.first.data, data_type,
        static_cast<int>(b.first.stride), b.distance, a.first.data, data_type,
        static_cast<int>(a.first.stride), a.distance,
        is_double ? static_cast<const void*>(&beta_double) : &beta, c.first.data, data_type,
        static_cast<int>(c.first.stride), c.distance, static_cast<int>(count), compute_type,
        CUBLAS_GEMM_DEFAULT);
    return status == CUBLAS_STATUS_SUCCESS
               ? ""
               : "cublasGemmStridedBatchedEx failed with status " + std::to_string(status);
  }

 private:
  static int CurrentDevice() {
    int device = 0;
    cudaGetDevice(&device);
    return device;
  }

  // By default, each synchronisation would give the pool's free memory back to the system.
  static void KeepFreedMemory() {
    static thread_local std::set<int> done;
    const int device = CurrentDevice();
    if (!done.insert(device).second) return;
    cudaMemPool_t pool;
    uint64_t all = UINT64_MAX;
    if (cudaDeviceGetDefaultMemPool(&pool, device) == cudaSuccess) {
      cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &all);
    }
  }

  cudaStream_t stream_;
  bool allow_tf32_;
  int64_t columns_bytes_;
  bool deterministic_;
  KernelPath path_;
  std::vector<void*> allocated_;
};

// Calls run(T()) for the problem's element type T.
template <typename Run>
std::string ForElementType(int64_t element_type, const Run& run) {
  switch (element_type) {
    case 0:
      return run(float());
    case 1:
      return run(double());
    case 2:
      return run(Half());
    case 3:
      return run(BFloat16());
  }
  return "element_type must be from 0 to 3; received " + std::to_string(element_type);
}

// Runs `run(params, device, T())` and keeps its error for the caller to read.
template <typename Run>
const char* Call(const DeformConvProblem& problem, void* stream, const Run& run) {
  static thread_local std::string error;
  DeformConvParams params;
  error = ParamsOf(problem, &params);
  if (error.empty() &&
      (problem.path < 0 || problem.path > static_cast<int64_t>(KernelPath::kFused))) {
    error = "path must be from 0 to 2; received " + std::to_string(problem.path);
  }
  if (error.empty()) {
    ToolkitDevice device(static_cast<cudaStream_t>(stream), problem);
    error = ForElementType(problem.element_type,
                           [&](auto element) { return run(params, device, element); });
  }
  return error.empty() ? nullptr : error.c_str();
}

template <typename T>
SampledTensors<T, ComputeType<T>> Tensors(const void* input, const void* offset, const void* mask) {
  using OffsetT = ComputeType<T>;
  return {static_cast<const T*>(input), static_cast<const OffsetT*>(offset),
          static_cast<const OffsetT*>(mask)};
}

}  // namespace
}  // namespace deform_conv

using deform_conv::ComputeType;

const char* deform_conv2d_forward_cuda(const DeformConvProblem* problem, const void* input,
                                       const void* filters, const void* offset, const void* mask,
                                       void* output, void* stream) {
  return deform_conv::Call(*problem, stream, [&](const auto& params, auto& device, auto element) {
    using T = decltype(element);
    return deform_conv::DeformConv2DForwardGpu<T>(
        params, deform_conv::Tensors<T>(input, offset, mask), static_cast<const T*>(filters),
        device, static_cast<T*>(output));
  });
}

const char* deform_conv2d_backward_cuda(const DeformConvProblem* problem, const void* input,
                                        const void* filters, const void* offset, const void* mask,
                                        const void* grad_output, void* grad_input,
                                        void* grad_filters, void* grad_offset, void* grad_mask,
                                        void* stream) {
  return deform_conv::Call(*problem, stream, [&](const auto& params, auto& device, auto element) {
    using T = decltype(element);
    using OffsetT = ComputeType<T>;
    return deform_conv::DeformConv2DBackwardGpu<T>(
        params, deform_conv::Tensors<T>(input, offset, mask), static_cast<const T*>(filters),
        static_cast<const T*>(grad_output), device,
        {{static_cast<T*>(grad_input), static_cast<OffsetT*>(grad_offset),
          static_cast<OffsetT*>(grad_mask)},
         static_cast<T*>(grad_filters)});
  });
}
