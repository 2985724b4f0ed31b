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
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "core/deform_conv2d.h"
#include "tensorflow/core/platform/errors.h"
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
absl::Status ForType(ffi::DataType type, const Work& work) {
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
}

template <typename T>
T* DataOf(const ffi::AnyBuffer& buffer) {
  return static_cast<T*>(buffer.untyped_data());
}

// The arguments of a call. Their types and shapes are checked once more: a compiled module may have
// been made by another version, or changed.
class CallArguments {
 public:
  // Without a mask, `masks` is empty.
  CallArguments(const ffi::AnyBuffer& input, const ffi::AnyBuffer& filters,
                const ffi::AnyBuffer& offset, const ffi::RemainingArgs& masks)
      : buffers_{input, filters, offset} {
    for (size_t i = 0; i < masks.size(); ++i) buffers_.push_back(*masks.get<ffi::AnyBuffer>(i));
  }

  ffi::DataType type() const { return buffers_[kInput].element_type(); }

  absl::Status MakeParams(ffi::Span<const int64_t> words, DeformConvParams* params) const {
    OpAttributes attributes;
    if (!FromWords(words.begin(), words.size(), &attributes.conv)) {
      return absl::InvalidArgumentError("attributes are not those of this version of the calls");
    }
    if (buffers_.size() > kArguments) return absl::InvalidArgumentError("mask is given twice");
    attributes.has_mask = buffers_.size() > kMask;
    const ffi::DataType compute_type = type() == ffi::F64 ? ffi::F64 : ffi::F32;
    for (size_t i = 0; i < buffers_.size(); ++i) {
      if (buffers_[i].element_type() != (i < kOffset ? type() : compute_type)) {
        return absl::InvalidArgumentError(
            absl::StrCat(ArgumentName(i, true), " has another type than the call is for"));
      }
    }
    const auto dimensions = [this](int i) { return DimensionsOf(buffers_[i]); };
    return MakeParamsOf(attributes, dimensions, params);
  }

  // Fails unless `output`, or the output's gradient, has the type of the input and the shape of
  // the output.
  absl::Status CheckOutput(const DeformConvParams& params, const ffi::AnyBuffer& output) const {
    if (output.element_type() != type()) {
      return absl::InvalidArgumentError("the output has another type than the input");
    }
    return CheckGradOutput(DataFormat::kNhwc, params, DimensionsOf(output));
  }

  // Fails unless `result`, the gradient of argument i, has its type and shape.
  absl::Status CheckGradient(size_t i, const ffi::AnyBuffer& result) const {
    if (i < buffers_.size() && result.element_type() == buffers_[i].element_type() &&
        DimensionsOf(result) == DimensionsOf(buffers_[i])) {
      return absl::OkStatus();
    }
    return absl::InvalidArgumentError(absl::StrCat(
        "grad_", ArgumentName(i, true), " has another type or shape than ", ArgumentName(i, true)));
  }

  template <typename T>
  SampledTensors<T, ComputeType<T>> Tensors() const {
    using OffsetT = ComputeType<T>;
    return {DataOf<T>(buffers_[kInput]), DataOf<OffsetT>(buffers_[kOffset]),
            buffers_.size() > kMask ? DataOf<OffsetT>(buffers_[kMask]) : nullptr};
  }

  template <typename T>
  const T* Filters() const {
    return DataOf<T>(buffers_[kFilters]);
  }

 private:
  static std::vector<int64_t> DimensionsOf(const ffi::AnyBuffer& buffer) {
    return {buffer.dimensions().begin(), buffer.dimensions().end()};
  }

  std::vector<ffi::AnyBuffer> buffers_;
};

template <typename Backend>
ffi::Error HandleForward(Backend& backend, ffi::Span<const int64_t> words,
                         const ffi::AnyBuffer& input, const ffi::AnyBuffer& filters,
                         const ffi::AnyBuffer& offset, const ffi::RemainingArgs& masks,
                         const ffi::AnyBuffer& output) {
  return ErrorOf(ExceptionToStatus([&]() -> absl::Status {
    const CallArguments arguments(input, filters, offset, masks);
    DeformConvParams params;
    TF_RETURN_IF_ERROR(arguments.MakeParams(words, &params));
    TF_RETURN_IF_ERROR(arguments.CheckOutput(params, output));
    if (output.element_count() == 0) return absl::OkStatus();
    return ForType<Backend>(arguments.type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      return backend.template Forward<T>(params, arguments.Tensors<T>(), arguments.Filters<T>(),
                                         DataOf<T>(output));
    });
  }));
}

template <typename Backend>
ffi::Error HandleBackward(Backend& backend, ffi::Span<const int64_t> words, int64_t wanted,
                          const ffi::AnyBuffer& input, const ffi::AnyBuffer& filters,
                          const ffi::AnyBuffer& offset, const ffi::AnyBuffer& grad_output,
                          const ffi::RemainingArgs& masks, const ffi::RemainingRets& results) {
  return ErrorOf(ExceptionToStatus([&]() -> absl::Status {
    const CallArguments arguments(input, filters, offset, masks);
    DeformConvParams params;
    TF_RETURN_IF_ERROR(arguments.MakeParams(words, &params));
    TF_RETURN_IF_ERROR(arguments.CheckOutput(params, grad_output));
    void* gradients[kArguments] = {};
    size_t next = 0;
    for (size_t i = 0; i < kArguments; ++i) {
      if (!(wanted >> i & 1)) continue;
      if (next == results.size()) return absl::InvalidArgumentError("a gradient has no result");
      const ffi::AnyBuffer result = **results.get<ffi::AnyBuffer>(next++);
      TF_RETURN_IF_ERROR(arguments.CheckGradient(i, result));
      gradients[i] = result.untyped_data();
    }
    return ForType<Backend>(arguments.type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      using OffsetT = ComputeType<T>;
      const DeformConvGradients<T, OffsetT> typed = {
          {static_cast<T*>(gradients[kInput]), static_cast<OffsetT*>(gradients[kOffset]),
           static_cast<OffsetT*>(gradients[kMask])},
          static_cast<T*>(gradients[kFilters])};
      return backend.template Backward<T>(params, arguments.Tensors<T>(), arguments.Filters<T>(),
                                          DataOf<T>(grad_output), typed);
    });
  }));
}

// Binds what XLA passes to a handler, after the device's own part, to the functions above.
template <typename Binding>
auto BindForward(Binding binding) {
  return std::move(binding)
      .template Attr<ffi::Span<const int64_t>>(kAttributesAttribute)
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .template Arg<ffi::AnyBuffer>()
      .RemainingArgs()
      .template Ret<ffi::AnyBuffer>();
}

template <typename Binding>
auto BindBackward(Binding binding) {
  return std::move(binding)
      .template Attr<ffi::Span<const int64_t>>(kAttributesAttribute)
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
