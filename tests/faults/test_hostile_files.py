"""Model folders made by an enemy: refused in one line, before anything is run, followed or allocated."""

import json
import os
import pickle
import random
import shutil
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from diffusers import AutoencoderKL
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from t2i.pipelines.jobs.assemble import assemble_pipeline_folder

from t2i import InputError, Text2ImagePipeline
from t2i.diffusion.stored_schedulers import load_scheduler
from t2i.files.model_folder import load_model
from t2i.files.untrusted import check_file_name, read_safetensors_header
from t2i.interop.by_name import load_autoencoder, load_clip
from t2i.networks.prior import Prior
from t2i.networks.unet_decoder import UNetDecoder
from tests.faults.record import record

WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
MODELS = ("clip", "prior", "decoder", "autoencoder")
NAN = float("nan")

Load = Callable[[Path], Any]


class Hang(BaseException):
    """Nothing may take this for an error of a file."""


@contextmanager
def watched(seconds: float = 30) -> Iterator[None]:
    def end(*_: object) -> None:
        raise Hang

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refusal(load: Callable[..., Any], *arguments: Any) -> str:
    """The one line that `load` is refused with, or "" if it succeeds. A refusal takes less than a second of processor
    time: the first one of a process imports what loads, so that a slow one is asked for again.
    """
    for last in (False, False, True):
        start = time.process_time()
        with watched():
            try:
                load(*arguments)
                return ""
            except InputError as error:
                spent, message = time.process_time() - start, str(error)
        assert "\n" not in message and len(message) < 1500, message
        if spent < 1:
            return message
        assert not last, (spent, message)
    raise AssertionError("unreachable")


@contextmanager
def memory(megabytes: float) -> Iterator[None]:
    """The most memory that the process ever holds inside may be this much above what it held before."""

    def held(key: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) / 1024

    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("needs Linux, to measure memory")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    before = held("VmRSS")
    yield
    assert held("VmHWM") - before < megabytes


def copied(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("checkpoints"))
    return folder


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def safetensors(path: Path, header: Any, data: bytes = b"", size: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)
    return path


VISION = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 1, "head_width": 16}
TEXT = {"context_length": 16, "vocab_size": 49408, "width": 8, "heads": 2, "layers": 1}


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A public CLIP of open_clip's and a VAE of diffusers, each in its folder."""
    home = tmp_path_factory.mktemp("public")
    model = {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT}
    preprocess = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}
    (home / "clip").mkdir()
    (home / "clip/open_clip_config.json").write_text(json.dumps({"model_cfg": model, "preprocess_cfg": preprocess}))
    save_file(open_clip.CLIP(**model).state_dict(), home / "clip/open_clip_model.safetensors")
    AutoencoderKL(block_out_channels=[32], latent_channels=4).save_pretrained(home / "vae")
    return {"open_clip": home / "clip", "vae": home / "vae"}


@pytest.fixture
def places(pipeline_folder: Path, runs: Path, public: dict[str, Path], tmp_path: Path) -> list[tuple[Path, str, Load]]:
    """(folder, file of its weights, what loads it) of every model that any of our loaders takes, sound as they are."""
    pipeline = copied(pipeline_folder, tmp_path / "pipeline")
    stages = copied(runs, tmp_path / "runs")
    vae, clip = copied(public["vae"], tmp_path / "vae"), copied(public["open_clip"], tmp_path / "open_clip")
    loaders: dict[str, Load] = {
        "clip": load_clip,
        "prior": lambda folder: load_model(Prior, folder),
        "decoder": lambda folder: load_model(UNetDecoder, folder),
        "autoencoder": load_autoencoder,
    }
    return [
        *((pipeline / name, WEIGHTS, lambda _: Text2ImagePipeline.from_pretrained(pipeline)) for name in MODELS),
        *((stages / name / "model", WEIGHTS, loaders[name]) for name in MODELS),
        *(
            (stages / name / "model", WEIGHTS, lambda _: assemble_pipeline_folder(stages, tmp_path / "assembled"))
            for name in MODELS
        ),
        (vae, WEIGHTS, load_autoencoder),
        (clip, "open_clip_model.safetensors", lambda folder: load_clip(f"local-dir:{folder}")),
    ]


# --- B1: pickles ---------------------------------------------------------------------------------------------------


class Payload:
    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.sentinel),)


OPENED: list[str] = []
sys.addaudithook(lambda event, values: OPENED.append(str(values[0])) if event == "open" else None)


