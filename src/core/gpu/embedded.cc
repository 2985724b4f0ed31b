#include "core/gpu/embedded.h"

#include <algorithm>
#include <type_traits>

#include "core/cuda/general/kernels.h"
#include "core/deform_conv2d.h"
#include "core/gpu/chunk_plan.h"
#include "core/gpu/columns_backward.h"
#include "core/gpu/embedding.h"
#include "core/gpu/gradient_sum.h"
#include "core/gpu/repeating_device.h"
#include "core/gpu/some_images.h"
#include "core/return_if_error.h"

namespace deform_conv {
namespace {

// The most that padded tensors take, unless those of an image take more.
constexpr int64_t kPaddedBytes = int64_t{64} << 20;

// --- The larger layer ---

template <typename T>
constexpr int64_t kVector = 16 / sizeof(T);

// A K block of the tensor cores has 128 bytes of channels.
template <typename T>
constexpr int64_t kGroup = 128 / sizeof(T);

template <typename T>
ChannelAims FusedAims(const ForwardCall<T>&) {
  return {kVector<T>, kVector<T>, kGroup<T>, kVector<T>, 1};
}
template <typename T>
ChannelAims FusedAims(const BackwardCall<T>& call) {
  constexpr int64_t kSlice = 32;  // of RegionScatterSm90
  // Unless that one is asked for, deformable groups of 16 channels in 16 bits are left to
  // Col2ImRegions.
  const bool leaves_16 = call.params.deform_groups > 1 && call.device.path() != KernelPath::kFused;
  const double growth = leaves_16 ? 1.75 : 2;
  return {kVector<T>, kVector<T>, kGroup<T>, kSlice, sizeof(T) == 2 ? growth : 1.25};
}

template <typename T>
bool MultipliesOnTensorCores(const GpuDevice& device) {
  return !std::is_same_v<T, float> || device.allow_tf32();
}

// For the general implementations: vectors are read faster, and GEMMs on tensor cores want them.
template <typename T>
ChannelAims GeneralAims(const GpuDevice& device) {
  return {kVector<T>, MultipliesOnTensorCores<T>(device) ? kVector<T> : 1, 1, kVector<T>, 1};
}

// Stands for workspace where it only counts that it is aligned.
template <typename T>
T* AlignedWorkspace() {
  alignas(16) static unsigned char memory[16];
  return reinterpret_cast<T*>(memory);
}

// Whether a fused kernel computes the larger layer.
template <typename T>
bool IsFused(const ForwardCall<T>& call, const Embedding& embedding) {
  SampledTensors<T, ComputeType<T>> tensors = call.tensors;
  if (embedding.pads_input()) tensors.input = AlignedWorkspace<T>();
  T* const output = embedding.pads_output() ? AlignedWorkspace<T>() : call.output;
  const ForwardCall<T> larger = {embedding.larger, tensors, AlignedWorkspace<T>(), output,
                                 call.device};
  const Implementation<ForwardCall<T>>* chosen;
  const std::string misfit = Choose(ForwardImplementations<T>(), "output", larger, &chosen);
  return misfit.empty() && chosen->path == KernelPath::kFused;
}
template <typename T>
bool IsFused(const BackwardCall<T>& call, const Embedding& embedding) {
  if (!call.gradients.sampled.any()) return false;
  SampledTensors<T, ComputeType<T>> tensors = call.tensors;
  DeformConvGradients<T, ComputeType<T>> gradients = call.gradients;
  if (embedding.pads_input()) {
    tensors.input = AlignedWorkspace<T>();
    if (gradients.sampled.input != nullptr) gradients.sampled.input = AlignedWorkspace<T>();
  }
  const BackwardCall<T> larger = {embedding.larger,      tensors,   AlignedWorkspace<T>(),
                                  AlignedWorkspace<T>(), gradients, call.device};
  const Col2ImImplementation<T>* chosen;
  const std::string misfit = ChooseCol2Im(larger, &chosen);
  return misfit.empty() && chosen->path == KernelPath::kFused;
}

// Calls with fewer elements of columns than these are faster as they are: each copy is a launch.
constexpr int64_t kFewestToPad = int64_t{1} << 22, kFewestToMerge = int64_t{1} << 19;

template <typename T>
int64_t FewestToFuse(const ForwardCall<T>&, const Embedding& embedding) {
  const bool pads = embedding.pads_input() || embedding.pads_output();
  return pads ? kFewestToPad : kFewestToMerge;
}
// Backward, a fused kernel always makes up for the copies.
template <typename T>
int64_t FewestToFuse(const BackwardCall<T>&, const Embedding&) {
  return 0;
}

// Finds the larger layer that is worth its copies. Returns why there is none, or an empty string.
template <typename T, template <typename> class Call>
std::string FindEmbedding(const Call<T>& call, Embedding* embedding) {
  constexpr int64_t kMostChannels = int64_t{1} << 24;  // so that larger ones fit into 32 bits
  if (call.params.out_positions() == 0 || call.params.image_size() == 0) {
    return "the input or the output is empty";
  }
  if (std::max(call.params.in_channels, call.params.out_channels) > kMostChannels) {
    return "it has too many channels";
  }
  // A forced path is taken whatever it costs.
  const KernelPath path = call.device.path();
  const int64_t columns = path == KernelPath::kAny
                              ? ColumnsBytes(call.params, call.params.out_positions(), 1)
                              : INT64_MAX;
  if (MultipliesOnTensorCores<T>(call.device)) {
    *embedding = EmbeddingOf(call.params, FusedAims(call));
    if (!embedding->changes_nothing() && columns >= FewestToFuse(call, *embedding) &&
        IsFused(call, *embedding)) {
      return "";
    }
  }
  if (path == KernelPath::kFused) return "no fused kernel takes it with other channels either";
  *embedding = EmbeddingOf(call.params, GeneralAims<T>(call.device));
  if (embedding->changes_nothing()) return "its channels are best as they are";
  if (!embedding->pads_little()) return "its channels would grow by more than half";
  return columns >= kFewestToPad ? "" : "it is small";
}

// The filters of the larger layer.
template <typename T>
std::string EmbedFilters(const Embedding& embedding, const T* filters, GpuDevice& device,
                         const T** result) {
  T* larger;
  DEFORM_CONV_RETURN_IF_ERROR(device.Allocate(embedding.larger.filters_size() * sizeof(T),
                                              reinterpret_cast<void**>(&larger)));
  *result = larger;
  return cuda::EmbedFilters<T>(embedding, filters, larger, device.stream());
}

// --- Padded tensors ---

// A tensor [images, runs, channels] of the layer, and the larger layer's, whose runs are longer: a
// copy. Where runs are as long, both are one.
template <typename T>
class PaddedTensor {
 public:
  PaddedTensor(int64_t runs, int64_t channels, int64_t padded_channels, GpuDevice& device)
      : runs_(runs), channels_(channels), padded_channels_(padded_channels), device_(device) {}

