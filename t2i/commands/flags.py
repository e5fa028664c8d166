"""Options that several commands share, as dataclasses, and the decorator that lets a command take them.

Nothing here imports torch, so that `t2i --help` is quick.
"""

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, TypeVar, get_args, get_type_hints

from typer import Argument, Option

from t2i.commands import SHIPPED_MODEL
from t2i.commands.imports import speed_up_imports
from t2i.errors import InputError
from t2i.terminal import print_line

if TYPE_CHECKING:
    from t2i.pipelines.jobs.planning import ModelSource, Output

Result = TypeVar("Result")

SAMPLERS = ("ddpm", "ddim", "dpmsolver++", "sde-dpmsolver++", "unipc", "ode", "sde")
SAMPLER_NAMES = f"{', '.join(SAMPLERS[:-1])} or {SAMPLERS[-1]}"
GUIDANCE_KEYS = "interval=LOW:HIGH, rescale, threshold, parallel, norm or momentum"
# Names of the pipelines' arguments, for options with shorter names
SETTING_NAMES = {
    "steps": "num_inference_steps",
    "prior_steps": "prior_num_inference_steps",
    "candidates": "prior_candidates",
}


def option(
    help: str,
    default: str | None = None,
    *names: str,
    metavar: str | None = None,
    choices: Sequence[str] | None = None,
) -> Any:
    """Return an option.

    default: describes its default in the help, where that is None or a path. metavar: stands for its value there; None
    names the type. choices: values that a shell completes.
    """
    shown: str | bool = default or True
    # typer puts parentheses around a description, but a value that can be given has none
    if default is not None and (default == "auto" or default.replace(".", "", 1).isdigit()):
        help, shown = f"{help} [default: {default}]", False
    complete = build_completion(choices)
    return Option(*names, help=help, show_default=shown, metavar=metavar, autocompletion=complete)


def argument(help: str, default: str | bool = False, choices: Sequence[str] | None = None) -> Any:
    return Argument(help=help, show_default=default, autocompletion=build_completion(choices))


def build_completion(choices: Sequence[str] | None) -> Callable[[str], list[str]] | None:
    """Return what a shell asks for the values that begin with what was typed; without choices, it completes files."""

    def complete(incomplete: str) -> list[str]:
        return [choice for choice in choices or () if choice.startswith(incomplete)]

    return None if choices is None else complete


ImageFile = Annotated[Path, argument("Image file.")]
ImageFiles = Annotated[list[Path], argument("Image files.")]
Out = Annotated[Path, option("Folder to write to, or a .png file for a single image.")]
Model = Annotated[str, option("Model folder, or repository on the hub.", "models/emoji")]
Prior = Annotated[str | None, option("Folder or repository of a public model's prior, if the model lacks it.")]
Clip = Annotated[str | None, option("Folder or repository of a public model's CLIP, if the model lacks it.")]
Device = Annotated[str, option("Device to run on: auto, cpu, cuda or mps.", choices=("auto", "cpu", "cuda", "mps"))]
Seed = Annotated[int | None, option("Seed of the first image. Each further image adds 1.", "random")]
Steps = Annotated[int | None, option("Denoising steps of the decoder.", "the model's")]
GuidanceScale = Annotated[float | None, option("Guidance scale of the decoder. 1 turns guidance off.", "the model's")]
PriorSteps = Annotated[int | None, option("Denoising steps of the prior.", "the model's")]
PriorGuidanceScale = Annotated[float | None, option("Guidance scale of the prior. 1 turns it off.", "the model's")]
Candidates = Annotated[
    int | None, option("Image embeddings to sample per image; the nearest to the prompt is used.", "2")
]
Sampler = Annotated[str | None, option(f"Sampler of the decoder: {SAMPLER_NAMES}.", "the model's", choices=SAMPLERS)]
Eta = Annotated[float | None, option("Noise that the sampler ddim adds in each step, 0 to 1.", "0")]
NoiseLevel = Annotated[int | None, option("Noise that Stable unCLIP adds to the image embedding, 0 to 999.")]
NegativePrompt = Annotated[str | None, option("What not to show: a text that the prior is guided away from.")]


def print_paths(command: Callable[..., Iterator[Path]]) -> Callable[..., None]:
    """Let a command return the paths of images, each of which is printed as soon as it is written."""
    run_command = share_options(command)

    @wraps(run_command)
    def run_and_print(**values: Any) -> None:
        with speed_up_imports(needs_compiler=values.get("compile", False)):
            paths = run_command(**values)
        for path in paths:
            print_line(path)

    return run_and_print


