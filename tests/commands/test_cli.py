"""The command line, as a user meets it."""

import inspect
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from t2i.pipelines.options import DecoderOptions, PriorOptions
from t2i.pipelines.text_diff import DEFAULT_CANDIDATES, DEFAULT_THETAS
from t2i.pipelines.upsample import UpsamplePipeline
from typer.main import get_command

from t2i import cli
from tests.helpers.stages import arguments

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--steps", "3", "--prior-steps", "2"]


def run(monkeypatch, capsys, *arguments: object) -> tuple[int, str, str]:
    """Exit status, standard output, standard error."""
    monkeypatch.setattr(sys, "argv", ["t2i", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    captured = capsys.readouterr()
    return caught.value.code or 0, captured.out, captured.err


def test_help_imports_no_torch():
    code = "import sys; sys.argv = ['t2i', '--help']\nfrom t2i.cli import main\ntry: main()\nexcept SystemExit: pass\n"
    code += "assert 'torch' not in sys.modules, 'torch'"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in ("generate", "train", "data", "assemble", "eval", "doctor"):
        assert command in result.stdout


def test_the_help_shows_the_defaults_that_the_pipelines_have():
    commands = get_command(cli.app).commands

    def shown(command: str, option: str) -> object:
        parameter = next(parameter for parameter in commands[command].params if parameter.name == option)
        return re.search(r"\[default: (.*)\]", parameter.help)[1]

    upsampling = inspect.signature(UpsamplePipeline.__call__).parameters
    assert shown("generate", "candidates") == str(PriorOptions.prior_candidates)
    assert shown("generate", "upsample") == str(DecoderOptions.upsample)
    assert shown("upsample", "steps") == str(upsampling["num_inference_steps"].default)
    assert shown("upsample", "level") == f"{upsampling['level'].default:g}"
    assert shown("upsample", "tile") == str(upsampling["tile"].default)
    assert shown("edit", "candidates") == str(DEFAULT_CANDIDATES)
    [theta] = [parameter for parameter in commands["edit"].params if parameter.name == "theta"]
    assert theta.show_default == "{text:g}, with --direction prior {prior:g}".format(**DEFAULT_THETAS)


def list_commands(command: Any, path: str = "t2i") -> dict[str, Any]:
    """All commands by their words, without groups."""
    if not hasattr(command, "commands"):
        return {path: command}
    return {
        name: found
        for word, part in command.commands.items()
        for name, found in list_commands(part, f"{path} {word}").items()
    }


@pytest.mark.parametrize(("path", "command"), list_commands(get_command(cli.app)).items())
def test_usage_and_help_call_an_image_by_that_word(path, command):
    usage = command.collect_usage_pieces(command.make_context(path, [], resilient_parsing=True))
    helps = [command.help or "", *(getattr(parameter, "help", None) or "" for parameter in command.params)]
    names = [parameter.opts[0] for parameter in command.params]  # old names that still work come after the first
    assert not [text for text in (*usage, *helps, *names) if re.search("picture", text, re.IGNORECASE)]


def test_generate_writes_pictures_that_know_how_they_were_made(monkeypatch, capsys, pipeline_folder, tmp_path):
    (tmp_path / "prompts.txt").write_text("blue square\n\ngreen circle\n")
    common = ["--model", pipeline_folder, "--out", tmp_path / "out", "--seed", 4, *QUICK]
    status, out, _ = run(monkeypatch, capsys, "generate", "red circle", "--file", tmp_path / "prompts.txt", *common)
    assert status == 0
    paths = [Path(line) for line in out.splitlines()]
    assert [path.name for path in paths] == ["red-circle-4.png", "blue-square-5.png", "green-circle-6.png"]
    with Image.open(paths[1]) as image:
        assert image.size == (32, 32)
        settings = json.loads(image.info["t2i"])
        assert settings["prompt"] == "blue square" and settings["seed"] == 5 and settings["num_inference_steps"] == 3
        assert settings["guidance_scale"] > 1  # defaults are recorded too
        assert image.info["parameters"].startswith("blue square\nSteps: 3, CFG scale: ")
    # The same seed alone gives the same image, under another name: nothing is overwritten.
    before = paths[1].read_bytes()
    again = ["--model", pipeline_folder, "--out", tmp_path / "out", "--seed", 5, *QUICK]
    status, out, _ = run(monkeypatch, capsys, "generate", "blue square", *again)
    assert status == 0 and Path(out.strip()).name == "blue-square-5-2.png"
    assert paths[1].read_bytes() == before
    with Image.open(paths[1]) as first, Image.open(out.strip()) as second:
        difference = max(abs(a - b) for a, b in zip(first.tobytes(), second.tobytes()))
    assert difference <= 1
    assert len(list((tmp_path / "out").iterdir())) == 4


def test_a_picture_tells_of_the_prior_where_one_ran_and_only_there(monkeypatch, capsys, pipeline_folder, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "a.png")
    common = ["--model", pipeline_folder, "--out", tmp_path / "out", "--steps", 2]
    for words, ran in (
        (["image-to-image", tmp_path / "a.png", "--prompt", "blue square"], True),
        (["image-to-image", tmp_path / "a.png"], False),
        (["variations", tmp_path / "a.png", "--prompt", "blue square"], False),
        (["interpolate", tmp_path / "a.png", "red circle", "--weights", "1,1"], True),
        (["generate", "--steer-text", "red"], False),
        (["generate", "red circle"], True),
    ):
        status, out, err = run(monkeypatch, capsys, *words, *common)
        assert status == 0, err
        with Image.open(out.strip()) as image:
            settings, parameters = json.loads(image.info["t2i"]), image.info["parameters"]
        of_prior = {name: value for name, value in settings.items() if name.startswith("prior_")}
        usual = {"prior_num_inference_steps": 25, "prior_guidance_scale": 2.0, "prior_candidates": 2}
        assert of_prior == (usual if ran else {}), words
        assert ("Prior CFG scale: 2.0" in parameters) == ran and "None" not in parameters


def test_a_named_file_is_written_once(monkeypatch, capsys, pipeline_folder, tmp_path):
    command = ["generate", "red circle", "--model", pipeline_folder, "--out", tmp_path / "x.png", *QUICK]
    assert run(monkeypatch, capsys, *command)[0] == 0
    before = (tmp_path / "x.png").read_bytes()
    status, _, err = run(monkeypatch, capsys, *command)
    assert status == 2 and "exists and is not overwritten" in err
    assert (tmp_path / "x.png").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate"], "no prompts"),
        (["generate", ""], "prompt must not be empty"),
        (["generate", "cat", "--seed", "-1"], "seed must be an integer from 0"),
        (["generate", "cat", "--seed", 2**63], "seed must be an integer from 0"),
        (
            ["generate", "cat", "--seed", "nan"],
            "'--seed': Input should be a valid integer, unable to parse string as an integer, got 'nan'",
        ),
        (["generate", "cat", "--steps", "0"], "num_inference_steps must be an integer from 1 to 1000, got 0"),
        (["generate", "cat", "--candidates", "0"], "prior_candidates must be an integer from 1 to 64, got 0"),
        (["generate", "cat", "--guidance-scale", "nan"], "guidance_scale must be a number"),
        (["generate", "cat", "--count", "0"], "count must be an integer from 1"),
        (["generate", "cat", "--device", "tpu"], "device must be one of"),
        (["generate", "cat", "--device", "auto:1"], "device 'auto:1' is not available"),
        (["generate", "cat", "--device", "cuda:99"], "device 'cuda:99' is not available"),
        (["generate", "cat", "--file", "nowhere.txt"], "nowhere.txt"),
        (["generate", "cat", "--model", "no/such/model"], "no/such/model"),
        (["generate", "cat", "dog", "--out", "one.png"], "there are 2 images to draw"),
        (["train", "everything"], "stage must be one of clip, autoencoder, prior, decoder"),
        (["train", "prior", "nowhere.yaml"], "no configuration file"),
        (["train", "prior", "cache=null", "clip=nowhere"], "nowhere"),
        (
            ["train", "prior", "cache=nowhere"],
            "no cache 'nowhere'; `t2i data cache FILE.yaml output=nowhere` makes one",
        ),
        (["data", "cache", "nowhere.yaml"], "no configuration file"),
        (["assemble", "nowhere", "out"], "nowhere"),
        (["data", "emoji", "new", "--size", "3"], "size must be an integer from 16"),
        (["eval", "emoji", "nowhere"], "no manifest in 'nowhere'"),
        (["eval", "prior", "nowhere", "--prior", "none"], "no cache 'nowhere'"),
        (["eval", "prior", "nowhere", "--prior", "lost"], "no trained Prior or AutoregressivePrior or RegressionPrior"),
        (["eval", "prior", "nowhere", "--temperature", "nan"], "temperature must be a number from 0 to 10, got nan"),
        (["eval", "prior", "nowhere", "--prior", "lost", "--out", "/proc/a/b.json"], "'/proc/a' cannot be written"),
        (
            ["eval", "likelihood", "nowhere", "--model", "lost", "--out", "/proc/a/b.json"],
            "'/proc/a' cannot be written",
        ),
        (["data", "check", "nowhere"], "no file or folder 'nowhere'"),
        (["draw", "cat"], "No such command 'draw'"),
        (["generate", "cat", "--sed", "3"], "No such option"),
    ],
)
def test_bad_input_is_one_line_and_exit_status_2(monkeypatch, capsys, tmp_path, shapes, arguments, message):
    monkeypatch.chdir(tmp_path)
    if arguments[:2] == ["train", "prior"]:
        arguments = [*arguments, f"data.path={shapes}", "train.output=run"]
    status, _, err = run(monkeypatch, capsys, *arguments)
    assert status == 2 and message in err and err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1 and "Traceback" not in err
    assert list(tmp_path.iterdir()) == []  # nothing half-written


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine with one core
@pytest.mark.parametrize("workers", [0, 1])
def test_pictures_that_have_all_changed_stop_training_with_their_number(monkeypatch, capsys, shapes, tmp_path, workers):
    import shutil

    shutil.copytree(shapes, tmp_path / "data")
    for picture in (tmp_path / "data").glob("*.png"):
        picture.write_bytes(picture.read_bytes()[:-30])
    config = Path(__file__).parents[2] / "configs/tiny/autoencoder.yaml"
    command = ["train", "autoencoder", config, f"data.path={tmp_path / 'data'}", f"train.output={tmp_path / 'run'}"]
    status, _, err = run(monkeypatch, capsys, *command, "train.decay_steps=0", f"data.num_workers={workers}")
    assert status == 2 and "4 images in a row cannot be read (4 changed)" in err.splitlines()[-1]
    assert "Traceback" not in err


