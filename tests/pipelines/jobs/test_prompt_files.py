"""Drawing from a file of prompts: batches, processes, going on."""

import io
import json
import logging
import os
import re
import shutil
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from t2i.pipelines.jobs import batches, records
from t2i.pipelines.jobs.batches import build_file_stem, draw_fitting_batches, iterate_in_order, split_batches
from t2i.pipelines.jobs.records import encode_png_image, find_drawn_files
from torch import nn

from t2i.commands.drawing import read_prompts
from t2i.commands.seeing import read_labels
from t2i.errors import InputError
from t2i.files.fingerprints import compute_brief_fingerprint
from t2i.runtime.memory import AvailableMemory
from t2i.runtime.rank import Rank, find_process_rank
from tests.commands.test_cli import QUICK, run
from tests.helpers.kandinsky_folders import kandinsky_22_combined
from tests.helpers.processes.forked import run_program

ROOT = Path(__file__).resolve().parents[3]
PROMPTS = ["red circle", "a green square that is rather large", "blue", "a red square", "green circle"]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@pytest.fixture
def command(monkeypatch, pipeline_folder, tmp_path):
    """Arguments that draw PROMPTS into a folder."""
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    file = tmp_path / "prompts.txt"
    file.write_text("\n\n".join(PROMPTS) + "\n")
    common = ["--model", pipeline_folder, *QUICK]
    return lambda out, *more: ["generate", "--prompts", file, "--out", tmp_path / out, *common, *more]


def said_in(err: str) -> list[str]:
    """Lines without the bar of the loading."""
    return [line for line in err.splitlines() if line.strip() and "Loading" not in line]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image).astype(int)


def test_similar_lengths_are_together_and_nothing_is_lost():
    texts = ["a" * n for n in (9, 1, 8, 2, 7, 3)]
    found = list(split_batches(texts, 2, len))
    assert found == [["a", "aa"], ["aaa", "a" * 7], ["a" * 8, "a" * 9]]
    many = list(range(100))
    assert sorted(sum(split_batches(many, 3, lambda i: -i), [])) == many
    assert list(split_batches(many, 3, lambda i: -i))[0] == [
        23,
        22,
        21,
    ]  # of the first batches only: those are written first


def test_what_is_done_in_any_order_comes_in_order():
    assert list(iterate_in_order([(2, "c"), (0, "a"), (5, "f"), (1, "b")], [0, 1, 2, 5])) == ["a", "b", "c", "f"]


def test_pictures_come_in_the_order_of_the_file_and_do_not_depend_on_batches_or_processes(
    monkeypatch, capsys, command, tmp_path
):
    status, out, err = run(monkeypatch, capsys, *command("one", "--batch-size", 2))
    assert status == 0, err
    names = [Path(line).name for line in out.splitlines()]
    assert names[0] == "red-circle-0.png" and names[2] == "blue-2.png" and len(names) == 5
    shares = []
    for rank in range(2):
        for name, value in zip(LAUNCHER, (rank, 2, rank, 2)):
            monkeypatch.setenv(name, str(value))
        status, out, err = run(monkeypatch, capsys, *command("two", "--seed", 0))
        assert status == 0, err
        shares.append([Path(line).name for line in out.splitlines()])
    assert all(shares) and sorted(sum(shares, [])) == sorted(names)
    for share in shares:
        assert share == [name for name in names if name in share]
    for name in names:
        assert abs(pixels(tmp_path / "one" / name) - pixels(tmp_path / "two" / name)).max() <= 1


