"""Every model class of the project at tiny size: how it is built, and all that is asked of it."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from t2i.diffusion.condition import Condition, ImageCondition, TextEncoding, TokenStates
from t2i.diffusion.sampling_loop import Sampling
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.autoregressive_prior import AutoregressivePrior
from t2i.networks.classifier import LatentClassifier
from t2i.networks.clip import CLIP
from t2i.networks.dalle2.decoder import DALLE2Cascade, DALLE2Decoder, DALLE2Pixels
from t2i.networks.dalle2.prior import DALLE2Prior
from t2i.networks.decoder import Decoder
from t2i.networks.prior import Prior
from t2i.networks.public.clip_tokenizer import CLIPTokenizer
from t2i.networks.public.eclipse import EclipsePrior
from t2i.networks.public.kandinsky import KandinskyDecoder, derive_kandinsky_config
from t2i.networks.public.karlo import KarloDecoder
from t2i.networks.public.movq import MoVQ
from t2i.networks.public.multilingual_clip import MultilingualCLIP
from t2i.networks.public.stable_unclip import StableUnCLIPDecoder
from t2i.networks.public.super_resolution import SuperResolution
from t2i.networks.public.transformers_clip import TransformersCLIP
from t2i.networks.regression_prior import RegressionPrior
from t2i.networks.text_encoder import TextEncoder
from t2i.networks.unet_decoder import UNetDecoder
from t2i.networks.upsampler import LowResolution, Upsampler
from tests.helpers.public_folders import MERGES, clip_vocabulary

B, D, W, LENGTH = 2, 16, 12, 10  # rows, dimensions of z_i and of token states, tokens
BLOCKS = {"block_out_channels": [8, 16], "layers_per_block": 1, "norm_num_groups": 4, "attention_head_dim": 4}
CROSS = {
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    **BLOCKS,
}
SIMPLE = {
    "down_block_types": ["ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"],
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "up_block_types": ["SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"],
    "resnet_time_scale_shift": "scale_shift",
    **BLOCKS,
}
PLAIN = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2, "add_attention": False, **BLOCKS}
KANDINSKY: dict[str, dict[str, Any]] = {
    "2.1": {
        "addition_embed_type": "text_image",
        "encoder_hid_dim_type": "text_image_proj",
        "encoder_hid_dim": W,
        "cross_attention_dim": D,
    },
    "2.2": {
        "addition_embed_type": "image",
        "encoder_hid_dim_type": "image_proj",
        "encoder_hid_dim": D,
        "cross_attention_dim": 8,
    },
}
KANDINSKY["2.2 ControlNet"] = KANDINSKY["2.2"] | {"addition_embed_type": "image_hint"}
VQ = {
    "down_block_types": ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
    "up_block_types": ["AttnUpDecoderBlock2D", "UpDecoderBlock2D"],
    "block_out_channels": [32, 32],  # the spatial norm has 32 groups, always
    "layers_per_block": 1,
    "latent_channels": 4,
    "vq_embed_dim": 4,
    "num_vq_embeddings": 12,
    "norm_num_groups": 4,
    "norm_type": "spatial",
}
VAE = {
    "block_out_channels": [8, 16],
    "latent_channels": 4,
    "norm_num_groups": 4,
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
}
TOWER = {"hidden_size": W, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
VOCABULARY = clip_vocabulary()
TEXT_TOWER = {**TOWER, "projection_dim": D, "hidden_act": "gelu", "max_position_embeddings": LENGTH}
TEXT_TOWER |= {"vocab_size": len(VOCABULARY), "eos_token_id": len(VOCABULARY) - 1}
IMAGE_TOWER = {**TOWER, "projection_dim": D, "num_channels": 3, "image_size": 16, "patch_size": 8}
T5 = {"vocab_size": 40, "d_model": W, "d_kv": 6, "d_ff": 24, "num_layers": 2, "num_heads": 2, "pad_token_id": 0}
ROBERTA = {**TOWER, "vocab_size": 40, "max_position_embeddings": 20, "type_vocab_size": 1, "pad_token_id": 1}
UNET = {"dim": 8, "cond_dim": 6, "dim_mults": [1, 2], "attn_dim_head": 4, "attn_heads": 2}
NOISE_AT = torch.tensor([3, 700])


@dataclass(frozen=True)
class ModelCase:
    """A model class, its constructor's arguments, its `forward`, and all other methods that pipelines call."""

    model_class: Any
    arguments: dict[str, Any]
    forward: Callable[[Any], Any]
    methods: Callable[[Any], list[Any]]
    complete: Callable[[Any], object] | None = None  # adds what neither the constructor nor a folder of weights has

    def build(self) -> Any:
        """Return the model with seeded weights, in which nothing is zero or constant."""
        torch.manual_seed(0)
        model = self.model_class(**self.arguments).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn(parameter.shape).to(parameter)
        if self.complete is not None:
            self.complete(model)
        return model

    @torch.no_grad()
    def run(self, model: Any) -> list[Tensor]:
        """Return the tensors of the outputs of `forward` and of every other method."""
        return flatten([self.forward(model), *self.methods(model)])