def share_options(command: Callable[..., Result]) -> Callable[..., Result]:
    """Let a command take dataclasses of options: typer reads their fields as if they were parameters of the command.

    The help shows the fields of a dataclass together, under the title `panel` of its class if there is one.
    """
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    # Replace each dataclass among the command's parameters by its fields
    parameters = []
    for parameter in signature(command).parameters.values():
        if parameter.name in groups:
            parameters += list_group_parameters(groups[parameter.name])
        else:
            parameters.append(parameter.replace(annotation=hints[parameter.name], kind=Parameter.KEYWORD_ONLY))

    @wraps(command)
    def run_command(**values: Any) -> Result:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        return command(**values)

    # typer calls inspect.signature, which returns this attribute if there is one.
    run_command.__signature__ = signature(command).replace(parameters=parameters)  # type: ignore[attr-defined]
    run_command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run_command


def list_group_parameters(group: Any) -> list[Parameter]:
    """Return a keyword parameter for each field of a dataclass of options."""
    hints = get_type_hints(group, include_extras=True)
    parameters = []
    for field in fields(group):
        value_type, info = get_args(hints[field.name])
        # A copy, because commands without panels share the annotation
        info = copy(info)
        info.rich_help_panel = getattr(group, "panel", None)
        annotation: Any = Annotated[value_type, info]  # type: ignore[valid-type]
        default = Parameter.empty if field.default is MISSING else field.default
        parameters.append(Parameter(field.name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation))
    return parameters


class Settings:
    """Options that become settings of a pipeline."""

    def build_settings(self) -> dict[str, Any]:
        """Return those that are set, under the pipelines' names. Raises InputError for a bad guidance setting."""
        # A scale and further guidance settings of one stage become a single value
        settings = drop_missing(**vars(self))
        for name, texts in (("guidance_scale", "guidance"), ("prior_guidance_scale", "prior_guidance")):
            if values := settings.pop(texts, None):
                settings[name] = parse_guidance_settings(name, settings.get(name), values)
        return {SETTING_NAMES.get(name, name): value for name, value in settings.items()}


@dataclass
class OutputFlags:
    panel: ClassVar[str] = "Output"
    out: Out = Path("out")
    count: Annotated[int, option("Images to draw for each input.", None, "--count", "-n")] = 1
    seed: Seed = None

    def build(self) -> "Output":
        from t2i.pipelines.jobs.planning import Output

        return Output(self.out, self.count, self.seed)


@dataclass
class ModelFlags:
    panel: ClassVar[str] = "Model"
    model: Annotated[str | None, option("Model folder, or repository on the hub.", "models/emoji")] = None
    prior: Prior = None
    clip: Clip = None
    variant: Annotated[str | None, option("Variant of a public model's files, such as fp16.", "plain files")] = None
    device: Device = "auto"
    strict: Annotated[
        bool, option("Refuse prompts with words that the model has in no caption and no keyword.", None, "--strict")
    ] = False

    def build(self, **more: Any) -> "ModelSource":
        from t2i.pipelines.jobs.planning import ModelSource

        return ModelSource(**{**vars(self), "model": self.model or str(SHIPPED_MODEL)}, **more)


@dataclass
class DecoderFlags(Settings):
    panel: ClassVar[str] = "Decoder"
    steps: Steps = None
    guidance_scale: GuidanceScale = None
    guidance: Annotated[
        list[str] | None,
        option(f"Another guidance setting of the decoder: {GUIDANCE_KEYS}. Repeatable.", metavar="KEY=VALUE"),
    ] = None
    control_image: Annotated[
        Path | None, option("Image file that a ControlNet decoder draws by, such as a depth map.")
    ] = None

    def __post_init__(self) -> None:
        if self.control_image is not None:
            from t2i.data.pictures import open_image

            open_image(self.control_image)  # complains before the model loads


@dataclass
class SizeFlags(Settings):
    panel: ClassVar[str] = "Size"
    height: Annotated[int | None, option("Image height in pixels.", "the model's")] = None
    width: Annotated[int | None, option("Image width in pixels.", "the model's")] = None


@dataclass
class PriorFlags(Settings):
    panel: ClassVar[str] = "Prior"
    prior_steps: PriorSteps = None
    prior_guidance_scale: PriorGuidanceScale = None
    prior_guidance: Annotated[
        list[str] | None, option("Like --guidance, for the prior. Repeatable.", metavar="KEY=VALUE")
    ] = None
    candidates: Candidates = None


