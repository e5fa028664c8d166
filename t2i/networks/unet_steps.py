"""Steps of diffusers' U-Nets that compute what depends on the condition alone once per image.

`prepare_unet_context` computes the embedding of the condition, and each attention's keys and values of its tokens;
`run_unet_step` runs the U-Net's own layers with these. On processors the first step also puts each convolution's
weights in the order in which oneDNN reads them; otherwise every step would. A U-Net that `is_supported_unet` refuses
runs by its own `forward`, and so do all with `T2I_FAST_PATHS=0` (`t2i.runtime.fast_paths`).

Three private operators of torch are used, `PRIVATE_OPERATORS`; if one is missing, weights stay as they are. torch's own
compiler uses the same two to convolve. They have no gradient, so they run without gradients only.
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
from t2i.runtime import fast_paths
from t2i.runtime.hooks import list_hooks

SUPPORTED_BLOCKS = (
    *(blocks.DownBlock2D, blocks.CrossAttnDownBlock2D),
    *(blocks.ResnetDownsampleBlock2D, blocks.SimpleCrossAttnDownBlock2D),
    *(blocks.UNetMidBlock2D, blocks.UNetMidBlock2DCrossAttn, blocks.UNetMidBlock2DSimpleCrossAttn),
    *(blocks.UpBlock2D, blocks.CrossAttnUpBlock2D),
    *(blocks.ResnetUpsampleBlock2D, blocks.SimpleCrossAttnUpBlock2D),
)
SUPPORTED_LAYERS: dict[str, tuple[type[nn.Module], ...]] = {  # by the list of a block that they are in
    "resnets": (ResnetBlock2D,),
    "attentions": (Attention, Transformer2DModel),
    "downsamplers": (Downsample2D, ResnetBlock2D),
    "upsamplers": (Upsample2D, ResnetBlock2D),
}
SUPPORTED_SETTINGS: dict[str, tuple[Any, ...]] = {  # of a U-Net's configuration; the first value is the default
    "center_input_sample": (False,),
    "class_embeddings_concat": (False,),
    "addition_embed_type": (None, "image", "text_image", "image_hint"),
    "encoder_hid_dim_type": (None, "text_proj", "image_proj", "text_image_proj"),
}
UNCALLED = (  # modules that are written out here, so that hooks around their calls would not run
    *(UNet2DConditionModel, UNet2DModel, *SUPPORTED_BLOCKS),
    *(ResnetBlock2D, Transformer2DModel, BasicTransformerBlock, Attention),
)
FREE_U_ATTRIBUTES = ("s1", "s2", "b1", "b2")  # that diffusers' FreeU sets in a block
PRIVATE_OPERATORS = ("_reorder_convolution_weight", "_convolution_pointwise", "_is_mkldnn_bf16_supported")
HAS_PACKED_CONVOLUTION = torch.backends.mkldnn.is_available() and all(
    hasattr(torch.ops.mkldnn, name) for name in PRIVATE_OPERATORS
)


class PackedWeights(dict[nn.Module, Tensor]):
    """Convolutions' weights in oneDNN's order: a second copy, which lives as long as a context refers to it."""

    def __init__(self, weight_versions: list[tuple[int, int]]):
        super().__init__()
        self.weight_versions = weight_versions  # of the weights that were copied


# Contexts of one U-Net share its packed weights. Both references are weak, so neither outlives its last user.
PACKED_WEIGHTS: WeakKeyDictionary[nn.Module, "ref[PackedWeights]"] = WeakKeyDictionary()


@dataclass
class UNetStepContext:
    """All that a step needs of the condition, in place of the condition itself."""

    added_embedding: Tensor | None  # (B, E), added to the timestep's embedding
    key_values: dict[nn.Module, KeyValue]  # of the tokens, for each attention that attends to them
    mask: Tensor | None  # (B, 1, 1, L), bool: False for tokens that are padding
    packed_weights: PackedWeights | None = None  # where oneDNN convolves
    hint: Tensor | None = None  # (B, 4, H, W), of a control image, concatenated to x


class StepEmbedding(NamedTuple):
    """Embedding of the timestep and the condition, (B, E), and its activation, which nearly all blocks read."""

    plain: Tensor
    activated: Tensor


# The condition, once per image


def prepare_unet_context(
    unet: UNet2DConditionModel,
    encoder_hidden_states: Tensor | None = None,
    class_labels: Tensor | None = None,
    added_cond_kwargs: dict[str, Tensor] | None = None,
    encoder_attention_mask: Tensor | None = None,
    unique_rows: tuple[Tensor, Tensor] | None = None,
) -> UNetStepContext | None:
    """Return the context of B conditions, given as to `unet.forward`; None for a U-Net that is not supported.

    encoder_attention_mask: (B, L), bool. unique_rows: as `Condition.find_unique_rows` returns them, so that equal
    conditions are computed once.
    """
    if not is_supported_unet(unet):
        return None
    # Take one row of each group of equal conditions; `groups` leads back to all of them.
    states, labels, mask, added = encoder_hidden_states, class_labels, encoder_attention_mask, added_cond_kwargs or {}
    like = next(value for value in (states, labels, *added.values()) if value is not None)
    first, groups = unique_rows or (slice(None), slice(None))
    states, labels, mask = (None if value is None else value[first] for value in (states, labels, mask))
    # Equal conditions may have different control images, `hint`
    added = {name: value if name == "hint" else value[first] for name, value in added.items()}

    # The embeddings of the condition
    added_one, hint = unet.get_aug_embed(like, states, added), None
    if "hint" in added:
        added_one, hint = added_one
    embeddings = [unet.get_class_embed(like, labels), added_one]
    embeddings = [embedding for embedding in embeddings if embedding is not None]
    added_embedding = sum(embeddings[1:], embeddings[0])[groups] if embeddings else None

    # The keys and values of its tokens
    tokens = unet.process_encoder_hidden_states(states, added)
    attentions = [layer for layer in unet.modules() if isinstance(layer, Attention) and is_token_attention(layer)]
    key_values = {layer: compute_key_value(layer, tokens) for layer in attentions}
    key_values = {layer: (key[groups], value[groups]) for layer, (key, value) in key_values.items()}
    mask = None if mask is None else mask[groups, None, None, :]  # (U, L) -> (B, 1, 1, L)
    return UNetStepContext(added_embedding, key_values, mask, get_packed_weights(unet, like), hint)


def prepare_unconditional_context(unet: UNet2DModel, like: Tensor) -> UNetStepContext | None:
    """Return the context of a U-Net without a condition, for images with the device and dtype of `like`; None for a
    U-Net that is not supported."""
    if unet.config.time_embedding_type != "positional" or unet.class_embedding is not None:
        return None
    return UNetStepContext(None, {}, None, get_packed_weights(unet, like)) if is_supported_unet(unet) else None


# One step


def run_unet_step(unet: UNet2DConditionModel | UNet2DModel, x: Tensor, t: Tensor, context: UNetStepContext) -> Tensor:
    """Return the output of `unet(x, t, ...)`, (B, C', H, W), for x, (B, C, H, W), and timesteps t, (B,)."""
    # The embedding of the timestep and the condition
    embedding = unet.time_embedding(unet.time_proj(t).to(x.dtype))
    if context.added_embedding is not None:
        embedding = embedding + context.added_embedding
    if getattr(unet, "time_embed_act", None) is not None:
        embedding = unet.time_embed_act(embedding)
    step_embedding = StepEmbedding(embedding, find_block_activation(unet)(embedding))

    # Down, with a skip connection from every layer
    if context.hint is not None:
        x = torch.cat([x, context.hint], dim=1)
    if context.packed_weights is not None:
        x = x.contiguous(memory_format=torch.channels_last)  # as oneDNN's convolutions return it
    x = convolve(unet.conv_in, x, context)
    skips = [x]
    for block in unet.down_blocks:
        for i in range(len(block.resnets)):
            x = run_layer(block, i, x, step_embedding, context)
            skips.append(x)
        for sampler in block.downsamplers or ():
            x = (
                sampler(x)
                if isinstance(sampler, Downsample2D)
                else run_resnet_block(sampler, x, step_embedding, context)
            )
            skips.append(x)

    # The middle, which begins and ends with a resnet block
    if unet.mid_block is not None:
        x = run_resnet_block(unet.mid_block.resnets[0], x, step_embedding, context)
        for i, attention in enumerate(unet.mid_block.attentions):
            if attention is not None:
                x = run_attention(attention, x, context)
            x = run_resnet_block(unet.mid_block.resnets[i + 1], x, step_embedding, context)

    # Up, to the sizes of the skip connections: odd sides were rounded on the way down
    for block in unet.up_blocks:
        for i in range(len(block.resnets)):
            x = run_layer(block, i, torch.cat([x, skips.pop()], dim=1), step_embedding, context)
        for sampler in block.upsamplers or ():
            if isinstance(sampler, Upsample2D):
                x = sampler(x, skips[-1].shape[-2:])
            else:
                x = run_resnet_block(sampler, x, step_embedding, context)
    if unet.conv_norm_out is not None:
        x = activate(unet.conv_act, unet.conv_norm_out(x))
    return convolve(unet.conv_out, x, context)


def run_layer(block: nn.Module, i: int, x: Tensor, embedding: StepEmbedding, context: UNetStepContext) -> Tensor:
    x = run_resnet_block(block.resnets[i], x, embedding, context)
    return run_attention(block.attentions[i], x, context) if hasattr(block, "attentions") else x


def run_resnet_block(block: ResnetBlock2D, x: Tensor, embedding: StepEmbedding, context: UNetStepContext) -> Tensor:
    """Return the block's output, (B, C', H, W), for x, (B, C, H, W); half or twice the sides if it resamples."""
    # Norm, activation, resampling of both ways, convolution
    hidden = activate(block.nonlinearity, block.norm1(x))
    for resample in (block.upsample, block.downsample):
        if resample is not None:
            x, hidden = resample(x), resample(hidden)
    hidden = convolve(block.conv1, hidden, context)
    # The embedding scales and shifts the features, or is added to them
    change = block.time_emb_proj(embedding.plain if block.skip_time_act else embedding.activated)[:, :, None, None]
    if block.time_embedding_norm == "scale_shift":
        scale, shift = change.chunk(2, dim=1)
        hidden = torch.addcmul(shift, block.norm2(hidden), 1 + scale)
    else:
        hidden = block.norm2(hidden + change)
    # Activation, convolution, and the shortcut
    hidden = activate(block.nonlinearity, hidden)
    if block.dropout.training:
        hidden = block.dropout(hidden)
    hidden = convolve(block.conv2, hidden, context)
    if block.conv_shortcut is not None:
        x = convolve(block.conv_shortcut, x, context)
    hidden = x + hidden
    return hidden if block.output_scale_factor == 1 else hidden / block.output_scale_factor


def run_attention(layer: nn.Module, x: Tensor, context: UNetStepContext) -> Tensor:
    """Return the output, (B, C, H, W), of attention of the pixels of x, (B, C, H, W), to each other and to tokens."""
    run = run_joint_attention if isinstance(layer, Attention) else run_transformer
    return run(layer, x, context)


def run_joint_attention(attention: Attention, x: Tensor, context: UNetStepContext) -> Tensor:
    """Let pixels attend to tokens and pixels in one attention, as in Karlo and Kandinsky."""
    # (B, C, H, W) -> (B, H W, C); contiguous, for three projections read it.
    pixels = attention.group_norm(x).flatten(2).transpose(1, 2).contiguous()
    keys, values = context.key_values[attention]
    mask = context.mask
    if not attention.only_cross_attention:
        own_keys, own_values = compute_key_value(attention, pixels, of_pixels=True)
        keys, values = torch.cat([keys, own_keys], dim=2), torch.cat([values, own_values], dim=2)
        mask = None if mask is None else F.pad(mask, (0, pixels.shape[1]), value=True)
    out = compute_attention(attention, pixels, (keys, values), mask)
    return x + out.transpose(1, 2).unflatten(2, x.shape[-2:])


def run_transformer(transformer: Transformer2DModel, x: Tensor, context: UNetStepContext) -> Tensor:
    """Let pixels attend to pixels, then to tokens, block by block, as in Stable Diffusion."""
    hidden = transformer.norm(x)
    # The projections are linear layers of pixels, (B, H W, C), or convolutions of 1 x 1, (B, C, H, W).
    if transformer.use_linear_projection:
        pixels = transformer.proj_in(hidden.flatten(2).transpose(1, 2))
    else:
        pixels = convolve(transformer.proj_in, hidden, context).flatten(2).transpose(1, 2)
    # Self-attention, attention to the tokens, and the feed-forward layer
    for block in transformer.transformer_blocks:
        normed = block.norm1(pixels)
        pixels = pixels + compute_attention(block.attn1, normed, compute_key_value(block.attn1, normed), None)
        tokens = context.key_values[block.attn2]
        pixels = pixels + compute_attention(block.attn2, block.norm2(pixels), tokens, context.mask)
        pixels = pixels + block.ff(block.norm3(pixels))
    if transformer.use_linear_projection:
        return x + transformer.proj_out(pixels).transpose(1, 2).unflatten(2, x.shape[-2:])
    return x + convolve(transformer.proj_out, pixels.transpose(1, 2).unflatten(2, x.shape[-2:]), context)


def compute_attention(attention: Attention, x: Tensor, key_value: KeyValue, mask: Tensor | None) -> Tensor:
    """Return the output, (B, L, C), of attention of x, (B, L, C), to the keys and values."""
    query = split_attention_heads(attention.to_q(x), attention.heads)
    out = F.scaled_dot_product_attention(query, *key_value, attn_mask=mask)
    return attention.to_out[1](attention.to_out[0](out.transpose(1, 2).flatten(2)))


def compute_key_value(attention: Attention, x: Tensor, of_pixels: bool = False) -> KeyValue:
    """Return the keys and values of (B, L, C). Joint attention has further projections, which are for tokens."""
    if attention.added_kv_proj_dim is not None and not of_pixels:
        key, value = attention.add_k_proj(x), attention.add_v_proj(x)
    else:
        key, value = attention.to_k(x), attention.to_v(x)
    return split_attention_heads(key, attention.heads), split_attention_heads(value, attention.heads)


def find_block_activation(unet: UNet2DConditionModel | UNet2DModel) -> nn.Module:
    """Return the activation of the resnet blocks, which diffusers builds from one setting, `act_fn`."""
    return unet.down_blocks[0].resnets[0].nonlinearity


def activate(function: nn.Module, x: Tensor) -> Tensor:
    """Return `function(x)`, in place if it can be: x must not be used elsewhere."""
    return F.silu(x, inplace=not torch.is_grad_enabled()) if isinstance(function, nn.SiLU) else function(x)


# Convolutions with packed weights


def convolve(layer: nn.Module, x: Tensor, context: UNetStepContext) -> Tensor:
    """Return `layer(x)`, (B, C', H', W'), computed from packed weights where the context has them."""
    if context.packed_weights is None or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return layer(x)  # packed weights have no gradient, and a compiler packs by itself
    plain = type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    # Hooks run only in a call of the layer
    if not plain or layer._forward_hooks or layer._forward_pre_hooks or list_hooks(layer):
        return layer(x)
    geometry = (layer.padding, layer.stride, layer.dilation, layer.groups)
    packed = context.packed_weights.get(layer)
    if packed is None:
        # The order is the best for this shape of x, and correct for any other.
        weight = layer.weight.detach().contiguous(memory_format=torch.channels_last)
        packed = torch.ops.mkldnn._reorder_convolution_weight(weight, *geometry, list(x.shape))
        context.packed_weights[layer] = packed
    return torch.ops.mkldnn._convolution_pointwise(x, packed, layer.bias, *geometry, "none", [], "")


def get_packed_weights(unet: nn.Module, like: Tensor) -> PackedWeights | None:
    """Return the packed weights that all contexts of a U-Net share, at first none; None where oneDNN does not convolve.
    They are packed anew after a change of the weights."""
    if not can_pack_weights(unet, like):
        return None
    weights = [layer.weight for layer in unet.modules() if isinstance(layer, nn.Conv2d)]
    # torch counts in `_version` how often a tensor was changed in place; tensors of inference mode have no count.
    versions = [(weight.data_ptr(), 0 if weight.is_inference() else weight._version) for weight in weights]
    packed = PACKED_WEIGHTS[unet]() if unet in PACKED_WEIGHTS else None
    if packed is None or packed.weight_versions != versions:
        packed = PackedWeights(versions)
        PACKED_WEIGHTS[unet] = ref(packed)
    return packed


def can_pack_weights(unet: nn.Module, like: Tensor) -> bool:
    """Return True if oneDNN convolves, in the device and dtype of `like`, with weights that stay where they are."""
    if not HAS_PACKED_CONVOLUTION or not torch.backends.mkldnn.enabled:
        return False
    if like.device.type != "cpu" or like.dtype not in (torch.float32, torch.bfloat16):
        return False
    if like.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # as without AVX-512
        return False
    convolutions = [layer for layer in unet.modules() if isinstance(layer, nn.Conv2d)]
    fitting = all(layer.weight.device.type == "cpu" and layer.weight.dtype == like.dtype for layer in convolutions)
    return fitting and not any(list_hooks(layer) for layer in convolutions)  # hooks move weights


# What is supported


def is_supported_unet(unet: UNet2DConditionModel | UNet2DModel) -> bool:
    """Return True if `run_unet_step` computes the same as the U-Net's own `forward`, and fast paths are on."""
    if not fast_paths.enabled:
        return False
    if any(unet.config.get(key, allowed[0]) not in allowed for key, allowed in SUPPORTED_SETTINGS.items()):
        return False
    if any(isinstance(layer, UNCALLED) and list_hooks(layer) for layer in unet.modules()):
        return False
    parts = [*unet.down_blocks, *([] if unet.mid_block is None else [unet.mid_block]), *unet.up_blocks]
    for part in parts:
        if type(part) not in SUPPORTED_BLOCKS or any(getattr(part, name, None) for name in FREE_U_ATTRIBUTES):
            return False
    for part, (name, types) in product(parts, SUPPORTED_LAYERS.items()):
        if any(layer is not None and type(layer) not in types for layer in getattr(part, name, None) or ()):
            return False
    activation = type(find_block_activation(unet))
    return all(is_supported_layer(layer, activation) for part in parts for layer in part.modules())


def is_supported_layer(layer: nn.Module, activation: type[nn.Module]) -> bool:
    """Return False for a layer with an option that is not written out here. activation: class in all resnet blocks."""
    match layer:
        case ResnetBlock2D():
            return layer.time_emb_proj is not None and type(layer.nonlinearity) is activation
        case Upsample2D():
            return layer.norm is None and not layer.use_conv_transpose and layer.interpolate
        case Downsample2D():
            return layer.norm is None
        case Transformer2DModel():
            return layer.is_input_continuous and getattr(layer, "caption_projection", None) is None
        case BasicTransformerBlock():
            # Other norms read the timestep, and chunks split what is computed once here
            plain = layer.norm_type == "layer_norm" and layer.attn2 is not None and layer.pos_embed is None
            plain = plain and not layer.only_cross_attention and layer._chunk_size is None
            return plain and is_token_attention(layer.attn2)
        case Attention():
            if layer.norm_cross or any(norm is not None for norm in (layer.spatial_norm, layer.norm_q, layer.norm_k)):
                return False
            # Other processors compute something else, for instance that of a user's adapter
            if layer.added_kv_proj_dim is not None:
                return type(layer.processor) is AttnAddedKVProcessor2_0
            plain = layer.group_norm is None and not layer.residual_connection and layer.rescale_output_factor == 1
            return plain and type(layer.processor) is AttnProcessor2_0
    return True


def is_token_attention(attention: Attention) -> bool:
    """Return True for an attention to the condition's tokens, whether or not to pixels as well."""
    return attention.added_kv_proj_dim is not None or attention.is_cross_attention
