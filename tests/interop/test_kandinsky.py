"""Kandinsky 2.1 and 2.2 against diffusers' own pipelines: the same noise and conditions give the same images."""

import functools
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    KandinskyInpaintPipeline,
    KandinskyPipeline,
    KandinskyV22Img2ImgPipeline,
    KandinskyV22InpaintPipeline,
    KandinskyV22Pipeline,
)
from diffusers.pipelines.kandinsky import pipeline_kandinsky_inpaint
from diffusers.pipelines.kandinsky2_2 import pipeline_kandinsky2_2_inpainting
from torch import Generator, Tensor, nn

from t2i.diffusion.condition import ImageCondition, TokenStates
from t2i.diffusion.inpainting import build_blend_callback, concat_masked_latents
from t2i.diffusion.loss import compute_diffusion_loss, drop_condition
from t2i.diffusion.process import build_noise_scheduler
from t2i.diffusion.sampling_loop import Sampling, generate_noise, sample_from_noise
from t2i.errors import InputError
from t2i.files.component import Component
from t2i.networks.public.kandinsky import KandinskyDecoder
from t2i.networks.public.movq import MoVQ
from t2i.networks.public.multilingual_clip import MultilingualCLIP
from t2i.sampling.sample import build_decoder_condition, build_decoder_predict
from tests.helpers.kandinsky_folders import (
    KANDINSKY_LATENTS,
    kandinsky_21_decoder,
    kandinsky_21_inpaint,
    kandinsky_22_decoder,
    kandinsky_22_inpaint,
    kandinsky_scheduler,
    tiny_kandinsky_unet,
    tiny_movq,
    tiny_multilingual_clip,
    tiny_multilingual_tokenizer,
)
from tests.helpers.public_folders import EMBED_DIM

PIXELS = 2 * KANDINSKY_LATENTS
PROMPTS = ["a cat", "the red dog and a blue cat on the chair"]
SCHEDULERS = {"ddpm": kandinsky_scheduler("2.2"), "ddim": kandinsky_scheduler("2.1")}
FOLDERS = {
    ("2.1", False): kandinsky_21_decoder,
    ("2.1", True): kandinsky_21_inpaint,
    ("2.2", False): kandinsky_22_decoder,
    ("2.2", True): kandinsky_22_inpaint,
}


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=Generator().manual_seed(seed))


def generators(count: int = 2) -> list[Generator]:
    return [Generator().manual_seed(37 + number) for number in range(count)]


@functools.cache
def text_encoder() -> MultilingualCLIP:
    folder = kandinsky_21_decoder()
    return MultilingualCLIP.from_component(
        Component(folder / "text_encoder", folder, stem="model"), folder / "tokenizer"
    )


Z_I, ZERO = random(2, EMBED_DIM, seed=1), random(1, EMBED_DIM, seed=2)


@functools.cache
def decoder(version: str, masks: bool = False) -> KandinskyDecoder:
    """As the door loads it, with a CLIP that says ZERO of the zero image."""
    folder = FOLDERS[version, masks]()
    made = KandinskyDecoder.from_component(Component(folder / "unet", folder))
    made.set_null_condition(
        SimpleNamespace(encode_zero_image=lambda: ZERO), text_encoder() if version == "2.1" else None
    )
    return made


@functools.cache
def movq() -> MoVQ:
    folder = kandinsky_22_decoder()
    return MoVQ.from_component(Component(folder / "movq", folder))


def ours(
    version: str, name: str, scale: float, known: Tensor | None = None, count: int = 2, steps: int = 4, **more
) -> Tensor:
    """Latents as this project draws them."""
    model, scheduler = decoder(version, known is not None), SCHEDULERS[name]
    text = text_encoder().encode(PROMPTS[:count]) if version == "2.1" else None
    predict = build_decoder_predict(model, scheduler, build_decoder_condition(model, Z_I[:count], text, known), scale)
    own = generators(count)
    noise = generate_noise((4, KANDINSKY_LATENTS, KANDINSKY_LATENTS), own, torch.device("cpu"))
    return sample_from_noise(predict, scheduler, noise, Sampling(steps, own, **more))


