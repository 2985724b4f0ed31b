# Each target sets up what it needs by itself: .venv, the requirements, the library.

.PHONY: all demo test fuzz benchmark study wheel clean

all:
	@scripts/setup.sh

demo:
	@scripts/demo.sh $(DEMO_ARGUMENTS)

test:
	@scripts/test.sh $(TEST_ARGUMENTS)

# SECONDS of random problems for the core and as many for the op. SEED repeats a run.
SECONDS = 120
fuzz:
	@scripts/fuzz.sh --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

benchmark:
	@scripts/setup.sh
	@.venv/bin/python benchmarks/benchmark_cpu.py $(BENCHMARK_ARGUMENTS)

study:
	@scripts/setup.sh
	@.venv/bin/python -m experiments.study $(STUDY_ARGUMENTS)
	@.venv/bin/python -m experiments.report

wheel:
	@scripts/build_wheel.sh $(WHEEL_ARGUMENTS)

clean:
	rm -rf build dist
