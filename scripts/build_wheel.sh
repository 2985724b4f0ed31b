#!/usr/bin/env bash
# Builds one wheel for many versions of TensorFlow.
#
#   scripts/build_wheel.sh [--cpu-only] [--aarch64] [--to FOLDER] [VERSION...]
#
# VERSION is a minor version of TensorFlow, such as 2.20; without any, all from 2.17 to 2.21. The wheel
# goes to FOLDER, or else to dist/. It has CUDA kernels, for which nvcc must be on the PATH, unless
# --cpu-only is given; CUDA_ARCHS chooses as for compile.sh. --aarch64 builds for 64-bit ARM, on the CPU
# alone, with aarch64-linux-gnu-g++.
#
# All versions take 5 minutes on two cores, with CUDA, and 5 GB in build/wheel, which may be removed
# afterwards. PYTHON chooses the Python, from 3.10 to 3.13; the wheel is for all of them.
set -euo pipefail
caller=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "build_wheel.sh: error: $*" >&2
  exit 1
}

arch=$(uname -m)
cuda=ON
to=dist
settings=()
versions=()
while [[ $# != 0 ]]; do
  case $1 in
    --cpu-only) cuda=OFF ;;
    --aarch64) arch=aarch64 ;;
    --to) to=$(cd "$caller" && realpath -m -- "${2:?--to needs a folder}"); shift ;;
    2.*) versions+=("$1") ;;
    -h | --help) sed -n '2,/^set/s/^# \{0,1\}//p' scripts/build_wheel.sh; exit 0 ;;
    *) fail "unknown argument $1 (there are --cpu-only, --aarch64, --to FOLDER and versions)" ;;
  esac
  shift
done
if [[ ${#versions[@]} == 0 ]]; then versions=(2.17 2.18 2.19 2.20 2.21); fi
mapfile -t versions < <(printf '%s\n' "${versions[@]}" | sort -Vu) # CMake wants the newest last
if [[ $arch != $(uname -m) ]]; then
  command -v "$arch-linux-gnu-g++" > /dev/null \
    || fail "$arch-linux-gnu-g++ not found (Debian: apt install g++-aarch64-linux-gnu)"
  cuda=OFF
  export CXX=$arch-linux-gnu-g++
  export _PYTHON_HOST_PLATFORM=linux-$arch # what Python names the wheel after
  settings+=(-C cmake.define.CMAKE_SYSTEM_NAME=Linux -C "cmake.define.CMAKE_SYSTEM_PROCESSOR=$arch")
fi
if [[ $cuda == ON ]]; then
  command -v "${CUDACXX:-nvcc}" > /dev/null || fail "${CUDACXX:-nvcc} not found; there is --cpu-only"
fi

work=$PWD/build/wheel
python=$work/venv/bin/python
if [[ ! -x $python ]]; then "${PYTHON:-python3}" -m venv "$work/venv"; fi
"$python" -m pip install -qq --disable-pip-version-check -r requirements-wheel.txt

# Of each version the headers, and the libraries to link against. tensorflow-cpu serves GPU builds of
# TensorFlow too. It exists for x86-64 only.
package=tensorflow-cpu
if [[ $arch != x86_64 ]]; then package=tensorflow; fi
tensorflows=
for version in "${versions[@]}"; do
  folder=$work/$arch/tensorflow-$version
  if [[ ! -f $folder/version.txt ]]; then
    echo "build_wheel.sh: fetching $package $version"
    rm -rf "$folder"
    "$python" -m pip download -qq --disable-pip-version-check --no-deps --only-binary :all: \
      --python-version 3.11 --platform "manylinux_2_17_$arch" --platform "manylinux_2_27_$arch" \
      --dest "$folder" "$package==$version.*"
    "$python" - "$folder" << 'END'
import sys, zipfile
from pathlib import Path

folder = Path(sys.argv[1])
(archive,) = folder.glob("*.whl")
with zipfile.ZipFile(archive) as wheel:
    for name in wheel.namelist():
        if name.startswith(("tensorflow/include/", "tensorflow/libtensorflow_")):
            wheel.extract(name, folder)
(folder / "version.txt").write_text(archive.name.split("-")[1])
archive.unlink()
END
  fi
  tensorflows+="${tensorflows:+;}$(cat "$folder/version.txt")=$folder/tensorflow"
done

echo "build_wheel.sh: building for TensorFlow ${versions[*]}"
rm -rf "$work/unchecked"
"$python" -m build --wheel --outdir "$work/unchecked" \
  -C "build-dir=$work/$arch/cmake" -C "cmake.define.TENSORFLOWS=$tensorflows" \
  -C "cmake.define.DEFORM_CONV_CUDA=$cuda" -C cmake.define.DEFORM_CONV_OLD_GLIBC=ON \
  -C "cmake.define.DEFORM_CONV_WERROR=${WERROR:-OFF}" \
  "${settings[@]}" > "$work/build.log" 2>&1 \
  || { tail -n 50 "$work/build.log" >&2; fail "the build failed; all of it is in $work/build.log"; }

# auditwheel finds the oldest system that has all that the libraries need, but for TensorFlow's.
echo "build_wheel.sh: checking"
sed -n 's/^.*-- deform_conv: /build_wheel.sh: with /p' "$work/build.log"
rm -f "$to"/tf_deform_conv-*_"$arch".whl
PATH=$work/venv/bin:$PATH "$python" -m auditwheel repair --only-plat \
  --exclude 'libtensorflow_*' --wheel-dir "$to" "$work"/unchecked/*.whl > "$work/audit.log" 2>&1 \
  || { tail -n 20 "$work/audit.log" >&2; fail "auditwheel refuses the wheel"; }
# Ubuntu 18.04, Debian 10 and RHEL 8 have glibc 2.27 or newer.
wheel=$(ls "$to"/tf_deform_conv-*_"$arch".whl)
[[ $wheel =~ -manylinux_2_([0-9]+)_ && ${BASH_REMATCH[1]} -le 27 ]] \
  || fail "the wheel is for systems newer than glibc 2.27: $wheel"
"$python" -m twine --no-color check --strict "$wheel"
"$work/venv/bin/check-wheel-contents" "$wheel"
echo "build_wheel.sh: built $wheel, $(du -h "$wheel" | cut -f1)"
