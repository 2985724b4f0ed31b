#!/usr/bin/env bash
# Builds build/libdeform_conv.so for the TensorFlow of a Python environment.
#
#   ./compile.sh [--cpu-only] [--no-xla]
#
# Beside it, build/libdeform_conv_core.so has what needs no TensorFlow, and
# build/libdeform_conv_xla.so the kernels that jit_compile=True needs, with TensorFlow 2.20 or newer
# and unless --no-xla is given.
# With nvcc on the PATH it has kernels for NVIDIA GPUs too, unless --cpu-only is given. CUDA_ARCHS
# lists the compute capabilities to build them for ("80 90"); the last is included as PTX too, which
# later GPUs can run.
#
# The environment is $PYTHON, or else .venv where there is one, or else python3.
# CXX chooses the compiler; WERROR=1 makes its warnings errors, and nvcc's, also of kernels that spill
# registers. A second call only builds what has changed.
set -euo pipefail

fail() {
  echo "compile.sh: error: $*" >&2
  exit 1
}

# Where it is given as a path, it is meant from where the user stands.
if [[ ${PYTHON:-} == */* ]]; then PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON"); fi
cd "$(dirname "${BASH_SOURCE[0]}")"

cuda=AUTO
xla=ON
for argument in "$@"; do
  case $argument in
    --cpu-only) cuda=OFF ;;
    --no-xla) xla=OFF ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' compile.sh; exit 0 ;;
    *) fail "unknown option $argument (there are --cpu-only and --no-xla)" ;;
  esac
done

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if [[ -x .venv/bin/python ]]; then PYTHON=$PWD/.venv/bin/python; fi
fi
command -v "$PYTHON" > /dev/null || fail "$PYTHON not found; set PYTHON to a Python that has TensorFlow"

# CMake and Ninja from PyPI lie beside Python, and are newer than a system's.
PATH="$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))'):$PATH"
CXX=${CXX:-g++}
command -v "$CXX" > /dev/null || fail "compiler $CXX not found; install g++ or set CXX"
command -v cmake > /dev/null || fail "CMake not found; '$PYTHON -m pip install cmake' brings it"
generator="Unix Makefiles"
if command -v ninja > /dev/null; then
  generator=Ninja
elif ! command -v make > /dev/null; then
  fail "neither make nor ninja found; '$PYTHON -m pip install ninja' brings one"
fi

tensorflow=$("$PYTHON" scripts/find_tensorflow.py 2>&1) \
  || fail "$(tail -n 1 <<< "$tensorflow"); '$PYTHON -m pip install -r requirements.txt' brings one"
tensorflow=$(tail -n 1 <<< "$tensorflow") # without what Python may say before

echo "compile.sh: for TensorFlow ${tensorflow/=/ in }, $("$CXX" --version | head -n 1)"

# A build directory of another configuration or place is of no use.
tool=$(command -v ninja || command -v make)
nvcc=$("${CUDACXX:-nvcc}" --version 2> /dev/null | tail -n 1 || true)
stamp="$PWD $tensorflow $generator $tool $("$CXX" --version | head -n 1) $nvcc $cuda ${CUDA_ARCHS:-}"
if [[ $(cat build/configuration.txt 2> /dev/null) != "$stamp" ]]; then
  # It is kept until the new one is there: a mistyped setting must not cost a build.
  rm -rf build/previous
  mkdir -p build/previous
  move_configuration() {
    find "build$1" -maxdepth 1 \( -name 'CMake*' -o -name '*.ninja' -o -name Makefile \
      -o -name configuration.txt \) -exec mv -t "build$2" {} +
  }
  move_configuration "" /previous
  output=$(cmake -S . -B build -G "$generator" -DCMAKE_CXX_COMPILER="$CXX" \
    -DTENSORFLOWS="$tensorflow" -DDEFORM_CONV_CUDA=$cuda \
    -DDEFORM_CONV_CUDA_ARCHS="${CUDA_ARCHS:-}" 2>&1) \
    || {
      echo "$output" >&2
      rm -rf build/CMakeCache.txt build/CMakeFiles
      move_configuration /previous ""
      rmdir build/previous
      fail "CMake could not configure the build"
    }
  rm -rf build/previous
  sed -n 's/^-- deform_conv: \(.*\)/compile.sh: building with \1; the first time this takes some minutes/p' <<< "$output"
  rm -f build/libdeform_conv{,_core,_xla}.so # one that is not built again would be loaded
  echo "$stamp" > build/configuration.txt
fi
cmake -DDEFORM_CONV_WERROR="${WERROR:-OFF}" -DDEFORM_CONV_XLA=$xla build > /dev/null
# One of an earlier build would be loaded.
if [[ $xla == OFF ]]; then rm -f build/libdeform_conv_xla.so; fi
quiet=--quiet
if [[ $generator != Ninja ]]; then quiet=--silent; fi
cmake --build build --parallel "$(getconf _NPROCESSORS_ONLN)" -- $quiet \
  | { grep -v '^ninja: no work to do' || true; } # some versions say so in quiet too
echo "compile.sh: built build/libdeform_conv.so"
