# `make` alone prints these targets. They use the active virtual or conda environment, or create .venv.
ENV := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),.venv)
PYTHON := $(ENV)/bin/python
STAMP := $(ENV)/.hotdog_hf-installed
LAUNCH = $(PYTHON) -m accelerate.commands.launch --config_file accelerate_config.yaml
DEMO := runs/demo
DEMO_FLAGS := --data-dir data/sample --model tf_efficientnet_lite0 --weights bundled \
	--batch-size 16 --epochs 6 --learning-rate 1e-4 --momentum 0.9 --schedule cosine

MODEL := $(DEMO)/model

.DEFAULT_GOAL := help
.PHONY: help install demo train reproduce bench audit report gradio app web pictures test test-gpu test-app style quality clean

help:  ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(STAMP)  ## install everything into the active environment, or into .venv

$(STAMP): requirements.txt pyproject.toml
	@test -x $(PYTHON) || python3 -m venv .venv
	$(PYTHON) -m pip install --quiet -r requirements.txt -e ".[test]"
	@touch $@

demo: install  ## fine-tune a real pretrained network on the drawn sample, offline, in a few minutes
	@rm -rf $(DEMO)
	HF_HUB_OFFLINE=1 $(LAUNCH) scripts/train.py --output-dir $(DEMO) $(DEMO_FLAGS)

train: install  ## the chapter: download the hot-dog photos, fine-tune ResNet-18 for 5 epochs
	$(LAUNCH) scripts/train.py $(if $(DATA),--data-dir $(DATA))

reproduce: install  ## the chapter's claim and exercises as one study; can be stopped and resumed
	$(LAUNCH) scripts/reproduce.py $(if $(DATA),--data-dir $(DATA))

bench: install  ## measure speed, memory and time to accuracy: make bench DATA=my/photos
	$(PYTHON) scripts/benchmark.py $(if $(DATA),--data-dir $(DATA))

audit: install  ## look through photos before training: make audit DATA=my/photos (default: the drawn sample)
	$(PYTHON) scripts/audit.py $(or $(DATA),data/sample --model tf_efficientnet_lite0 --weights bundled)

report: install $(filter $(DEMO)/model,$(MODEL))  ## evaluate a model on its run's photos: make report MODEL=runs/mine/model (default: the demo's)
	$(PYTHON) scripts/report.py $(MODEL) $(if $(DATA),--data-dir $(DATA))

# The demo's model, if it is asked for and is not there yet.
$(DEMO)/model:
	$(MAKE) demo

gradio: install
	@$(PYTHON) -c "import gradio" 2>/dev/null || $(PYTHON) -m pip install --quiet -e ".[app]"

app: gradio $(filter $(DEMO)/model,$(MODEL))  ## try a model in a web app: make app MODEL=runs/mine/model (default: the demo's)
	$(PYTHON) scripts/app.py $(MODEL)

web: install $(filter $(DEMO)/model,$(MODEL))  ## try a model in the browser, without a server that computes: make web MODEL=runs/mine/model (needs npm once)
	$(PYTHON) scripts/export.py $(MODEL) web --web --precision fp16
	$(PYTHON) -m http.server 8000 --bind 127.0.0.1 --directory web

pictures: demo report gradio  ## make the README's pictures from the demo (needs chromium and npm)
	$(PYTHON) scripts/export.py $(MODEL) web --web --precision fp16
	$(PYTHON) .github/pictures.py $(DEMO) data/sample report web .github/images

test: install  ## run the tests, offline
	$(PYTHON) -m pytest

test-gpu: install  ## run the tests that need an NVIDIA GPU, one after the other
	$(PYTHON) -m pytest -n 0 -m gpu -rs

# gradio wants an older Pillow than the other tests have.
test-app: install  ## run the tests that need gradio, in .venv-app, which adds it to the environment
	$(PYTHON) -m venv .venv-app
	$(PYTHON) -c "import sysconfig; print('import site; site.addsitedir(%r)' % sysconfig.get_path('purelib'))" \
		> $$(.venv-app/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")/below.pth
	.venv-app/bin/python -m pip install --quiet -e ".[app]"
	.venv-app/bin/python -m pytest -n 0 -m app tests/test_app.py tests/test_space.py

style: install  ## format the code and fix what ruff can
	$(PYTHON) -m ruff check --fix .
	$(PYTHON) -m ruff format .

quality: install  ## check format and lint, change nothing
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

clean:  ## remove the demo, the drawn sample and caches (not your runs or data/hotdog)
	rm -rf $(DEMO) data/sample .pytest_cache .ruff_cache
	find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
