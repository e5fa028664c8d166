"""Captioned pictures."""

from t2i.data.dataset import Batch, CaptionedPictures, Record, batches
from t2i.data.encoding import encode_all
from t2i.data.pictures import open_picture, to_tensor

__all__ = ["Batch", "CaptionedPictures", "Record", "batches", "encode_all", "open_picture", "to_tensor"]
