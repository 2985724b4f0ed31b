#!/usr/bin/env bash
# Makes .venv with everything the project needs, and builds the library. Quick when all is there.
#
#   scripts/setup.sh [--dev | --peers]
#
#   --dev     the tests' requirements too
#   --peers   those, and what some tests and benchmarks compare with (PyTorch, several GB)
#
# PYTHON3 chooses the Python (3.10 to 3.13) that the environment is made with.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "setup.sh: error: $*" >&2
  exit 1
}

# What is asked for, and then what has it too.
requirements=(requirements.txt requirements-dev.txt requirements-peers.txt)
case ${1:-} in
  "") ;;
  --dev) requirements=("${requirements[@]:1}") ;;
  --peers) requirements=("${requirements[@]:2}") ;;
  *) fail "unknown option $1 (there are --dev and --peers)" ;;
esac

fits() {
  "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2> /dev/null
}

if [[ -d .venv ]] && ! { fits .venv/bin/python && .venv/bin/python -m pip --version > /dev/null; }; then
  fail ".venv is unfinished or not of a Python from 3.10 to 3.13; remove it and try again"
fi
if [[ ! -d .venv ]]; then
  python=
  candidates=(python3 python3.13 python3.12 python3.11 python3.10)
  if [[ -n ${PYTHON3:-} ]]; then candidates=("$PYTHON3"); fi
  for candidate in "${candidates[@]}"; do
    if fits "$candidate"; then python=$candidate; break; fi
  done
  [[ -n $python ]] || fail "no Python from 3.10 to 3.13 found; set PYTHON3 to one"
  echo "setup.sh: making .venv with $("$python" --version)"
  "$python" -m venv .venv \
    || { rm -rf .venv; fail "$python cannot make a virtual environment (Debian: apt install python3-venv)"; }
fi

pip_install() {
  .venv/bin/python -m pip install -qq --disable-pip-version-check "$@"
}

# What was installed last is kept beside it, so that nothing is done twice.
is_installed() {
  for each in "${requirements[@]}"; do
    if cat requirements*.txt | cmp -s - ".venv/installed-$each"; then return; fi
  done
  return 1
}
if ! is_installed; then
  echo "setup.sh: installing ${requirements[0]} (TensorFlow is about 600 MB)"
  pip_install -r "${requirements[0]}"
  cat requirements*.txt > ".venv/installed-${requirements[0]}"
fi

# At least the version that CMakeLists.txt asks for.
cmake_is_there() {
  local version
  version=$(cmake --version 2> /dev/null | sed -n '1s/^cmake version \([0-9]*\.[0-9]*\).*/\1/p')
  [[ -n $version && $(printf '%s\n3.18\n' "$version" | sort -V | head -n 1) == 3.18 ]]
}
if [[ ! -x .venv/bin/cmake ]] && ! cmake_is_there; then
  echo "setup.sh: installing CMake and Ninja"
  pip_install 'cmake>=3.18,<5' 'ninja>=1.11,<2'
fi

PYTHON=.venv/bin/python ./compile.sh
