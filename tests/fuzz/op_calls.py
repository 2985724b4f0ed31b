"""Makes a case's call in its mode, and judges what comes of it."""

import functools
import math
import re

import keras
import numpy as np
import tensorflow as tf
from op_cases import ARGUMENTS, RAW_NAMES, Case, Numbers
from op_oracle import MisfitError, output_shape, results
from op_values import array_of, formed, resolved
from op_verdicts import ERRORS, NAMES, RIGHT, Verdict, of_error

from deform_conv import deform_aggregate2d, deform_conv2d
from deform_conv._library import record
from deform_conv._reference import deform_conv2d_reference

RAW_ERRORS = (*ERRORS, tf.errors.NotFoundError, tf.errors.UnimplementedError, OverflowError)


class Call:
    """A case with its arguments made."""

    def __init__(self, case: Case):
        self.case = case
        rng = np.random.default_rng([case.seed % 2**63, case.number])
        self.arrays, self.tensors, self.others = {}, {}, {}
        for name, value in case.arguments.items():
            if not isinstance(value, Numbers):
                self.others[name] = resolved(value)
                continue
            self.arrays[name] = array_of(value, rng)
            made = formed(self.arrays[name], value)
            (self.tensors if value.form == "tensor" else self.others)[name] = made
        self.output_shape = self._output_shape()
        self.grad_output = None
        if case.wanted and self.output_shape and "grad_output" not in case.arguments:
            dtype = case.arguments["input"].dtype
            fill = "odd" if case.number % 8 == 0 and case.mode != "second" else "normal"
            array = array_of(Numbers(tuple(self.output_shape), dtype, fill), rng)
            self.arrays["grad_output"] = array
            self.grad_output = tf.constant(array)

    @property
    def attributes(self) -> dict:
        """Made anew: within a graph, tensors are the graph's."""
        return {name: resolved(value) for name, value in self.case.attributes.items()}

    def _output_shape(self):
        """What the oracle says, or None where the arguments do not fit."""
        case = self.case
        if case.blamed or case.mode == "layer":
            return None
        values = {name: case.arguments.get(name) for name in ARGUMENTS}
        if not all(isinstance(value, Numbers | None) for value in values.values()):
            return None
        shapes = {name: value.shape for name, value in values.items() if value is not None}
        try:
            return output_shape(shapes, case.meaning)
        except MisfitError:
            return None

    @property
    def fits(self) -> bool:
        """Whether it must be taken."""
        return self.output_shape is not None and self.case.blamed is None

    def expected(self):
        arguments = {name: self.arrays[name] for name in ARGUMENTS if name in self.arrays}
        return results(
            arguments,
            self.case.arguments["input"].dtype,
            self.case.meaning,
            self.arrays.get("grad_output"),
        )

    def _has_far_sides(self) -> bool:
        """Whether tensors are empty and yet so long that the oracle would have no end."""
        shapes = [array.shape for array in self.arrays.values()]
        return any(math.prod(max(size, 1) for size in shape) > 10**7 for shape in shapes)

    def verdict_on(self, found: dict, precision=None) -> Verdict:
        """Compares arrays, by the names that the oracle gives them, in a type's precision."""
        if self.case.more.get("unclear"):
            return RIGHT
        if self.output_shape is None:
            shapes = {name: np.shape(value) for name, value in found.items()}
            return Verdict("taken though it does not fit", str(shapes))
        if self._has_far_sides():
            shape = found.get("output", tf.zeros(self.output_shape)).shape
            right = list(shape) == list(self.output_shape)
            return RIGHT if right else Verdict("wrong result", f"shape {shape}")
        expected = self.expected()
        for name, value in found.items():
            argument = "input" if name == "output" else name.removeprefix("grad_")
            dtype = self.case.arguments[argument].dtype
            named = value is not None and tf.as_dtype(value.dtype).name
            problem = f"of type {named} instead of {dtype}"
            if named == dtype:
                problem = expected[name].difference(value, precision or dtype)
            if problem:
                return Verdict("wrong result", f"{name}: {problem}")
        return RIGHT

    def verdict_on_error(self, error, one_line=False) -> Verdict:
        names = self.case.blamed or NAMES
        return of_error(error, names, must_fit=self.fits, one_line=one_line)

    def evaluate(self, tensors, grad_output, function=deform_conv2d):
        """Output and wanted gradients, by name."""
        wanted = [name for name in self.case.wanted if name in tensors]
        arguments = self.others | tensors
        if not wanted or grad_output is None:
            return {"output": function(**arguments, **self.attributes)}
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([tensors[name] for name in wanted])
            output = function(**arguments, **self.attributes)
        gradients = tape.gradient(
            output, [tensors[name] for name in wanted], output_gradients=grad_output
        )
        found = dict(zip((f"grad_{name}" for name in wanted), gradients, strict=True))
        return {"output": output} | found


