// What the custom calls do on every device: from XLA's buffers to the core. The device's part is a
// Backend:
//
//   class Backend {
//     // Whether it computes on 16-bit tensors.
//     static constexpr bool kHas16Bit = ...;
//
//     // Both return an empty string, or what went wrong.
//     template <typename T>
//     std::string Forward(const DeformConvParams&, const SampledTensors<T, ComputeType<T>>&,
//                         const T* filters, T* output);
//     template <typename T>
//     std::string Backward(const DeformConvParams&, const SampledTensors<T, ComputeType<T>>&,
//                          const T* filters, const T* grad_output,
//                          const DeformConvGradients<T, ComputeType<T>>&);
//   };

#ifndef DEFORM_CONV_TF_XLA_CUSTOM_CALL_HANDLERS_H_
#define DEFORM_CONV_TF_XLA_CUSTOM_CALL_HANDLERS_H_

#include <string>
#include <utility>

#include "core/deform_conv2d.h"
#include "tf/exception_to_status.h"
#include "tf/op_attributes.h"
#include "tf/xla/custom_calls.h"
#include "xla/ffi/api/ffi.h"

namespace xla::ffi {
// What XLA_FFI_GetApi() returns. Every build of TensorFlow exports this; not every one exports
// that.
const XLA_FFI_Api* GetXlaFfiApi();
}  // namespace xla::ffi

namespace deform_conv {

namespace ffi = xla::ffi;

template <typename T>
struct TypeTag {
  using type = T;
};

inline ffi::Error ErrorOf(const absl::Status& status) {
  if (status.ok()) return ffi::Error::Success();
  // XLA's codes are those of absl.
  return ffi::Error(static_cast<ffi::ErrorCode>(status.code()), std::string(status.message()));
}

// Calls work(TypeTag<T>()), which returns an empty string or what went wrong, for the T that `type`
// stands for.
template <typename Backend, typename Work>
ffi::Error ForType(ffi::DataType type, const Work& work) {
  return ErrorOf(ExceptionToStatus([&] {
    std::string error = "the custom calls take no such type";
    if (type == ffi::F32) {
      error = work(TypeTag<float>());
    } else if (type == ffi::F64) {
      error = work(TypeTag<double>());
    }
    if constexpr (Backend::kHas16Bit) {
      if (type == ffi::F16) error = work(TypeTag<Half>());
      if (type == ffi::BF16) error = work(TypeTag<BFloat16>());
    }
    return error.empty() ? absl::OkStatus() : absl::InternalError(error);
  }));
}

template <typename T>
T* DataOf(const ffi::AnyBuffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

// The mask's data, or null where `masks` has none.
template <typename OffsetT>
const OffsetT* OptionalMask(const ffi::RemainingArgs& masks) {
  return masks.size() == 0 ? nullptr : DataOf<OffsetT>(*masks.get<ffi::AnyBuffer>(0));
}

template <typename Backend>
ffi::Error HandleForward(Backend& backend, ffi::Span<const int64_t> words,
                         const ffi::AnyBuffer& input, const ffi::AnyBuffer& filters,
                         const ffi::AnyBuffer& offset, const ffi::RemainingArgs& masks,
                         const ffi::AnyBuffer& output) {
  if (output.element_count() == 0) return ffi::Error::Success();
  const DeformConvParams params = FromWords(words.begin());
  return ForType<Backend>(input.element_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const SampledTensors<T, ComputeType<T>> tensors = {
        DataOf<T>(input), DataOf<ComputeType<T>>(offset), OptionalMask<ComputeType<T>>(masks)};
    return backend.template Forward<T>(params, tensors, DataOf<T>(filters), DataOf<T>(output));
  });
}

template <typename Backend>
ffi::Error HandleBackward(Backend& backend, ffi::Span<const int64_t> words, int64_t wanted,
                          const ffi::AnyBuffer& input, const ffi::AnyBuffer& filters,
                          const ffi::AnyBuffer& offset, const ffi::AnyBuffer& grad_output,
                          const ffi::RemainingArgs& masks, const ffi::RemainingRets& results) {
  const DeformConvParams params = FromWords(words.begin());
  void* gradients[kArguments] = {};
  size_t next = 0;
  for (int i = 0; i < kArguments; ++i) {
    if (wanted >> i & 1) gradients[i] = (*results.get<ffi::AnyBuffer>(next++))->untyped_data();
  }
  return ForType<Backend>(input.element_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    const SampledTensors<T, ComputeType<T>> tensors = {
        DataOf<T>(input), DataOf<ComputeType<T>>(offset), OptionalMask<ComputeType<T>>(masks)};
    const DeformConvGradients<T, ComputeType<T>> typed = {
        {static_cast<T*>(gradients[kInput]), static_cast<ComputeType<T>*>(gradients[kOffset]),
         static_cast<ComputeType<T>*>(gradients[kMask])},
        static_cast<T*>(gradients[kFilters])};
    return backend.template Backward<T>(params, tensors, DataOf<T>(filters), DataOf<T>(grad_output),
                                        typed);
  });
}

// Binds what XLA passes to a handler, after the device's own part, to the functions above.
template <typename Binding>
auto BindForward(Binding binding) {
  return std::move(binding)
      .template Attr<ffi::Span<const int64_t>>(kParamsAttribute)
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .template Ret<ffi::AnyBuffer>();
}

template <typename Binding>
auto BindBackward(Binding binding) {
  return std::move(binding)
      .template Attr<ffi::Span<const int64_t>>(kParamsAttribute)
      .template Attr<int64_t>(kWantedAttribute)
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .RemainingRets();
}

}  // namespace deform_conv

#endif  // DEFORM_CONV_TF_XLA_CUSTOM_CALL_HANDLERS_H_