def test_every_stage_trains_assembles_and_is_evaluated_from_the_command_line(monkeypatch, capsys, shapes, tmp_path):
    for stage in cli.STAGES:
        status, _, err = run(monkeypatch, capsys, "train", stage, *arguments(stage, shapes, tmp_path / "runs", 2))
        assert status == 0, err
    status, out, _ = run(monkeypatch, capsys, "assemble", tmp_path / "runs", tmp_path / "model", "--fp16")
    assert status == 0 and out.strip() == str(tmp_path / "model")
    command = ["eval", "emoji", shapes, "--model", tmp_path / "model", "--out", tmp_path / "eval"]
    status, out, _ = run(monkeypatch, capsys, *command, "--samples", 4)
    assert status == 0 and "held_out: of 4 captions" in out and "whole way" in out
    assert json.loads((tmp_path / "eval/emoji.json").read_text())["samples"] == 4
    status, _, err = run(monkeypatch, capsys, "assemble", tmp_path / "runs", tmp_path / "model")
    assert status == 2 and "exists; give a new folder" in err


def test_a_script_trains_under_accelerate(shapes, runs, tmp_path):
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "training/train_prior.py")]
    command += [*arguments("prior", shapes, tmp_path, 2), f"clip={runs / 'clip'}"]
    result = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "prior/model/config.json").is_file() and (tmp_path / "prior/metrics.jsonl").is_file()


