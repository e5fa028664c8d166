"""diffusers' PriorTransformer, as Karlo, Kandinsky and ECLIPSE have it, and this project's Prior: each from the other.

The arithmetic is the same; the names differ, and queries, keys and values are one tensor here. An imported prior is
quicker than the original: what depends on the caption alone is computed once, and a step runs two tokens, not 81.
"""

import inspect
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from accelerate import init_empty_weights
from diffusers import PriorTransformer
from torch import Tensor

from t2i.checks import check_integer
from t2i.diffusion.condition import TextEncoding
from t2i.errors import InputError
from t2i.files.component import Component, load_from_components
from t2i.files.untrusted import TensorSpec, bounded_meta_device, check_tensor_specs
from t2i.networks.prior import Prior
from t2i.networks.public.eclipse import EclipsePrior

DEFAULT_GUIDANCE_SCALE = 4.0  # of Karlo's and Kandinsky's pipelines
NULL_BUFFERS = ("null_embedding", "null_states")  # of a Prior; a PriorTransformer's pipeline encodes "" each time
SIZE_KEYS = ("num_attention_heads", "attention_head_dim", "num_layers", "embedding_dim", "num_embeddings")
REQUIRED_SETTINGS: dict[str, tuple[Any, str]] = {  # what a Prior can express, and why nothing else
    "added_emb_type": ("prd", "without a query token the output is that of the noisy embedding's token"),
    "norm_in_type": (None, "this project's prior has no norm before its first block"),
    "embedding_proj_norm_type": (None, "this project's prior has no norm of z_t"),
    "encoder_hid_proj_type": ("linear", "this project's prior reads the caption's tokens through a linear layer"),
    "time_embed_act_fn": ("silu", "this project's time embedding has SiLU"),
}


class CaptionEncoder(Protocol):
    """Of a CLIP, or of what is known of it, what a prior asks."""

    @property
    def unit_length(self) -> bool: ...
    @property
    def embed_dim(self) -> int: ...
    @property
    def text_width(self) -> int: ...
    def encode_text(self, texts: list[str]) -> TextEncoding: ...


def load_prior_transformer(
    part: Component, clip: CaptionEncoder | None = None, dtype: torch.dtype | None = None
) -> Prior | EclipsePrior:
    """What draws as a folder's PriorTransformer does, frozen: a Prior; without a token of the time, an EclipsePrior.

    clip: the prior's, which says what its null is (the encoding of the empty caption, which is not in the files) and
    whether embeddings have unit length; without one, the null is still to be set, by `prior.set_embed_statistics(null,
    prior.mean, prior.std)`. dtype: of floating-point tensors, None is that of the files.
    Raises InputError for what neither of the two can express, with the reason, and for a CLIP of other embeddings.
    """
    if part.config.get("additional_embeddings", 4) == 3:
        prior: Prior | EclipsePrior = load_eclipse_prior(part, dtype)
    else:
        prior = load_diffusion_prior(part, dtype, clip is not None and clip.unit_length)
    if clip is None:
        return prior
    if (theirs := (clip.embed_dim, clip.text_width)) != (ours := (prior.config.embed_dim, prior.config.text_width)):
        widths = f"embeddings and token states of {ours} dimensions, the CLIP's have {theirs}"
        raise InputError(f"{str(part.folder)!r} reads {widths}; they do not belong together")
    if isinstance(prior, Prior):
        prior.set_embed_statistics(clip.encode_text([""]), prior.mean, prior.std)
    return prior


def load_diffusion_prior(part: Component, dtype: torch.dtype | None, unit_length: bool) -> Prior:
    """unit_length: of the CLIP's embeddings, of this project's exported prior; public ones know them as they are."""
    settings = read_prior_config(part, 4)
    check_tensor_shapes(part, settings)
    ours = {**convert_prior_config(settings), "unit_length": unit_length}
    if not unit_length:
        ours["usual_guidance"] = DEFAULT_GUIDANCE_SCALE
    parts: dict[str, Component] = {"": RenamedComponent(part, map_tensor_names(settings["num_layers"]))}
    prior = load_from_components(lambda: Prior(**ours), parts, dtype, extra=NULL_BUFFERS)
    if not (prior.std > 0).all():
        raise InputError(f"{str(part.folder)!r} has a clip_std of 0: z_i's statistics were never set, all would be one")
    if unit_length:
        with torch.no_grad():
            prior.from_text.weight.div_(settings["embedding_dim"] ** 0.5)
    return prior


