"""Extractors of the features by which sets of images are compared: Inception, or any CLIP of open_clip."""

from pathlib import Path
from typing import Any, Protocol
from unittest import mock

import torch
from huggingface_hub import constants
from safetensors.torch import load_file
from torch import Tensor

from t2i.errors import InputError
from t2i.evaluation.metrics import import_torch_fidelity
from t2i.files.fingerprints import compute_tensors_fingerprint
from t2i.files.model_folder import load_or_explain
from t2i.interop.by_name import load_clip
from t2i.networks.clip import CLIP

INCEPTION_LAYER = "2048"  # the last average pooling of Inception, which FID uses


class FeatureExtractor(Protocol):
    """A model that turns images into features."""

    identity: str  # fingerprint of weights and preprocessing; features of different extractors cannot be compared
    dim: int

    def __call__(self, pictures: Tensor) -> Tensor:
        """Return the features, (B, dim), fp32 on the CPU, of images (B, 3, H, W) in [-1, 1]."""


class Inception:
    """Inception-v3 as in FID: that of torch-fidelity, with TensorFlow's resizing, on 8-bit images."""

    dim = int(INCEPTION_LAYER)

    def __init__(self, tensors: dict[str, Tensor], device: str = "cpu"):
        """`tensors` are the weights. Raises RuntimeError if they are not those of Inception."""
        import_torch_fidelity()
        from torch_fidelity import feature_extractor_inceptionv3 as module

        # Its constructor would download the weights or unpickle a file: replace that by the tensors.
        with mock.patch.object(module, "load_state_dict_from_url", lambda *_, **__: tensors):
            self.net = module.FeatureExtractorInceptionV3("inception", [INCEPTION_LAYER], verbose=False).to(device)
        self.identity = f"inception-{INCEPTION_LAYER}-{compute_tensors_fingerprint(tensors)}"
        self.device = device

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        return self.net(to_uint8_pixels(pictures).to(self.device))[0].float().cpu()


class CLIPFeatures:
    """The image embeddings of a CLIP, not normalized."""

    def __init__(self, clip: CLIP, device: str = "cpu"):
        self.clip = clip.to(device).eval()
        self.dim, self.identity = clip.embed_dim, f"clip-{clip.identity}"

    @torch.no_grad()
    def __call__(self, pictures: Tensor) -> Tensor:
        clip = self.clip
        if not clip.unit_length:
            return clip.encode_image(pictures.to(clip.device, clip.dtype)).float().cpu()
        # `encode_image` normalizes; the network behind it can leave that out
        prepared = clip.preprocess(pictures.to(clip.device, clip.dtype))
        return clip.net.encode_image(prepared, normalize=False).float().cpu()


def load_feature_extractor(name: str, inception: Path | None, device: str) -> FeatureExtractor:
    """Load "inception", with weights from a file or downloaded, or "clip:NAME" with a name as in configurations."""
    kind, _, clip = name.partition(":")
    if kind == "clip" and clip:
        if inception is not None:
            raise InputError(f"--inception {str(inception)!r} does not apply to --features {name}")
        return CLIPFeatures(load_clip(clip), device)
    if name != "inception":
        raise InputError(f"features must be inception or clip:FOLDER_OR_NAME, got {name!r:.80}")
    import_torch_fidelity()
    tensors = read_inception_weights(inception)
    return load_or_explain(
        lambda _: Inception(tensors, device), Path("Inception-v3" if inception is None else inception)
    )


def read_inception_weights(file: Path | None) -> dict[str, Tensor]:
    """Return Inception's weights from a .safetensors or torch-fidelity's .pth, or downloaded; only tensors are read."""
    if file is None:
        return download_inception_weights()
    if not file.is_file():
        raise InputError(f"no file {str(file)!r}; --inception is a .safetensors or torch-fidelity's .pth")
    tensors: Any
    if file.suffix == ".safetensors":
        tensors = load_or_explain(load_file, file)
    elif file.suffix == ".pth":
        tensors = load_or_explain(lambda path: torch.load(path, map_location="cpu", weights_only=True), file)
    else:
        raise InputError(f"--inception must be a .safetensors or torch-fidelity's .pth, got {str(file)!r}")
    # A .pth may hold anything; only tensors by name are weights
    if not isinstance(tensors, dict) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise InputError(f"{str(file)!r} must contain tensors by name")
    return tensors


def download_inception_weights() -> dict[str, Tensor]:
    """Return the weights of torch-fidelity's release, from torch's cache if possible; torch compares the SHA-256."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3 as URL

    file = Path(torch.hub.get_dir()) / "checkpoints" / URL.rsplit("/", 1)[1]
    advice = "give --inception FILE, or --features clip:FOLDER_OR_NAME"
    if constants.HF_HUB_OFFLINE and not file.exists():
        raise InputError(f"Inception's weights are not in {str(file)!r}, and HF_HUB_OFFLINE is set; {advice}")
    try:
        return torch.hub.load_state_dict_from_url(
            URL, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except Exception as error:  # errors of the network, the disk or the hash
        raise InputError(f"Inception's weights cannot be downloaded from {URL} ({error}); {advice}") from error


def to_uint8_pixels(pictures: Tensor) -> Tensor:
    """Convert pixels in [-1, 1] to uint8."""
    return ((pictures + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
