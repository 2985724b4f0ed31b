// Tries the core on a GPU with random problems, through its C interface: results against a loop
// over the formula, and memory beside the tensors. With --exact 1, allocations are as large as the
// tensors, for compute-sanitizer; otherwise they have zones around them that are looked at.

#include <cuda_runtime.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "core/c_api/deform_conv2d_cuda.h"
#include "driver.h"
#include "elements.h"
#include "problem.h"
#include "reference.h"

namespace deform_conv::fuzz {
namespace {

bool exact = false;

void ExpectSuccess(cudaError_t error) {
  if (error != cudaSuccess) throw Finding(std::string("CUDA: ") + cudaGetErrorString(error));
}

// A tensor in a GPU's memory.
class DeviceBuffer {
 public:
  // Begins at any element, or where vectors may. Without elements it may be null.
  DeviceBuffer(Random& random, const char* name, ElementType type, int64_t size)
      : name_(name), type_(type), size_(size) {
    const int64_t shift = random.Chance(0.9) ? 0 : random.Between(1, 7);
    guard_ = (exact ? 0 : kGuard);
    begin_ = guard_ + shift * ElementBytes();
    is_null_ = size == 0 && (exact || random.Chance(0.5));
    contents_.assign(begin_ + size * ElementBytes() + guard_, kGuardByte);
    if (!is_null_) ExpectSuccess(cudaMalloc(&memory_, std::max<size_t>(contents_.size(), 1)));
  }
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() { cudaFree(memory_); }

  void* data() { return is_null_ ? nullptr : memory_ + begin_; }

  void Fill(const std::vector<double>& values) {
    for (int64_t i = 0; i < size_; ++i) {
      ForType(type_, [&](auto element) {
        element = FromDouble<decltype(element)>(values[i]);
        std::memcpy(At(i), &element, sizeof(element));
      });
    }
    Write();
  }

  // With a NaN that nothing computes: all bits are 1.
  void Poison() {
    std::fill(At(0), At(size_), 0xff);
    Write();
  }

  // What is there now. Nothing beside it may have changed.
  std::vector<unsigned char> Read() {
    std::vector<unsigned char> now(contents_.size());
    if (!is_null_) ExpectSuccess(cudaMemcpy(now.data(), memory_, now.size(), cudaMemcpyDefault));
    if (is_null_) return contents_;
    const auto end = static_cast<std::ptrdiff_t>(begin_ + size_ * ElementBytes());
    if (!std::equal(now.begin(), now.begin() + begin_, contents_.begin()) ||
        !std::equal(now.begin() + end, now.end(), contents_.begin() + end)) {
      throw Finding(std::string(name_) + ": written beside it");
    }
    return now;
  }

  void ExpectUnchanged() {
    if (Read() != contents_) throw Finding(std::string(name_) + " was changed");
  }

  std::vector<double> ReadResults() {
    const std::vector<unsigned char> now = Read();
    std::vector<double> values(size_);
    for (int64_t i = 0; i < size_; ++i) {
      const unsigned char* const at = now.data() + begin_ + i * ElementBytes();
      if (std::all_of(at, at + ElementBytes(), [](unsigned char byte) { return byte == 0xff; })) {
        throw Finding(std::string(name_) + " was not written at element " + std::to_string(i));
      }
      values[i] = ForType(type_, [at](auto element) {
        std::memcpy(&element, at, sizeof(element));
        return ToDouble(element);
      });
    }
    return values;
  }

  const char* name() const { return name_; }

 private:
  static constexpr int64_t kGuard = 256;
  static constexpr unsigned char kGuardByte = 0xa5;

  int64_t ElementBytes() const {
    return ForType(type_, [](auto element) { return static_cast<int64_t>(sizeof(element)); });
  }
  unsigned char* At(int64_t i) { return contents_.data() + begin_ + i * ElementBytes(); }
  void Write() {
    if (is_null_) return;
    ExpectSuccess(cudaMemcpy(memory_, contents_.data(), contents_.size(), cudaMemcpyDefault));
  }

