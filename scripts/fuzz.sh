#!/usr/bin/env bash
# Tries the core and the op with random and hostile problems; tests/fuzz/README.md tells how.
#
#   scripts/fuzz.sh [--seconds S] [--seed N]
#
# The core gets S seconds (120), shared by its builds and instruction sets, and the op as many.
# Without --seed, each has a fresh one. Goes on after a finding, and ends with status 1 if there
# was one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
  echo "fuzz.sh: error: $*" >&2
  exit 1
}

seconds=120
seed=
while (($# > 0)); do
  [[ ${2:-} =~ ^[0-9]+$ ]] || fail "$1 takes a whole number"
  case $1 in
    --seconds) seconds=$2 ;;
    --seed) seed=$2 ;;
    *) fail "unknown option $1 (there are --seconds and --seed)" ;;
  esac
  shift 2
done
fresh_seed() { echo "${seed:-$(od -An -N4 -tu4 /dev/urandom | tr -d ' ')}"; }

scripts/setup.sh --dev
PATH="$PWD/.venv/bin:$PATH"
tensorflow=$(python scripts/find_tensorflow.py) # for Eigen's headers

build() { # <folder> <sanitizers>
  local output
  output=$(cmake -S . -B "build/fuzz/$1" -DCMAKE_BUILD_TYPE=Release -DTENSORFLOWS="$tensorflow" \
    -DDEFORM_CONV_CUDA=OFF -DDEFORM_CONV_FUZZ="$2" 2>&1 \
    && cmake --build "build/fuzz/$1" --target fuzz_core --parallel "$(getconf _NPROCESSORS_ONLN)" 2>&1) \
    || { echo "$output" >&2; fail "the build with $2 failed"; }
}

# Runs cases for so many seconds, also after one that ends the process.
run_core() { # <folder> <instruction set> <seconds>
  local log=build/fuzz/core.log first=0 end=$((SECONDS + $3)) core_seed status last
  core_seed=$(fresh_seed)
  for ((deaths = 0; deaths < 5 && SECONDS < end; ++deaths)); do
    status=0
    "build/fuzz/$1/fuzz_core" --isa "$2" --seed "$core_seed" --first "$first" \
      --seconds $((end - SECONDS)) 2>&1 | tee "$log" || status=$?
    if ((status <= 1)); then return $((status > 0 || deaths > 0)); fi
    last=$(sed -n 's/^FINDING in case \([0-9]*\):.*/\1/p' "$log" | tail -n 1)
    if [[ -z $last ]]; then return 1; fi
    first=$((last + 1))
  done
  return 1
}

failed=0
echo "fuzz.sh: building with sanitizers"
build address address,undefined
build thread thread
isas="baseline"
if [[ $(uname -m) == x86_64 ]]; then isas="baseline avx2 avx512"; fi
runs=$((2 * $(wc -w <<< "$isas")))
for sanitizer in address thread; do
  for isa in $isas; do
    run_core $sanitizer "$isa" $(((seconds + runs - 1) / runs)) || failed=1
  done
done
python tests/fuzz/ops.py --seconds "$seconds" --seed "$(fresh_seed)" || failed=1
((failed == 0)) || echo "fuzz.sh: there are findings; each names the command that shows it again" >&2
exit $failed
