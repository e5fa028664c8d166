"""What turns pictures into the features that sets of pictures are compared by: Inception, or any CLIP of open_clip."""

from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import Tensor

from t2i.errors import InputError
from t2i.evaluation.metrics import fidelity
from t2i.files.fingerprints import tensors_digest
from t2i.files.model_folder import loaded
from t2i.interop.by_name import load_clip
from t2i.networks.clip import CLIP

LAYER = "2048"  # of Inception: the last average pooling, that of FID


class Extractor(Protocol):
    identity: str  # of the weights and what is done to pictures: features of two identities do not compare
    dim: int

    def __call__(self, pictures: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, dim), fp32, on the CPU."""


class Inception:
    """Inception-v3 as FID has it: torch-fidelity's, with TensorFlow's resizing, on 8-bit pictures."""

    dim = int(LAYER)

    def __init__(self, tensors: dict[str, Tensor], device: str = "cpu"):
        """Raises RuntimeError for tensors that are not Inception's."""
        fidelity()
        from torch_fidelity import feature_extractor_inceptionv3 as module

        # Its constructor downloads the weights, or unpickles a file: hand it what was read without either.
        with mock.patch.object(module, "load_state_dict_from_url", lambda *_, **__: tensors):
            self.net = module.FeatureExtractorInceptionV3("inception", [LAYER], verbose=False).to(device)
        self.identity = f"inception-{LAYER}-{tensors_digest(tensors)}"
        self.device = device

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        return self.net(to_bytes(pictures).to(self.device))[0].float().cpu()


class CLIPFeatures:
    """The embeddings of a CLIP's pictures, not normalised."""

    def __init__(self, clip: CLIP, device: str = "cpu"):
        self.clip = clip.to(device).eval()
        self.dim, self.identity = clip.embed_dim, f"clip-{clip.identity}"

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        clip = self.clip
        if not clip.unit_length:
            return clip.encode_image(pictures.to(clip.device, clip.dtype)).float().cpu()
        seen = clip.preprocess(pictures.to(clip.device, clip.dtype))
        return clip.net.encode_image(seen, normalize=False).float().cpu()


def load_extractor(name: str, inception: Path | None, device: str) -> Extractor:
    """ "inception", with its weights in a file or downloaded, or "clip:NAME" with a name as in configurations."""
    kind, _, clip = name.partition(":")
    if kind == "clip" and clip:
        if inception is not None:
            raise InputError(f"--inception {str(inception)!r} has no use with --features {name}")
        return CLIPFeatures(load_clip(clip), device)
    if name != "inception":
        raise InputError(f"features must be inception or clip:FOLDER_OR_NAME, got {name!r:.80}")
    fidelity()
    tensors = read_inception(inception)
    return loaded(lambda _: Inception(tensors, device), Path("Inception-v3" if inception is None else inception))


def read_inception(file: Path | None) -> dict[str, Tensor]:
    """Inception's weights: a .safetensors, or torch-fidelity's .pth, of which tensors alone are read; or downloaded."""
    if file is None:
        return download_inception()
    if not file.is_file():
        raise InputError(f"no file {str(file)!r}; --inception is a .safetensors or torch-fidelity's .pth")
    found: Any
    if file.suffix == ".safetensors":
        found = loaded(load_file, file)
    elif file.suffix == ".pth":
        found = loaded(lambda path: torch.load(path, map_location="cpu", weights_only=True), file)
    else:
        raise InputError(f"--inception must be a .safetensors or torch-fidelity's .pth, got {str(file)!r}")
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise InputError(f"{str(file)!r} holds no tensors by name")
    return found


def download_inception() -> dict[str, Tensor]:
    """From torch-fidelity's releases, or as it was downloaded before; its name holds the start of its SHA-256."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as URL

    file = Path(torch.hub.get_dir()) / "checkpoints" / URL.rsplit("/", 1)[1]
    advice = "give --inception FILE, or --features clip:FOLDER_OR_NAME"
    if constants.HF_HUB_OFFLINE and not file.exists():
        raise InputError(f"Inception's weights are not in {str(file)!r}, and HF_HUB_OFFLINE is set; {advice}")
    try:
        return torch.hub.load_state_dict_from_url(
            URL, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except Exception as error:  # of the network, of the disk, of a hash
        raise InputError(f"Inception's weights cannot be had from {URL} ({error}); {advice}") from error


def to_bytes(pictures: Tensor) -> Tensor:
    """[-1, 1] -> uint8."""
    return ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