def test_two_processes_draw_what_one_does_and_go_on_when_one_was_killed(monkeypatch, capsys, tmp_path):
    for name in LAUNCHER:
        monkeypatch.delenv(name, raising=False)
    words = ["a red cat", "a dog", "the dog and a cat", "cat", "a blue dog", "the red dog on a chair"]
    (tmp_path / "prompts.txt").write_text("\n".join(words))
    common = ["--prompts", tmp_path / "prompts.txt", "--model", kandinsky_22_combined(), "--steps", 60]
    common += ["--prior-steps", 4, "--seed", 0, "--batch-size", 1, "--out"]
    assert run(monkeypatch, capsys, "generate", *common, tmp_path / "alone")[0] == 0

    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--cpu", "--module", "t2i"]
    command += map(str, ["generate", *common, tmp_path / "both"])
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    launched = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while launched.poll() is None and not list((tmp_path / "both").glob("*.png")):
        time.sleep(0.05)
    started = psutil.Process(launched.pid).children(recursive=True)
    next(process for process in started if "generate" in process.cmdline() and not process.children()).kill()
    assert launched.wait(120) != 0
    psutil.wait_procs(started, 60)  # the launcher's own processes may end after it
    (lost := min((tmp_path / "both").glob("*.png"))).unlink()
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "both").glob("*.png")}

    again = run_program(["-m", "t2i", "generate", *common, tmp_path / "both"], ranks=2)
    assert again.returncode == 0, again.stderr[-3000:]
    drawn = [Path(line) for line in again.stdout.splitlines() if line.endswith(".png")]
    assert lost in drawn and not kept.keys() & set(drawn) and len(drawn) + len(kept) == len(words)
    assert all(path.stat().st_mtime_ns == when for path, when in kept.items())
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    assert {path.name for path in (tmp_path / "both").glob("*.png")} == names
    for name in names:
        assert abs(pixels(tmp_path / "alone" / name) - pixels(tmp_path / "both" / name)).max() <= 1


def test_what_is_there_already_is_not_drawn_again(monkeypatch, capsys, caplog, command, tmp_path):
    assert run(monkeypatch, capsys, *command("out"))[0] == 0
    files = {path: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    lost, damaged, renamed, cut = sorted(files)[:4]
    lost.unlink()
    damaged.write_bytes(b"\x89PNG and no more")
    cut.write_bytes(files[cut][:-100])  # what it is of can be read
    renamed.rename(tmp_path / "out" / "another name.png")
    with caplog.at_level(logging.WARNING):
        status, out, _ = run(monkeypatch, capsys, *command("out"))
    assert status == 0 and "already contains 2 of 5 images" in caplog.text
    assert (pixels(lost).shape == (32, 32, 3)) and str(lost) in out.splitlines()
    drawn = {path.name for path in map(Path, out.splitlines()) if path != lost}
    assert drawn == {f"{damaged.stem}-2.png", f"{cut.stem}-2.png"}  # nothing is overwritten
    # Other settings are other images.
    status, out, _ = run(monkeypatch, capsys, *command("out", "--guidance-scale", 3))
    assert status == 0 and len(out.splitlines()) == 5


def change_weights(folder):
    (file,) = folder.glob("*.safetensors")
    tensors = load_file(file)
    for tensor in tensors.values():
        tensor.view(-1)[:1].mul_(1.5)
    save_file(tensors, file)


def change_prediction(folder):
    file = folder / "scheduler_config.json"
    config = json.loads(file.read_text())
    config["prediction_type"] = "sample" if config["prediction_type"] == "epsilon" else "epsilon"
    file.write_text(json.dumps(config))


@pytest.mark.parametrize("part", ["prior", "decoder", "autoencoder", "decoder_scheduler"])
def test_another_model_of_the_same_name_draws_its_own(monkeypatch, capsys, command, pipeline_folder, tmp_path, part):
    said = {}
    for name in ("a", "b", "a elsewhere"):
        shutil.copytree(pipeline_folder, tmp_path / name / "pipeline")
    change = change_prediction if part.endswith("scheduler") else change_weights
    change(tmp_path / "b" / "pipeline" / part)
    for name, new in (("a", 5), ("b", 5), ("b", 0), ("a elsewhere", 0)):
        status, out, err = run(monkeypatch, capsys, *command("out", "--model", tmp_path / name / "pipeline"))
        assert status == 0 and len(out.splitlines()) == new, err
        for path in out.splitlines():
            with Image.open(path) as image:
                said.setdefault(name, set()).add(json.loads(image.info["t2i"])["weights"])
    assert {name: len(digests) for name, digests in said.items()} == {"a": 1, "b": 1} and said["a"] != said["b"]


def test_a_brief_digest_tells_weights_apart_by_their_first_values_names_and_shapes():
    layer, other = nn.Linear(64, 32), nn.Linear(64, 32)
    other.load_state_dict(layer.state_dict())
    digest = compute_brief_fingerprint({"prior": layer, "decoder": None})
    assert re.fullmatch("[0-9a-f]{16}", digest) and digest == compute_brief_fingerprint(
        {"prior": other, "decoder": None}
    )
    with torch.no_grad():
        other.bias[-1] += 1
    found = {
        digest,
        compute_brief_fingerprint({"prior": other, "decoder": None}),
        compute_brief_fingerprint({"prior": None, "decoder": layer}),
    }
    square = nn.Linear(64, 32)
    square.weight = nn.Parameter(layer.weight.detach().view(32 * 2, 32))
    square.bias = layer.bias
    assert len(found | {compute_brief_fingerprint({"prior": square, "decoder": None})}) == 4


def test_a_process_shares_the_memory_of_its_own_machine(monkeypatch):
    for name, value in zip(LAUNCHER, ("5", "8", "1", "4")):
        monkeypatch.setenv(name, value)
    assert find_process_rank() == Rank(5, 8, 1, 4)
    monkeypatch.delenv("LOCAL_WORLD_SIZE")
    assert find_process_rank().local_world_size == 8  # who does not say has one machine
    assert (
        AvailableMemory(1000, 4000).divide_by_processes(4) == AvailableMemory(250, 4000)
        and AvailableMemory(1000, 4000, True).divide_by_processes(4).free == 1000
    )


def test_a_batch_that_fits_alone_and_not_beside_the_other_processes_is_refused(monkeypatch, capsys, command, tmp_path):
    for name, value in zip(LAUNCHER, (0, 10**6, 0, 10**6)):
        monkeypatch.setenv(name, str(value))
    status, out, err = run(monkeypatch, capsys, *command("out", "--batch-size", 2, "--seed", 0))
    assert (status, out, len(said_in(err))) == (2, "", 1)
    assert "GiB are free for each of 1000000 processes; ask for smaller images" in err
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "1")  # the others have machines of their own
    status, out, err = run(monkeypatch, capsys, *command("out", "--batch-size", 2, "--seed", 0))
    assert (status, len(out.splitlines())) == (0, 1), err