def eager(case: Case, function=deform_conv2d) -> Verdict:
    call = Call(case)
    try:
        found = call.evaluate(call.tensors, call.grad_output, function)
    except Exception as error:
        return call.verdict_on_error(error, one_line=True)
    return call.verdict_on(found)


def _specs(call, known):
    """What the graph knows of the tensors."""
    specs = {
        name: tf.TensorSpec(known.get(name, tensor.shape), tensor.dtype, name)
        for name, tensor in call.tensors.items()
    }
    if call.grad_output is not None:
        specs["output's gradient"] = tf.TensorSpec(
            call.grad_output.shape, call.grad_output.dtype, "given"
        )
    return specs


def _in_function(call, known, body, **options):
    """`body(tensors)` as a graph function of the call's tensors."""
    names = list(specs := _specs(call, known))
    function = tf.function(
        lambda *tensors: body(dict(zip(names, tensors, strict=True))),
        input_signature=list(specs.values()),
        autograph=False,
        **options,
    )
    tensors = call.tensors | {"output's gradient": call.grad_output}
    return function, [tensors[name] for name in names]


def _static_problem(case, known, shape) -> Verdict | None:
    """Whether an inferred output shape is other than what is known."""
    try:
        expected = output_shape({n: known[n] for n in ARGUMENTS if n in known}, case.meaning)
    except MisfitError as error:
        return Verdict("taken though it does not fit", f"inferred {shape}; {error}")
    if shape.rank != 4 or shape.as_list() != expected:
        return Verdict("wrong static shape", f"{shape} instead of {expected}")
    return None


def graph(case: Case, jit_compile=False, function=deform_conv2d) -> Verdict:
    call = Call(case)

    def body(tensors):
        grad_output = tensors.pop("output's gradient", None)
        return call.evaluate(tensors, grad_output, function)

    known = case.more.get("known") or {name: a.shape for name, a in call.arrays.items()}
    try:
        traced, arguments = _in_function(call, known, body, jit_compile=jit_compile)
        concrete = traced.get_concrete_function()
        problem = None
        if call.output_shape is not None and not call.others:
            problem = _static_problem(case, known, concrete.output_shapes["output"])
        found = traced(*arguments)
    except Exception as error:
        return call.verdict_on_error(error)
    return problem or call.verdict_on(found)


def aggregate(case: Case) -> Verdict:
    """`deform_aggregate2d`, which gives what the case's filters of ones give."""

    def function(input, filters, offset, mask, **attributes):
        kernel_size = filters.shape[:2].as_list()
        return deform_aggregate2d(input, offset, mask, kernel_size, **attributes)

    run = {"eager": eager, "graph": graph, "jit": functools.partial(graph, jit_compile=True)}
    return run[case.more["call"]](case, function=function)


_jitted = {}


def jit(case: Case) -> Verdict:
    """Compiles for a setting once in a process."""
    if "setting" not in case.more:
        return graph(case, jit_compile=True)
    call = Call(case)
    key = case.seed, case.more["setting"]
    if key not in _jitted:
        _jitted[key] = tf.function(call.evaluate, jit_compile=True, autograph=False)
    try:
        found = _jitted[key](call.tensors, call.grad_output)
    except Exception as error:
        return call.verdict_on_error(error)
    return call.verdict_on(found)