def load_eclipse_prior(part: Component, dtype: torch.dtype | None) -> EclipsePrior:
    settings = read_prior_config(part, 3)
    check_tensor_shapes(part, settings, time=False)
    names = map_tensor_names(settings["num_layers"], time=False)
    names = {ours: theirs for ours, theirs in names.items() if ours not in ("mean", "std")}  # which nothing reads
    return load_from_components(
        lambda: EclipsePrior(**convert_prior_config(settings)), {"": RenamedComponent(part, names)}, dtype
    )


def to_prior_transformer(prior: Prior) -> PriorTransformer:
    """The PriorTransformer that predicts the same, on the CPU, in the prior's dtype; `save_pretrained` writes a folder.

    What it cannot hold stays behind: the encoding of the empty caption, which its pipelines compute, and that z_i comes
    out of unit length: normalise what `post_process_latents` returns, if the CLIP's embeddings are.
    Raises InputError for what a PriorTransformer cannot express, with the reason.
    """
    config = prior.config
    if config.learned_variance:
        raise InputError("a PriorTransformer predicts z_i alone; this prior has learned the variance too")
    if config.text_width != config.embed_dim:
        widths = f"this prior's have {config.text_width} and {config.embed_dim} dimensions"
        raise InputError(f"a PriorTransformer reads token states as wide as the embeddings; {widths}")
    with init_empty_weights(include_buffers=False):
        made = PriorTransformer(
            num_attention_heads=config.heads,
            attention_head_dim=config.width // config.heads,
            num_layers=config.depth,
            embedding_dim=config.embed_dim,
            num_embeddings=config.context_length,
        )
    shapes = {name: tensor.shape for name, tensor in made.state_dict().items()}
    tensors: dict[str, Tensor] = {}
    state = prior.state_dict()
    for ours, theirs in map_tensor_names(config.depth).items():
        for name, tensor in zip(theirs, state[ours].detach().cpu().chunk(len(theirs))):
            tensors[name] = tensor.clone().view(shapes[name])
    if config.unit_length:  # the scale of z_t
        tensors["embedding_proj.weight"] *= config.embed_dim**0.5
    made.load_state_dict(tensors, assign=True)
    return made.eval().requires_grad_(False)


def map_tensor_names(depth: int, time: bool = True) -> dict[str, tuple[str, ...]]:
    """A Prior's tensors, and those of a PriorTransformer that each is made of, one below the other."""
    alone = {"positions": "positional_embedding", "query": "prd_embedding", "mean": "clip_mean", "std": "clip_std"}
    layers = {
        "from_states": "encoder_hidden_states_proj",
        "from_text": "embedding_proj",
        "from_image": "proj_in",
        "norm": "norm_out",
        "to_image": "proj_to_clip_embeddings",
    }
    if time:
        layers |= {f"from_time.linear_{i}": f"time_embedding.linear_{i}" for i in (1, 2)}
    names: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in alone.items()}
    for i in range(depth):
        mine, block = f"blocks.{i}.", f"transformer_blocks.{i}."
        layers |= {mine + "norm_1": block + "norm1", mine + "norm_2": block + "norm3"}
        layers |= {mine + "mlp.0": block + "ff.net.0.proj", mine + "mlp.2": block + "ff.net.2"}
        layers |= {mine + "attention.to_out": block + "attn1.to_out.0"}
        for kind in ("weight", "bias"):
            stacked = tuple(f"{block}attn1.to_{part}.{kind}" for part in "qkv")
            names[f"{mine}attention.to_qkv.{kind}"] = stacked
    for ours, theirs in layers.items():
        names |= {f"{ours}.{kind}": (f"{theirs}.{kind}",) for kind in ("weight", "bias")}
    return names


