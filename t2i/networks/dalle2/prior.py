"""The diffusion prior of DALLE2-pytorch, whose published weights are LAION's.

The sequence is the paper's (DALL-E 2, section 2.2). The transformer cannot be rewritten as that of
`t2i.networks.prior.Prior`: relative and rotary positions, queries and keys of unit length, one head of keys and values,
gated feed-forward layers. Padding is learned, and is attended to.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from t2i.checks import check_integer
from t2i.diffusion.condition import TextEncoding
from t2i.diffusion.denoiser import PriorMixin, StoredDefaults
from t2i.diffusion.sampling_loop import check_sampling_defaults
from t2i.networks.dalle2.layers import OLD_BIAS_SCALE, Attention, KeyValue, Norm, embed_timesteps
from t2i.networks.decoder import build_null_embeds
from t2i.networks.linear import Linear
from t2i.runtime.hooks import run_like_forward

POSITION_BUCKETS, MAX_POSITION_DISTANCE = 32, 128  # of the relative positions


@dataclass
class DALLE2PriorContext:
    """The part of the sequence that depends on neither x nor t."""

    past: list[KeyValue]  # one pair a layer, of the padded caption and z_t
    dropped: Tensor  # (B,), bool: it is the null condition


class DALLE2Prior(StoredDefaults, PriorMixin, ModelMixin, ConfigMixin):
    """Denoiser of z_i times `embed_scale`, given a TextEncoding.

    The null condition is the zero z_t. It selects the learned tokens of "no caption", which replace the noisy z_i too.
    z_t and z_i have unit length outside; the reference does not normalise its result.

    Args:
        embed_dim: dimensions D of z_t and z_i, of a caption's token states, and of the transformer.
        depth, heads, head_width, mlp_ratio: sizes of the transformer.
        context_length: tokens that captions are padded or cut to.
        num_timesteps: rows of a table of timesteps; None for a network of their sines and cosines.
        time_tokens, image_tokens, text_tokens: number of tokens made from the timestep, the noisy z_i and z_t.
        norm_in, norm_out, project_out, inner_norm, rotary: layers that the transformer has.
        reads_captions: False if it reads z_t alone.
        old_attention: arithmetic of before release 1.4.3.
        learned_null: True from release 1.9.0 on. Older models have no learned null: guidance is off by default, and its
            null is the zero z_t with padding alone, which they never saw in training.
        embed_scale: None is sqrt(embed_dim).
        default_steps, default_guidance_scale: of sampling, where none are given.
    """

    _no_split_modules = ["Layer"]
    lora_targets = ("to_q", "to_kv", "to_out.0")

    @register_to_config
    def __init__(
        self,
        embed_dim: int,
        depth: int,
        heads: int = 8,
        head_width: int = 64,
        mlp_ratio: int = 4,
        context_length: int = 256,
        num_timesteps: int | None = None,
        time_tokens: int = 1,
        image_tokens: int = 1,
        text_tokens: int = 1,
        norm_in: bool = False,
        norm_out: bool = True,
        project_out: bool = True,
        inner_norm: bool = False,
        rotary: bool = True,
        reads_captions: bool = True,
        old_attention: bool = False,
        learned_null: bool = True,
        embed_scale: float | None = None,
        default_steps: int = 25,
        default_guidance_scale: float = 1.0,
        clip_fingerprint: str | None = None,
        learned_variance: bool = False,
    ):
        super().__init__()
        check_sampling_defaults(default_steps, default_guidance_scale)
        check_integer("context_length", context_length, 1, 1024)
        check_integer("depth", depth, 1, 1024)
        self.embed_scale = embed_dim**0.5 if embed_scale is None else embed_scale
        self.net = PriorNetwork(self.config)

    @property
    def states_width(self) -> int | None:
        """Dimensions of the CLIP token states that the prior reads; None if it reads none."""
        return self.config.embed_dim if self.config.reads_captions else None

    @run_like_forward
    def forward(self, x: Tensor, t: Tensor, text: TextEncoding) -> Tensor:
        """Predict from noisy scaled z_i, x: (B, D), at timesteps t: (B,). Returns (B, D)."""
        return self.step(x, t, self.prepare(text))

    @run_like_forward
    def prepare(self, text: TextEncoding) -> DALLE2PriorContext:
        text, length = text.expand(), self.config.context_length
        # A zero z_t is the null: no embedding of a caption is zero.
        dropped = (text.embedding == 0).all(dim=-1) & self.config.learned_null
        states, mask = text.states[:, :length], text.mask[:, :length] & self.config.reads_captions
        extra = length - mask.shape[1]
        states, mask = F.pad(states, (0, 0, 0, extra)), F.pad(mask, (0, extra))
        _, past = self.net.causal_transformer(self.net.build_caption_tokens(text.embedding, states, mask, dropped))
        return DALLE2PriorContext(past, dropped)

    @run_like_forward
    def step(self, x: Tensor, t: Tensor, context: DALLE2PriorContext) -> Tensor:
        """Run the rest of the sequence: timestep, noisy z_i and query."""
        tokens = self.net.build_image_tokens(x, t, context.dropped)
        transformer = self.net.causal_transformer
        tokens, _ = transformer(tokens, context.past)
        return transformer.project_out(transformer.norm(tokens[:, -1]))

    def null(self, count: int) -> TextEncoding:
        """Return the zero z_t, and a caption of no tokens."""
        z_t = build_null_embeds(self)
        states = z_t[:, None]
        mask = torch.zeros(states.shape[:2], dtype=torch.bool, device=z_t.device)
        return TextEncoding(z_t, states, mask).repeat(count)

    def scale_image_embeds(self, z_i: Tensor) -> Tensor:
        """Return z_i of unit length in the scale that the prior denoises."""
        return z_i * self.embed_scale

    def unscale_image_embeds(self, x: Tensor) -> Tensor:
        """Undo `scale_image_embeds`; the result has unit length whatever x is."""
        return F.normalize(x, dim=-1)


class PriorNetwork(nn.Module):
    """The network of a DALLE2Prior, with the names of the files. config: the prior's."""

    def __init__(self, config: dict):
        super().__init__()
        width = config["embed_dim"]
        self.to_text_embeds = nn.Sequential(build_token_layer(width, config["text_tokens"]))
        self.to_image_embeds = nn.Sequential(build_token_layer(width, config["image_tokens"]))
        self.width, total = width, width * config["time_tokens"]
        steps = config["num_timesteps"]
        # Sequential and Identity only give the tensors the names that they have in the files.
        self.to_time_embeds = nn.Sequential(
            nn.Embedding(steps, total) if steps else nn.Sequential(nn.Identity(), TimeNetwork(width, total))
        )
        self.learned_query = nn.Parameter(torch.randn(width))
        self.causal_transformer = CausalTransformer(config)
        # Releases before 1.9.0 have one learned tensor, for padding alone, under a name of its own.
        length, self.learned_null = config["context_length"], config["learned_null"]
        if self.learned_null:
            self.null_text_encodings = nn.Parameter(torch.randn(1, length, width))
            self.null_text_embeds = nn.Parameter(torch.randn(1, config["text_tokens"], width))
            self.null_image_embed = nn.Parameter(torch.randn(1, width))
        else:
            self.null_text_embed = nn.Parameter(torch.randn(1, length, width))

    @run_like_forward
    def build_caption_tokens(self, z_t: Tensor, states: Tensor, mask: Tensor, dropped: Tensor) -> Tensor:
        """Return the caption with learned padding, then z_t: (B, L + text_tokens, D).

        states: (B, L, D). mask: (B, L), bool. dropped: (B,), bool: learned tokens replace both.
        """
        padding = self.null_text_encodings if self.learned_null else self.null_text_embed
        caption = torch.where((mask & ~dropped[:, None])[..., None], states, padding.to(states.dtype))
        z_t = self.to_text_embeds(z_t).unflatten(-1, (-1, self.width))
        if self.learned_null:
            z_t = torch.where(dropped[:, None, None], self.null_text_embeds.to(z_t.dtype), z_t)
        return torch.cat([caption, z_t], dim=1)

    @run_like_forward
    def build_image_tokens(self, x: Tensor, t: Tensor, dropped: Tensor) -> Tensor:
        """Return the tokens of the timestep, the noisy z_i and the query: (B, time_tokens + image_tokens + 1, D)."""
        is_table = isinstance(self.to_time_embeds[0], nn.Embedding)
        time = self.to_time_embeds(t.long() if is_table else embed_timesteps(t, self.width).to(x.dtype))
        time = time.to(x.dtype).unflatten(-1, (-1, self.width))
        image = self.to_image_embeds(x).unflatten(-1, (-1, self.width))
        if self.learned_null:
            image = torch.where(dropped[:, None, None], self.null_image_embed.to(x.dtype), image)
        return torch.cat([time, image, self.learned_query.to(x.dtype).expand(len(x), 1, -1)], dim=1)


