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

#include <optional>
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

// A call: its attributes and buffers. All are checked once more: a compiled module may have been
// made by another version, or changed.
class CustomCall {
 public:
  CustomCall(Operation operation, const ffi::Dictionary& attributes,
             const ffi::RemainingArgs& operands, const ffi::RemainingRets& results)
      : words_(attributes), operands_(operands), results_(results) {
    attributes_.operation = operation;
  }

  // Reads all but the results. Gradients have that of the output among their operands.
  absl::Status Read(bool has_grad_output, DeformConvParams* params) {
    TF_RETURN_IF_ERROR(ReadAttributes());
    TF_RETURN_IF_ERROR(ReadOperands(has_grad_output));
    const auto dimensions = [this](int index) {
      return DimensionsOf(*arguments_[attributes_.ArgumentAt(index)]);
    };
    TF_RETURN_IF_ERROR(MakeParamsOf(attributes_, dimensions, params));
    return has_grad_output ? CheckOutput(*params, *grad_output_) : absl::OkStatus();
  }

  ffi::DataType type() const { return arguments_[kInput]->element_type(); }
  const ffi::AnyBuffer& grad_output() const { return *grad_output_; }

  // The one result of forward.
  absl::Status ReadOutput(const DeformConvParams& params, std::optional<ffi::AnyBuffer>* output) {
    if (results_.size() != 1) return absl::InvalidArgumentError("the call must have 1 result");
    *output = **results_.get<ffi::AnyBuffer>(0);
    return CheckOutput(params, **output);
  }

  // The results of backward; null where a gradient is not wanted.
  absl::Status ReadGradients(void* (&gradients)[kArguments]) {
    const auto wanted = words_.get<int64_t>(kWantedAttribute);
    if (!wanted.has_value()) return WrongVersion();
    size_t next = 0;
    for (int i = 0; i < kArguments; ++i) {
      gradients[i] = nullptr;
      if (!(*wanted >> i & 1)) continue;
      if (next == results_.size()) return absl::InvalidArgumentError("a gradient has no result");
      const ffi::AnyBuffer result = **results_.get<ffi::AnyBuffer>(next++);
      TF_RETURN_IF_ERROR(CheckGradient(i, result));
      gradients[i] = result.untyped_data();
    }
    return absl::OkStatus();
  }

  template <typename T>
  SampledTensors<T, ComputeType<T>> Tensors() const {
    using OffsetT = ComputeType<T>;
    return {Data<T>(kInput), Data<OffsetT>(kOffset), Data<OffsetT>(kMask)};
  }

  template <typename T>
  const T* Filters() const {
    return Data<T>(kFilters);
  }

 private:
  static absl::Status WrongVersion() {
    return absl::InvalidArgumentError("attributes are not those of this version of the calls");
  }

  absl::Status ReadAttributes() {
    using Words = ffi::Span<const int64_t>;
    const auto words = words_.get<Words>(kAttributesAttribute);
    if (!words.has_value() || !FromWords(words->begin(), words->size(), &attributes_.conv)) {
      return WrongVersion();
    }
    if (attributes_.has_filters()) return absl::OkStatus();
    const auto kernel_size = words_.get<Words>(kKernelSizeAttribute);
    if (!kernel_size.has_value() || kernel_size->size() != 2) return WrongVersion();
    attributes_.conv.kernel_h = kernel_size->begin()[0];
    attributes_.conv.kernel_w = kernel_size->begin()[1];
    return absl::OkStatus();
  }

  absl::Status ReadOperands(bool has_grad_output) {
    const size_t before_mask = attributes_.IndexOf(kMask) + has_grad_output;
    attributes_.has_mask = operands_.size() > before_mask;
    const bool needs_mask = !attributes_.has_filters();
    if (operands_.size() < before_mask + needs_mask || operands_.size() > before_mask + 1) {
      return absl::InvalidArgumentError(absl::StrCat("the call has ", operands_.size(),
                                                     " operands; ", before_mask + needs_mask,
                                                     needs_mask ? "" : " or 1 more", " expected"));
    }
    if (has_grad_output) grad_output_ = *operands_.get<ffi::AnyBuffer>(before_mask - 1);
    for (int i = 0; i < kArguments; ++i) {
      if (!attributes_.Has(i)) continue;
      const size_t index = i == kMask ? before_mask : attributes_.IndexOf(i);
      arguments_[i] = *operands_.get<ffi::AnyBuffer>(index);
      const ffi::DataType compute_type = type() == ffi::F64 ? ffi::F64 : ffi::F32;
      if (arguments_[i]->element_type() != (i < kOffset ? type() : compute_type)) {
        return absl::InvalidArgumentError(
            absl::StrCat(attributes_.NameOf(i), " has another type than the call is for"));
      }
    }
    return absl::OkStatus();
  }