def test_doctor_says_what_a_broken_torch_is(tmp_path):
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise RuntimeError('operator torchvision::nms does not exist')")
    command = [sys.executable, "-c", "import sys; sys.argv = ['t2i', 'doctor']; from t2i.cli import main; main()"]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and "problem: torch does not import" in result.stdout and not result.stderr


def test_doctor_finds_everything_in_place(monkeypatch, capsys):
    status, out, _ = run(monkeypatch, capsys, "doctor")
    assert status == 0 and "torch" in out and out.strip().endswith("ready")


def test_pictures_are_painted_anew_in_part_around_and_as_a_whole(monkeypatch, capsys, pipeline_folder, tmp_path):
    Image.new("RGB", (40, 32), "red").save(tmp_path / "a.png")
    mask = Image.new("L", (40, 32), 0)
    mask.paste(255, (0, 0, 10, 10))
    mask.save(tmp_path / "mask.png")
    common = ["--model", pipeline_folder, "--out", tmp_path / "out", "--seed", 4, "--steps", 2]
    a = tmp_path / "a.png"
    expected = {
        ("inpaint", a, tmp_path / "mask.png"): (40, 32),
        ("outpaint", a, "--left", 5, "--bottom", 3): (45, 35),
        ("inpaint", a, tmp_path / "mask.png", "--strength", "0.5"): (40, 32),
        ("image-to-image", a, "--strength", "0.5", "--count", 2): (32, 32),
    }
    for command, size in expected.items():
        status, out, error = run(monkeypatch, capsys, *command, *common)
        assert status == 0, error
        for line in out.splitlines():
            with Image.open(line) as image:
                assert image.size == size and json.loads(image.info["t2i"])["image"] == "a.png"
    assert [Path(line).name for line in out.splitlines()] == ["a-png-4-4.png", "a-png-5.png"]
    status, _, error = run(monkeypatch, capsys, "outpaint", a, *common)
    assert status == 2 and "left, right, top and bottom are 0" in error and error.count("\n") == 1


