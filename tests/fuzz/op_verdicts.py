"""What a call may come to: a right result, or an error of the right kind that names an argument."""

import re
from dataclasses import dataclass

import tensorflow as tf
from op_cases import ARGUMENTS, ATTRIBUTES

ERRORS = (
    ValueError,
    TypeError,
    tf.errors.InvalidArgumentError,
    tf.errors.ResourceExhaustedError,
)
NAMES = (*ARGUMENTS, *ATTRIBUTES, "explicit_paddings", "grad_output")


@dataclass
class Verdict:
    """`outcome` is "right", "refused", "skipped" or what makes it a finding."""

    outcome: str
    detail: str = ""

    @property
    def is_finding(self):
        return self.outcome not in ("right", "refused", "skipped")


RIGHT = Verdict("right")


def essence(error: Exception) -> str:
    """The message without what TensorFlow puts around it, which quotes the caller's source."""
    text = re.sub(r"\{\{.*?\}\}|\[Op:.*?\]|\[\[.*?\]\]", "", str(error))
    text = re.sub(r" for ' = \w+\[.*?\]\(.*", "", text, flags=re.S)
    text = re.sub(r"Graph execution error:|Detected at node .*", "", text)
    return re.sub(r"^ *File \".*\n(?: {4}.*\n)?", "", text, flags=re.M).strip()


def names_one_of(message: str, names, flags=0) -> bool:
    return re.search(rf"\b({'|'.join(map(re.escape, names))})\b", message, flags) is not None


def of_error(error, names, *, must_fit=False, allowed=ERRORS, one_line=False) -> Verdict:
    """The verdict on an exception, whose message must have one of `names`."""
    message = essence(error)
    kind = type(error).__name__
    detail = f"{kind}: {message[:1500]}"
    if not isinstance(error, allowed):
        return Verdict("wrong kind of error", detail)
    if must_fit:
        return Verdict("refused though it fits", detail)
    if names and not names_one_of(message, names):
        return Verdict(f"error that names none of {', '.join(names)}"[:60], detail)
    if one_line and "\n" in message:
        return Verdict("error of several lines", detail)
    # A size that overflowed, as the message has it.
    if re.search(r"(= |received |has )-\d+ expected|extent -\d", message):
        return Verdict("error with an overflowed size", detail)
    return Verdict("refused", detail)
