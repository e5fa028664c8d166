"""The command `t2i show`, and what `t2i generate --like` takes from an image."""

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t2i.bulk import BulkJob
from t2i.commands import SHIPPED_MODEL, flags
from t2i.commands.flags import argument, option
from t2i.errors import InputError
from t2i.files.image_records import read_stored_settings
from t2i.terminal import print_line

if TYPE_CHECKING:
    from t2i.pipelines.jobs.records import Record

app = typer.Typer()

# What --like takes over. All else that a record may have is named below, or refused.
LIKE_SETTINGS = (
    *("num_inference_steps", "guidance_scale", "sampler", "eta", "height", "width", "noise_level", "upsample"),
    *("prior_num_inference_steps", "prior_guidance_scale", "prior_candidates", "prior_sampler", "prior_temperature"),
    *("negative_prompt", "decoder_negative_prompt"),
)
# A record has the names of these, not their places, and whoever made the image wrote them
NAMED_FILES = ("model", "prior", "clip", "upsampler", "control_image")
OTHER_KEYS = ("version", "size", "prompt", "seed", "weights", "dtype", "steering", *NAMED_FILES)
# Keys by which the records of other commands are known: the first counts, because most have an `image` too
COMMAND_KEYS = {
    "anchors": "interpolate",
    "picture": "upsample",
    "target": "edit",
    "left": "outpaint",
    "mask_image": "inpaint",
    "strength": "image-to-image",
    "image": "variations",
}


@app.command()
def show(
    images: Annotated[list[Path], argument("PNG files.")],
    as_json: Annotated[bool, option("Print a JSON object; of several images, by name.", None, "--json")] = False,
) -> None:
    """Print the settings that images were drawn with, from their PNG files, one a line."""
    job, found = BulkJob(len(images)), {}
    for path in images:
        with job.skip_bad_input(path, OSError):
            found[str(path)], _ = read_stored_settings(path)
    job.check_any_left()
    if as_json:
        print(json.dumps(found if job.total > 1 else next(iter(found.values())), indent=1))
    else:
        for number, (file, settings) in enumerate(found.items()):
            if number:
                print_line("")
            named = {"file": file, **settings} if job.total > 1 else settings
            for name, value in named.items():
                print_line(f"{name}: {value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)}")
    job.finish()


@dataclass(frozen=True)
class Likeness:
    """Settings that an image of `t2i generate` was drawn with; none without an image.

    A record is as little to be trusted as any file of a stranger: its values are checked as options are, and files that
    it names must be given as options, but for the model that comes with this package.
    """

    path: Path | None = None
    record: "Record" = field(default_factory=dict)

    @classmethod
    def read_file(cls, path: Path) -> "Likeness":
        """Read the record of a PNG file. Raises InputError for an image that `t2i generate` did not draw."""
        record, is_own = read_stored_settings(path)
        if not is_own:
            raise InputError(f"{str(path)!r} has no record of `t2i generate`; `t2i show` prints what it has")
        if command := next((command for key, command in COMMAND_KEYS.items() if key in record), None):
            given = record.get("image", record.get("picture", record.get("anchors")))
            raise InputError(
                f"{str(path)!r} was drawn by `t2i {command}` from {given!r:.80}; --like draws from texts alone"
            )
        if unknown := sorted(record.keys() - {*LIKE_SETTINGS, *OTHER_KEYS}):
            raise InputError(f"{str(path)!r} has the setting {unknown[0]!r:.80}, which this version cannot draw with")
        # By `type`, because True is an int too
        if not isinstance(record.get("prompt"), str) or type(record.get("seed")) is not int:
            raise InputError(f"{str(path)!r} has no prompt or no seed in its record")
        return cls(path, record)

    @property
    def prompts(self) -> list[str]:
        """The image's prompt; none for an image that steering alone decided."""
        return [self.record["prompt"]] if self.record.get("prompt") else []

    def check_named_files(self, **given: Any) -> None:
        """Raise InputError for a file that the record names and no option gives.

        A model of the shipped one's name needs no option; whether it is that one, its weights tell when it is loaded.
        """
        for name in NAMED_FILES:
            recorded = self.record.get(name)
            is_shipped = name == "model" and recorded == SHIPPED_MODEL.name
            if recorded is not None and given.get(name) is None and not is_shipped:
                flag = f"--{name.replace('_', '-')}"
                raise InputError(f"{str(self.path)!r} was drawn with the {name} {recorded!r:.80}; give it with {flag}")

    def fill_steering(self, steering: flags.SteeringFlags) -> flags.SteeringFlags:
        """Return the options of steering, or the record's if none has a goal. Raises InputError for one that lacks."""
        recorded = self.record.get("steering")
        goals = (steering.steer_class, steering.steer_text, steering.steer_image)
        if recorded is None or any(goal is not None for goal in goals):
            return steering
        if not isinstance(recorded, dict) or "scale" not in recorded:
            raise InputError(
                f"{str(self.path)!r} has the steering {recorded!r:.80}, which this version cannot draw with"
            )
        if "picture" in recorded:
            raise InputError(f"{str(self.path)!r} was steered towards an image; give it with --steer-image")
        if "classifier" in recorded and steering.classifier is None:
            raise InputError(f"{str(self.path)!r} was steered by a classifier; give its folder with --classifier")
        scale = recorded["scale"] if steering.steer_scale is None else steering.steer_scale
        return replace(steering, steer_class=recorded.get("class"), steer_text=recorded.get("text"), steer_scale=scale)

    def merge_settings(self, given: dict[str, Any]) -> dict[str, Any]:
        """Return the record's settings with those that are given in their place, in the record's order."""
        merged = {name: value for name, value in self.record.items() if name in LIKE_SETTINGS}
        for name in ("guidance_scale", "prior_guidance_scale"):
            if name in merged or name in given:
                given = given | {name: merge_guidance(name, merged.get(name), given.get(name))}
        merged |= given
        return {name: merged[name] for name in dict.fromkeys([*self.record, *merged]) if name in merged}

    def list_dtypes(self) -> list[str]:
        """Return the dtype of the record as options give it."""
        recorded = self.record.get("dtype")
        if isinstance(recorded, dict):
            return [str(name) if part == "default" else f"{part}={name}" for part, name in recorded.items()]
        return [] if recorded is None else [str(recorded)]


def merge_guidance(name: str, recorded: Any, given: Any) -> Any:
    """Return the guidance of a stage: a number or, with further settings, a dict. What is given replaces its part."""
    from t2i.diffusion.guidance import Guidance

    if isinstance(recorded, dict):
        known = vars(Guidance(1.0)).keys()
        if unknown := sorted(recorded.keys() - known):
            raise InputError(f"{name} has no setting {unknown[0]!r:.80}; it has {', '.join(known)}")
        # JSON has lists where Guidance has tuples
        recorded = {key: tuple(value) if isinstance(value, list) else value for key, value in recorded.items()}
    if given is None:
        return recorded
    if isinstance(given, dict):
        # Settings that come without a scale keep the recorded one
        scale = recorded.get("scale") if isinstance(recorded, dict) else recorded
        return given if "scale" in given or scale is None else {"scale": scale, **given}
    return {**recorded, "scale": given} if isinstance(recorded, dict) else given
