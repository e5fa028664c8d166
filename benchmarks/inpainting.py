"""How well what is painted fits what stays: blended alone, and by a decoder that reads masks.

python -m benchmarks.inpainting --decoder runs/emoji/decoder-inpainting [--data data/emoji] [--pictures 48]

Held-out pictures lose half of themselves (each side in turn) and are painted as what they show. PSNR is of the painted
half against the picture; the seam is the mean step across its border, over that of the picture; kept is the share
of the other pixels that come back.
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image
from t2i.pipelines import InpaintPipeline, Text2ImagePipeline
from torch import Generator

from t2i.config import DataConfig
from t2i.data import CaptionedPictures
from t2i.files.model_folder import load_model
from t2i.networks.unet_decoder import UNetDecoder

ROOT = Path(__file__).resolve().parent.parent


def masks(count: int, side: int) -> torch.Tensor:
    """(count, side, side): the left, right, upper or lower half."""
    found = torch.zeros(count, side, side)
    half = side // 2
    for i, part in enumerate(found):
        turned = part if i % 2 else part.T
        turned[: half if i % 4 < 2 else side][0 if i % 4 < 2 else half :] = 1
    return found


def seam(pictures: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean absolute step across the border of each mask."""
    steps = []
    for picture, one in zip(pictures, mask):
        down = (one[1:] != one[:-1]).float(), (picture[:, 1:] - picture[:, :-1]).abs().mean(dim=0)
        across = (one[:, 1:] != one[:, :-1]).float(), (picture[:, :, 1:] - picture[:, :, :-1]).abs().mean(dim=0)
        total = sum((edge * step).sum() for edge, step in (down, across))
        steps.append(total / sum(edge.sum() for edge, _ in (down, across)))
    return torch.stack(steps)


def measure(pipeline: InpaintPipeline, pictures: list[Image.Image], steps: int) -> dict[str, float]:
    true = torch.stack([torch.frombuffer(bytearray(one.tobytes()), dtype=torch.uint8) for one in pictures])
    side = pictures[0].width
    true = true.view(-1, side, side, 3).permute(0, 3, 1, 2).float() / 255
    mask = masks(len(pictures), side)
    generators = [Generator().manual_seed(i) for i in range(len(pictures))]
    drawn = pipeline(pictures, list(mask), generator=generators, output_type="pt", num_inference_steps=steps).images
    inside = mask[:, None].expand_as(true) > 0
    error = (drawn - true).square()[inside].view(len(true), -1).mean(dim=1)
    kept = ((drawn * 255).round() == (true * 255).round())[~inside].float().mean().item()
    ratio = seam(drawn, mask).mean() / seam(true, mask).mean()
    return {"psnr": (-10 * error.log10()).mean().item(), "seam": ratio.item(), "kept": kept}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--decoder", type=Path, required=True)
    parser.add_argument("--data", default=str(ROOT / "data" / "emoji"))
    parser.add_argument("--pictures", type=int, default=48)
    parser.add_argument("--steps", type=int, default=25)
    arguments = parser.parse_args()
    held_out = CaptionedPictures(DataConfig(arguments.data, 128, 0), "held_out")
    chosen = [(i * len(held_out) // arguments.pictures, 0) for i in range(arguments.pictures)]
    values = ((held_out.__getitems__(chosen).image + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    pictures = [Image.fromarray(one) for one in values]
    shipped = InpaintPipeline.from_pipe(Text2ImagePipeline.from_pretrained(ROOT / "models" / "emoji"))
    trained = InpaintPipeline.from_pipe(shipped, decoder=load_model(UNetDecoder, arguments.decoder).eval())
    for name, pipeline in (("blended", shipped), ("blended and conditioned", trained)):
        pipeline.set_progress_bar_config(disable=True)
        print(json.dumps({"decoder": name, "pictures": len(pictures), **measure(pipeline, pictures, arguments.steps)}))


if __name__ == "__main__":
    main()
