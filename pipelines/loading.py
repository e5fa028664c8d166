"""Turn the arguments of `from_pretrained` into the components of a pipeline."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

from t2i.pipelines.folder import COMPONENT_CLASSES, PipelineFolder

from t2i.diffusion.stored_schedulers import load_scheduler
from t2i.errors import InputError
from t2i.files.untrusted import check_folder_files, is_folder
from t2i.interop.by_name import load_any_prior
from t2i.interop.layouts import DEFAULT_PRIORS
from t2i.interop.loading import load_components
from t2i.interop.stored import AUTO_DTYPE, Dtypes, check_dtype, check_variant, resolve_part_dtype

FETCH_ARGUMENTS = ("revision", "cache_dir", "token", "local_files_only", "force_download")
IGNORED_ARGUMENTS = ("use_safetensors", "low_cpu_mem_usage")  # of diffusers; here they are always true
OWN_ARGUMENTS = {*COMPONENT_CLASSES, *FETCH_ARGUMENTS, *IGNORED_ARGUMENTS}
Download = Callable[..., str]


def load_public_components(
    name: str, folder: PipelineFolder, download: Download, dtype: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """Load the components of a public model, by the arguments of `from_pretrained`.

    name: text that the user gave. folder: path of that name. download: method of the pipeline's class. Raises
    InputError.
    """
    # Sort the arguments
    fetching = {key: kwargs.pop(key) for key in FETCH_ARGUMENTS if key in kwargs} | {"variant": folder.variant}
    for key in ("variant", *IGNORED_ARGUMENTS):
        kwargs.pop(key, None)
    if unknown := sorted(kwargs.keys() - COMPONENT_CLASSES.keys()):
        raise InputError(
            f"{unknown[0]!r} is no argument for a model in a public layout, which takes {', '.join(COMPONENT_CLASSES)}"
        )
    named = {part: kwargs.pop(part) for part in ("prior", "clip") if isinstance(kwargs.get(part), str | Path)}
    overrides = {part: component for part, component in kwargs.items() if component is not None}

    # Find the folders, and load
    prior, clip = locate_other_folders(
        name,
        named.get("prior", overrides.get("prior")),
        named.get("clip", overrides.get("clip")),
        lambda place: Path(place if is_folder(place) else download(str(place), **fetching)),
        folder.variant,
    )
    return load_components(folder, prior, clip, None if dtype == AUTO_DTYPE else dtype, overrides)


def locate_other_folders(
    name: str, prior: Any, clip: Any, find_folder: Callable[[str | Path], Path], variant: str | None
) -> tuple[PipelineFolder | None, PipelineFolder | None]:
    """Return the folders of a public model's prior and CLIP, None for those that are not named.

    name: text that names the model. For a decoder on the hub whose prior's repository is known, `prior` may be None.
    prior, clip: names, or components of the caller's. find_folder: returns the folder of a name.
    """
    # Decoders on the hub are published without their prior, which is in another repository
    default = DEFAULT_PRIORS.get(name)
    prior = default if prior is None else prior
    prior_folder = None
    if isinstance(prior, str | Path):
        prior_folder = find_whole_pipeline(PipelineFolder(find_folder(prior), variant))
    if clip is None and default is not None and prior_folder is not None and not prior_folder.index:
        clip = default  # for a prior alone, which has no CLIP beside it
    return prior_folder, PipelineFolder(find_folder(clip), variant) if isinstance(clip, str | Path) else None


def find_whole_pipeline(prior: PipelineFolder) -> PipelineFolder:
    """Return the pipeline, with the CLIP, that this folder is the prior's part of; else the folder itself."""
    pipeline = PipelineFolder(prior.path.absolute().parent, prior.variant)
    layout = pipeline.pipeline_layout
    return pipeline if layout is not None and layout.part_folders.get("prior") == prior.path.name else prior


