"""What tf2onnx makes of the ops: ONNX's `DeformConv`, and what it needs around it."""

import numpy as np
import onnx
import tf2onnx
from tf2onnx.handler import tf_op

# The opsets that have DeformConv, each with its IR version. tf2onnx 1.17 knows those up to 18; the
# ops that it emits have kept their form since.
IR_VERSIONS = {19: 9, 20: 9, 21: 10, 22: 10}
for _opset, _ir_version in IR_VERSIONS.items():
    tf2onnx.constants.OPSET_TO_IR_VERSION.setdefault(_opset, _ir_version)


@tf_op(["DeformConv2D", "DeformAggregate2D"])
class _DeformConv2D:
    """What tf2onnx calls for the ops."""

    @classmethod
    def version_1(cls, graph, node, **_):
        _fail(
            graph,
            f"{node.type} needs opset 19 or newer (opset_version=19 in Keras). Received: "
            f"{graph.opset}",
        )

    @classmethod
    def version_19(cls, graph, node, **_):
        try:
            _Conversion(graph, node).run()
        except ValueError as error:
            _fail(graph, str(error))


def _fail(graph, message: str) -> None:
    """Has tf2onnx raise where it writes the graph.

    It logs what an op's conversion raises, and goes on to a file that is no valid one.
    """

    def make_graph(*_, **__):
        raise ValueError(message)

    graph.make_graph = make_graph


class _Conversion:
    """Puts a `DeformConv`, and what it needs around it, in place of a node of tf2onnx's graph."""

    def __init__(self, graph, node):
        self.graph, self.node = graph, node
        self.nhwc = node.get_attr_str("data_format") == "NHWC"
        spatial = slice(1, 3) if self.nhwc else slice(2, 4)
        unknown = [-1] * 4
        input_shape, filters_shape = (graph.get_shape(name) or unknown for name in node.input[:2])
        channels = input_shape[3 if self.nhwc else 1]
        # ONNX has no aggregation: each channel gets filters of ones.
        self.has_filters = node.type == "DeformConv2D"
        if not self.has_filters:
            filters_shape = [*node.get_attr_value("kernel_size"), 1, channels]
        if -1 in (channels, *filters_shape):
            raise ValueError(
                "DeformConv needs a known number of channels and filters of a known shape (within "
                "branches and loops, tf.ensure_shape makes them known). Received: input "
                f"{input_shape}, filters {filters_shape}, where -1 is unknown"
            )
        self.groups, self.out_channels = channels // filters_shape[2], filters_shape[3]
        self.size = np.array(input_shape[spatial])  # -1 is unknown
        self.kernel = np.array(filters_shape[:2])
        self.strides = np.array(node.get_attr_value("strides")[spatial])
        self.dilations = np.array(node.get_attr_value("dilations")[spatial])
        self.extents = self.dilations * (self.kernel - 1) + 1
        explicit = node.get_attr_value("explicit_paddings") or [0] * 8
        self.explicit = np.reshape(explicit, [4, 2])[spatial]

    def run(self) -> None:
        graph, node = self.graph, self.node
        dtype, shape = graph.get_dtype(node.output[0]), graph.get_shape(node.output[0])
        # In ONNX all inputs have one type. Runtimes compute positions in it, for which 16 bits are
        # too coarse, and ONNX Runtime has no 16-bit kernel for CPUs.
        wide = onnx.TensorProto.FLOAT if dtype == onnx.TensorProto.FLOAT16 else dtype
        numbers = onnx.helper.tensor_dtype_to_np_dtype(wide)
        input, *given = (self._cast(tensor, wide) for tensor in node.input)
        if self.has_filters:
            filters = self._made("Transpose", given.pop(0), perm=[3, 2, 0, 1])  # HWIO to OIHW
        else:
            filters = self._constant(np.ones([self.out_channels, 1, *self.kernel], numbers))
        input, pads = self._padded(self._channels_first(input))
        offset, *mask = map(self._channels_first, given)
        # Zeros where there is a mask: TensorRT's parser reads a bias then.
        bias = np.zeros(self.out_channels, numbers)
        output = self._made(
            "DeformConv",
            input,
            filters,
            offset,
            *([self._constant(bias), *mask] if mask else []),
            kernel_shape=self.kernel.tolist(),
            strides=self.strides.tolist(),
            dilations=self.dilations.tolist(),
            pads=pads.T.flatten().tolist(),  # begins, then ends
            group=self.groups,
            offset_group=node.get_attr_int("deform_groups"),
        )
        if self.nhwc:
            output = self._made("Transpose", output, perm=[0, 2, 3, 1])
        graph.remove_node(node.name)
        op_type, attributes = ("Identity", {}) if dtype == wide else ("Cast", {"to": dtype})
        graph.make_node(
            op_type, [output], attributes, outputs=node.output, shapes=[shape], dtypes=[dtype]
        )

    def _made(self, op_type: str, *inputs: str, **attributes) -> str:
        return self.graph.make_node(op_type, list(inputs), attributes).output[0]

    def _constant(self, numbers) -> str:
        name = tf2onnx.utils.make_name("deform_conv")
        return self.graph.make_const(name, np.asarray(numbers)).output[0]

    def _cast(self, tensor: str, dtype: int) -> str:
        if self.graph.get_dtype(tensor) == dtype:
            return tensor
        return self._made("Cast", tensor, to=dtype)

    def _channels_first(self, tensor: str) -> str:
        return self._made("Transpose", tensor, perm=[0, 3, 1, 2]) if self.nhwc else tensor

    def _padded(self, input: str) -> tuple[str, np.ndarray]:
        """The input and the pads, (top, bottom) and (left, right), for `DeformConv`.

        Not all runtimes take pads that differ on opposite sides. These become zeros around the
        input, which is the same if the input is finite: samples outside of it are 0.
        """
        pads = self.explicit
        if self.node.get_attr_str("padding") == "SAME":
            if np.any((self.size == -1) & (self.strides > 1)):
                return self._made("Pad", input, self._same_pads(input)), 0 * pads
            # Along an axis with a stride of 1, the size cancels out, also the -1 of an unknown one.
            outputs = -(-self.size // self.strides)
            totals = np.maximum((outputs - 1) * self.strides + self.extents - self.size, 0)
            pads = np.stack([totals // 2, totals - totals // 2], axis=1)
        if np.all(pads[:, 0] == pads[:, 1]):
            return input, pads
        begins, ends = pads.T
        amounts = self._constant([0, 0, *begins, 0, 0, *ends])
        return self._made("Pad", input, amounts), 0 * pads

    def _same_pads(self, input: str) -> str:
        """What `Pad` adds for "SAME", where the input's size is known at run time only."""
        made, constant = self._made, self._constant
        strides, none = constant(self.strides), constant([0, 0])
        size = made("Slice", made("Shape", input), constant([2]), constant([4]))
        outputs = made("Div", made("Add", size, constant(self.strides - 1)), strides)
        covered = made("Add", made("Mul", outputs, strides), constant(self.extents - self.strides))
        totals = made("Max", made("Sub", covered, size), none)
        begins = made("Div", totals, constant([2, 2]))
        return made("Concat", none, begins, none, made("Sub", totals, begins), axis=0)
