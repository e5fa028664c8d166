"""What autoencoders keep of pictures, side by side: nearness in pixels, and what a picture looks like.

    python -m benchmarks.autoencoders data/emoji shipped=models/emoji/autoencoder l1=runs/x adversarial=runs/y \
        [--clip models/emoji/clip] [--count 1024] [--picture docs/images/autoencoder.png]

Prints a Markdown table. Of what is held out, each picture by itself: PSNR, L1, perceptual distance. Of pictures from
all over the data, as a distribution: the Fréchet distance of CLIP's embeddings; the sliced Wasserstein distance of
patches; how much of the fine detail's energy is there. `--picture` writes the most detailed parts of some, enlarged.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from t2i.config import DataConfig
from t2i.data import CaptionedPictures
from t2i.evaluation.contact_sheet import build_labelled_rows, to_pil_images
from t2i.interop.by_name import load_autoencoder, load_clip
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.perceptual import PerceptualDistance

BATCH = 64
CROP, ENLARGED, COLUMNS = 48, 144, 7
PATCH, PATCHES, PROJECTIONS = 8, 64, 256  # side; a picture; directions
COLUMN_NAMES = ("PSNR, dB", "L1", "perceptual x 1000", "Fréchet x 1000", "patches x 1000", "fine detail")


def read(path: str, split: str | None, size: int, count: int) -> Tensor:
    return torch.cat(list(CaptionedPictures(DataConfig(path, size), split).iterate_images(count, BATCH)))


def batched(function, *tensors: Tensor) -> Tensor:
    return torch.cat([function(*parts) for parts in zip(*(one.split(BATCH) for one in tensors))])


def reconstruct(autoencoder: Autoencoder, pictures: Tensor) -> Tensor:
    return batched(lambda part: autoencoder.decode(autoencoder.encode(part)).clamp(-1, 1), pictures)


def frechet(a: Tensor, b: Tensor) -> float:
    """|mean - mean|^2 + tr(A + B - 2 (A B)^(1/2)) of the Gaussians with the moments of two samples, (N, D)."""
    a, b = a.double(), b.double()
    covariances = torch.cov(a.T), torch.cov(b.T)
    # The eigenvalues of A B are those of the symmetric A^(1/2) B A^(1/2): real, not negative.
    values, vectors = torch.linalg.eigh(covariances[0])
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    shared = torch.linalg.eigvalsh(root @ covariances[1] @ root).clamp(min=0).sqrt().sum()
    moved = (a.mean(dim=0) - b.mean(dim=0)).square().sum()
    return (moved + covariances[0].trace() + covariances[1].trace() - 2 * shared).item()


def fine_energy(pictures: Tensor) -> Tensor:
    """(N, 3, H, W) -> (N,): energy of the brightness at less than 4 pixels a period."""
    spectrum = torch.fft.rfft2(pictures.mean(dim=1)).abs().square()
    down, right = torch.fft.fftfreq(pictures.shape[-2]), torch.fft.rfftfreq(pictures.shape[-1])
    return (spectrum * (down[:, None].hypot(right) > 0.25)).sum(dim=(1, 2))


def patch_projections(pictures: Tensor) -> Tensor:
    """The same places of every picture seen in the same directions: (N * PATCHES, PROJECTIONS), sorted."""
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(pictures.shape[-1] - PATCH + 1, (PATCHES, 2), generator=generator).tolist()
    found = torch.cat([pictures[:, :, y : y + PATCH, x : x + PATCH].flatten(1) for y, x in places])
    found = found - found.mean(dim=1, keepdim=True)  # what is left is detail
    directions = F.normalize(torch.randn(found.shape[1], PROJECTIONS, generator=generator), dim=0)
    return (found @ directions).sort(dim=0).values


def measure(pictures: Tensor, held_out: Tensor, autoencoder: Autoencoder, perceptual: PerceptualDistance) -> list[str]:
    again, other = reconstruct(autoencoder, pictures), reconstruct(autoencoder, held_out)
    squared = (other - held_out).square().mean(dim=(1, 2, 3))
    embeddings = [batched(perceptual.clip.encode_image, one) for one in (again, pictures)]
    patches = (patch_projections(again) - patch_projections(pictures)).abs().mean()
    return [
        f"{(10 * torch.log10(4 / squared)).mean():.2f}",
        f"{(other - held_out).abs().mean():.4f}",
        f"{1000 * batched(perceptual, other, held_out).mean():.2f}",
        f"{1000 * frechet(*embeddings):.3f}",
        f"{1000 * patches:.2f}",
        f"{fine_energy(again).sum() / fine_energy(pictures).sum():.3f}",
    ]


def most_detailed(pictures: Tensor) -> list[tuple[int, int]]:
    """The corner of the window of CROP pixels that changes most, in each picture."""
    change = pictures.diff(dim=-1)[..., 1:, :].abs() + pictures.diff(dim=-2)[..., 1:].abs()
    found = F.avg_pool2d(change.mean(dim=1, keepdim=True), CROP - 1, stride=4)
    return [(4 * (i // found.shape[-1]), 4 * (i % found.shape[-1])) for i in found.flatten(1).argmax(dim=1).tolist()]


def draw(held_out: Tensor, autoencoders: dict[str, Autoencoder], path: str) -> None:
    chosen = held_out[:: -(-len(held_out) // COLUMNS)]
    corners = most_detailed(chosen)
    rows = {}
    for name, pictures in {"original": chosen, **{k: reconstruct(v, chosen) for k, v in autoencoders.items()}}.items():
        parts = [one[:, y : y + CROP, x : x + CROP] for one, (y, x) in zip(pictures, corners)]
        images = to_pil_images(torch.stack(parts))
        rows[name] = [image.resize((ENLARGED, ENLARGED), Image.Resampling.NEAREST) for image in images]
    sheet = build_labelled_rows(rows, [""] * len(chosen))
    sheet.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


@torch.no_grad()
def main(arguments: list[str]) -> None:
    options = {"--clip": "models/emoji/clip", "--count": "1024", "--picture": ""}
    for option in options:
        if option in arguments:
            at = arguments.index(option)
            options[option] = arguments[at + 1]
            del arguments[at : at + 2]
    perceptual = PerceptualDistance(load_clip(options["--clip"]).float())
    autoencoders = {
        name: load_autoencoder(folder).float() for name, folder in (one.split("=", 1) for one in arguments[1:])
    }
    count, size = int(options["--count"]), perceptual.clip.size
    held_out, pictures = (read(arguments[0], split, size, count) for split in ("held_out", None))
    print(f"{len(held_out)} pictures held out, {len(pictures)} from all\n")
    print("| | " + " | ".join(COLUMN_NAMES) + " |\n|---" + "|---" * len(COLUMN_NAMES) + "|")
    for name, autoencoder in autoencoders.items():
        print(f"| {name} | {' | '.join(measure(pictures, held_out, autoencoder, perceptual))} |", flush=True)
    if options["--picture"]:
        Path(options["--picture"]).parent.mkdir(parents=True, exist_ok=True)
        draw(held_out, autoencoders, options["--picture"])


if __name__ == "__main__":
    main(sys.argv[1:])
