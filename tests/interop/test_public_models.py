"""Each cell of the table in docs/reference/public-models.md, on tiny models in the public layouts."""

import copy
import functools
import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from diffusers import DiffusionPipeline
from PIL import Image
from t2i.pipelines.jobs.convert import convert_folder

from t2i import (
    ImageToImagePipeline,
    ImageVariationPipeline,
    InpaintPipeline,
    InputError,
    InterpolationPipeline,
    OutpaintPipeline,
    Steering,
    Text2ImagePipeline,
    TextDiffPipeline,
)
from t2i.config import load_config
from t2i.diffusion.guidance import Guidance
from t2i.diffusion.samplers import SAMPLERS
from tests.helpers.dalle2_folders import dalle2
from tests.helpers.kandinsky_folders import (
    kandinsky_21_combined,
    kandinsky_21_inpaint,
    kandinsky_21_prior,
    kandinsky_22_controlnet,
    kandinsky_22_decoder,
    kandinsky_22_inpaint,
    kandinsky_22_prior,
)
from tests.helpers.karlo_folders import karlo, karlo_variations
from tests.helpers.public_folders import save_eclipse_prior, session_folder
from tests.helpers.stable_unclip_folders import stable_unclip_images, stable_unclip_small
from tests.helpers.stages import seeds

PAGE = Path(__file__).resolve().parents[2] / "docs" / "reference" / "public-models.md"
ROUNDING = 2e-5  # kernels round as tensors lie in memory, which differs between files
STEPS = {"num_inference_steps": 2}
BOTH = STEPS | {"prior_num_inference_steps": 2}


@functools.cache
def eclipse() -> Path:
    folder = session_folder() / "eclipse-for-the-table"
    save_eclipse_prior(folder)
    return folder


MODELS: dict[str, Callable[[], tuple]] = {  # the decoder's folder, and what `prior` and `clip` are
    "Karlo": lambda: (karlo(), {}),
    "Karlo, image variations": lambda: (karlo_variations(), {}),
    "Karlo, image variations with Karlo's prior": lambda: (karlo_variations(), {"prior": karlo()}),
    "Kandinsky 2.2": lambda: (kandinsky_22_decoder(), {"prior": kandinsky_22_prior()}),
    "Kandinsky 2.2 inpainting": lambda: (kandinsky_22_inpaint(), {"prior": kandinsky_22_prior()}),
    "Kandinsky 2.2 ControlNet": lambda: (kandinsky_22_controlnet(), {"prior": kandinsky_22_prior()}),
    "Kandinsky 2.1": lambda: (kandinsky_21_combined(), {}),
    "Kandinsky 2.1 inpainting": lambda: (kandinsky_21_inpaint(), {"prior": kandinsky_21_prior()}),
    "DALLE2-pytorch and LAION, converted": lambda: (dalle2(), {}),
    "Stable unCLIP small with Karlo's prior": lambda: (stable_unclip_small(), {"prior": karlo()}),
    "Stable unCLIP": lambda: (stable_unclip_images(), {}),
    "ECLIPSE prior, Kandinsky 2.2 decoder": lambda: (
        kandinsky_22_decoder(),
        {"prior": eclipse(), "clip": kandinsky_22_prior()},
    ),
}


def table() -> dict[str, dict[str, str]]:
    """Of the page: model -> column -> cell."""
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {row[0]: dict(zip(cells[0][1:], row[1:])) for row in cells[2:] if len(row) == len(cells[0])}


TABLE = table()
CELLS = [(model, column, cell) for model, columns in TABLE.items() for column, cell in columns.items()]


def test_the_table_is_of_all_these_models():
    assert list(TABLE) == list(MODELS)


@functools.cache
def loaded(model: str) -> Text2ImagePipeline:
    folder, others = MODELS[model]()
    pipeline = Text2ImagePipeline.from_pretrained(folder, **others)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def picture(pipeline: Text2ImagePipeline, seed: int = 0) -> Image.Image:
    side = pipeline.image_size
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), dtype=np.uint8))


