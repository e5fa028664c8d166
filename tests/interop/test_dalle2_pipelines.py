"""Converted DALLE2-pytorch models in the pipelines: everything that works on this project's own."""

import json
import logging
import sys
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from PIL import Image
from t2i.pipelines import (
    ImageVariationPipeline,
    InpaintPipeline,
    InterpolationPipeline,
    Text2ImagePipeline,
)
from t2i.pipelines.jobs.assemble import assemble_pipeline
from t2i.pipelines.jobs.convert import convert_folder

from t2i import cli
from t2i.diffusion.samplers import build_sampler
from t2i.errors import InputError
from t2i.interop.dalle2_convert import convert_dalle2
from t2i.networks.clip import CLIP
from t2i.networks.dalle2.decoder import DALLE2Cascade, DALLE2Decoder
from t2i.networks.dalle2.prior import DALLE2Prior
from t2i.networks.tokenizer import PublicTokenizer
from tests.helpers.references.dalle2 import Replay, randomised, reference

WIDTH, STEPS = 24, 40
TOWERS = {
    "embed_dim": WIDTH,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 1, "head_width": 8},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": WIDTH, "heads": 2, "layers": 1},
}
NET = {"dim": WIDTH, "depth": 1, "dim_head": 12, "heads": 2, "max_text_len": 77, "num_timesteps": STEPS}
UNET = {"dim": 8, "cond_dim": 6, "dim_mults": [1, 2], "attn_dim_head": 4, "attn_heads": 2}
READER = {**UNET, "cond_on_text_encodings": True, "text_embed_dim": WIDTH, "max_text_len": 77, "image_embed_dim": WIDTH}
CLIP_CONFIG = {"make": "openai", "model": "ViT-L/14"}
PROMPTS = ["a red cat", "a photograph of a lighthouse on a cliff in the evening"]
QUICK = {"num_inference_steps": 3, "prior_num_inference_steps": 2}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """open_clip knows tiny towers by every name; the names that it was asked for."""
    asked: list[str] = []
    monkeypatch.setattr(open_clip, "get_model_config", lambda name: asked.append(name) or TOWERS)
    tokenizer = open_clip.SimpleTokenizer(context_length=77)
    monkeypatch.setattr(open_clip, "get_tokenizer", lambda name, **_: tokenizer)
    return asked


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prior, a decoder with a cascade, and a decoder alone, as the trainers write them, with configurations."""
    package, folder = reference(), tmp_path_factory.mktemp("dalle2")
    torch.manual_seed(0)
    clip = open_clip.CLIP(**TOWERS)
    prior = randomised(
        package.DiffusionPrior(
            package.DiffusionPriorNetwork(**NET), image_embed_dim=WIDTH, timesteps=STEPS, cond_drop_prob=0.1
        )
    )
    state = prior.state_dict() | {f"clip.clip.{name}": one for name, one in clip.state_dict().items()}
    from packaging.version import Version

    torch.save({"model": {}, "ema_model": state, "version": Version("1.15.6")}, folder / "prior.pth")
    settings: dict[str, Any] = {"net": NET, "image_embed_dim": WIDTH, "timesteps": STEPS, "clip": CLIP_CONFIG}
    (folder / "prior.json").write_text(json.dumps({"prior": settings, "data": {}, "train": {"lr": 1.1e-4}}))
    for name, unets, sizes in (("cascade", [READER, UNET], [8, 16]), ("decoder", [READER], [8])):
        decoder = randomised(
            package.Decoder([package.Unet(**one) for one in unets], image_sizes=sizes, timesteps=STEPS)
        )
        torch.save({"model": decoder.state_dict(), "version": Version("1.15.6")}, folder / f"{name}.pth")
        settings = {"unets": unets, "image_sizes": sizes, "timesteps": STEPS}
        (folder / f"{name}.json").write_text(json.dumps({"decoder": settings}))
    return folder


@pytest.fixture(params=["cascade", "decoder"])
def pipeline(request: Any, files: Path, tmp_path: Path, tiny: list[str]) -> Text2ImagePipeline:
    """Converted, assembled, saved and loaded."""
    for name in ("prior", request.param):
        convert_dalle2(files / f"{name}.pth", files / f"{name}.json", tmp_path / name)
    run("assemble", tmp_path, tmp_path / "whole", "--prior", tmp_path / "prior", "--decoder", tmp_path / request.param)
    made = Text2ImagePipeline.from_pretrained(tmp_path / "whole")
    made.set_progress_bar_config(disable=True)
    return made


def run(*arguments: object) -> int:
    """Exit status of a command."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(sys, "argv", ["t2i", *map(str, arguments)])
        cli.main()
    return int(caught.value.code or 0)


