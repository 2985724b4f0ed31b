"""OpenVINO: `extension` has it read ONNX's `DeformConv`, for which it has no rule of its own."""

try:
    from openvino import opset8
    from openvino.frontend.onnx import ConversionExtension
except ModuleNotFoundError as error:
    if error.name != "openvino":
        raise
    raise ModuleNotFoundError(
        "deform_conv.openvino needs openvino, which is not installed: "
        "pip install 'tf-deform-conv[openvino]'",
        name=error.name,
    ) from None

__all__ = ["extension"]


def extension() -> ConversionExtension:
    """Has OpenVINO read `DeformConv` as its own `DeformableConvolution`, of its opset 8.

    Returns:
      What `openvino.Core.add_extension` takes, and `openvino.convert_model` as `extension`.

    Example:
      >>> core = openvino.Core()
      >>> core.add_extension(deform_conv.openvino.extension())
      >>> compiled = core.compile_model("model.onnx", "CPU")
    """
    return ConversionExtension("DeformConv", _convert)


def _convert(node) -> list:
    inputs = [node.get_input(index) for index in range(node.get_input_size())]
    # An input that is left out before others is a NullNode.
    given = [None if input.get_node().get_type_name() == "NullNode" else input for input in inputs]
    input, filters, offset, bias, mask = given + [None] * (5 - len(given))
    pads = node.get_attribute("pads", [0] * 4)
    output = opset8.deformable_convolution(
        input,
        offset,
        filters,
        strides=node.get_attribute("strides", [1, 1]),
        pads_begin=pads[:2],
        pads_end=pads[2:],
        dilations=node.get_attribute("dilations", [1, 1]),
        mask=mask,
        group=node.get_attribute("group", 1),
        deformable_group=node.get_attribute("offset_group", 1),
        # Samples less than a pixel outside of the image count, with their share of it.
        bilinear_interpolation_pad=True,
    )
    if bias is not None:
        output = opset8.add(output, opset8.unsqueeze(bias, [0, 2, 3]))
    return output.outputs()
