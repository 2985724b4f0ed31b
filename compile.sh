#!/usr/bin/env bash
# Builds build/libdeform_conv.so for the TensorFlow of a Python environment.
#
#   ./compile.sh [--cpu-only]
#
# The environment is $PYTHON, or else .venv where there is one, or else python3.
# CXX chooses the compiler; WERROR=1 makes its warnings errors. A second call only builds what has changed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

fail() {
  echo "compile.sh: error: $*" >&2
  exit 1
}

for argument in "$@"; do
  case $argument in
    --cpu-only) ;; # what is built anyway, until there are CUDA kernels
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) fail "unknown option $argument (there is --cpu-only)" ;;
  esac
done

if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  if [[ -x .venv/bin/python ]]; then PYTHON=.venv/bin/python; fi
fi
command -v "$PYTHON" > /dev/null || fail "$PYTHON not found; set PYTHON to a Python that has TensorFlow"

# CMake and Ninja from PyPI lie beside Python.
PATH="$PATH:$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("scripts"))')"
CXX=${CXX:-g++}
command -v "$CXX" > /dev/null || fail "compiler $CXX not found; install g++ or set CXX"
command -v cmake > /dev/null || fail "CMake not found; '$PYTHON -m pip install cmake' brings it"
generator="Unix Makefiles"
if command -v ninja > /dev/null; then
  generator=Ninja
elif ! command -v make > /dev/null; then
  fail "neither make nor ninja found; '$PYTHON -m pip install ninja' brings one"
fi

tensorflow=$(TF_CPP_MIN_LOG_LEVEL=3 "$PYTHON" - 2> /dev/null << 'END'
import tensorflow as tf

print(tf.__version__)
print(tf.sysconfig.get_include())
print(tf.sysconfig.get_lib())
print(";".join(flag[2:] for flag in tf.sysconfig.get_compile_flags() if flag.startswith("-D")))
END
) || fail "$PYTHON cannot import TensorFlow; '$PYTHON -m pip install -r requirements.txt' brings it"
{ read -r version; read -r include; read -r library; read -r definitions; } <<< "$tensorflow"

configuration="TensorFlow $version ($library), $("$CXX" --version | head -n 1)${WERROR:+, warnings are errors}"
echo "compile.sh: for $configuration"

# A build directory of another TensorFlow, compiler or generator is of no use.
if [[ -f build/CMakeCache.txt && $(cat build/configuration.txt 2> /dev/null) != "$configuration" ]]; then
  rm -rf build/CMakeCache.txt build/CMakeFiles
fi
if [[ ! -f build/CMakeCache.txt ]]; then
  cmake -S . -B build -G "$generator" -DCMAKE_CXX_COMPILER="$CXX" -DTF_INCLUDE_DIR="$include" \
    -DTF_LIBRARY_DIR="$library" -DTF_COMPILE_DEFINITIONS="$definitions" \
    -DDEFORM_CONV_WERROR="${WERROR:-OFF}" > build.log 2>&1 \
    || { cat build.log >&2; rm -f build.log; fail "CMake could not configure the build"; }
  rm -f build.log
  echo "$configuration" > build/configuration.txt
fi
cmake --build build --parallel "$(nproc)"
# What the loader quotes when the library does not fit the TensorFlow it is loaded into.
echo "$version" > build/tensorflow_version.txt
echo "compile.sh: built build/libdeform_conv.so"
