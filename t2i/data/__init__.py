"""Captioned pictures."""

from t2i.data.dataset import Batch, CaptionedPictures, Record, batches, held_out_pictures
from t2i.data.pictures import open_picture, to_tensor

__all__ = ["Batch", "CaptionedPictures", "Record", "batches", "held_out_pictures", "open_picture", "to_tensor"]