def test_pickles_are_never_opened_wherever_they_lie(places, tmp_path):
    sentinel = tmp_path / "the payload ran"
    evil = pickle.dumps({"weights": Payload(sentinel)})
    pickle.loads(evil)
    sentinel.rmdir()  # it would have worked
    injected = survived = 0
    for folder, weights, load in places:
        sound = (folder / weights).read_bytes()
        (folder / weights).unlink()
        stem = weights.removesuffix(".safetensors")
        names = ("pytorch_model.bin", "open_clip_pytorch_model.bin", f"{stem}.fp16.bin", "diffusion_pytorch_model.pkl")
        for name in (*(f"{stem}.{kind}" for kind in ("bin", "pt", "pth", "ckpt", "pkl")), *names):
            (folder / name).write_bytes(evil)
            if name.endswith((".pt", ".pth")):  # as torch writes it: a pickle inside a ZIP file
                torch.save({"weights": Payload(sentinel)}, folder / name)
            OPENED.clear()
            injected += 1
            said = refusal(load, folder)
            survived += "only .safetensors is loaded" in said and not any(one.endswith(name) for one in OPENED)
            (folder / name).unlink()
        (folder / weights).write_bytes(evil)  # in disguise
        injected += 1
        survived += "only .safetensors is loaded" in refusal(load, folder)
        (folder / weights).write_bytes(sound)
    assert not sentinel.exists()
    record("B1 pickle in the place of weights", injected, survived)


def test_pickles_beside_sound_weights_are_left_alone(places, tmp_path):
    evil = pickle.dumps(Payload(tmp_path / "the payload ran"))
    names = [f"diffusion_pytorch_model.{kind}" for kind in ("bin", "pt", "ckpt", "pkl")]
    names += ["open_clip_pytorch_model.bin", "tokenizer.pkl", "scheduler.bin", "pytorch_model.bin"]
    injected = survived = 0
    for folder, _, load in places[:9] + places[-2:]:
        for name in names:
            (folder / name).write_bytes(evil)
        OPENED.clear()
        load(folder)
        assert OPENED
        injected += len(names)
        survived += sum(not any(one.endswith(f"/{name}") for one in OPENED) for name in names)
    assert not (tmp_path / "the payload ran").exists()
    record("B1 pickle beside sound weights", injected, survived)


def test_a_pickle_that_open_clip_would_prefer_is_refused(public, tmp_path):
    """open_clip takes its own .bin before a .safetensors of another name."""
    folder = copied(public["open_clip"], tmp_path / "clip")
    (folder / "open_clip_model.safetensors").rename(folder / "model.safetensors")
    load_clip(f"local-dir:{folder}")
    (folder / "open_clip_pytorch_model.bin").write_bytes(pickle.dumps(Payload(tmp_path / "the payload ran")))
    assert "only .safetensors is loaded" in refusal(lambda: load_clip(f"local-dir:{folder}"))
    assert not (tmp_path / "the payload ran").exists()


def cached(cache: Path, repository: str, files: dict[str, bytes]) -> None:
    """Files as the hub's cache keeps them: links from a snapshot to blobs."""
    home = cache / f"models--{repository.replace('/', '--')}"
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (home / "refs").mkdir()
    (home / "refs/main").write_text("0" * 40)
    (home / "blobs").mkdir()
    for number, (name, content) in enumerate(files.items()):
        (home / "blobs" / str(number)).write_bytes(content)
        (snapshot / name).symlink_to(f"../../blobs/{number}")


def test_a_public_clip_that_comes_as_a_pickle_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    evil = pickle.dumps(Payload(tmp_path / "the payload ran"))
    cached(tmp_path, "laion/CLIP-ViT-B-32-laion2B-s34B-b79K", {"open_clip_pytorch_model.bin": evil})
    assert "only .safetensors is loaded" in refusal(lambda: load_clip("ViT-B-32:laion2b_s34b_b79k"))
    assert not (tmp_path / "the payload ran").exists()


