"""A first recipe for own pictures: configurations of every stage, with sizes chosen from the data and the device.

The anchor is `configs/emoji`, which was tried to the end: 3,529 pictures, two CPU cores, about two hours.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from t2i.training.recipe.commented_yaml import add_comments, format_document
from t2i.training.recipe.sizes import (
    LARGE,
    MEDIUM,
    PUBLIC_PRIOR,
    DataFacts,
    Device,
    ExplainedValue,
    RecipeSize,
    choose_batch_size,
    choose_context_length,
    choose_recipe_size,
    choose_steps,
    choose_vocabulary_size,
)

from t2i.checks import check_choice
from t2i.config import DataConfig
from t2i.data.dataset import CaptionedPictures
from t2i.data.manifest import STATUS_OK, Manifest, find_manifest
from t2i.errors import InputError
from t2i.files.atomic import create_folder_atomically
from t2i.files.untrusted import is_folder, read_config
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.clip import CLIP
from t2i.networks.prior import Prior
from t2i.networks.tokenizer import CaptionTokenizer
from t2i.networks.unet_decoder import UNetDecoder
from t2i.runtime.memory import measure_available_memory

MIN_IMAGES, FEW_IMAGES = 10, 200
MAX_MEASURED_CAPTIONS = 2_000  # captions that tell how long they are
PUBLIC_CLIP = "ViT-B-32:laion2b_s34b_b79k"
STAGES = ("clip", "autoencoder", "cache", "prior", "decoder")  # the files, in the order of training
DIFFUSION_SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "clip_sample": False, "timestep_spacing": "trailing"}


@dataclass(frozen=True)
class Recipe:
    """What was chosen: the text of each configuration, and lines that say so."""

    files: dict[str, str]  # by stage
    lines: list[str]

    def write_folder(self, run: Path) -> None:
        """The new folder of the run, whole or not at all."""
        with create_folder_atomically(run.absolute()) as folder:
            for stage, text in self.files.items():
                (folder / f"{stage}.yaml").write_text(text, encoding="utf-8")


def check_run_folder(run: Path, data: str) -> None:
    """Refuse a folder that is in use or lies in the data, and names that a configuration cannot hold."""
    if run.exists() and not (run.is_dir() and not any(run.iterdir())):
        raise InputError(f"{str(run)!r} exists and is not overwritten; give a new folder")
    if Path(data).is_dir() and run.resolve().is_relative_to(Path(data).resolve()):
        raise InputError(f"{str(run)!r} lies in the data {data!r}, where its pictures would be taken for data")
    for name in (str(run), data):
        if "${" in name or name == "???" or not name.isprintable():
            raise InputError(f"{name!r} cannot stand in a configuration; give another name")
    parent = next(folder for folder in run.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{str(run)!r} cannot be written; give a folder that is yours")


def read_data_facts(path: str) -> DataFacts:
    """From a manifest. Raises InputError if there is none, or too few pictures to train on."""
    dataset = CaptionedPictures(DataConfig(path))
    if len(dataset) < MIN_IMAGES:
        raise InputError(f"{path!r} has {len(dataset)} pictures to train on; it takes {MIN_IMAGES} at least")
    columns = ["width", "height", "captions", "keywords"]
    table = pq.read_table(
        find_manifest(Path(path)), columns=columns, filters=[("status", "=", STATUS_OK)], partitioning=None
    )
    captions, keywords = (pc.list_value_length(table[name]) for name in ("captions", "keywords"))
    tokenizer = CaptionTokenizer.train(dataset.iterate_texts(), choose_vocabulary_size(pc.sum(captions).as_py()), 3)
    chosen = range(0, len(dataset), -(-len(dataset) // MAX_MEASURED_CAPTIONS))
    encoded = tokenizer.tokenizer.encode_batch([dataset.get_caption(i, draw=i) for i in chosen])
    return DataFacts(
        path=path,
        pictures=len(dataset),
        held_out=len(Manifest(path, None)) - len(dataset),
        side=int(np.median(np.minimum(table["width"].to_numpy(), table["height"].to_numpy()))),
        caption_tokens=math.ceil(np.percentile([len(one.ids) + 2 for one in encoded], 95)),  # with start and end
        captions=pc.sum(captions).as_py(),
        variations=16 if pc.max(keywords).as_py() else min(16, pc.max(captions).as_py()),
    )


def find_device(name: str) -> Device:
    """`auto` is a GPU if there is one."""
    check_choice("device", name, ("auto", "cpu", "cuda"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.cuda.is_available() and name != "cpu":
        count = torch.cuda.device_count()
        memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(count)) / 1e9
        return Device("cuda", cores, memory, count)
    if name == "cuda":
        raise InputError("device is 'cuda', but this torch sees no GPU; `t2i doctor` says what it sees")
    return Device("cpu", cores, measure_available_memory().total / 1e9)


def compose_recipe(
    run: Path,
    facts: DataFacts,
    device: Device,
    clip: str | None = None,
    autoencoder: str | None = None,
    image_size: int | None = None,
) -> Recipe:
    """The configurations of a run on this data and device; `clip` and `autoencoder` name trained or public ones.

    Raises InputError for models that are not there or do not fit.
    """
    size, side, why = choose_recipe_size(facts, device, image_size)
    models = {stage: dict(model) for stage, model in size.models.items()}
    limits = {"context_length": choose_context_length(facts), "vocab_size": choose_vocabulary_size(facts.captions)}
    models["clip"] |= {"init_logit_scale": 3.4, "text_cfg": limits | models["clip"]["text_cfg"]}
    if clip is not None:
        models["clip"] = read_clip_config(clip)
        if size is not LARGE and models["clip"]["embed_dim"] > MEDIUM.models["clip"]["embed_dim"]:
            models["prior"] = PUBLIC_PRIOR
    channels, factor = read_autoencoder_shape(autoencoder, models["autoencoder"])
    multiple = factor * 2 ** (len(models["decoder"]["unet"]["block_out_channels"]) - 1)
    if side % multiple:
        raise InputError(f"image-size must be a multiple of {multiple} with this autoencoder, got {side}")
    trained = [stage for stage in STAGES if {"clip": clip, "autoencoder": autoencoder}.get(stage) is None]
    counts = count_parameters(models, channels, side // factor, trained)
    writer = ConfigWriter(run, facts, device, size, side, why, models, clip or f"{run}/clip", autoencoder)
    files = {stage: getattr(writer, stage)() for stage in trained}
    lines = [
        f"{run}: for {facts.pictures:,} pictures to train on and {facts.held_out:,} held out, on {device}",
        f"  pictures     {side} x {side}: {why}",
    ]
    for stage in (stage for stage in trained if stage != "cache"):
        batch, steps = writer.choose_stage_batch(stage)[0], writer.choose_stage_steps(stage)
        lines.append(f"  {stage:<12} {counts[stage] / 1e6:.1f} M parameters, {steps[0]:,} steps of {batch}: {steps[1]}")
    return Recipe(files, lines + format_advice(facts, clip))


def format_advice(facts: DataFacts, clip: str | None) -> list[str]:
    """What to expect, where there is little data."""
    lines = []
    if facts.pictures < FEW_IMAGES:
        lines.append(
            f"warning: {facts.pictures} pictures are few: expect what it draws to be soft and near to one of them, and "
            "nothing from words that their captions lack"
        )
    if facts.pictures < MEDIUM.cpu_pictures and clip is None:
        lines.append(
            f"advice: a public CLIP knows more words than {facts.captions:,} captions teach: --clip {PUBLIC_CLIP} (it "
            "needs a network), or start from a trained model: docs/own-pictures.md, Fine-tuning"
        )
    if not facts.held_out:
        lines.append("advice: nothing is held out, so nothing tells learning from learning by heart; see --held-out")
    return lines


def read_clip_config(name: str) -> dict[str, Any]:
    """The configuration of a trained or public CLIP, as far as it can be known without a network."""
    if is_folder(name):
        config = read_folder_config(name, "CLIP")
        return config["model"]
    if name.startswith(("hf-hub:", "local-dir:")):
        return {"embed_dim": 512, "text_cfg": {"width": 512, "context_length": 77}}  # what most have
    model, _, tag = name.partition(":")
    if (config := open_clip.get_model_config(model)) is None or not open_clip.get_pretrained_cfg(model, tag):
        raise InputError(
            f"clip must be the folder of a trained CLIP or a public one, such as {PUBLIC_CLIP}; got {name!r}"
        )
    return config


def read_autoencoder_shape(name: str | None, model: dict[str, Any]) -> tuple[int, int]:
    """Channels of the latents, and pixels per latent: of a folder, of our own, or those of most public VAEs."""
    if name is not None and not is_folder(name):
        return 4, 8
    if name is not None:
        config = read_folder_config(name, "Autoencoder", "AutoencoderKL")
        model = config if config["_class_name"] == "Autoencoder" else {"vae": config}
    vae = model["vae"]
    return vae["latent_channels"], model.get("patch_size", 1) * 2 ** (len(vae["block_out_channels"]) - 1)


def read_folder_config(folder: str, *classes: str) -> dict[str, Any]:
    path = Path(folder) / "model" if is_folder(Path(folder) / "model") else Path(folder)
    if not (path / "config.json").is_file():
        raise InputError(f"no trained {classes[0]} in {folder!r}, it has no config.json")
    config = read_config(path / "config.json")
    if config.get("_class_name") not in classes:
        raise InputError(f"{folder!r} holds a {config.get('_class_name')!s:.80}; it must be a {' or '.join(classes)}")
    return config


def count_parameters(
    models: dict[str, dict[str, Any]], channels: int, latent_size: int, stages: list[str]
) -> dict[str, int]:
    """Of the models of these stages, without memory for them; of CLIP, with as many words as it may know."""
    clip, text = models["clip"], models["clip"]["text_cfg"]
    width, context = text.get("width", clip["embed_dim"]), text.get("context_length", 77)
    preprocess = {"size": 64, "mean": [0.5] * 3, "std": [0.5] * 3}
    make: dict[str, Callable[[], torch.nn.Module]] = {
        "clip": lambda: CLIP(clip, preprocess),
        "autoencoder": lambda: Autoencoder(**models["autoencoder"]),
        "prior": lambda: Prior(clip["embed_dim"], width, context, **models["prior"]),
        "decoder": lambda: UNetDecoder(clip["embed_dim"], channels, latent_size, **models["decoder"]),
    }
    with torch.device("meta"):
        return {stage: sum(one.numel() for one in make[stage]().parameters()) for stage in stages if stage in make}


@dataclass(frozen=True)
class ConfigWriter:
    """The text of each configuration, with the reason beside each value."""

    run: Path
    facts: DataFacts
    device: Device
    size: RecipeSize
    side: int
    why: str
    models: dict[str, dict[str, Any]]
    clip_name: str
    autoencoder_name: str | None

    def clip(self) -> str:
        model = self.models["clip"]
        longest = f"tokens; 95 of 100 captions have at most {self.facts.caption_tokens}, prompts may have more"
        entries = f"at most; words and pieces of words in {self.facts.captions:,} captions"
        text = add_comments(model["text_cfg"], context_length=longest, vocab_size=entries)
        size = model["vision_cfg"]["image_size"]
        values: dict[str, Any] = {
            "model": {
                "embed_dim": (model["embed_dim"], self.explain_size()),
                "init_logit_scale": (model["init_logit_scale"], "sharp from the start: a short run cannot move it far"),
                "vision_cfg": add_comments(
                    model["vision_cfg"], image_size="it sees pictures at this size, whatever data.image_size is"
                ),
                "text_cfg": text,
            },
            "preprocess": ({"size": size, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}, ""),
        }
        return self.format_config("clip", "CLIP: which caption belongs to which picture", values)

    def autoencoder(self) -> str:
        model = self.models["autoencoder"]
        channels, factor = read_autoencoder_shape(None, model)
        shape = f"pictures become {self.side // factor} x {self.side // factor} x {channels} latents"
        values: dict[str, Any] = {
            "model": {
                "patch_size": (model["patch_size"], "squares of pixels become channels: full resolution costs most"),
                "vae": add_comments(model["vae"], latent_channels=shape),
            },
            "kl_weight": (3e-3, "as configs/emoji"),
        }
        return self.format_config("autoencoder", "Autoencoder: pictures to latents, which the decoder draws", values)

    def cache(self) -> str:
        several = "draws of a picture's captions and keywords stand for the endless ones"
        values = {
            **self.list_frozen_models(autoencoder=True),
            "variations": (self.facts.variations, several if self.facts.variations > 1 else "each has one caption"),
            "data": self.build_data_section(),
            "output": (f"{self.run}/cache", ""),
        }
        return format_document(
            self.format_header("Cache: every picture and caption encoded once, for prior and decoder"), values
        )

    def prior(self) -> str:
        values = {
            **self.list_frozen_models(),
            "cache": (f"{self.run}/cache", "so that pictures are not encoded in every step"),
            "model": add_comments(self.models["prior"], width=self.explain_size()),
            "scheduler": ({**DIFFUSION_SCHEDULE, "prediction_type": "sample"}, ""),
            "caption_dropout": (0.1, "without it there is no guidance"),
            "timestep_shift": (4.0, "where noise is high the caption decides; where it is low z_i can be read off"),
        }
        return self.format_config("prior", "Prior: from a caption's encoding to an image embedding", values)

    def decoder(self) -> str:
        values = {
            **self.list_frozen_models(autoencoder=True),
            "cache": (f"{self.run}/cache", "so that pictures are not encoded in every step"),
            "architecture": ("unet", "docs/decoder.md says why"),
            "model": add_comments(self.models["decoder"], block_out_channels=self.explain_size()),
            "scheduler": ({**DIFFUSION_SCHEDULE, "prediction_type": "v_prediction"}, ""),
            "embedding_dropout": (0.1, "without it there is no guidance"),
            "timestep_shift": (2.0, "as configs/emoji"),
            "sample": {"prior": (f"{self.run}/prior", "so that the grid's last row shows what it draws of its work")},
        }
        return self.format_config("decoder", "Decoder: from an image embedding to latents", values)

    def list_frozen_models(self, autoencoder: bool = False) -> dict[str, ExplainedValue]:
        """The models that a stage takes over."""
        found = {"clip": (self.clip_name, "")}
        if autoencoder:
            found["autoencoder"] = (self.autoencoder_name or f"{self.run}/autoencoder", "")
        return found

    def build_data_section(self) -> dict[str, ExplainedValue]:
        slow = self.facts.side > 512
        cores = self.device.cores
        if self.device.kind == "cuda":
            workers = (min(8, cores), "processes that decode pictures, so that the GPU does not wait")
        elif slow:
            workers = (min(2, cores), f"processes that decode, for pictures of {self.facts.side} pixels take long")
        else:
            workers = (0, "decoding takes little beside training on a CPU")
        return {"path": (self.facts.path, ""), "image_size": (self.side, self.why), "num_workers": workers}

    def choose_stage_batch(self, stage: str) -> ExplainedValue:
        return choose_batch_size(self.size.schedules[stage], self.facts, contrastive=stage == "clip")

    def choose_stage_steps(self, stage: str) -> ExplainedValue:
        return choose_steps(self.size.schedules[stage], self.facts, self.choose_stage_batch(stage)[0])

    def format_config(self, stage: str, title: str, values: dict[str, Any]) -> str:
        """A configuration with its data and how it is trained."""
        batch, (steps, seen) = self.choose_stage_batch(stage), self.choose_stage_steps(stage)
        tenth = max(1, steps // 10)
        decay = 0.99 if steps < 1_000 else 0.998 if steps < 10_000 else 0.9995
        train = {
            "output": (f"{self.run}/{stage}", ""),
            "steps": (steps, seen),
            "batch_size": batch,
            "learning_rate": (self.size.schedules[stage].rate, "smaller for larger models"),
            "warmup_steps": (min(200, tenth), "a tenth of the steps, at most 200"),
            "decay_steps": (steps // 3, "the last third, down to zero"),
            "ema_decay": (decay, "averages the weights over about the last 1 / (1 - this) steps"),
            "log_every": (max(1, min(50, tenth // 4)), ""),
            "save_every": (tenth, "a tenth of the run is the most that a crash costs"),
            "sample_every": (tenth, f"pictures in {self.run}/{stage}/samples"),
            "validate_every": (tenth, ""),
        }
        init = f"`init: FOLDER` starts from a trained {stage} of the same shape instead of random weights."
        return format_document(
            self.format_header(title, init), {**values, "data": self.build_data_section(), "train": train}
        )

    def format_header(self, title: str, *more: str) -> str:
        about = "Written by `t2i init`, yours to change. Paths are relative to the folder where it was run."
        return "\n".join([f"{title}.", about, *more])

    def explain_size(self) -> str:
        return f"of the recipe for {self.size.image_size} x {self.size.image_size} pictures"
