#!/usr/bin/env python3
"""Compares the kernels' machine code in two builds, function by function, without names.

    scripts/compare_machine_code.py BEFORE AFTER

BEFORE and AFTER are build folders that compile.sh filled. Names, files and the order of functions
may differ between them. For each GPU architecture and each CPU instruction set, the script looks
for every function's twin in the other build: the same instructions, encodings, registers, stack and
shared memory. It lists the functions that have no twin, and exits with status 1 if there are any.

Reads the objects of all .cu files with cuobjdump (of the CUDA toolkit, or nvidia-cuda-cuobjdump and
nvidia-cuda-nvdisasm from PyPI) and those of cpu_kernels_* with objdump. c++filt makes names
readable.
"""

import argparse
import collections
import hashlib
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple


class Function(NamedTuple):
    group: str  # architecture or instruction set
    name: str
    instructions: int
    resources: str
    digest: str  # of all but the name


def function(group: str, name: str, code: list[str], resources: str = "") -> Function:
    digest = hashlib.sha256("\n".join([resources, *code]).encode()).hexdigest()
    return Function(group, name, len(code), resources, digest)


def printed(*command) -> str:
    return subprocess.run(
        list(map(str, command)), check=True, capture_output=True, text=True
    ).stdout


# --- GPU ---


def resources_of(object_file: Path) -> dict[tuple[str, str], str]:
    """What cuobjdump says of registers and memory, by architecture and function."""
    resources, architecture, name = {}, "", ""
    for line in printed("cuobjdump", "-res-usage", object_file).splitlines():
        if found := re.match(r"arch = (\S+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\S+):$", line):
            name = found[1]
        elif re.match(r"\s*REG:", line):
            resources[architecture, name] = line.strip()
    return resources


def gpu_functions(object_file: Path) -> list[Function]:
    """Instructions with their encodings; addresses count from the function's beginning."""
    resources = resources_of(object_file)
    functions, architecture, name, code = [], "", "", []

    def close() -> None:
        if code:
            used = resources[architecture, name]
            functions.append(function(architecture, name, code, used))
        code.clear()

    for line in printed("cuobjdump", "-sass", object_file).splitlines():
        if found := re.match(r"arch = (\S+)", line):
            close()
            architecture = found[1]
        elif found := re.match(r"\s*Function : (\S+)", line):
            close()
            name = found[1]
        elif "/* 0x" in line:
            code.append(" ".join(line.split()))
    close()
    return functions


# --- CPU ---


def cpu_functions(object_file: Path) -> list[Function]:
    """Instructions, with jumps relative to the function and no names of what is referred to."""
    group = next(
        part for part in object_file.parts if part.startswith("cpu_kernels_")
    ).removesuffix(".dir")
    functions, name, code = [], "", []

    def close() -> None:
        while code and re.match(r"(data16 |cs )*nop|xchg %ax,%ax", code[-1]):
            code.pop()  # up to where the next function is aligned
        if code:
            functions.append(function(group, name, code))
        code.clear()

    for line in printed("objdump", "-dr", "--no-show-raw-insn", object_file).splitlines():
        if found := re.match(r"[0-9a-f]+ <(.+)>:$", line):
            close()
            name = found[1]
        elif found := re.match(r"\s+[0-9a-f]+: (R_\S+)\s+(\S+)", line):
            # The section of a constant or table is kept. constants() compares the constants; what
            # is in tables is not compared.
            section = re.match(r"\.(rodata|data)(\.rel\.ro|\.cst\d+)?", found[2])
            code.append(f"{found[1]} {section[0] if section else '<name>'}")
        elif found := re.match(r"\s+[0-9a-f]+:\t(.*)", line):
            text = re.sub(r"\s*#.*", "", found[1])
            text = text.replace(f"<{name}+", "<+")
            text = re.sub(r"\b[0-9a-f]+ <(\+[^>]*)>", r"<\1>", text)
            text = re.sub(r"\b[0-9a-f]+ <[^+][^>]*>", "<name>", text)
            code.append(" ".join(text.split()))
    close()
    return [*functions, *constants(group, object_file)]


def constants(group: str, object_file: Path) -> list[Function]:
    """The constants that instructions load, as one function, in an order of their own."""
    values = []
    sections = re.findall(r"(\.rodata\.cst(\d+))", printed("objdump", "-h", object_file))
    for section, size in sections:
        dump = printed("objdump", "-s", "-j", section, object_file)
        digits = "".join(re.findall(r"^ [0-9a-f]+ ((?:[0-9a-f]{2,8} ){1,4})", dump, re.M))
        digits = digits.replace(" ", "")
        width = 2 * int(size)
        values += [f"{size} {digits[i : i + width]}" for i in range(0, len(digits), width)]
    return [function(group, "constants", sorted(values))] if values else []


# --- Comparing ---


def functions_of(build: Path) -> list[Function]:
    objects = build / "CMakeFiles"
    gpu = [each for file in objects.rglob("*.cu.o") for each in gpu_functions(file)]
    cpu = [
        each
        for folder in objects.glob("cpu_kernels_*.dir")
        for file in folder.rglob("*.o")
        for each in cpu_functions(file)
    ]
    if not cpu:
        sys.exit(f"compare_machine_code.py: error: {objects} holds no objects; run compile.sh")
    return gpu + cpu


def readable(names: list[str]) -> list[str]:
    return printed("c++filt", *names).splitlines() if names else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("before", type=Path)
    parser.add_argument("after", type=Path)
    arguments = parser.parse_args()
    builds = {side: functions_of(getattr(arguments, side)) for side in ("before", "after")}
    counts = {
        side: collections.Counter((each.group, each.digest) for each in functions)
        for side, functions in builds.items()
    }
    if not any(group.startswith("sm_") for group, _ in counts["before"] + counts["after"]):
        print("no GPU code in either build")
    same = counts["before"] & counts["after"]
    alone = {}
    for side, functions in builds.items():
        left = counts[side] - same
        alone[side] = []
        for each in functions:
            if left[each.group, each.digest] > 0:
                left[each.group, each.digest] -= 1
                alone[side].append(each)
    for group in sorted({group for count in counts.values() for group, _ in count}):
        twins = sum(count for (of, _), count in same.items() if of == group)
        only = {side: [each for each in alone[side] if each.group == group] for side in alone}
        print(f"{group}: {twins} identical, {len(only['before'])} only before, "
              f"{len(only['after'])} only after")  # fmt: skip
        for side, functions in only.items():
            names = readable([each.name for each in functions])
            for name, each in sorted(zip(names, functions, strict=True)):
                print(f"  only {side}: {name}: {each.instructions} lines {each.resources}")
    sys.exit(1 if any(alone.values()) else 0)


if __name__ == "__main__":
    main()