  static PaddedTensor Input(const Embedding& of, GpuDevice& device) {
    return {of.layer.image_pixels() * of.in_runs, of.layer.in_channels / of.in_runs,
            of.larger.in_channels / of.in_runs, device};
  }
  static PaddedTensor Output(const Embedding& of, GpuDevice& device) {
    const int64_t groups = of.larger.groups;
    return {of.layer.image_positions() * groups, of.layer.out_channels / groups,
            of.larger.out_channels / groups, device};
  }

  // What the copy takes for each image.
  int64_t ImageBytes() const { return is_copy() ? runs_ * padded_channels_ * sizeof(T) : 0; }

  // Makes room for so many images at a time.
  std::string Allocate(int64_t most_images) {
    if (!is_copy()) return "";
    return device_.Allocate(most_images * ImageBytes(), reinterpret_cast<void**>(&copy_));
  }

  // The tensor as the larger layer reads it.
  std::string Pad(int64_t images, const T* tensor, const T** padded) {
    *padded = is_copy() ? copy_ : tensor;
    if (!is_copy()) return "";
    return cuda::PadChannels<T>(images * runs_, channels_, tensor, padded_channels_, copy_,
                                device_.stream());
  }

  // Where the larger layer writes what is to become `tensor`; null if that is.
  T* Target(T* tensor) const { return is_copy() && tensor != nullptr ? copy_ : tensor; }

