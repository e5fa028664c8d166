"""Convert between diffusers' PriorTransformer, as Karlo, Kandinsky and ECLIPSE use it, and this project's Prior.

The arithmetic is the same; the names differ, and queries, keys and values are one tensor here.
"""

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import PriorTransformer
from torch import Tensor

from t2i.checks import check_integer
from t2i.errors import InputError
from t2i.files.component import Component, load_from_components
from t2i.files.untrusted import TensorSpec, bounded_meta_device, check_tensor_specs
from t2i.networks.prior import Prior
from t2i.networks.public.eclipse import EclipsePrior

DEFAULT_GUIDANCE_SCALE = 4.0  # of Karlo's and Kandinsky's pipelines
NULL_BUFFERS = ("null_embedding", "null_states")  # of a Prior; a PriorTransformer's pipeline encodes "" each time
SIZE_KEYS = ("num_attention_heads", "attention_head_dim", "num_layers", "embedding_dim", "num_embeddings")
REQUIRED_SETTINGS: dict[str, tuple[Any, str]] = {  # what a Prior can express, and the reason for no other value
    "added_emb_type": ("prd", "without a query token the output is that of the noisy embedding's token"),
    "norm_in_type": (None, "this project's prior has no norm before its first block"),
    "embedding_proj_norm_type": (None, "this project's prior has no norm of z_t"),
    "encoder_hid_proj_type": ("linear", "this project's prior reads the caption's tokens through a linear layer"),
    "time_embed_act_fn": ("silu", "this project's time embedding has SiLU"),
}
# Tensors of a PriorTransformer with leading axes of length one, and how many
BATCH_DIMS = {"positional_embedding": 1, "prd_embedding": 2, "clip_mean": 1, "clip_std": 1}
TOKEN_NAMES = {4: "z_t, time, noisy z_i and query", 3: "z_t, noisy z_i and query"}  # by `additional_embeddings`


# From a PriorTransformer


def load_prior_transformer(part: Component, clip: Any = None, dtype: torch.dtype | None = None) -> Prior | EclipsePrior:
    """Load a PriorTransformer as a Prior; or, without a token for the time, as an EclipsePrior. Frozen.

    clip: the prior's. Its encoding of the empty caption is the prior's null condition, which is not in the files.
    Without a CLIP the null is still to be set, by `prior.set_embed_statistics(null, prior.mean, prior.std)`. dtype: of
    floating-point tensors; None is that of the files. Raises InputError for what neither class can express, with the
    reason, and for a CLIP of other widths.
    """
    prior: Prior | EclipsePrior
    if part.config.get("additional_embeddings", 4) == 3:
        settings = read_prior_config(part, 3)
        names = map_tensor_names(settings["num_layers"], time=False)
        del names["mean"], names["std"]  # which an ECLIPSE prior does not use
        parts: dict[str, Component] = {"": RenamedComponent(part, names)}
        prior = load_from_components(lambda: EclipsePrior(**convert_prior_config(settings)), parts, dtype)
    else:
        prior = load_diffusion_prior(part, dtype, clip is not None and clip.unit_length)
    if clip is None:
        return prior
    # Its null condition comes from its CLIP
    clip_widths, prior_widths = (clip.embed_dim, clip.text_width), (prior.config.embed_dim, prior.config.text_width)
    if clip_widths != prior_widths:
        raise InputError(
            f"{str(part.folder)!r} reads embeddings and token states of {prior_widths} dimensions, the CLIP's have "
            f"{clip_widths}; they do not belong together"
        )
    if isinstance(prior, Prior):
        prior.set_embed_statistics(clip.encode_text([""]), prior.mean, prior.std)
    return prior


