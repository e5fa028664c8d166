"""The report of `t2i doctor`: what is installed, and what is missing."""

import importlib
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version

from t2i import __version__

REQUIRED_PACKAGES = [
    *("torch", "torchvision", "open_clip_torch", "diffusers", "transformers", "accelerate", "datasets"),
    *("safetensors", "huggingface_hub", "omegaconf", "typer", "pillow", "numpy"),
    *("pyarrow", "psutil", "pyyaml", "tensorboard", "tokenizers", "tqdm"),
]


def collect_doctor_report() -> tuple[list[str], list[str]]:
    """Return lines to print, and the problems that keep the project from working."""
    problems: list[str] = []
    lines = [f"t2i {__version__}, Python {platform.python_version()}, {platform.platform()}"]
    for package in REQUIRED_PACKAGES:
        try:
            lines.append(f"  {package} {version(package)}")
        except PackageNotFoundError:
            problems.append(f"{package} is not installed; pip install {package}")
    # A package may be installed and not work
    for module in ("torch", "torchvision", "open_clip", "diffusers", "transformers"):
        try:
            importlib.import_module(module)
        except Exception as error:  # torch and torchvision of different releases raise errors of many kinds
            problems.append(f"{module} does not import ({error}); install torch and torchvision together")
    if not problems:
        lines += format_device_lines() + find_missing_emoji_packages()
    return lines, problems


def find_missing_emoji_packages() -> list[str]:
    """Return a line for each system package that `t2i data emoji` lacks. Nothing else needs them."""
    from PIL import features

    from t2i.data.emoji.keywords import CLDR_FOLDER
    from t2i.data.emoji.names import EMOJI_TEST_FILE
    from t2i.data.emoji.noto import FONT_FILE

    installed = {"fonts-noto-color-emoji": FONT_FILE.exists(), "unicode-data": EMOJI_TEST_FILE.exists()}
    installed |= {"unicode-cldr-core": CLDR_FOLDER.exists(), "libfribidi0": bool(features.check("raqm"))}
    missing = [name for name, is_installed in installed.items() if not is_installed]
    return [f"  `t2i data emoji` needs the missing system package {name}" for name in missing]


def format_device_lines() -> list[str]:
    """Return lines about CPU, disk and GPUs, and the precision that training would use."""
    import torch

    from t2i.runtime.devices import choose_training_precision

    free = shutil.disk_usage(".").free / 1e9
    lines = [f"  {os.cpu_count()} CPU cores, {free:.0f} GB of free disk space here"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        lines.append(f"  cuda:{index} {properties.name}, {properties.total_memory / 1e9:.0f} GB")
    if torch.backends.mps.is_available():
        lines.append("  mps")
    if torch.cuda.device_count() == 0 and shutil.which("nvidia-smi"):
        lines.append("  an NVIDIA driver is installed, but torch sees no GPU; check whether torch is a CPU build")
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    return [*lines, f"  training precision (mixed_precision: auto): {choose_training_precision(kind)}"]
