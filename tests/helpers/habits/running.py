"""Habits of callbacks, schedulers, offloading, adapters and training data."""

import copy
import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers.callbacks import IPAdapterScaleCutoffCallback, SDCFGCutoffCallback, SDXLCFGCutoffCallback
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from safetensors.torch import save_file
from t2i.training.common.lora import LoraConfig, add_adapters, export_adapted_model
from torch import Tensor

from t2i import (
    ImageVariationPipeline,
    InputError,
    PriorPipeline,
    Text2ImagePipeline,
)
from t2i.config import DataConfig
from t2i.data import CaptionedPictures
from t2i.data.manifest import write_manifest
from t2i.runtime.memory import measure_available_memory
from tests.helpers.habits import LATENTS, differs, draw, other, photo, refuse, same, works
from tests.helpers.kandinsky_folders import kandinsky_22_combined
from tests.helpers.offloading import (
    measure_waiting_parts,
    offload_in_sequence,
    offload_leaves,
    offload_models,
    record_inputs,
)
from tests.helpers.profiles import DISPLAY_P3, p3_to_srgb, rgb_profile
from tests.helpers.samples import checked, reasons
from tests.helpers.stages import seeds, train

# Callbacks


@works("`callback_on_step_end`")
def call_after_each_step(pipe: Any) -> None:
    same(draw(pipe, callback_on_step_end=lambda *_: None), draw(pipe))
    zeros = {"callback_on_step_end": lambda pipe, step, t, given: {"latents": 0 * given["latents"]}}
    other(draw(pipe, **zeros), draw(pipe))


@differs("`callback_on_step_end_tensor_inputs`")
def ask_for_conditions(pipe: Any) -> None:
    seen: dict[str, Tensor] = {}
    names = ["image_embeds", "negative_image_embeds", "prompt_embeds"]
    settings = {"guidance_scale": 3.0, "callback_on_step_end_tensor_inputs": names}
    draw(pipe, callback_on_step_end=lambda pipe, step, t, given: seen.update(given), **settings)
    assert {name: len(tensor) for name, tensor in seen.items()} == dict.fromkeys(names, 1)


@works("`_guidance_scale`, `_interrupt`, `num_timesteps`")
def steer_from_a_callback(pipe: Any) -> None:
    steps: list[int] = []

    def stop(pipe: Any, step: int, t: Any, given: Any) -> None:
        steps.append(step)
        pipe._interrupt = pipe.num_timesteps == 2

    assert draw(pipe, callback_on_step_end=stop).isfinite().all() and steps == [0]
    unguided = {"callback_on_step_end": lambda pipe, *_: setattr(pipe, "_guidance_scale", 1.0)}
    other(draw(pipe, guidance_scale=9.0, **unguided), draw(pipe, guidance_scale=9.0))


@works("`SDCFGCutoffCallback`")
def cut_guidance_off(pipe: Any) -> None:
    settings = LATENTS | {"guidance_scale": 9.0}
    cut = draw(pipe, callback_on_step_end=SDCFGCutoffCallback(cutoff_step_ratio=0.5), **settings)
    other(cut, draw(pipe, **settings), 1e-5)


@differs("`SDXLCFGCutoffCallback`, `IPAdapterScaleCutoffCallback`")
def use_callbacks_of_other_models(pipe: Any) -> None:
    for callback in (SDXLCFGCutoffCallback(), IPAdapterScaleCutoffCallback()):
        with pytest.raises(InputError, match="callback_on_step_end"):
            draw(pipe, callback_on_step_end=callback)


@differs("`callback`, `callback_steps`")
def use_callbacks_of_before(pipe: Any) -> None:
    refuse(pipe, callback=print)
    refuse(pipe, callback_steps=1)


@works("`prior_callback_on_step_end`")
def call_after_each_step_of_the_prior(pipe: Any) -> None:
    steps: list[int] = []
    draw(pipe, prior_callback_on_step_end=lambda pipe, step, *_: steps.append(step))
    assert steps == [0, 1]


# Schedulers


@works("`pipe.scheduler = Other.from_config(pipe.scheduler.config)`")
def replace_schedulers(pipe: Any) -> None:
    plain = draw(pipe, **LATENTS)
    pipe.scheduler = diffusers.UniPCMultistepScheduler.from_config(pipe.scheduler.config)
    other(draw(pipe, **LATENTS), plain, 1e-5)
    before = draw_embeds(pipe)
    pipe.prior_scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.prior_scheduler.config)
    other(draw_embeds(pipe), before, 1e-5)


