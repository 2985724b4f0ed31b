#!/usr/bin/env bash
# Sets everything up, then runs the style checks and the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
start=$SECONDS
scripts/setup.sh --dev
.venv/bin/ruff check .
.venv/bin/ruff format --check .
find src tests/fuzz docs/examples -name '*.c' -o -name '*.h' -o -name '*.cc' -o -name '*.cu' -o -name '*.cuh' \
  | xargs .venv/bin/clang-format --dry-run --Werror
.venv/bin/python -m pytest "$@"
echo "make test: passed in $((SECONDS - start)) s"
