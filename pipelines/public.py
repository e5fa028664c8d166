"""How pipelines load public models: what is fetched, and which arguments mean what."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pipelines.folder import PARTS
from t2i.errors import InputError
from t2i.interop.component import listed
from t2i.interop.layouts import USUAL_PRIORS
from t2i.interop.loading import load_components, own_prior
from t2i.untrusted import is_folder

FETCHING = ("revision", "cache_dir", "token", "local_files_only", "force_download")
# Of diffusers: they say what is so anyway.
WITHOUT_EFFECT = ("use_safetensors", "low_cpu_mem_usage")


def public_components(
    name: str, path: Path, download: Callable[..., str], dtype: torch.dtype | None = None, **kwargs: Any
) -> dict[str, Any]:
    """The components of a public model by the arguments of `from_pretrained`.

    name: as it was given; path: its folder. dtype: also as `torch_dtype`, its older name. Raises InputError.
    """
    older = kwargs.pop("torch_dtype", None)
    dtype = older if dtype is None else dtype
    fetching = {key: kwargs.pop(key) for key in FETCHING if key in kwargs}
    variant = kwargs.pop("variant", None)
    for key in WITHOUT_EFFECT:
        kwargs.pop(key, None)
    if unknown := sorted(kwargs.keys() - PARTS.keys()):
        raise InputError(
            f"{unknown[0]!r} is no argument for a model in a public layout, which takes {', '.join(PARTS)}"
        )
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise InputError(f"dtype must be a torch.dtype, got {dtype!r:.80}")
    named = {part: kwargs.pop(part) for part in ("prior", "clip") if isinstance(kwargs.get(part), str | Path)}
    given = {part: one for part, one in kwargs.items() if one is not None}
    prior, clip = (named.get(part, given.get(part)) for part in ("prior", "clip"))
    _, prior, clip = located(name, prior, clip, download, variant, path=path, **fetching)
    return load_components(path, prior, clip, dtype, variant, given)


def located(
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

    def folder(place: str | Path) -> Path:
        return Path(place if is_folder(place) else download(str(place), variant=variant, **fetching))

    usual = USUAL_PRIORS.get(name)
    prior = usual if prior is None else prior
    found = folder(prior) if isinstance(prior, str | Path) else None
    if clip is None and usual is not None and found is not None and not listed(found):
        clip = usual  # for a prior alone
    return path or folder(name), found, folder(clip) if isinstance(clip, str | Path) else None


def with_prior(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments for a folder of this project's own, where `prior` may name the folder of another one."""
    if not isinstance(kwargs.get("prior"), str | Path):
        return kwargs
    return kwargs | own_prior(kwargs["prior"])
