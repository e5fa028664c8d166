"""Convert a model from one layout to another: the job of `t2i convert`."""

from pathlib import Path

import torch
from t2i.pipelines.folder import PipelineFolder
from t2i.pipelines.text2image import Text2ImagePipeline

from t2i.checks import check_folder_name
from t2i.errors import InputError
from t2i.files.atomic import create_folder_atomically
from t2i.files.model_folder import hide_origins
from t2i.files.untrusted import is_folder
from t2i.interop.by_name import load_any_prior, load_own_prior, load_pipeline_clip
from t2i.interop.export import check_exportable_components, export_layout
from t2i.interop.folders import SourceFolder
from t2i.interop.layouts import LAYOUTS_BY_NAME
from t2i.interop.loading import load_layout_components
from t2i.interop.parts import find_public_part
from t2i.interop.stored import check_variant
from t2i.networks.prior import Prior

OWN_LAYOUT = "t2i"
PRIOR_LAYOUT = "prior-transformer"


def convert_folder(
    source: str,
    out: Path,
    to: str = OWN_LAYOUT,
    prior: str | None = None,
    variant: str | None = None,
    fp16: bool = False,
    clip: str | None = None,
) -> Path:
    """Write the model in a folder or repository as a new folder in another layout, complete or not at all.

    Args:
        source: a pipeline, or a prior alone: the folder of a run, or a PriorTransformer. Each becomes the other.
        to: "t2i" for this project's own layout, or the name of a public one.
        prior: folder or repository of a public model's prior; see `from_pretrained`.
        clip: for a PriorTransformer that is in no pipeline with a CLIP, the folder of its CLIP. The embedding of the
            empty caption is computed with it.

    Only those parts of a public folder are read that the new layout contains.

    Raises:
        InputError: before anything is written, also if the layout's models compute something else than this model.
    """
    # Check the arguments
    if out.exists():
        raise InputError(f"{str(out)!r} exists; give a new folder")
    check_folder_name("the new folder", out)
    if to != OWN_LAYOUT and to not in LAYOUTS_BY_NAME:
        public = ", ".join(LAYOUTS_BY_NAME)
        raise InputError(f"no layout {to!r:.80}; there are {OWN_LAYOUT}, which is this project's own, and {public}")
    dtype = torch.float16 if fp16 else None
    path = Path(source if is_folder(source) else Text2ImagePipeline.download(source, variant=variant))
    folder = PipelineFolder(path, variant)
    if not (path / "model_index.json").is_file() and prior is None:
        return convert_prior(folder, out, to, clip, dtype)

    # Load the parts that the layout contains, if the folder has them all, or else the whole pipeline
    components = None
    if to != OWN_LAYOUT and not prior and not folder.is_own:
        components = load_layout_components(folder, LAYOUTS_BY_NAME[to], dtype)
    if components is None:
        settings = {"prior": prior, "clip": clip, "variant": variant, "dtype": dtype}
        arguments = {name: value for name, value in settings.items() if value is not None}
        pipeline = Text2ImagePipeline.from_pretrained(source, **arguments)
        components = pipeline.components

    # Write
    if to != OWN_LAYOUT:
        check_exportable_components(components, to)
    with create_folder_atomically(out) as unfinished:
        if to == OWN_LAYOUT:
            pipeline.save_pretrained(unfinished)
        else:
            export_layout(components, unfinished, to)
    return out


def convert_prior(folder: SourceFolder, out: Path, to: str, clip: str | None, dtype: torch.dtype | None) -> Path:
    """Write a prior alone as a PriorTransformer, or as the folder of a run, with its scheduler."""
    path, name = folder.path, str(folder.path)
    if to not in (OWN_LAYOUT, PRIOR_LAYOUT):
        raise InputError(
            f"{name!r} is not a complete pipeline, which {to} needs; a prior alone becomes {OWN_LAYOUT} or "
            f"{PRIOR_LAYOUT}"
        )
    is_public = folder.layout is not None
    check_variant(folder.variant, path)

    # To a PriorTransformer
    if to == PRIOR_LAYOUT:
        if is_public:
            components = load_layout_components(folder, LAYOUTS_BY_NAME[to], dtype)
        else:
            components = load_own_prior(path, dtype)
        assert components is not None, "a prior alone is all that its layout contains"
        check_exportable_components(components, to)
        with create_folder_atomically(out) as unfinished:
            export_layout(components, unfinished, to)
        return out

    # To the folder of a run
    if not is_public:
        raise InputError(
            f"{name!r} is neither a public model nor a complete pipeline of this project; is --to {PRIOR_LAYOUT} meant?"
        )
    clip_folder = find_clip_folder(path, clip)
    components = load_any_prior(path, lambda: load_pipeline_clip(clip_folder), dtype, folder.variant)
    scheduler = components.get("prior_scheduler")
    if isinstance(components["prior"], Prior) and scheduler is None:
        raise InputError(f"no folder 'scheduler' beside the prior {name!r}; convert its pipeline, or add the folder")
    with create_folder_atomically(out) as unfinished, hide_origins(components["prior"]):
        components["prior"].save_pretrained(unfinished)
        if scheduler is not None:
            scheduler.save_pretrained(unfinished / "scheduler")
    return out


def find_clip_folder(path: Path, clip: str | None) -> str:
    """Return the folder of a PriorTransformer's CLIP. Raises InputError if there is neither a name nor a pipeline."""
    if clip is not None:
        return clip
    part = find_public_part(str(path), ("prior",))
    if part is not None and part.source.find_folder("text_tower") is not None:
        return str(part.source.path)
    raise InputError(
        f"{str(path)!r} is a prior alone; give --clip, the folder of its CLIP or of a pipeline with it, from which the "
        "embedding of the empty caption is computed"
    )