def draw_embeds(pipe: Any) -> Tensor:
    return PriorPipeline.from_pipe(pipe)("red circle", generator=seeds(1), prior_num_inference_steps=6).image_embeds


@differs("a scheduler of another `prediction_type`")
def choose_what_is_predicted(pipe: Any) -> None:
    config, made = pipe.scheduler.config, pipe.scheduler.config.prediction_type
    for read in {"epsilon", "sample", "v_prediction"} - {made}:
        with pytest.raises(InputError, match=f"prediction_type {read}, but the decoder was trained with {made}"):
            pipe.scheduler = diffusers.DDPMScheduler.from_config(config, prediction_type=read)
    pipe.scheduler = diffusers.DDPMScheduler.from_config(config)


@differs("LCM, inverse, EDM, flow matching")
def use_schedulers_of_other_models(pipe: Any) -> None:
    for name in ("LCM", "DDIMInverse", "EDMEuler", "FlowMatchEulerDiscrete"):
        kind = getattr(diffusers, f"{name}Scheduler")
        with pytest.raises(InputError, match="these schedulers of diffusers work: DDIM"):
            pipe.scheduler = kind.from_config(pipe.scheduler.config)


@differs("another scheduler for one call")
def choose_a_sampler(pipe: Any) -> None:
    plain, scheduler = draw(pipe, **LATENTS), pipe.scheduler
    other(draw(pipe, sampler="dpmsolver++", **LATENTS), plain, 1e-5)
    assert pipe.scheduler is scheduler
    same(draw(pipe, **LATENTS), plain, atol=0)


@works("training by flow matching")
def train_a_flow(pipe: Any, shapes: Path, runs: Path, tmp_path: Path) -> None:
    left_out = dict.fromkeys(("scheduler.beta_schedule", "scheduler.clip_sample", "scheduler.timestep_spacing"), "null")
    flow = {"scheduler.prediction_type": "flow_prediction", "scheduler.shift": 3} | left_out
    train("decoder", shapes, tmp_path, 1, clip=runs / "clip", autoencoder=runs / "autoencoder", **flow)
    folder = tmp_path / "decoder"
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler.from_pretrained(folder / "scheduler")
    parts = pipe.components | {
        "decoder": type(pipe.decoder).from_pretrained(folder / "model"),
        "decoder_scheduler": scheduler,
    }
    assert scheduler.shift == 3 and draw(Text2ImagePipeline(**parts)).isfinite().all()


# Memory and offloading


@works("`enable_model_cpu_offload`, `enable_sequential_cpu_offload`, `enable_group_offload`")
def offload(loaded_pipeline: Any, waiting_weights_are_nan: None, tmp_path: Path) -> None:
    plain = draw(loaded_pipeline)
    for way in (offload_models, offload_in_sequence, offload_leaves):
        pipe = copy.deepcopy(loaded_pipeline)
        way(pipe, tmp_path)
        same(draw(pipe), plain)
        assert min(measure_waiting_parts(pipe).values()) > 0.99


@works("`enable_layerwise_casting`")
def store_fewer_bits(pipe: Any) -> None:
    plain = draw(pipe)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    assert torch.float8_e4m3fn in {parameter.dtype for parameter in pipe.unet.parameters()}
    other(draw(pipe), plain)


@differs("`pipe.vae.enable_slicing()`, tiling")
def slice_the_autoencoder(pipe: Any) -> None:
    assert not hasattr(pipe.vae, "enable_slicing") and not hasattr(pipe.vae, "enable_tiling")
    settings = {"num_images_per_prompt": 2, "height": 96, "width": 96}
    with record_inputs(pipe.vae.coder.decoder) as seen:
        plain = draw(pipe, **settings)
        assert seen == [(2, 4, 24, 24)]
        seen.clear()
        pipe.enable_vae_slicing()
        same(draw(pipe, **settings), plain)
        assert seen == [(1, 4, 24, 24)] * 2
        seen.clear()
        pipe.enable_vae_tiling()
        tiled = draw(pipe, **settings)
    # Tiles share a quarter
    assert seen == [(1, 4, 16, 16), (1, 4, 16, 12), (1, 4, 12, 16), (1, 4, 12, 12)] * 2
    assert 0 < (tiled - plain).abs().mean() < 0.1


