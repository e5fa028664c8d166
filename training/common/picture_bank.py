"""The embeddings of all training images, with which a text tower is compared at once."""

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.data import CaptionedPictures
from t2i.errors import InputError
from t2i.networks.clip import CLIP
from t2i.texts import normalize_text

MAX_BANK_IMAGES = 100_000  # every step compares its captions with all of them


class PictureBank:
    """z_i of every image of a data set, and the images of each phrase of their captions and keywords.

    An image is right for a caption if it has all phrases of the caption. Raises InputError for too many images.
    """

    def __init__(self, clip: CLIP, dataset: CaptionedPictures):
        if len(dataset) > MAX_BANK_IMAGES:
            raise InputError(f"text_only=true takes at most {MAX_BANK_IMAGES:,} images, these are {len(dataset):,}")
        device = clip.device
        with torch.no_grad():
            images = dataset.iterate_images(len(dataset), batch_size=64)
            self.z_i = torch.cat([clip.encode_image(image.to(device)).float() for image in images])  # (N, D)
        self.pictures_by_phrase: dict[str, set[int]] = {}
        for index, row in enumerate(dataset.manifest.iterate_rows("captions", "keywords")):
            for phrase in (*row["captions"], *row["keywords"]):
                self.pictures_by_phrase.setdefault(normalize_text(phrase), set()).add(index)

    def find_right_pictures(self, phrases: list[list[str]]) -> Tensor:
        """Return the probability of each image for the phrases of each caption, (B, N): equal for all right ones."""
        right = torch.zeros(len(phrases), len(self.z_i), device=self.z_i.device)
        for row, parts in zip(right, phrases):
            found = set.intersection(*(self.pictures_by_phrase[normalize_text(part)] for part in parts))
            row[list(found)] = 1 / len(found)
        return right

    def compute_loss(self, z_t: Tensor, scale: Tensor, phrases: list[list[str]]) -> dict[str, Tensor]:
        """Return the cross-entropy of the right images among all, and the fraction of captions that find one.

        z_t: (B, D), float32, unit length. scale: (), of the logits.
        """
        logits, right = scale * z_t @ self.z_i.T, self.find_right_pictures(phrases)
        # Any of the right images counts as found
        found = right.gather(1, logits.argmax(dim=1, keepdim=True)) > 0
        return {"loss": F.cross_entropy(logits, right), "found": found.float().mean()}
