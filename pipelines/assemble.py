"""Put trained stages together into one pipeline folder."""

import shutil
from pathlib import Path

import torch
from diffusers import DDIMScheduler

from pipelines.text2image import Text2ImagePipeline
from t2i.autoencoder import load_autoencoder
from t2i.checkpoint import load_model, loaded, publish
from t2i.clip import load_clip
from t2i.decoder import Decoder
from t2i.errors import InputError
from t2i.prior import Prior
from t2i.unet_decoder import UNetDecoder


def assemble(runs: str | Path, clip: str | None = None, autoencoder: str | None = None) -> Text2ImagePipeline:
    """The pipeline of the stages trained in `runs/clip`, `runs/autoencoder`, `runs/prior` and `runs/decoder`.

    `clip` and `autoencoder` name public models where none were trained, as in the training configurations.
    """
    runs = Path(runs)
    return Text2ImagePipeline(
        clip=load_clip(clip or runs / "clip"),
        prior=load_model(Prior, runs / "prior"),
        prior_scheduler=loaded(DDIMScheduler.from_pretrained, runs / "prior" / "scheduler"),
        decoder=load_model((Decoder, UNetDecoder), runs / "decoder"),
        decoder_scheduler=loaded(DDIMScheduler.from_pretrained, runs / "decoder" / "scheduler"),
        autoencoder=load_autoencoder(autoencoder or runs / "autoencoder"),
    )


def assemble_folder(
    runs: str | Path,
    folder: str | Path,
    fp16: bool = False,
    clip: str | None = None,
    autoencoder: str | None = None,
) -> Path:
    """Write the pipeline of `runs` as a new folder: whole or not at all, never over an older one."""
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{str(folder)!r} exists; give a new folder")
    pipeline = assemble(runs, clip, autoencoder)
    unfinished = folder.with_name(folder.name + ".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    if fp16:
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.half()
    pipeline.save_pretrained(unfinished)
    publish(unfinished, folder)
    return folder
