"""Of a repository on the hub, what a model is read from is fetched, and nothing beside it."""

import shutil
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from t2i.pipelines.text2image import Text2ImagePipeline

from t2i.errors import InputError
from t2i.interop.fetching import fetch_model_folder
from t2i.interop.parts import find_public_part
from tests.helpers.kandinsky_folders import kandinsky_22_combined, kandinsky_22_decoder, tiny_kandinsky_unet
from tests.helpers.public_folders import tiny_prior_transformer

NAME = "someone/model"


class Hub:
    """A repository, and what was asked of it.

    place: of its files. snapshot: where they are fetched to. fetched: by each download. asked: of the list of files.
    """

    def __init__(self, folder: Path):
        self.place, self.snapshot = folder / "repository", folder / "snapshot"
        self.fetched: list[set[str]] = []
        self.asked: list[dict[str, Any]] = []

    def files(self) -> list[str]:
        return sorted(path.relative_to(self.place).as_posix() for path in self.place.rglob("*") if path.is_file())

    def model_info(self, name: str, **options: Any) -> SimpleNamespace:
        self.asked.append(options)
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=file) for file in self.files()])

    def snapshot_download(self, name: str, allow_patterns: list[str], **options: Any) -> str:
        files = [file for file in self.files() if any(fnmatch(file, pattern) for pattern in allow_patterns)]
        for file in files:
            (self.snapshot / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(self.place / file, self.snapshot / file)
        self.fetched.append(set(files))
        return str(self.snapshot)

    def weights(self) -> list[str]:
        """That were fetched, after the configurations."""
        first, *others = self.fetched
        assert all(file.endswith((".json", ".txt")) for file in first)
        return sorted(set().union(*others) - first)

    def add(self, *files: str) -> None:
        for file in files:
            (self.place / file).parent.mkdir(parents=True, exist_ok=True)
            (self.place / file).write_bytes(b"")


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], Hub]:
    def made(folder: Path) -> Hub:
        hub = Hub(tmp_path)
        shutil.copytree(folder, hub.place)
        monkeypatch.setattr("t2i.files.hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("t2i.files.hub.HfApi", lambda: hub)
        monkeypatch.setattr("t2i.interop.fetching.snapshot_download", hub.snapshot_download)
        return hub

    return made


def pickled(hub: Hub, *places: str) -> None:
    for place in places:
        for path in (hub.place / place).glob("*.safetensors"):
            path.rename(path.with_suffix(".bin"))


UNET, MOVQ = "unet/diffusion_pytorch_model", "movq/diffusion_pytorch_model"
BESIDE = ("checkpoint.safetensors", "safety_checker/model.safetensors", "unet/other.safetensors", f"{UNET}.bin")


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_the_weights_of_the_layout_s_parts_are_fetched_in_one_variant(repository, variant):
    hub = repository(kandinsky_22_decoder())
    hub.add(*BESIDE, f"{UNET}.fp16.safetensors", f"{UNET}.ema.safetensors")
    Text2ImagePipeline.download(NAME, variant=variant)
    assert hub.weights() == [f"{MOVQ}.safetensors", f"{UNET}{'.fp16' if variant else ''}.safetensors"]


def test_the_files_of_an_index_are_fetched(repository):
    hub = repository(kandinsky_22_decoder())
    shutil.rmtree(hub.place / "unet")
    for variant in (None, "fp16"):
        tiny_kandinsky_unet("2.2").save_pretrained(hub.place / "unet", max_shard_size="100KB", variant=variant)
    (hub.place / f"{UNET}.safetensors").write_bytes(b"")
    shards = {"fp16": [file for file in hub.files() if ".fp16-0" in file]}
    shards[None] = [file for file in hub.files() if "unet/diffusion_pytorch_model-0" in file]
    assert min(map(len, shards.values())) > 1
    for variant, expected in shards.items():
        hub.fetched.clear()
        Text2ImagePipeline.download(NAME, variant=variant)
        assert hub.weights() == [f"{MOVQ}.safetensors", *sorted(expected)]


@pytest.mark.parametrize("index", [False, True])
def test_a_part_that_is_a_pickle_alone_is_refused_before_weights_are_fetched(index, repository, tmp_path):
    hub = repository(kandinsky_22_combined())
    pickled(hub, "unet", "prior_image_encoder")
    asked = f"{UNET}.bin"
    if index:
        asked += ".index.json"
        hub.add(asked)
    how = f"`hf download {NAME} --local-dir FOLDER` and `t2i convert FOLDER` make that of it"
    for fetch in (Text2ImagePipeline.from_pretrained, lambda name: find_public_part(name, ("unet",))):
        hub.fetched.clear()
        with pytest.raises(InputError) as caught:
            fetch(NAME)
        assert str(caught.value) == f"{NAME!r} on the hub has {asked!r}, but only .safetensors is loaded; {how}"
        assert hub.weights() == []
    find_public_part(NAME, ("movq",))  # which is there


def test_weights_that_come_in_one_variant_alone_are_fetched_and_of_several_one_must_be_chosen(repository):
    hub = repository(kandinsky_22_decoder())
    (hub.place / f"{MOVQ}.safetensors").rename(hub.place / f"{MOVQ}.fp16.safetensors")
    Text2ImagePipeline.download(NAME)
    assert hub.weights() == [f"{MOVQ}.fp16.safetensors", f"{UNET}.safetensors"]
    hub.fetched.clear()
    hub.add(f"{MOVQ}.bf16.safetensors")
    with pytest.raises(InputError, match="in the variants bf16 and fp16 alone; choose one by variant, or --variant"):
        Text2ImagePipeline.download(NAME)
    assert hub.weights() == []
    Text2ImagePipeline.download(NAME, variant="bf16")
    assert hub.weights() == [f"{MOVQ}.bf16.safetensors", f"{UNET}.safetensors"]


def test_a_variant_that_the_repository_has_not_is_told_in_the_log(repository, caplog):
    hub = repository(kandinsky_22_decoder())
    hub.add(f"{UNET}.fp16.safetensors")
    Text2ImagePipeline.download(NAME, variant="bf16")
    assert f"{NAME} has no variant 'bf16' (it has: fp16): plain files are fetched" in caplog.text


def test_of_an_own_pipeline_its_parts_are_fetched_and_it_loads(repository, pipeline_folder):
    hub = repository(pipeline_folder)
    hub.add("run/step-00000001/model.safetensors", "decoder/ema.safetensors", "old.safetensors", "unet/model.bin")
    pipeline = Text2ImagePipeline.from_pretrained(NAME)
    expected = Text2ImagePipeline.from_pretrained(pipeline_folder)
    assert torch.equal(pipeline.prior.query, expected.prior.query)
    assert {Path(file).name for file in hub.weights()} == {"diffusion_pytorch_model.safetensors"}
    assert {Path(file).parent.name for file in hub.weights()} == {"autoencoder", "clip", "decoder", "prior"}


def test_of_a_foreign_pipeline_no_weights_are_fetched_and_of_no_pipeline_all(repository):
    hub = repository(kandinsky_22_decoder())
    index = hub.place / "model_index.json"
    index.write_text(index.read_text().replace("KandinskyV22Pipeline", "SomeOtherPipeline"))
    with pytest.raises(InputError, match="is of 'SomeOtherPipeline'"):
        Text2ImagePipeline.from_pretrained(NAME)
    assert hub.weights() == []
    index.unlink()
    shutil.rmtree(hub.snapshot)
    hub.fetched.clear()
    Text2ImagePipeline.download(NAME)
    assert hub.weights() == [f"{MOVQ}.safetensors", f"{UNET}.safetensors"]


def test_a_prior_alone_is_fetched_for_training_too(repository, tmp_path):
    tiny_prior_transformer().save_pretrained(tmp_path / "prior")
    hub = repository(tmp_path / "prior")
    hub.add("pytorch_lora_weights.safetensors")
    found = find_public_part(NAME, ("prior",), ("text_tower",))
    assert found is not None and found.folder == hub.snapshot
    assert hub.weights() == ["diffusion_pytorch_model.safetensors"]


def test_the_list_is_that_of_the_revision_and_is_not_asked_for_without_the_hub(repository):
    hub = repository(kandinsky_22_decoder())
    fetch_model_folder(NAME, revision="v1", token="secret")
    assert [(one["revision"], one["token"]) for one in hub.asked] == [("v1", "secret")]
    hub.fetched.clear()
    hub.add("checkpoint.safetensors")
    fetch_model_folder(NAME, local_files_only=True)
    assert len(hub.asked) == len(hub.fetched) == 1
    assert "checkpoint.safetensors" in hub.fetched[0]
