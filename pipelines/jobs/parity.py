"""Compare a public model, as loaded here, with diffusers' classes on the same files: the job of `t2i parity`."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from t2i.pipelines.folder import PipelineFolder
from t2i.pipelines.loading import locate_other_folders
from t2i.pipelines.text2image import Text2ImagePipeline

from t2i.checks import check_integer, check_texts
from t2i.diffusion.guidance import parse_guidance_value
from t2i.diffusion.sampling_loop import MAX_STEPS
from t2i.errors import InputError
from t2i.files.untrusted import is_folder
from t2i.interop.loading import ModelFolders
from t2i.interop.parity import Difference, ParityCheck, check_comparable_models
from t2i.progress import show_loading
from t2i.texts import wrap_text


def compare_public_stages(
    folder: str,
    prior: str | None,
    prompts: str | list[str],
    steps: int,
    scale: float,
    variant: str | None,
    seed: int,
    clip: str | None = None,
) -> Iterator[Difference]:
    """Yield each stage's name and the largest difference of its results; see `t2i.interop.parity`."""
    # Check the arguments
    prompts = wrap_text(prompts)
    check_texts("prompt", prompts, empty=False)
    check_integer("steps", steps, 2, MAX_STEPS)  # the reference's scheduler does not take 1
    parse_guidance_value("guidance-scale", scale)
    check_integer("seed", seed, 0, 2**32)

    # Find the folders
    def find_folder(name: str | Path) -> Path:
        return Path(name if is_folder(name) else Text2ImagePipeline.download(str(name), variant=variant))

    model = PipelineFolder(find_folder(folder), variant)
    others = locate_other_folders(folder, prior, clip, find_folder, variant)
    for name, source in ((folder, model), (prior, others[0])):
        if source is not None and source.is_own:
            raise InputError(
                f"{name!r} is in this project's own layout, which no other library loads; give a public model (files "
                "converted from DALLE2-pytorch have no public class to compare with either)"
            )
    sources = ModelFolders([source for source in (model, *others) if source is not None])
    check_comparable_models(sources)

    # Load the model and compare
    settings: dict[str, Any] = {"dtype": torch.float32, "variant": variant}
    settings |= {name: str(source.path) for name, source in zip(("prior", "clip"), others) if source is not None}
    with show_loading(folder):
        pipeline = Text2ImagePipeline.from_pretrained(model.path, **settings)
    pipeline.set_progress_bar_config(disable=True)
    yield from ParityCheck(pipeline, sources, prompts, steps, seed, float(scale)).compare_stages()
