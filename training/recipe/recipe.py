"""The recipe of `t2i init`: a configuration of every stage, with sizes chosen from the data and the device.

The configurations are the templates beside this file, filled in.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import open_clip
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
import yaml
from t2i.training.common.captions import format_cut_captions, measure_caption_lengths
from t2i.training.common.cpu import count_cores
from t2i.training.common.state import flatten_config
from t2i.training.recipe.sizes import (
    LARGE,
    MEDIUM,
    PUBLIC_PRIOR,
    DataFacts,
    Device,
    ExplainedValue,
    RecipeSize,
    choose_batch_size,
    choose_buckets,
    choose_context_length,
    choose_recipe_size,
    choose_steps,
    choose_vocabulary_size,
)

from t2i.checks import check_choice, check_folder_name
from t2i.config import DataConfig
from t2i.data.dataset import CaptionedPictures
from t2i.data.manifest import STATUS_OK, find_manifest
from t2i.errors import InputError
from t2i.files.atomic import create_folder_atomically
from t2i.files.untrusted import is_folder, read_config
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.clip import CLIP
from t2i.networks.prior import Prior
from t2i.networks.tokenizer import CaptionTokenizer, PublicTokenizer, load_clip_tokenizer
from t2i.networks.unet_decoder import UNetDecoder
from t2i.runtime.memory import measure_available_memory

MIN_IMAGES, FEW_IMAGES = 10, 200
PUBLIC_CLIP = "ViT-B-32:laion2b_s34b_b79k"
STAGES = ("clip", "autoencoder", "cache", "prior", "decoder")  # one file each, in the order of training
EMA_DECAYS = {1_000: 0.99, 10_000: 0.998, math.inf: 0.9995}  # number of steps below which each is chosen
TEMPLATES = Path(__file__).parent / "templates"


@dataclass(frozen=True)
class Recipe:
    """The text of each configuration, and lines for the user about the choices."""

    files: dict[str, str]  # by stage
    lines: list[str]

    def write_folder(self, run: Path) -> None:
        """Write the new folder of the run, whole or not at all."""
        with create_folder_atomically(run.absolute()) as folder:
            for stage, text in self.files.items():
                (folder / f"{stage}.yaml").write_text(text, encoding="utf-8")


def check_run_folder(run: Path, data: str) -> None:
    """Refuse a folder that is in use or lies in the data, and names that a configuration cannot contain."""
    if run.exists() and not (run.is_dir() and not any(run.iterdir())):
        raise InputError(f"{str(run)!r} exists and is not overwritten; give a new folder")
    if Path(data).is_dir() and run.resolve().is_relative_to(Path(data).resolve()):
        raise InputError(f"{str(run)!r} lies in the data {data!r}, where its images would be taken for data")
    for name in (str(run), data):
        if "${" in name or name == "???" or not name.isprintable():
            raise InputError(f"{name!r} contains characters that a configuration cannot store; give another name")
    check_folder_name("the new folder", run)
    parent = next(folder for folder in run.absolute().parents if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"{str(run)!r} cannot be written; give a folder that is yours")


def read_data_facts(path: str, clip: str | None = None) -> DataFacts:
    """Read the facts from a manifest, with the lengths of captions for a CLIP; None for one that will be trained.

    Raises InputError if there is no manifest, or if there are too few images to train on.
    """
    dataset = CaptionedPictures(DataConfig(path))
    if len(dataset) < MIN_IMAGES:
        raise InputError(f"{path!r} has {len(dataset)} images to train on; at least {MIN_IMAGES} are needed")
    # All splits, for counts and sizes; the data set above is the training split alone
    columns = ["width", "height", "captions", "keywords"]
    accepted = [("status", "=", STATUS_OK)]
    table = pq.read_table(find_manifest(Path(path)), columns=columns, filters=accepted, partitioning=None)
    captions, keywords = (pc.list_value_length(table[name]) for name in ("captions", "keywords"))
    sides = [table[name].to_numpy() for name in ("width", "height")]
    short, long = np.minimum(*sides), np.maximum(*sides)
    # The lengths of captions in tokens, by a vocabulary of the size that training will use
    tokenizer = CaptionTokenizer.train(dataset.iterate_texts(), choose_vocabulary_size(pc.sum(captions).as_py()), 3)
    lengths = measure_caption_lengths(dataset, tokenizer)
    read_by = tokenizer if clip is None else find_clip_tokenizer(clip)
    return DataFacts(
        path=path,
        pictures=len(dataset),
        held_out=len(table) - len(dataset),
        side=int(np.median(short)),
        cropped=float((1 - short / long).mean()),
        caption_tokens=math.ceil(np.percentile(lengths, 95)),
        captions=pc.sum(captions).as_py(),
        variations=16 if pc.max(keywords).as_py() else min(16, pc.max(captions).as_py()),
        caption_lengths=tuple(measure_caption_lengths(dataset, read_by)) if read_by else (),
    )


def find_clip_tokenizer(clip: str) -> CaptionTokenizer | PublicTokenizer | None:
    """Return the tokenizer of a trained CLIP's folder or of a public CLIP, None if that would take the network."""
    if is_folder(clip):
        config = read_folder_config(clip, "CLIP")
        path = Path(clip) / "model" if is_folder(Path(clip) / "model") else Path(clip)
        return load_clip_tokenizer(path, config.get("tokenizer_kind", "captions"), config["model"]["text_cfg"])
    config = open_clip.get_model_config(clip.partition(":")[0])
    if config is None or config["text_cfg"].get("hf_tokenizer_name") or config["text_cfg"].get("tokenizer_kwargs"):
        return None
    return PublicTokenizer(open_clip.SimpleTokenizer())