  const char* name_;
  ElementType type_;
  int64_t size_, guard_, begin_;
  bool is_null_;
  std::vector<unsigned char> contents_;  // as it was written last
  unsigned char* memory_ = nullptr;
};

// --- How the core is called ---

struct CallSettings {
  bool allow_tf32, deterministic;
  int64_t path, columns_bytes;
  bool want_input, want_filters, want_offset, want_mask;
};

CallSettings DrawSettings(Random& random, bool allow_tf32, bool has_mask) {
  CallSettings settings = {};
  settings.allow_tf32 = allow_tf32;
  settings.deterministic = random.Chance(0.25);
  settings.path = random.Between(0, 2);
  settings.columns_bytes = random.Pick<int64_t>({0, 0, 1, 1 << 10, 1 << 13, 1 << 16, 1 << 20});
  const int64_t subset = random.Chance(0.5) ? 15 : random.Between(0, 15);
  settings.want_input = subset & 1;
  settings.want_filters = subset & 2;
  settings.want_offset = subset & 4;
  settings.want_mask = has_mask && (subset & 8);
  return settings;
}

std::string TextOf(const CallSettings& settings) {
  const char* const paths[] = {"any path", "general path", "fused path"};
  std::string text = paths[settings.path];
  if (settings.allow_tf32) text += ", TF32";
  if (settings.deterministic) text += ", deterministic";
  text += ", columns of " + std::to_string(settings.columns_bytes) + " bytes, gradients of";
  if (settings.want_input) text += " input";
  if (settings.want_filters) text += " filters";
  if (settings.want_offset) text += " offset";
  if (settings.want_mask) text += " mask";
  return text;
}

// What of `out` positions on an axis the input and the padding before it do not reach.
int64_t PadAfter(int64_t out, int64_t stride, int64_t kernel, int64_t dilation, int64_t in,
                 int64_t pad_before) {
  return std::max<int64_t>((out - 1) * stride + (kernel - 1) * dilation + 1 - in - pad_before, 0);
}

// The problem with explicit padding.
DeformConvProblem ProblemOf(const Problem& problem, const CallSettings& settings) {
  const DeformConvAttributes& attributes = problem.attributes;
  const DeformConvParams& params = problem.params;
  DeformConvProblem call = {};
  std::copy_n(problem.shapes.input.begin(), 4, call.input);
  std::copy_n(problem.shapes.filters.begin(), 4, call.filters);
  std::copy_n(problem.shapes.offset.begin(), 4, call.offset);
  std::copy_n(problem.shapes.mask.begin(), 4, call.mask);
  call.stride[0] = params.stride_h;
  call.stride[1] = params.stride_w;
  call.dilation[0] = params.dilation_h;
  call.dilation[1] = params.dilation_w;
  call.padding[0] = params.pad_top;
  call.padding[2] = params.pad_left;
  if (attributes.padding == Padding::kExplicit) {
    call.padding[1] = attributes.pad_bottom;
    call.padding[3] = attributes.pad_right;
  } else if (attributes.padding == Padding::kSame) {
    call.padding[1] = PadAfter(params.out_h, params.stride_h, params.kernel_h, params.dilation_h,
                               params.in_h, params.pad_top);
    call.padding[3] = PadAfter(params.out_w, params.stride_w, params.kernel_w, params.dilation_w,
                               params.in_w, params.pad_left);
  }
  call.deform_groups = params.deform_groups;
  call.element_type = static_cast<int64_t>(problem.type);
  call.allow_tf32 = settings.allow_tf32;
  call.columns_bytes = settings.columns_bytes;
  call.deterministic = settings.deterministic;
  call.path = settings.path;
  return call;
}

// As RoundingOf(), but for what differs on tensor cores.
Rounding RoundingOnGpu(const Problem& problem, bool allow_tf32) {
  Rounding rounding = RoundingOf(problem);
  if (problem.type == ElementType::kFloat || problem.type == ElementType::kBFloat16) {
    // Subnormal products may be 0, and so may subnormal floats that atomics add.
    rounding.underflow *= 0x1p23;
  }
  if (problem.type == ElementType::kFloat && allow_tf32) {
    rounding.product_unit = 0x1p-10;  // 10 bits, the rest cut off
    rounding.products = 4;
  }
  // Tensor cores cut sums off where others round.
  if (problem.type != ElementType::kDouble) rounding.sum_unit *= 4;
  return rounding;
}

// On tensor cores, what is not finite may reach further than it does in the formula, since the
// input's gradient is summed up over regions, with weights of 0 too, and convolution groups may be
// multiplied together, with filters of 0 between them.
class Spread {
 public:
  Spread(const Problem& problem, const CallSettings& settings, const Rounding& rounding) {
    if (settings.path == 1 || problem.type == ElementType::kDouble ||
        (problem.type == ElementType::kFloat && !settings.allow_tf32)) {
      return;
    }
    const bool forward = !AllFinite(problem.input) || !AllFinite(problem.mask);
    const bool backward = !AllFinite(problem.grad_output) || !AllFinite(problem.filters);
    const bool overflow = rounding.may_overflow;
    regions = backward;
    groups_forward = problem.params.groups > 1 && (forward || overflow);
    groups_backward = problem.params.groups > 1 && (backward || overflow);
  }

