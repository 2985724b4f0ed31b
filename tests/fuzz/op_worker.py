"""A process that makes the calls of cases that it is told, and reports each before and after."""

import faulthandler
import json
import os
import resource
import sys
import traceback
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import op_draws

# What is printed by anybody goes to stderr. Reports have stdout for themselves.
reports = os.fdopen(os.dup(1), "w", buffering=1)
os.dup2(2, 1)


def report(**what):
    print(json.dumps(what), file=reports)


# A worker that takes more is itself short of memory, and not the machine.
LARGEST = 8 << 30


def main():
    faulthandler.enable()
    resource.setrlimit(resource.RLIMIT_DATA, (LARGEST, LARGEST))
    seed, mode = int(sys.argv[1]), sys.argv[2]
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(4)
    tf.config.threading.set_inter_op_parallelism_threads(4)
    import op_calls
    import op_layer
    import op_trials

    run = op_calls.RUN | op_layer.RUN | op_trials.RUN
    report(ready=True)
    for line in sys.stdin:
        case = op_draws.case(seed, int(line), mode)
        report(begun=case.number, mode=case.mode, text=str(case))
        try:
            verdict = run[case.mode](case)
            outcome, detail, finding = verdict.outcome, verdict.detail, verdict.is_finding
        except Exception:
            outcome, detail, finding = "the fuzzer failed", traceback.format_exc(), True
        report(
            ended=case.number,
            outcome=outcome,
            detail=detail,
            finding=finding,
            resident=op_trials.resident_bytes(),
        )


main()