def generators(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_the_command_converts_a_file_and_its_clip(files: Path, tmp_path: Path, tiny: list[str], capsys: Any) -> None:
    assert run("convert", files / "prior.pth", tmp_path / "out", "--config", files / "prior.json") == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["clip", "model", "scheduler"]
    assert not list(tmp_path.rglob("*.bin"))
    assert tiny[0] == "ViT-L-14-quickgelu"  # OpenAI's own activation: the plain model's embeddings are others
    assert run("convert", files / "prior.pth", tmp_path / "out", "--config", files / "prior.json") == 2
    assert "exists; give a new folder" in capsys.readouterr().err
    assert run("convert", files / "prior.pth", tmp_path / "other") == 2
    assert "holds no configuration; give the JSON of its training by --config" in capsys.readouterr().err
    assert run("convert", files / "prior.pth", tmp_path / "half", "--config", files / "prior.json", "--fp16") == 0
    whole, half = ((tmp_path / name / "model").glob("*.safetensors") for name in ("out", "half"))
    assert next(half).stat().st_size < 0.6 * next(whole).stat().st_size


@torch.no_grad()
def test_captions_are_read_as_the_package_reads_them(files: Path, tmp_path: Path, tiny: list[str]) -> None:
    convert_dalle2(files / "prior.pth", files / "prior.json", tmp_path / "out")
    clip = CLIP.from_pretrained(tmp_path / "out" / "clip")
    with pytest.MonkeyPatch.context() as patch:
        made = (clip.net, None, type("Steps", (), {"transforms": [None]}))
        patch.setattr(open_clip, "create_model_and_transforms", lambda *_, **__: made)
        adapter = reference().OpenClipAdapter("tiny")
    tokens = clip.tokenizer(PROMPTS)
    theirs, ours = adapter.embed_text(tokens), clip.encode_tokens(tokens)
    length = ours.mask.shape[1]
    torch.testing.assert_close(ours.embedding, theirs.text_embed, atol=1e-5, rtol=1e-5)
    states = ours.states * ours.mask[..., None]
    torch.testing.assert_close(states, theirs.text_encodings[:, :length], atol=1e-5, rtol=1e-5)
    assert not theirs.text_encodings[:, length:].any()


def few(pipeline: Text2ImagePipeline) -> dict[str, int]:
    """Steps of every stage that it has."""
    return QUICK | ({"super_res_num_inference_steps": 2} if pipeline.is_cascade else {})


def test_text_to_image_does_what_the_stages_of_the_package_do(pipeline: Text2ImagePipeline) -> None:
    both = pipeline(PROMPTS, generator=generators(1, 2), output_type="pt", **few(pipeline))
    side = 16 if isinstance(pipeline.autoencoder, DALLE2Cascade) else 8
    assert both.images.shape == (2, 3, side, side) and both.images.std() > 0.05
    torch.testing.assert_close(both.image_embeds.norm(dim=-1), torch.ones(2))
    alone = pipeline(PROMPTS[0], generator=generators(1), output_type="pt", **few(pipeline))
    torch.testing.assert_close(alone.image_embeds, both.image_embeds[:1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(alone.images, both.images[:1], atol=2e-2, rtol=0)  # see the test of the cascade
    assert pipeline.default_decoder_options == {"num_inference_steps": 100, "guidance_scale": 1.7}


@pytest.mark.parametrize("scale", [1.0, 1.7])
@torch.no_grad()
def test_the_final_picture_is_the_packages(
    scale: float, tmp_path: Path, tiny: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All stages by ancestral sampling from the same noise, z_i of unit length there too, and no learned variance."""
    package, unets = reference(), [READER, UNET]
    prior = randomised(
        package.DiffusionPrior(
            package.DiffusionPriorNetwork(**NET),
            image_embed_dim=WIDTH,
            timesteps=STEPS,
            cond_drop_prob=0.1,
            sampling_final_clamp_l2norm=True,
        )
    )
    shared = {"image_sizes": [8, 16], "timesteps": STEPS, "learned_variance": False}
    decoder = randomised(package.Decoder([package.Unet(**one) for one in unets], **shared))
    clip = CLIP(TOWERS, {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}, "clip").eval()
    clip.tokenizer = PublicTokenizer(open_clip.get_tokenizer("tiny"))
    clip.save_pretrained(tmp_path / "clip")
    text = clip.encode_text(PROMPTS)
    stages = [(2, WIDTH), (2, 3, 8, 8), (2, 3, 16, 16)]
    noises = [[torch.randn(shape) for _ in range(STEPS + 1)] for shape in stages]  # the start, and one a step

    replay = Replay([one for stage in noises for one in stage])
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn", replay)
        patch.setattr(torch, "randn_like", replay)
        patch.setattr(package, "tqdm", lambda steps, **_: steps)
        condition = {"text_embed": text.embedding, "text_encodings": text.states * text.mask[..., None]}
        z_i = prior.p_sample_loop((2, WIDTH), text_cond=condition, cond_scale=scale)
        encodings = condition["text_encodings"]
        expected = decoder.sample(image_embed=z_i, text_encodings=encodings, cond_scale=(scale, 1.0))

    for name, model, settings in (
        ("prior", prior, {"prior": {"net": NET, "image_embed_dim": WIDTH, "timesteps": STEPS}}),
        ("decoder", decoder, {"decoder": {"unets": unets, **shared}}),
    ):
        torch.save(model.state_dict(), tmp_path / f"{name}.pth")
        (tmp_path / f"{name}.json").write_text(json.dumps(settings))
        convert_dalle2(tmp_path / f"{name}.pth", tmp_path / f"{name}.json", tmp_path / name)
    made = assemble_pipeline(tmp_path)
    made.autoencoder.all_schedulers[0] = build_sampler("ddpm", made.autoencoder.scheduler)
    steps = {"num_inference_steps": STEPS, "prior_num_inference_steps": STEPS, "super_res_num_inference_steps": STEPS}
    scales = {"guidance_scale": scale, "prior_guidance_scale": scale, "sampler": "ddpm", "prior_sampler": "ddpm"}
    starts = dict(zip(("prior_latents", "latents", "super_res_latents"), (stage[0] for stage in noises)))
    with monkeypatch.context() as patch:
        later = [one for stage in noises for one in stage[1:STEPS]]  # the last step adds none
        patch.setattr("diffusers.schedulers.scheduling_ddpm.randn_tensor", Replay(later))
        got = made(PROMPTS, output_type="pt", **steps, **scales, **starts)
    torch.testing.assert_close(got.image_embeds, z_i, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(got.images, expected.clamp(0, 1), atol=1e-4, rtol=1e-4)


def test_every_pipeline_takes_the_model(pipeline: Text2ImagePipeline, tmp_path: Path) -> None:
    picture = Image.effect_noise((32, 32), 80).convert("RGB")
    side = pipeline.image_size
    quick = {name: value for name, value in few(pipeline).items() if name != "prior_num_inference_steps"}
    varied = ImageVariationPipeline.from_pipe(pipeline)(picture, generator=generators(1), **quick)
    assert varied.images[0].size == (side, side)
    mixed = InterpolationPipeline.from_pipe(pipeline)(PROMPTS, frames=3, generator=generators(1)[0], **few(pipeline))
    assert len(mixed.images) == 3
    mask = Image.new("L", (32, 32), 0)
    mask.paste(255, (0, 0, 16, 32))
    painted = InpaintPipeline.from_pipe(pipeline)(picture, mask, PROMPTS[0], generator=generators(1), **few(pipeline))
    assert painted.images[0].size == (32, 32)
    box = (17, 0, 32, 32)
    assert painted.images[0].crop(box).tobytes() == picture.crop(box).tobytes()
    pipeline(
        PROMPTS[0],
        negative_prompt="a dog",
        guidance_scale=3.0,
        sampler="dpmsolver++",
        prior_candidates=2,
        **few(pipeline),
    )


def test_a_bfloat16_pipeline_is_saved_and_loaded(pipeline: Text2ImagePipeline, tmp_path: Path, capfd: Any) -> None:
    pipeline.to(dtype=torch.bfloat16)
    pipeline.save_pretrained(tmp_path / "half")
    again = Text2ImagePipeline.from_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert "Expected types" not in capfd.readouterr().err  # diffusers compares with the constructor's
    assert isinstance(again.prior, DALLE2Prior) and isinstance(again.decoder, DALLE2Decoder)
    assert again.prior.dtype == again.decoder.dtype == torch.bfloat16
    assert again(PROMPTS, generator=generators(1, 2), output_type="pt", **few(pipeline)).images.isfinite().all()


def test_no_public_layout_holds_these_models(pipeline: Text2ImagePipeline, tmp_path: Path) -> None:
    pipeline.save_pretrained(tmp_path / "mine")
    with pytest.raises(InputError, match="DALLE2"):
        convert_folder(str(tmp_path / "mine"), tmp_path / "out", "karlo")


def test_a_clip_of_another_width_is_refused(files: Path, tmp_path: Path, tiny: list[str]) -> None:
    for name in ("prior", "decoder"):
        convert_dalle2(files / f"{name}.pth", files / f"{name}.json", tmp_path / name)
    text = {**TOWERS["text_cfg"], "width": 16}  # type: ignore[dict-item]
    other = CLIP({**TOWERS, "text_cfg": text}, {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}, "clip")
    other.tokenizer = CLIP.from_pretrained(tmp_path / "prior" / "clip").tokenizer
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(InputError, match="the prior reads token states of 24 dimensions, the CLIP's have 16"):
        assemble_pipeline(
            tmp_path,
            prior=str(tmp_path / "prior"),
            decoder=str(tmp_path / "decoder"),
            clip=str(tmp_path / "other"),
        )


def test_a_file_without_the_name_of_its_clip_is_converted_without_it(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = json.loads((files / "prior.json").read_text())
    del settings["prior"]["clip"]
    (tmp_path / "prior.json").write_text(json.dumps(settings))
    with caplog.at_level(logging.WARNING):
        convert_dalle2(files / "prior.pth", tmp_path / "prior.json", tmp_path / "out")
    assert "its configuration does not name it" in caplog.text
    assert not (tmp_path / "out" / "clip").exists()
