# make demo   set up .venv if needed, check it, and run the main job on seeded synthetic data (results in runs/demo)
# make test   set up .venv if needed, and run the fast tests (ARGS="tests/test_cli.py -k json" for some of them)
# make test-all  every test: more seeds, all combinations, slow runs end to end (make test-slow: only those)
# make fuzz   hours of random programs on every backend against a float64 oracle (PROGRAMS=10000 JOBS=2 SEED=0)
# make test-triton  the GPU kernels without a GPU: in triton's interpreter, and compiled for sm_90 (installs triton)
# make test-integrations  Lightning, Accelerate, Transformers, RecBole, PyG beside plain torch (installs them)
# make test-gpu  the tests that need a CUDA device, with torch, numpy and pytest of the machine (PYTHON=python3)
# make bench-gpu  benchmark of the GPU kernels: bandwidth beside a copy's, and FBGEMM's kernels where there are any
# make test-arm64  the native kernels for arm64: cross-compiled (installs one), and run where qemu-aarch64 is
# make lint   style, types and the layering of the package
# make sanitize  the native kernels under the address, undefined-behaviour and thread sanitizers of g++
# make bench  benchmarks; JSON results and a picture in runs/bench (make bench-peers: training beside FuxiCTR's too)
# make bench-search DATA=FOLDER  OptEmbed and DNIS on real rows beside hashing, narrow tables and magnitude pruning
# make bench-gate  fail where runs/bench (of make bench) shows this library slower than benchmarks/results, by ratios
# make clean  remove what runs and builds left behind (make distclean: .venv too)
VENV := $(or $(RECSYS_EMBED_VENV),.venv)
BIN := $(VENV)/bin
DEMO := runs/demo
DEMO_METHODS := full,lowdim,hash,multihash,compositional,unified
DEMO_RATIO := 10
JOBS := 2
export RECSYS_EMBED_VENV := $(VENV)

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all test-slow fuzz test-triton test-integrations test-gpu test-arm64 sanitize lint bench bench-gpu bench-peers bench-search bench-gate clean distclean

help:
	@sed -n 's/^# \{0,1\}//p' Makefile | head -15

setup:
	@sh scripts/setup.sh

# Rows that an earlier run finished are kept (make clean removes them).
demo: setup
	$(BIN)/recsys-embed doctor
	$(BIN)/recsys-embed compare --demo --methods $(DEMO_METHODS) --ratio $(DEMO_RATIO) --out $(DEMO)

# One process per core, one thread each: torch's own threads would only get in each other's way.
test: TIER := fast
test-all: TIER := all
test-slow: TIER := slow
test test-all test-slow: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --tier $(TIER) $(ARGS)

# Seed by seed: the same programs whatever the number of processes. Failing ones are printed as the Python that runs them.
PROGRAMS := 10000
SEED := 0
fuzz: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --programs $(PROGRAMS) --jobs $(JOBS) --seed $(SEED) $(ARGS)

# Beside .venv's packages, since triton takes 700 MB and nothing else without a GPU wants it. A CUDA build of torch has
# its own. In a process of its own: the interpreter has to be on before kernels are defined.
TRITON := $(VENV)/triton
test-triton: setup
	@$(BIN)/python -c 'import triton' 2>/dev/null || [ -e $(TRITON)/.done ] || { \
	  echo "installing triton into $(TRITON)"; rm -rf $(TRITON); \
	  $(BIN)/python -m pip --disable-pip-version-check install -q --no-deps --target $(TRITON) "$$($(BIN)/python -c \
	    'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["triton"])')" \
	  && touch $(TRITON)/.done; }
	PYTHONPATH=$(TRITON) TRITON_INTERPRET=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -q -p no:cacheprovider tests/triton -m kernels $(ARGS)
	PYTHONPATH=$(TRITON) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) -q -p no:cacheprovider tests/triton -m compiled $(ARGS)

# An environment of their own over .venv's packages, so that pip cannot exchange torch and .venv stays as it is. Warnings
# are theirs, and no errors. With DistributedDataParallel and FSDP, which make test has too.
THEIRS := $(VENV)-integrations
WANTED := tests/integrations/requirements
test-integrations: setup
	@[ -e $(THEIRS)/.done ] && [ $(THEIRS)/.done -nt $(WANTED).txt ] && [ $(THEIRS)/.done -nt $(WANTED)-alone.txt ] || { \
	  echo "installing other people's training stacks into $(THEIRS)"; rm -rf $(THEIRS); \
	  $(BIN)/python -m venv $(THEIRS) \
	  && $(BIN)/python -c 'import sysconfig; print("import site; site.addsitedir(" + repr(sysconfig.get_path("purelib")) + ")")' \
	    >"$$($(THEIRS)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/of_venv.pth" \
	  && $(THEIRS)/bin/python -c 'import torch; print("torch==" + torch.__version__)' >$(THEIRS)/torch.txt \
	  && $(THEIRS)/bin/python -m pip --disable-pip-version-check install -q -c $(THEIRS)/torch.txt -r $(WANTED).txt \
	  && { $(THEIRS)/bin/python -m pip --disable-pip-version-check install -q --no-deps -r $(WANTED)-alone.txt \
	    || echo "RecBole did not install; its tests are skipped"; } \
	  && touch $(THEIRS)/.done; }
	PYTHONPATH=. RECSYS_EMBED_INTEGRATIONS=1 OMP_NUM_THREADS=1 $(THEIRS)/bin/python -m pytest -q -W default -p no:cacheprovider \
	  --durations 10 tests/integrations tests/distributed/test_replicas.py $(ARGS)

