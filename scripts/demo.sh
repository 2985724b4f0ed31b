#!/usr/bin/env bash
# Sets everything up, then shows the library at work: the op, the trained networks, the picture.
#
#   scripts/demo.sh [--quick]     --quick: 1000 digits and 6 frames, and leaves img/ alone
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
start=$SECONDS
scripts/setup.sh
evaluate=() plot=()
if [[ ${1:-} == --quick ]]; then
  evaluate=(--test-digits 1000)
  plot=(--frames 6 --output build/offset_viz.gif)
fi
.venv/bin/python utils/deform_conv_test.py
.venv/bin/python utils/evaluate.py "${evaluate[@]}"
.venv/bin/python plot_conv_test.py "${plot[@]}"
echo "make demo: done in $((SECONDS - start)) s"
