"""`t2i train all`: from a folder of configurations to a pipeline, stopped and resumed, a process for each stage."""

import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from t2i.training.all_stages import Run, Trainer, read_stage, sort_stages
from t2i.training.recipe.recipe import compose_recipe, read_data_facts
from t2i.training.recipe.sizes import Device

from t2i.errors import RunError
from tests.commands.test_cli import run
from tests.helpers.processes.forked import ForkedProgram, popen_forked, run_program

ROOT = Path(__file__).resolve().parents[2]
FORKING = """
from types import SimpleNamespace
from t2i.training import all_stages
from tests.helpers.processes.forked import popen_forked
all_stages.subprocess = SimpleNamespace(Popen=popen_forked)
from t2i.cli import main
main()
"""
COMMAND = ["-c", FORKING, "train", "all", "run"]
STAGES = ("clip", "autoencoder", "cache", "prior", "decoder")
STEPS = {"clip": 25, "autoencoder": 25, "prior": 3, "decoder": 3}  # many, for a stop in the middle


def change(file: Path, **values: Any) -> None:
    """Set values of a configuration, by their dotted names with __ for the dots."""
    config = yaml.safe_load(file.read_text())
    for name, value in values.items():
        *parents, last = name.split("__")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
    file.write_text(yaml.safe_dump(config))


def write_tiny(folder: Path, data: Path) -> None:
    """What `t2i init` writes into `folder`/run, with the models of configs/tiny and a few steps."""
    here = Path.cwd()
    os.chdir(folder)
    try:
        compose_recipe(Path("run"), read_data_facts(str(data)), Device("cpu", 2, 24), image_size=32).write_folder(
            Path("run")
        )
    finally:
        os.chdir(here)
    for stage, steps in STEPS.items():
        tiny = yaml.safe_load((ROOT / f"configs/tiny/{stage}.yaml").read_text())
        short = {"steps": steps, "batch_size": 8, "save_every": 1 if steps > 9 else 100, "mixed_precision": "no"}
        short |= {"sample_every": 3 if stage == "decoder" else 0, "validate_every": 0, "trackers": []}
        change(folder / f"run/{stage}.yaml", **{f"train__{name}": value for name, value in short.items()})
        change(folder / f"run/{stage}.yaml", model=tiny["model"])
        if stage == "clip":
            change(folder / "run/clip.yaml", preprocess=tiny["preprocess"])
        if stage == "decoder":
            small = {"num_inference_steps": 2, "prior_num_inference_steps": 2, "count": 2, "prior": "run/prior"}
            change(folder / "run/decoder.yaml", sample=small)


def stopped(folder: Path, number: int, when: Callable[[], bool]) -> tuple[int, str, str]:
    """Start in a session of its own, as in a terminal; give it a signal as soon as something is so."""
    process = ForkedProgram(COMMAND, folder=folder, own_group=True)
    end = time.monotonic() + 600
    while not when():
        assert process.poll() is None and time.monotonic() < end, process.communicate()
        time.sleep(0.02)
    if number == signal.SIGINT:
        os.killpg(process.pid, number)  # Ctrl-C reaches every process in the foreground
    else:
        process.send_signal(number)
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def story(shapes: Path, make_once) -> tuple[Path, list[tuple[int, str, str]]]:
    """A run that was stopped in CLIP by SIGTERM, in the autoencoder by Ctrl-C, and ended; what each said."""

    def train_and_stop(folder: Path) -> None:
        folder.mkdir()
        write_tiny(folder, shapes)
        told = []
        for stage, number in (("clip", signal.SIGTERM), ("autoencoder", signal.SIGINT)):
            checkpoints = folder / "run" / stage / "checkpoints"
            told.append(stopped(folder, number, lambda found=checkpoints: any(found.glob("step-????????"))))
        done = run_program(COMMAND, folder=folder)
        told.append((done.returncode, done.stdout, done.stderr))
        (folder / "told.json").write_text(json.dumps(told))

    folder = make_once("story", train_and_stop)
    return folder, json.loads((folder / "told.json").read_text())


@pytest.fixture
def forked_stages(monkeypatch) -> None:
    """Stages that this process starts are forks."""
    monkeypatch.setattr("t2i.training.all_stages.subprocess", SimpleNamespace(Popen=popen_forked))


@pytest.fixture
def trained(story, tmp_path, monkeypatch) -> Path:
    """A copy of the folder, which tests may change, as the working directory."""
    shutil.copytree(story[0], tmp_path / "own")
    monkeypatch.chdir(tmp_path / "own")
    return tmp_path / "own" / "run"


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_a_stop_in_the_middle_of_a_stage_saves_it_and_tells_by_the_status(story):
    (status, out, err), (status_2, out_2, err_2), _ = story[1]
    assert status == 75 and out.startswith("1/6 clip: 25 steps into run/clip\n") and "2/6" not in out
    assert "stopped at step" in err and "Traceback" not in err
    assert status_2 == 130 and "resuming from run/clip/checkpoints/step-" in out_2
    assert "2/6 autoencoder: 25 steps into run/autoencoder\n" in out_2 and "3/6" not in out_2
    assert "stopped at step" in err_2 and "Traceback" not in err_2