def build_token_layer(width: int, count: int) -> nn.Module:
    """Return a layer from a vector to `count` tokens; a single token is the vector itself."""
    return Linear(width, width * count) if count > 1 else nn.Identity()


class TimeNetwork(nn.Module):
    def __init__(self, width: int, out: int):
        super().__init__()
        hidden = 2 * out
        first, second = (nn.Sequential(Linear(inner, hidden), nn.SiLU()) for inner in (width, hidden))
        self.net = nn.Sequential(first, second, Linear(hidden, out))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class CausalTransformer(nn.Module):
    def __init__(self, config: dict):
        super().__init__()
        width = config["embed_dim"]
        self.bias_scale = OLD_BIAS_SCALE if config["old_attention"] else 1.0
        self.init_norm = Norm(width) if config["norm_in"] else nn.Identity()
        self.rel_pos_bias = RelativePositionBias(config["heads"])
        self.layers = nn.ModuleList(Layer(config) for _ in range(config["depth"]))
        self.norm = Norm(width, stable=True) if config["norm_out"] else nn.Identity()
        self.project_out = Linear(width, width, bias=False) if config["project_out"] else nn.Identity()

    def forward(self, x: Tensor, past: list[KeyValue] | None = None) -> tuple[Tensor, list[KeyValue]]:
        """Run tokens, (B, L, width), behind those of `past`; return their states before the last norm, and the keys and
        values of each layer."""
        first = 0 if past is None else past[0][0].shape[2]
        bias = self.bias_scale * self.rel_pos_bias(first, x.shape[1], x.device)
        x, pairs = self.init_norm(x), []
        for i, layer in enumerate(self.layers):
            x, pair = layer(x, bias, None if past is None else past[i])
            pairs.append(pair)
        return x, pairs


