"""What CLIPs and text encoders have in common: a tokenizer in their folder, and a fingerprint of what they compute."""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

from diffusers import ConfigMixin, ModelMixin

from t2i.files.fingerprints import EXACT_DTYPES, check_weights_fingerprint
from t2i.files.hub import find_or_download_folder


class Encoder(ModelMixin, ConfigMixin, ABC):
    """A model of diffusers with more in its folder than weights.

    Its configuration has `fingerprint`, written on saving and checked on loading, and `rounded`: the weights went
    through a dtype that does not keep the fingerprint, such as bfloat16. A kind of it names ModelMixin once more, for
    diffusers' pipelines look for that name in a class's module.
    """

    hub_files: ClassVar[list[str]] = ["*.json", "*.safetensors"]  # that are fetched of a repository on the hub
    is_trainable: ClassVar[bool] = False  # once read
    cached_identity: str | None = None
    tokenizer: Any

    @abstractmethod
    def fingerprint(self) -> str:
        """16 hexadecimal digits for the weights and all else that decides the outputs, the same in fp32 and fp16."""

    @abstractmethod
    def load_tokenizer_folder(self, folder: Path, root: Path) -> None:
        """Of a model's folder; links in it may lead into `root`. Raises InputError."""

    def save_tokenizer(self, folder: Path) -> None:
        self.tokenizer.save(folder)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> Self:
        path = find_or_download_folder(pretrained_model_name_or_path, cls.hub_files)
        encoder = super().from_pretrained(path, **{"use_safetensors": True, **kwargs})
        encoder.load_companion_files(path / (kwargs.get("subfolder") or ""), path)
        return encoder

    def load_companion_files(self, folder: Path, root: Path) -> None:
        """What a folder holds beside the weights. Raises InputError, also for weights of another fingerprint."""
        self.load_tokenizer_folder(folder, root)
        check_weights_fingerprint(self, folder)
        if not self.is_trainable:
            self.requires_grad_(False)

    def save_pretrained(self, save_directory: str | Path, variant: str | None = None, **kwargs: Any) -> None:
        # The variant by name: diffusers' pipelines look for it in the signature.
        if self.dtype not in EXACT_DTYPES:  # others know it by what it was
            self.register_to_config(fingerprint=self.identity, rounded=True)
        elif self.config.fingerprint is None or not self.config.rounded:
            self.register_to_config(fingerprint=self.fingerprint())
        super().save_pretrained(save_directory, variant=variant, **kwargs)
        self.save_tokenizer(Path(save_directory))

    @property
    def identity(self) -> str:
        """The fingerprint as it was when the encoder was last read or saved, or as it is if it never was."""
        if self.config.fingerprint:
            return self.config.fingerprint
        if self.is_trainable:
            return self.fingerprint()
        self.cached_identity = self.cached_identity or self.fingerprint()  # once, for it reads all weights
        return self.cached_identity
