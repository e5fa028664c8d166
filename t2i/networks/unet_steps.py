"""diffusers' UNet2DConditionModel, run so that what depends on the condition alone is computed once per picture.

`prepare_unet_context` projects the condition and makes the keys and values that every attention has of its tokens.
`run_unet_step` calls the
model's own layers with that. On a CPU each convolution's weights are put, at the first step, in the order in which
oneDNN reads them for pictures of that size, which it would do in every step otherwise. A U-Net of other layers than
these runs by its own `forward`.
"""

from dataclasses import dataclass
from itertools import product
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, ref

import torch
import torch.nn.functional as F
from diffusers import Transformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor2_0, AttnProcessor2_0
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.unets import unet_2d_blocks as blocks
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn

from t2i.networks.layers import KeyValue, split_attention_heads

KNOWN_BLOCKS = (
    blocks.DownBlock2D,
    blocks.CrossAttnDownBlock2D,
    blocks.ResnetDownsampleBlock2D,
    blocks.SimpleCrossAttnDownBlock2D,
    blocks.UNetMidBlock2D,
    blocks.UNetMidBlock2DCrossAttn,
    blocks.UNetMidBlock2DSimpleCrossAttn,
    blocks.UpBlock2D,
    blocks.CrossAttnUpBlock2D,
    blocks.ResnetUpsampleBlock2D,
    blocks.SimpleCrossAttnUpBlock2D,
)
KNOWN_LAYERS: dict[str, tuple[type[nn.Module], ...]] = {  # of a block's lists, that `run_unet_step` knows
    "resnets": (ResnetBlock2D,),
    "attentions": (Attention, Transformer2DModel),
    "downsamplers": (Downsample2D, ResnetBlock2D),
    "upsamplers": (Upsample2D, ResnetBlock2D),
}
FREE_U_ATTRIBUTES = ("s1", "s2", "b1", "b2")  # what diffusers' FreeU sets in a block
KNOWN_SETTINGS: dict[str, tuple[Any, ...]] = {  # of a U-Net, that `run_unet_step` knows
    "center_input_sample": (False,),
    "class_embeddings_concat": (False,),
    "addition_embed_type": (None, "image", "text_image"),
    "encoder_hid_dim_type": (None, "text_proj", "image_proj", "text_image_proj"),
}


class PackedWeights(dict[nn.Module, Tensor]):
    """Weights of convolutions as oneDNN reads them: a second copy, for as long as a context holds it."""

    def __init__(self, of: list[tuple[int, int]]):
        super().__init__()
        self.weight_versions = of  # the weights as they were


PACKED_WEIGHTS: WeakKeyDictionary[nn.Module, "ref[PackedWeights]"] = WeakKeyDictionary()


@dataclass
class UNetStepContext:
    """What a step needs of the condition, in place of the condition itself."""

    added_embedding: Tensor | None  # (B, E), to the timestep's embedding
    keys: dict[nn.Module, KeyValue]  # of each attention that looks at the tokens
    mask: Tensor | None  # (B, 1, 1, L), bool: which tokens count
    packed_weights: PackedWeights | None = None  # where oneDNN convolves


class ActivatedTimeEmbedding(NamedTuple):
    """A timestep's embedding, (B, E), and what the activation that nearly all blocks have makes of it."""

    embedding: Tensor
    silu: Tensor

    def get_block_embedding(self, block: ResnetBlock2D) -> Tensor:
        if block.skip_time_act:
            return self.embedding
        return self.silu if isinstance(block.nonlinearity, nn.SiLU) else block.nonlinearity(self.embedding)


