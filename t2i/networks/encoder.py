"""The base of CLIPs and text encoders: a tokenizer in the folder, and a fingerprint of all that decides the outputs."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

from diffusers import ConfigMixin, ModelMixin
from torch import Tensor

from t2i.errors import InputError
from t2i.files.fingerprints import EXACT_DTYPES, check_weights_fingerprint
from t2i.files.hub import find_or_download_folder
from t2i.files.model_folder import CompanionFiles
from t2i.runtime.hooks import borrow_weights


def check_image_batch(image: Any) -> None:
    """Refuse anything but images as floats, (B, 3, H, W). The values, which may be on a device, are not read."""
    fits = isinstance(image, Tensor) and image.ndim == 4 and image.shape[1] == 3
    if not fits or not image.is_floating_point():
        got = f"{tuple(image.shape)} of {image.dtype}" if isinstance(image, Tensor) else type(image).__name__
        raise InputError(f"image must be a tensor of floats in [-1, 1], (B, 3, H, W), got {got}")


class Encoder(CompanionFiles, ModelMixin, ConfigMixin, ABC):
    """A model of diffusers with more in its folder than weights.

    Its configuration has `fingerprint`, written on saving and checked on loading, and `rounded`: the weights went
    through a dtype that does not keep the fingerprint, such as bfloat16. Subclasses name ModelMixin as a base once
    more, because diffusers' pipelines look for that name in the module of a component's class.
    """

    hub_files: ClassVar[list[str]] = ["*.json", "*.safetensors"]  # to download from a repository on the hub
    is_trainable: ClassVar[bool] = False  # after loading
    cached_identity: str | None = None
    has_warned = False  # set by training, which logs only the first caption that is cut
    tokenizer: Any

    def __getattr__(self, name: str) -> Any:
        if name == "tokenizer":
            raise InputError(f"this {type(self).__name__} has no tokenizer; assign one to `tokenizer`, or load a model")
        return super().__getattr__(name)

    @property
    def has_tokenizer(self) -> bool:
        """False for a model that was built from a configuration, and whose tokenizer was not assigned."""
        return "tokenizer" in vars(self)

    @abstractmethod
    def compute_fingerprint(self) -> str:
        """Return 16 hexadecimal digits for all that decides the outputs, the same in fp32 and fp16."""

    @abstractmethod
    def load_tokenizer_folder(self, folder: Path, root: Path) -> None:
        """Load the tokenizer from a model's folder, in which links may lead into `root`. Raises InputError."""

    def save_tokenizer(self, folder: Path) -> None:
        self.tokenizer.save(folder)

    def find_truncated_text(self, text: str) -> str:
        """Return the end of a text that does not fit, empty if all of it does."""
        return self.tokenizer.find_truncated_text(text)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        path = find_or_download_folder(pretrained_model_name_or_path, cls.hub_files)
        encoder = super().from_pretrained(path, **{"use_safetensors": True, **kwargs})
        encoder.load_companion_files(path / (kwargs.get("subfolder") or ""), path)
        return encoder

    def load_companion_files(self, folder: Path, root: Path) -> None:
        """Load what a folder has beside the weights. Raises InputError, also for weights of another fingerprint."""
        if not self.config.get("_without_tokenizer"):
            self.load_tokenizer_folder(folder, root)
        check_weights_fingerprint(self, folder)
        if not self.is_trainable:
            self.requires_grad_(False)

    # diffusers' pipelines look for the parameter `variant` in this signature before they pass it.
    def save_pretrained(self, save_directory: str | Path, variant: str | None = None, **kwargs: Any) -> None:
        """Save the model with its tokenizer, and with the fingerprint that priors and decoders refer to."""
        if not self.has_tokenizer:
            # Without a tokenizer an encoder has no fingerprint: no prior or decoder refers to it.
            self.register_to_config(_without_tokenizer=True, fingerprint=None, rounded=False)
            super().save_pretrained(save_directory, variant=variant, **kwargs)
            return
        if self.config.get("_without_tokenizer"):
            self.register_to_config(_without_tokenizer=False)
        if self.dtype not in EXACT_DTYPES:
            # These weights are rounded. Priors and decoders refer to the encoder by its fingerprint before that.
            self.register_to_config(fingerprint=self.identity, rounded=True)
        elif self.config.fingerprint is None or not self.config.rounded:
            self.register_to_config(fingerprint=self.compute_fingerprint())
        super().save_pretrained(save_directory, variant=variant, **kwargs)
        self.save_tokenizer(Path(save_directory))

    @property
    def identity(self) -> str:
        """The fingerprint when the encoder was last loaded or saved, or the present one if it never was."""
        if self.config.fingerprint:
            return self.config.fingerprint
        if self.cached_identity and not self.is_trainable:
            return self.cached_identity
        with borrow_weights(*self.modules()):
            self.cached_identity = self.compute_fingerprint()  # reads all weights
        return self.cached_identity
