"""Every public layout through the one door: it draws, is saved and loads again, in any dtype; and what is refused."""

import gc
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from t2i.pipelines.image_variation import ImageVariationPipeline
from t2i.pipelines.text2image import Text2ImagePipeline
from torch import nn

from t2i import cli
from t2i.errors import InputError
from t2i.files.component import Component
from t2i.interop.layouts import DEFAULT_PRIORS
from tests.helpers.kandinsky_folders import (
    kandinsky_21_combined,
    kandinsky_21_decoder,
    kandinsky_21_prior,
    kandinsky_22_combined,
    kandinsky_22_decoder,
    kandinsky_22_inpaint,
    kandinsky_22_prior,
)
from tests.helpers.karlo_folders import karlo, karlo_variations
from tests.helpers.public_folders import save_eclipse_prior, tiny_prior_transformer, tiny_text_tower
from tests.helpers.stable_unclip_folders import stable_unclip

WHOLE = {
    "karlo": (karlo, None),
    "karlo variations with karlo's prior": (karlo_variations, karlo),
    "kandinsky 2.2": (kandinsky_22_decoder, kandinsky_22_prior),
    "kandinsky 2.2, the prior first": (kandinsky_22_prior, kandinsky_22_decoder),
    "kandinsky 2.2 combined": (kandinsky_22_combined, None),
    "kandinsky 2.2 inpainting": (kandinsky_22_inpaint, kandinsky_22_prior),
    "kandinsky 2.1": (kandinsky_21_decoder, kandinsky_21_prior),
    "kandinsky 2.1 combined": (kandinsky_21_combined, None),
    "stable unclip": (stable_unclip, None),
}
ONE_EACH = ("karlo", "kandinsky 2.2", "kandinsky 2.1", "stable unclip")
PROMPTS = ["a red cat", "dog"]


def load(name: str, **settings: Any) -> Text2ImagePipeline:
    folder, prior = WHOLE[name]
    named = {} if prior is None else {"prior": prior()}
    return still(Text2ImagePipeline.from_pretrained(folder(), **named | settings))


def still(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: Text2ImagePipeline, **settings: Any) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(number) for number in (5, 6)]
    steps = {"prior_num_inference_steps": 2, "num_inference_steps": 2}
    if pipeline.is_cascade:
        steps["super_res_num_inference_steps"] = 2
    return pipeline(PROMPTS, generator=generators, output_type="pt", **steps | settings).images


def copied(folder: Path, target: Path) -> Path:
    return Path(shutil.copytree(folder, target))


def rewrite(path: Path, change: Callable[[dict], object]) -> None:
    """A JSON file changed in place."""
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", WHOLE)
def test_a_model_draws_and_draws_the_same_after_saving(name: str, tmp_path: Path) -> None:
    pipeline = load(name)
    drawn = draw(pipeline)
    assert drawn.shape[:2] == (2, 3) and drawn.std() > 0.01 and (drawn[0] != drawn[1]).any()
    pipeline.save_pretrained(tmp_path / "ours")
    again = still(Text2ImagePipeline.from_pretrained(tmp_path / "ours"))
    torch.testing.assert_close(draw(again), drawn, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ONE_EACH)
def test_weights_are_read_in_the_dtype_that_is_asked_for(name: str) -> None:
    pipeline = load(name, dtype=torch.bfloat16)
    for part in pipeline.components.values():
        if isinstance(part, torch.nn.Module):
            held = [tensor for tensor in part.state_dict().values() if tensor.is_floating_point()]
            assert {tensor.dtype for tensor in held} == {torch.bfloat16}
    assert draw(pipeline).isfinite().all()


def test_files_of_a_variant_are_read_as_they_are_stored(tmp_path: Path) -> None:
    folder = copied(kandinsky_22_combined(), tmp_path / "model")
    for place, stem in (("unet", "diffusion_pytorch_model"), ("prior_text_encoder", "model")):
        half = {name: tensor.half() for name, tensor in load_file(folder / place / f"{stem}.safetensors").items()}
        save_file(half, folder / place / f"{stem}.fp16.safetensors", metadata={"format": "pt"})
        (folder / place / f"{stem}.safetensors").unlink()
    pipeline = Text2ImagePipeline.from_pretrained(folder, variant="fp16")
    assert pipeline.decoder.dtype == torch.float16 and pipeline.autoencoder.dtype == torch.float32


