"""`t2i parity`: a public model loaded here, beside diffusers' classes on the same files."""

from collections.abc import Iterator

import torch
from t2i.pipelines.folder import is_own_layout
from t2i.pipelines.public import locate_public_folders
from t2i.pipelines.text2image import Text2ImagePipeline

from t2i.checks import check_integer, check_texts
from t2i.diffusion.guidance import check_guidance
from t2i.diffusion.sampling_loop import MAX_STEPS
from t2i.errors import InputError
from t2i.interop.layouts import PublicFolder
from t2i.interop.loading import ModelFolders
from t2i.interop.parity import Difference, ParityCheck, check_comparable_models


def compare_public_stages(
    folder: str,
    prior: str | None,
    prompts: list[str],
    steps: int,
    scale: float,
    variant: str | None,
    seed: int,
    clip: str | None = None,
) -> Iterator[Difference]:
    """Each stage's name and the largest difference of its result; see `t2i.interop.parity`."""
    check_texts("prompt", prompts, empty=False)
    check_integer("steps", steps, 2, MAX_STEPS)  # the reference's scheduler cannot take one
    check_guidance("guidance-scale", scale)
    check_integer("seed", seed, 0, 2**32)
    places = locate_public_folders(folder, prior, clip, Text2ImagePipeline.download, variant)
    for name, place in zip((folder, prior), places):
        if place is not None and is_own_layout(place):
            raise InputError(
                f"{name!r} is in this project's own layout, of which there is no reference (nor of converted files of "
                "DALLE2-pytorch, which no public class loads); give a public one"
            )
    sources = ModelFolders([PublicFolder(place, variant) for place in places if place is not None])
    check_comparable_models(sources)
    settings = {"dtype": torch.float32, "variant": variant}
    named = {name: str(place) for name, place in zip(("prior", "clip"), places[1:]) if place is not None}
    pipeline = Text2ImagePipeline.from_pretrained(places[0], **settings, **named)
    pipeline.set_progress_bar_config(disable=True)
    yield from ParityCheck(pipeline, sources, prompts, steps, seed, float(scale)).compare_stages()
