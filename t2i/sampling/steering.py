"""Steering: scores whose gradient moves a sample towards a class, a text or an image.

A score is a log-probability of noisy or clean latents, for `t2i.diffusion.guidance.build_steered_predict`. It leaves
the model as it is, and so works with every condition, the null included.
"""

from dataclasses import InitVar, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import SchedulerMixin
from torch import Tensor

from t2i.checks import check_range, check_texts
from t2i.data.pictures import open_image, to_tensor
from t2i.diffusion.denoiser import PredictTransform
from t2i.diffusion.guidance import ScoreFunction, build_steered_predict
from t2i.diffusion.process import preserve_variance
from t2i.errors import InputError
from t2i.files.fingerprints import EXACT_DTYPES, compute_weights_fingerprint
from t2i.files.model_folder import load_model
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.classifier import LatentClassifier, compute_noise_level
from t2i.networks.clip import CLIP
from t2i.runtime.hooks import borrow_weights
from t2i.texts import wrap_text

GOALS = ("class_name", "text", "image")  # fields of `Steering`
MAX_STEERING_SCALE = 10_000
LOGIT_SCALE = 100.0  # CLIP's: a cosine times this is a logit, in the scale of a class's log-probability


@dataclass(frozen=True, eq=False)
class Steering:
    """A goal to steer towards: a class, a text or an image, exactly one of them.

    scale: gamma, the factor of the score's gradient; 0 is off, 1 samples the posterior if model and classifier are
        exact, more gives surer and less diverse samples (Dhariwal and Nichol 2021, section 4.3).
    classifier: a `LatentClassifier` on noisy latents. A class needs one. With one, a text or an image is compared with
        its noise-aware image embedding. Without one, the clean estimate of every step is decoded and encoded by CLIP,
        with the gradient through autoencoder and model, which takes several times as long.
    class_name, text: one for all images, or one an image.
    image: (1 or N, 3, H, W) in [-1, 1]. picture: its old name.
    """

    scale: float = 1.0
    classifier: LatentClassifier | None = None
    class_name: str | list[str] | None = None
    text: str | list[str] | None = None
    image: Tensor | None = None
    picture: InitVar[Tensor | None] = None

    def __post_init__(self, picture: Tensor | None) -> None:
        if picture is not None:
            object.__setattr__(self, "image", picture)

    def build_metadata(self) -> dict[str, Any]:
        """Return plain texts and numbers, to be written into an image."""
        # An image's pixels are not recorded, only that there was one
        image = None if self.image is None else "a picture"
        goal: dict[str, Any] = {"class": self.class_name, "text": self.text, "picture": image}
        if self.classifier is not None:
            folder = Path(self.classifier.config.get("_name_or_path") or "")
            folder = folder.parent if folder.name == "model" else folder  # of a run
            fingerprint = compute_weights_fingerprint(self.classifier)
            goal["classifier"] = {"folder": folder.name or None, "fingerprint": fingerprint}
        return {"scale": self.scale, **{name: value for name, value in goal.items() if value is not None}}


def check_steering(steering: Any, clip: CLIP, autoencoder: Autoencoder, count: int, latent_side: int) -> None:
    """Refuse steering that does not fit this pipeline, or `count` images. Raises InputError.

    latent_side: the shorter side of their latents.
    """
    if not isinstance(steering, Steering):
        raise InputError(f"steering must be a Steering, got {steering!r:.80}")
    check_range("steering.scale", steering.scale, 0, MAX_STEERING_SCALE)
    # Exactly one goal
    goals = {key: getattr(steering, key) for key in GOALS}
    keys = [key for key, value in goals.items() if value is not None]
    if len(keys) != 1:
        given = " and ".join(keys) or "none of them"
        raise InputError(f"steering needs a class_name, a text or an image, got {given}")
    (key,) = keys
    if key == "image":
        check_steering_image(steering.image, count)
    else:
        texts = ensure_list(goals[key])
        check_texts(f"steering.{key}", texts, empty=False)
        if isinstance(goals[key], list) and len(texts) not in (1, count):
            raise InputError(f"steering.{key} has {len(texts)} texts for {count} images; give one, or one an image")
    # A class needs a classifier; with one, a text or an image is compared with the embedding that it predicts
    if key == "class_name" and steering.classifier is None:
        raise InputError("steering.class_name needs a classifier; `t2i train classifier` makes one")
    if steering.classifier is not None:
        check_steering_classifier(steering.classifier, clip, autoencoder, embeds=key != "class_name")
        if latent_side < (least := steering.classifier.min_latent_side):
            pixels = least * autoencoder.factor
            raise InputError(f"steering.classifier needs images of {pixels} x {pixels} or more; draw larger ones")
        for class_name in ensure_list(steering.class_name):
            steering.classifier.find_class_index(class_name)


