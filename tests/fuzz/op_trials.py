"""Trials of many calls each: memory that is kept, memory that is short, threads side by side."""

import ctypes
import os
import threading
from pathlib import Path

import numpy as np
import tensorflow as tf
from op_calls import Call
from op_cases import Case, Draw, fit
from op_verdicts import RIGHT, Verdict, of_error

from deform_conv import deform_conv2d
from deform_conv.layers import DeformableConv2D

KEPT = 8 << 20  # bytes that a thousand calls may leave behind, for the allocator's sake


# --- Memory that is kept ---


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def memory(case: Case) -> Verdict:
    """Memory settles while shapes change."""
    draw = Draw(f"{case.seed} {case.number} memory")
    layer = DeformableConv2D(8, 3, padding="same", modulated=True)
    filters = tf.random.stateless_normal((3, 3, 8, 8), (1, 2))

    def call_op(images):
        offset = tf.zeros((*images.shape[:3], 18))
        with tf.GradientTape() as tape:
            tape.watch([images, filters, offset])
            output = deform_conv2d(images, filters, offset)
        tape.gradient(output, [images, filters, offset])

    def call_layer(images):
        with tf.GradientTape() as tape:
            output = layer(images)
        tape.gradient(output, layer.trainable_variables)

    call = {"eager": call_op, "layer": call_layer}[case.more["what"]]
    # So few that what TensorFlow keeps for each shape is all kept after the first half.
    shapes = [
        (draw.randrange(1, 4), draw.randrange(8, 24), draw.randrange(8, 24), 8) for _ in range(100)
    ]
    sizes = []
    calls = case.more["calls"]
    for index in range(calls + 1):
        if index % (calls // 4) == 0:
            ctypes.CDLL(None).malloc_trim(0)
            sizes.append(resident_bytes())
        call(tf.zeros(draw.choice(shapes)))
    if sizes[-1] - sizes[2] > KEPT:
        return Verdict("memory that grows", f"bytes after each {calls // 4} calls: {sizes}")
    return Verdict("right", f"bytes after each {calls // 4} calls: {sizes}")


# --- Memory that is short ---


def allocation(case: Case) -> Verdict:
    """An allocation fails: the error says so, and the next call works."""
    if case.more["how"] == "huge":
        return _huge()
    try:
        shim = ctypes.CDLL(None)
        fail, failed = shim.fail_allocation, shim.failed_allocations
    except AttributeError:
        return Verdict("skipped", "there was no compiler for failing_malloc.c")
    fail.argtypes = [ctypes.c_long, ctypes.c_size_t]
    failed.restype = ctypes.c_long
    call = Call(case)
    run = call.evaluate
    if case.more["how"] == "function":
        run = tf.function(run, autograph=False)
    # TensorFlow's own allocations of a first call, which end the process where they fail.
    run(call.tensors, call.grad_output)
    error = None
    fail(case.more["failing"], case.more["least"])
    try:
        found = run(call.tensors, call.grad_output)
    except Exception as raised:
        error = raised
    some_failed = failed() > 0
    fail(0, 0)
    if error is None:
        verdict = call.verdict_on(found)
    elif not some_failed:
        return call.verdict_on_error(error)
    else:
        verdict = _verdict_on_shortage(error)
    if verdict.is_finding:
        return verdict
    again = call.verdict_on(run(call.tensors, call.grad_output))
    return again if again.is_finding else verdict


def _verdict_on_shortage(error) -> Verdict:
    if isinstance(error, MemoryError):
        return Verdict("refused", "Python had no memory for its own")
    verdict = of_error(error, (), allowed=(tf.errors.ResourceExhaustedError,))
    named = "OOM when allocating tensor with shape" in str(error) or "workspace" in str(error)
    if verdict.is_finding or named:
        return verdict
    return Verdict("error that does not say what there was no memory for", verdict.detail)


def _huge() -> Verdict:
    """An output of 16 TiB, from arguments of 36 MiB."""
    side, channels = 2048, 2**20
    arguments = (
        tf.zeros((1, side, side, 1)),
        tf.zeros((1, 1, 1, channels)),
        tf.zeros((1, side, side, 2)),
    )
    try:
        output = deform_conv2d(*arguments)
    except tf.errors.ResourceExhaustedError as error:
        shape = f"[1,{side},{side},{channels}]"
        if shape in str(error):
            return Verdict("refused", str(error))
        return Verdict("error that does not say what there was no memory for", str(error))
    except Exception as error:
        return Verdict("wrong kind of error", repr(error))
    return Verdict("taken though it does not fit", str(output.shape))


# --- Side by side ---


def _several(case, count):
    """Calls that fit."""
    calls = []
    for index in range(count):
        one = Case(case.seed, case.number * 1000 + index, case.mode)
        fit(one, Draw(f"{case.seed} {case.number} {index}"))
        calls.append(Call(one))
    return calls


def _bits(found):
    return {name: np.asarray(value).tobytes() for name, value in found.items()}


def threads(case: Case) -> Verdict:
    """Threads that call at the same time get the bits that one alone gets."""
    calls = _several(case, 4)
    expected = [_bits(call.evaluate(call.tensors, call.grad_output)) for call in calls]
    problems = []

    def work(first):
        for turn in range(case.more["repeats"]):
            index = (first + turn) % len(calls)
            call = calls[index]
            try:
                found = _bits(call.evaluate(call.tensors, call.grad_output))
            except Exception as error:
                problems.append(Verdict("refused though it fits", repr(error)))
                continue
            if found != expected[index]:
                problems.append(Verdict("other bits in threads", str(call.case)))

    workers = [threading.Thread(target=work, args=(n,)) for n in range(case.more["calls"])]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return problems[0] if problems else RIGHT


def parallel(case: Case) -> Verdict:
    """Ops of one graph that may run at the same time give the bits of eager calls."""
    calls = _several(case, case.more["calls"])
    expected = [_bits(call.evaluate(call.tensors, call.grad_output)) for call in calls]

    @tf.function(autograph=False)
    def together(tensors, gradients):
        return [c.evaluate(*given) for c, *given in zip(calls, tensors, gradients, strict=True)]

    for _ in range(case.more["repeats"]):
        found = together([call.tensors for call in calls], [call.grad_output for call in calls])
        for call, ours, theirs in zip(calls, found, expected, strict=True):
            if _bits(ours) != theirs:
                return Verdict("other bits in a graph", str(call.case))
    return RIGHT


RUN = {"memory": memory, "allocation": allocation, "threads": threads, "parallel": parallel}
