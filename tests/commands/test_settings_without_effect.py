"""Options and names that would do nothing, or something else than was meant: each is refused with what it needs."""

import shlex
from pathlib import Path

import pytest
from PIL import Image
from t2i.pipelines.jobs.generation import generate_files
from t2i.pipelines.jobs.planning import ModelSource, Output
from t2i.training.all_stages import Run

from t2i.checks import check_folder_name
from t2i.commands.evaluation import warn_of_idle_settings
from t2i.data.cache import read_finished_cache
from t2i.data.manifest import find_manifest
from t2i.errors import InputError
from t2i.files.untrusted import refuse_missing_weights
from t2i.networks.regression_prior import RegressionPrior
from tests.commands.test_cli import run


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "a", "--upsampler", "runs/upsampler"], "--upsampler needs --upsample, and does nothing without"),
        (["variations", "a.png", "--upsampler", "runs/upsampler"], "--upsampler needs --upsample"),
        (["upsample", "a.png", "--model", "a", "--upsampler", "b"], "give --model or --upsampler, not both: 'a', 'b'"),
        (["interpolate", "a", "b", "--fps", "24"], "--fps needs --video"),
        (["interpolate", "a", "b", "--weights", "1,2", "--frames", "9"], "--frames 9 does not apply to --weights"),
        (["classify", "a.png", "--labels", "a,b", "--json", "--top", "2"], "--top 2 does not apply to --json"),
        (["train", "clip", "--max-restarts", "1"], "--max-restarts needs --num-processes of 2 or more"),
        (["eval", "quality", "x", "--metrics", "fd", "--kid-subset-size", "9"], "--kid-subset-size needs"),
        (["eval", "quality", "x", "--metrics", "fd", "--neighbours", "9"], "--neighbours needs the metric prc"),
        (["eval", "quality", "x", "--features", "clip:a", "--inception", "b"], "--inception needs --features"),
        (["convert", "a.bin", "--fp16"], "--fp16 needs a model folder"),
        (["convert", "a.ckpt", "b.safetensors", "--to", "karlo"], "--to needs a model folder"),
        (["generate", "a", "--out", "cat.jpg"], ".jpg is the suffix of a file; images are written as .png"),
        (["assemble", "runs", "model.safetensors"], "the new folder is 'model.safetensors', but .safetensors is"),
        (["convert", ".", "model.zip"], "the new folder is 'model.zip', but .zip is"),
    ],
)  # fmt: skip
def test_what_would_do_nothing_is_refused(monkeypatch, capsys, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "a.bin").touch()
    status, out, err = run(monkeypatch, capsys, *arguments)
    assert status == 2 and not out and message in err and len(err.splitlines()) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.bin", "a.png"]


def test_settings_that_a_prior_does_not_have_are_named(capsys):
    warn_of_idle_settings(None, steps=9, candidates=8, guidance=3.0, temperature=0.5)
    named = ["--steps", "--candidates", "--guidance-scale", "--temperature"]
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"warning: {name} has no effect without a prior" for name in named]
    warn_of_idle_settings(RegressionPrior(8, 8, "mlp", 8), steps=9, candidates=8, guidance=3.0, temperature=0.5)
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == named[:2]
    warn_of_idle_settings(None, steps=None, candidates=2, guidance=None, temperature=None)
    assert not capsys.readouterr().err


@pytest.mark.parametrize("option", ["--split", "--statistics"])
def test_statistics_as_the_reference_have_no_splits_and_are_not_computed(monkeypatch, capsys, tmp_path, option):
    reference = tmp_path / "a.safetensors"
    reference.touch()
    command = ["eval", "quality", reference, "--images", tmp_path, option, "train"]
    status, _, err = run(monkeypatch, capsys, *command, "--out", tmp_path / "out.json")
    assert status == 2 and f"{option} needs images as the reference, not their statistics" in err


def test_a_setting_without_effect_is_named_once_for_all_batches(pipeline_folder, tmp_path, caplog):
    settings = {"guidance_scale": {"scale": 1.0, "rescale": 0.5}, "num_inference_steps": 1, "negative_prompt": "dog"}
    settings |= {"prior_num_inference_steps": 1, "prior_guidance_scale": 1.0}
    output = Output(tmp_path, count=2, seed=0)
    assert len(list(generate_files(["a cat"], ModelSource(str(pipeline_folder)), output, settings, batch_size=1))) == 2
    named = [message for message in caplog.messages if "has no effect" in message]
    assert sorted(message.split()[0] for message in named) == ["guidance_scale", "negative_prompt"]


def test_a_folder_may_have_a_dot_and_an_existing_one_any_name(tmp_path):
    for name in ("runs/v1.5", "2026.12", ".hidden", "out"):
        check_folder_name("out", Path(name))
    (tmp_path / "old.jpg").mkdir()
    check_folder_name("out", tmp_path / "old.jpg")
    with pytest.raises(InputError, match="out is 'a.JPEG', but .JPEG is the suffix of a file; give a folder"):
        check_folder_name("out", Path("a.JPEG"))


def test_a_png_in_capitals_is_one_file(tmp_path):
    Output(tmp_path / "a.PNG").check_path(1)
    with pytest.raises(InputError, match="out is one file"):
        Output(tmp_path / "a.PNG").check_path(2)


@pytest.mark.parametrize("flag", ["--version", "-h"])
def test_version_and_help_in_short(monkeypatch, capsys, flag):
    from t2i import __version__

    status, out, err = run(monkeypatch, capsys, flag)
    assert status == 0 and not err
    assert out == f"t2i {__version__}\n" if flag == "--version" else "generate" in out


def test_every_command_has_help_in_short(monkeypatch, capsys):
    for command in (["generate"], ["data", "check"], ["eval", "quality"]):
        status, out, _ = run(monkeypatch, capsys, *command, "-h")
        assert status == 0 and "Usage" in out


def test_suggested_commands_can_be_pasted_into_a_shell(tmp_path):
    folder = tmp_path / "my images; $x"
    folder.mkdir()
    (folder / "model.bin").touch()
    suggestions = {
        lambda: find_manifest(folder): ["t2i", "data", "check", str(folder)],
        lambda: refuse_missing_weights(folder / "model.safetensors"): ["t2i", "convert", str(folder / "model.bin")],
        lambda: read_finished_cache(folder): ["t2i", "data", "cache", "FILE.yaml", f"output={folder}"],
        lambda: Run.read_folder(folder): ["t2i", "init", str(folder), "--data", "IMAGES"],
    }
    for function, words in suggestions.items():
        with pytest.raises(InputError) as caught:
            function()
        assert shlex.split(str(caught.value).split("`")[1]) == words
