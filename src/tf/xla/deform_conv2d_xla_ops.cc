// The ops as XLA compiles them: custom calls between conversions from and to native form, which XLA
// fuses with their neighbours.

#include <string>
#include <vector>

#include "absl/strings/str_join.h"
#include "absl/types/span.h"
#include "tensorflow/compiler/tf2xla/xla_op_kernel.h"
#include "tensorflow/compiler/tf2xla/xla_op_registry.h"
#include "tf/kernel_path.h"
#include "tf/op_attributes.h"
#include "tf/type_pairs.h"
#include "tf/xla/custom_calls.h"
#include "xla/hlo/builder/lib/constants.h"
#include "xla/hlo/builder/xla_builder.h"
#include "xla/shape_util.h"

namespace deform_conv {
namespace {

using tensorflow::OpKernelConstruction;
using tensorflow::XlaOpKernel;
using tensorflow::XlaOpKernelContext;

enum class XlaDevice { kCpu, kGpu };

// What all ops do alike. Only a GPU computes on 16-bit tensors as they are.
template <XlaDevice kDevice>
class DeformConv2DXlaOp : public XlaOpKernel {
 public:
  explicit DeformConv2DXlaOp(OpKernelConstruction* context) : XlaOpKernel(context) {
    const Operation operation = OperationOf(context->def().op());
    OP_REQUIRES_OK(context, ReadAttributes(context, operation, &attributes_));
    // An error in a custom call on a GPU may end the process, so it is reported here.
    if (kDevice == XlaDevice::kGpu) {
      OP_REQUIRES_OK(context, PathOfEnvironment().status());
    }
  }

 protected:
  const OpAttributes<2>& attributes() const { return attributes_; }

  absl::Status ReadShapes(XlaOpKernelContext* context, DeformConvParams* params) const {
    for (int i = 0; i < context->num_inputs(); ++i) {
      const auto shape = context->InputXlaShape(i);
      TF_RETURN_IF_ERROR(shape.status());
      if (shape->is_static()) continue;
      return absl::InvalidArgumentError(
          absl::StrCat("XLA compiles ", CallsOf(attributes_.operation).function,
                       " for static shapes only; received ", shape->ToString(), " as ",
                       attributes_.NameOf(attributes_.ArgumentAt(i))));
    }
    return MakeParamsOf(
        attributes_, [context](int index) { return Dimensions(context, index); }, params);
  }

  absl::Status CheckGradOutput(XlaOpKernelContext* context, const DeformConvParams& params) const {
    return deform_conv::CheckGradOutput<2>(attributes_.format, params,
                                           Dimensions(context, context->num_inputs() - 1));
  }

  // ComputeType, as XLA names types.
  static xla::PrimitiveType XlaComputeType(xla::PrimitiveType type) {
    return type == xla::F64 ? xla::F64 : xla::F32;
  }

  // The type that input, filters and output are computed in.
  static xla::PrimitiveType NativeType(xla::PrimitiveType type) {
    return kDevice == XlaDevice::kGpu ? type : XlaComputeType(type);
  }

  // Input `index`, in native form.
  xla::XlaOp ToNative(XlaOpKernelContext* context, int index) const {
    const int argument = attributes_.ArgumentAt(index);
    const bool is_offset_or_mask = argument == kOffset || argument == kMask;
    const xla::PrimitiveType type = context->input_xla_type(index);
    const xla::XlaOp value = xla::ConvertElementType(
        context->Input(index), is_offset_or_mask ? XlaComputeType(type) : NativeType(type));
    return IsTransposed(index) ? xla::Transpose(value, {0, 2, 3, 1}) : value;
  }

  // The native `value` as an output whose shape is laid out like input `index`.
  xla::XlaOp FromNative(xla::XlaOp value, int index, xla::PrimitiveType type) const {
    value = xla::ConvertElementType(value, type);
    return IsTransposed(index) ? xla::Transpose(value, {0, 3, 1, 2}) : value;
  }

  // The attributes of a custom call; `more` are those besides the op's, each after a comma.
  std::string Attributes(const std::string& more = "") const {
    std::string kernel_size;
    if (!attributes_.has_filters()) {
      kernel_size =
          absl::StrCat(", ", kKernelSizeAttribute, " = array<i64: ", attributes_.conv.kernel_h,
                       ", ", attributes_.conv.kernel_w, ">");
    }
    return absl::StrCat("{", kAttributesAttribute,
                        " = array<i64: ", absl::StrJoin(ToWords(attributes_.conv), ", "), ">",
                        kernel_size, more, "}");
  }

  // Calls `target` with row-major operands and results.
  static xla::XlaOp Call(XlaOpKernelContext* context, const char* target,
                         const std::vector<xla::XlaOp>& operands, const xla::Shape& result,
                         const std::string& attributes) {
    std::vector<xla::Shape> shapes;
    for (const xla::XlaOp operand : operands) {
      const auto shape = context->builder()->GetShape(operand);
      if (!shape.ok()) return context->builder()->ReportError(shape.status());
      shapes.push_back(RowMajor(shape->element_type(), shape->dimensions()));
    }
    return xla::CustomCallWithLayout(
        context->builder(), target, operands, result, shapes, attributes,
        /*has_side_effect=*/false, /*output_operand_aliasing=*/{}, /*literal=*/nullptr,
        xla::CustomCallSchedule::SCHEDULE_NONE, xla::CustomCallApiVersion::API_VERSION_TYPED_FFI);
  }