class Layer(nn.ModuleList):
    """Attention and feed-forward: the members 0 and 1 in the files' names."""

    def __init__(self, config: dict):
        width, inner = config["embed_dim"], int(config["mlp_ratio"] * config["embed_dim"])
        old = config["old_attention"]
        super().__init__(
            [
                Attention(
                    width, config["heads"], config["head_width"], cosine=not old, old=old, rotary=config["rotary"]
                ),
                nn.Sequential(
                    Norm(width),
                    Linear(width, 2 * inner, bias=False),
                    SwiGLU(),
                    Norm(inner) if config["inner_norm"] else nn.Identity(),
                    # Dropout in the reference: the next layer keeps its number.
                    nn.Identity(),
                    Linear(inner, width, bias=False),
                ),
            ]
        )

    def forward(self, x: Tensor, bias: Tensor, past: KeyValue | None) -> tuple[Tensor, KeyValue]:
        attended, pair = self[0].forward_with_key_value(x, bias, past)
        x = x + attended
        return x + self[1](x), pair


class SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        value, gate = x.chunk(2, dim=-1)
        return value * F.silu(gate)


class RelativePositionBias(nn.Module):
    """A learned bias for the distance of a key, in buckets that grow with it (as T5's); keys ahead are masked."""

    def __init__(self, heads: int):
        super().__init__()
        self.relative_attention_bias = nn.Embedding(POSITION_BUCKETS, heads)

    def forward(self, first: int, count: int, device: torch.device) -> Tensor:
        """Return the bias, (heads, count, 1 + first + count), fp32, of `count` queries from position `first` on."""
        # Key 0 is the learned key. The reference counts it as a position, so that distances of 0 and 1 are the same.
        query = torch.arange(first, first + count, device=device)[:, None]
        key = torch.arange(1 + first + count, device=device)
        distance = (query - key).clamp(min=0)
        exact = POSITION_BUCKETS // 2
        fraction = (distance.clamp(min=1).float() / exact).log() / math.log(MAX_POSITION_DISTANCE / exact)
        far = (exact + (fraction * (POSITION_BUCKETS - exact)).long()).clamp(max=POSITION_BUCKETS - 1)
        bias = self.relative_attention_bias(torch.where(distance < exact, distance, far)).permute(2, 0, 1).float()
        return bias.masked_fill(key > query + 1, float("-inf"))
