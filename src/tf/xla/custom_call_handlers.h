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

#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "core/deform_conv2d.h"
#include "tf/xla/custom_calls.h"
#include "xla/ffi/api/ffi.h"

namespace deform_conv {

namespace ffi = xla::ffi;

template <typename T>
struct TypeTag {
  using type = T;
};

// Calls work(TypeTag<T>()) for the T that `type` stands for; turns what goes wrong into an error.
template <typename Backend, typename Work>
ffi::Error ForType(ffi::DataType type, const Work& work) {
  std::string error = "the custom calls take no such type";
  try {
    if (type == ffi::F32) {
      error = work(TypeTag<float>());
    } else if (type == ffi::F64) {
      error = work(TypeTag<double>());
    }
    if constexpr (Backend::kHas16Bit) {
      if (type == ffi::F16) error = work(TypeTag<Half>());
      if (type == ffi::BF16) error = work(TypeTag<BFloat16>());
    }
  } catch (const std::bad_alloc&) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, "out of memory for the op's workspace");
  } catch (const std::invalid_argument& exception) {
    return ffi::Error::InvalidArgument(exception.what());
  } catch (const std::exception& exception) {
    error = exception.what();
  }
  return error.empty() ? ffi::Error::Success() : ffi::Error::Internal(error);
}

template <typename T>
T* DataOf(const ffi::AnyBuffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

// The mask's data, or null where `masks` has none.
template <typename T>
const T* MaskOf(const ffi::RemainingArgs& masks) {
  return masks.size() == 0 ? nullptr : DataOf<T>(*masks.get<ffi::AnyBuffer>(0));
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
    using Position = ComputeType<T>;
    const SampledTensors<T, Position> tensors = {DataOf<T>(input), DataOf<Position>(offset),
                                                 MaskOf<Position>(masks)};
    return backend.template Forward<T>(params, tensors, DataOf<T>(filters), DataOf<T>(output));
  });
}

template <typename Backend>
ffi::Error HandleBackward(Backend& backend, ffi::Span<const int64_t> words, int64_t wanted,
                          const ffi::AnyBuffer& input, const ffi::AnyBuffer& filters,
                          const ffi::AnyBuffer& offset, const ffi::AnyBuffer& grad_output,
                          const ffi::RemainingArgs& masks, const ffi::RemainingRets& results) {
  const DeformConvParams params = FromWords(words.begin());
  void* gradients[4] = {};
  size_t next = 0;
  for (int i = 0; i < 4; ++i) {
    if (wanted >> i & 1) gradients[i] = (*results.get<ffi::AnyBuffer>(next++))->untyped_data();
  }
  return ForType<Backend>(input.element_type(), [&](auto tag) {
    using T = typename decltype(tag)::type;
    using Position = ComputeType<T>;
    const SampledTensors<T, Position> tensors = {DataOf<T>(input), DataOf<Position>(offset),
                                                 MaskOf<Position>(masks)};
    const DeformConvGradients<T, Position> typed = {
        {static_cast<T*>(gradients[0]), static_cast<Position*>(gradients[2]),
         static_cast<Position*>(gradients[3])},
        static_cast<T*>(gradients[1])};
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
