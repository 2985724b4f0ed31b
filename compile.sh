#!/usr/bin/env bash
# Builds build/libdeform_conv.so for the TensorFlow of a Python environment.
#
#   ./compile.sh [--cpu-only] [--no-xla]
#
# Beside it, build/libdeform_conv_xla.so has the kernels that jit_compile=True needs, unless --no-xla
# is given.
# With nvcc on the PATH it has kernels for NVIDIA GPUs too, unless --cpu-only is given. CUDA_ARCHS
# lists the compute capabilities to build them for ("80 90"); the last is included as PTX too, which
# later GPUs can run.
#
# The environment is $PYTHON, or else .venv where there is one, or else python3.
# CXX chooses the compiler; WERROR=1 makes its warnings errors. A second call only builds what has
# changed.
set -euo pipefail

fail() {
  echo "compile.sh: error: $*" >&2
  exit 1
}

# Where it is given as a path, it is meant from where the user stands.
if [[ ${PYTHON:-} == */* ]]; then PYTHON=$(cd "$(dirname "$PYTHON")" && pwd)/$(basename "$PYTHON"); fi
cd "$(dirname "${BASH_SOURCE[0]}")"

cuda=ON
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

if ! tensorflow=$(TF_CPP_MIN_LOG_LEVEL=3 "$PYTHON" - 2>&1 << 'END'
import tensorflow as tf

flags = tf.sysconfig.get_compile_flags()
print("TENSORFLOW", tf.__version__)
print(tf.sysconfig.get_include())
print(tf.sysconfig.get_lib())
print(";".join(flag[2:] for flag in flags if flag.startswith("-D")))
END
); then
  fail "$PYTHON cannot import TensorFlow ($(tail -n 1 <<< "$tensorflow"));" \
    "'$PYTHON -m pip install -r requirements.txt' brings it"
fi
{ read -r _ version; read -r include; read -r library; read -r definitions; } \
  <<< "$(sed -n '/^TENSORFLOW/,$p' <<< "$tensorflow")"

# The newest of each generation that this nvcc knows, unless the user says otherwise.
architectures=
if [[ $cuda == ON ]] && command -v nvcc > /dev/null; then
  known=$(nvcc --list-gpu-arch)
  for architecture in ${CUDA_ARCHS:-75 80 86 89 90 100 120}; do
    if [[ " ${known//$'\n'/ } " == *" compute_$architecture "* ]]; then
      architectures+="${architectures:+-real;}$architecture"
    elif [[ -n ${CUDA_ARCHS:-} ]]; then
      fail "CUDA_ARCHS: nvcc does not know compute capability $architecture; it knows" $known
    fi
  done
  cuda_text="$(nvcc --version | sed -n 's/.*release \([0-9.]*\).*/CUDA \1/p') for ${architectures//-real;/ }"
elif [[ $cuda == ON ]]; then
  cuda=OFF
  cuda_text="no CUDA (nvcc not found)"
else
  cuda_text="no CUDA (--cpu-only)"
fi

configuration="TensorFlow $version ($library), $("$CXX" --version | head -n 1), $cuda_text"
echo "compile.sh: for $configuration"

# A build directory of another configuration or place is of no use.
tool=$(command -v ninja || command -v make)
stamp="$configuration $PWD $include $definitions $generator $tool"
if [[ $(cat build/configuration.txt 2> /dev/null) != "$stamp" ]]; then
  rm -rf build/CMakeCache.txt build/CMakeFiles build/*.ninja build/Makefile build/configuration.txt
  output=$(cmake -S . -B build -G "$generator" -DCMAKE_CXX_COMPILER="$CXX" \
    -DTF_INCLUDE_DIR="$include" -DTF_LIBRARY_DIR="$library" \
    -DTF_COMPILE_DEFINITIONS="$definitions" -DDEFORM_CONV_CUDA=$cuda \
    -DCMAKE_CUDA_ARCHITECTURES="$architectures" 2>&1) \
    || { echo "$output" >&2; fail "CMake could not configure the build"; }
  echo "$stamp" > build/configuration.txt
fi
cmake -DDEFORM_CONV_WERROR="${WERROR:-OFF}" -DDEFORM_CONV_XLA=$xla build > /dev/null
# One of an earlier build would be loaded.
if [[ $xla == OFF ]]; then rm -f build/libdeform_conv_xla.so; fi
cmake --build build --parallel "$(nproc)"
# What the loader quotes when the library does not fit the TensorFlow it is loaded into.
echo "$version" > build/tensorflow_version.txt
echo "compile.sh: built build/libdeform_conv.so"