def test_a_folder_of_anything_is_looked_through(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "folder.png").mkdir()
    record = {"prompt": "a cat", "seed": 3}
    (tmp_path / "said.png").write_bytes(records.encode_png_image(Image.new("RGB", (4, 4)), record))
    assert find_drawn_files(tmp_path, [{"prompt": "a dog", "seed": 3}, record]) == {1: tmp_path / "said.png"}
    assert find_drawn_files(tmp_path / "nowhere", [record]) == {}


def test_a_picture_whose_pixels_are_damaged_is_not_there(tmp_path):
    record = {"prompt": "a cat", "seed": 3}
    whole = records.encode_png_image(Image.radial_gradient("L"), record)
    changed = bytearray(whole)
    changed[whole.index(b"IDAT") + 50] ^= 1
    for name, content in (("a", whole[: len(whole) // 2]), ("b", changed), ("c", whole[:-12])):
        (tmp_path / f"{name}.png").write_bytes(content)
    assert find_drawn_files(tmp_path, [record]) == {}
    (tmp_path / "d.png").write_bytes(whole)
    assert find_drawn_files(tmp_path, [record]) == {0: tmp_path / "d.png"}


def test_huge_pictures_and_pipes_of_others_are_passed_over(tmp_path, recwarn):
    for side in (10_000, 30_000):
        parts = (b"IHDR" + struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0), b"IDAT")
        chunks = [struct.pack(">I", len(one) - 4) + one + struct.pack(">I", zlib.crc32(one)) for one in parts]
        (tmp_path / f"{side}.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))
    os.mkfifo(tmp_path / "pipe.png")
    record = {"prompt": "a cat", "seed": 3}
    (tmp_path / "said.png").write_bytes(records.encode_png_image(Image.new("RGB", (4, 4)), record))
    assert find_drawn_files(tmp_path, [record]) == {0: tmp_path / "said.png"}
    assert not recwarn.list


def test_a_mark_of_the_byte_order_is_no_part_of_a_prompt_or_a_label(tmp_path):
    (file := tmp_path / "texts.txt").write_text("a cat\na dög\n", encoding="utf-8-sig")
    assert read_prompts([], file) == read_labels(None, file) == ["a cat", "a dög"]


def test_prompts_come_from_standard_input_to_a_single_process(monkeypatch, capsys, pipeline_folder, tmp_path):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("red circle\r\n\nblue squäre\n".encode())))
    command = ["generate", "--prompts", "-", "--model", pipeline_folder, "--out", tmp_path / "out", *QUICK]
    status, out, err = run(monkeypatch, capsys, *command)
    assert status == 0, err
    assert [Path(line).name for line in out.splitlines()] == ["red-circle-0.png", "blue-squäre-1.png"]
    for name, value in zip(LAUNCHER, ("0", "2", "0")):
        monkeypatch.setenv(name, value)
    status, _, err = run(monkeypatch, capsys, *command)
    assert status == 2 and "--prompts - cannot be read by several processes" in err


@pytest.mark.parametrize("name", ["my, own: model", 'with "quotes", too', "plain-name_1.5"])
def test_names_with_separators_are_quoted_in_the_parameters_as_other_programs_read_them(name):
    with Image.open(io.BytesIO(encode_png_image(Image.new("RGB", (8, 8)), {"model": name, "seed": 3}))) as image:
        line = image.info["parameters"].splitlines()[-1]
    # The pattern by which stable-diffusion-webui reads the line
    pattern = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')
    found = dict(pattern.findall(line))
    assert found["Seed"] == "3" and found["Size"] == "8x8"
    read = json.loads(found["Model"]) if found["Model"].startswith('"') else found["Model"]
    assert read == name and (found["Model"] == name) == (name == "plain-name_1.5")


def test_a_name_that_is_not_utf_8_is_recorded_and_read_back(tmp_path):
    record = {"image": "caf\udce9 \\udce9.png", "seed": 1}
    (tmp_path / "a.png").write_bytes(encode_png_image(Image.new("RGB", (8, 8)), record))
    assert find_drawn_files(tmp_path, [record]) == {0: tmp_path / "a.png"}


def test_of_two_processes_only_the_one_that_draws_needs_a_free_file(monkeypatch, capsys, pipeline_folder, tmp_path):
    command = ["generate", "red circle", "--seed", 3, "--model", pipeline_folder, "--out", tmp_path / "o.png", *QUICK]
    for rank, status in ((0, 0), (1, 0), (0, 2)):
        for name, value in zip(LAUNCHER, (rank, 2, rank, 2)):
            monkeypatch.setenv(name, str(value))
        found, out, err = run(monkeypatch, capsys, *command)
        assert found == status, err
        assert (len(out.splitlines()), "is not overwritten" in err) == (int(status == rank == 0), status == 2)


def test_a_model_has_its_folders_name_however_it_is_named(monkeypatch, capsys, command, pipeline_folder, tmp_path):
    assert run(monkeypatch, capsys, *command("out"))[0] == 0
    with Image.open(tmp_path / "out" / "blue-2.png") as image:
        assert json.loads(image.info["t2i"])["model"] == pipeline_folder.name
    monkeypatch.chdir(pipeline_folder)
    status, out, err = run(monkeypatch, capsys, *command("out", "--model", "."))
    assert (status, out) == (0, ""), err
    assert records.format_model_name("org/a-model") == "a-model"  # the hub's


@pytest.mark.parametrize(
    "failure",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has 1 GiB"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2684354560 bytes."),
        MemoryError(),
        RuntimeError("could not create a primitive"),
        RuntimeError("could not execute a primitive"),
        RuntimeError("std::bad_alloc"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_batch_that_does_not_fit_is_halved_or_said(failure):
    sizes = []

    def draw(items):
        sizes.append(len(items))
        if len(items) > 2:
            raise failure
        return [item * 10 for item in items]

    assert list(draw_fitting_batches(draw, [1, 2, 3, 4, 5], 5, automatic=True)) == [(i, 10 * i) for i in range(1, 6)]
    assert sizes == [5, 3, 2, 2, 1]
    amount = "2.50 GiB more" if re.search("2.50|2684354560", str(failure)) else "an unknown amount more"
    said = rf"a batch of 6 does not fit into memory: it needs {amount} at once, [\d.]+ GiB of [\d.]+ GiB are free"
    with pytest.raises(InputError, match=said + "; give --batch-size 3 or auto"):
        list(draw_fitting_batches(draw, [0] * 6, 6, automatic=False))


def test_the_memory_that_is_named_is_that_of_the_device_that_draws(monkeypatch):
    def draw(items):
        raise MemoryError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**31))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    for device, said in (("cpu", r"GiB are free; "), ("cuda", r"1\.00 GiB of 2\.00 GiB are free on the device; ")):
        with pytest.raises(InputError, match=said):
            list(draw_fitting_batches(draw, [1], 1, automatic=True, device=device))