def _without_eager(value):
    """What a graph without eager tensors can take in place of one."""
    if isinstance(value, tf.Variable | keras.Variable) or hasattr(value, "_numpy_internal"):
        return "resource" if value.dtype == tf.resource else value.numpy()
    return value


def v1(case: Case) -> Verdict:
    call = Call(case)
    known = case.more["known"]
    others = {name: _without_eager(value) for name, value in call.others.items()}
    try:
        with tf.Graph().as_default() as made:
            feeds = {
                name: tf.compat.v1.placeholder(tensor.dtype, known[name])
                for name, tensor in call.tensors.items()
            }
            output = deform_conv2d(**feeds, **others, **call.attributes)
            fetches = {"output": output}
            if call.grad_output is not None:
                wanted = [name for name in case.wanted if name in feeds]
                gradients = tf.gradients(
                    output,
                    [feeds[name] for name in wanted],
                    tf.constant(call.arrays["grad_output"]),
                )
                fetches |= dict(zip((f"grad_{n}" for n in wanted), gradients, strict=True))
            with tf.compat.v1.Session(graph=made) as session:
                values = {feeds[name]: call.arrays[name] for name in feeds}
                found = session.run(fetches, values)
    except Exception as error:
        return call.verdict_on_error(error)
    return call.verdict_on(found)


# --- Shape inference ---


def shapes(case: Case) -> Verdict:
    """Makes a graph of tensors that do not exist, so that any size may be asked for."""
    known = case.more["known"]
    entered = []
    names = [name for name in (*ARGUMENTS, "grad_output") if name in known]
    dtypes = {"grad_output": case.arguments["input"].dtype}
    dtypes |= {name: value.dtype for name, value in case.arguments.items()}

    def body(*tensors):
        entered.append(True)
        tensors = dict(zip(names, tensors, strict=True))
        attributes = {name: resolved(value) for name, value in case.attributes.items()}
        if case.more["op"] == "op":
            return deform_conv2d(**tensors, **attributes)
        tensors["mask"] = [tensors["mask"]] if "mask" in tensors else []
        if case.more["op"] == "raw":
            return record.ops.deform_conv2d(**tensors, **attributes)
        return record.ops.deform_conv2d_grad(**tensors, **attributes).grad_input

    expected = _inferred(case)
    # A tensor of such sizes may be refused, as nobody can have one that is not empty.
    far = any(math.prod(size or 1 for size in shape or ()) >= 2**59 for shape in known.values())
    far |= expected is not None and math.prod(size or 1 for size in expected) >= 2**59
    try:
        specs = [tf.TensorSpec(known[name], dtypes[name]) for name in names]
        function = tf.function(body, input_signature=specs, autograph=False)
        shape = function.get_concrete_function().output_shapes
    except Exception as error:
        if not entered:
            return Verdict("skipped", "TensorFlow makes no placeholder of this shape")
        allowed = ERRORS if case.more["op"] == "op" else RAW_ERRORS
        must_fit = expected is not None and not far
        verdict = of_error(error, NAMES, must_fit=must_fit, allowed=allowed)
        # The number of channels that the message asks for, if that is what it is about.
        asked = re.search(r"channels; .*= (-?\d+) expected", verdict.detail)
        per_tap = case.meaning["deform_groups"] * math.prod(known["filters"][:2]) if asked else 0
        if asked and int(asked[1]) not in (per_tap, 2 * per_tap):
            return Verdict("error with an overflowed size", f"{verdict.detail}; it is {per_tap}")
        return verdict
    if expected is None:
        return Verdict("taken though it does not fit", f"inferred {shape}")
    if case.more["op"] == "grad":
        return RIGHT
    return _static_problem(case, known, shape) or RIGHT


