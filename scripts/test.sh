#!/usr/bin/env bash
# Sets everything up, then runs the style checks and the tests, on each processor a file of them at a
# time. Arguments go to pytest; -n 0 runs one test after the other.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
start=$SECONDS
scripts/setup.sh --dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
find src tests/fuzz docs/examples -name '*.c' -o -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' \
  | xargs .venv/bin/clang-format --dry-run --Werror
# Each process with TensorFlow takes some GB, hence no more than four.
.venv/bin/python -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
echo "make test: passed in $((SECONDS - start)) s"
