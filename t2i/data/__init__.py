"""Captioned images. Names are imported when they are first used: who reads one image needs no Parquet."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t2i.data.dataset import Batch, CaptionedPictures, SampleText, open_datasets
    from t2i.data.loading import iterate_batches
    from t2i.data.pictures import open_image, to_tensor

__all__ = ["Batch", "CaptionedPictures", "SampleText", "iterate_batches", "open_datasets", "open_image", "to_tensor"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 't2i.data' has no attribute {name!r}")
    modules = {"open_image": "pictures", "to_tensor": "pictures", "iterate_batches": "loading"}
    return getattr(import_module(f"t2i.data.{modules.get(name, 'dataset')}"), name)
