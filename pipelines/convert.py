"""A model from one layout into another, whole or not at all."""

from pathlib import Path
from typing import Any

import torch

from pipelines.text2image import Text2ImagePipeline
from t2i.checkpoint import new_folder
from t2i.errors import InputError
from t2i.interop.export import check_exportable, export_layout
from t2i.interop.layouts import BY_NAME
from t2i.priors import load_prior
from t2i.untrusted import is_folder

OURS = "t2i"
PRIOR_ALONE = "prior-transformer"


def convert_folder(
    source: str, out: Path, to: str = OURS, prior: str | None = None, variant: str | None = None, fp16: bool = False
) -> Path:
    """Write the model in a folder or a repository as a new folder in another layout.

    to: "t2i", or the name of a public layout. prior: of a public model, as of `from_pretrained`. A prior alone becomes
    a PriorTransformer: `source` may be what `t2i train prior` wrote.
    Raises InputError where the arithmetic is not the layout's, saying why, before anything is written.
    """
    if out.exists():
        raise InputError(f"{str(out)!r} exists; give a new folder")
    if to != OURS and to not in BY_NAME:
        raise InputError(
            f"no layout {to!r:.80}; there are {OURS}, which is this project's own, and {', '.join(BY_NAME)}"
        )
    settings: dict[str, Any] = {"prior": prior, "variant": variant, "dtype": torch.float16 if fp16 else None}
    alone = is_folder(source) and not (Path(source) / "model_index.json").is_file() and to == PRIOR_ALONE
    if alone:
        components: dict[str, Any] = {"prior": load_prior(source)[0]}
        if fp16:
            components["prior"].half()
    else:
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
