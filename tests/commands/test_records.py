"""`t2i show` and `t2i generate --like`: what a picture tells, and drawing it again."""

import json
import shutil
import subprocess
import sys
from io import BytesIO
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from t2i.pipelines.jobs.records import encode_png_image

from t2i.commands import SHIPPED_MODEL
from t2i.commands.records import Likeness, merge_guidance
from t2i.errors import InputError
from tests.commands.test_cli import QUICK, run

RECORD = {"prompt": "a cat", "seed": 3, "model": "emoji", "num_inference_steps": 4, "guidance_scale": 1.5}


def write(path: Path, record: dict) -> Path:
    path.write_bytes(encode_png_image(Image.new("RGB", (8, 6)), record))
    return path


def write_texts(path: Path, **texts: str) -> Path:
    info = PngInfo()
    for name, text in texts.items():
        info.add_itxt(name, text)
    Image.new("RGB", (8, 6)).save(path, "PNG", pnginfo=info)
    return path


def test_show_prints_a_setting_a_line_or_json(monkeypatch, capsys, tmp_path):
    record = {**RECORD, "prompt": 'a "cat"\n\x1b[31m', "guidance_scale": {"scale": 2.0, "interval": [0.2, 0.8]}}
    path = write(tmp_path / "a.png", record)
    status, out, err = run(monkeypatch, capsys, "show", path)
    assert (status, err) == (0, "")
    assert out.splitlines()[1:] == [
        'prompt: a "cat"\\n\\x1b[31m',
        "seed: 3",
        "model: emoji",
        "num_inference_steps: 4",
        'guidance_scale: {"scale": 2.0, "interval": [0.2, 0.8]}',
        "size: 8x6",
    ]
    status, out, _ = run(monkeypatch, capsys, "show", path, "--json")
    found = json.loads(out)
    assert status == 0 and found.pop("version") and found == {**record, "size": "8x6"}


def test_show_reads_the_parameters_of_other_programs_and_ours(monkeypatch, capsys, tmp_path):
    record = {**RECORD, "prompt": "two\nlines", "negative_prompt": "a dog", "model": "my, own: model"}
    with Image.open(BytesIO(encode_png_image(Image.new("RGB", (8, 6)), record))) as image:
        parameters = image.info["parameters"]
    status, out, err = run(
        monkeypatch, capsys, "show", write_texts(tmp_path / "a.png", parameters=parameters), "--json"
    )
    found = json.loads(out)
    assert (status, err) == (0, "") and found.pop("Version")
    expected = {"prompt": "two\nlines", "negative_prompt": "a dog", "Steps": "4", "CFG scale": "1.5", "Seed": "3"}
    assert found == {**expected, "Model": "my, own: model", "Size": "8x6"}


