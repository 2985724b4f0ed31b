# Each target sets up what it needs by itself: .venv, the requirements, the library.

.PHONY: all demo test benchmark wheel clean

all:
	@scripts/setup.sh

demo:
	@scripts/demo.sh $(DEMO_ARGUMENTS)

test:
	@scripts/test.sh $(TEST_ARGUMENTS)

benchmark:
	@scripts/setup.sh
	@.venv/bin/python benchmarks/benchmark_cpu.py $(BENCHMARK_ARGUMENTS)

wheel:
	@scripts/build_wheel.sh $(WHEEL_ARGUMENTS)

clean:
	rm -rf build dist