  // What then counts as right.
  static void Accept(const Expected& expected, std::vector<double>& actual) {
    for (size_t i = 0; i < actual.size(); ++i) {
      const bool spread = !std::isfinite(actual[i]) && std::isfinite(expected.values[i]);
      if (spread) actual[i] = expected.values[i];
    }
  }

  bool regions = false;
  // Among the samples of groups, and among the gradients of their columns.
  bool groups_forward = false, groups_backward = false;

 private:
  static bool AllFinite(const std::vector<double>& values) {
    return std::all_of(values.begin(), values.end(),
                       [](double value) { return std::isfinite(value); });
  }
};

// --- A case ---

class GpuCase {
 public:
  GpuCase(Random& random, const Problem& problem, const CallSettings& settings)
      : problem_(problem),
        settings_(settings),
        call_(ProblemOf(problem, settings)),
        offset_type_(OffsetTypeOf(problem.type)),
        input_(random, "input", problem.type, Size(problem.input)),
        filters_(random, "filters", problem.type, Size(problem.filters)),
        offset_(random, "offset", offset_type_, Size(problem.offset)),
        mask_(random, "mask", offset_type_, Size(problem.mask)),
        grad_output_(random, "grad_output", problem.type, Size(problem.grad_output)),
        output_(random, "output", problem.type, Size(problem.grad_output)),
        grad_input_(random, "grad_input", problem.type, Size(problem.input)),
        grad_filters_(random, "grad_filters", problem.type, Size(problem.filters)),
        grad_offset_(random, "grad_offset", offset_type_, Size(problem.offset)),
        grad_mask_(random, "grad_mask", offset_type_, Size(problem.mask)) {
    input_.Fill(problem.input);
    filters_.Fill(problem.filters);
    offset_.Fill(problem.offset);
    mask_.Fill(problem.mask);
    grad_output_.Fill(problem.grad_output);
  }

  void Run(bool twice) {
    const Reference reference = Compute(problem_, true);
    const Rounding rounding = RoundingOnGpu(problem_, settings_.allow_tf32);
    const DeformConvShapes& shapes = problem_.shapes;
    const std::vector<int64_t> output = {shapes.offset[0], shapes.offset[1], shapes.offset[2],
                                         problem_.params.out_channels};
    const Spread spread(problem_, settings_, rounding);
    if (Forward()) {
      Expect(output_, reference.output, output, rounding, spread.groups_forward);
      if (twice && settings_.deterministic) ExpectSameAgain(true);
    }
    if (Backward()) {
      const auto expect = [&](bool wanted, DeviceBuffer& actual, const Expected& expected,
                              const std::array<int64_t, 4>& of, bool spreads = false) {
        if (wanted) Expect(actual, expected, {of.begin(), of.end()}, rounding, spreads);
      };
      expect(settings_.want_input, grad_input_, reference.grad_input, shapes.input,
             spread.regions || spread.groups_backward);
      expect(settings_.want_filters, grad_filters_, reference.grad_filters, shapes.filters);
      expect(settings_.want_offset, grad_offset_, reference.grad_offset, shapes.offset,
             spread.groups_backward);
      expect(settings_.want_mask, grad_mask_, reference.grad_mask, shapes.mask,
             spread.groups_backward);
      if (twice && settings_.deterministic) ExpectSameAgain(false);
    }
    for (DeviceBuffer* argument : {&input_, &filters_, &offset_, &mask_, &grad_output_}) {
      argument->ExpectUnchanged();
    }
  }

