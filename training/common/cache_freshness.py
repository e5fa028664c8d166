"""Identities of frozen models and data, and their comparison with those that a cache was made from.

Models and data in folders of this machine are identified by their content, other models by their names.
"""

import os
from pathlib import Path
from typing import Any

import open_clip

from t2i.config import DataConfig
from t2i.data.cache import AutoencoderFacts, CachedPairs, ClipFacts, TextEncoderFacts
from t2i.data.captions import CaptionMix
from t2i.data.dataset import CaptionedPictures, open_datasets
from t2i.data.framing import CLIP_INPUT, SQUARES
from t2i.data.manifest import SPLITS, find_manifest
from t2i.errors import InputError
from t2i.files.fingerprints import compute_files_fingerprint, compute_stored_fingerprint, compute_weights_fingerprint
from t2i.files.model_folder import read_model_class
from t2i.files.untrusted import is_folder, read_json
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.clip import CLIP, DEFAULT_RESIZING
from t2i.networks.public.transformers_clip import TransformersCLIP
from t2i.networks.text_encoder import TextEncoder
from t2i.terminal import print_note

TOKENIZER_FILES = ("tokenizer.json", "tokenizer/*")  # of a CLIP's folder
PUBLIC_MODEL_FILES = ("*.safetensors", "*.json", "*.txt", "*.model")  # weights, settings and tokenizer
# Classes that this project saves, which store an identity in their folder
OWN_CLASSES = {"CLIP": ("CLIP", "TransformersCLIP"), "Autoencoder": ("Autoencoder", "MoVQ", "SuperResolution")}
PIPELINE_PARTS = {  # subfolders of public pipelines
    "CLIP": ("*text_encoder", "*tokenizer", "*image_encoder", "*image_processor", "feature_extractor"),
    "Autoencoder": ("movq", "vae", "super_res_*"),
}


def check_cache_freshness(
    cache: CachedPairs,
    data: DataConfig,
    pictures: dict[str, CaptionedPictures],
    clip: str,
    autoencoder: str | None,
) -> None:
    """Refuse a cache that was made from other models or data than those named in this configuration.

    pictures: the data sets of `data`, by split; empty if they are not there.
    """
    # Pairs of what the cache was made with, and what is there now
    pairs: dict[str, tuple[Any, Any]] = {"data.image_size": (cache.made_from["image_size"], data.image_size)}
    if cache.text or cache.tokens:  # older caches have captions without this option
        pairs["data.keyword_alone"] = (cache.made_from.get("keyword_alone", 0.0), data.keyword_alone)
        digest = CaptionMix.read(data.keyword_alone, data.in_sentence, data.sentences).sentences_digest
        pairs["data.sentences"] = (cache.made_from.get("sentences"), digest)
    pairs["data.flip"] = (cache.made_from.get("flip", False), data.flip)
    if autoencoder is not None:
        pairs["data.buckets"] = (cache.made_from.get("buckets"), data.bucket_limits)
    stored = cache.made_from.get("stored", {})
    pairs["clip"] = compare_model("CLIP", clip, cache.clip_facts, stored.get("clip"))
    seen = find_clip_input(clip, data.image_size)
    if seen is not None:
        pairs["input of CLIP"] = (cache.made_from.get("clip_input", SQUARES), seen)
    if find_local_folder(clip) is not None:
        pairs["tokenizer"] = (stored.get("tokenizer"), digest_tokenizer_files(clip))
    if autoencoder is not None:
        pairs["autoencoder"] = compare_model(
            "Autoencoder", autoencoder, cache.autoencoder_facts, stored.get("autoencoder")
        )
    if pictures:
        before, now = cache.made_from["data"], {split: dataset.compute_digest() for split, dataset in pictures.items()}
        pairs |= {name: (before.get(split), now.get(split)) for name, split in zip(("data", "held-out data"), SPLITS)}
    elif os.environ.get("RANK", "0") == "0":
        name = f"data.path={data.path!r}"
        print_note(f"no manifest in {name}: the cache {str(cache.folder)!r} is not compared with its data")
    for name, (before, now) in pairs.items():
        if before != now:
            raise InputError(
                f"the cache {str(cache.folder)!r} is stale: it was made with another {name}, {before}, now {now}; "
                "make a new cache, or use what it was made with"
            )