# Warnings are no errors here: the machine's own versions of libraries may have some.
test-gpu:
	PYTHONPATH=. $(or $(PYTHON),python3) -m pytest -q -W default -m 'gpu or kernels' --tier all -p no:cacheprovider tests/gpu tests/triton $(ARGS)

bench-gpu:
	@mkdir -p runs/bench
	PYTHONPATH=. $(or $(PYTHON),python3) benchmarks/bench_gpu.py --out runs/bench/gpu.json $(ARGS)

# The C++ runtime is loaded with the sanitizer's, which otherwise finds no exceptions to intercept; threads are checked
# at fixed addresses, which their sanitizer needs on new kernels of Linux.
SANITIZE := -g -O1 -std=c++17 -fPIC -shared -ffp-contract=off -fno-math-errno -fno-trapping-math -Wno-psabi -fvisibility=hidden
sanitize: setup
	@mkdir -p runs/sanitize
	g++ $(SANITIZE) -fsanitize=address,undefined -fno-sanitize-recover=undefined ops/cpu/native.cpp -o runs/sanitize/memory.so
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libstdc++.so.6)" ASAN_OPTIONS=detect_leaks=0 RECSYS_EMBED_NATIVE=runs/sanitize/memory.so \
	  $(BIN)/python -m pytest -n 0 -q --tier all -p no:cacheprovider tests/kernels/test_native.py tests/kernels/test_swapped.py tests/kernels/test_masks.py tests/test_decay.py $(ARGS)
	g++ -g -O1 -std=c++17 -ffp-contract=off -Wno-psabi -fsanitize=thread ops/cpu/check_threads.cpp -o runs/sanitize/threads
	setarch -R runs/sanitize/threads

# The kernels for arm64, by a cross compiler that comes as a package (clang's warnings are errors: GCC has none of them),
# and, where QEMU's user emulation is installed, run: their results are this processor's, bit for bit.
ZIG := $(VENV)/zig
CROSS := -O2 -std=c++17 -fPIC -ffp-contract=off -fno-math-errno -fno-trapping-math -fvisibility=hidden
test-arm64: setup
	@[ -e $(ZIG)/.done ] || { \
	  echo "installing a cross compiler into $(ZIG)"; rm -rf $(ZIG); \
	  $(BIN)/python -m pip --disable-pip-version-check install -q --target $(ZIG) 'ziglang==0.17.*' && touch $(ZIG)/.done; }
	@mkdir -p runs/arm64
	PYTHONPATH=$(ZIG) $(BIN)/python -m ziglang c++ -target aarch64-linux-gnu $(CROSS) -Wall -Werror -c ops/cpu/native.cpp -o runs/arm64/native.o
	@qemu=$$(command -v qemu-aarch64-static || command -v qemu-aarch64) || { echo "compiled, not run: no qemu-aarch64"; exit 0; }; \
	  PYTHONPATH=$(ZIG) $(BIN)/python -m ziglang c++ -target aarch64-linux-musl $(CROSS) -Wall -Werror -static ops/cpu/check_threads.cpp -o runs/arm64/threads \
	  && g++ $(CROSS) -Wno-psabi ops/cpu/check_threads.cpp -o runs/arm64/here -lpthread \
	  && runs/arm64/here | grep plain > runs/arm64/here.txt && "$$qemu" runs/arm64/threads > runs/arm64/there.txt; \
	  status=$$?; cat runs/arm64/there.txt; [ $$status -eq 0 ] && grep -qxf runs/arm64/here.txt runs/arm64/there.txt

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# BENCH="kernels serving" for some of them, ARGS=--quick for a first look.
BENCH := data kernels serving served deepfm supernet_step step_modes
bench: setup
	@mkdir -p runs/bench
	@for name in $(BENCH); do \
	  echo "$$name"; PYTHONPATH=. $(BIN)/python "benchmarks/bench_$$name.py" --out "runs/bench/$$name.json" $(ARGS) >/dev/null || exit 1; \
	done
	@if [ -e runs/bench/kernels.json ]; then $(BIN)/python benchmarks/plot.py runs/bench; fi
	@$(BIN)/python benchmarks/targets.py runs/bench

# The peers come with setup (tests/requirements-peers.txt); at 30 M rows they take 16 GB of memory, and minutes.
bench-peers: setup
	@mkdir -p runs/bench
	$(BIN)/python benchmarks/bench_deepfm.py --peers --out runs/bench/deepfm.json $(ARGS) >/dev/null

# Hours: every row is a training or a search. DATA is made as examples/criteo_sample.toml says.
bench-search: setup
	$(BIN)/python -m benchmarks.bench_search --data "$(DATA)" $(ARGS)

bench-gate:
	$(BIN)/python benchmarks/gate.py runs/bench

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find recsys_embed tests -name __pycache__ -type d -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) $(VENV)-integrations
