"""Every pipeline of the project, with arguments that draw, as tests/helpers/models.py has every model."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from t2i import Text2ImagePipeline, pipelines
from t2i.networks.upsampler import Upsampler
from tests.helpers.stages import seeds

STEPS = 2
PROMPTS = ["red circle", "a long caption of a blue square", "green"]
DRAWING = {"num_inference_steps": STEPS, "output_type": "pt"}
PRIOR = {"prior_num_inference_steps": STEPS}
OLD_CALLBACKS = frozenset({"callback", "callback_steps"})


def pictures(count: int) -> torch.Tensor:
    return torch.rand(count, 3, 32, 32, generator=seeds(9)[0])


def half_mask() -> torch.Tensor:
    mask = torch.zeros(32, 32)
    mask[16:] = 1
    return mask


@dataclass(frozen=True)
class Case:
    """A pipeline with arguments that draw `count` results; one generator draws a whole way instead of a batch."""

    name: str
    inputs: Callable[[int], dict[str, Any]]
    settings: dict[str, Any] = field(default_factory=lambda: DRAWING)
    result: str = "images"
    one_generator: bool = False
    in_diffusers: str | None = None  # the pipeline there for the same task
    not_taken: frozenset[str] = frozenset()  # of its arguments: docs/reference/for-diffusers-users.md has them

    @property
    def kind(self) -> Any:
        return getattr(pipelines, self.name)

    def takes(self, name: str) -> bool:
        return name in inspect.signature(self.kind.__call__).parameters

    def run(self, pipe: Any, count: int = 1, first_seed: int = 0, **more: Any) -> Any:
        """Return what is drawn, one below the other as a tensor if it is a list of tensors."""
        images = count * more.get("num_images_per_prompt", 1)
        generator = seeds(first_seed)[0] if self.one_generator else seeds(*range(first_seed, first_seed + images))
        drawn = pipe(**{**self.inputs(count), **self.settings, "generator": generator} | more)
        result = getattr(drawn, self.result) if not isinstance(drawn, tuple) else drawn[0]
        return torch.stack(result) if isinstance(result, list) and isinstance(result[0], torch.Tensor) else result


CASES = {
    case.name: case
    for case in (
        Case(
            "Text2ImagePipeline",
            lambda count: {"prompt": PROMPTS[:count]},
            DRAWING | PRIOR,
            in_diffusers="KandinskyV22CombinedPipeline",
            not_taken=OLD_CALLBACKS,
        ),
        Case(
            "ImageToImagePipeline",
            lambda count: {"image": pictures(count), "prompt": PROMPTS[:count], "strength": 1.0},
            DRAWING | PRIOR,
            in_diffusers="KandinskyV22Img2ImgCombinedPipeline",
            not_taken=OLD_CALLBACKS,
        ),
        Case(
            "InpaintPipeline",
            lambda count: {"image": pictures(count), "mask_image": half_mask(), "prompt": PROMPTS[:count]},
            DRAWING | PRIOR,
            in_diffusers="KandinskyV22InpaintCombinedPipeline",
            not_taken=frozenset({"kwargs"}),
        ),
        Case(
            "OutpaintPipeline",
            lambda count: {"image": pictures(count), "left": 8, "prompt": PROMPTS[:count]},
            DRAWING | PRIOR,
        ),
        Case(
            "ImageVariationPipeline",
            lambda count: {"image": pictures(count)},
            in_diffusers="StableUnCLIPImg2ImgPipeline",
            # The image itself is the embedding, and texts are read as texts
            not_taken=OLD_CALLBACKS
            | {"clip_skip", "cross_attention_kwargs", "image_embeds", "prompt_embeds", "negative_prompt_embeds"},
        ),
        Case("TextDiffPipeline", lambda count: {"image": pictures(count), "source": "red", "target": "blue"}),
        Case(
            "InterpolationPipeline",
            lambda count: {"anchors": PROMPTS[:2], "frames": count + 1},
            DRAWING | PRIOR,
            one_generator=True,
        ),
        Case("UpsamplePipeline", lambda count: {"image": pictures(count)}),
        Case(
            "PriorPipeline",
            lambda count: {"prompt": PROMPTS[:count]},
            PRIOR,
            "image_embeds",
            in_diffusers="KandinskyV22PriorPipeline",
        ),
    )
}
LEFT_OUT: dict[str, dict[str, str]] = {}  # reasons, by test and pipeline


def for_all(**reasons: str) -> Callable[[Callable], Callable]:
    """Run a test for every pipeline but those that are named with a reason."""

    def decorate(test: Callable) -> Callable:
        LEFT_OUT[test.__name__] = reasons
        names = [name for name in CASES if name not in reasons]
        return pytest.mark.parametrize("case", [CASES[name] for name in names], ids=names)(test)

    return decorate


@pytest.fixture(scope="session")
def tiny_upsampler() -> tuple[Upsampler, DDIMScheduler]:
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    unet = {"block_out_channels": [16, 32], "layers_per_block": 1, "norm_num_groups": 8} | blocks
    upsampler = Upsampler(2, 16, unet, patch_size=2).eval()
    for parameter in upsampler.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape)
    return upsampler, DDIMScheduler(prediction_type="sample")


@pytest.fixture
def pipe(case: Case, pipeline: Text2ImagePipeline, tiny_upsampler: Any) -> Any:
    if case.name == "UpsamplePipeline":
        made = case.kind(*copy.deepcopy(tiny_upsampler))
        made.set_progress_bar_config(disable=True)
        return made
    return case.kind.from_pipe(pipeline)


def list_models(pipe: Any) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