def find_device(name: str) -> Device:
    """Describe the device `name`, cpu, cuda or auto; auto is a GPU if there is one."""
    check_choice("device", name, ("auto", "cpu", "cuda"))
    if torch.cuda.is_available() and name != "cpu":
        count = torch.cuda.device_count()
        memory = min(torch.cuda.get_device_properties(i).total_memory for i in range(count)) / 1e9
        return Device("cuda", count_cores(), memory, count)
    if name == "cuda":
        raise InputError("device is 'cuda', but this torch sees no GPU; `t2i doctor` lists the devices")
    return Device("cpu", count_cores(), measure_available_memory().total / 1e9)


def compose_recipe(
    run: Path,
    facts: DataFacts,
    device: Device,
    clip: str | None = None,
    autoencoder: str | None = None,
    image_size: int | None = None,
) -> Recipe:
    """Compose the configurations of a run on this data and device; `clip` and `autoencoder` name trained models.

    Raises InputError for models that are not there or do not fit.
    """
    # The models
    size, side, why_side = choose_recipe_size(facts, device, image_size)
    models = choose_models(size, facts, clip)
    channels, factor = read_autoencoder_shape(autoencoder, models["autoencoder"])
    multiple = factor * 2 ** (len(models["decoder"]["unet"]["block_out_channels"]) - 1)
    if side % multiple:
        raise InputError(f"image-size must be a multiple of {multiple} with this autoencoder, got {side}")
    stages = [stage for stage in STAGES if {"clip": clip, "autoencoder": autoencoder}.get(stage) is None]
    counts = count_parameters(models, channels, side // factor, stages)

    # The values of the templates that all stages share
    data, reasons = choose_data_settings(facts, device, side, multiple)
    reasons |= {"image_size": why_side, "variations": "each has one caption"}
    shared = {
        "clip": clip or f"{run}/clip",
        "autoencoder": autoencoder or f"{run}/autoencoder",
        "cache": f"{run}/cache",
        "prior": f"{run}/prior",
        "size": size.image_size,
        "latent_size": side // factor,
        "captions": f"{facts.captions:,}",
        "caption_tokens": facts.caption_tokens,
        "variations": facts.variations,
        "data": data,
    }
    if facts.variations > 1:
        reasons["variations"] = "draws of an image's captions and keywords stand for the endless ones"

    # One file a stage, and a line about each
    lines = [
        f"{run}: for {facts.pictures:,} images to train on and {facts.held_out:,} held out, on {device}",
        f"  images     {side} x {side}: {why_side}",
        f"  shapes     {'several: ' if data['buckets'] else ''}{reasons['buckets']}",
    ]
    files: dict[str, str] = {}
    for stage in stages:
        values = {**shared, "model": models.get(stage), "why": reasons}
        if stage != "cache":
            train, why_train = choose_training(stage, size, facts)
            values |= {"train": {**train, "output": f"{run}/{stage}"}, "why": {**reasons, **why_train}}
            parameters, steps = f"{counts[stage] / 1e6:.1f} M parameters", f"{train['steps']:,} steps"
            lines.append(f"  {stage:<12} {parameters}, {steps} of {train['batch_size']}: {why_train['steps']}")
        files[stage] = fill_template(stage, values)
    cut = format_cut_captions(facts.caption_lengths, models["clip"]["text_cfg"].get("context_length", 77))
    return Recipe(files, lines + ([f"warning: {cut}"] if cut else []) + format_advice(facts, clip))


def choose_models(size: RecipeSize, facts: DataFacts, clip: str | None) -> dict[str, dict[str, Any]]:
    """Return the models of a row of the table, those of text as large as the data need, by stage."""
    models = {stage: dict(model) for stage, model in size.models.items()}
    if clip is None:
        limits = {"context_length": choose_context_length(facts), "vocab_size": choose_vocabulary_size(facts.captions)}
        models["clip"]["text_cfg"] = limits | models["clip"]["text_cfg"]
        return models
    models["clip"] = read_clip_config(clip)
    # The wide embeddings of a public CLIP take a larger prior than our own small ones
    if size is not LARGE and models["clip"]["embed_dim"] > MEDIUM.models["clip"]["embed_dim"]:
        models["prior"] = PUBLIC_PRIOR
    return models


def choose_data_settings(
    facts: DataFacts, device: Device, side: int, step: int
) -> tuple[dict[str, Any], dict[str, str]]:
    """Choose the values of `data`, and give reasons. step: of the sides of buckets, which the models need."""
    workers, why_workers = choose_workers(facts, device)
    buckets, why_buckets = choose_buckets(facts, side, step)
    step = step if buckets else DataConfig.bucket_step  # which has no effect then
    data = {"path": facts.path, "image_size": side, "num_workers": workers, "buckets": buckets, "bucket_step": step}
    return data, {"num_workers": why_workers, "buckets": why_buckets}


def choose_workers(facts: DataFacts, device: Device) -> ExplainedValue:
    """Choose the number of processes that decode images."""
    if device.kind == "cuda":
        return min(8, device.cores), "processes that decode images, so that the GPU does not wait"
    if facts.side > 512:
        return min(2, device.cores), f"processes that decode, for images of {facts.side} pixels take long"
    return 0, "decoding takes little beside training on a CPU"


def choose_training(stage: str, size: RecipeSize, facts: DataFacts) -> tuple[dict[str, Any], dict[str, str]]:
    """Choose a stage's values of `train`, and give reasons for the batch size and the steps."""
    schedule = size.schedules[stage]
    batch, why_batch = choose_batch_size(schedule, facts, contrastive=stage == "clip")
    steps, why_steps = choose_steps(schedule, facts, batch)
    # Checkpoints, previews and validation come every tenth of a run
    tenth = max(1, steps // 10)
    values = {
        "steps": steps,
        "batch_size": batch,
        "learning_rate": schedule.rate,
        "warmup_steps": min(200, tenth),
        "decay_steps": steps // 3,
        "ema_decay": next(decay for limit, decay in EMA_DECAYS.items() if steps < limit),
        "log_every": max(1, min(50, tenth // 4)),
        "tenth": tenth,
    }
    return values, {"batch_size": why_batch, "steps": why_steps}


class DottedTemplate(Template):
    """A text with values such as ${data.path}."""

    idpattern = r"[\w.]+"


def fill_template(stage: str, values: dict[str, Any]) -> str:
    """Return a stage's configuration: its template with each `${a.b}` replaced by values["a"]["b"].

    A value is written as YAML on one line, in a comment as plain text.
    """
    plain = flatten_config(values)
    inline = {name: format_inline_yaml(value) for name, value in plain.items()}
    # Line by line, for a comment and its value need different forms
    lines = []
    for line in (TEMPLATES / f"{stage}.yaml").read_text(encoding="utf-8").splitlines(keepends=True):
        content, mark, comment = line.partition("#")
        lines.append(DottedTemplate(content).substitute(inline) + mark + DottedTemplate(comment).substitute(plain))
    return "".join(lines)


def format_inline_yaml(value: Any) -> str:
    """Return a value as YAML on one line."""
    # A list around the value keeps YAML from ending a plain scalar with "..."
    text = yaml.safe_dump([value], default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
    return text.strip()[1:-1]


def format_advice(facts: DataFacts, clip: str | None) -> list[str]:
    """Return warnings and advice for little data."""
    lines = []
    if facts.pictures < FEW_IMAGES:
        lines.append(
            f"warning: {facts.pictures} images are few: expect soft images that resemble one of them, and no effect "
            "of words that their captions lack"
        )
    if facts.pictures < MEDIUM.cpu_pictures and clip is None:
        lines.append(
            f"advice: a public CLIP was trained on more words than {facts.captions:,} captions hold: "
            f"--clip {PUBLIC_CLIP} (it needs a network), or start from a trained model: docs/tutorial/own-pictures.md"
        )
    if not facts.held_out:
        lines.append("advice: nothing is held out, so nothing tells learning from learning by heart; see --held-out")
    return lines


def read_clip_config(name: str) -> dict[str, Any]:
    """Return the configuration of a trained or public CLIP; of a hub's, that of most, for no network is used."""
    if is_folder(name):
        return read_folder_config(name, "CLIP")["model"]
    if name.startswith(("hf-hub:", "local-dir:")):
        return {"embed_dim": 512, "text_cfg": {"width": 512, "context_length": 77}}
    model, _, tag = name.partition(":")
    if (config := open_clip.get_model_config(model)) is None or not open_clip.get_pretrained_cfg(model, tag):
        raise InputError(
            f"clip must be the folder of a trained CLIP or a public one, such as {PUBLIC_CLIP}; got {name!r}"
        )
    return config


def read_autoencoder_shape(name: str | None, model: dict[str, Any]) -> tuple[int, int]:
    """Return the channels of the latents, and the pixels per latent along a side.

    name: the folder of an autoencoder, or a public VAE, taken to have the shape of most; None is our own, `model`.
    """
    if name is not None and not is_folder(name):
        return 4, 8
    if name is not None:
        config = read_folder_config(name, "Autoencoder", "AutoencoderKL")
        model = config if config["_class_name"] == "Autoencoder" else {"vae": config}
    vae = model["vae"]
    return vae["latent_channels"], model.get("patch_size", 1) * 2 ** (len(vae["block_out_channels"]) - 1)


def read_folder_config(folder: str, *classes: str) -> dict[str, Any]:
    """Read the configuration of the model in a folder. Raises InputError if it is not of one of `classes`."""
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
    """Count the parameters of the models of these stages, by stage; of CLIP, with the largest vocabulary."""
    clip, text = models["clip"], models["clip"]["text_cfg"]
    width, context = text.get("width", clip["embed_dim"]), text.get("context_length", 77)
    preprocess = {"size": 64, "mean": [0.5] * 3, "std": [0.5] * 3}
    make: dict[str, Callable[[], torch.nn.Module]] = {
        "clip": lambda: CLIP(clip, preprocess),
        "autoencoder": lambda: Autoencoder(**models["autoencoder"]),
        "prior": lambda: Prior(clip["embed_dim"], width, context, **models["prior"]),
        "decoder": lambda: UNetDecoder(clip["embed_dim"], channels, latent_size, **models["decoder"]),
    }
    with torch.device("meta"):  # takes no memory
        built = {stage: make[stage]() for stage in stages if stage in make}
    return {stage: sum(part.numel() for part in model.parameters()) for stage, model in built.items()}
