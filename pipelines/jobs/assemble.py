"""Assemble trained stages into one pipeline folder: the job of `t2i assemble`."""

from pathlib import Path

import torch
from t2i.pipelines.folder import COMPONENT_CLASSES
from t2i.pipelines.jobs.model_card import CardFacts, write_model_card
from t2i.pipelines.text2image import Text2ImagePipeline

from t2i import STAGES
from t2i.checks import check_folder_name
from t2i.diffusion.stored_schedulers import load_scheduler
from t2i.errors import InputError
from t2i.files.atomic import create_folder_atomically
from t2i.files.model_folder import load_model
from t2i.files.untrusted import is_folder
from t2i.interop.by_name import find_text_encoder_folder, load_autoencoder, load_clip, load_text_encoder
from t2i.networks.upsampler import Upsampler
from t2i.sampling.embeddings import load_prior


def find_stage_places(runs: str | Path, **folders: str | None) -> dict[str, str | Path]:
    """Return the folder or the public name of each stage; see `assemble_pipeline`."""
    places = {stage: folders.get(stage) or Path(runs) / stage for stage in STAGES}
    for stage, host in (("autoencoder", "decoder"), ("clip", "prior")):
        inner = Path(places[host]) / stage
        if not folders.get(stage) and is_folder(inner):
            places[stage] = inner
    return places


def assemble_pipeline(runs: str | Path, upsampler: str | None = None, **folders: str | None) -> Text2ImagePipeline:
    """Return the pipeline of the stages trained in `runs/clip`, `runs/autoencoder`, `runs/prior` and `runs/decoder`.

    Args:
        runs: the folder of the stages.
        upsampler: the folder of an upsampler; None leaves it out.
        folders: other folders, by stage. `clip` and `autoencoder` may also name public models, as in training
            configurations. prior="none" leaves the prior out.

    A text encoder is taken from the decoder's folder. The folder of a converted prior or decoder may also hold the CLIP
    or the autoencoder that belongs to it.
    """
    places = find_stage_places(runs, **folders)
    prior, prior_scheduler = load_prior(places["prior"])
    decoder = Path(places["decoder"])
    text_encoder = find_text_encoder_folder(decoder)
    return Text2ImagePipeline(
        clip=load_clip(places["clip"]),
        prior=prior,
        prior_scheduler=prior_scheduler,
        decoder=load_model(COMPONENT_CLASSES["decoder"], decoder),
        decoder_scheduler=load_scheduler(decoder / "scheduler"),
        autoencoder=load_autoencoder(places["autoencoder"], COMPONENT_CLASSES["autoencoder"]),
        upsampler=None if upsampler is None else load_model(Upsampler, upsampler),
        upsampler_scheduler=None if upsampler is None else load_scheduler(Path(upsampler) / "scheduler"),
        text_encoder=None if text_encoder is None else load_text_encoder(text_encoder),
    )


def write_pipeline_folder(
    runs: str | Path, folder: Path, fp16: bool = False, facts: CardFacts | None = None, **folders: str | None
) -> None:
    """Write the pipeline of `assemble_pipeline` with its model card, complete or not at all, also over an older one."""
    pipeline = assemble_pipeline(runs, **folders)
    if fp16:
        for component in pipeline.components.values():
            if isinstance(component, torch.nn.Module):
                component.half()
    places = find_stage_places(runs, **folders)
    if upsampler := folders.get("upsampler"):
        places["upsampler"] = upsampler
    with create_folder_atomically(folder) as unfinished:
        pipeline.save_pretrained(unfinished)
        write_model_card(unfinished, folder.name, pipeline, places, facts or CardFacts())


def assemble_pipeline_folder(
    runs: str | Path, folder: str | Path, fp16: bool = False, facts: CardFacts | None = None, **folders: str | None
) -> Path:
    """Write the pipeline of `assemble_pipeline` as a new folder, complete or not at all, and return its path."""
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{str(folder)!r} exists; give a new folder")
    check_folder_name("the new folder", folder)
    write_pipeline_folder(runs, folder, fp16, facts, **folders)
    return folder
