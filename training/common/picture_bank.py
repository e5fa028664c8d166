"""The embeddings of all training images, with which a text tower is compared at once."""

from collections import Counter
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor

from t2i.data import CaptionedPictures
from t2i.data.groups import SampleGroups
from t2i.errors import InputError
from t2i.files.known_words import split_words
from t2i.networks.clip import CLIP
from t2i.texts import normalize_text

MAX_BANK_IMAGES = 100_000  # every step compares its captions with all of them
# How well a phrase fits an image whose caption it is, whose caption has its words, and of which it is a keyword
CAPTION_WEIGHT, CONTAINED_WEIGHT, KEYWORD_WEIGHT = 1.0, 0.1, 0.05


class PictureBank:
    """z_i of every image of a data set, and how well each phrase of their captions and keywords fits them.

    An image is right for a caption if it has all phrases of the caption. A phrase fits best the image whose caption it
    is, then those whose caption contains its words, then those of which it is a keyword: "lion" is a lion before it is
    a seal. Images of one group share a weight, so that many variants of one thing do not outweigh another thing.
    Raises InputError for too many images.
    """

    def __init__(self, clip: CLIP, dataset: CaptionedPictures, groups: SampleGroups | None = None):
        if len(dataset) > MAX_BANK_IMAGES:
            raise InputError(f"text_only=true takes at most {MAX_BANK_IMAGES:,} images, these are {len(dataset):,}")
        device = clip.device
        with torch.no_grad():
            images = dataset.iterate_images(len(dataset), batch_size=64)
            self.z_i = torch.cat([clip.encode_image(image.to(device)).float() for image in images])  # (N, D)
        # Without groups each image is one of its own
        members = groups.members if groups else [[index] for index in range(len(dataset))]
        self.group_of = {index: number for number, part in enumerate(members) for index in part}
        # Weights of images by phrase
        self.weights: dict[str, dict[int, float]] = {}
        for index, row in enumerate(dataset.manifest.iterate_rows("captions", "keywords")):
            captions = [normalize_text(caption) for caption in row["captions"]]
            words = [set(split_words(caption)) for caption in captions]
            for phrase in (*captions, *map(normalize_text, row["keywords"])):
                contained = any(part.issuperset(split_words(phrase)) for part in words)
                weight = CAPTION_WEIGHT if phrase in captions else CONTAINED_WEIGHT if contained else KEYWORD_WEIGHT
                self.weights.setdefault(phrase, {})[index] = weight
        for weights in self.weights.values():
            self.share_in_groups(weights)

    def share_in_groups(self, weights: dict[int, float]) -> None:
        """Divide the weights of images by how many of their group have the same weight, in place."""
        counts = Counter((self.group_of[index], weight) for index, weight in weights.items())
        for index, weight in weights.items():
            weights[index] = weight / counts[self.group_of[index], weight]

    def find_right_pictures(self, phrases: list[list[str]]) -> Tensor:
        """Return the probability of each image for the phrases of each caption, (B, N): the product of the weights."""
        right = torch.zeros(len(phrases), len(self.z_i), device=self.z_i.device)
        for row, parts in zip(right, phrases):
            weights = [self.weights[normalize_text(part)] for part in parts]
            found = set.intersection(*map(set, weights))
            row[list(found)] = torch.tensor(
                [prod(part[index] for part in weights) for index in found], device=row.device
            )
        return right / right.sum(dim=1, keepdim=True)

    def compute_loss(self, z_t: Tensor, scale: Tensor, phrases: list[list[str]]) -> dict[str, Tensor]:
        """Return the cross-entropy of the right images among all, and the fraction of captions that find one.

        z_t: (B, D), float32, unit length. scale: (), of the logits.
        """
        logits, right = scale * z_t @ self.z_i.T, self.find_right_pictures(phrases)
        # Any of the right images counts as found
        found = right.gather(1, logits.argmax(dim=1, keepdim=True)) > 0
        return {"loss": F.cross_entropy(logits, right), "found": found.float().mean()}