def test_links_of_the_hubs_cache_are_followed(public, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    cached(tmp_path, "someone/vae", {path.name: path.read_bytes() for path in public["vae"].iterdir()})
    assert load_autoencoder("someone/vae").channels == 4
    cached(tmp_path, "someone/clip", {path.name: path.read_bytes() for path in public["open_clip"].iterdir()})
    assert load_clip("hf-hub:someone/clip").embed_dim == 16


# --- B2: ways out of the folder ------------------------------------------------------------------------------------

TRICKS = [
    "../x",
    "..",
    ".",
    "",
    "a/../../x",
    "/etc/passwd",
    "~/x",
    "~root",
    "a/b",
    "./x",
    "C:\\x",
    "C:x",
    "c:/x",
    "\\\\host\\share",
    "\\\\?\\C:\\x",
    "..\\x",
    "a\\b",
    "//host/share",
    "x\0.safetensors",
    "x\n",
    " x",
    "x ",
    "x.",
    "-rf",
    ".hidden",
    "CON",
    "nul.safetensors",
    "COM1.txt",
    "x:stream",
    "%2e%2e%2fx",
    "file:///etc/passwd",
    "．．／x",
    "$HOME",
    "x" * 300,
]


def test_names_that_are_paths_on_any_system_are_refused():
    others = [7, None, ["x"], True]
    refused = [bool(refusal(check_file_name, "adapter", trick)) for trick in [*TRICKS, *others]]
    assert check_file_name("adapter", "my_style-1.0.safetensors") == "my_style-1.0.safetensors"
    record("B2 name that is a path", len(refused), sum(refused))


def test_an_index_names_files_of_its_own_folder_only(places):
    injected = survived = 0
    for folder, weights, load in (places[1], places[5], places[-2]):
        (folder / "outside.bin").write_bytes(b"")
        (folder / "odd.safetensors").mkdir()
        tensors = list(read_safetensors_header(folder / weights))
        for target in [*TRICKS, *(f"{trick}.safetensors" for trick in TRICKS if trick), "outside.bin", "a.pt", 7, None]:
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(tensors, target)}))
            OPENED.clear()
            injected += 1
            named = "must be a plain name" in (said := refusal(load, folder))
            survived += (named or "only .safetensors" in said or "no file" in said) and "/etc/passwd" not in OPENED
        for index in ({}, {"weight_map": []}, {"weight_map": {}}, {"weight_map": {"a": "odd.safetensors"}}):
            (folder / INDEX).write_text(json.dumps(index))
            injected += 1
            survived += bool(refusal(load, folder))
        (folder / INDEX).unlink()
    record("B2 index out of the folder", injected, survived)


def test_a_sharded_model_loads(runs, tmp_path):
    load_model(Prior, runs / "prior").save_pretrained(tmp_path / "prior", max_shard_size="100KB")
    assert len(list((tmp_path / "prior").glob("*.safetensors"))) > 1
    load_model(Prior, tmp_path / "prior")


def test_links_out_of_the_folder_are_refused(places, tmp_path):
    injected = survived = 0
    outside = tmp_path / "outside"
    outside.mkdir()
    for folder, _, load in places:
        for path in sorted(folder.iterdir()):
            shutil.move(path, outside / path.name)
            for target in (outside / path.name, f"../../outside/{path.name}", "/etc/passwd", "/dev/zero", path):
                path.symlink_to(target)
                injected += 1
                survived += bool(refusal(load, folder))
                path.unlink()
            os.mkfifo(path)  # a pipe would be waited for
            injected += 1
            survived += bool(refusal(load, folder))
            path.unlink()
            shutil.move(outside / path.name, path)
        if folder.name in MODELS:  # a whole component
            shutil.move(folder, outside / folder.name)
            folder.symlink_to(outside / folder.name)
            injected += 1
            survived += "is a link out of" in refusal(load, folder)
            folder.unlink()
            shutil.move(outside / folder.name, folder)
    record("B2 link out of the folder", injected, survived)


# --- B3: configurations that name code, or are too large -----------------------------------------------------------