def flatten(output: Any) -> list[Tensor]:
    """Return the floating-point tensors of a nested output."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() else []
    if isinstance(output, Condition):
        return flatten(list(output.parts.values()))
    return [tensor for part in output for tensor in flatten(part)]


def draw(*shape: int, seed: int = 1, like: Any = None) -> Tensor:
    """Return noise, the same for every call, in a model's dtype if one is given."""
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return noise if like is None else noise.to(like.dtype)


def caption(model: Any, width: int = W) -> TextEncoding:
    mask = torch.arange(LENGTH) < torch.tensor([4, LENGTH])[:, None]
    return TextEncoding(draw(B, D), draw(B, LENGTH, width), mask).to(torch.device("cpu"), model.dtype)


def image_condition(model: Any, text: bool = True, dim: int = D, length: int = LENGTH) -> ImageCondition:
    tokens = TokenStates(draw(B, length, W), torch.ones(B, length, dtype=torch.bool), draw(B, D)) if text else None
    return ImageCondition(draw(B, dim), tokens).to(torch.device("cpu"), model.dtype)


def denoise(x: tuple[int, ...], condition: Callable[[Any], Any], model: Any) -> Tensor:
    return model(draw(*x, like=model), NOISE_AT, condition(model))


def run_denoiser(x: tuple[int, ...], condition: Callable[[Any], Any], model: Any) -> list[Any]:
    """Two steps of one context, of a condition and the null, and both ways of z_i."""
    null, given = model.null(B), condition(model)
    outputs: list[Any] = [null]
    null = null.to(torch.device("cpu"), model.dtype)
    if getattr(given, "control", None) is not None:  # never part of a null
        null = replace(null, control=given.control)
    for one in (given, null):
        context = model.prepare(one)
        outputs += [model.step(draw(*x, seed=seed, like=model), NOISE_AT, context) for seed in (2, 3)]
    if hasattr(model, "unscale_image_embeds"):
        outputs += [model.unscale_image_embeds(draw(B, D)), model.scale_image_embeds(draw(B, D))]
    if hasattr(model, "noise_image_embeds"):
        outputs.append(model.noise_image_embeds(draw(B, D), draw(B, D, seed=2), 7))
    return outputs


def denoiser(model_class: Any, x: tuple[int, ...], condition: Callable[[Any], Any], **arguments: Any) -> ModelCase:
    """The case of a denoiser of x, of this shape without its rows."""
    shape = (B, *x)
    return ModelCase(
        model_class, arguments, partial(denoise, shape, condition), partial(run_denoiser, shape, condition)
    )


def kandinsky(version: str, condition: Any = None) -> ModelCase:
    inputs = 8 if "ControlNet" in version else 4
    unet = SIMPLE | KANDINSKY[version] | {"sample_size": 8, "in_channels": inputs, "out_channels": 8}
    arguments = {"model": unet, **derive_kandinsky_config(unet)}
    condition = condition or partial(image_condition, text=version == "2.1", length=77)
    return denoiser(KandinskyDecoder, (4, 8, 8), condition, **arguments)


def controlled(model: Any) -> ImageCondition:
    return replace(image_condition(model, text=False), control=draw(B, 3, 64, 64, like=model))


def run_autoregressive(model: Any) -> list[Any]:
    generators = [torch.Generator().manual_seed(seed) for seed in range(B)]
    codes = model.quantise_image_embeds(draw(B, D), draw(B, D, seed=2))
    sampled = model.sample_image_embeds(caption(model), None, Sampling(1, generators, 2.0))
    return [model.null(B), model.dequantise_codes(codes), sampled]


def run_clip(size: int, model: Any) -> list[Any]:
    methods = [model.encode_image(draw(B, 3, size, size, like=model)), model.encode_tokens(tokens())]
    return methods + [
        getattr(model, name)() for name in ("encode_zero_image", "compute_logit_scale") if hasattr(model, name)
    ]


def tokens(count: int = B) -> Tensor:
    """Return tokens that end with the highest, and padding after it."""
    rows = torch.randint(2, 30, (count, LENGTH), generator=torch.Generator().manual_seed(0))
    rows[:, 6], rows[:, 7:] = 39, 0
    return rows