  // Fails unless `output`, or the output's gradient, has the type of the input and the shape of
  // the output.
  absl::Status CheckOutput(const DeformConvParams& params, const ffi::AnyBuffer& output) const {
    if (output.element_type() != type()) {
      return absl::InvalidArgumentError("the output has another type than the input");
    }
    return CheckGradOutput<2>(DataFormat::kNhwc, params, DimensionsOf(output));
  }

  // Fails unless `result`, the gradient of argument i, has its type and shape.
  absl::Status CheckGradient(int i, const ffi::AnyBuffer& result) const {
    if (attributes_.Has(i) && result.element_type() == arguments_[i]->element_type() &&
        DimensionsOf(result) == DimensionsOf(*arguments_[i])) {
      return absl::OkStatus();
    }
    const char* const name = attributes_.NameOf(i);
    return absl::InvalidArgumentError(
        absl::StrCat("grad_", name, " has another type or shape than ", name));
  }

  static std::vector<int64_t> DimensionsOf(const ffi::AnyBuffer& buffer) {
    return {buffer.dimensions().begin(), buffer.dimensions().end()};
  }

  template <typename T>
  T* Data(Argument argument) const {
    return arguments_[argument].has_value() ? DataOf<T>(*arguments_[argument]) : nullptr;
  }

  ffi::Dictionary words_;
  ffi::RemainingArgs operands_;
  ffi::RemainingRets results_;
  OpAttributes<2> attributes_;
  std::optional<ffi::AnyBuffer> arguments_[kArguments];
  std::optional<ffi::AnyBuffer> grad_output_;
};

template <typename Backend>
ffi::Error HandleForward(Backend& backend, CustomCall call) {
  return ErrorOf(ExceptionToStatus([&]() -> absl::Status {
    DeformConvParams params;
    TF_RETURN_IF_ERROR(call.Read(/*has_grad_output=*/false, &params));
    std::optional<ffi::AnyBuffer> output;
    TF_RETURN_IF_ERROR(call.ReadOutput(params, &output));
    if (output->element_count() == 0) return absl::OkStatus();
    return ForType<Backend>(call.type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      return backend.template Forward<T>(params, call.Tensors<T>(), call.Filters<T>(),
                                         DataOf<T>(*output));
    });
  }));
}

template <typename Backend>
ffi::Error HandleBackward(Backend& backend, CustomCall call) {
  return ErrorOf(ExceptionToStatus([&]() -> absl::Status {
    DeformConvParams params;
    TF_RETURN_IF_ERROR(call.Read(/*has_grad_output=*/true, &params));
    void* gradients[kArguments];
    TF_RETURN_IF_ERROR(call.ReadGradients(gradients));
    return ForType<Backend>(call.type(), [&](auto tag) {
      using T = typename decltype(tag)::type;
      using OffsetT = ComputeType<T>;
      const DeformConvGradients<T, OffsetT> typed = {
          {static_cast<T*>(gradients[kInput]), static_cast<OffsetT*>(gradients[kOffset]),
           static_cast<OffsetT*>(gradients[kMask])},
          static_cast<T*>(gradients[kFilters])};
      return backend.template Backward<T>(params, call.Tensors<T>(), call.Filters<T>(),
                                          DataOf<T>(call.grad_output()), typed);
    });
  }));
}

// Binds what XLA passes to a handler, after the device's own part.
template <typename Binding>
auto BindCall(Binding binding) {
  return std::move(binding).Attrs().RemainingArgs().RemainingRets();
}

// Registers the handlers Forward and Backward, templates by Operation, for a platform of XLA's.
#define DEFORM_CONV_REGISTER_CALLS(operation, platform, binding)                           \
  XLA_FFI_DEFINE_HANDLER(k##operation##Forward, Forward<Operation::k##operation>,          \
                         BindCall(binding));                                               \
  XLA_FFI_DEFINE_HANDLER(k##operation##Backward, Backward<Operation::k##operation>,        \
                         BindCall(binding));                                               \
  XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), CallsOf(Operation::k##operation).forward,  \
                           platform, k##operation##Forward);                               \
  XLA_FFI_REGISTER_HANDLER(ffi::GetXlaFfiApi(), CallsOf(Operation::k##operation).backward, \
                           platform, k##operation##Backward)

}  // namespace deform_conv

#endif  // DEFORM_CONV_TF_XLA_CUSTOM_CALL_HANDLERS_H_