def test_the_same_command_goes_on_and_ends_with_a_pipeline_that_draws(story, monkeypatch, capsys, trained):
    status, out, err = story[1][-1]
    assert status == 0, err
    lines = [line for line in out.splitlines() if line[1:3] == "/6"]
    assert [line.split(":")[0] for line in lines] == [f"{i}/6 {s}" for i, s in enumerate((*STAGES, "pipeline"), 1)]
    assert lines[0] == "1/6 clip: done, run/clip" and "resuming from run/autoencoder/checkpoints/step-" in out
    assert out.splitlines()[-1] == "draw: t2i generate 'red circle' --model run/pipeline"
    command = ["generate", "red circle", "--model", "run/pipeline", "--steps", 2, "--prior-steps", 2, "--seed", 0]
    status, out, err = run(monkeypatch, capsys, *command)
    assert status == 0 and Path(out.strip()).is_file(), err


def test_the_decoders_grid_has_the_row_of_the_prior(story):
    from PIL import Image

    with Image.open(story[0] / "run/decoder/samples/pictures-00000003.png") as grid:
        rows = grid.height / grid.width
    assert rows > 3 / 4  # three rows of two images, beside their labels


def test_a_second_run_does_nothing(monkeypatch, capsys, trained):
    before = contents(trained)
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("a stage was started"))
    status, out, err = run(monkeypatch, capsys, "train", "all", "run")
    assert status == 0 and out.count(": done, run/") == 6, err
    assert contents(trained) == before


def test_a_stage_that_changed_is_trained_on_and_the_pipeline_replaced(capfd, trained, forked_stages):
    (trained / "pipeline" / "mark").touch()
    change(trained / "decoder.yaml", train__steps=5)
    assert Trainer(Run.read_folder(Path("run"))).train() == 0
    out, _ = capfd.readouterr()
    assert "4/6 prior: done" in out and "resuming from run/decoder/checkpoints/step-00000003" in out
    assert "6/6 pipeline: assembles the stages" in out and not (trained / "pipeline" / "mark").exists()
    assert json.loads((trained / "decoder/metrics.jsonl").read_text().splitlines()[-1])["step"] == 5


def test_a_failing_stage_ends_it_with_its_status_and_message(capfd, trained):
    change(trained / "clip.yaml", train__batch_size=4)
    assert Trainer(Run.read_folder(Path("run"))).train() == 2
    out, err = capfd.readouterr()
    assert "now 4 x 1 x 1 = 4; keep the product" in err and "2/6" not in out


def test_a_stage_that_is_killed_is_named(trained, monkeypatch):
    change(trained / "clip.yaml", train__steps=STEPS["clip"] + 1)
    trainer = Trainer(Run.read_folder(Path("run")))
    monkeypatch.setattr(sys, "executable", "/bin/sh")
    (trained / "kill.sh").write_text("kill -9 $$\n")
    step = trainer.run.stages[0]
    object.__setattr__(step, "script", trained / "kill.sh")
    with pytest.raises(RunError, match="clip was ended by SIGKILL, by hand or for lack of memory"):
        trainer.train()


def test_a_dry_run_shows_what_can_be_shown_and_writes_nothing(
    capfd, shapes, trained, tmp_path, monkeypatch, forked_stages
):
    for part in ("done.json", "pipeline", "prior", "decoder"):
        (shutil.rmtree if (trained / part).is_dir() else os.remove)(trained / part)
    before = contents(trained)
    assert Trainer(Run.read_folder(Path("run"))).estimate_costs() == 0
    out, _ = capfd.readouterr()
    assert out.count("nothing was written") == 4 and contents(trained) == before
    (tmp_path / "new").mkdir()
    write_tiny(tmp_path / "new", shapes)
    monkeypatch.chdir(tmp_path / "new")
    trainer = Trainer(Run.read_folder(Path("run")))
    monkeypatch.setattr(trainer, "run_stage", lambda step, *_: print(f"asked {step.name}") or 0)
    assert trainer.estimate_costs() == 0
    out, _ = capfd.readouterr()
    assert "asked clip" in out and "asked autoencoder" in out and "asked prior" not in out
    assert "4/6 prior: 3 steps into run/prior; its cost is known once clip, cache is there" in out