def find_clip_input(name: str, image_size: int) -> str | None:
    """Return what a CLIP's encodings are made from, as `t2i.data.framing.describe_clip_input` has it.

    None for a CLIP whose preprocessing is not known before it is loaded.
    """
    folder = find_local_folder(name)
    if folder is None:
        # A public CLIP: open_clip's tables have its settings, without a download
        model, _, tag = name.partition(":")
        settings = dict(open_clip.get_pretrained_cfg(model, tag))
        size = (open_clip.get_model_config(model) or {}).get("vision_cfg", {}).get("image_size")
    else:
        path = folder / "config.json"
        config = read_json(path) if path.is_file() else {}
        if config.get("_class_name") == "TransformersCLIP":  # rounds as transformers does
            return CLIP_INPUT
        settings = config.get("preprocess") or {}
        size = settings.get("size")
    if size is None:
        return None
    modes = {key: settings.get(key) or default for key, default in DEFAULT_RESIZING.items()}
    sides = {size} if isinstance(size, int) else set(size)
    return SQUARES if sides == {image_size} and modes == DEFAULT_RESIZING else CLIP_INPUT


def open_data_if_present(data: DataConfig) -> dict[str, CaptionedPictures]:
    """Open the data sets, by split; none if there is no manifest, for training from a cache works without data."""
    try:
        find_manifest(Path(data.path))
    except InputError:
        return {}
    return open_datasets(data)


def compare_model(
    kind: str, name: str, facts: ClipFacts | AutoencoderFacts | None, stored_digest: str | None
) -> tuple[str | None, str | None]:
    """Return the identities of the cache's model, and of the model that the configuration names.

    kind: a key of OWN_CLASSES. stored_digest: result of `digest_stored_files` in the cache's key.
    """
    assert facts is not None
    folder = find_local_folder(name)
    if folder is None:
        return facts.name, name
    if read_model_class(folder) not in OWN_CLASSES[kind]:
        return stored_digest, digest_model_files(name, kind)
    # A CLIP stores its fingerprint, an autoencoder's is computed.
    return facts.identity, read_stored_fingerprint(folder) if kind == "CLIP" else compute_stored_fingerprint(folder)


def find_local_folder(name: str | None) -> Path | None:
    """Find the folder of this machine that holds a model; None for the name of a public model, or no name."""
    if name is None:
        return None
    path = Path(name if is_folder(name) else name.removeprefix("local-dir:"))
    return next((folder for folder in (path / "model", path / "model.replaced", path) if is_folder(folder)), None)


def digest_model_files(name: str | None, kind: str) -> str | None:
    """Return a digest of a foreign model's files in a folder; of a pipeline, of the parts in question.

    Returns None for a model of our own, which has an identity, and where `find_local_folder` finds none.
    """
    folder = find_local_folder(name)
    if folder is None or read_model_class(folder) in OWN_CLASSES[kind]:
        return None
    parts = PIPELINE_PARTS[kind] if (folder / "model_index.json").is_file() else ()
    part_files = [f"{part}/{pattern}" for part in parts for pattern in PUBLIC_MODEL_FILES]
    return compute_files_fingerprint(folder, (*PUBLIC_MODEL_FILES, *part_files))


def digest_tokenizer_files(name: str | None) -> str | None:
    """Return a digest of the tokenizer in a CLIP's folder; None for a public CLIP."""
    folder = find_local_folder(name)
    return None if folder is None else compute_files_fingerprint(folder, TOKENIZER_FILES)


def digest_stored_files(clip: str | None, autoencoder: str | None) -> dict[str, str | None]:
    """Return the digests of model files in folders of this machine, for a cache's key."""
    return {
        "clip": digest_model_files(clip, "CLIP"),
        "tokenizer": digest_tokenizer_files(clip),
        "autoencoder": digest_model_files(autoencoder, "Autoencoder"),
    }


def read_stored_fingerprint(folder: Path) -> str:
    """Read the identity of a CLIP or a text encoder in a folder, without loading it."""
    return read_json(folder / "config.json").get("fingerprint", "none")


def collect_identities(
    data: str, clip: ClipFacts, autoencoder: AutoencoderFacts | None, text_encoder: TextEncoderFacts | None
) -> dict[str, str]:
    models = {"clip": clip, "autoencoder": autoencoder, "text_encoder": text_encoder}
    return {"data": data} | {name: facts.identity for name, facts in models.items() if facts is not None}


def build_clip_facts(name: str, clip: CLIP, needs_text: bool = True) -> ClipFacts:
    """Describe a CLIP. Raises InputError for a public CLIP that lacks a tower. needs_text: False takes one tower."""
    if isinstance(clip, TransformersCLIP):
        clip.check_image_encoder()
    reads = needs_text or clip.reads_captions
    text_width, context_length = (clip.text_width, clip.context_length) if reads else (0, 0)
    return ClipFacts(name, clip.identity, clip.embed_dim, text_width, context_length, clip.unit_length)


def build_autoencoder_facts(name: str, autoencoder: Autoencoder) -> AutoencoderFacts:
    return AutoencoderFacts(name, compute_weights_fingerprint(autoencoder), autoencoder.channels, autoencoder.factor)


def build_text_encoder_facts(encoder: TextEncoder) -> TextEncoderFacts:
    return TextEncoderFacts(encoder.identity, encoder.width)