def test_what_cannot_be_painted_is_refused_before_the_model_loads(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("t2i.pipelines.jobs.generation.load_pipeline", lambda *_: pytest.fail("the model loads"))
    a = tmp_path / "a.png"
    Image.new("RGB", (40, 32), "red").save(a)
    for color in ("white", "black"):
        Image.new("L", (40, 32), color).save(tmp_path / f"{color}.png")
    Image.new("L", (4, 3), "white").save(tmp_path / "small.png")
    monkeypatch.setattr("t2i.limits.MAX_PIXELS", 41 * 32)
    expected = {
        ("inpaint", a, tmp_path / "none.png"): "none.png",
        ("inpaint", a, tmp_path / "small.png"): "mask_image is all white",
        ("inpaint", a, tmp_path / "white.png"): "mask_image is all white",
        ("inpaint", a, tmp_path / "black.png"): "mask_image is all black",
        ("inpaint", a, tmp_path / "white.png", "--strength", 2): "strength must be from 0.001 to 1, got 2",
        ("outpaint", a, "--left", 2): "image with its margins is 42 x 32",
        ("outpaint", a, "--left", 1, "--steps", 0): "num_inference_steps must be an integer",
        ("image-to-image", a, "--guidance-scale", -1): "guidance_scale must be from 0",
        ("image-to-image", a, "--prompt", ""): "prompt must not be empty",
    }
    for command, message in expected.items():
        status, _, error = run(monkeypatch, capsys, *command, "--out", tmp_path / "out")
        assert status == 2 and message in error and error.count("\n") == 1, error