def _inferred(case):
    """The output's shape as far as the oracle can tell, or None where the call does not fit."""
    known = case.more["known"]
    try:
        output = output_shape({n: known[n] for n in ARGUMENTS if n in known}, case.meaning)
    except MisfitError:
        return None
    given = known.get("grad_output")
    return output if tf.TensorShape(given).is_compatible_with(output) else None


# --- Raw ops ---


def _raw_body(call):
    case = call.case

    def body(tensors):
        tensors = call.others | tensors
        masks = [tensors.pop("mask")] * int(case.more["masks"]) if "mask" in tensors else []
        arguments = tensors | {"mask": masks} | call.attributes
        if case.more["op"] == "deform_conv2d":
            return {"output": record.ops.deform_conv2d(**arguments)}
        wants = {f"want_grad_{name}": name in case.wanted for name in ARGUMENTS}
        gradients = record.ops.deform_conv2d_grad(**arguments, **wants)
        found = dict(zip(ARGUMENTS, tf.nest.flatten(tuple(gradients)), strict=False))
        return {f"grad_{name}": value for name, value in found.items()}

    return body


def _raw_verdict(call, run) -> Verdict:
    case = call.case
    grad_output = case.arguments.get("grad_output")
    if grad_output is not None and list(grad_output.shape) != list(call.output_shape or ()):
        call.output_shape = None
    try:
        found = run()
    except Exception as error:
        names = () if case.blamed == () else case.blamed or RAW_NAMES
        return of_error(error, names, must_fit=call.fits, allowed=RAW_ERRORS)
    if call.output_shape is not None:
        for name in ARGUMENTS:
            gradient = found.get(f"grad_{name}")
            if gradient is not None and name not in case.wanted:
                if tuple(gradient.shape) != (0,):
                    return Verdict("wrong result", f"grad_{name} is not wanted, and not empty")
                del found[f"grad_{name}"]
    return call.verdict_on(found)


def raw(case: Case) -> Verdict:
    call = Call(case)
    return _raw_verdict(call, lambda: _raw_body(call)(call.tensors))


def raw_graph(case: Case, jit_compile=False) -> Verdict:
    call = Call(case)

    def run():
        function, arguments = _in_function(
            call, case.more.get("known", {}), _raw_body(call), jit_compile=jit_compile
        )
        return function(*arguments)

    return _raw_verdict(call, run)


# --- Second order ---


def second(case: Case) -> Verdict:
    """Against the pure TensorFlow reference, both differentiated twice."""
    call = Call(case)

    def twice(tensors, function):
        with tf.GradientTape() as outer:
            outer.watch(tensors)
            first = call.evaluate(tensors, call.grad_output, function)
            number = tf.add_n([tf.reduce_sum(value**2) for value in first.values()])
        return outer.gradient(number, tensors)

    run = tf.function(twice, autograph=False) if case.more["graph"] else twice
    try:
        found = run(call.tensors, deform_conv2d)
    except Exception as error:
        return call.verdict_on_error(error)
    for name, expected in twice(call.tensors, deform_conv2d_reference).items():
        distance = np.linalg.norm(np.asarray(found[name]) - np.asarray(expected))
        if not distance <= 1e-9 * np.linalg.norm(expected) + 1e-12:
            return Verdict("wrong result", f"second order by {name}: {distance} away")
    return RIGHT


def reference(case: Case) -> Verdict:
    """The pure TensorFlow reference itself, which second-order gradients are made of."""
    call = Call(case)
    found = call.evaluate(call.tensors, call.grad_output, deform_conv2d_reference)
    return call.verdict_on(found, precision="float32")


RUN = {
    "eager": eager,
    "graph": graph,
    "aggregate": aggregate,
    "v1": v1,
    "shapes": shapes,
    "raw": raw,
    "raw_graph": raw_graph,
    "jit": jit,
    "raw_jit": functools.partial(raw_graph, jit_compile=True),
    "second": second,
    "reference": reference,
}