  static xla::Shape RowMajor(xla::PrimitiveType type, absl::Span<const int64_t> dimensions) {
    return xla::ShapeUtil::MakeShapeWithDescendingLayout(type, dimensions);
  }

 private:
  static std::vector<int64_t> Dimensions(XlaOpKernelContext* context, int index) {
    const auto shape = context->InputXlaShape(index);
    if (!shape.ok()) return {};
    return {shape->dimensions().begin(), shape->dimensions().end()};
  }

  bool IsTransposed(int index) const {
    return attributes_.ArgumentAt(index) != kFilters &&  // they never are
           attributes_.format == DataFormat::kNchw;
  }

  OpAttributes<2> attributes_;
};

template <XlaDevice kDevice>
class ForwardXlaOp : public DeformConv2DXlaOp<kDevice> {
 public:
  using DeformConv2DXlaOp<kDevice>::DeformConv2DXlaOp;

  void Compile(XlaOpKernelContext* context) override {
    DeformConvParams params;
    OP_REQUIRES_OK(context, this->ReadShapes(context, &params));
    std::vector<xla::XlaOp> operands;
    for (int i = 0; i < this->attributes().arguments(); ++i) {
      operands.push_back(this->ToNative(context, i));
    }
    const xla::PrimitiveType type = context->input_xla_type(kInput);
    const xla::Shape result = this->RowMajor(
        this->NativeType(type), {params.batch, params.out_h, params.out_w, params.out_channels});
    const xla::XlaOp output = this->Call(context, CallsOf(this->attributes().operation).forward,
                                         operands, result, this->Attributes());
    context->SetOutput(0, this->FromNative(output, kInput, type));
  }
};

template <XlaDevice kDevice>
class BackwardXlaOp : public DeformConv2DXlaOp<kDevice> {
 public:
  explicit BackwardXlaOp(OpKernelConstruction* context) : DeformConv2DXlaOp<kDevice>(context) {
    OP_REQUIRES_OK(context, ReadWanted(context, this->attributes(), wanted_));
  }

  void Compile(XlaOpKernelContext* context) override {
    DeformConvParams params;
    OP_REQUIRES_OK(context, this->ReadShapes(context, &params));
    OP_REQUIRES_OK(context, this->CheckGradOutput(context, params));
    const OpAttributes<2>& attributes = this->attributes();
    std::vector<xla::XlaOp> arguments;
    for (int i = 0; i < context->num_inputs(); ++i) arguments.push_back(this->ToNative(context, i));
    // The mask, of which there may be none, comes last.
    std::vector<xla::XlaOp> operands(arguments.begin(),
                                     arguments.begin() + attributes.IndexOf(kMask));
    operands.push_back(arguments.back());
    if (attributes.has_mask) operands.push_back(arguments[attributes.IndexOf(kMask)]);

    std::vector<xla::Shape> results;
    int64_t wanted_bits = 0;
    for (int i = 0; i < context->num_outputs(); ++i) {
      const int argument = attributes.ArgumentAt(i);
      if (!wanted_[argument]) continue;
      const auto shape = context->builder()->GetShape(arguments[i]);
      OP_REQUIRES_OK(context, shape.status());
      results.push_back(this->RowMajor(shape->element_type(), shape->dimensions()));
      wanted_bits |= int64_t{1} << argument;
    }
    xla::XlaOp gradients;
    if (!results.empty()) {
      const std::string wanted = absl::StrCat(", ", kWantedAttribute, " = ", wanted_bits, " : i64");
      gradients = this->Call(context, CallsOf(attributes.operation).backward, operands,
                             xla::ShapeUtil::MakeTupleShape(results), this->Attributes(wanted));
    }
    int64_t next = 0;
    for (int i = 0; i < context->num_outputs(); ++i) {
      const xla::PrimitiveType type = context->input_xla_type(i);
      context->SetOutput(i, wanted_[attributes.ArgumentAt(i)]
                                ? this->FromNative(xla::GetTupleElement(gradients, next++), i, type)
                                : xla::Broadcast(xla::Zero(context->builder(), type), {0}));
    }
  }

 private:
  bool wanted_[kArguments];
};

// Registered as kernels, not with REGISTER_XLA_OP: XLA turns those into kernels once, at its first
// use, and would miss a library loaded later.
#define DEFORM_CONV_REGISTER_OP(name, Op, TfT, TfOffsetT, kDevice, device) \
  REGISTER_KERNEL_BUILDER(DEFORM_CONV_KERNEL_OF(TfT, TfOffsetT, device, name), Op<kDevice>)
#define DEFORM_CONV_REGISTER_PAIR(...)                                     \
  DEFORM_CONV_REGISTER_OP("DeformConv2D", ForwardXlaOp, __VA_ARGS__);      \
  DEFORM_CONV_REGISTER_OP("DeformConv2DGrad", BackwardXlaOp, __VA_ARGS__); \
  DEFORM_CONV_REGISTER_OP("DeformAggregate2D", ForwardXlaOp, __VA_ARGS__); \
  DEFORM_CONV_REGISTER_OP("DeformAggregate2DGrad", BackwardXlaOp, __VA_ARGS__)
DEFORM_CONV_FOR_TYPE_PAIRS(DEFORM_CONV_REGISTER_PAIR, XlaDevice::kCpu,
                           tensorflow::DEVICE_CPU_XLA_JIT);
DEFORM_CONV_FOR_TYPE_PAIRS(DEFORM_CONV_REGISTER_PAIR, XlaDevice::kGpu,
                           tensorflow::DEVICE_GPU_XLA_JIT);

}  // namespace
}  // namespace deform_conv