 private:
  static int64_t Size(const std::vector<double>& values) {
    return static_cast<int64_t>(values.size());
  }

  std::vector<DeviceBuffer*> Results() {
    return {&output_, &grad_input_, &grad_filters_, &grad_offset_, &grad_mask_};
  }

  void* MaskData() { return problem_.shapes.has_mask ? mask_.data() : nullptr; }

  // Both return whether the call was done.
  bool Forward() {
    for (DeviceBuffer* result : Results()) result->Poison();
    return Done(deform_conv2d_forward_cuda(&call_, input_.data(), filters_.data(), offset_.data(),
                                           MaskData(), output_.data(), nullptr));
  }

  bool Backward() {
    for (DeviceBuffer* result : Results()) result->Poison();
    const auto wanted = [](bool want, DeviceBuffer& gradient) {
      return want ? gradient.data() : nullptr;
    };
    return Done(deform_conv2d_backward_cuda(
        &call_, input_.data(), filters_.data(), offset_.data(), MaskData(), grad_output_.data(),
        wanted(settings_.want_input, grad_input_), wanted(settings_.want_filters, grad_filters_),
        wanted(settings_.want_offset, grad_offset_), wanted(settings_.want_mask, grad_mask_),
        nullptr));
  }

  // Only that no fused kernel fits may be an error.
  bool Done(const char* error) {
    ExpectSuccess(cudaDeviceSynchronize());
    if (error == nullptr) return true;
    if (settings_.path == 2 && std::strncmp(error, "no fused kernel for", 19) == 0) return false;
    throw Finding(std::string("an error: ") + error);
  }

  void ExpectSameAgain(bool forward) {
    std::vector<std::vector<unsigned char>> before;
    for (DeviceBuffer* result : Results()) before.push_back(result->Read());
    forward ? Forward() : Backward();
    for (size_t i = 0; i < before.size(); ++i) {
      if (Results()[i]->Read() != before[i]) {
        throw Finding(std::string("a second run gives other bits of ") + Results()[i]->name());
      }
    }
  }

  void Expect(DeviceBuffer& actual, const Expected& expected, const std::vector<int64_t>& shape,
              const Rounding& rounding, bool spreads = false) {
    std::vector<double> values = actual.ReadResults();
    if (spreads) Spread::Accept(expected, values);
    const std::string error = Compare(actual.name(), expected, values, shape, rounding);
    if (!error.empty()) throw Finding(error);
  }

  const Problem& problem_;
  const CallSettings& settings_;
  const DeformConvProblem call_;
  const ElementType offset_type_;
  DeviceBuffer input_, filters_, offset_, mask_, grad_output_;
  DeviceBuffer output_, grad_input_, grad_filters_, grad_offset_, grad_mask_;
};

void RunCase(Random& random, ElementType type, bool allow_tf32) {
  // The fused kernels want channels in eights.
  const Shaping shaping = {random.Chance(0.3) ? 10.0 : 1.0, random.Chance(0.6)};
  const auto problem = std::make_shared<const Problem>(DrawProblem(random, type, shaping));
  const CallSettings settings = DrawSettings(random, allow_tf32, problem->params.has_mask);
  Describe(problem, TextOf(settings));
  GpuCase(random, *problem, settings).Run(random.Chance(0.3));
}

int Main(int argc, char** argv) {
  const Options options =
      ReadOptions(argc, argv, "  --exact 1  no zones beside tensors, for compute-sanitizer\n",
                  [](const std::string& name, const std::string& value) {
                    if (name == "--exact") exact = value != "0";
                    return name == "--exact";
                  });
  const auto kind = [](const char* name, double share, ElementType type, bool allow_tf32 = false) {
    return Kind{name, share, [=](Random& random) { RunCase(random, type, allow_tf32); }};
  };
  return RunCases(
      options,
      {kind("float", 0.2, ElementType::kFloat), kind("tf32", 0.2, ElementType::kFloat, true),
       kind("double", 0.1, ElementType::kDouble), kind("half", 0.3, ElementType::kHalf),
       kind("bfloat16", 0.2, ElementType::kBFloat16)});
}

}  // namespace
}  // namespace deform_conv::fuzz

int main(int argc, char** argv) { return deform_conv::fuzz::Main(argc, argv); }
