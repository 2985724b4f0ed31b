"""Calls the op, the raw ops and the layer with random and hostile arguments, in workers.

    python tests/fuzz/ops.py --seconds 60
    python tests/fuzz/ops.py --seed 1 --mode raw --case 17     # one call again

Each call is judged: it gives what NumPy gives, or it raises ValueError, TypeError,
InvalidArgumentError or ResourceExhaustedError, with a message that names an argument. All else is
a finding, as is a worker that ends or hangs. The exit status is 1 where there was a finding.
"""

import argparse
import collections
import concurrent.futures
import contextlib
import itertools
import json
import os
import re
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import op_draws

FOLDER = Path(__file__).resolve().parent
STARTS_WITHIN = 300  # seconds
CALLS_PER_WORKER = 5000  # a graph made is memory kept
LARGEST_WORKER = 3 << 30  # bytes
SHIM = "failing_malloc.so"
# The instruction sets of workers, one after the other; a processor without one takes a lesser.
ISAS = ("avx512", "avx2", "baseline")


class Worker:
    """A process that makes calls one after the other."""

    def __init__(self, options, folder, isa):
        self.limit, self.isa = options.limit, isa
        self.errors = folder / f"{secrets.token_hex(8)}.txt"
        environment = (
            {"DEFORM_CONV_CPU_ISA": isa}
            | os.environ
            | {
                "TF_CPP_MIN_LOG_LEVEL": "3",
                "CUDA_VISIBLE_DEVICES": "",
                "OPENBLAS_NUM_THREADS": "1",
                # Memory that nobody has written is no zeros.
                "GLIBC_TUNABLES": "glibc.malloc.perturb=165",
            }
        )
        if (folder / SHIM).exists():
            environment["LD_PRELOAD"] = str(folder / SHIM)
        program = [FOLDER / "op_worker.py", str(options.seed), options.mode]
        with self.errors.open("wb") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-W", "ignore", *program],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
            )
        self.buffer = b""
        self.resident = 0
        self.numbers = []  # of its calls
        if self.read(STARTS_WITHIN) is None:
            raise RuntimeError(f"a worker did not start:\n{self.last_words()}")

    def read(self, seconds):
        """The next report; None where the process ended, TimeoutError where none came."""
        end = time.monotonic() + seconds
        while b"\n" not in self.buffer:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self.process.stdout], [], [], left)[0]:
                raise TimeoutError
            part = os.read(self.process.stdout.fileno(), 1 << 16)
            if not part:
                return None
            self.buffer += part
        line, self.buffer = self.buffer.split(b"\n", 1)
        return json.loads(line)

    def call(self, number):
        """Has a case called; returns what was reported of it."""
        self.numbers.append(number)
        begun = {"mode": "?", "text": ""}
        try:
            self.process.stdin.write(f"{number}\n".encode())
            self.process.stdin.flush()
            begun = self.read(self.limit) or begun
            ended = begun and self.read(self.limit)
        except BrokenPipeError:
            ended = None
        except TimeoutError:
            # The handler of a fatal signal prints where each thread was.
            self.process.send_signal(signal.SIGABRT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            ended = {"outcome": f"hung for {self.limit} s", "detail": self.last_words()}
            self.kill()
        if ended is None:
            status = self.process.wait()
            how = signal.Signals(-status).name if status < 0 else f"status {status}"
            ended = {"outcome": f"the process ended: {how}", "detail": self.last_words()}
        ended.setdefault("finding", True)
        self.resident = ended.get("resident", 0)
        return begun | ended

    @property
    def spent(self):
        ended = self.process.poll() is not None
        return ended or len(self.numbers) >= CALLS_PER_WORKER or self.resident > LARGEST_WORKER

    def last_words(self):
        lines = self.errors.read_text(errors="replace").splitlines()
        notices = r"WARNING:|[IWE]\d{4} |Extension modules"
        return "\n".join([line for line in lines if not re.match(notices, line)][-40:])

    def kill(self):
        self.process.kill()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


class Campaign:
    """Cases shared out among workers, and what came of them."""

    def __init__(self, options, folder, numbers):
        self.options, self.folder = options, folder
        self.numbers, self.isas = iter(numbers), itertools.cycle(ISAS)
        self.lock = threading.Lock()
        self.counts = collections.Counter()
        self.findings = collections.Counter()
        self.began = time.monotonic()
        self.stopped = False

    def say(self, text):
        with self.lock:
            print(text, flush=True)

    def next_number(self):
        seconds = self.options.seconds
        if self.stopped or (seconds is not None and time.monotonic() - self.began > seconds):
            return None
        with self.lock:
            return next(self.numbers, None)

    def run(self):
        with concurrent.futures.ThreadPoolExecutor(self.options.jobs) as threads:
            done = [threads.submit(self.work) for _ in range(self.options.jobs)]
            try:
                for each in concurrent.futures.as_completed(done):
                    each.result()
            finally:
                self.stopped = True

    def work(self):
        """Makes calls, by one worker after another."""
        worker = None
        try:
            while (number := self.next_number()) is not None:
                if worker and worker.spent:
                    worker.kill()
                    worker = None
                worker = worker or Worker(self.options, self.folder, next(self.isas))
                self.note(worker, number, worker.call(number))
        finally:
            if worker:
                worker.kill()

    def note(self, worker, number, report):
        outcome, mode = report["outcome"], report["mode"]
        with self.lock:
            self.counts[mode, "finding" if report["finding"] else outcome] += 1
        if self.options.case and not report["finding"]:
            self.say(f"{report['text']}\noutcome: {outcome}\n{report['detail']}\n")
        if not report["finding"]:
            return
        again = f"DEFORM_CONV_CPU_ISA={worker.isa} python tests/fuzz/ops.py"
        again += f" --seed {self.options.seed} --mode {mode} --case {number}"
        summary = kind_of(f"{outcome}: {report['detail']}")
        with self.lock:
            self.findings[summary] += 1
            count = self.findings[summary]
        if count > 2 and not self.options.case:
            return
        text = f"FINDING: {outcome}\n{report['text']}\n{report['detail']}\nagain: {again}\n"
        if "process ended" in outcome and len(worker.numbers) > 1:
            before = ",".join(map(str, worker.numbers[-10:]))
            text += f"or, where earlier calls had a part in it: --case {before}\n"
        self.say(text)

    def print_counts(self):
        outcomes = sorted({outcome for _, outcome in self.counts})
        modes = [mode for mode in op_draws.WEIGHTS if any(m == mode for m, _ in self.counts)]
        print(f"{'calls':<12}" + "".join(f"{outcome:>10}" for outcome in outcomes))
        for mode in modes:
            row = "".join(f"{self.counts[mode, outcome]:>10}" for outcome in outcomes)
            print(f"{mode:<12}{row}")
        total, seconds = sum(self.counts.values()), time.monotonic() - self.began
        print(f"{total} calls in {seconds:.0f} s; findings by kind:")
        for summary, count in self.findings.most_common():
            print(f"{count:>6}  {summary}")


def kind_of(finding: str) -> str:
    """Findings that differ in numbers and received values only are of one kind."""
    outcome, _, detail = finding.partition(": ")
    if "names no" in outcome:
        return f"{outcome}: {detail.partition(':')[0]}"
    text = re.sub(r"\(.*|<.*|\[.*|[\"'`].*|0x\w+|\n.*", "", finding)
    return re.sub(r"-?[\d.]+(e[+-]?\d+)?", "#", text)[:110].strip()


def compile_shim(folder) -> None:
    """Compiles the library that makes allocations fail, where there is a compiler."""
    if compiler := shutil.which(os.environ.get("CC", "cc")):
        options = ["-shared", "-fPIC", "-O2", "-o", folder / SHIM]
        subprocess.run([compiler, *options, FOLDER / "failing_malloc.c"], check=False)


def numbers_of(text: str) -> list[int]:
    numbers = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def parse():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, help="how long to go on; 60 without --calls")
    parser.add_argument("--calls", type=int, help="how many calls to make")
    parser.add_argument("--seed", type=int, help="a new one by default")
    parser.add_argument("--jobs", type=int, default=2, help="worker processes")
    parser.add_argument("--mode", default="all", choices=["all", *op_draws.WEIGHTS])
    parser.add_argument("--limit", type=float, default=120, help="seconds a call may take")
    parser.add_argument("--case", type=numbers_of, help="make these calls only: 7, 7,9 or 7-9")
    options = parser.parse_args()
    if options.seed is None:
        options.seed = secrets.randbelow(2**32)
    if options.case:
        options.jobs = 1
    elif options.calls is None and options.seconds is None:
        options.seconds = 60
    return options


def main():
    options = parse()
    print(f"seed {options.seed}", flush=True)
    numbers = options.case or (itertools.count() if options.calls is None else range(options.calls))
    with tempfile.TemporaryDirectory() as name:
        compile_shim(folder := Path(name))
        campaign = Campaign(options, folder, numbers)
        with contextlib.suppress(KeyboardInterrupt):
            campaign.run()
    campaign.print_counts()
    return 1 if campaign.findings else 0


if __name__ == "__main__":
    sys.exit(main())