def test_weights_in_several_files_with_an_index_are_the_same(tmp_path: Path) -> None:
    folder = copied(kandinsky_22_combined(), tmp_path / "model")
    UNet2DConditionModel.from_pretrained(folder / "unet").save_pretrained(tmp_path / "unet", max_shard_size="20KB")
    shutil.rmtree(folder / "unet")
    (tmp_path / "unet").rename(folder / "unet")
    assert len(list((folder / "unet").glob("*.safetensors"))) > 2
    whole, parts = load("kandinsky 2.2 combined").decoder, Text2ImagePipeline.from_pretrained(folder).decoder
    for name, tensor in whole.state_dict().items():
        assert torch.equal(parts.state_dict()[name], tensor)


def test_components_that_are_given_replace_those_of_the_folder() -> None:
    scheduler, decoder = DDIMScheduler(), load("kandinsky 2.2").decoder
    pipeline = load("kandinsky 2.2", decoder=decoder, decoder_scheduler=scheduler)
    assert pipeline.decoder is decoder and pipeline.decoder_scheduler is scheduler


def test_a_decoder_on_the_hub_finds_its_usual_prior(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {"kandinsky-community/kandinsky-2-2-decoder": kandinsky_22_decoder()}
    folders["kandinsky-community/kandinsky-2-2-prior"] = kandinsky_22_prior()
    monkeypatch.setattr(Text2ImagePipeline, "download", lambda name, **_: str(folders[name]))
    assert DEFAULT_PRIORS["kandinsky-community/kandinsky-2-2-decoder"] in folders
    pipeline = Text2ImagePipeline.from_pretrained("kandinsky-community/kandinsky-2-2-decoder")
    assert pipeline.prior is not None and pipeline.clip.image_encoder is not None


def test_a_prior_alone_takes_the_place_of_a_models_own(tmp_path: Path) -> None:
    tiny_prior_transformer(seed=9).save_pretrained(tmp_path / "prior")
    own, other = load("kandinsky 2.2 combined"), load("kandinsky 2.2 combined", prior=tmp_path / "prior")
    assert not torch.equal(own.prior.query, other.prior.query)
    assert type(other.prior_scheduler) is type(own.prior_scheduler)
    settings = {"prior": str(tmp_path / "prior"), "clip": str(kandinsky_22_prior())}
    apart = Text2ImagePipeline.from_pretrained(kandinsky_22_decoder(), **settings)
    assert torch.equal(apart.prior.query, other.prior.query)


def test_a_model_without_a_prior_varies_pictures() -> None:
    pipeline = still(ImageVariationPipeline.from_pretrained(karlo_variations()))
    picture = torch.rand(1, 3, 16, 16)
    steps = {"num_inference_steps": 2, "super_res_num_inference_steps": 2}
    assert pipeline.prior is None
    images = pipeline(picture, generator=torch.Generator().manual_seed(0), output_type="pt", **steps).images
    assert images.isfinite().all()


def test_a_prior_that_was_trained_here_takes_the_place_of_a_models_own(tmp_path: Path) -> None:
    """In a public folder, and in one of this project."""
    whole = load("kandinsky 2.2 combined")
    whole.save_pretrained(tmp_path / "ours")
    whole.prior.query.add_(1)
    whole.prior.save_pretrained(tmp_path / "run" / "model")
    DDIMScheduler(prediction_type="sample").save_pretrained(tmp_path / "run" / "scheduler")
    for pipeline in (
        load("kandinsky 2.2 combined", prior=tmp_path / "run"),
        Text2ImagePipeline.from_pretrained(tmp_path / "ours", prior=str(tmp_path / "run")),
    ):
        assert torch.equal(pipeline.prior.query, whole.prior.query)
        assert isinstance(pipeline.prior_scheduler, DDIMScheduler)
        assert draw(still(pipeline)).isfinite().all()


def test_commands_draw_with_a_public_model_in_two_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")
    mask = Image.new("L", (16, 16), 255)
    mask.paste(0, (0, 0, 16, 8))
    mask.save(tmp_path / "mask.png")
    model = [
        "--model",
        str(kandinsky_22_decoder()),
        "--prior",
        str(kandinsky_22_prior()),
        "--seed",
        "1",
        "--steps",
        "2",
    ]
    red = str(tmp_path / "red.png")
    commands = [
        ["generate", "a cat", "--prior-steps", "2"],
        ["variations", red],
        ["inpaint", red, str(tmp_path / "mask.png")],
        ["interpolate", red, "a dog", "--frames", "2", "--prior-steps", "2", "--new-noise"],
    ]
    for number, command in enumerate(commands):
        monkeypatch.setattr(sys, "argv", ["t2i", *command, *model, "--out", str(tmp_path / f"out{number}")])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert not ended.value.code, command
        with Image.open(next((tmp_path / f"out{number}").glob("*.png"))) as drawn:
            assert drawn.size == (16, 16)
            assert "kandinsky_22_prior" in "".join(map(str, drawn.info.values()))


class Recorder(ModelHook):
    """Writes down whose turn it is, as accelerate's offloading hook moves it to the device."""

    def __init__(self, name: str, turns: list[str]):
        self.name, self.turns = name, turns

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.turns[-1:] != [self.name]:
            self.turns.append(self.name)
        return args, kwargs


@pytest.mark.parametrize("name", ONE_EACH)
def test_components_take_their_turns_in_the_order_of_offloading(name: str) -> None:
    pipeline, turns = load(name), []
    order = pipeline.model_cpu_offload_seq.split("->")
    used = [part for part in order if getattr(pipeline, part, None) is not None]
    for part in used:
        add_hook_to_module(getattr(pipeline, part), Recorder(part, turns))
    draw(pipeline)
    assert turns == used


def test_an_eclipse_prior_draws_with_a_kandinsky_decoder(tmp_path: Path) -> None:
    save_eclipse_prior(tmp_path / "prior")
    pipeline = load("kandinsky 2.2 combined", prior=tmp_path / "prior")
    assert type(pipeline.prior).__name__ == "EclipsePrior" and pipeline.prior_scheduler is None
    assert draw(pipeline).isfinite().all()


def living() -> int:
    """Bytes of all tensors that Python holds, each storage once; none of meta tensors, nor of those that compiling
    leaves behind, which have none."""
    held = {}
    for one in gc.get_objects():
        if type(one) in (torch.Tensor, nn.Parameter) and one.device.type == "cpu":
            held[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()
    return sum(held.values())


def test_loading_holds_no_second_copy_of_a_component(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All bytes that are alive are counted while a prior of 25 MB is read, at every eighth of its tensors."""
    folder = copied(kandinsky_22_combined(), tmp_path / "model")
    prior = tiny_prior_transformer(num_attention_heads=8, attention_head_dim=64, num_layers=4)
    prior.half().save_pretrained(folder / "prior_prior")
    size = sum(tensor.nbytes for tensor in prior.state_dict().values())
    largest = max(tensor.nbytes for tensor in prior.state_dict().values())
    del prior
    gc.collect()
    before, peak = living(), 0
    tensors = Component.iterate_tensors

    def counted(part: Component, dtype: torch.dtype | None = None) -> Any:
        nonlocal peak
        for number, (name, tensor) in enumerate(tensors(part, dtype)):
            yield name, tensor
            if part.folder.name == "prior_prior" and number % 8 == 0:
                peak = max(peak, living())

    monkeypatch.setattr(Component, "iterate_tensors", counted)
    pipeline = Text2ImagePipeline.from_pretrained(folder)
    assert pipeline.prior.dtype == torch.float16
    final = living()
    assert final - before > size > 20e6
    # Queries, keys and values wait for each other, and are joined: at most six of the largest tensors are under way.
    assert peak - before < final - before + 6 * largest
    assert 6 * largest < size / 2


@pytest.mark.parametrize("make", [kandinsky_21_combined, kandinsky_22_combined, karlo])
def test_a_public_model_that_was_rounded_and_saved_loads_again(make: Callable[[], Path], tmp_path: Path) -> None:
    """Its parts know each other by fingerprints, which rounded weights no longer have."""
    pipeline = Text2ImagePipeline.from_pretrained(make()).to(torch.bfloat16)
    pipeline.save_pretrained(tmp_path)
    again = Text2ImagePipeline.from_pretrained(tmp_path)
    assert again.clip.identity == pipeline.clip.identity


Change = Callable[[Path], object]


def pickled(folder: Path) -> None:
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(weights), weights.with_suffix(".bin"))
    weights.unlink()


def outside(folder: Path) -> None:
    names = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    table = {"metadata": {}, "weight_map": {name: "../../secret.safetensors" for name in names}}
    (folder / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(table))


def linked(folder: Path) -> None:
    (folder / "movq" / "config.json").unlink()
    (folder / "movq" / "config.json").symlink_to(kandinsky_22_decoder() / "movq" / "config.json")


def other_size(folder: Path) -> None:
    shutil.rmtree(folder / "prior_prior")
    tiny_prior_transformer(embed_dim=24).save_pretrained(folder / "prior_prior")


INDEX = "model_index.json"
FAULTS: dict[str, tuple[Change, str]] = {
    "a part that the index lacks": (
        lambda folder: rewrite(folder / INDEX, lambda index: index.pop("movq")),
        "lacks 'movq' in its model_index.json; its parts are unet, scheduler, movq",
    ),
    "a part without a folder": (lambda folder: shutil.rmtree(folder / "movq"), "lacks the folder 'movq'"),
    "another class in the index": (
        lambda folder: rewrite(folder / INDEX, lambda index: index.update(movq=["diffusers", "AutoencoderKL"])),
        "has as movq a 'AutoencoderKL'; it must be VQModel",
    ),
    "a class that is no scheduler": (
        lambda folder: rewrite(folder / INDEX, lambda index: index.update(scheduler=["diffusers", "UNet2DModel"])),
        "has as scheduler a 'UNet2DModel'; it must be a scheduler of diffusers",
    ),
    "a class of a foreign library": (
        lambda folder: rewrite(folder / INDEX, lambda index: index.update(movq=["evil", "VQModel"])),
        r"has in its model_index.json 'movq' = \['evil', 'VQModel'\], which is not a class of diffusers, transformers",
    ),
    "an extra part of a foreign library": (
        lambda folder: rewrite(folder / INDEX, lambda index: index.update(helper=["transformers_modules.x", "Y"])),
        "has in its model_index.json 'helper' = ",
    ),
    "an extra entry that is no part": (
        lambda folder: rewrite(folder / INDEX, lambda index: index.update(helper={"run": "this"})),
        "has in its model_index.json 'helper' = ",
    ),
    "another class in a part": (
        lambda folder: rewrite(folder / "unet" / "config.json", lambda one: one.update(_class_name="UNet2DModel")),
        "holds in unet a 'UNet2DModel', not UNet2DConditionModel",
    ),
    "other shapes than the configuration": (
        lambda folder: rewrite(folder / "unet" / "config.json", lambda one: one.update(block_out_channels=[16, 32])),
        "unet' has misshapen tensors",
    ),
    "pickles alone": (pickled, r"only .safetensors is loaded; `t2i convert \S+/unet/diffusion_pytorch_model.bin`"),
    "an index that points outside": (outside, "must be a plain name"),
    "a link out of the folder": (linked, "is a link out of"),
    "remote code in a part": (
        lambda folder: rewrite(folder / "movq" / "config.json", lambda one: one.update(auto_map={"a": "b"})),
        "has 'auto_map'; only this project's own code is run",
    ),
    "code beside the weights": (lambda folder: (folder / "unet" / "unet.py").touch(), "is code"),
    "a prior of other embeddings": (other_size, "reads embeddings of 16 dimensions, the prior in .* of 24"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_folder_is_refused_in_one_line(fault: str, tmp_path: Path) -> None:
    folder = copied(kandinsky_22_combined(), tmp_path / "model")
    change, said = FAULTS[fault]
    change(folder)
    with pytest.raises(InputError, match=said) as refused:
        Text2ImagePipeline.from_pretrained(folder)
    assert "\n" not in str(refused.value)


SCHEDULER = "scheduler_config.json"
SETTINGS_FAULTS: dict[str, tuple[Change, str]] = {
    "an unknown variance": (
        lambda folder: rewrite(folder / "decoder_scheduler" / SCHEDULER, lambda one: one.update(variance_type="evil")),
        "decoder_scheduler in .* has variance_type 'evil'; it may be",
    ),
    "a prediction that its class does not make": (
        lambda folder: rewrite(
            folder / "prior_scheduler" / SCHEDULER, lambda one: one.update(prediction_type="v_prediction")
        ),
        "the prior_scheduler.*, a UnCLIPRespacedScheduler, cannot sample",
    ),
    "a scheduler of flows": (
        lambda folder: rewrite(
            folder / INDEX,
            lambda index: index.update(decoder_scheduler=["diffusers", "FlowMatchEulerDiscreteScheduler"]),
        ),
        "the decoder_scheduler.*, a FlowMatchEulerDiscreteScheduler, cannot sample",
    ),
    "a scheduler that is driven otherwise": (
        lambda folder: rewrite(
            folder / INDEX, lambda index: index.update(decoder_scheduler=["diffusers", "KarrasVeScheduler"])
        ),
        "the decoder_scheduler in .*, a KarrasVeScheduler, cannot sample",
    ),
}


@pytest.mark.parametrize("fault", SETTINGS_FAULTS)
def test_a_scheduler_that_cannot_draw_is_refused_in_one_line(fault: str, tmp_path: Path) -> None:
    folder = copied(karlo(), tmp_path / "model")
    change, said = SETTINGS_FAULTS[fault]
    change(folder)
    with pytest.raises(InputError, match=said) as refused:
        Text2ImagePipeline.from_pretrained(folder)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("factor", ["a", 0, True])
def test_a_vae_without_a_scale_is_refused(factor: object, tmp_path: Path) -> None:
    folder = copied(stable_unclip(), tmp_path / "model")
    rewrite(folder / "vae" / "config.json", lambda one: one.update(scaling_factor=factor))
    with pytest.raises(InputError, match="scaling_factor in .* must be a number above 0"):
        Text2ImagePipeline.from_pretrained(folder)


@pytest.mark.parametrize("given", [{"decoder": 5}, {"decoder_scheduler": "x"}, {"clip": 5}, {"autoencoder": "x"}])
def test_an_object_that_is_no_component_is_refused_by_name(given: dict[str, Any], tmp_path: Path) -> None:
    (name,) = given
    for folder in (kandinsky_22_combined(), tmp_path):
        with pytest.raises(InputError, match=f"^{name} must be a .*, got (5|'x'), a (int|str)$"):
            Text2ImagePipeline.from_pretrained(folder, **given)


def test_remote_code_beside_a_tokenizer_is_refused(tmp_path: Path) -> None:
    folder = copied(kandinsky_21_combined(), tmp_path / "model")
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": "evil.Tokenizer"}}')
    with pytest.raises(InputError, match="tokenizer_config.json' has 'auto_map'; only this project's own code is run"):
        Text2ImagePipeline.from_pretrained(folder)


def test_what_public_indices_have_beside_the_parts_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied(kandinsky_22_combined(), tmp_path / "model")
    more = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "requires_safety_checker": False,
        "feature_extractor": [None, None],
    }
    rewrite(folder / INDEX, lambda index: index.update(more))
    Text2ImagePipeline.from_pretrained(folder)
    said = [record.message for record in caplog.records if "not used" in record.message]
    assert len(said) == 1 and "'safety_checker', a StableDiffusionSafetyChecker" in said[0]


def test_a_half_of_a_model_says_which_argument_to_give() -> None:
    with pytest.raises(InputError, match=r"holds no prior and no CLIP; name .* as prior=\.\.\. \(--prior\)"):
        Text2ImagePipeline.from_pretrained(kandinsky_22_decoder())
    with pytest.raises(InputError, match="holds no decoder; name"):
        Text2ImagePipeline.from_pretrained(kandinsky_22_prior())


def test_an_eclipse_prior_beside_a_decoder_says_that_the_clip_is_missing_and_draws_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    save_eclipse_prior(tmp_path / "prior")
    command = ["t2i", "generate", "a cat", "--model", str(kandinsky_22_decoder()), "--prior", str(tmp_path / "prior")]
    command += ["--steps", "2", "--out", str(tmp_path / "out")]
    for clip, status in (([], 2), (["--clip", str(kandinsky_22_prior())], 0)):
        monkeypatch.setattr(sys, "argv", [*command, *clip])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert (ended.value.code or 0) == status
        said = capsys.readouterr().err
        assert ("holds a CLIP; name a folder or repository that has it as clip=... (--clip)" in said) == bool(status)
    with Image.open(next((tmp_path / "out").glob("*.png"))) as drawn:
        assert "kandinsky_22_prior" in "".join(map(str, drawn.info.values()))


def test_the_prior_in_a_pipelines_folder_is_used_with_the_clip_beside_it() -> None:
    whole = Text2ImagePipeline.from_pretrained(kandinsky_22_decoder(), prior=kandinsky_22_prior())
    part = Text2ImagePipeline.from_pretrained(kandinsky_22_decoder(), prior=kandinsky_22_prior() / "prior")
    assert torch.equal(part.prior.query, whole.prior.query) and part.clip.identity == whole.clip.identity


def test_a_folder_that_is_no_prior_is_described(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="neither a model_index.json nor a config.json, but nothing"):
        Text2ImagePipeline.from_pretrained(kandinsky_22_decoder(), prior=tmp_path)


def test_an_own_model_takes_a_prior_from_the_hub_and_no_other_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = load("kandinsky 2.2 combined")
    whole.save_pretrained(tmp_path / "ours")
    whole.prior.query.add_(1)
    whole.prior.save_pretrained(tmp_path / "run" / "model")
    DDIMScheduler(prediction_type="sample").save_pretrained(tmp_path / "run" / "scheduler")
    folders = {"someone/prior": str(tmp_path / "run")}
    monkeypatch.setattr(Text2ImagePipeline, "download", lambda name, **_: folders[name])
    pipeline = Text2ImagePipeline.from_pretrained(tmp_path / "ours", prior="someone/prior")
    assert torch.equal(pipeline.prior.query, whole.prior.query)
    with pytest.raises(InputError, match="clip is 'x', but this project's own models hold their CLIP"):
        Text2ImagePipeline.from_pretrained(tmp_path / "ours", clip="x")


def test_a_prior_of_another_clip_is_refused(tmp_path: Path) -> None:
    folder = copied(karlo(), tmp_path / "karlo")
    shutil.rmtree(folder / "text_encoder")
    tiny_text_tower(seed=77).save_pretrained(folder / "text_encoder")
    with pytest.raises(InputError, match=r"are of different CLIPs: their text encoders are [0-9a-f]{16} and"):
        Text2ImagePipeline.from_pretrained(karlo_variations(), prior=folder)


def test_arguments_that_mean_nothing_here_are_refused() -> None:
    with pytest.raises(InputError, match="'device_map' is no argument for a model in a public layout"):
        load("karlo", device_map="balanced")
    with pytest.raises(InputError, match="dtype must be a torch.dtype, a dict of them, or 'auto', got 'float16'"):
        load("karlo", torch_dtype="float16")


def test_a_folder_of_no_layout_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    with pytest.raises(InputError, match="is of 'StableDiffusionPipeline'; the layouts that load are .* karlo"):
        Text2ImagePipeline.from_pretrained(tmp_path)
    (tmp_path / "model_index.json").unlink()
    with pytest.raises(InputError, match="neither a model_index.json nor a config.json, but nothing; .* karlo"):
        Text2ImagePipeline.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"_class_name": "FluxTransformer2DModel"}')
    with pytest.raises(InputError, match="is of 'FluxTransformer2DModel'; the layouts that load are .* karlo"):
        Text2ImagePipeline.from_pretrained(tmp_path)
    with pytest.raises(InputError, match="is of 'UNet2DConditionModel', a part of the pipeline in "):
        Text2ImagePipeline.from_pretrained(kandinsky_22_decoder() / "unet")


def test_a_folder_of_dalle2_pytorch_is_told_how_it_is_converted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "latest.pth").touch()
    monkeypatch.setattr(sys, "argv", ["t2i", "generate", "a cat", "--model", str(tmp_path), "--out", "nowhere"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 2
    assert "t2i convert FILE.pth --config FILE.json FOLDER" in capsys.readouterr().err


def test_the_older_name_of_the_dtype_is_understood() -> None:
    assert load("karlo", torch_dtype=torch.bfloat16).decoder.dtype == torch.bfloat16
