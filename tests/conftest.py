"""Real components at tiny sizes: a folder of drawings, the four stages trained on it for a few steps, a pipeline.

Folders are made once in a session, also where several workers share its tests: no test may change them.
"""

import copy
import os
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may look for a model on the hub
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # results are equal bit for bit on a CPU
os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors gain nothing from threads, and workers share the cores

# Each worker and all that it starts keeps to cores of its own: a training takes every core that it may use, and
# threads of two workers on one core wait for each other, up to 40 times as long as one alone.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    number, count = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, cores[number % len(cores) :: count])

import pytest
import torch
from filelock import FileLock

from tests.helpers.drawings import colored, draw_shapes
from tests.helpers.slow import mark_slow_tests
from tests.helpers.stages import train

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark_slow_tests(items)


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """Make a folder of the session: `make_once(name, make)` calls `make(folder)` in the first worker that needs it."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent

    def make_folder(name: str, make: Callable[[Path], object]) -> Path:
        folder, finished = base / name, base / f"{name}.finished"
        with FileLock(base / f"{name}.lock"):
            if not finished.exists():
                make(folder)
                finished.touch()
        return folder

    return make_folder


@pytest.fixture(scope="session")
def shapes(make_once) -> Path:
    """36 captioned drawings, 4 of them held out."""
    return make_once("shapes", draw_shapes)


@pytest.fixture(scope="session")
def runs(shapes: Path, make_once) -> Path:
    """All four stages, trained for three steps."""

    def train_stages(folder: Path) -> None:
        for stage in ("clip", "autoencoder", "prior", "decoder"):
            train(stage, shapes, folder)

    return make_once("runs", train_stages)


@pytest.fixture(scope="session")
def pipeline_folder(runs: Path, make_once) -> Path:
    from t2i.pipelines.jobs.assemble import assemble_pipeline_folder

    return make_once("tiny", lambda folder: assemble_pipeline_folder(runs, folder))


@pytest.fixture(scope="session")
def labelled(shapes: Path, make_once) -> Path:
    """The drawings, labelled with their colours."""
    from t2i.data.manifest import write_manifest
    from t2i.data.sources.samples import Columns

    def label(folder: Path) -> None:
        write_manifest(colored(shapes, folder), columns=Columns(labels=("color",)), quiet=True)

    return make_once("labelled", label)


@pytest.fixture(scope="session")
def classifier_folder(labelled: Path, runs: Path, make_once) -> Path:
    """A classifier, trained until it sees colours."""
    settings = {"train.learning_rate": 3e-3, "train.log_every": 10, "train.ema_decay": 0.9}
    settings |= {"train.batch_size": 32, "train.validate_every": 60}
    settings |= {part: runs / part for part in ("clip", "autoencoder")}
    return make_once("classifiers", lambda folder: train("classifier", labelled, folder, 60, **settings)) / "classifier"


@pytest.fixture
def pipeline(loaded_pipeline):
    """A copy of the pipeline, which a test may change."""
    return copy.deepcopy(loaded_pipeline)


@pytest.fixture(scope="session")
def loaded_pipeline(pipeline_folder: Path):
    from t2i import Text2ImagePipeline

    pipeline = Text2ImagePipeline.from_pretrained(pipeline_folder)
    for part in (pipeline.prior, pipeline.decoder):  # three steps leave layers that started at zero almost there
        generator = torch.Generator().manual_seed(0)
        for parameter in part.parameters():
            parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@pytest.fixture(autouse=True)
def any_machine_takes_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let dtypes be tested everywhere: a machine without bf16 computes it slowly and gets the same."""
    monkeypatch.setattr("t2i.runtime.devices.can_compute_bf16", lambda device: True)