def prepare_unet_context(
    unet: UNet2DConditionModel,
    encoder_hidden_states: Tensor | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
    encoder_attention_mask: Tensor | None = None,
    unique_rows: tuple[Tensor, Tensor] | None = None,
) -> UNetStepContext | None:
    """Of a condition as `unet.forward` takes it; the mask: bool, (B, L). None for a U-Net that `run_unet_step` does
    not know.

    unique_rows: as `Condition.find_unique_rows` returns them, so that the same condition is computed once.
    """
    if not is_known_unet(unet):
        return None
    states, labels, told, mask = encoder_hidden_states, class_labels, added_cond_kwargs or {}, encoder_attention_mask
    given = [value for value in (states, labels, mask, *told.values()) if value is not None]
    every = torch.arange(len(given[0]), device=given[0].device)
    first, rows = unique_rows or (every, every)
    states, labels, mask = (None if one is None else one[first] for one in (states, labels, mask))
    told, like = {name: value[first] for name, value in told.items()}, next(one for one in given if one is not mask)
    embedding = unet.get_class_embed(like, labels)
    extra = unet.get_aug_embed(like, states, told)
    both = [one for one in (embedding, extra) if one is not None]
    tokens = unet.process_encoder_hidden_states(states, told)
    keys = {
        one: compute_key_value(one, tokens)
        for one in unet.modules()
        if isinstance(one, Attention) and is_token_attention(one)
    }
    allowed = None if mask is None else mask[rows, None, None, :]
    keys = {one: (key[rows], value[rows]) for one, (key, value) in keys.items()}
    return UNetStepContext(
        sum(both[1:], both[0])[rows] if both else None, keys, allowed, get_packed_weights(unet, like)
    )


def prepare_unconditional_context(unet: UNet2DModel, like: Tensor) -> UNetStepContext | None:
    """For a U-Net that is told nothing but pictures like these; None for one that `run_unet_step` does not know."""
    if unet.config.time_embedding_type != "positional" or unet.class_embedding is not None or not is_known_unet(unet):
        return None
    return UNetStepContext(None, {}, None, get_packed_weights(unet, like))


def run_unet_step(unet: UNet2DConditionModel | UNet2DModel, x: Tensor, t: Tensor, context: UNetStepContext) -> Tensor:
    """What `unet(x, t, ...)` predicts: x: (B, C, H, W), t: (B,)."""
    time = unet.time_embedding(unet.time_proj(t).to(x.dtype))
    if context.added_embedding is not None:
        time = time + context.added_embedding
    if getattr(unet, "time_embed_act", None) is not None:
        time = unet.time_embed_act(time)
    times = ActivatedTimeEmbedding(time, F.silu(time))
    if context.packed_weights is not None:
        x = x.contiguous(memory_format=torch.channels_last)
    x = run_packed_convolution(unet.conv_in, x, context)
    skips = [x]
    for block in unet.down_blocks:
        for i in range(len(block.resnets)):
            skips.append(x := run_layer_pair(block, i, i, x, times, context))
        for sampler in block.downsamplers or ():
            skips.append(x := resample_features(sampler, x, times, None, context))
    if unet.mid_block is not None:
        x = run_resnet_block(unet.mid_block.resnets[0], x, times, context)
        for i in range(len(unet.mid_block.attentions)):
            if unet.mid_block.attentions[i] is not None:
                x = run_attention_block(unet.mid_block.attentions[i], x, context)
            x = run_resnet_block(unet.mid_block.resnets[i + 1], x, times, context)
    for block in unet.up_blocks:
        for i in range(len(block.resnets)):
            x = run_layer_pair(block, i, i, torch.cat([x, skips.pop()], dim=1), times, context)
        for sampler in block.upsamplers or ():
            x = resample_features(sampler, x, times, skips[-1].shape[-2:], context)
    if unet.conv_norm_out is not None:
        x = apply_activation(unet.conv_act, unet.conv_norm_out(x))
    return run_packed_convolution(unet.conv_out, x, context)


def run_layer_pair(
    block: nn.Module, resnet: int, attention: int, x: Tensor, times: ActivatedTimeEmbedding, context: UNetStepContext
) -> Tensor:
    x = run_resnet_block(block.resnets[resnet], x, times, context)
    return run_attention_block(block.attentions[attention], x, context) if hasattr(block, "attentions") else x


def resample_features(
    sampler: nn.Module, x: Tensor, times: ActivatedTimeEmbedding, size: torch.Size | None, context: UNetStepContext
) -> Tensor:
    """Half the sides, or those of `size`."""
    if isinstance(sampler, ResnetBlock2D):
        return run_resnet_block(sampler, x, times, context)
    return sampler(x, size) if isinstance(sampler, Upsample2D) else sampler(x)