def build_own_arguments(
    folder: PipelineFolder, download: Download, dtype: Any = None, variant: Any = None, **kwargs: Any
) -> dict[str, Any]:
    """Check a folder in this project's own layout, and return arguments of diffusers' `from_pretrained` for it.

    Models are loaded here: diffusers keeps a file in memory beside its model, and takes no variant where a component's
    folder has folders in it. dtype: data type of all components, or by their names. None is float32 for models that
    were trained here, and the stored dtype for folders with public models. `prior` may name another prior, public or of
    this project, of the folder's CLIP. Raises InputError.
    """
    # Check the arguments and the folder
    if isinstance(kwargs.get("clip"), str | Path):
        raise InputError(f"clip is {str(kwargs['clip'])!r:.200}, but this project's own models hold their CLIP")
    check_variant(folder.variant, folder.path)
    folder.check([name for name in COMPONENT_CLASSES if name not in kwargs])
    dtype = resolve_stored_dtypes(folder, dtype)

    # Load the models, unless there is an argument that only diffusers can handle, such as a device_map
    if folder.variant is not None or not kwargs.keys() - OWN_ARGUMENTS:
        for name in COMPONENT_CLASSES:
            if name not in kwargs and folder.find_component_class(name) is not None:
                kwargs[name] = folder.load_component(name, resolve_part_dtype(dtype, name))
    if isinstance(kwargs.get("prior"), str | Path):
        kwargs |= load_other_prior(folder, download, dtype, kwargs)
    return {**kwargs, "dtype": dtype}


def load_own_parts(folder: PipelineFolder, names: tuple[str, ...], dtype: Any = None) -> dict[str, Any]:
    """Load some components of a folder in this project's own layout; nothing else of it is read.

    dtype: see `build_own_arguments`. Raises InputError for parts that are not sound, and for a variant that none has.
    """
    check_folder_files(folder.path)
    check_variant(folder.variant, folder.path)
    dtypes, loaded = resolve_stored_dtypes(folder, check_dtype(dtype)), {}
    for name in names:
        folder.check_component(name)
        if name.endswith("_scheduler"):
            loaded[name] = load_scheduler(folder.path / name)
        else:
            part_dtype = resolve_part_dtype(dtypes, name)
            loaded[name] = folder.load_component(name, None if part_dtype == AUTO_DTYPE else part_dtype)
    return loaded


def split_loading_arguments(
    kwargs: dict[str, Any], components: Collection[str]
) -> tuple[Any, str | None, dict[str, Any], dict[str, Any]]:
    """Return the dtype, the variant, the arguments of fetching and the components among those of a `from_pretrained`.

    components: names of those of a pipeline of few parts. Raises InputError for an argument without an effect on it.
    """
    known = {"dtype", "torch_dtype", "variant", *FETCH_ARGUMENTS, *IGNORED_ARGUMENTS}
    given = {name: kwargs[name] for name in components if name in kwargs}
    if unknown := sorted(kwargs.keys() - known - given.keys()):
        raise InputError(f"{unknown[0]!r} is no argument here; they are {', '.join([*components, *sorted(known)])}")
    dtype = kwargs.get("torch_dtype") if kwargs.get("dtype") is None else kwargs["dtype"]
    fetching = {name: kwargs[name] for name in FETCH_ARGUMENTS if name in kwargs}
    return check_dtype(dtype), kwargs.get("variant"), fetching, given


def resolve_stored_dtypes(folder: PipelineFolder, dtype: Any) -> Dtypes:
    """Return `dtype` with the stored dtypes of the components that it leaves to the files."""
    by_name = dtype if isinstance(dtype, dict) else {}
    unset = dtype in (None, by_name) and "default" not in by_name
    if dtype == AUTO_DTYPE or (unset and folder.has_public_parts):
        return folder.find_stored_dtypes() | by_name
    return dtype


def load_other_prior(folder: PipelineFolder, download: Download, dtype: Dtypes, kwargs: dict[str, Any]) -> dict:
    """Load the prior that `kwargs` names in place of the folder's, with its scheduler and the CLIP that it needs."""
    name = kwargs["prior"]
    # A word without an owner is no repository's name.
    if not Path(name).exists() and str(name).count("/") == 1:
        fetching = {key: kwargs[key] for key in FETCH_ARGUMENTS if key in kwargs}
        name = download(str(name), variant=folder.variant, **fetching)
    clip = kwargs["clip"] if "clip" in kwargs else folder.load_component("clip", resolve_part_dtype(dtype, "clip"))
    loaded = load_any_prior(name, lambda: clip, resolve_part_dtype(dtype, "prior"), folder.variant)
    if "prior_scheduler" not in {**loaded, **kwargs} and folder.lacks_component("prior_scheduler"):
        raise InputError(
            f"{str(name)!r} is a diffusion prior without a scheduler, and {str(folder.path)!r} has none for a prior; "
            "give prior_scheduler=..."
        )
    return {**loaded, **kwargs, "prior": loaded["prior"], "clip": clip}
