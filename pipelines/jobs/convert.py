"""A model from one layout into another, whole or not at all."""

from pathlib import Path

import torch
from t2i.pipelines.folder import PipelineFolder
from t2i.pipelines.text2image import Text2ImagePipeline

from t2i.errors import InputError
from t2i.files.atomic import create_folder_atomically
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
    """Write the model in a folder or a repository as a new folder in another layout.

    to: "t2i", or the name of a public layout. prior: of a public model, as of `from_pretrained`. A prior alone, what
    `t2i train prior` wrote or a PriorTransformer, becomes the other; clip names the folder of its CLIP, which says what
    a prior of this project knows of the empty caption, unless it lies in a pipeline that has it. Of a public folder
    only that is read which the new layout needs.
    Raises InputError where the arithmetic is not the layout's, saying why, before anything is written.
    """
    if out.exists():
        raise InputError(f"{str(out)!r} exists; give a new folder")
    if to != OWN_LAYOUT and to not in LAYOUTS_BY_NAME:
        public = ", ".join(LAYOUTS_BY_NAME)
        raise InputError(f"no layout {to!r:.80}; there are {OWN_LAYOUT}, which is this project's own, and {public}")
    dtype = torch.float16 if fp16 else None
    path = Path(source if is_folder(source) else Text2ImagePipeline.download(source, variant=variant))
    folder = PipelineFolder(path, variant)
    if not (path / "model_index.json").is_file() and prior is None:
        return convert_prior(folder, out, to, clip, dtype)
    components = None
    if to != OWN_LAYOUT and not prior and not folder.is_own:
        components = load_layout_components(folder, LAYOUTS_BY_NAME[to], dtype)
    if components is None:
        settings = {"prior": prior, "clip": clip, "variant": variant, "dtype": dtype}
        given = {name: value for name, value in settings.items() if value is not None}
        pipeline = Text2ImagePipeline.from_pretrained(source, **given)
        components = pipeline.components
    if to != OWN_LAYOUT:
        check_exportable_components(components, to)
    with create_folder_atomically(out) as unfinished:
        if to == OWN_LAYOUT:
            pipeline.save_pretrained(unfinished)
        else:
            export_layout(components, unfinished, to)
    return out


def convert_prior(folder: SourceFolder, out: Path, to: str, clip: str | None, dtype: torch.dtype | None) -> Path:
    """A prior alone into a PriorTransformer, or into the folder of a run; its scheduler goes with it."""
    path, name = folder.path, str(folder.path)
    if to not in (OWN_LAYOUT, PRIOR_LAYOUT):
        raise InputError(
            f"{name!r} is no whole pipeline, as {to} is; a prior alone becomes {OWN_LAYOUT} or {PRIOR_LAYOUT}"
        )
    public = folder.layout is not None
    check_variant(folder.variant, path)
    if to == PRIOR_LAYOUT:
        components = (
            load_layout_components(folder, LAYOUTS_BY_NAME[to], dtype) if public else load_own_prior(path, dtype)
        )
        assert components is not None, "a prior alone is all of its layout"
        check_exportable_components(components, to)
        with create_folder_atomically(out) as unfinished:
            export_layout(components, unfinished, to)
        return out
    if not public:
        raise InputError(f"{name!r} is no public model, and no whole pipeline of this project: --to {PRIOR_LAYOUT}?")
    home = find_clip_folder(path, clip)
    components = load_any_prior(path, lambda: load_pipeline_clip(home), dtype, folder.variant)
    scheduler = components.get("prior_scheduler")
    if isinstance(components["prior"], Prior) and scheduler is None:
        raise InputError(f"no folder 'scheduler' beside the prior {name!r}; convert its pipeline, or add the folder")
    with create_folder_atomically(out) as unfinished:
        components["prior"].save_pretrained(unfinished)
        if scheduler is not None:
            scheduler.save_pretrained(unfinished / "scheduler")
    return out


def find_clip_folder(path: Path, clip: str | None) -> str:
    """Where the CLIP of a PriorTransformer is. Raises InputError if nothing says it."""
    found = find_public_part(str(path), ("prior",))
    if clip is None and found is not None and found.source.find_folder("text_tower") is not None:
        return str(found.source.path)
    if clip is None:
        raise InputError(
            f"{str(path)!r} is a prior alone; --clip names the folder of its CLIP, or of a pipeline with it, which "
            "says what the prior reads without a caption"
        )
    return clip