def run_resnet_block(
    block: ResnetBlock2D, x: Tensor, times: ActivatedTimeEmbedding, context: UNetStepContext
) -> Tensor:
    hidden = apply_activation(block.nonlinearity, block.norm1(x))
    for resample in (block.upsample, block.downsample):
        if resample is not None:
            x, hidden = resample(x), resample(hidden)
    hidden = run_packed_convolution(block.conv1, hidden, context)
    moved = block.time_emb_proj(times.get_block_embedding(block))[:, :, None, None]
    if block.time_embedding_norm == "scale_shift":
        scale, shift = moved.chunk(2, dim=1)
        hidden = torch.addcmul(shift, block.norm2(hidden), 1 + scale)
    else:
        hidden = block.norm2(hidden + moved)
    hidden = apply_activation(block.nonlinearity, hidden)
    if block.dropout.training:
        hidden = block.dropout(hidden)
    hidden = run_packed_convolution(block.conv2, hidden, context)
    if block.conv_shortcut is not None:
        x = run_packed_convolution(block.conv_shortcut, x, context)
    hidden = x + hidden
    return hidden if block.output_scale_factor == 1 else hidden / block.output_scale_factor


def run_attention_block(attention: nn.Module, x: Tensor, context: UNetStepContext) -> Tensor:
    """Pixels look at each other and at the tokens."""
    height, width = x.shape[-2:]
    if isinstance(attention, Attention):  # at both at once
        pixels = attention.group_norm(x).flatten(2).transpose(1, 2).contiguous()  # read three times
        past = context.keys[attention]
        mask = context.mask
        if attention.only_cross_attention:
            keys, values = past
        else:
            own = compute_key_value(attention, pixels, own=True)
            keys, values = (torch.cat(pair, dim=2) for pair in zip(past, own))
            mask = None if mask is None else F.pad(mask, (0, pixels.shape[1]), value=True)
        pixels = compute_attention_output(attention, pixels, (keys, values), mask)
        return x + pixels.transpose(1, 2).unflatten(2, (height, width))
    assert isinstance(attention, Transformer2DModel), "is_known_unet has looked"
    hidden = attention.norm(x)
    if not attention.use_linear_projection:
        hidden = run_packed_convolution(attention.proj_in, hidden, context)
    pixels = hidden.flatten(2).transpose(1, 2)
    if attention.use_linear_projection:
        pixels = attention.proj_in(pixels)
    for block in attention.transformer_blocks:
        normed = block.norm1(pixels)
        pixels = pixels + compute_attention_output(block.attn1, normed, compute_key_value(block.attn1, normed), None)
        pixels = pixels + compute_attention_output(
            block.attn2, block.norm2(pixels), context.keys[block.attn2], context.mask
        )
        pixels = pixels + block.ff(block.norm3(pixels))
    if attention.use_linear_projection:
        pixels = attention.proj_out(pixels)
    hidden = pixels.transpose(1, 2).unflatten(2, (height, width))
    return x + (
        hidden if attention.use_linear_projection else run_packed_convolution(attention.proj_out, hidden, context)
    )


def compute_attention_output(attention: Attention, x: Tensor, seen: KeyValue, mask: Tensor | None) -> Tensor:
    """(B, L, C), of what their queries find."""
    query = split_attention_heads(attention.to_q(x), attention.heads)
    found = F.scaled_dot_product_attention(query, *seen, attn_mask=mask)
    return attention.to_out[1](attention.to_out[0](found.transpose(1, 2).flatten(2)))


def compute_key_value(attention: Attention, x: Tensor, own: bool = False) -> KeyValue:
    """Keys and values of (B, L, C). own: of the pixels, where an attention has others for the tokens."""
    if attention.added_kv_proj_dim is not None and not own:
        key, value = attention.add_k_proj(x), attention.add_v_proj(x)
    else:
        key, value = attention.to_k(x), attention.to_v(x)
    return split_attention_heads(key, attention.heads), split_attention_heads(value, attention.heads)