  // Writes `tensor` from its target.
  std::string Unpad(int64_t images, T* tensor) {
    if (!is_copy() || tensor == nullptr) return "";
    return cuda::UnpadChannels<T>(images * runs_, padded_channels_, copy_, channels_, tensor,
                                  device_.stream());
  }

 private:
  bool is_copy() const { return padded_channels_ != channels_; }

  int64_t runs_;  // of an image
  int64_t channels_, padded_channels_;
  GpuDevice& device_;
  T* copy_ = nullptr;
};

// Images that are worked on at a time, of which each has so many bytes of padded tensors.
int64_t ImagesAtATime(int64_t batch, int64_t image_bytes) {
  if (image_bytes == 0) return batch;
  return PartOf(batch, std::clamp<int64_t>(kPaddedBytes / image_bytes, 1, batch));
}

// The larger layer with the batch of a part.
DeformConvParams PartOfLarger(const Embedding& embedding, int64_t images) {
  DeformConvParams params = embedding.larger;
  params.batch = images;
  return params;
}

// --- Forward ---

template <typename T>
std::string Forward(const ForwardCall<T>& call) {
  Embedding embedding;
  DEFORM_CONV_RETURN_IF_ERROR(FindEmbedding(call, &embedding));
  auto input = PaddedTensor<T>::Input(embedding, call.device);
  auto output = PaddedTensor<T>::Output(embedding, call.device);
  const int64_t images = ImagesAtATime(call.params.batch, input.ImageBytes() + output.ImageBytes());
  DEFORM_CONV_RETURN_IF_ERROR(input.Allocate(images));
  DEFORM_CONV_RETURN_IF_ERROR(output.Allocate(images));
  const T* filters;
  DEFORM_CONV_RETURN_IF_ERROR(EmbedFilters(embedding, call.filters, call.device, &filters));

  RepeatingDevice device(call.device);
  for (int64_t first = 0; first < call.params.batch; first += images) {
    const SomeImages<T> some(call.params, call.tensors, first, images);
    const int64_t count = some.params().batch;
    SampledTensors<T, ComputeType<T>> tensors = some.tensors();
    DEFORM_CONV_RETURN_IF_ERROR(input.Pad(count, some.tensors().input, &tensors.input));
    T* const part = call.output + some.position() * call.params.out_channels;
    device.Repeat();
    DEFORM_CONV_RETURN_IF_ERROR(DeformConv2DForwardGpu<T>(PartOfLarger(embedding, count), tensors,
                                                          filters, device, output.Target(part)));
    DEFORM_CONV_RETURN_IF_ERROR(output.Unpad(count, part));
  }
  return "";
}

// --- Backward ---

// The gradient of the filters, of parts of a batch that come one after the other.
template <typename T>
class FiltersGradient {
 public:
  // Null where it is not wanted.
  FiltersGradient(const Embedding& embedding, T* gradient, GpuDevice& device)
      : embedding_(embedding), gradient_(gradient), device_(device), sum_(device) {}

  std::string Begin(bool several_parts) {
    if (gradient_ == nullptr) return "";
    several_parts_ = several_parts;
    DEFORM_CONV_RETURN_IF_ERROR(device_.Allocate(embedding_.larger.filters_size() * sizeof(T),
                                                 reinterpret_cast<void**>(&larger_)));
    if (!several_parts) return "";
    DEFORM_CONV_RETURN_IF_ERROR(sum_.Allocate(embedding_.layer.filters_size()));
    return sum_.Begin(gradient_, embedding_.layer.filters_size());
  }

  // That of the larger layer, which is to be written.
  T* larger() const { return larger_; }

  // Takes what has been written there.
  std::string Take() {
    if (gradient_ == nullptr) return "";
    return several_parts_
               ? cuda::ExtractFilters(embedding_, larger_, true, sum_.data(), device_.stream())
               : cuda::ExtractFilters(embedding_, larger_, false, gradient_, device_.stream());
  }

  std::string End() { return sum_.Store(); }

