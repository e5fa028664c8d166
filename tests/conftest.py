"""Real components at tiny sizes: a folder of drawings, the four stages trained on it for a few steps, a pipeline.

Folders are made once in a session, also where several workers share its tests: no test may change them.
"""

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may look for a model on the hub
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # results are equal bit for bit on a CPU
os.environ["ACCELERATE_USE_CPU"] = "true"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors gain nothing from threads, and workers share the cores

import pytest
import torch
from filelock import FileLock
from PIL import Image, ImageDraw

from tests.helpers.slow import mark_slow_tests

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


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


def draw_shapes(folder: Path) -> None:
    from t2i.data.manifest import write_manifest

    folder.mkdir()
    rows = []
    for i in range(36):
        color, shape = ("red", "green", "blue")[i % 3], ("circle", "square")[i // 3 % 2]
        image = Image.new("RGB", (32, 32), "white")
        draw = ImageDraw.Draw(image)
        box = (4 + i // 6, 4, 20 + i // 6, 20)
        (draw.ellipse if shape == "circle" else draw.rectangle)(box, fill=color)
        image.save(folder / f"{i:02}.png")
        split = "held_out" if i % 9 == 8 else "train"
        row = {"file_name": f"{i:02}.png", "text": f"{color} {shape}", "keywords": [color, shape, "drawing"]}
        rows.append(json.dumps(row | {"split": split}))
    (folder / "metadata.jsonl").write_text("\n".join(rows) + "\n")
    write_manifest(folder, quiet=True)


def arguments(stage: str, data: Path, runs: Path, steps: int = 3, **overrides: object) -> list[str]:
    """Of a stage's tiny configuration, on `data`, into `runs/stage`."""
    frozen = {"prior": ["clip"], "decoder": ["clip", "autoencoder"]}.get(stage, [])
    settings = {"data.path": data, "train.output": runs / stage, "train.steps": steps, "train.decay_steps": 0}
    settings |= {"train.trackers": [], "train.sample_every": 0, "train.validate_every": 0}
    settings |= {"train.warmup_steps": 0, "train.batch_size": 8, "train.save_every": 1000}
    settings |= {part: runs / part for part in frozen} | overrides
    return [str(CONFIGS / "tiny" / f"{stage}.yaml"), *(f"{key}={value}" for key, value in settings.items())]


def train(stage: str, data: Path, runs: Path, steps: int = 3, **overrides: object) -> None:
    from importlib import import_module

    from t2i.config import load_config

    script = import_module(f"t2i.training.train_{stage}")
    script.main(load_config(script.Config, stage, arguments(stage, data, runs, steps, **overrides)))


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


def relabel(folder: Path, change: Callable[[dict, int], object]) -> Path:
    """`change(row, number)` of every row of a folder's metadata."""
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        change(row, number)
    (folder / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def colored(shapes: Path, target: Path) -> Path:
    """A copy of the drawings whose metadata names their colours."""
    shutil.copytree(shapes, target, ignore=shutil.ignore_patterns("t2i"))
    return relabel(target, lambda row, number: row.update(color=row["text"].split()[0]))


@pytest.fixture(scope="session")
def labelled(shapes: Path, make_once) -> Path:
    """The drawings, labelled with their colours."""
    from t2i.data.manifest import write_manifest
    from t2i.data.sources.samples import Columns

    def label(folder: Path) -> None:
        write_manifest(colored(shapes, folder), columns=Columns(label="color"), quiet=True)

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


def seeds(*numbers: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.fixture(autouse=True)
def any_machine_takes_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that lack it compute it slowly, and rightly: what becomes of dtypes is tested everywhere."""
    monkeypatch.setattr("t2i.runtime.devices.can_compute_bf16", lambda device: True)