@pytest.fixture
def fresh(shapes, tmp_path, monkeypatch) -> Path:
    """Configurations of a run that was never started."""
    shutil.copytree(shapes, tmp_path / "shapes")
    monkeypatch.chdir(tmp_path)
    write_tiny(tmp_path, Path("shapes"))
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "'run' has no cache.yaml, prior.yaml, decoder.yaml; `t2i init"),
        (lambda folder: (folder / "prior.yaml").unlink(), "'run' has no prior.yaml; `t2i init"),
        (lambda folder: (folder / "clip.yaml").unlink(), "run/cache.yaml needs 'run/clip', but 'run' has no clip.yaml"),
        (lambda folder: change(folder / "decoder.yaml", train__stepz=3), "stepz"),
        (lambda folder: change(folder / "prior.yaml", train__output="x"), "writes to 'x', which is not 'run/prior'"),
        (lambda folder: change(folder / "clip.yaml", data__path="gone"), "no manifest in 'gone'"),
        (lambda folder: (folder / "priors.yaml").touch(), "'run/priors.yaml' is of no stage; its name must begin with"),
        (lambda folder: change(folder / "clip.yaml", init="run/prior"), "run/clip.yaml, run/cache.yaml"),
        (lambda folder: (folder / "pipeline").mkdir(), "'run/pipeline' is no pipeline and is not replaced"),
        (lambda folder: (folder / "../shapes/00.png").unlink(), "not what was checked: 1 gone (such as '00.png')"),
    ],
)
def test_bad_input_is_one_line_before_anything_starts(monkeypatch, capsys, fresh, spoil, message):
    spoil(fresh)
    before = contents(fresh)
    status, out, err = run(monkeypatch, capsys, "train", "all", "run")
    assert status == 2 and message in err and err.startswith("error: ") and len(err.splitlines()) == 1
    assert out == "" and contents(fresh) == before


def test_it_takes_one_folder_and_no_overrides(monkeypatch, capsys, fresh):
    status, _, err = run(monkeypatch, capsys, "train", "all")
    assert status == 2 and "train all takes one folder" in err
    status, _, err = run(monkeypatch, capsys, "train", "all", "run", "train.steps=3")
    assert status == 2 and "'train.steps=3' belongs in its configuration files" in err


def test_data_that_changes_after_the_start_is_a_warning(capsys, trained):
    config = trained / "clip.yaml"
    data = Path(yaml.safe_load(config.read_text())["data"]["path"])
    shutil.copytree(data, "shapes")
    for stage in STAGES:
        change(trained / f"{stage}.yaml", data__path="shapes")
    Path("shapes/00.png").unlink()
    Run.read_folder(Path("run"))
    assert "warning: 'shapes' is not what was checked: 1 gone" in capsys.readouterr().out


def test_stages_follow_those_whose_results_they_read():
    """Also further stages of a kind, and those beside the pipeline."""
    files = sorted((ROOT / "configs/emoji").glob("*.yaml"))
    names = [stage.name for stage in sort_stages([read_stage(file, Path("runs/emoji")) for file in files])]
    assert sorted(names) == sorted(file.stem for file in files)
    order = {name: place for place, name in enumerate(names)}
    for name, inputs in {
        "cache": ("clip", "autoencoder"),
        "prior-autoregressive": ("cache", "prior-mlp"),
        "decoder": ("cache", "prior"),
        "classifier": ("cache",),
    }.items():
        assert all(order[earlier] < order[name] for earlier in inputs), (name, names)


def test_results_lie_in_the_folder_of_out(monkeypatch, capsys, trained, forked_stages):
    """A second stage of a kind begins from the first; nothing else is trained again."""
    shutil.copytree(trained, "configs", ignore=lambda _, names: [name for name in names if "." not in name])
    Path("configs/done.json").unlink()
    more = yaml.safe_load(Path("configs/decoder.yaml").read_text())
    more["init"], more["train"]["output"], more["train"]["steps"] = "run/decoder", "run/decoder-more", 1
    Path("configs/decoder-more.yaml").write_text(yaml.safe_dump(more))
    status, out, err = run(monkeypatch, capsys, "train", "all", "configs", "--dry-run")
    assert status == 2 and "configs/autoencoder.yaml writes to 'run/autoencoder', which is not 'configs/auto" in err
    status, out, err = run(monkeypatch, capsys, "train", "all", "configs", "--out", "run")
    assert status == 0, err
    lines = [line for line in out.splitlines() if line[1:3] == "/7"]
    assert [line for line in lines if ": done" not in line] == [
        "6/7 decoder-more: 1 steps into run/decoder-more",
        "7/7 pipeline: assembles the stages in run/pipeline",
    ]
    status, _, err = run(monkeypatch, capsys, "train", "prior", "--out", "run")
    assert status == 2 and "--out" in err