def test_a_pipelines_index_names_our_own_classes_only(pipeline_folder, tmp_path):
    folder = copied(pipeline_folder, tmp_path / "model")
    index = folder / "model_index.json"
    sound, sentinel = index.read_text(), tmp_path / "the code ran"
    code = f"import os\nos.mkdir({str(sentinel)!r})\nclass CLIP: pass\n"
    changes: list[dict[str, Any]] = [
        {name: entry}
        for name in ("clip", "prior_scheduler", "decoder")
        for entry in (
            ["os", "system"],
            ["subprocess", "Popen"],
            ["t2i.networks.clip", "load_clip"],
            ["t2i.networks.clip", "Nothing"],
            ["t2i.networks.autoencoder", "AutoencoderKL"],
            ["diffusers", "AutoencoderKL"],
            ["diffusers", "StableDiffusionPipeline"],
            ["diffusers", "os"],
            ["diffusers", "__class__"],
            ["diffusers", "Scheduler"],
            ["diffusers", 7],
            ["diffusers"],
            ["t2i.networks.clip", "CLIP", "x"],
            [["t2i.networks.clip"], "CLIP"],
            ["evil", "CLIP"],
            [None, None],
            [],
            "os.system",
            7,
            None,
            {"a": 1},
        )
    ]
    changes += [{key: "evil.py"} for key in ("auto_map", "custom_pipeline", "trust_remote_code", "quantization_config")]
    changes += [{"../evil": ["t2i.networks.clip", "CLIP"]}, {"safety_checker": ["os", "system"]}, {"vae": 7}]
    changes += [{"_class_name": name} for name in ("StableDiffusionPipeline", ["evil", "Evil"], None, 7, "os.system")]
    survived = 0
    for change in changes:
        index.write_text(json.dumps(json.loads(sound) | change))
        survived += bool(refusal(Text2ImagePipeline.from_pretrained, folder))
    index.write_text(sound)
    scripts = ["None.py", "evil.py", "clip/t2i.clip.py", "clip/None.py", "prior_scheduler/diffusers.py"]
    for name in scripts:
        (folder / name).write_text(code)
        survived += "code" in refusal(Text2ImagePipeline.from_pretrained, folder)
        (folder / name).unlink()
    assert not sentinel.exists()
    Text2ImagePipeline.from_pretrained(folder)
    record("B3 code named by a pipeline", len(changes) + len(scripts), survived)


def config_of(folder: Path) -> Path:
    return folder / ("open_clip_config.json" if folder.name == "open_clip" else "config.json")


def test_configurations_that_are_no_sound_json_are_refused(places, pipeline_folder, tmp_path):
    deep = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    bad = {
        "empty": b"",
        "not JSON": b"{",
        "not text": b"\xff\xfe{}",
        "UTF-16": '{"a": 1}'.encode("utf-16"),
        "a list": b"[]",
        "null": b"null",
        "deep": deep,
        "deep objects": b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        "half as deep": b'{"a":' + b"[" * 700 + b"]" * 700 + b"}",
        "twice": b'{"_class_name": "CLIP", "_class_name": "Prior"}',
        "long number": b'{"a": ' + b"9" * 5000 + b"}",
        "NaN": b'{"a": NaN}',
        "infinite": b'{"a": 1e999}',
        "many": b'{"a": [' + b"[]," * 5_000_000 + b"[]]}",
    }
    index = copied(pipeline_folder, tmp_path / "indexed")
    targets: list[tuple[Path, Callable[[], Any]]] = [
        (config_of(folder), lambda folder=folder, load=load: load(folder)) for folder, _, load in places
    ]
    whole = {"model_index.json", "prior_scheduler/scheduler_config.json", "clip/tokenizer.json"}
    targets += [(index / name, lambda: Text2ImagePipeline.from_pretrained(index)) for name in sorted(whole)]
    targets += [(places[0][0] / INDEX, lambda: places[0][2](places[0][0]))]
    injected = survived = 0
    for path, load in targets:
        sound = path.read_bytes() if path.exists() else None
        for content in bad.values():
            path.write_bytes(content)
            injected += 1
            with memory(100 if path.name == "tokenizer.json" else 50):
                survived += bool(refusal(load))
        with open(path, "wb") as file:
            file.truncate(100_000_000)  # takes no space
        injected += 1
        with memory(50):
            survived += "bytes" in refusal(load)
        path.unlink() if sound is None else path.write_bytes(sound)
    record("B3 configuration that is no sound JSON", injected, survived)


@pytest.mark.parametrize("key", ["auto_map", "custom_pipeline", "quantization_config", "trust_remote_code"])
def test_configurations_that_ask_for_code_are_refused(places, key):
    refused = []
    for folder, _, load in places:
        sound = config_of(folder).read_text()
        edit(config_of(folder), **{key: {"quant_method": "bitsandbytes", "AutoModel": "evil.Evil"}})
        refused.append("own code" in refusal(load, folder))
        config_of(folder).write_text(sound)
    record(f"B3 configuration with {key}", len(refused), sum(refused))