@works("`enable_attention_slicing`, `fuse_qkv_projections`, `enable_freeu`")
def change_the_unet(pipe: Any) -> None:
    def name_processors() -> set[str]:
        return {type(one).__name__ for one in pipe.unet.unet.attn_processors.values()}

    plain, before = draw(pipe), name_processors()
    pipe.enable_attention_slicing()
    assert name_processors() == {"SlicedAttnProcessor"}
    same(draw(pipe), plain)
    pipe.disable_attention_slicing()
    pipe.fuse_qkv_projections()
    assert name_processors() == {"FusedAttnProcessor2_0"}
    same(draw(pipe), plain)
    pipe.unfuse_qkv_projections()
    assert name_processors() == before
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    other(draw(pipe), plain)


@differs("... of Karlo, Kandinsky")
def change_a_unet_of_joint_attention() -> None:
    pipe = Text2ImagePipeline.from_pretrained(kandinsky_22_combined())
    pipe.set_progress_bar_config(disable=True)
    plain = draw(pipe)
    pipe.enable_attention_slicing()
    same(draw(pipe), plain)
    with pytest.raises(InputError, match="fuse_qkv_projections is not for a MoVQ"):
        pipe.fuse_qkv_projections()
    with pytest.raises(InputError, match="enable_freeu has no effect on this U-Net"):
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    pipe.enable_vae_slicing()
    pipe.vae.coder.tile_latent_min_size = 6
    pipe.enable_vae_tiling()  # tiles are of the trained size, of 8 latents
    with record_inputs(pipe.vae.coder.decoder) as seen:
        tiled = draw(pipe, height=32)
    assert seen == [(1, 4, 8, 8)] * 3 and tiled.isfinite().all()


@works("`torch.compile(pipe.unet)`")
def compile_the_unet(pipe: Any) -> None:
    plain = draw(pipe)
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    same(draw(pipe), plain)


@differs("`pipe.unet.set_attn_processor`, `.config.in_channels`")
def reach_the_network_of_diffusers(pipe: Any) -> None:
    plain = draw(pipe)
    assert not hasattr(pipe.unet, "set_attn_processor") and "in_channels" not in pipe.unet.config
    assert pipe.unet.unet.config.in_channels == 4
    pipe.unet.unet.set_attn_processor(AttnProcessor())
    same(draw(pipe), plain)


