"""`t2i convert` and `t2i parity`: models in other layouts, weights out of pickles, and the reference beside them."""

import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, KandinskyV22CombinedPipeline, PriorTransformer
from safetensors.torch import load_file, save_file
from t2i.pipelines.jobs.convert import convert_folder
from t2i.pipelines.text2image import Text2ImagePipeline

from t2i import cli
from t2i.diffusion.inpainting import concat_masked_latents
from t2i.errors import InputError
from t2i.interop.pickles import convert_weights, read_pickle
from tests.helpers.dalle2_folders import dalle2
from tests.helpers.kandinsky_folders import (
    kandinsky_21_combined,
    kandinsky_21_inpaint,
    kandinsky_21_prior,
    kandinsky_22_combined,
    kandinsky_22_controlnet,
    kandinsky_22_inpaint,
    kandinsky_22_prior,
)
from tests.helpers.karlo_folders import karlo, karlo_variations
from tests.helpers.public_folders import save_eclipse_prior
from tests.helpers.stable_unclip_folders import stable_unclip, stable_unclip_images

BUILDERS: dict[str, Callable[[], Path]] = {
    "karlo": karlo,
    "karlo-variations": karlo_variations,
    "kandinsky-2-2-combined": kandinsky_22_combined,
    "kandinsky-2-1-combined": kandinsky_21_combined,
    "stable-unclip": stable_unclip_images,
    "stable-unclip-text": stable_unclip,
}


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["t2i", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return int(ended.value.code or 0)


@pytest.mark.parametrize("name", BUILDERS)
def test_a_model_comes_back_from_this_projects_layout_with_every_tensor(name: str, tmp_path: Path) -> None:
    source = BUILDERS[name]()
    ours = convert_folder(str(source), tmp_path / "ours")
    back = convert_folder(str(ours), tmp_path / "back", name)
    index = json.loads((back / "model_index.json").read_text())
    expected = json.loads((source / "model_index.json").read_text())
    assert {key: value for key, value in index.items() if key[0] != "_"} == {
        key: value for key, value in expected.items() if key[0] != "_"
    }
    compared = 0
    for path in source.rglob("*.safetensors"):
        before, after = load_file(path), load_file(back / path.relative_to(source))
        assert before.keys() == after.keys(), path
        for key, tensor in before.items():
            assert torch.equal(after[key], tensor), (path, key)
            compared += 1
    assert compared > 100
    Text2ImagePipeline.from_pretrained(back)


def test_what_is_written_for_kandinsky_loads_in_diffusers_and_draws_the_same(tmp_path: Path) -> None:
    source = kandinsky_22_combined()
    back = convert_folder(str(source), tmp_path / "back", "kandinsky-2-2-combined")
    pictures = []
    for folder in (source, back):
        pipeline = DiffusionPipeline.from_pretrained(folder)
        assert isinstance(pipeline, KandinskyV22CombinedPipeline)
        generator = torch.Generator().manual_seed(0)
        z_i, nothing = pipeline.prior_pipe("a cat", num_inference_steps=2, generator=generator, return_dict=False)
        settings = {"num_inference_steps": 2, "height": 16, "width": 16, "output_type": "pt"}
        drawn = pipeline.decoder_pipe(z_i, nothing, generator=generator, **settings).images
        pictures.append(drawn)
    torch.testing.assert_close(*pictures)


def test_parts_are_exported_alone(tmp_path: Path) -> None:
    """A combined Kandinsky as its prior's folder, and as a PriorTransformer."""
    folder = convert_folder(str(kandinsky_22_combined()), tmp_path / "prior", "kandinsky-2-2-prior")
    assert sorted(path.name for path in folder.iterdir() if path.is_dir()) == [
        "image_encoder",
        "image_processor",
        "prior",
        "scheduler",
        "text_encoder",
        "tokenizer",
    ]
    alone = convert_folder(str(kandinsky_22_combined()), tmp_path / "alone", "prior-transformer", fp16=True)
    assert PriorTransformer.from_pretrained(alone, torch_dtype=torch.float16).dtype == torch.float16


def test_an_eclipse_prior_is_exported_as_it_came(tmp_path: Path) -> None:
    save_eclipse_prior(tmp_path / "prior")
    ours = convert_folder(str(kandinsky_22_combined()), tmp_path / "ours", prior=str(tmp_path / "prior"))
    back = convert_folder(str(ours), tmp_path / "back", "prior-transformer")
    before, after = (load_file(folder / "diffusion_pytorch_model.safetensors") for folder in (tmp_path / "prior", back))
    assert before.keys() == after.keys()
    for key in before.keys() - {"clip_mean", "clip_std"}:  # which nothing reads
        assert torch.equal(before[key], after[key]), key
    Text2ImagePipeline.from_pretrained(kandinsky_22_combined(), prior=back)


def test_parity_of_this_projects_own_folder_has_no_reference(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    assert run(monkeypatch, "parity", pipeline_folder) == 2
    assert "is in this project's own layout, which no other library loads" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("source", "to", "said"),
    [
        (
            karlo,
            "kandinsky-2-2",
            "the decoder is a KarloDecoder; kandinsky-2-2 holds the weights of a KandinskyDecoder",
        ),
        (karlo, "karlo-variations", "CLIP has no image encoder, which karlo-variations holds"),
        (karlo_variations, "karlo", "the prior is nothing; karlo holds the weights of a Prior"),
        (kandinsky_22_combined, "kandinsky-2-1", "the text encoder is nothing"),
        (kandinsky_22_combined, "kandinsky-2-2-controlnet", "the decoder is no ControlNet"),
        (kandinsky_21_combined, "kandinsky-2-2", "the decoder reads captions, that of kandinsky-2-2 reads none"),
        (karlo, "dall-e", "no layout 'dall-e'; there are t2i"),
    ],
)
def test_what_no_layout_can_hold_is_refused_with_the_reason(
    source: Callable[[], Path], to: str, said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        convert_folder(str(source()), tmp_path / "new", to)
    assert not list(tmp_path.iterdir())


def test_this_projects_own_decoder_is_in_no_public_layout(pipeline_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the decoder is a UNetDecoder; karlo holds the weights of a KarloDecoder"):
        convert_folder(str(pipeline_folder), tmp_path / "new", "karlo")


@pytest.mark.parametrize("wrapper", [None, "state_dict"])
def test_weights_of_a_pickle_become_safetensors_by_which_the_model_loads(
    wrapper: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(shutil.copytree(kandinsky_22_combined(), tmp_path / "model"))
    weights = folder / "movq" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    torch.save({wrapper: tensors} if wrapper else tensors, weights.with_suffix(".bin"))
    weights.unlink()
    with pytest.raises(InputError, match="`t2i convert "):
        Text2ImagePipeline.from_pretrained(folder)
    assert run(monkeypatch, "convert", weights.with_suffix(".bin")) == 0
    for key, tensor in load_file(weights).items():
        assert torch.equal(tensor, tensors[key])
    Text2ImagePipeline.from_pretrained(folder)


def test_shards_of_a_pickle_are_converted_by_their_index(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.zeros(2)}, tmp_path / "pytorch_model-00002-of-00002.bin")
    table = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": table}))
    made = convert_weights(tmp_path / "pytorch_model.bin.index.json")
    assert made.name == "model.safetensors.index.json"
    assert json.loads(made.read_text())["weight_map"]["b"] == "model-00002-of-00002.safetensors"
    assert torch.equal(load_file(tmp_path / "model-00002-of-00002.safetensors")["b"], torch.zeros(2))


def test_all_pickles_of_a_folder_are_converted_beside_themselves_and_what_holds_no_weights_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for place, name in {"unet": "diffusion_pytorch_model.fp16.bin", "text encoder": "pytorch_model.bin"}.items():
        (tmp_path / place).mkdir()
        torch.save({place: torch.ones(2)}, tmp_path / place / name)
    torch.save({"a": torch.ones(2)}, tmp_path / "pytorch_model-00001-of-00001.bin")
    index = {"weight_map": {"a": "pytorch_model-00001-of-00001.bin"}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    torch.save({"step": 3}, tmp_path / "optimizer.bin")
    (tmp_path / "unet/pointer.bin").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    torch.save({"done": torch.ones(1)}, tmp_path / "done.pt")
    save_file({"done": torch.zeros(1)}, tmp_path / "done.safetensors")
    assert run(monkeypatch, "convert", tmp_path) == 2
    captured = capsys.readouterr()
    made = ["model.safetensors.index.json", "text encoder/model.safetensors"]
    made.append("unet/diffusion_pytorch_model.fp16.safetensors")
    assert [str(Path(line).relative_to(tmp_path)) for line in captured.out.splitlines()] == made
    assert "2 of 5 files were left out" in captured.err and "Git LFS pointer" in captured.err
    assert torch.equal(load_file(tmp_path / "model-00001-of-00001.safetensors")["a"], torch.ones(2))
    assert torch.equal(load_file(tmp_path / "done.safetensors")["done"], torch.zeros(1))
    (tmp_path / "optimizer.bin").unlink()
    (tmp_path / "unet/pointer.bin").unlink()
    assert run(monkeypatch, "convert", tmp_path) == 2
    assert "has no pickles to convert" in capsys.readouterr().err


class Trap:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_a_pickle_with_code_is_refused_and_nothing_of_it_runs(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    torch.save({"weight": torch.ones(1), "trap": Trap(sprung)}, tmp_path / "model.bin")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Trap(sprung)))
    for name, fault in {"model.bin": "holds a 'getattr', which is no weights", "plain.ckpt": "or is damaged"}.items():
        with pytest.raises(InputError, match=f"{fault}; nothing of it was run$"):
            read_pickle(tmp_path / name)
    assert not sprung.exists()


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("of_torch", [True, False])
def test_a_refused_pickle_is_told_in_one_plain_line_without_torchs_advice(
    protocol: int, of_torch: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Whatever wrote it. A warning would be an error here, as all are."""
    torch.save({"call": os.system}, tmp_path / "e.bin", pickle_protocol=protocol)
    if not of_torch:
        (tmp_path / "e.bin").write_bytes(pickle.dumps({"call": os.system}, protocol=protocol))
    assert run(monkeypatch, "convert", tmp_path / "e.bin") == 2
    said = capsys.readouterr().err
    assert said[:-1].isprintable() and said[-1] == "\n"  # no line end, no colour
    assert "nothing of it was run" in said and "weights_only" not in said
    assert f"{os.system.__module__}.system" in said or protocol == 4  # whose marks torch's reader does not know


def test_other_things_than_tensors_are_named(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1), "step": 3}, tmp_path / "model.bin")
    with pytest.raises(InputError, match="has 'step', a int, where only tensors belong"):
        convert_weights(tmp_path / "model.bin")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(InputError, match="holds a list, not the tensors of a model by name"):
        convert_weights(tmp_path / "list.pt")


INPAINTING = {
    "kandinsky-2-2-controlnet": (kandinsky_22_controlnet, kandinsky_22_prior),
    "kandinsky-2-2-inpaint": (kandinsky_22_inpaint, kandinsky_22_prior),
    "kandinsky-2-1-inpaint": (kandinsky_21_inpaint, kandinsky_21_prior),
}


@pytest.mark.parametrize("name", [*BUILDERS, *INPAINTING])
def test_parity_finds_no_difference_with_and_without_guidance(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    if name in INPAINTING:
        decoder, prior = INPAINTING[name]
        places: list[object] = [decoder(), "--prior", prior()]
    else:
        places = [BUILDERS[name]()]
    for scale in (4, 1):
        assert run(monkeypatch, "parity", *places, "--steps", 3, "--guidance-scale", scale) == 0
        stages = [line.rsplit(maxsplit=1)[0] for line in capsys.readouterr().out.splitlines()]
        assert stages[-1] == "final image" and "decoder output" in stages
        assert ("super-resolution" in stages) == name.startswith("karlo")


def test_parity_finds_a_difference_and_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    from t2i.networks.public.movq import MoVQ

    decode = MoVQ.decode
    monkeypatch.setattr(MoVQ, "decode", lambda self, latents: decode(self, latents) + 0.001)
    assert run(monkeypatch, "parity", kandinsky_22_combined(), "--steps", 2) == 1
    printed = capsys.readouterr().out
    assert "beyond the tolerance of 0.0001" in printed
    assert float(printed.split("final image")[1].split()[0]) > 2e-4


def test_parity_of_a_decoder_that_inpaints_gives_it_half_of_a_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(
        "t2i.interop.parity.concat_masked_latents", lambda latents, mask: concat_masked_latents(latents, 1 - mask)
    )
    decoder, prior = kandinsky_22_inpaint(), kandinsky_22_prior()
    assert run(monkeypatch, "parity", decoder, "--prior", prior, "--steps", 2) == 1
    found = dict(line.rsplit(maxsplit=1) for line in capsys.readouterr().out.splitlines()[:-1])
    assert float(found["prior embedding"]) < 1e-4 < float(found["decoder output"])


def test_parity_refuses_what_no_public_class_draws_before_it_loads_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(Text2ImagePipeline, "from_pretrained", lambda *_, **__: pytest.fail("it was loaded"))
    save_eclipse_prior(tmp_path / "eclipse")
    refused = {"which no public class draws with": tmp_path / "eclipse", "is in this project's own layout": dalle2()}
    for said, prior in refused.items():
        assert run(monkeypatch, "parity", kandinsky_22_combined(), "--prior", prior) == 2
        captured = capsys.readouterr()
        assert said in captured.err and not captured.out


@pytest.mark.parametrize("options", [("--variant", "fp16"), ()], ids=["named", "the only one"])
def test_parity_takes_a_folder_where_only_some_parts_have_the_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, options: tuple[str, ...]
) -> None:
    folder = tmp_path / "karlo"
    shutil.copytree(karlo(), folder)
    for weights in folder.glob("*/diffusion_pytorch_model.safetensors"):
        weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert (folder / "text_encoder" / "model.safetensors").is_file()
    assert run(monkeypatch, "parity", folder, *options, "--steps", 2) == 0, capsys.readouterr().err
