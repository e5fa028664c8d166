"""From prompts to PNG files: what `t2i generate` does."""

import contextlib
import json
import os
import re
import secrets
from collections.abc import Iterator
from inspect import signature
from io import BytesIO
from itertools import count as counting
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Generator

from pipelines.text2image import Text2ImagePipeline, check_settings
from t2i import __version__
from t2i.config import check_choice
from t2i.errors import InputError
from t2i.sampling import check_texts

BATCH = 16
MAX_SEED = 2**63 - 1
MAX_PER_PROMPT = 1024

SETTINGS = ("num_inference_steps", "guidance_scale", "prior_num_inference_steps", "prior_guidance_scale")
DEFAULTS = {name: signature(Text2ImagePipeline.__call__).parameters[name].default for name in SETTINGS}
LABELS = {  # as other tools call them
    "Steps": "num_inference_steps",
    "CFG scale": "guidance_scale",
    "Prior steps": "prior_num_inference_steps",
    "Prior CFG scale": "prior_guidance_scale",
    "Seed": "seed",
    "Model": "model",
}


def load_pipeline(model: str, device: str = "auto") -> Text2ImagePipeline:
    """A pipeline on a device; auto takes a GPU if there is one."""
    kind, colon, index = device.partition(":")
    check_choice("device", kind, ("auto", "cpu", "cuda", "mps"))
    available = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if device == "auto":
        device = next(name for name in ("cuda", "mps", "cpu") if available[name])
    numbered = kind == "cuda" and index.isdigit() and int(index) < torch.cuda.device_count()
    if not available.get(kind, True) or (colon and not numbered):
        raise InputError(f"device {device!r} is not available here; `t2i doctor` tells what is")
    return Text2ImagePipeline.from_pretrained(model).to(device)


def generate_files(
    prompts: list[str],
    out: Path,
    model: str,
    count: int,
    seed: int | None,
    device: str,
    settings: dict[str, Any],
) -> Iterator[Path]:
    """Draw `count` pictures for each prompt and write each as soon as its batch is done. Nothing is overwritten.

    Picture i has seed `seed + i`; prompt, seed and settings are written into the PNG.
    """
    total = len(prompts) * count
    if not 1 <= count <= MAX_PER_PROMPT:
        raise InputError(f"count must be an integer from 1 to {MAX_PER_PROMPT}, got {count}")
    seed = secrets.randbelow(2**32) if seed is None else seed
    if not 0 <= seed <= MAX_SEED - total:
        raise InputError(f"seed must be an integer from 0 to {MAX_SEED - total}, got {seed}")
    check_texts("prompt", prompts, empty=False)
    check_settings(**settings)
    check_out(out, total)
    pipeline = load_pipeline(model, device)
    pipeline.set_progress_bar_config(disable=True)
    every = [prompt for prompt in prompts for _ in range(count)]
    out.parent.mkdir(parents=True, exist_ok=True)
    for start in range(0, total, BATCH):
        part = every[start : start + BATCH]
        seeds = [seed + start + i for i in range(len(part))]
        generators = [Generator().manual_seed(one) for one in seeds]
        images = pipeline(part, generator=generators, **settings).images
        for prompt, one, image in zip(part, seeds, images):
            used = {"prompt": prompt, "seed": one, "model": Path(model).name, **DEFAULTS, **settings}
            yield write_new(out, prompt, one, to_png(image, used))


def check_out(out: Path, total: int) -> None:
    if out.suffix == ".png":
        if total != 1:
            raise InputError(f"out is one file, {str(out)!r}, but {total} pictures are asked for; give a folder")
        if out.exists():
            raise InputError(f"{str(out)!r} exists and is not overwritten; give another name")
    elif out.exists() and not out.is_dir():
        raise InputError(f"out is {str(out)!r}, which is a file; give a folder, or a name that ends in .png")
    parent = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"out is {str(out)!r}, where nothing can be written; give a folder that is yours")


def to_png(image: Image.Image, settings: dict[str, Any]) -> bytes:
    """A PNG with the settings in it: as JSON under "t2i", and in the form that other tools read under "parameters"."""
    info = PngInfo()
    lines = [settings["prompt"]]
    if "negative_prompt" in settings:
        lines.append(f"Negative prompt: {settings['negative_prompt']}")
    known = {label: settings[name] for label, name in LABELS.items()}
    known |= {"Size": f"{image.width}x{image.height}", "Version": f"t2i {__version__}"}
    lines.append(", ".join(f"{label}: {value}" for label, value in known.items()))
    info.add_itxt("parameters", "\n".join(lines))
    info.add_itxt("t2i", json.dumps({"version": __version__, **settings}, ensure_ascii=False))
    buffer = BytesIO()
    image.save(buffer, "PNG", pnginfo=info)
    return buffer.getvalue()


def write_new(out: Path, prompt: str, seed: int, content: bytes) -> Path:
    """Write a file that did not exist before, whole or not at all; in a folder, under a free name."""
    if out.suffix == ".png":
        names: Iterator[Path] = iter([out])
    else:
        out.mkdir(parents=True, exist_ok=True)
        stem = f"{re.sub('[^a-z0-9]+', '-', prompt.lower()).strip('-')[:40] or 'picture'}-{seed}"
        names = (out / f"{stem}{'' if i == 1 else f'-{i}'}.png" for i in counting(1))
    folder = out.parent if out.suffix == ".png" else out
    unfinished = folder / f".t2i-{os.getpid()}-{secrets.token_hex(4)}.unfinished"
    try:
        unfinished.write_bytes(content)
        for path in names:
            with contextlib.suppress(FileExistsError):
                os.link(unfinished, path)  # unlike a rename, never replaces
                return path
    finally:
        unfinished.unlink(missing_ok=True)
    raise InputError(f"{str(out)!r} exists and is not overwritten; give another name")