def test_a_public_tokenizer_runs_no_code(public, runs, tmp_path):
    """transformers would ask at the terminal, or just run it if the configuration may say so."""
    sentinel = tmp_path / "the code ran"
    folder = copied(public["open_clip"], tmp_path / "open_clip")
    ours = copied(runs / "clip/model", tmp_path / "ours")
    code = f"import os\nos.mkdir({str(sentinel)!r})\nclass Evil: pass\n"
    settings = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
    config, ours_config = (json.loads(config_of(one).read_text()) for one in (folder, ours))
    (ours / "tokenizer").mkdir()
    refused = []
    for options in ({}, {"trust_remote_code": True}, {"cache_dir": "/"}, {"code_revision": "x"}, {"use_fast": False}):
        for home in (folder, ours / "tokenizer"):
            (home / "tokenizer_config.json").write_text(json.dumps(settings))
            (home / "evil.py").write_text(code)
        text = {"hf_tokenizer_name": "x", "tokenizer_kwargs": options}
        config["model_cfg"]["text_cfg"] |= text
        config_of(folder).write_text(json.dumps(config))
        ours_config["model"]["text_cfg"] |= text
        config_of(ours).write_text(json.dumps(ours_config | {"tokenizer_kind": "transformers"}))
        for without in (False, True):
            if without:
                (folder / "evil.py").unlink()
                (ours / "tokenizer/evil.py").unlink()
            refused.append(bool(refusal(lambda: load_clip(f"local-dir:{folder}"))))
            refused.append(bool(refusal(load_clip, ours)))
    assert not sentinel.exists()
    record("B3 tokenizer with code", len(refused), sum(refused))


def test_towers_are_not_loaded_from_paths(public, tmp_path):
    refused = []
    for tower, key in (("text_cfg", "hf_model_name"), ("vision_cfg", "timm_model_name")):
        for name in ("../evil", "/etc", "local-dir:/etc", "hf-hub:evil/evil", "a/b/c", "..", "C:\\x", ["x"], 7):
            folder = tmp_path / str(len(refused))
            config = json.loads(config_of(copied(public["open_clip"], folder / "open_clip")).read_text())
            config["model_cfg"][tower][key] = name
            config_of(folder / "open_clip").write_text(json.dumps(config))
            said = refusal(lambda folder=folder: load_clip(f"local-dir:{folder / 'open_clip'}"))
            refused.append("must be the name of a public model" in said)
    record("B3 tower by a path", len(refused), sum(refused))


# --- B4: safetensors ----------------------------------------------------------------------------------------------


