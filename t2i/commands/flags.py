"""Options that drawing commands share, and what they mean to a pipeline."""

from pathlib import Path
from typing import Annotated, Any

from typer import Option

Out = Annotated[Path, Option(help="Folder for the pictures, or a .png for one.")]
Model = Annotated[str, Option(help="A model folder, or a repository on the hub.")]
Prior = Annotated[
    str | None, Option(help="The prior of a public model, if it is elsewhere: a folder, or a repository on the hub.")
]
Clip = Annotated[
    str | None, Option(help="The CLIP of a public model, if it is in neither: a folder, or a repository on the hub.")
]
Upsampler = Annotated[
    str | None, Option(help="A folder that `t2i train upsampler` wrote, or a model that has one; else the model's own.")
]
Count = Annotated[int, Option("--count", "-n", help="Pictures for each input.")]
Seed = Annotated[int | None, Option(help="Of the first picture; the next has the next. Random if left out.")]
Steps = Annotated[int | None, Option(help="Steps of the decoder.")]
GuidanceScale = Annotated[float | None, Option(help="Guidance of the decoder; 1 is off.")]
GuidanceSettings = Annotated[
    list[str] | None,
    Option(help="KEY=VALUE, again and again: interval=LOW:HIGH, rescale, threshold, parallel, norm, momentum."),
]
Height = Annotated[int | None, Option(help="Of the pictures, in pixels; as in training if left out.")]
Width = Annotated[int | None, Option(help="The same.")]
PriorSteps = Annotated[int | None, Option(help="Steps of the prior.")]
PriorGuidanceScale = Annotated[float | None, Option(help="Guidance of the prior; 1 is off.")]
SteerClass = Annotated[str | None, Option(help="A class of the classifier to steer towards.")]
SteerText = Annotated[str | None, Option(help="A text to steer towards, as CLIP sees it.")]
SteerPicture = Annotated[Path | None, Option(help="A picture to steer towards, as CLIP sees it.")]
SteerScale = Annotated[float | None, Option(help="How much the gradient counts; 1 if left out, 0 is off.")]
Classifier = Annotated[Path | None, Option(help="What `t2i train classifier` wrote; a text or a picture needs none.")]
Candidates = Annotated[int | None, Option(help="Of the prior, for each picture; the nearest to the prompt is drawn.")]
SAMPLER_NAMES = "ddpm, ddim, dpmsolver++, sde-dpmsolver++, unipc, ode or sde; the model's own if left out."
Sampler = Annotated[str | None, Option(help=f"Of the decoder: {SAMPLER_NAMES}")]
PriorSampler = Annotated[str | None, Option(help=f"Of the prior: {SAMPLER_NAMES}")]
NoiseLevel = Annotated[
    int | None, Option(help="Of Stable unCLIP: how far z_i is noised, 0 to 999; more is more variety.")
]
Eta = Annotated[float | None, Option(help="Noise of the sampler ddim, 0 to 1.")]
PriorTemperature = Annotated[
    float | None, Option(help="Of an autoregressive prior: 0 takes the likeliest; the model's own if left out.")
]
Upsample = Annotated[int | None, Option(help="Times that pictures pass through the upsampler.")]
Dtype = Annotated[
    list[str] | None,
    Option(help="Of the weights: fp32, bf16 or fp16; or PART=DTYPE, again and again, such as decoder=bf16."),
]
Compile = Annotated[
    bool, Option("--compile", help="Compile the decoder first: for many pictures of one size, in batches of one size.")
]
Device = Annotated[str, Option(help="auto, cpu, cuda, mps.")]


def select_given_settings(**settings: Any) -> dict[str, Any]:
    """Those that were given."""
    return {name: value for name, value in settings.items() if value is not None}


def build_guidance_settings(
    scale: float | None,
    settings: list[str] | None,
    prior_scale: float | None = None,
    prior_settings: list[str] | None = None,
) -> dict[str, Any]:
    """`guidance_scale` and `prior_guidance_scale` of a pipeline, as far as they were given."""
    from t2i.diffusion.guidance import Guidance, parse_guidance
    from t2i.pipelines.options import DecoderOptions
    from t2i.sampling.embeddings import default_guidance_scale

    found: dict[str, Any] = {}
    for name, default, number, texts in (
        ("guidance_scale", DecoderOptions.guidance_scale, scale, settings),
        ("prior_guidance_scale", default_guidance_scale(None), prior_scale, prior_settings),
    ):
        number = Guidance.from_value(default).scale if number is None and texts else number
        if number is not None:
            found[name] = parse_guidance(name, number, texts) if texts else number
    return found


def build_steering_settings(
    class_name: str | None, text: str | None, picture: Path | None, classifier: Path | None, scale: float | None
) -> dict[str, Any]:
    """`steering` of a pipeline, if there is anything to steer towards. Raises InputError for several at once."""
    from t2i.errors import InputError

    goals = {"--steer-class": class_name, "--steer-text": text, "--steer-picture": picture}
    asked = [name for name, value in goals.items() if value is not None]
    if len(asked) > 1:
        raise InputError(f"{' and '.join(asked)} are given; a picture is steered towards one of them")
    if not asked:
        useless = {"--classifier": classifier, "--steer-scale": scale}
        if name := next((name for name, value in useless.items() if value is not None), None):
            raise InputError(f"{name} is given without {', '.join(goals)}; give one of them")
        return {}
    if class_name is not None and classifier is None:
        raise InputError(f"--steer-class {class_name!r} needs a --classifier, which `t2i train classifier` makes")
    from t2i.checks import check_range
    from t2i.sampling.steering import MAX_STEERING_SCALE, Steering, load_classifier, read_image_tensor

    check_range("--steer-scale", 1.0 if scale is None else scale, 0, MAX_STEERING_SCALE)
    seen = None if picture is None else read_image_tensor(picture)
    judge = None if classifier is None else load_classifier(classifier)
    if class_name is not None and judge is not None:
        judge.find_class_index(class_name)
    return {"steering": Steering(1.0 if scale is None else scale, judge, class_name, text, seen)}