def reference(kind: type, masks: bool = False, name: str = "ddpm"):
    """A pipeline of diffusers with the same tiny models."""
    version = "2.2" if "V22" in kind.__name__ else "2.1"
    parts = {"unet": tiny_kandinsky_unet(version, masks), "movq": tiny_movq(), "scheduler": SCHEDULERS[name]}
    if version == "2.1":
        parts |= {"text_encoder": tiny_multilingual_clip(), "tokenizer": tiny_multilingual_tokenizer()}
    pipeline = kind(**parts)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def settings(scale: float, count: int = 2, steps: int = 4) -> dict:
    """Of a reference's pipeline; without guidance it wants the second embedding all the same."""
    embeddings = {"image_embeds": Z_I[:count], "negative_image_embeds": ZERO.expand(count, -1)}
    sizes = {"height": PIXELS, "width": PIXELS, "num_inference_steps": steps, "guidance_scale": scale}
    return {**embeddings, **sizes, "generator": generators(count), "output_type": "pt", "return_dict": False}


def close(mine: Tensor, theirs: Tensor, within: float = 1e-5) -> None:
    torch.testing.assert_close(mine, theirs, atol=within, rtol=1e-5)


def same_pictures(latents: Tensor, theirs: Tensor) -> None:
    """Rounding grows with guidance, and where all is noise, for DDIM divides by the little that is left of the sample:
    most are within 2e-5."""
    close(movq().decode(latents), theirs, 1e-4)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_2_2_draws_the_pictures_of_diffusers(name: str, scale: float) -> None:
    (theirs,) = reference(KandinskyV22Pipeline, name=name)(**settings(scale))
    mine = ours("2.2", name, scale)
    same_pictures(mine, theirs)
    assert theirs[0].sub(theirs[1]).abs().max() > 0.01
    (alone,) = reference(KandinskyV22Pipeline, name=name)(**settings(scale, count=1))
    same_pictures(ours("2.2", name, scale, count=1), alone)


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_2_1_draws_the_pictures_of_diffusers_for_captions_of_mixed_lengths(name: str, scale: float) -> None:
    (theirs,) = reference(KandinskyPipeline, name=name)(PROMPTS, **settings(scale))
    same_pictures(ours("2.1", name, scale), theirs)
    (alone,) = reference(KandinskyPipeline, name=name)(PROMPTS[:1], **settings(scale, count=1))
    same_pictures(ours("2.1", name, scale, count=1), alone)


def test_2_1_reads_its_captions() -> None:
    model, t = decoder("2.1"), torch.tensor([500])
    texts = [text_encoder().encode([prompt]) for prompt in PROMPTS]
    x = random(1, 4, KANDINSKY_LATENTS, KANDINSKY_LATENTS, seed=3)
    first, second = (model(x, t, ImageCondition(Z_I[:1], text)) for text in texts)
    assert (first - second).abs().max() > 1e-3
    with pytest.raises(ValueError, match="reads captions"):
        model.prepare(ImageCondition(Z_I[:1]))


# Inpainting: half an image is painted anew, along whole latents

