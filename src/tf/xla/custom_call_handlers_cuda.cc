// The custom calls on a GPU: on XLA's stream and memory, and TensorFlow's BLAS.

#include <new>
#include <optional>

#include "tf/stream_device.h"
#include "tf/tensorflow_versions.h"
#include "tf/xla/custom_call_handlers.h"
#include "xla/ffi/api/c_api_internal.h"

// Gives XLA's own Stream, which its BLAS needs. This internal interface requires XLA's own headers,
// and that the library is loaded into the same XLA. Both hold here.
struct StreamOfXla {};

template <>
struct xla::ffi::CtxDecoding<StreamOfXla> {
  using Type = stream_executor::Stream*;

  static std::optional<Type> Decode(const XLA_FFI_Api* api, XLA_FFI_ExecutionContext* context,
                                    DiagnosticEngine& diagnostic) {
#if DEFORM_CONV_TENSORFLOW >= 221
    void* stream = nullptr;
    XLA_FFI_Error* error = api->internal_api->XLA_FFI_INTERNAL_Stream_Get(context, &stream);
    if (error != nullptr) {
      diagnostic.Emit("no stream: ") << internal::GetErrorMessage(api, error);
      internal::DestroyError(api, error);
      return std::nullopt;
    }
#else
    void* stream = api->internal_api->XLA_FFI_INTERNAL_Stream_Get(context);
    if (stream == nullptr) {
      diagnostic.Emit("no stream");
      return std::nullopt;
    }
#endif
    return static_cast<Type>(stream);
  }
};

namespace deform_conv {
namespace {

class XlaCudaDevice : public StreamDevice {
 public:
  XlaCudaDevice(stream_executor::Stream* stream, ffi::ScratchAllocator& memory)
      : StreamDevice(stream), memory_(memory) {}

  std::string Allocate(int64_t bytes, void** memory) override {
    const std::optional<void*> allocated = memory_.Allocate(bytes, kAlignment);
    if (!allocated.has_value()) throw std::bad_alloc();
    *memory = *allocated;
    return "";
  }

 private:
  static constexpr size_t kAlignment = 16;  // the most that XLA grants

  ffi::ScratchAllocator& memory_;
};

class CudaBackend {
 public:
  static constexpr bool kHas16Bit = true;

  CudaBackend(stream_executor::Stream* stream, ffi::ScratchAllocator& memory)
      : device_(stream, memory) {}

  template <typename T>
  std::string Forward(const DeformConvParams& params,
                      const SampledTensors<T, ComputeType<T>>& tensors, const T* filters,
                      T* output) {
    return DeformConv2DForwardGpu<T>(params, tensors, filters, device_, output);
  }

  template <typename T>
  std::string Backward(const DeformConvParams& params,
                       const SampledTensors<T, ComputeType<T>>& tensors, const T* filters,
                       const T* grad_output,
                       const DeformConvGradients<T, ComputeType<T>>& gradients) {
    return DeformConv2DBackwardGpu<T>(params, tensors, filters, grad_output, device_, gradients);
  }

 private:
  XlaCudaDevice device_;
};

template <Operation kOperation>
ffi::Error Forward(stream_executor::Stream* stream, ffi::ScratchAllocator memory,
                   ffi::Dictionary attributes, ffi::RemainingArgs operands,
                   ffi::RemainingRets results) {
  CudaBackend backend(stream, memory);
  return HandleForward(backend, CustomCall(kOperation, attributes, operands, results));
}

template <Operation kOperation>
ffi::Error Backward(stream_executor::Stream* stream, ffi::ScratchAllocator memory,
                    ffi::Dictionary attributes, ffi::RemainingArgs operands,
                    ffi::RemainingRets results) {
  CudaBackend backend(stream, memory);
  return HandleBackward(backend, CustomCall(kOperation, attributes, operands, results));
}

auto BindDevice() { return ffi::Ffi::Bind().Ctx<StreamOfXla>().Ctx<ffi::ScratchAllocator>(); }

DEFORM_CONV_REGISTER_CALLS(Convolve, "CUDA", BindDevice());
DEFORM_CONV_REGISTER_CALLS(Aggregate, "CUDA", BindDevice());

}  // namespace
}  // namespace deform_conv
