"""Put trained stages together into one pipeline folder."""

from pathlib import Path

import torch
from t2i.pipelines.folder import COMPONENT_CLASSES
from t2i.pipelines.text2image import Text2ImagePipeline

from t2i import STAGES
from t2i.diffusion.stored_schedulers import load_scheduler
from t2i.errors import InputError
from t2i.files.atomic import create_folder_atomically
from t2i.files.model_folder import load_model
from t2i.files.untrusted import is_folder
from t2i.interop.by_name import find_text_encoder_folder, load_autoencoder, load_clip, load_text_encoder
from t2i.networks.upsampler import Upsampler
from t2i.sampling.embeddings import load_prior


def assemble_pipeline(runs: str | Path, upsampler: str | None = None, **elsewhere: str | None) -> Text2ImagePipeline:
    """The pipeline of the stages trained in `runs/clip`, `runs/autoencoder`, `runs/prior` and `runs/decoder`.

    A stage's keyword names the folder it is in instead; for `clip` and `autoencoder` also a public model, as in the
    training configurations. prior="none" leaves the prior out. `upsampler`: the folder of one, else there is none. The
    text encoder of a decoder that has its own is in the decoder's folder; so are, of a converted model, the autoencoder
    that goes with a decoder, and the CLIP that goes with a prior.
    """
    found = {stage: elsewhere.get(stage) or Path(runs) / stage for stage in STAGES}
    for stage, other in (("autoencoder", "decoder"), ("clip", "prior")):
        if not elsewhere.get(stage) and is_folder(inner := Path(found[other]) / stage):
            found[stage] = inner
    prior, prior_scheduler = load_prior(found["prior"])
    decoder = Path(found["decoder"])
    text_encoder = find_text_encoder_folder(decoder)
    return Text2ImagePipeline(
        clip=load_clip(found["clip"]),
        prior=prior,
        prior_scheduler=prior_scheduler,
        decoder=load_model(COMPONENT_CLASSES["decoder"], decoder),
        decoder_scheduler=load_scheduler(decoder / "scheduler"),
        autoencoder=load_autoencoder(found["autoencoder"], COMPONENT_CLASSES["autoencoder"]),
        upsampler=None if upsampler is None else load_model(Upsampler, upsampler),
        upsampler_scheduler=None if upsampler is None else load_scheduler(Path(upsampler) / "scheduler"),
        text_encoder=None if text_encoder is None else load_text_encoder(text_encoder),
    )


def assemble_pipeline_folder(runs: str | Path, folder: str | Path, fp16: bool = False, **elsewhere: str | None) -> Path:
    """Write the pipeline of `runs` as a new folder: whole or not at all, never over an older one."""
    folder = Path(folder)
    if folder.exists():
        raise InputError(f"{str(folder)!r} exists; give a new folder")
    pipeline = assemble_pipeline(runs, **elsewhere)
    if fp16:
        for part in pipeline.components.values():
            if isinstance(part, torch.nn.Module):
                part.half()
    with create_folder_atomically(folder) as unfinished:
        pipeline.save_pretrained(unfinished)
    return folder
