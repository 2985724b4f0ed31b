#!/usr/bin/env bash
# Makes .venv with everything the project needs, and builds the library. Quick when all is there.
#
#   scripts/setup.sh [--dev]     --dev: the tests' requirements too
#
# PYTHON3 chooses the Python (3.10 to 3.13) that the environment is made with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "setup.sh: error: $*" >&2
  exit 1
}

requirements=requirements.txt
if [[ ${1:-} == --dev ]]; then requirements=requirements-dev.txt; fi

fits() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null
}

if [[ ! -x .venv/bin/python ]]; then
  python=
  for candidate in ${PYTHON3:-python3 python3.13 python3.12 python3.11 python3.10}; do
    if fits "$candidate"; then python=$candidate; break; fi
  done
  [[ -n $python ]] || fail "no Python from 3.10 to 3.13 found; set PYTHON3 to one"
  echo "setup.sh: making .venv with $("$python" --version)"
  "$python" -m venv .venv || { rm -rf .venv; fail "$python cannot make a virtual environment"; }
fi

# Installs what $1 lists, unless that was done before.
install() {
  local stamp
  stamp=.venv/installed-$(cat requirements*.txt | cksum | tr -d ' ')-$1
  if [[ -f $stamp ]]; then return; fi
  echo "setup.sh: installing $1"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check -r "$1"
  touch "$stamp"
}
install "$requirements"

# opencv-python draws windows, and wants libGL for it; its headless twin is all that is needed here.
if ! .venv/bin/python -c 'import cv2' 2> /dev/null; then
  echo "setup.sh: opencv-python does not load here (no libGL?); taking opencv-python-headless"
  .venv/bin/python -m pip uninstall --quiet --yes opencv-python
  sed -n 's/^opencv-python/opencv-python-headless/p' requirements.txt \
    | .venv/bin/python -m pip install --quiet --disable-pip-version-check -r /dev/stdin
fi

if ! command -v cmake > /dev/null && [[ ! -x .venv/bin/cmake ]]; then
  echo "setup.sh: installing CMake and Ninja"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    'cmake>=3.18,<5' 'ninja>=1.11,<2'
fi

PYTHON=.venv/bin/python ./compile.sh