 private:
  const Embedding& embedding_;
  T* const gradient_;
  GpuDevice& device_;
  GradientSum<T> sum_;  // of several parts
  bool several_parts_ = false;
  T* larger_ = nullptr;
};

template <typename T>
std::string Backward(const BackwardCall<T>& call) {
  Embedding embedding;
  DEFORM_CONV_RETURN_IF_ERROR(FindEmbedding(call, &embedding));
  const bool want_input = call.gradients.sampled.input != nullptr;
  auto input = PaddedTensor<T>::Input(embedding, call.device);
  auto grad_input = PaddedTensor<T>::Input(embedding, call.device);
  auto grad_output = PaddedTensor<T>::Output(embedding, call.device);
  FiltersGradient<T> grad_filters(embedding, call.gradients.filters, call.device);
  const int64_t images =
      ImagesAtATime(call.params.batch, input.ImageBytes() + grad_output.ImageBytes() +
                                           (want_input ? grad_input.ImageBytes() : 0));
  DEFORM_CONV_RETURN_IF_ERROR(input.Allocate(images));
  DEFORM_CONV_RETURN_IF_ERROR(grad_output.Allocate(images));
  if (want_input) DEFORM_CONV_RETURN_IF_ERROR(grad_input.Allocate(images));
  DEFORM_CONV_RETURN_IF_ERROR(grad_filters.Begin(images < call.params.batch));
  const T* filters;
  DEFORM_CONV_RETURN_IF_ERROR(EmbedFilters(embedding, call.filters, call.device, &filters));

  RepeatingDevice device(call.device);
  for (int64_t first = 0; first < call.params.batch; first += images) {
    const SomeImages<T> some(call.params, call.tensors, first, images);
    const int64_t count = some.params().batch;
    SampledTensors<T, ComputeType<T>> tensors = some.tensors();
    DEFORM_CONV_RETURN_IF_ERROR(input.Pad(count, some.tensors().input, &tensors.input));
    const T* larger_grad_output;
    DEFORM_CONV_RETURN_IF_ERROR(grad_output.Pad(
        count, call.grad_output + some.position() * call.params.out_channels, &larger_grad_output));
    const SampledGradients<T, ComputeType<T>> wanted = some.Of(call.gradients.sampled);
    device.Repeat();
    DEFORM_CONV_RETURN_IF_ERROR(DeformConv2DBackwardGpu<T>(
        PartOfLarger(embedding, count), tensors, filters, larger_grad_output, device,
        {{grad_input.Target(wanted.input), wanted.offset, wanted.mask}, grad_filters.larger()}));
    DEFORM_CONV_RETURN_IF_ERROR(grad_input.Unpad(count, wanted.input));
    DEFORM_CONV_RETURN_IF_ERROR(grad_filters.Take());
  }
  return grad_filters.End();
}

constexpr char kNoDouble[] = "float64 is computed as it is";

// Why a call cannot be embedded, or is better not embedded; or an empty string.
template <typename T, template <typename> class Call>
std::string Misfit(const Call<T>& call) {
  Embedding embedding;
  if constexpr (!std::is_same_v<T, double>) return FindEmbedding(call, &embedding);
  return kNoDouble;
}

}  // namespace

template <typename T>
std::string EmbeddedForwardMisfit(const ForwardCall<T>& call) {
  return Misfit(call);
}

template <typename T>
std::string ForwardEmbedded(const ForwardCall<T>& call) {
  if constexpr (!std::is_same_v<T, double>) return Forward(call);
  return kNoDouble;
}

template <typename T>
std::string EmbeddedBackwardMisfit(const BackwardCall<T>& call) {
  return Misfit(call);
}

template <typename T>
std::string BackpropEmbedded(const BackwardCall<T>& call) {
  if constexpr (!std::is_same_v<T, double>) return Backward(call);
  return kNoDouble;
}

#define DEFORM_CONV_INSTANTIATE(T)                                        \
  template std::string EmbeddedForwardMisfit<T>(const ForwardCall<T>&);   \
  template std::string ForwardEmbedded<T>(const ForwardCall<T>&);         \
  template std::string EmbeddedBackwardMisfit<T>(const BackwardCall<T>&); \
  template std::string BackpropEmbedded<T>(const BackwardCall<T>&);
DEFORM_CONV_FOR_ELEMENT_TYPES(DEFORM_CONV_INSTANTIATE)
#undef DEFORM_CONV_INSTANTIATE

}  // namespace deform_conv