def test_what_has_no_settings_is_one_line_and_exit_status_2(monkeypatch, capsys, tmp_path):
    whole = encode_png_image(Image.radial_gradient("L"), RECORD)
    changed = bytearray(whole)
    changed[whole.index(b"IDAT") + 50] ^= 1
    Image.new("RGB", (8, 6)).save(tmp_path / "photo.jpg")
    contents = {
        "cut.png": (whole[: len(whole) // 2], "is damaged"),
        "changed.png": (bytes(changed), "is damaged"),
        "head.png": (whole[:20], "is damaged"),
        "photo.png": ((tmp_path / "photo.jpg").read_bytes(), "is no PNG file"),
        "empty.png": (b"", "is no PNG file"),
        "none.png": (None, "no file"),
    }
    for name, (content, message) in contents.items():
        if content is not None:
            (tmp_path / name).write_bytes(content)
        status, out, err = run(monkeypatch, capsys, "show", tmp_path / name)
        assert (status, out) == (2, "") and message in err and err.count("\n") == 1, name
    for name, texts in {"plain": {}, "broken": {"t2i": "{"}, "deep": {"t2i": "[" * 100_000}}.items():
        status, out, err = run(monkeypatch, capsys, "show", write_texts(tmp_path / f"{name}.png", **texts))
        assert (status, out) == (2, "") and err.count("\n") == 1
        assert ("contains no settings" if name == "plain" else "is damaged") in err


def test_several_files_are_shown_by_name_and_bad_ones_are_left_out(monkeypatch, capsys, tmp_path):
    good = [write(tmp_path / "a.png", RECORD), write_texts(tmp_path / "c.png", parameters="a dog\nSteps: 9, Seed: 3")]
    (tmp_path / "b.png").write_text("<html>")
    words = ["show", good[0], tmp_path / "b.png", good[1]]
    status, out, err = run(monkeypatch, capsys, *words)
    first, second = out.split("\n\n")
    assert first.splitlines()[0] == f"file: {good[0]}" and "seed: 3" in first.splitlines()
    assert second.splitlines() == [f"file: {good[1]}", "prompt: a dog", "Steps: 9", "Seed: 3", "size: 8x6"]
    assert status == 2 and "left out: " in err and "1 of 3 images were left out, all others done" in err
    status, out, err = run(monkeypatch, capsys, *words, "--json")
    assert status == 2 and list(json.loads(out)) == [str(path) for path in good]
    status, out, err = run(monkeypatch, capsys, "show", tmp_path / "b.png", tmp_path / "none.png")
    assert (status, out) == (2, "") and "none of 2 images can be used" in err


def test_show_imports_no_torch(tmp_path):
    path = write(tmp_path / "a.png", RECORD)
    code = f"import sys; sys.argv = ['t2i', 'show', {str(path)!r}]\nfrom t2i.cli import main\n"
    code += "try: main()\nexcept SystemExit as end: assert not end.code\nassert 'torch' not in sys.modules"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0 and "seed: 3" in result.stdout, result.stderr


MORE = ["--negative-prompt", "blue", "--guidance-scale", "3", "--guidance", "interval=0.2:0.8", "--prior-guidance"]
MORE += ["rescale=0.5", "--sampler", "ddim", "--eta", "0.5", "--width", "32", "--steer-text", "red", "--steer-scale"]
MORE += ["0.3", "--dtype", "decoder=fp32", "--dtype", "fp32", "--candidates", "3", *QUICK]


def draw_twice(monkeypatch, capsys, folder, tmp_path, options: list) -> tuple[Path, Path, str]:
    """Draw a picture with options, then one like it; return both files and what the second said."""
    source = ["--model", folder]
    status, out, err = run(
        monkeypatch, capsys, "generate", "red circle", *source, "--out", tmp_path / "one", "--seed", 7, *options
    )
    assert status == 0, err
    first = Path(out.strip())
    status, out, err = run(monkeypatch, capsys, "generate", "--like", first, *source, "--out", tmp_path / "two")
    assert status == 0, err
    return first, Path(out.strip()), err


@pytest.mark.parametrize("options", [QUICK, MORE], ids=["few", "many"])
def test_a_picture_is_drawn_again_byte_for_byte(monkeypatch, capsys, pipeline_folder, tmp_path, options):
    first, second, err = draw_twice(monkeypatch, capsys, pipeline_folder, tmp_path, options)
    assert first.read_bytes() == second.read_bytes() and first.name == second.name and err == ""


def test_options_win_over_the_picture(monkeypatch, capsys, pipeline_folder, tmp_path):
    calls = []
    monkeypatch.setattr("t2i.pipelines.jobs.generation.generate_files", lambda *given: calls.append(given) or iter(()))
    record = {**RECORD, "sampler": "ddim", "guidance_scale": {"scale": 2.0, "interval": [0.2, 0.8]}, "dtype": "float32"}
    path = write(tmp_path / "a.png", record | {"model": "tiny", "weights": "ab"})
    words = ["generate", "--like", path, "--model", pipeline_folder]
    assert run(monkeypatch, capsys, *words)[0] == 0
    assert run(monkeypatch, capsys, *words, "a dog", "--seed", 5, "--steps", 9, "--guidance-scale", 4)[0] == 0
    assert run(monkeypatch, capsys, *words, "--sampler", "ode", "--dtype", "bf16", "--guidance", "rescale=0.5")[0] == 0
    prompts, sources, outputs, settings = zip(*(call[:4] for call in calls))
    assert prompts == (["a cat"], ["a dog"], ["a cat"]) and [output.seed for output in outputs] == [3, 5, 3]
    assert [source.dtype for source in sources] == ["float32", "float32", "bfloat16"]
    assert [one["num_inference_steps"] for one in settings] == [4, 9, 4]
    assert [one["sampler"] for one in settings] == ["ddim", "ddim", "ode"]
    assert settings[0]["guidance_scale"] == {"scale": 2.0, "interval": (0.2, 0.8)}
    assert settings[1]["guidance_scale"] == {"scale": 4.0, "interval": (0.2, 0.8)}
    assert settings[2]["guidance_scale"]["scale"] == 2.0 and settings[2]["guidance_scale"]["rescale"] == 0.5
    assert merge_guidance("guidance_scale", 2.0, {"rescale": 0.5}) == {"scale": 2.0, "rescale": 0.5}


def test_a_model_that_has_changed_is_named(monkeypatch, capsys, caplog, pipeline_folder, tmp_path):
    monkeypatch.setattr("t2i.pipelines.jobs.generation.compute_brief_fingerprint", lambda *_: "1234")
    folder = shutil.copytree(pipeline_folder, tmp_path / "model")
    record = {**RECORD, "model": "model", "weights": "abcd", "prompt": "red circle"}
    words = ["generate", "--like", write(tmp_path / "a.png", record), "--out", tmp_path / "out", *QUICK]
    assert run(monkeypatch, capsys, *words, "--model", folder)[0] == 0
    assert (
        "the model 'model' has changed since the image was drawn: its weights were 'abcd' and are '1234'" in caplog.text
    )
    caplog.clear()
    assert run(monkeypatch, capsys, *words, "--model", pipeline_folder)[0] == 0  # another one was asked for
    assert caplog.text == ""
    shutil.rmtree(folder)
    status, _, err = run(monkeypatch, capsys, *words, "--model", folder)
    assert status == 2 and str(folder) in err and err.count("\n") == 1


def test_a_model_that_has_the_name_of_the_shipped_one_alone_must_be_given(
    monkeypatch, capsys, caplog, pipeline_folder, tmp_path
):
    shipped = shutil.copytree(pipeline_folder, tmp_path / "emoji")
    monkeypatch.setattr("t2i.commands.flags.SHIPPED_MODEL", shipped)
    monkeypatch.setattr("t2i.pipelines.jobs.generation.compute_brief_fingerprint", lambda *_: "1234")
    record = {**RECORD, "prompt": "red circle"}
    other = write(tmp_path / "a.png", record | {"weights": "abcd"})
    words = ["generate", *QUICK, "--out", tmp_path / "out", "--like"]
    status, out, err = run(monkeypatch, capsys, *words, other)
    assert (status, out) == (2, "") and not (tmp_path / "out").exists()
    assert "another model 'emoji' than the default one: its weights are 'abcd', not '1234'; give --model" in err
    assert run(monkeypatch, capsys, *words, write(tmp_path / "b.png", record | {"weights": "1234"}))[0] == 0
    assert run(monkeypatch, capsys, *words, other, "--model", shipped)[0] == 0
    assert "has changed since the image was drawn" in caplog.text


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"model": "tiny"}, "was drawn with the model 'tiny'; give it with --model"),
        ({"model": "/etc/passwd"}, "give it with --model"),
        ({"model": str(SHIPPED_MODEL)}, "give it with --model"),
        ({"model": "stranger/model"}, "give it with --model"),
        ({"clip": "ViT-B-32"}, "give it with --clip"),
        ({"upsampler": "../up", "upsample": 1}, "give it with --upsampler"),
        ({"control_image": "/etc/passwd"}, "give it with --control-image"),
        ({"steering": {"scale": 1.0, "picture": "a picture"}}, "give it with --steer-image"),
        ({"steering": {"scale": 1.0, "class": "x", "classifier": {"folder": "/x"}}}, "with --classifier"),
        ({"steering": "x"}, "has the steering 'x', which this version"),
        ({"steering": {"scale": 1e9, "text": "x"}}, "--steer-scale must be from 0"),
        ({"latents": [1]}, "has the setting 'latents'"),
        ({"output_type": "latent"}, "has the setting 'output_type'"),
        ({"height": 10**6}, "height must be an integer from 1 to 4096"),
        ({"num_inference_steps": "4"}, "num_inference_steps must be an integer"),
        ({"prior_candidates": 10**9}, "prior_candidates must be an integer from 1 to 64"),
        ({"guidance_scale": {"scale": 1, "x": 2}}, "guidance_scale has no setting 'x'"),
        ({"guidance_scale": {"scale": "a"}}, "guidance_scale"),
        ({"guidance_scale": {"scale": 2, "interval": {"a": 1}}}, "guidance_scale"),
        ({"guidance_scale": "a"}, "guidance_scale"),
        ({"sampler": {"a": 1}}, "sampler must be one of"),
        ({"eta": []}, "eta must be a number"),
        ({"upsample": True}, "upsample must be an integer"),
        ({"dtype": "evil"}, "dtype must be one of"),
        ({"dtype": {"decoder": 3}}, "dtype must be one of"),
        ({"negative_prompt": 5}, "negative_prompt must be a text"),
        ({"prompt": 5}, "has no prompt or no seed"),
        ({"prompt": "a" * 5000}, "prompt must have at most 4096 characters"),
        ({"seed": -1}, "seed must be an integer from 0"),
        ({"seed": "3"}, "has no prompt or no seed"),
        ({"strength": 0.5, "image": "hand.png"}, "was drawn by `t2i image-to-image` from 'hand.png'"),
        ({"anchors": ["a", "b"]}, "was drawn by `t2i interpolate` from ['a', 'b']"),
    ],
)
def test_the_record_of_a_stranger_loads_nothing_and_is_checked(monkeypatch, capsys, tmp_path, record, message):
    monkeypatch.setattr("t2i.pipelines.jobs.generation.load_pipeline", lambda *_: pytest.fail("a model loads"))
    monkeypatch.setattr("t2i.sampling.steering.load_classifier", lambda *_: pytest.fail("a classifier loads"))
    path = write_texts(tmp_path / "a.png", t2i=json.dumps({**RECORD, **record}))
    status, out, err = run(monkeypatch, capsys, "generate", "--like", path, "--out", tmp_path / "out")
    assert (status, out) == (2, "") and message in err and err.count("\n") == 1, err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "key"),
    [
        ("edit", "target"),
        ("outpaint", "left"),
        ("inpaint", "mask_image"),
        ("upsample", "picture"),
        ("variations", ""),
    ],
)
def test_a_picture_of_another_command_names_it(tmp_path, command, key):
    source = {"picture": "a.png"} if command == "upsample" else {"image": "a.png"}
    path = write_texts(tmp_path / "a.png", t2i=json.dumps({"seed": 1, key: 1, **source}))
    with pytest.raises(InputError, match=f"was drawn by `t2i {command}` from 'a.png'; --like draws from texts alone"):
        Likeness.read_file(path)


def test_a_picture_of_another_program_is_no_likeness(tmp_path):
    path = write_texts(tmp_path / "a.png", parameters="a cat\nSteps: 20, Seed: 3")
    with pytest.raises(InputError, match="has no record of `t2i generate`; `t2i show` prints what it has"):
        Likeness.read_file(path)