MASK = torch.zeros(2, 1, PIXELS, PIXELS)
MASK[0, :, :, PIXELS // 2 :] = 1
MASK[1, :, : PIXELS // 2] = 1
PICTURES = random(2, 3, PIXELS, PIXELS, seed=4).tanh()


@pytest.fixture
def mask_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference without its `prepare_mask`, which the next test is about."""
    for module in (pipeline_kandinsky_inpaint, pipeline_kandinsky2_2_inpainting):
        monkeypatch.setattr(module, "prepare_mask", lambda mask: mask)


def of_latents(number: slice) -> tuple[Tensor, Tensor]:
    return movq().encode(PICTURES[number]), nn.functional.max_pool2d(MASK[number], 2)


@pytest.mark.usefixtures("mask_as_given")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_2_2_inpaints_as_diffusers_does(name: str, scale: float) -> None:
    pipeline = reference(KandinskyV22InpaintPipeline, True, name)
    given = {"image": PICTURES[:1], "mask_image": MASK[:1].clone()}
    (theirs,) = pipeline(**given, **settings(scale, count=1))
    latents, mask = of_latents(slice(1))
    noise = generate_noise(latents.shape[1:], generators(1), torch.device("cpu"))
    hold = build_blend_callback(SCHEDULERS[name], latents, mask, noise)
    mine = ours("2.2", name, scale, concat_masked_latents(latents, mask), count=1, on_step=hold)
    same_pictures(mine, theirs)


@pytest.mark.usefixtures("mask_as_given")
@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_2_1_inpaints_a_batch_as_diffusers_does_which_does_not_blend(name: str, scale: float) -> None:
    pipeline = reference(KandinskyInpaintPipeline, True, name)
    (theirs,) = pipeline(PROMPTS, PICTURES, MASK.clone(), **settings(scale))
    same_pictures(ours("2.1", name, scale, concat_masked_latents(*of_latents(slice(2)))), theirs)


@pytest.mark.usefixtures("mask_as_given")
def test_each_picture_of_a_batch_keeps_its_own_latents_where_diffusers_keeps_the_first_ones() -> None:
    """The reference blends with image[:1] and mask[:1]: it deviates, for the second image comes from the first."""
    pipeline = reference(KandinskyV22InpaintPipeline, True)
    (theirs,) = pipeline(image=PICTURES, mask_image=MASK.clone(), **settings(4.0) | {"output_type": "latent"})
    latents, mask = of_latents(slice(2))
    noise = generate_noise(latents.shape[1:], generators(), torch.device("cpu"))
    known, hold = concat_masked_latents(latents, mask), build_blend_callback(SCHEDULERS["ddpm"], latents, mask, noise)
    mine = ours("2.2", "ddpm", 4.0, known, on_step=hold)
    close(mine[0], theirs[0])
    assert torch.equal(mine * (1 - mask), latents * (1 - mask))
    close(theirs[1] * (1 - mask[0]), latents[0] * (1 - mask[0]))
    assert ((theirs - latents)[1] * (1 - mask[1])).abs().max() > 0.1


def test_a_mask_stays_where_it_is_where_diffusers_grows_it_to_four_sides_and_two_corners() -> None:
    """The reference deviates: its `prepare_mask` paints neighbours of what was to be painted, and not all alike."""
    painted = torch.zeros(1, 1, 5, 5)
    painted[..., 2, 2] = 1
    theirs = 1 - pipeline_kandinsky2_2_inpainting.prepare_mask(1 - painted)
    spread = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 1, 1]]).float()
    assert torch.equal(theirs[0, 0, 1:4, 1:4], spread) and theirs.sum() == 7

    latents = random(1, 4, KANDINSKY_LATENTS, KANDINSKY_LATENTS, seed=5)
    mask = torch.zeros_like(latents[:, :1])
    mask[..., 2, 2] = 1
    context = decoder("2.2", masks=True).prepare(
        ImageCondition(Z_I[:1], masked_latents=concat_masked_latents(latents, mask))
    )
    assert torch.equal(context.masked_latents, torch.cat([latents * (1 - mask), 1 - mask], dim=1))


def test_without_a_picture_an_inpainting_model_paints_everything() -> None:
    context = decoder("2.2", masks=True).prepare(ImageCondition(Z_I))
    assert (
        context.masked_latents.shape == (2, 5, 1, 1)  # for latents of every shape
        and not context.masked_latents.any()
    )


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_2_2_starts_from_a_picture_as_diffusers_does(name: str, scale: float) -> None:
    """The reference's branch that would scale latents by 0.18215 is dead: it encodes, unscaled, before it."""
    pipeline = reference(KandinskyV22Img2ImgPipeline, name=name)
    (theirs,) = pipeline(image=PICTURES / 2 + 0.5, strength=0.5, **settings(scale))
    mine = ours("2.2", name, scale, original=movq().encode(PICTURES), strength=0.5)
    close(movq().decode(mine).clamp(-1, 1) / 2 + 0.5, theirs, 1e-4)


def test_movq_neither_scales_nor_rounds_to_its_codebook() -> None:
    model = tiny_movq()
    latents = movq().encode(PICTURES)
    close(latents, model.encode(PICTURES).latents)
    close(movq().decode(latents), model.decode(latents, force_not_quantize=True).sample)
    assert (movq().decode(latents) - model.decode(latents).sample).abs().max() > 0.01
    assert (movq().channels, movq().factor) == (4, 2) and latents.shape == (2, 4, PIXELS // 2, PIXELS // 2)


def test_the_text_encoder_says_what_that_of_diffusers_says() -> None:
    tokenizer = tiny_multilingual_tokenizer()
    for texts in (PROMPTS, ["", "a cat " * 60]):
        tokens = tokenizer(texts, padding="max_length", truncation=True, max_length=77, return_tensors="pt")
        pooled, states = tiny_multilingual_clip()(tokens.input_ids, tokens.attention_mask)
        mine = text_encoder().encode(texts)
        close(mine.pooled, pooled)
        close(mine.states, states)
        assert mine.mask.all() and mine.mask.shape == (2, 77)
    assert (
        text_encoder().find_truncated_text("a cat " * 60).startswith("cat")
        and text_encoder().find_truncated_text("a cat") == ""
    )


def test_the_null_is_the_zero_picture_and_the_empty_caption() -> None:
    null, empty = decoder("2.1").null(3).expand(), text_encoder().encode([""])
    assert isinstance(null.text, TokenStates) and len(null) == 3
    close(null.embedding, ZERO.expand(3, -1))
    close(null.text.states[2], empty.states[0])
    close(null.text.pooled[2], empty.pooled[0])
    assert decoder("2.2").null(1).text is None
    with pytest.raises(InputError, match="needs its text_encoder"):
        decoder("2.1").set_null_condition(SimpleNamespace(encode_zero_image=lambda: ZERO))


def test_saved_and_loaded_they_are_the_same(tmp_path: Path) -> None:
    for model in (decoder("2.1"), decoder("2.2", masks=True), movq(), text_encoder()):
        model.save_pretrained(tmp_path / "part")
        again = type(model).from_pretrained(tmp_path / "part")
        assert again.state_dict().keys() == model.state_dict().keys()
        for name, tensor in model.state_dict().items():
            assert torch.equal(again.state_dict()[name], tensor), name
        shutil.rmtree(tmp_path / "part")
    text_encoder().save_pretrained(tmp_path)
    again = MultilingualCLIP.from_pretrained(tmp_path)
    assert again.identity == text_encoder().identity
    close(again.encode(PROMPTS).pooled, text_encoder().encode(PROMPTS).pooled)


def fresh(version: str) -> KandinskyDecoder:
    """One that a test may change."""
    folder = FOLDERS[version, False]()
    model = KandinskyDecoder.from_component(Component(folder / "unet", folder))
    model.load_state_dict(decoder(version).state_dict())
    return model


def test_weights_that_are_only_there_while_they_are_needed_change_nothing() -> None:
    """As with sequential offload: between the calls they are on no device."""
    folder = kandinsky_22_decoder()
    model, coder = fresh("2.1"), MoVQ.from_component(Component(folder / "movq", folder))
    encoder = MultilingualCLIP.from_component(
        Component(kandinsky_21_decoder() / "text_encoder", stem="model"), kandinsky_21_decoder() / "tokenizer"
    )
    noise = random(2, 4, KANDINSKY_LATENTS, KANDINSKY_LATENTS, seed=6)

    def draw() -> Tensor:
        text = encoder.encode(PROMPTS, torch.device("cpu"))
        latents = sample_from_noise(
            build_decoder_predict(model, SCHEDULERS["ddim"], build_decoder_condition(model, Z_I, text), 4.0),
            SCHEDULERS["ddim"],
            noise,
            Sampling(2),
        )
        with torch.no_grad():
            return coder.decode(latents)

    with torch.no_grad():
        expected = draw()
        for part in (model, coder, encoder):
            cpu_offload(part, torch.device("cpu"))
            assert {parameter.device.type for parameter in part.parameters()} == {"meta"}
        close(draw(), expected)


@pytest.mark.parametrize("version", ["2.1", "2.2"])
def test_it_is_trained_as_our_decoders_are_with_its_null_for_what_is_dropped(version: str) -> None:
    model = fresh(version).train().requires_grad_(True)
    text = text_encoder().encode(PROMPTS) if version == "2.1" else None
    condition = drop_condition(ImageCondition(Z_I, text), model.null(2), 0.5)
    x, gradients = random(2, 4, KANDINSKY_LATENTS, KANDINSKY_LATENTS, seed=8), []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.enable_gradient_checkpointing()
        torch.manual_seed(0)
        losses, _ = compute_diffusion_loss(model, build_noise_scheduler({"beta_schedule": "linear"}), x, condition)
        losses["loss"].backward()
        assert losses.keys() == {"loss", "bound"}
        gradients.append({name: one.grad.clone() for name, one in model.named_parameters()})
    assert all(gradient.abs().max() > 0 for name, gradient in gradients[0].items() if name.endswith("to_k.weight"))
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-5, rtol=1e-4)


def test_half_precision_is_kept(tmp_path: Path) -> None:
    tiny_kandinsky_unet().half().save_pretrained(tmp_path / "unet")
    model = KandinskyDecoder.from_component(Component(tmp_path / "unet", tmp_path))
    assert {tensor.dtype for tensor in model.state_dict().values()} == {torch.float16}
    assert KandinskyDecoder.from_component(Component(tmp_path / "unet"), torch.float32).dtype == torch.float32


def test_other_u_nets_are_refused_with_the_reason(tmp_path: Path) -> None:
    for name, changed, said in (
        ("hint", {"addition_embed_type": "image_hint", "in_channels": 9}, "got 9 and 8"),
        ("mixed", {"addition_embed_type": None}, "addition_embed_type .*got None"),
        ("channels", {"out_channels": 7}, "got 4 and 7"),
    ):
        tiny_kandinsky_unet(**changed).save_pretrained(tmp_path / name)
        with pytest.raises(InputError, match=said):
            KandinskyDecoder.from_component(Component(tmp_path / name, tmp_path))
    with pytest.raises(InputError, match="embed_dim must be 16 for this U-Net, got 17"):
        KandinskyDecoder(**{**decoder("2.2").config, "embed_dim": 17})


def test_an_autoencoder_of_codebook_numbers_is_refused() -> None:
    with pytest.raises(InputError, match="lookup_from_codebook"):
        MoVQ({**movq().config.vq, "lookup_from_codebook": True})


def test_attentions_of_older_files_load(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    shutil.copytree(kandinsky_22_decoder() / "movq", tmp_path / "movq")
    path = tmp_path / "movq" / "diffusion_pytorch_model.safetensors"
    tensors, names = load_file(path), {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in names.items():
        tensors = {name.replace(f".{new}.", f".{old}."): tensor for name, tensor in tensors.items()}
    save_file(tensors, path)
    older = MoVQ.from_component(Component(tmp_path / "movq", tmp_path))
    close(older.decode(movq().encode(PICTURES)), movq().decode(movq().encode(PICTURES)))
    assert "coder.encoder.mid_block.attentions.0.to_out.0.weight" in older.state_dict()
