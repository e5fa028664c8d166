"""How near an upsampler comes to pictures that it has not seen, and how much of their detail it draws.

python -m benchmarks.upsampling runs/emoji/upsampler data/emoji --picture docs/upsampling.png
"""

import argparse
import random
import time
from pathlib import Path

import torch
from diffusers import SchedulerMixin
from PIL import Image, ImageDraw, ImageFont
from torch import Generator, Tensor

from t2i.config import DataConfig
from t2i.data import CaptionedPictures, to_tensor
from t2i.diffusion.stored_schedulers import load_scheduler
from t2i.evaluation.contact_sheet import build_labelled_rows, to_pil_images
from t2i.files.model_folder import load_model
from t2i.networks.upsampler import Upsampler, enlarge_low_resolution, reduce_to_low_resolution
from t2i.sampling.upsampling import sample_upsampler


def detail(pictures: Tensor, factor: int) -> Tensor:
    """(N, 3, H, W) -> (N,): the energy of the frequencies that the low resolution cannot hold."""
    energy = torch.fft.fft2(pictures.double()).abs().square()
    limit = 0.5 / factor  # cycles a pixel
    down, across = (torch.fft.fftfreq(side).abs() > limit for side in pictures.shape[-2:])
    return (energy * (down[:, None] | across)).sum(dim=(1, 2, 3)) / pictures[0].numel()


def row(name: str, drawn: Tensor, truth: Tensor, factor: int, seconds: float) -> str:
    """PSNR and L1 are means over pictures; the share of detail is of all their energy."""
    psnr = (10 * torch.log10(4 / (drawn - truth).square().mean(dim=(1, 2, 3)))).mean()
    error = (drawn - truth).abs().mean() / 2 * 255
    share = detail(drawn, factor).sum() / detail(truth, factor).sum()
    return f"| {name} | {psnr:.2f} | {error:.2f} | {share:.2f} | {1000 * seconds:.0f} |"


def draw(upsampler: Upsampler, scheduler: SchedulerMixin, low: Tensor, **settings: float) -> tuple[Tensor, float]:
    """Pictures with seeds 0, 1, ...; seconds a picture."""
    start = time.perf_counter()
    parts = [
        sample_upsampler(
            upsampler, scheduler, part, [Generator().manual_seed(16 * i + j) for j in range(len(part))], **settings
        )
        for i, part in enumerate(low.split(16))
    ]
    return torch.cat(parts), (time.perf_counter() - start) / len(low)


def drawings(count: int, size: int) -> Tensor:
    """(count, 3, size, size): what nobody trained on. Random outlined shapes and words, drawn large and reduced."""
    rng, pictures = random.Random(0), []
    for _ in range(count):
        large = Image.new("RGB", (4 * size, 4 * size), "white")
        pen = ImageDraw.Draw(large)
        for _ in range(6):
            fill, outline = (tuple(rng.randrange(256) for _ in range(3)) for _ in range(2))
            place = [(rng.randrange(4 * size), rng.randrange(4 * size)) for _ in range(3)]
            pen.polygon(place, fill=fill, outline=outline, width=rng.randint(2, 12))
            pen.text(
                place[0],
                rng.choice(("unclip", "PRIOR", "z_i = 3")),
                outline,
                ImageFont.load_default(rng.randint(40, 90)),
            )
        pictures.append(to_tensor(large.reduce(4), size))
    return torch.stack(pictures)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("data")
    parser.add_argument("--image-size", type=int, default=128)
    parser.add_argument("--picture", type=Path, help="where to write one of low, bicubic, drawn and true pictures")
    options = parser.parse_args()
    upsampler, scheduler = load_model(Upsampler, options.run).eval(), load_scheduler(options.run / "scheduler")
    data, factor = CaptionedPictures(DataConfig(options.data, options.image_size), "held_out"), upsampler.config.factor
    truth = torch.stack([data.load_image(i) for i in range(len(data))])
    low = (reduce_to_low_resolution(truth, factor) * 127.5).round() / 127.5  # as a file holds it
    bicubic = enlarge_low_resolution(low, factor).clamp(-1, 1)
    print(f"{len(truth)} held-out pictures, {sum(p.numel() for p in upsampler.parameters()):,} parameters")
    print("| | PSNR, dB | L1, of 255 | detail drawn | ms a picture |\n|---|---|---|---|---|")
    print(row("bicubic", bicubic, truth, factor, 0))
    shown = {}
    for steps in (1, 2, 4, 8, 16):
        shown[steps], seconds = draw(upsampler, scheduler, low, steps=steps)
        print(row(f"{steps} steps", shown[steps], truth, factor, seconds), flush=True)
    for level in (0.1, 0.2):
        drawn, seconds = draw(upsampler, scheduler, low, steps=8, level=level)
        print(row(f"8 steps, level {level:g}", drawn, truth, factor, seconds), flush=True)
    windows, seconds = draw(upsampler, scheduler, low, steps=8, tile=options.image_size // 2)
    print(row("8 steps, in windows of half the side", windows, truth, factor, seconds))
    difference = (windows - shown[8]).abs() / 2 * 255
    print(f"windows against whole: {difference.mean():.2f} of 255 on average, {difference.max():.0f} at most")
    other = drawings(32, options.image_size)
    small = (reduce_to_low_resolution(other, factor) * 127.5).round() / 127.5
    print(row("bicubic, other drawings", enlarge_low_resolution(small, factor).clamp(-1, 1), other, factor, 0))
    print(row("4 steps, other drawings", draw(upsampler, scheduler, small, steps=4)[0], other, factor, 0))
    if options.picture is not None:
        chosen = [i * len(truth) // 8 for i in range(8)]
        rows = {"bicubic": bicubic, "8 steps": shown[8], "true": truth}
        sheet = {
            "low": [image.resize(truth.shape[-2:], Image.Resampling.NEAREST) for image in to_pil_images(low[chosen])]
        }
        sheet |= {name: to_pil_images(value[chosen]) for name, value in rows.items()}
        build_labelled_rows(sheet, [data.get_record(i).text for i in chosen]).quantize(128).save(
            options.picture, optimize=True
        )


if __name__ == "__main__":
    main()