def entry(start: int, end: int, shape: list, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def bombs(path: Path) -> Iterator[tuple[str, Path]]:
    """Headers that lie, or are too large."""
    one = b'{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'
    other = b'{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}'
    yield "header of 2^63 bytes", safetensors(path, b"{}", size=2**63)
    yield "header of 2^64 - 1 bytes", safetensors(path, b"{}", size=2**64 - 1)
    yield "header beyond the file", safetensors(path, b"{}", size=1_000_000)
    yield "header of 100 MB, short", safetensors(path, b"{}", size=100_000_000)
    none = b'{"dtype":"F32","shape":[0],"data_offsets":[0,0]}'
    yield "header of 60 MB", safetensors(path, b"{" + b",".join(b'"%09d":%s' % (i, none) for i in range(10**6)) + b"}")
    yield "header of 90 MB of blanks", safetensors(path, b"{}" + b" " * 90_000_000)
    yield "text of 90 MB", safetensors(path, {"__metadata__": {"a": "x" * 90_000_000}})
    yield "lists in an entry", safetensors(path, b'{"a":{"x":[' + b"[]," * 660_000 + b"[]]}}")
    yield "overlap", safetensors(path, {"a": entry(0, 8, [2]), "b": entry(4, 12, [2])}, bytes(12))
    yield "the same bytes", safetensors(path, {"a": entry(0, 8, [2]), "b": entry(0, 8, [2])}, bytes(8))
    yield "hole", safetensors(path, {"a": entry(0, 8, [2]), "b": entry(12, 20, [2])}, bytes(20))
    yield "rest", safetensors(path, {"a": entry(0, 8, [2])}, bytes(20))
    yield "short", safetensors(path, {"a": entry(0, 8, [2])}, bytes(4))
    yield "backwards", safetensors(path, {"a": entry(8, 0, [2])}, bytes(8))
    yield "overflow", safetensors(path, {"a": entry(0, 8, [2**62, 2**62])}, bytes(8))
    yield "overflow to zero", safetensors(path, {"a": entry(0, 0, [2**32, 2**32])})
    yield "negative", safetensors(path, {"a": entry(0, 8, [-2])}, bytes(8))
    yield "not whole", safetensors(path, {"a": entry(0, 8, [2.0])}, bytes(8))
    yield "unknown type", safetensors(path, {"a": entry(0, 8, [2], "PICKLE")}, bytes(8))
    yield "key twice", safetensors(path, b'{"a":' + one + b',"a":' + other + b"}", bytes(8))
    yield "key twice, disguised", safetensors(path, b'{"a":' + one + b',"\\u0061":' + other + b"}", bytes(8))
    yield "no text", safetensors(path, b"\xff" * 100)
    yield "a list", safetensors(path, b"[]")
    yield "deep", safetensors(path, b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    yield "no tensors", safetensors(path, {})
    yield "huge and empty", safetensors(path, {"a": entry(0, 0, [0, 2**62, 2**62])})
    path.write_bytes(b"")
    yield "nothing", path
    path.write_bytes(b"\x05\0")
    yield "no header", path


def test_safetensors_that_lie_are_refused_at_once_and_cost_no_memory(places, tmp_path):
    injected = survived = 0
    for _, bomb in bombs(tmp_path / "bomb"):
        for folder, weights, load in [places[5], *places[-2:]]:
            (folder / weights).unlink()
            os.link(bomb, folder / weights)
            injected += 1
            with memory(50):
                survived += bool(refusal(load, folder))
        bomb.unlink()
    record("B4 safetensors that lie", injected, survived)


# --- A9: tensors that are not the model's, or not numbers ----------------------------------------------------------


def test_other_tensors_than_the_models_are_named_with_their_shapes(places):
    def drop(tensors: dict, name: str) -> None:
        del tensors[name]

    def reshape(tensors: dict, name: str) -> None:
        tensors[name] = tensors[name][None]

    def retype(tensors: dict, name: str) -> None:
        tensors[name] = tensors[name].to(torch.int32)

    def add(tensors: dict, name: str) -> None:
        tensors[f"{name}.more"] = torch.zeros(3)

    def rename(tensors: dict, name: str) -> None:
        tensors[f"{name}.renamed"] = tensors.pop(name)

    injected = survived = 0
    for folder, weights, load in places[:8]:
        sound = (folder / weights).read_bytes()
        for change, words in ((drop, "lacks"), (reshape, "misshapen"), (retype, "mistyped"), (add, "unknown")):
            tensors = load_file(folder / weights)
            name = sorted(tensors)[len(tensors) // 2]
            change(tensors, name)
            save_file(tensors, folder / weights)
            injected += 1
            said = refusal(load, folder)
            survived += name in said and words in said
            (folder / weights).write_bytes(sound)
    for folder, weights, load in places[-2:]:  # public files: refused by the libraries, in their words
        sound = (folder / weights).read_bytes()
        for change in (drop, reshape, rename):
            tensors = load_file(folder / weights)
            name = next(name for name in sorted(tensors) if name.endswith("bias"))
            change(tensors, name)
            save_file(tensors, folder / weights)
            injected += 1
            survived += name in refusal(load, folder)
            (folder / weights).write_bytes(sound)
    record("A9 tensors that are not the model's", injected, survived)


@pytest.mark.parametrize("value", [NAN, float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_refused_where_a_stage_is_loaded(places, value):
    refused = []
    for folder, weights, load in places[4:]:
        sound = (folder / weights).read_bytes()
        tensors = load_file(folder / weights)
        name = next(name for name in sorted(tensors) if tensors[name].numel() > 10)
        tensors[name].view(-1)[7] = value
        save_file(tensors, folder / weights)
        said = refusal(load, folder)
        refused.append("NaN or infinity" in said or "fingerprint" in said)
        (folder / weights).write_bytes(sound)
    record(f"A9 weights with {value}", len(refused), sum(refused))


# --- B5: mutations -------------------------------------------------------------------------------------------------


def mutated(content: bytes, draw: random.Random) -> bytes:
    """A few bytes changed, cut, doubled or moved, or a number or a word replaced."""
    words = [
        b"0",
        b"-1",
        b"1e9",
        b"99999999999",
        b"null",
        b"true",
        b"NaN",
        b'""',
        b"[]",
        b"{}",
        b'"../x"',
        b"\xff",
        b'"',
    ]
    for _ in range(draw.randint(1, 3)):
        start = draw.randrange(len(content) + 1)
        end = min(len(content), start + draw.choice([0, 1, 1, 2, 8, 64]))
        middle = content[start:end]
        match draw.randrange(7):
            case 0:
                middle = bytes(draw.randrange(256) for _ in middle)
            case 1:
                middle = b""
            case 2:
                middle = middle * draw.randint(2, 4)
            case 3:
                middle = draw.choice(words)
            case 4:
                middle = bytes(byte ^ 1 << draw.randrange(8) for byte in middle)
            case 5:
                end = len(content)
            case 6:  # a value as a whole
                numbers = [i for i, byte in enumerate(content) if chr(byte).isdigit()] or [start]
                start = end = draw.choice(numbers)
                while end < len(content) and chr(content[end]).isdigit():
                    end += 1
                middle = draw.choice(words)
        content = content[:start] + middle + content[end:]
    return content


def sweep(places: list[tuple[Path, str, Load]], count: int, seed: int) -> None:
    draw = random.Random(seed)
    pipeline = places[0][0].parent
    scheduler = pipeline / "prior_scheduler"
    targets: list[tuple[Path, Callable[[], Any]]] = [
        (pipeline / "model_index.json", lambda: Text2ImagePipeline.from_pretrained(pipeline)),
        (scheduler / "scheduler_config.json", lambda: load_scheduler(scheduler)),
        (places[4][0] / "tokenizer.json", lambda: places[4][2](places[4][0])),
    ]
    for folder, weights, load in places[4:8] + places[-2:]:
        targets += [
            (path, lambda load=load, folder=folder: load(folder)) for path in (config_of(folder), folder / weights)
        ]
    survived = 0
    for i in range(count):
        path, load = targets[i % len(targets)]
        sound = path.read_bytes()
        header = 8 + int.from_bytes(sound[:8], "little") if path.suffix == ".safetensors" else len(sound)
        content = mutated(sound[:header], draw) + sound[header:]
        path.write_bytes(content)
        try:
            refusal(load)
        except Exception as error:  # anything but an InputError
            raise AssertionError(f"mutation {i} of {path}, seed {seed}: {error!r}") from error
        survived += 1
        path.write_bytes(sound)
    record("B5 mutated files", count, survived)


def test_mutated_files_are_refused_or_load(places):
    sweep(places, 300, seed=1)


@pytest.mark.faults
def test_ten_thousand_mutated_files_are_refused_or_load(places):
    sweep(places, 10_000, seed=2)


# --- B6: sizes ----------------------------------------------------------------------------------------------------

SIZES = [10**9, 10**12, 2**63, 2**64, -1, -(10**9), 10_000_000, 9_999_999, 1_000_000, 0, 2.5, "7", "x" * 10_000, NAN]

FREE = {("sample_size",), ("preprocess_cfg", "size")}  # nothing here depends on them


def numbers_in(value: Any, keys: tuple = ()) -> Iterator[tuple]:
    if isinstance(value, int) and not isinstance(value, bool):
        yield keys
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield from numbers_in(part, (*keys, key))


def replaced(config: Any, keys: tuple, value: Any) -> Any:
    changed = json.loads(json.dumps(config))
    inner = changed
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    return changed


def test_sizes_that_the_weights_do_not_have_are_refused_before_anything_is_allocated(places):
    injected = survived = 0
    for folder, _, load in places[4:8] + places[-2:]:
        path = config_of(folder)
        sound = path.read_text()
        for keys in set(numbers_in(json.loads(sound))) - FREE:
            for value in SIZES:
                path.write_text(json.dumps(replaced(json.loads(sound), keys, value)))
                injected += 1
                with memory(100):
                    survived += bool(refusal(load, folder))
        path.write_text(sound)
    record("B6 size in a configuration", injected, survived)


def test_many_blocks_of_nothing_are_refused(tmp_path, runs):
    """Sizes that fit the numbers of values in the weights, and still would take hours to build."""
    folder = copied(runs / "prior/model", tmp_path / "prior")
    tensors = load_file(folder / WEIGHTS)
    tensors["spare"] = torch.zeros(10**7, dtype=torch.float16)
    save_file(tensors, folder / WEIGHTS)
    refused = []
    for change in ({"depth": 9_999_999}, {"width": 9_999_936}, {"context_length": 9_999_999}, {"null_length": 10**6}):
        sound = (folder / "config.json").read_text()
        edit(folder / "config.json", **change)
        with memory(100):
            refused.append("larger model" in refusal(lambda: load_model(Prior, folder)))
        (folder / "config.json").write_text(sound)
    record("B6 model larger than its weights", len(refused), sum(refused))


def test_positions_that_open_clip_computes_outside_of_torch_are_limited(public, tmp_path):
    folder = copied(public["open_clip"], tmp_path / "open_clip")
    config = json.loads(config_of(folder).read_text())
    config["model_cfg"]["vision_cfg"] |= {"pos_embed_type": "sin_cos_2d", "image_size": 100_000, "patch_size": 1}
    config_of(folder).write_text(json.dumps(config))
    with memory(50):
        assert "table of positions" in refusal(lambda: load_clip(f"local-dir:{folder}"))


def test_schedulers_with_endless_timesteps_are_refused(runs, pipeline_folder, tmp_path):
    folder = copied(pipeline_folder, tmp_path / "model")
    stage = copied(runs / "prior/scheduler", tmp_path / "scheduler")
    changes = [{"num_train_timesteps": value} for value in (10**6, 10**12, -(10**6), 2**70, "x", NAN, [])]
    changes += [{"trained_betas": "x"}, {"beta_schedule": "os.system"}, {"prediction_type": NAN}]
    refused = []
    for change in changes:
        edit(stage / "scheduler_config.json", **change)
        refused.append(bool(refusal(load_scheduler, stage)))
        shutil.copy(stage / "scheduler_config.json", folder / "prior_scheduler")
        refused.append(bool(refusal(Text2ImagePipeline.from_pretrained, folder)))
        shutil.copy(runs / "prior/scheduler/scheduler_config.json", stage)
    record("B6 scheduler", len(refused), sum(refused))


def test_vocabularies_that_do_more_than_split_captions_are_refused(runs, tmp_path):
    """A padding or a pattern would strike only when a prompt is encoded."""
    folder = copied(runs / "clip/model", tmp_path / "clip")
    path = folder / "tokenizer.json"
    sound = json.loads(path.read_text())
    padding = {"strategy": {"Fixed": 10**12}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    pattern = {"type": "Split", "pattern": {"Regex": "(a+)+$"}, "behavior": "Isolated", "invert": False}
    cut = {"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0}
    end = max(token["id"] for token in sound["added_tokens"])
    more = [*sound["added_tokens"], sound["added_tokens"][-1] | {"id": end + 1, "content": "<more>"}]
    changes: list[dict[str, Any]] = [
        {"padding": padding},
        {"pre_tokenizer": pattern},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "(a+)+$"}, "content": "x" * 1000}},
        {"normalizer": {"type": "Prepend", "prepend": "x" * 100_000}},
        {"truncation": cut},
        {"decoder": None},
        {"model": sound["model"] | {"dropout": 0.5}},
        {"model": sound["model"] | {"vocab": {}, "merges": []}},
        {"model": sound["model"] | {"vocab": sound["model"]["vocab"] | {"far": 2**32 - 1}}},
        {"added_tokens": []},
        {"added_tokens": more},
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}},
    ]
    survived = 0
    for change in changes:
        path.write_text(json.dumps(sound | change))
        survived += str(path) in refusal(load_clip, folder)
    path.write_text(json.dumps(sound))
    load_clip(folder)
    record("B6 vocabulary", len(changes), survived)


# --- B7: no such model --------------------------------------------------------------------------------------------


def test_what_is_no_model_folder_is_refused_at_once_and_by_name(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    loads: list[Callable[[Any], Any]] = [
        Text2ImagePipeline.from_pretrained,
        load_clip,
        load_autoencoder,
        lambda name: load_model(Prior, name),
        lambda name: load_clip(f"local-dir:{name}"),
        lambda name: load_clip(f"hf-hub:{name}"),
        lambda name: assemble_pipeline_folder(name, tmp_path / "out"),
    ]
    names = [str(tmp_path / name) for name in ("missing", "empty", "file", "link", "file/x")]
    names += ["someone/model", "no-such-model", "x" * 5000, "a\0b", "a/b/c/d", "../x", "\udcff"]
    injected = survived = 0
    for load in loads:
        for name in names:
            injected += 1
            start = time.perf_counter()
            said = refusal(load, name)
            survived += repr(name)[1:-1][:40] in said and time.perf_counter() - start < 5
    assert not (tmp_path / "out").exists()
    record("B7 no such model", injected, survived)


@pytest.mark.parametrize("silent", [False, True], ids=["nobody listens", "nobody answers"])
def test_without_a_network_no_loader_waits(tmp_path, monkeypatch, silent):
    """Not told to be offline: the hub is a port where nobody listens, or where nobody answers."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("t2i.files.hub.HUB_TIMEOUT", 0.5)
    said = []
    with socket.socket() as hub:
        hub.bind(("127.0.0.1", 0))
        if silent:
            hub.listen(16)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        for load in (Text2ImagePipeline.from_pretrained, load_autoencoder, lambda name: load_clip(f"hf-hub:{name}")):
            start = time.perf_counter()
            said.append(refusal(load, "someone/model"))
            assert time.perf_counter() - start < 5
    record("B7 no network", len(said), sum("or no hub" in one for one in said))