def run_coder(model: Any) -> list[Any]:
    return [model.encode(draw(B, 3, 16, 16, like=model)), model.decode(draw(B, 4, 8, 8, like=model))]


def run_cascade(model: Any) -> list[Any]:
    generators = [torch.Generator().manual_seed(seed) for seed in range(B)]
    return [model.draw_images(draw(B, 3, 8, 8), Sampling(3, generators))]


def low_resolution(model: Any) -> LowResolution:
    condition = LowResolution(draw(B, 3, 8, 8), torch.tensor([0.1, 0.4]), draw(B, D))
    return condition.to(torch.device("cpu"), model.dtype)


def encode_tokens(model: Any) -> Any:
    return model.encode_tokens(tokens(), tokens() != 0)


def of_image(size: int) -> Callable[[Any], Any]:
    return lambda model: model(draw(B, 3, size, size, like=model))


def add_clip_tokenizer(model: Any) -> None:
    model.loaded_tokenizer = CLIPTokenizer(VOCABULARY, [tuple(pair.split()) for pair in MERGES], LENGTH)  # type: ignore[misc]


def nothing(model: Any) -> list[Any]:
    return []


PRIOR = {"embed_dim": D, "text_width": W, "context_length": LENGTH, "width": 16, "depth": 2, "heads": 2}
LATENTS = {"embed_dim": D, "latent_channels": 4, "latent_size": 8}
PIXELS = {"embed_dim": D, "latent_channels": 3, "latent_size": 8}
CLIP_MODEL = {
    "embed_dim": D,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 16, "layers": 2, "head_width": 8},
    "text_cfg": {"context_length": LENGTH, "vocab_size": 40, "width": W, "heads": 2, "layers": 2},
}
RESNET_MODEL = {
    **CLIP_MODEL,
    "vision_cfg": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "head_width": 8},
}
PREPROCESS = {"size": 16, "mean": [0.5] * 3, "std": [0.4] * 3}
STABLE_UNET = {**CROSS, "cross_attention_dim": W, "class_embed_type": "projection", "sample_size": 8}
MODELS = {
    "prior": denoiser(Prior, (D,), caption, **PRIOR),
    "autoregressive prior": ModelCase(
        AutoregressivePrior,
        {**PRIOR, "components": 4, "buckets": 8, "regression": {"kind": "mlp", "width": 8}},
        lambda model: model(caption(model), torch.tensor([[0, 1, 2, 3, 4], [7, 6, 5, 4, 3]])),
        run_autoregressive,
    ),
    "regression prior": ModelCase(
        RegressionPrior,
        {"embed_dim": D, "text_width": W, "kind": "mlp", "width": 8},
        lambda model: model(caption(model)),
        lambda model: [model.sample_image_embeds(caption(model)), model.scale_image_embeds(draw(B, D))],
    ),
    "eclipse": ModelCase(
        EclipsePrior,
        PRIOR,
        lambda model: model(draw(B, D, like=model), caption(model)),
        lambda model: [model.sample_image_embeds(caption(model), Sampling(1, noise=draw(B, D)))],
    ),
    "dalle2 prior": denoiser(
        DALLE2Prior, (D,), partial(caption, width=D), embed_dim=D, depth=2, heads=2, head_width=8, context_length=LENGTH
    ),
    "decoder": denoiser(
        Decoder, (4, 8, 8), image_condition, **LATENTS, width=16, depth=2, heads=2, patch_size=2, text_width=W
    ),
    "unet decoder": denoiser(
        UNetDecoder, (4, 8, 8), image_condition, **LATENTS, unet=CROSS, context_width=16, text_width=W
    ),
    "kandinsky 2.1": kandinsky("2.1"),
    "kandinsky 2.2": kandinsky("2.2"),
    "kandinsky controlnet": kandinsky("2.2 ControlNet", controlled),
    "karlo": denoiser(
        KarloDecoder,
        (3, 8, 8),
        image_condition,
        **PIXELS,
        text_width=W,
        context_width=8,
        time_width=32,
        unet_config=SIMPLE,
    ),
    "stable unclip": denoiser(
        StableUnCLIPDecoder,
        (4, 8, 8),
        partial(image_condition, dim=2 * D),
        **LATENTS,
        text_width=W,
        unet_config={**STABLE_UNET, "projection_class_embeddings_input_dim": 2 * D},
        noising={"beta_schedule": "squaredcos_cap_v2"},
        context_length=LENGTH,
    ),
    "dalle2 decoder": denoiser(
        DALLE2Decoder, (3, 8, 8), image_condition, **PIXELS, unet={**UNET, "max_text_len": LENGTH}, text_width=W
    ),
    "autoencoder": ModelCase(Autoencoder, {"vae": VAE}, run_coder, nothing),
    "movq": ModelCase(MoVQ, {"vq": VQ}, of_image(16), run_coder),
    "super-resolution": ModelCase(
        SuperResolution,
        {
            "first": {**PLAIN, "sample_size": 16, "in_channels": 6, "out_channels": 3},
            "last": {**PLAIN, "sample_size": 16, "in_channels": 6, "out_channels": 3},
            "scheduler": {"variance_type": "fixed_small_log", "prediction_type": "epsilon", "clip_sample_range": 1.0},
            "low_size": 8,
        },
        of_image(16),
        run_cascade,
    ),
    "dalle2 cascade": ModelCase(
        DALLE2Cascade,
        {"low_size": 8, "sizes": [16], "unets": [UNET], "schedulers": [{}], "noise_levels": [20]},
        of_image(16),
        run_cascade,
    ),
    "dalle2 pixels": ModelCase(DALLE2Pixels, {}, of_image(16), nothing),
    "upsampler": denoiser(Upsampler, (3, 16, 16), low_resolution, factor=2, low_size=8, unet=PLAIN, embed_dim=D),
    "classifier": ModelCase(
        LatentClassifier,
        {"classes": ["a", "b", "c"], "latent_channels": 4, "latent_size": 8, "embed_dim": D, "widths": [16, 16]},
        lambda model: model(draw(B, 4, 8, 8, like=model), torch.tensor([0.1, 0.9])),
        lambda model: [
            getattr(model, name)(draw(B, 4, 8, 8), torch.tensor([0.1, 0.9]))
            for name in ("predict_log_probs", "predict_image_embeds")
        ],
    ),
    "clip": ModelCase(
        CLIP,
        {"model": CLIP_MODEL, "preprocess": PREPROCESS},
        lambda model: model(draw(B, 3, 16, 16, like=model), tokens()),
        partial(run_clip, 24),
    ),
    "clip with a resnet": ModelCase(
        CLIP,
        {"model": RESNET_MODEL, "preprocess": {**PREPROCESS, "size": 32}},
        lambda model: model(draw(B, 3, 32, 32, like=model), tokens()),
        partial(run_clip, 32),
    ),
    "clip with a tower of its own": ModelCase(
        CLIP,
        {"model": {**CLIP_MODEL, "custom_text": True}, "preprocess": PREPROCESS},
        lambda model: model(draw(B, 3, 16, 16, like=model), tokens()),
        partial(run_clip, 16),
    ),
    "clip that sees padding": ModelCase(
        CLIP,
        {
            "model": {
                **CLIP_MODEL,
                "custom_text": True,
                "text_cfg": {**CLIP_MODEL["text_cfg"], "no_causal_mask": True, "pool_type": "last"},  # type: ignore[dict-item]
            },
            "preprocess": PREPROCESS,
        },
        lambda model: model(draw(B, 3, 16, 16, like=model), tokens()),
        partial(run_clip, 16),
    ),
    "transformers clip": ModelCase(
        TransformersCLIP,
        {"text": TEXT_TOWER, "vision": IMAGE_TOWER, "context_length": LENGTH},
        lambda model: model(draw(B, 3, 16, 16, like=model), model.tokenizer(["a cat", "a dog and"])),
        lambda model: [model.encode_zero_image(), model.encode_text(["red"])],
        add_clip_tokenizer,
    ),
    "t5": ModelCase(TextEncoder, {"architecture": "t5", "model": T5, "context_length": LENGTH}, encode_tokens, nothing),
    "roberta": ModelCase(
        TextEncoder, {"architecture": "roberta", "model": ROBERTA, "context_length": LENGTH}, encode_tokens, nothing
    ),
    "multilingual clip": ModelCase(
        MultilingualCLIP, {"model": ROBERTA, "pooled_width": D, "context_length": LENGTH}, encode_tokens, nothing
    ),
}


def list_float_tensors(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if tensor.is_floating_point()}


TRAINED = [name for name in MODELS if name not in ("super-resolution", "dalle2 cascade", "dalle2 pixels")]


def compute_loss(case: ModelCase, model: Any) -> Tensor:
    """Return a loss of the outputs of `forward`, for models whose `forward` does more than resize."""
    outputs = flatten([case.forward(model)])
    return torch.stack([(output.float() - draw(*output.shape)).square().mean() for output in outputs]).sum()
