#!/usr/bin/env bash
# Sets everything up, then shows the library at work: the op, the trained networks, the picture.
#
#   scripts/demo.sh [--quick]     --quick: 1000 digits and 6 frames, and leaves img/ alone
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
start=$SECONDS
evaluate=() plot=()
case ${1:-} in
  "") ;;
  --quick)
    evaluate=(--test-digits 1000)
    plot=(--frames 6 --output build/offset_viz.gif)
    ;;
  *)
    echo "demo.sh: error: unknown option $1 (there is --quick)" >&2
    exit 1
    ;;
esac
scripts/setup.sh
.venv/bin/python utils/deform_conv_test.py
.venv/bin/python utils/evaluate.py "${evaluate[@]}"
.venv/bin/python plot_conv_test.py "${plot[@]}"
echo "make demo: done in $((SECONDS - start)) s"