def run_packed_convolution(layer: nn.Module, x: Tensor, context: UNetStepContext) -> Tensor:
    plain = type(layer) is not nn.Conv2d or layer.padding_mode != "zeros" or isinstance(layer.padding, str)
    plain = plain or bool(layer._forward_hooks or layer._forward_pre_hooks)  # somebody wants to be called
    # What is packed has no gradient, and a compiler packs by itself.
    if plain or context.packed_weights is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return layer(x)
    sizes = (layer.padding, layer.stride, layer.dilation, layer.groups)
    packed = context.packed_weights.get(layer)
    if packed is None:
        weight = layer.weight.detach().contiguous(memory_format=torch.channels_last)
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *sizes, list(x.shape))
        context.packed_weights[layer] = packed  # for other numbers of pictures too
    return torch.ops.mkldnn._convolution_pointwise(x, packed, layer.bias, *sizes, "none", [], "")


def get_packed_weights(unet: nn.Module, like: Tensor) -> PackedWeights | None:
    """None where oneDNN does not convolve. Contexts of the same weights share it: guidance in an interval has two."""
    if not can_pack_weights(unet, like):
        return None
    weights = [one.weight for one in unet.modules() if isinstance(one, nn.Conv2d)]
    now = [(one.data_ptr(), 0 if one.is_inference() else one._version) for one in weights]
    held = PACKED_WEIGHTS[unet]() if unet in PACKED_WEIGHTS else None
    if held is None or held.weight_versions != now:
        held = PackedWeights(now)
        PACKED_WEIGHTS[unet] = ref(held)
    return held


def can_pack_weights(unet: nn.Module, like: Tensor) -> bool:
    """Whether oneDNN convolves, in a dtype that it packs, with weights that stay where they are."""
    if not torch.backends.mkldnn.enabled or not torch.backends.mkldnn.is_available():
        return False
    if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.bfloat16):
        return False
    if like.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # as without AVX-512
        return False
    convolutions = [one for one in unet.modules() if isinstance(one, nn.Conv2d)]
    here = all(one.weight.device.type == "cpu" and one.weight.dtype == like.dtype for one in convolutions)
    return here and not any(hasattr(one, "_hf_hook") for one in convolutions)


def apply_activation(function: nn.Module, x: Tensor) -> Tensor:
    """`function` of what nobody else holds."""
    return F.silu(x, inplace=not torch.is_grad_enabled()) if isinstance(function, nn.SiLU) else function(x)


def is_known_unet(unet: UNet2DConditionModel | UNet2DModel) -> bool:
    """Whether `run_unet_step` computes what the U-Net's own `forward` does."""
    if any(unet.config.get(key, allowed[0]) not in allowed for key, allowed in KNOWN_SETTINGS.items()):
        return False
    parts = [*unet.down_blocks, *([] if unet.mid_block is None else [unet.mid_block]), *unet.up_blocks]
    if any(
        type(part) not in KNOWN_BLOCKS or any(getattr(part, name, None) for name in FREE_U_ATTRIBUTES) for part in parts
    ):
        return False
    for part, (name, kinds) in product(parts, KNOWN_LAYERS.items()):
        if any(one is not None and type(one) not in kinds for one in getattr(part, name, None) or ()):
            return False
    return all(is_known_layer(one) for part in parts for one in part.modules())


def is_known_layer(one: nn.Module) -> bool:
    match one:
        case ResnetBlock2D():
            return one.time_emb_proj is not None
        case Upsample2D():
            return one.norm is None and not one.use_conv_transpose and one.interpolate
        case Downsample2D():
            return one.norm is None
        case Transformer2DModel():
            return one.is_input_continuous and getattr(one, "caption_projection", None) is None
        case BasicTransformerBlock():
            plain = one.norm_type == "layer_norm" and one.attn2 is not None and one.pos_embed is None
            return plain and not one.only_cross_attention and one._chunk_size is None and is_token_attention(one.attn2)
        case Attention():
            if one.norm_cross or one.spatial_norm is not None or one.norm_q is not None or one.norm_k is not None:
                return False
            if one.added_kv_proj_dim is not None:
                return type(one.processor) is AttnAddedKVProcessor2_0
            usual = one.group_norm is None and not one.residual_connection and one.rescale_output_factor == 1
            return usual and type(one.processor) is AttnProcessor2_0
    return True


def is_token_attention(attention: Attention) -> bool:
    return attention.added_kv_proj_dim is not None or attention.is_cross_attention