@differs("a batch beyond memory")
def draw_too_much(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    little = measure_available_memory()._replace(free=2**20)  # bytes
    monkeypatch.setattr("t2i.pipelines.memory_needed.measure_available_memory", lambda *_: little)
    with pytest.raises(InputError, match="a batch of 2 does not fit into memory: .*; draw 1 at once"):
        draw(pipe, num_images_per_prompt=2)


# Adapters


@differs("`load_lora_weights`")
def load_adapters(pipe: Any, tmp_path: Path) -> None:
    trained = copy.deepcopy(pipe.unet)
    add_adapters(trained, LoraConfig(rank=2))
    for name, parameter in trained.named_parameters():
        parameter.data += 0.1 * ("lora_" in name)
    export_adapted_model(trained, tmp_path)
    plain = draw(pipe)
    pipe.load_lora_weights(tmp_path)
    other(draw(pipe), plain)
    pipe.unload_lora_weights()
    same(draw(pipe), plain)
    (tmp_path / "kohya").mkdir()
    save_file({"lora_unet_x.lora_down.weight": torch.zeros(1)}, tmp_path / "kohya/lora.safetensors")
    with pytest.raises(InputError, match="has no adapters"):
        pipe.load_lora_weights(tmp_path / "kohya")


@differs("`load_ip_adapter`, `load_textual_inversion`")
def draw_by_a_picture(pipe: Any) -> None:
    assert not hasattr(pipe, "load_ip_adapter") and not hasattr(pipe, "load_textual_inversion")
    shown = ImageVariationPipeline.from_pipe(pipe)(photo(), generator=seeds(1), num_inference_steps=2)
    other(draw(pipe, image_embeds=shown.image_embeds), draw(pipe))


# Training data


def check(folder: Path) -> tuple[dict[str, Any], CaptionedPictures]:
    write_manifest(folder, held_out=0, quiet=True)
    dataset = CaptionedPictures(DataConfig(str(folder), 16, 0))
    return checked(folder / "t2i" / "manifest.parquet"), dataset


def put(folder: Path, name: str, captions: str = "a cat", **settings: Any) -> None:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    image = settings.pop("image", photo())
    image.save(file, **settings)
    file.with_suffix(".txt").write_text(captions)


@works("`name.txt`, `name.caption`, `metadata.jsonl`")
def caption_pictures(tmp_path: Path) -> None:
    put(tmp_path / "a", "one.png", "a cat")
    put(tmp_path / "a", "two.png", "a dog")
    (tmp_path / "a/two.txt").rename(tmp_path / "a/two.caption")
    rows, _ = check(tmp_path / "a")
    assert {key: row["captions"] for key, row in rows.items()} == {"one.png": ["a cat"], "two.png": ["a dog"]}
    put(tmp_path / "b", "one.png")
    (tmp_path / "b/one.txt").unlink()
    (tmp_path / "b/metadata.jsonl").write_text(json.dumps({"file_name": "one.png", "text": "a cat"}))
    assert check(tmp_path / "b")[1].get_record(0).text == "a cat"


@differs("several lines in `name.txt`")
def write_several_captions(tmp_path: Path) -> None:
    put(tmp_path, "one.png", "a cat\nan animal")
    dataset = check(tmp_path)[1]
    assert {dataset.get_caption(0, number) for number in range(20)} == {"a cat", "an animal"}


@differs("kohya's folders `10_cat`")
def repeat_a_folder(tmp_path: Path) -> None:
    put(tmp_path, "10_cat/one.png", "sitting")
    dataset = check(tmp_path)[1]
    assert len(dataset) == 1 and dataset.get_caption(0, 0) == "sitting"


@works("aspect-ratio buckets, flips")
def train_on_a_wide_picture(tmp_path: Path) -> None:
    def pixels(image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1) / 127.5 - 1

    # Off by default: the middle square, never mirrored
    put(tmp_path, "one.png", image=photo(40, 24))
    put(tmp_path / "small", "one.png", image=photo(32, 16))
    plain = check(tmp_path / "small")[1]
    for draw_number in range(20):
        same(plain.read_view(0, draw_number).image, pixels(photo(32, 16).crop((8, 0, 24, 16))))
    # A bucket of 40 x 24 takes the whole image, and each draw gives it or its mirror image
    check(tmp_path)
    dataset = CaptionedPictures(DataConfig(str(tmp_path), 32, 0, buckets=True, bucket_step=8, flip=True))
    wide = next(index for index in range(len(dataset)) if dataset.get_sample_key(index) == "one.png")
    forms, seen = [pixels(photo(40, 24)), pixels(photo(40, 24)).flip(-1)], set()
    for draw_number in range(20):
        found = dataset.read_view(wide, draw_number).image
        [form] = [number for number, form in enumerate(forms) if torch.allclose(found, form, atol=2e-5)]
        seen.add(form)
    assert seen == {0, 1}


@differs("colour profiles, EXIF rotation, transparency")
def train_on_pictures_of_a_phone(tmp_path: Path) -> None:
    green, rotation = Image.new("RGB", (16, 16), (100, 180, 90)), Image.Exif()
    put(tmp_path, "a.png", image=green, icc_profile=rgb_profile(DISPLAY_P3))
    rotation[0x0112] = 3
    put(tmp_path, "b.png", image=photo(16, 16), exif=rotation)
    put(tmp_path, "c.png", image=Image.new("RGBA", (16, 16), (0, 0, 0, 0)))
    dataset = check(tmp_path)[1]
    pictures = [((dataset.load_image(index) + 1) * 127.5).permute(1, 2, 0).round() for index in range(3)]
    same(pictures[0][0, 0], torch.tensor(p3_to_srgb((100, 180, 90))).float(), atol=1)
    same(pictures[1], torch.from_numpy(np.array(photo(16, 16).rotate(180))).float())
    assert (pictures[2] == 255).all()


@differs("a broken image")
def train_beside_a_broken_picture(tmp_path: Path) -> None:
    put(tmp_path, "one.png")
    put(tmp_path, "two.png")
    (tmp_path / "two.png").write_bytes((tmp_path / "two.png").read_bytes()[:99])
    rows, dataset = check(tmp_path)
    assert len(dataset) == 1 and reasons(rows).keys() == {"two.png"}
