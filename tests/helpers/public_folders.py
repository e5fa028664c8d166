"""Folders in the public layouts, at tiny sizes with random weights, written by diffusers' and transformers' classes.

Here is what the families have in common, and ECLIPSE's prior; each has a module of its own beside this one. A
builder marked `built` runs once a process and returns its folder, which no test may
change: `shutil.copytree` it first.
"""

import atexit
import functools
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    PriorTransformer,
    UnCLIPScheduler,
)
from safetensors.torch import save_file
from torch import nn
from transformers import (
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)

EMBED_DIM = 16  # D of z_t and z_i in all tiny models; also the text towers' width, as in the public ones
MERGES = ("c a", "ca t</w>", "d o", "do g</w>", "r e", "re d</w>", "a n", "an d</w>")


@functools.cache
def session_folder() -> Path:
    """Of this process, removed at its end."""
    folder = Path(tempfile.mkdtemp(prefix="t2i-public-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def built(build: Callable[[Path], object]) -> Callable[[], Path]:
    """`build(folder)` fills a new folder; what is returned builds it on the first call and returns its path."""

    @functools.cache
    def path() -> Path:
        folder = session_folder() / build.__name__
        folder.mkdir()
        build(folder)
        return folder

    return path


def save_parts(folder: Path, class_name: str, **parts: tuple[str, Any]) -> None:
    """Components in subfolders, and the model_index.json: name=(library, component). A str is a class without files.

    As public repositories have it: a component's library is "diffusers", "transformers" or the name of the pipeline's
    own module, such as "unclip" for Karlo's text_proj.
    """
    index: dict[str, Any] = {"_class_name": class_name, "_diffusers_version": "0.17.0"}
    for name, (library, part) in parts.items():
        index[name] = [library, part if isinstance(part, str) else type(part).__name__]
        if isinstance(part, CLIPTokenizer):
            save_tokenizer(part, folder / name)
        elif not isinstance(part, str):
            part.save_pretrained(folder / name)
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))


def randomised(module: nn.Module, seed: int = 0) -> Any:
    """With other values wherever initialisation left a constant, so that nothing can be forgotten unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, value in [*module.named_parameters(), *module.named_buffers()]:
            if not value.is_floating_point() or value.numel() < 2 or (value != value.flatten()[0]).any():
                continue
            if name.endswith(("causal_attention_mask", "embeddings.position_ids")):
                continue
            value.add_(0.2 * torch.randn(value.shape, generator=generator))
    return module.eval().requires_grad_(False)


@functools.cache
def clip_vocabulary() -> dict[str, int]:
    """In CLIP's order: the bytes ("!" is 0), the bytes that end a word, merges, start and end."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [chr(byte) for byte in plain] + [chr(256 + n) for n in range(256 - len(plain))]
    words = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair.split()) for pair in MERGES)]
    return {word: number for number, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}


def tiny_tokenizer(pad: str = "!") -> CLIPTokenizer:
    """CLIP's with eight merges. pad: "!", which is 0, as Karlo has it; "<|endoftext|>" is transformers' usual."""
    merges = [tuple(pair.split()) for pair in MERGES]
    return CLIPTokenizer(clip_vocabulary(), merges, pad_token=pad, model_max_length=77)


def save_tokenizer(tokenizer: CLIPTokenizer, folder: Path) -> None:
    """As the public repositories have it: vocab.json and merges.txt, not transformers 5's tokenizer.json."""
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(clip_vocabulary()))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *MERGES]) + "\n")
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>"}
    special["pad_token"] = tokenizer.pad_token
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    about = {"model_max_length": 77, "tokenizer_class": "CLIPTokenizer", "do_lower_case": True, "errors": "replace"}
    (folder / "tokenizer_config.json").write_text(json.dumps(special | about))


def tiny_text_tower(
    embed_dim: int = EMBED_DIM, width: int = EMBED_DIM, seed: int = 0, old: bool = False
) -> CLIPTextModelWithProjection:
    """old: with the end token that public configurations before 2023 name, 2, which means: the highest number."""
    torch.manual_seed(seed)
    end = clip_vocabulary()["<|endoftext|>"]
    config = CLIPTextConfig(
        vocab_size=end + 1,
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=embed_dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=77,
        bos_token_id=0 if old else end - 1,
        eos_token_id=2 if old else end,
        pad_token_id=1,
    )
    return randomised(CLIPTextModelWithProjection(config), seed)


def tiny_image_tower(embed_dim: int = EMBED_DIM, size: int = 16, seed: int = 1) -> CLIPVisionModelWithProjection:
    torch.manual_seed(seed)
    config = CLIPVisionConfig(
        hidden_size=20,
        intermediate_size=40,
        projection_dim=embed_dim,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=size,
        patch_size=size // 2,
    )
    return randomised(CLIPVisionModelWithProjection(config), seed)


def tiny_image_processor(size: int = 16) -> CLIPImageProcessor:
    return CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})


def tiny_prior_transformer(embed_dim: int = EMBED_DIM, seed: int = 2, **changed: Any) -> PriorTransformer:
    """As Karlo's and Kandinsky's: 77 caption tokens, then z_t, time, noisy z_i, query."""
    torch.manual_seed(seed)
    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 2, "num_embeddings": 77}
    settings = sizes | {"embedding_dim": embed_dim, "additional_embeddings": 4} | changed
    prior = randomised(PriorTransformer(**settings), seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        prior.clip_mean.copy_(0.3 * torch.randn(1, embed_dim, generator=generator))
        prior.clip_std.copy_(0.5 + torch.rand(1, embed_dim, generator=generator))
    return prior


def prior_scheduler(clip_range: float = 5.0) -> UnCLIPScheduler:
    """Karlo's in diffusers' layout; Kandinsky's have clip_range 10."""
    return UnCLIPScheduler(
        variance_type="fixed_small_log",
        prediction_type="sample",
        clip_sample_range=clip_range,
        num_train_timesteps=1000,
    )


def save_eclipse_prior(folder: Path, **changed: Any) -> PriorTransformer:
    """As ECLIPSE's: a PriorTransformer's files without the time. What is returned has the time, which no token sees."""
    prior = tiny_prior_transformer(**changed)
    time = prior.config.num_embeddings + 1  # the place of its token
    prior.causal_attention_mask[:, :time, time] = prior.causal_attention_mask[:, time + 1 :, time] = -10000.0
    folder.mkdir(parents=True)
    tensors = {name: one for name, one in prior.state_dict().items() if not name.startswith("time_embedding.")}
    places = tensors["positional_embedding"]
    tensors["positional_embedding"] = torch.cat([places[:, :time], places[:, time + 1 :]], dim=1)
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    config = {key: value for key, value in prior.config.items() if not key.startswith("time_embed")}
    config |= {"_class_name": "PriorTransformer", "additional_embeddings": 3}
    (folder / "config.json").write_text(json.dumps(config))
    return prior