def test_one_picture_that_does_not_fit_and_other_failures_are_not_tried_again():
    def draw(items):
        raise MemoryError

    with pytest.raises(InputError, match="a batch of 1 does not fit .*; ask for smaller images"):
        list(draw_fitting_batches(draw, [1], 1, automatic=True))

    for said in ("a size does not match", "could not create a primitive descriptor for the matmul primitive"):

        def broken(items, said=said):
            raise RuntimeError(said)

        with pytest.raises(RuntimeError, match=f"^{said}"):
            list(draw_fitting_batches(broken, [1, 2], 2, automatic=True))


@pytest.mark.parametrize(
    ("more", "launched", "message"),
    [
        (["--batch-size", "0"], (), "batch-size must be auto or an integer from 1 to 1024, got '0'"),
        (["--batch-size", "9" * 5000], (), "batch-size must be auto or an integer from 1 to 1024, got '9999"),
        (["--batch-size", "many"], (), "batch-size must be auto or an integer from 1 to 1024, got 'many'"),
        (["--dtype", "int8"], (), "dtype must be one of fp32, bf16, fp16; got 'int8'"),
        (["--dtype", "bf16", "--dtype", "fp32"], (), "dtype is given twice for all parts: bfloat16 and float32"),
        (["--dtype", "prior=fp32", "--dtype", "prior=fp16"], (), "dtype is given twice for prior: float32 and float16"),
        ([], ("2", "2", "0"), "RANK must be from 0 to WORLD_SIZE - 1 = 1, got 2"),
        ([], ("one", "2", "0"), "RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE must be integers"),
        ([], ("0", "2", "0", "3"), "LOCAL_WORLD_SIZE must be from 1 to WORLD_SIZE = 2, got 3"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, command, tmp_path, more, launched, message):
    for name, value in zip(LAUNCHER, launched):
        monkeypatch.setenv(name, value)
    status, out, err = run(monkeypatch, capsys, *command("out", *more))
    assert status == 2 and out == "" and err.count("\n") == 1 and message in err
    assert not (tmp_path / "out").exists()


def test_processes_that_share_need_one_seed(monkeypatch, capsys, pipeline_folder, tmp_path):
    for name, value in zip(LAUNCHER, ("0", "2", "0")):
        monkeypatch.setenv(name, value)
    status, _, err = run(monkeypatch, capsys, "generate", "a", "b", "--model", pipeline_folder, "--out", tmp_path)
    assert status == 2 and "seed is missing; 2 processes share the images and need the same seed" in err


def test_the_largest_batch_is_a_number_of_its_own():
    assert batches.parse_batch_size("auto") is None and batches.parse_batch_size("7") == 7


@pytest.mark.parametrize(
    ("text", "stem"),
    [
        ("A red, round circle!", "a-red-round-circle"),
        ("собака на пляже", "собака-на-пляже"),
        ("猫 と 犬", "猫-と-犬"),
        ("बिल्ली", "बिल्ली"),
        ("cafe\u0301", "café"),
        ("../../etc/passwd", "etc-passwd"),
        ("\U0001f431", "picture"),
        ("x" * 90, "x" * 40),
    ],
)
def test_prompts_of_any_script_name_their_files(text, stem):
    assert build_file_stem(text) == stem