def load_diffusion_prior(part: Component, dtype: torch.dtype | None, unit_length: bool) -> Prior:
    """Load a Prior. unit_length: True if the CLIP's embeddings have length 1, as for this project's priors."""
    settings = read_prior_config(part, 4)
    arguments = {**convert_prior_config(settings), "unit_length": unit_length}
    if not unit_length:
        arguments["default_guidance_scale"] = DEFAULT_GUIDANCE_SCALE
    parts: dict[str, Component] = {"": RenamedComponent(part, map_tensor_names(settings["num_layers"]))}
    prior = load_from_components(lambda: Prior(**arguments), parts, dtype, extra=NULL_BUFFERS)
    if not (prior.std > 0).all():
        raise InputError(f"{str(part.folder)!r} has a clip_std of 0: z_i's statistics were never set, all would be one")
    if unit_length:
        # A Prior scales z_t of unit length by sqrt(D) before `from_text`; see `to_prior_transformer`.
        with torch.no_grad():
            prior.from_text.weight.div_(settings["embedding_dim"] ** 0.5)
    return prior


class RenamedComponent(Component):
    """A PriorTransformer's component with the tensors of a Prior. names: see `map_tensor_names`; other tensors are left
    out."""

    def __init__(self, part: Component, names: dict[str, tuple[str, ...]]):
        self.part, self.folder, self.root = part, part.folder, part.root
        self.config, self.files = part.config, part.files
        self.names = names
        self.prior_names = {public: name for name, sources in names.items() for public in sources}
        self.tensor_specs = {}
        for name, sources in names.items():
            first = part.tensor_specs[sources[0]]
            self.tensor_specs[name] = TensorSpec(first.dtype, compute_stacked_shape(first.shape, len(sources)))

    def iterate_tensors(self, dtype: torch.dtype | None = None) -> Iterator[tuple[str, Tensor]]:
        """Yield the names and tensors of a Prior, each joined from its public parts."""
        # Queries, keys and values may lie in any order; they wait for each other.
        waiting: dict[str, dict[str, Tensor]] = {}
        for public, tensor in self.part.iterate_tensors(dtype):
            name = self.prior_names.get(public)
            if name is None:
                continue
            sources = waiting.setdefault(name, {})
            sources[public] = tensor
            if len(sources) == len(self.names[name]):
                del waiting[name]
                ordered = [sources[source] for source in self.names[name]]
                stacked = ordered[0] if len(ordered) == 1 else torch.cat(ordered)
                yield name, stacked.reshape(compute_stacked_shape(tuple(stacked.shape), 1))


def compute_stacked_shape(shape: tuple[int, ...], count: int) -> tuple[int, ...]:
    """Return the shape of `count` tensors stacked along the first axis, without a PriorTransformer's batch of one."""
    while len(shape) > 1 and shape[0] == 1 and count == 1:
        shape = shape[1:]
    return (shape[0] * count, *shape[1:])


def read_prior_config(part: Component, tokens: int) -> dict[str, Any]:
    """Return a PriorTransformer's arguments, with diffusers' defaults for what the configuration lacks.

    tokens: the number of `additional_embeddings` that there must be, see `TOKEN_NAMES`. Raises InputError for other
    values, and for tensors that are not those of the configuration.
    """
    folder, defaults = str(part.folder), inspect.signature(PriorTransformer.__init__).parameters
    if (class_name := part.config.get("_class_name", "PriorTransformer")) != "PriorTransformer":
        raise InputError(f"{folder!r} holds a {class_name!r:.80}; it must be a PriorTransformer")
    # The arguments of a PriorTransformer
    settings = {name: parameter.default for name, parameter in defaults.items() if name != "self"}
    settings |= {name: value for name, value in part.config.items() if name in settings}
    for name in SIZE_KEYS:
        check_integer(f"{name} in {folder!r}", settings[name], 1, 1_000_000)
    if (count := settings["additional_embeddings"]) != tokens:
        raise InputError(
            f"{folder!r} has additional_embeddings = {count!r:.80}; {tokens} are read: {TOKEN_NAMES[tokens]}"
        )
    # The values that a Prior can express
    for name, (value, reason) in REQUIRED_SETTINGS.items():
        if settings[name] != value:
            raise InputError(f"{folder!r} has {name} = {settings[name]!r:.80}, only {value!r} is read: {reason}")
    width, embed_dim = settings["num_attention_heads"] * settings["attention_head_dim"], settings["embedding_dim"]
    sizes = {"time_embed_dim": width, "embedding_proj_dim": embed_dim, "clip_embed_dim": embed_dim}
    for name, expected in sizes.items():
        if (size := settings[name]) not in (None, expected):
            reason = "z_t, z_i and the token states are of one width here, and so are time and tokens"
            raise InputError(f"{folder!r} has {name} = {size!r:.80}, only {expected} is read: {reason}")
    # The tensors, by their names in the file
    with bounded_meta_device(part.tensor_specs, part.folder):
        tensors = PriorTransformer(**settings).state_dict()
    if tokens == 3:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("time_embedding.")}
    check_tensor_specs(tensors, part.tensor_specs, part.folder)
    return settings


