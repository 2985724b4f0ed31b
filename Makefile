# Each target sets up what it needs by itself: .venv, the requirements, the library.

.PHONY: all demo test benchmark clean

all:
	scripts/setup.sh

demo:
	scripts/demo.sh $(DEMO_ARGUMENTS)

test:
	scripts/test.sh $(TEST_ARGUMENTS)

benchmark:
	scripts/setup.sh
	.venv/bin/python benchmarks/benchmark_cpu.py $(BENCHMARK_ARGUMENTS)

clean:
	rm -rf build
