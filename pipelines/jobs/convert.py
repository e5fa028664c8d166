"""A model from one layout into another, whole or not at all."""

from pathlib import Path

import torch
from t2i.pipelines.folder import is_ours
from t2i.pipelines.text2image import Text2ImagePipeline

from t2i.errors import InputError
from t2i.files.atomic import new_folder
from t2i.files.untrusted import is_folder
from t2i.interop.export import check_exportable, export_layout
from t2i.interop.layouts import BY_CLASS, BY_NAME, class_of
from t2i.interop.loading import any_clip, any_prior, half_of, own_prior
from t2i.interop.parts import find
from t2i.interop.stored import check_variant
from t2i.networks.prior import Prior

OURS = "t2i"
PRIOR_ALONE = "prior-transformer"


def convert_folder(
    source: str,
    out: Path,
    to: str = OURS,
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
    if to != OURS and to not in BY_NAME:
        raise InputError(
            f"no layout {to!r:.80}; there are {OURS}, which is this project's own, and {', '.join(BY_NAME)}"
        )
    dtype = torch.float16 if fp16 else None
    path = Path(source if is_folder(source) else Text2ImagePipeline.download(source, variant=variant))
    if not (path / "model_index.json").is_file() and prior is None:
        return convert_prior(path, out, to, clip, variant, dtype)
    components = None if to == OURS or prior or is_ours(path) else half_of(path, BY_NAME[to], dtype, variant)
    if components is None:
        settings = {"prior": prior, "clip": clip, "variant": variant, "dtype": dtype}
        given = {name: value for name, value in settings.items() if value is not None}
        pipeline = Text2ImagePipeline.from_pretrained(source, **given)
        components = pipeline.components
    if to != OURS:
        check_exportable(components, to)
    with new_folder(out) as unfinished:
        if to == OURS:
            pipeline.save_pretrained(unfinished)
        else:
            export_layout(components, unfinished, to)
    return out


def convert_prior(
    path: Path, out: Path, to: str, clip: str | None, variant: str | None, dtype: torch.dtype | None
) -> Path:
    """A prior alone into a PriorTransformer, or into the folder of a run; its scheduler goes with it."""
    name = str(path)
    if to not in (OURS, PRIOR_ALONE):
        raise InputError(f"{name!r} is no whole pipeline, as {to} is; a prior alone becomes {OURS} or {PRIOR_ALONE}")
    public = class_of(path) in BY_CLASS
    check_variant(variant, path)
    if to == PRIOR_ALONE:
        components = half_of(path, BY_NAME[to], dtype, variant) if public else own_prior(path, dtype)
        assert components is not None, "a prior alone is all of its layout"
        check_exportable(components, to)
        with new_folder(out) as unfinished:
            export_layout(components, unfinished, to)
        return out
    if not public:
        raise InputError(f"{name!r} is no public model, and no whole pipeline of this project: --to {PRIOR_ALONE}?")
    home = clip_home(path, clip)
    components = any_prior(path, lambda: any_clip(home), dtype, variant)
    scheduler = components.get("prior_scheduler")
    if isinstance(components["prior"], Prior) and scheduler is None:
        raise InputError(f"no folder 'scheduler' beside the prior {name!r}; convert its pipeline, or add the folder")
    with new_folder(out) as unfinished:
        components["prior"].save_pretrained(unfinished)
        if scheduler is not None:
            scheduler.save_pretrained(unfinished / "scheduler")
    return out


def clip_home(path: Path, clip: str | None) -> str:
    """Where the CLIP of a PriorTransformer is. Raises InputError if nothing says it."""
    found = find(str(path), ("prior",))
    if clip is None and found is not None and found.other("text_tower") is not None:
        return str(found.root)
    if clip is None:
        raise InputError(
            f"{str(path)!r} is a prior alone; --clip names the folder of its CLIP, or of a pipeline with it, which "
            "says what the prior reads without a caption"
        )
    return clip