def convert_prior_config(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of a Prior, or an EclipsePrior, for a PriorTransformer's."""
    heads = settings["num_attention_heads"]
    return {
        "embed_dim": settings["embedding_dim"],
        "text_width": settings["embedding_dim"],
        "context_length": settings["num_embeddings"],
        "width": heads * settings["attention_head_dim"],
        "depth": settings["num_layers"],
        "heads": heads,
    }


# To a PriorTransformer


def to_prior_transformer(prior: Prior) -> PriorTransformer:
    """Return a PriorTransformer with the same predictions, on the CPU, in the prior's dtype, frozen.

    It does not hold that z_i has unit length: for such embeddings, normalize what `post_process_latents` returns.
    Raises InputError for what a PriorTransformer cannot express, with the reason.
    """
    config = prior.config
    # Settings that a PriorTransformer lacks
    if config.learned_variance:
        raise InputError("a PriorTransformer predicts z_i alone; this prior has learned the variance too")
    if config.text_width != config.embed_dim:
        widths = f"this prior's have {config.text_width} and {config.embed_dim} dimensions"
        raise InputError(f"a PriorTransformer reads token states as wide as the embeddings; {widths}")
    # The model, and its tensors under their public names
    with init_empty_weights(include_buffers=False):
        model = PriorTransformer(**build_transformer_config(config))
    tensors = split_prior_tensors(prior.state_dict(), map_tensor_names(config.depth))
    if config.unit_length:  # a Prior scales z_t by sqrt(D) itself
        tensors["embedding_proj.weight"] *= config.embed_dim**0.5
    model.load_state_dict(tensors, assign=True)
    return model.eval().requires_grad_(False)


def build_transformer_config(config: Any) -> dict[str, Any]:
    """Return the arguments of a PriorTransformer for those of a Prior; the reverse of `convert_prior_config`."""
    return {
        "num_attention_heads": config.heads,
        "attention_head_dim": config.width // config.heads,
        "num_layers": config.depth,
        "embedding_dim": config.embed_dim,
        "num_embeddings": config.context_length,
    }


def split_prior_tensors(state: dict[str, Tensor], names: dict[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """Return copies of a Prior's tensors, on the CPU, by their names in a PriorTransformer; see `map_tensor_names`."""
    tensors = {}
    for name, sources in names.items():
        for public, tensor in zip(sources, state[name].detach().cpu().chunk(len(sources))):
            tensors[public] = tensor.clone().reshape((1,) * BATCH_DIMS.get(public, 0) + tensor.shape)
    return tensors


def map_tensor_names(depth: int, time: bool = True) -> dict[str, tuple[str, ...]]:
    """Return a Prior's tensor names, and for each the tensors of a PriorTransformer that are stacked into it."""
    # Tensors that stand alone, then layers with weight and bias
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
    names: dict[str, tuple[str, ...]] = {name: (public,) for name, public in alone.items()}
    # Blocks: queries, keys and values are stacked into one tensor
    for i in range(depth):
        block, public_block = f"blocks.{i}.", f"transformer_blocks.{i}."
        layers |= {block + "norm_1": public_block + "norm1", block + "norm_2": public_block + "norm3"}
        layers |= {block + "mlp.0": public_block + "ff.net.0.proj", block + "mlp.2": public_block + "ff.net.2"}
        layers |= {block + "attention.to_out": public_block + "attn1.to_out.0"}
        for kind in ("weight", "bias"):
            names[f"{block}attention.to_qkv.{kind}"] = tuple(f"{public_block}attn1.to_{part}.{kind}" for part in "qkv")
    for name, public in layers.items():
        names |= {f"{name}.{kind}": (f"{public}.{kind}",) for kind in ("weight", "bias")}
    return names
