"""Tries the core on a GPU with random problems.

    python tests/fuzz/gpu.py [--memcheck] [arguments of fuzz_gpu, such as --seconds 60]

Builds the core's GPU half and the program with nvcc. With --memcheck, compute-sanitizer watches
every access. Needs PyTorch, which tells the GPU's compute capability.
"""

import re
import subprocess
import sys
from pathlib import Path

PROJECT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(PROJECT / "benchmarks"))

import gpu_core  # noqa: E402

FOLDER = Path(__file__).resolve().parent
PROGRAM = PROJECT / "build" / "fuzz" / "fuzz_gpu"
SOURCES = ("gpu.cc", "driver.cc", "problem.cc", "reference.cc")


def build() -> None:
    gpu_core.build()
    # Where the library found cuBLAS, which may be PyTorch's.
    loaded = Path("/proc/self/maps").read_text()
    folders = {str(gpu_core.LIBRARY.parent), *re.findall(r"(/\S+)/libcublas(?:Lt)?\.so", loaded)}
    PROGRAM.parent.mkdir(parents=True, exist_ok=True)
    command = ["nvcc", "-std=c++17", "-O3", f"-I{PROJECT / 'src'}", f"-I{FOLDER}"]
    command += [FOLDER / source for source in SOURCES]
    command += ["-o", PROGRAM, gpu_core.LIBRARY, "-Xlinker", "--disable-new-dtags"]
    for folder in sorted(folders):
        command += ["-Xlinker", f"-rpath={folder}"]
    subprocess.run(command, check=True)


def main() -> int:
    arguments = sys.argv[1:]
    command = [PROGRAM, *(each for each in arguments if each != "--memcheck")]
    if "--memcheck" in arguments:
        command = ["compute-sanitizer", "--error-exitcode", "4", *command, "--exact", "1"]
    build()
    return subprocess.run(command, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