def check_steering_image(image: Any, count: int) -> None:
    """Refuse anything but images, (1 or `count`, 3, H, W), with finite values in [-1, 1]."""
    shape = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
    if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[1] != 3 or min(image.shape) < 1:
        raise InputError(f"steering.image must be a tensor (1 or N, 3, H, W), got {shape}")
    if len(image) not in (1, count):
        raise InputError(f"steering.image has {len(image)} images for {count}; give one, or one an image")
    if not image.isfinite().all():
        raise InputError("steering.image must be finite, got NaN or infinity")
    low, high = image.min().item(), image.max().item()
    if low < -1 or high > 1:
        raise InputError(f"steering.image must have values from -1 to 1, got {low:g} to {high:g}")


def check_steering_classifier(classifier: LatentClassifier, clip: CLIP, autoencoder: Autoencoder, embeds: bool) -> None:
    """Refuse a classifier of another latent space or, where its embeddings are used, of another CLIP."""
    # Rounded weights, such as bfloat16's, have another fingerprint: those are not compared
    expected = classifier.config.autoencoder_fingerprint
    exact = all(weight.dtype in EXACT_DTYPES for weight in autoencoder.parameters())
    with borrow_weights(*autoencoder.modules()):
        actual = compute_weights_fingerprint(autoencoder) if expected is not None and exact else expected
    if actual != expected:
        raise InputError(f"the classifier was trained with the autoencoder {expected}, this pipeline has {actual}")
    if classifier.config.latent_channels != autoencoder.channels:
        channels = f"{classifier.config.latent_channels} channels, this pipeline's latents have {autoencoder.channels}"
        raise InputError(f"the classifier was trained with another autoencoder: on latents of {channels}")
    expected = classifier.config.clip_fingerprint
    if embeds and expected not in (None, clip.identity):
        raise InputError(f"the classifier was trained with the CLIP {expected}, this pipeline has {clip.identity}")


def read_image_tensor(path: Path) -> Tensor:
    """Read the middle square of an image file, (1, 3, S, S) in [-1, 1]. Raises InputError if it cannot be read."""
    image = open_image(path)
    return to_tensor(image, min(image.size))[None]


def load_classifier(folder: str | Path) -> LatentClassifier:
    """Load a classifier that `t2i train classifier` wrote. Raises InputError if there is none that loads."""
    return load_model(LatentClassifier, folder).eval()


def build_steering_transform(
    steering: Steering,
    scheduler: SchedulerMixin,
    clip: CLIP,
    autoencoder: Autoencoder,
    count: int,
    device: torch.device,
) -> PredictTransform:
    """Return the transform of a `Predict` of `count` latents into one steered by `steering`, which is checked."""
    classifier = None if steering.classifier is None else steering.classifier.to(device).eval()
    if steering.class_name is not None:
        names = ensure_list(steering.class_name)
        score = build_class_score(classifier, scheduler, names * count if len(names) == 1 else names)
    else:
        with torch.no_grad():
            if steering.image is not None:
                target = clip.encode_image(steering.image.to(device, clip.dtype))
            else:
                target = clip.encode_text(ensure_list(steering.text)).embedding
        target = F.normalize(target.to(device).float(), dim=-1).expand(count, -1)
        score = build_clip_score(classifier, scheduler, clip, autoencoder, target)
    # CLIP saw no noisy images in training, so that without a classifier the clean estimate is scored
    of_x0 = classifier is None
    return lambda predict: build_steered_predict(predict, scheduler, score, steering.scale, of_x0)


def build_class_score(classifier: Any, scheduler: SchedulerMixin, names: list[str]) -> ScoreFunction:
    """Return the score log p(class | x_t) of noisy latents, one class an image (Dhariwal and Nichol 2021, sec. 4)."""
    numbers = torch.tensor([classifier.find_class_index(name) for name in names])

    def score(x: Tensor, t: Tensor) -> Tensor:
        noisy = preserve_variance(scheduler, x, t)
        logs = classifier.predict_log_probs(noisy, compute_noise_level(scheduler, t, x))
        return logs.gather(1, numbers.to(logs.device)[:, None])[:, 0]

    return score


def build_clip_score(
    classifier: Any, scheduler: SchedulerMixin, clip: CLIP, autoencoder: Autoencoder, target: Tensor
) -> ScoreFunction:
    """Return the score of latents by their CLIP logit with `target`, (N, D).

    With a classifier they are noisy, and it estimates their embedding; without one they are clean, and decoded.
    """

    def score(x: Tensor, t: Tensor) -> Tensor:
        if classifier is not None:
            noisy = preserve_variance(scheduler, x, t)
            z_i = classifier.predict_image_embeds(noisy, compute_noise_level(scheduler, t, x))
        else:
            image = autoencoder.decode(x.to(autoencoder.dtype)).clamp(-1, 1)
            z_i = F.normalize(clip.encode_image(image.to(clip.dtype)).float(), dim=-1)
        return LOGIT_SCALE * (z_i * target).sum(dim=-1)

    return score


def ensure_list(value: str | list[str] | None) -> list[str]:
    return [] if value is None else wrap_text(value)