@dataclass
class SamplerFlags(Settings):
    panel: ClassVar[str] = "Samplers"
    sampler: Sampler = None
    prior_sampler: Annotated[str | None, option("Like --sampler, for the prior.", "the model's", choices=SAMPLERS)] = (
        None
    )
    eta: Eta = None
    prior_temperature: Annotated[
        float | None, option("Temperature of an autoregressive prior. 0 takes the likeliest code.", "the model's")
    ] = None


@dataclass
class PromptFlags(Settings):
    panel: ClassVar[str] = "Prompt"
    prompt: Annotated[str | None, option("What the whole image should show.", "what it shows now")] = None
    negative_prompt: NegativePrompt = None

    def __post_init__(self) -> None:
        from t2i.checks import check_texts

        check_texts("prompt", [] if self.prompt is None else [self.prompt], empty=False)
        check_texts("negative_prompt", [] if self.negative_prompt is None else [self.negative_prompt])


@dataclass
class UpsamplerFlags:
    panel: ClassVar[str] = "Upsampling"
    upsample: Annotated[int | None, option("Number of passes through the upsampler.", "0")] = None
    upsampler: Annotated[
        str | None, option("Folder that `t2i train upsampler` wrote, or a model with an upsampler.", "the model's")
    ] = None

    def __post_init__(self) -> None:
        check_needed("--upsampler", self.upsampler, "--upsample", bool(self.upsample))


@dataclass
class SteeringFlags:
    panel: ClassVar[str] = "Steering"
    steer_class: Annotated[str | None, option("Steer towards this class of the classifier.")] = None
    steer_text: Annotated[str | None, option("Steer towards this text, as CLIP embeds it.")] = None
    steer_image: Annotated[
        Path | None,
        option("Steer towards this image file, as CLIP embeds it.", None, "--steer-image", "--steer-picture"),
    ] = None
    steer_scale: Annotated[float | None, option("Weight of the steering gradient. 0 turns it off.", "1")] = None
    classifier: Annotated[Path | None, option("Folder that `t2i train classifier` wrote; classes need one.")] = None

    def build_settings(self) -> dict[str, Any]:
        """Return `steering` of a pipeline, or nothing if no option is set. Raises InputError."""
        # Check the combination
        goals = {
            "--steer-class": self.steer_class,
            "--steer-text": self.steer_text,
            "--steer-image": self.steer_image,
        }
        chosen = list(drop_missing(**goals))
        if len(chosen) > 1:
            raise InputError(f"{' and '.join(chosen)} exclude each other; give one of them")
        if not chosen:
            for name in drop_missing(**{"--classifier": self.classifier, "--steer-scale": self.steer_scale}):
                raise InputError(f"{name} needs one of {', '.join(goals)}, got none of them")
            return {}
        if self.steer_class is not None and self.classifier is None:
            name = f"--steer-class {self.steer_class!r}"
            raise InputError(f"{name} needs --classifier, a folder that `t2i train classifier` wrote")
        from t2i.checks import check_range
        from t2i.sampling.steering import MAX_STEERING_SCALE, Steering, load_classifier, read_image_tensor

        # Load what it steers by
        scale = 1.0 if self.steer_scale is None else self.steer_scale
        check_range("--steer-scale", scale, 0, MAX_STEERING_SCALE)
        image = None if self.steer_image is None else read_image_tensor(self.steer_image)
        classifier = None if self.classifier is None else load_classifier(self.classifier)
        if self.steer_class is not None and classifier is not None:
            classifier.find_class_index(self.steer_class)
        return {"steering": Steering(scale, classifier, self.steer_class, self.steer_text, image)}


def check_needed(name: str, value: Any, needed: str, is_given: bool) -> None:
    """Raise InputError for an option that does nothing without another one."""
    if value not in (None, False) and not is_given:
        raise InputError(f"{name} needs {needed}, and does nothing without it")


def drop_missing(**settings: Any) -> dict[str, Any]:
    """Return the settings that are not None."""
    return {name: value for name, value in settings.items() if value is not None}


def parse_guidance_settings(name: str, scale: float | None, texts: list[str]) -> dict[str, Any]:
    """Return the fields of `Guidance` from KEY=VALUE texts, without the scale if it is left to the model."""
    from t2i.diffusion.guidance import parse_guidance

    guidance = asdict(parse_guidance(name, 1.0 if scale is None else scale, texts))
    # `build_options` takes a scale that is left out from the model's default
    if scale is None:
        del guidance["scale"]
    return guidance