class RenamedComponent(Component):
    """A PriorTransformer's component under the names of a Prior; tensors come as soon as all of their parts have.

    names: see `map_tensor_names`. What they do not name is left out.
    """

    def __init__(self, part: Component, names: dict[str, tuple[str, ...]]):
        self.part, self.folder, self.root = part, part.folder, part.root
        self.config, self.files = part.config, part.files
        self.homes = {theirs: ours for ours, parts in names.items() for theirs in parts}
        self.names = names
        self.tensor_specs = {}
        for ours, parts in names.items():
            first = part.tensor_specs[parts[0]]
            self.tensor_specs[ours] = TensorSpec(first.dtype, compute_joined_shape(first.shape, len(parts)))

    def iterate_tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        waiting: dict[str, dict[str, Tensor]] = {}
        for theirs, tensor in self.part.iterate_tensors(dtype):
            if (ours := self.homes.get(theirs)) is None:
                continue
            parts = waiting.setdefault(ours, {})
            parts[theirs] = tensor
            if len(parts) == len(self.names[ours]):
                del waiting[ours]
                whole = [parts[name] for name in self.names[ours]]
                joined = whole[0] if len(whole) == 1 else torch.cat(whole)
                yield ours, joined.reshape(compute_joined_shape(tuple(joined.shape), 1))


def compute_joined_shape(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Of `count` tensors of a shape one below the other; a PriorTransformer's own tensors begin with a batch of one."""
    while len(shape) > 1 and shape[0] == 1 and count == 1:
        shape = shape[1:]
    return (shape[0] * count, *shape[1:])


def read_prior_config(part: Component, tokens: int) -> dict[str, Any]:
    """A PriorTransformer's arguments, checked, with diffusers' defaults where the configuration says nothing.

    tokens: how many `additional_embeddings` there must be: z_t, time, noisy z_i and query, or without the time.
    """
    folder, usual = str(part.folder), inspect.signature(PriorTransformer.__init__).parameters
    if (kind := part.config.get("_class_name", "PriorTransformer")) != "PriorTransformer":
        raise InputError(f"{folder!r} holds a {kind!r:.80}; it must be a PriorTransformer")
    settings = {name: one.default for name, one in usual.items() if name != "self"}
    settings |= {name: value for name, value in part.config.items() if name in settings}
    for name in SIZE_KEYS:
        check_integer(f"{name} in {folder!r}", settings[name], 1, 1_000_000)
    found = settings["additional_embeddings"]
    if found != tokens:
        which = {4: "z_t, time, noisy z_i and query", 3: "z_t, noisy z_i and query"}
        raise InputError(f"{folder!r} has additional_embeddings = {found!r:.80}; {tokens} are read: {which[tokens]}")
    for name, (value, reason) in REQUIRED_SETTINGS.items():
        if settings[name] != value:
            raise InputError(f"{folder!r} has {name} = {settings[name]!r:.80}, only {value!r} is read: {reason}")
    width = settings["num_attention_heads"] * settings["attention_head_dim"]
    for name, usual_size in (
        ("time_embed_dim", width),
        ("embedding_proj_dim", settings["embedding_dim"]),
        ("clip_embed_dim", settings["embedding_dim"]),
    ):
        if (size := settings[name]) not in (None, usual_size):
            reason = "z_t, z_i and the token states are of one width here, and so are time and tokens"
            raise InputError(f"{folder!r} has {name} = {size!r:.80}, only {usual_size} is read: {reason}")
    return settings


def convert_prior_config(settings: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a Prior, or an EclipsePrior, for a PriorTransformer's."""
    heads = settings["num_attention_heads"]
    return {
        "embed_dim": settings["embedding_dim"],
        "text_width": settings["embedding_dim"],
        "context_length": settings["num_embeddings"],
        "width": heads * settings["attention_head_dim"],
        "depth": settings["num_layers"],
        "heads": heads,
    }


def check_tensor_shapes(part: Component, settings: dict[str, Any], time: bool = True) -> None:
    """Refuse tensors that are not those of the configuration, by the names that they have in the file."""
    with bounded_meta_device(part.tensor_specs, part.folder):
        wanted = PriorTransformer(**settings).state_dict()
    if not time:
        wanted = {name: tensor for name, tensor in wanted.items() if not name.startswith("time_embedding.")}
    check_tensor_specs(wanted, part.tensor_specs, part.folder)