def upper_half(pipeline: Text2ImagePipeline) -> Image.Image:
    mask = np.zeros((pipeline.image_size,) * 2, np.uint8)
    mask[: pipeline.image_size // 2] = 255
    return Image.fromarray(mask)


def control(pipeline: Text2ImagePipeline) -> dict[str, Any]:
    """The control image of a ControlNet; nothing for other models."""
    return {} if pipeline.decoder.control_factor is None else {"control_image": picture(pipeline, 2)}


def drawn(pipeline: Text2ImagePipeline, images: list[Image.Image], count: int) -> None:
    assert [one.size for one in images] == [(pipeline.image_size,) * 2] * count
    assert all(np.asarray(one).std() > 0 for one in images)


def draw_texts(model: str, cell: str) -> None:
    pipeline = loaded(model)
    drawn(pipeline, pipeline(["a red cat", "dog"], generator=seeds(1, 2), **BOTH, **control(pipeline)).images, 2)


def vary(model: str, cell: str) -> None:
    pipeline = loaded(model)
    way, options = ImageVariationPipeline.from_pipe(pipeline), STEPS | control(pipeline)
    drawn(pipeline, way(picture(pipeline), num_images_per_prompt=2, generator=seeds(1, 2), **options).images, 2)
    drawn(pipeline, way(picture(pipeline), eta=0.0, **options).images, 1)


def inpaint(model: str, cell: str) -> None:
    pipeline = loaded(model)
    given, half = picture(pipeline), pipeline.image_size // 2
    prompt = "a cat" if cell == "yes, with a prompt" else None
    options = {"prior_num_inference_steps": 2} if prompt else {}
    paint = InpaintPipeline.from_pipe(pipeline)
    painted = np.asarray(paint(given, upper_half(pipeline), prompt, **STEPS, **options, **control(pipeline)).images[0])
    assert (painted[half:] == np.asarray(given)[half:]).all()
    assert (painted[:half] != np.asarray(given)[:half]).any()
    if prompt is not None:
        with pytest.raises(InputError, match="no image encoder"):
            paint(given, upper_half(pipeline), **STEPS)


def interpolate(model: str, cell: str) -> None:
    pipeline = loaded(model)
    between = InterpolationPipeline.from_pipe(pipeline)
    if cell == "yes, between texts":
        drawn(pipeline, between(["a cat", "a dog"], frames=3, **BOTH).images, 3)
        with pytest.raises(InputError, match="no image encoder"):
            between([picture(pipeline), "a cat"], **BOTH)
        return
    more = control(pipeline)
    drawn(pipeline, between([picture(pipeline), picture(pipeline, 1)], frames=3, **STEPS, **more).images, 3)
    if pipeline.prior is not None:
        drawn(pipeline, between([picture(pipeline), "a cat"], frames=2, **BOTH, **more).images, 2)


WAYS = {"text to image": draw_texts, "variation": vary, "inpaint": inpaint, "interpolate": interpolate}


@pytest.mark.parametrize(("model", "column", "cell"), [one for one in CELLS if one[1] in WAYS])
def test_it_draws_or_says_what_is_missing(model: str, column: str, cell: str):
    if cell.startswith("yes"):
        WAYS[column](model, cell)
    else:
        with pytest.raises(InputError, match=cell):
            WAYS[column](model, cell)


@pytest.mark.parametrize(("model", "cell"), [(model, cell) for model, column, cell in CELLS if column == "loads"])
def test_it_loads_in_half_precision_and_from_what_it_saved(model: str, cell: str, tmp_path: Path):
    assert cell == "yes"
    folder, others = MODELS[model]()
    half = Text2ImagePipeline.from_pretrained(folder, dtype=torch.bfloat16, **others)
    parts = [part for part in half.components.values() if isinstance(part, torch.nn.Module)]
    assert {tensor.dtype for part in parts for tensor in part.parameters()} == {torch.bfloat16}
    z_i = torch.randn(1, half.clip.embed_dim, generator=seeds(3)[0])
    pipeline = loaded(model)
    options = STEPS | control(pipeline)
    assert half(image_embeds=z_i, output_type="pt", **options).images.isfinite().all()

    pipeline.save_pretrained(tmp_path / "own")
    again = Text2ImagePipeline.from_pretrained(tmp_path / "own")
    pictures = [
        one(image_embeds=z_i, generator=seeds(4), output_type="pt", **options).images for one in (pipeline, again)
    ]
    torch.testing.assert_close(*pictures, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("model", ["Karlo", "Kandinsky 2.2"])
def test_another_clip_of_the_same_size_in_what_was_saved_is_refused(model: str, tmp_path: Path):
    pipeline, own = loaded(model), tmp_path / "own"
    pipeline.save_pretrained(own)
    other = copy.deepcopy(pipeline.clip)
    next(iter(other.text_encoder.parameters())).mul_(1.5)
    shutil.rmtree(own / "clip")
    other.register_to_config(fingerprint=None)
    other.save_pretrained(own / "clip")
    with pytest.raises(InputError, match=f"was saved with the CLIP {pipeline.clip.identity}, its folder 'clip' has"):
        Text2ImagePipeline.from_pretrained(own)
    assert Text2ImagePipeline.from_pretrained(own, clip=other).clip is other


class OneAtATime:
    """Hooks like those of `enable_model_cpu_offload`, on the CPU: who is on the device, and the most that ever were."""

    def __init__(self, pipeline: DiffusionPipeline):
        self.there: list[str] = []
        self.most: list[str] = []
        previous, pipeline._all_hooks = None, []
        for name in pipeline.model_cpu_offload_seq.split("->"):
            if isinstance(model := getattr(pipeline, name, None), torch.nn.Module):
                previous = OffloadHook(name, model, self, previous)
                add_hook_to_module(model, previous)
                pipeline._all_hooks.append(previous)


class OffloadHook(ModelHook):
    def __init__(self, name: str, model: torch.nn.Module, held: OneAtATime, previous: "OffloadHook | None"):
        self.name, self.model, self.held, self.previous = name, model, held, previous

    def pre_forward(self, module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        if self.previous is not None:
            self.previous.offload()
        there = self.held.there
        there += [self.name] if self.name not in there else []
        self.held.most = list(there) if len(there) > len(self.held.most) else self.held.most
        return args, kwargs

    def offload(self) -> None:
        self.held.there = [name for name in self.held.there if name != self.name]


OFFLOADED: dict[str, tuple[type, Callable[[Any], Any]]] = {
    "text": (Text2ImagePipeline, lambda p: p("a cat", decoder_negative_prompt="a dog", **BOTH)),
    "variation": (ImageVariationPipeline, lambda p: p(picture(p), "a cat", **STEPS)),
    "its own noise": (ImageVariationPipeline, lambda p: p(picture(p), eta=0.5, **STEPS)),
    "inpainting": (InpaintPipeline, lambda p: p(picture(p), upper_half(p), "a cat", **BOTH)),
    "outpainting": (OutpaintPipeline, lambda p: p(picture(p), left=p.image_size, **STEPS)),
    "redrawing": (ImageToImagePipeline, lambda p: p(picture(p), **STEPS)),
    "text diff": (TextDiffPipeline, lambda p: p(picture(p), "a cat", "a dog", **STEPS)),
    "interpolation": (InterpolationPipeline, lambda p: p([picture(p), "a cat"], frames=2, **BOTH)),
}


@pytest.mark.parametrize("way", OFFLOADED)
@pytest.mark.parametrize("model", ["Kandinsky 2.1", "Stable unCLIP small with Karlo's prior"])
def test_one_component_at_a_time_is_on_the_device(model: str, way: str):
    kind, draw = OFFLOADED[way]
    pipeline = kind.from_pipe(loaded(model))
    pipeline.set_progress_bar_config(disable=True)
    held = OneAtATime(pipeline)
    try:
        draw(pipeline)
    finally:
        for hook in pipeline._all_hooks:
            remove_hook_from_module(hook.model)
        pipeline._all_hooks = []
    assert len(held.most) == 1, held.most


@pytest.mark.parametrize(("model", "cell"), [(model, cell) for model, column, cell in CELLS if column == "export"])
def test_it_is_written_in_the_public_layout_again_or_says_why_not(model: str, cell: str, tmp_path: Path):
    folder, others = MODELS[model]()
    pipeline = loaded(model)
    pipeline.save_pretrained(tmp_path / "own")
    if cell == "no":
        with pytest.raises(InputError, match="which computes differently; no file of that layout"):
            convert_folder(str(tmp_path / "own"), tmp_path / "theirs", "kandinsky-2-2-combined")
        assert not (tmp_path / "theirs").exists()
        return
    convert_folder(str(tmp_path / "own"), tmp_path / "theirs", cell)
    # There is no combined layout of a ControlNet: its prior and CLIP are in another folder
    again = Text2ImagePipeline.from_pretrained(tmp_path / "theirs", **others if "ControlNet" in model else {})
    z_i, options = torch.randn(1, pipeline.clip.embed_dim, generator=seeds(3)[0]), STEPS | control(pipeline)
    pictures = [
        one(image_embeds=z_i, generator=seeds(4), output_type="pt", **options).images for one in (pipeline, again)
    ]
    torch.testing.assert_close(*pictures, atol=ROUNDING, rtol=0)


STAGES = ("prior", "decoder")
NOT_TRAINED = {  # of cells without the stage, the reason
    ("Karlo", "prior"): "it holds .*, and no prior",  # the repository of image variations
    ("Kandinsky 2.2 ControlNet", "decoder"): "a ControlNet's U-Net, which is not trained here",
    ("DALLE2-pytorch and LAION", "prior"): "is a DALLE2Prior: converted models of DALLE2-pytorch are not trained",
    ("DALLE2-pytorch and LAION", "decoder"): "is a DALLE2Decoder: converted models of DALLE2-pytorch are not trained",
    ("Stable unCLIP", "prior"): "it holds .*, and no prior",
}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize(("model", "cell"), [(model, cell) for model, column, cell in CELLS if column == "fine-tune"])
def test_it_is_trained_further_or_says_why_not(model: str, cell: str, stage: str, shapes: Path, tmp_path: Path):
    folder, others = MODELS[model]()
    prior = others.get("prior", folder)
    with_both_towers = {"Karlo": karlo_variations(), "Stable": karlo_variations(), "ECLIPSE": kandinsky_22_prior()}
    clip = with_both_towers.get(model.split()[0].rstrip(","), prior)
    if model == "Stable unCLIP":
        clip = folder
    named = {"clip": clip, "init": prior if stage == "prior" else folder}
    if stage == "decoder":
        named |= {"autoencoder": folder, "reads_captions": "2.2" not in model, "reads_masks": "inpainting" in model}
        named |= {"text_encoder": folder} if "2.1" in model or "Stable" in model else {}
    elif model.startswith("ECLIPSE"):
        named["architecture"] = "eclipse"
    if model.startswith("DALLE2"):  # in this project's own layout
        named = {name: folder / part for name, part in {"clip": "clip", "init": stage}.items()}
        named |= {"autoencoder": folder / "autoencoder"} if stage == "decoder" else {}
    train = {"output": str(tmp_path / "run"), "steps": 1, "batch_size": 4, "learning_rate": 1e-3, "warmup_steps": 0}
    train |= {"trackers": [], "sample_every": 0, "validate_every": 0, "mixed_precision": "no", "ema_decay": 0.0}
    settings = {"data": {"path": str(shapes), "image_size": 16, "num_workers": 0}, "train": train}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    script = import_module(f"t2i.training.train_{stage}")

    def run() -> None:
        arguments = [str(tmp_path / "run.yaml"), *(f"{key}={value}" for key, value in named.items())]
        script.main(load_config(script.Config, stage, arguments))

    if stage in cell.split(", "):
        run()
        assert (tmp_path / "run" / "model" / "config.json").is_file()
    else:
        with pytest.raises(InputError, match=NOT_TRAINED[model.split(",")[0], stage]):
            run()
        assert not (tmp_path / "run").exists() or not any((tmp_path / "run").glob("step-*"))


# What no table has room for: all of it on one model with every part

WHOLE = ("Karlo, image variations with Karlo's prior", "Kandinsky 2.1", "Stable unCLIP small with Karlo's prior")


@pytest.mark.parametrize("model", WHOLE)
def test_every_sampler_draws_in_both_stages(model: str):
    pipeline = loaded(model)
    for name in SAMPLERS:
        images = pipeline("a cat", sampler=name, prior_sampler=name, generator=seeds(1), **BOTH).images
        drawn(pipeline, images, 1)


@pytest.mark.parametrize("model", WHOLE)
def test_guidance_negatives_candidates_and_steering_change_the_picture(model: str):
    pipeline = loaded(model)
    guidance = Guidance(3.0, interval=(0.2, 0.8), rescale=0.5, threshold=0.9, parallel=0.5)
    plain = pipeline("a cat", generator=seeds(1), output_type="np", **BOTH).images
    for options in (
        {"guidance_scale": guidance},
        {"prior_guidance_scale": Guidance(2.0, rescale=0.3)},
        {"negative_prompt": "a dog"},
        {"decoder_negative_prompt": "a dog"},
        {"steering": Steering(text="a dog", scale=100.0)},
    ):
        other = pipeline("a cat", generator=seeds(1), output_type="np", **BOTH, **options).images
        assert np.isfinite(other).all() and np.abs(other - plain).max() > 1e-4, options


@pytest.mark.parametrize("model", WHOLE)
def test_a_picture_is_edited_redrawn_and_surrounded(model: str):
    pipeline = loaded(model)
    given, side = picture(pipeline), pipeline.image_size
    drawn(pipeline, TextDiffPipeline.from_pipe(pipeline)(given, "a cat", "a red dog", **STEPS).images, 1)
    redraw = ImageToImagePipeline.from_pipe(pipeline)
    drawn(pipeline, redraw(given, "a dog", strength=0.5, num_inference_steps=4, prior_num_inference_steps=2).images, 1)
    wider = OutpaintPipeline.from_pipe(pipeline)(given, left=side, **STEPS).images[0]
    assert wider.size == (2 * side, side)
    assert (np.asarray(wider)[:, side:] == np.asarray(given)).all()


@pytest.mark.parametrize("model", WHOLE)
def test_every_stage_is_seen_while_it_draws(model: str):
    pipeline, seen = loaded(model), {}
    pipeline("a cat", on_preview=lambda one: seen.setdefault(one.stage, one.images()[0].size), **BOTH)
    side = pipeline.image_size
    stages = ["prior", "decoder", *(["super_resolution"] if pipeline.is_cascade else [])]
    assert seen == {stage: (side, side) for stage in stages}


@pytest.mark.parametrize("model", WHOLE)
def test_a_picture_does_not_depend_on_its_batch(model: str):
    pipeline = loaded(model)
    prompts = ["a cat", "a red dog on a blue picture", "cat"]
    several = pipeline(prompts, generator=seeds(1, 2, 3), output_type="pt", **BOTH).images
    alone = pipeline(prompts[1], generator=seeds(2), output_type="pt", **BOTH).images
    torch.testing.assert_close(several[1:2], alone, atol=1e-4, rtol=0)
