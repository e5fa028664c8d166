"""Options that drawing commands share, and what they mean to a pipeline."""

from pathlib import Path
from typing import Annotated, Any

from typer import Option

Out = Annotated[Path, Option(help="Folder for the pictures, or a .png for one.")]
Model = Annotated[str, Option(help="A model folder, or a repository on the hub.")]
Count = Annotated[int, Option("--count", "-n", help="Pictures for each input.")]
Seed = Annotated[int | None, Option(help="Of the first picture; the next has the next. Random if left out.")]
Steps = Annotated[int | None, Option(help="Steps of the decoder.")]
Scale = Annotated[float | None, Option(help="Guidance of the decoder; 1 is off.")]
Settings = Annotated[
    list[str] | None,
    Option(help="KEY=VALUE, again and again: interval=LOW:HIGH, rescale, threshold, parallel, norm, momentum."),
]
PriorSteps = Annotated[int | None, Option(help="Steps of the prior.")]
PriorScale = Annotated[float | None, Option(help="Guidance of the prior; 1 is off.")]
Device = Annotated[str, Option(help="auto, cpu, cuda, mps.")]


def given(**settings: Any) -> dict[str, Any]:
    """Those that were given."""
    return {name: value for name, value in settings.items() if value is not None}


def guidance(
    scale: float | None,
    settings: list[str] | None,
    prior_scale: float | None = None,
    prior_settings: list[str] | None = None,
) -> dict[str, Any]:
    """`guidance_scale` and `prior_guidance_scale` of a pipeline, as far as they were given."""
    from pipelines.options import DecoderOptions, PriorOptions
    from t2i.guidance import Guidance, parse_guidance

    found: dict[str, Any] = {}
    for name, default, number, texts in (
        ("guidance_scale", DecoderOptions().guidance_scale, scale, settings),
        ("prior_guidance_scale", PriorOptions().prior_guidance_scale, prior_scale, prior_settings),
    ):
        number = Guidance.of(default).scale if number is None and texts else number
        if number is not None:
            found[name] = parse_guidance(name, number, texts) if texts else number
    return found
