"""How pipelines load public models: what is fetched, and which arguments mean what."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from t2i.pipelines.folder import COMPONENT_CLASSES, check_pipeline_folder, find_component_class

from t2i.errors import InputError
from t2i.files.component import read_model_index
from t2i.files.model_folder import load_checked_model, load_or_explain
from t2i.files.untrusted import is_folder
from t2i.interop.layouts import DEFAULT_PRIORS, LAYOUTS_BY_CLASS
from t2i.interop.loading import load_any_prior, load_components
from t2i.interop.stored import (
    AUTO_DTYPE,
    check_dtype,
    check_variant,
    has_public_parts,
    read_stored_dtypes,
    resolve_part_dtype,
)

FETCH_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
# Of diffusers: they say what is so anyway.
IGNORED_ARGUMENTS = ("use_safetensors", "low_cpu_mem_usage")
OWN_ARGUMENTS = {*COMPONENT_CLASSES, *FETCH_ARGUMENTS, *IGNORED_ARGUMENTS}


def load_public_components(
    name: str, path: Path, download: Callable[..., str], dtype: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """The components of a public model by the arguments of `from_pretrained`.

    name: as it was given; path: its folder. dtype: also as `torch_dtype`, its older name. Raises InputError.
    """
    older = kwargs.pop("torch_dtype", None)
    dtype = check_dtype(older if dtype is None else dtype)
    fetching = {key: kwargs.pop(key) for key in FETCH_ARGUMENTS if key in kwargs}
    variant = kwargs.pop("variant", None)
    for key in IGNORED_ARGUMENTS:
        kwargs.pop(key, None)
    if unknown := sorted(kwargs.keys() - COMPONENT_CLASSES.keys()):
        raise InputError(
            f"{unknown[0]!r} is no argument for a model in a public layout, which takes {', '.join(COMPONENT_CLASSES)}"
        )
    named = {part: kwargs.pop(part) for part in ("prior", "clip") if isinstance(kwargs.get(part), str | Path)}
    given = {part: one for part, one in kwargs.items() if one is not None}
    prior, clip = (named.get(part, given.get(part)) for part in ("prior", "clip"))
    _, prior, clip = locate_public_folders(name, prior, clip, download, variant, path=path, **fetching)
    return load_components(path, prior, clip, None if dtype == AUTO_DTYPE else dtype, variant, given)


def locate_public_folders(
    name: str,
    prior: Any,
    clip: Any,
    download: Callable[..., str],
    variant: str | None = None,
    path: Path | None = None,
    **fetching: Any,
) -> tuple[Path, Path | None, Path | None]:
    """The folders of a public model, of its prior and of its CLIP; None for those that are not named, but given.

    A decoder's repository of which it is known where its prior is needs no `prior`.
    """

    def find_folder(place: str | Path) -> Path:
        return Path(place if is_folder(place) else download(str(place), variant=variant, **fetching))

    usual = DEFAULT_PRIORS.get(name)
    prior = usual if prior is None else prior
    found = find_pipeline_folder(find_folder(prior)) if isinstance(prior, str | Path) else None
    if clip is None and usual is not None and found is not None and not read_model_index(found):
        clip = usual  # for a prior alone
    return path or find_folder(name), found, find_folder(clip) if isinstance(clip, str | Path) else None


def find_pipeline_folder(prior: Path) -> Path:
    """The folder of the pipeline that this is the prior's folder of, which has its CLIP too; else the folder itself."""
    home = prior.absolute().parent
    layout = LAYOUTS_BY_CLASS.get(str(read_model_index(home).get("_class_name")))
    return home if layout is not None and layout.part_folders.get("prior") == prior.name else prior


def build_own_arguments(
    path: Path, download: Callable[..., str], variant: Any = None, dtype: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """The arguments of diffusers' `from_pretrained` for a folder of this project's own layout, which is checked.

    prior: may name another one, public or of this project, on the hub too; the CLIP is the pipeline's, and so is the
    scheduler of a PriorTransformer that comes without one. dtype: of all parts or by their names; where nothing is
    said, that of the files where they hold a public model, and float32 for models that were trained here. Raises
    InputError.

    Models are read here: diffusers holds a file beside its model, and stumbles with a variant over a folder in a
    part's folder.
    """
    if isinstance(kwargs.get("clip"), str | Path):
        raise InputError(f"clip is {str(kwargs['clip'])!r:.200}, but this project's own models hold their CLIP")
    older = kwargs.pop("torch_dtype", None)
    dtype = older if dtype is None else dtype
    check_dtype(dtype)
    check_variant(variant, path)
    check_pipeline_folder(path, [name for name in COMPONENT_CLASSES if name not in kwargs], variant)
    by_name = dtype if isinstance(dtype, dict) else {}
    if dtype == AUTO_DTYPE or (dtype in (None, by_name) and "default" not in by_name and has_public_parts(path)):
        dtype = read_stored_dtypes(path, variant) | by_name

    def load_part(name: str) -> Any:
        kind = find_component_class(name, read_model_index(path)[name])
        return load_or_explain(
            lambda at: load_checked_model(kind, at / name, resolve_part_dtype(dtype, name), variant, at), path
        )

    if variant is not None or not kwargs.keys() - OWN_ARGUMENTS:  # what else diffusers is asked for, it does itself
        absent = [
            name
            for name in COMPONENT_CLASSES
            if name not in kwargs and find_component_class(name, read_model_index(path).get(name)) is not None
        ]
        kwargs |= {name: load_part(name) for name in absent}
    if isinstance(named := kwargs.get("prior"), str | Path):
        if not Path(named).exists() and str(named).count("/") == 1:  # a word without an owner is no repository's name
            named = download(
                str(named), variant=variant, **{key: kwargs[key] for key in FETCH_ARGUMENTS if key in kwargs}
            )
        kwargs |= {"clip": kwargs["clip"] if "clip" in kwargs else load_part("clip")}
        found = load_any_prior(named, lambda: kwargs["clip"], resolve_part_dtype(dtype, "prior"), variant)
        kwargs = {**found, **kwargs, "prior": found["prior"]}
        if "prior_scheduler" not in kwargs and read_model_index(path).get("prior_scheduler", [None, None]) == [
            None,
            None,
        ]:
            lacks = f"{str(named)!r} is a diffusion prior without a scheduler, and {str(path)!r} has none for a prior"
            raise InputError(f"{lacks}; give prior_scheduler=...")
    return {**kwargs, "dtype": dtype}
