"""Captioned pictures."""

from t2i.data.dataset import Batch, CaptionedPictures, batches, read_records
from t2i.data.pictures import open_picture, to_tensor

__all__ = ["Batch", "CaptionedPictures", "batches", "open_picture", "read_records", "to_tensor"]
