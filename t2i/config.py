"""Configurations: dataclasses that are read from YAML files and overrides on the command line, and checked."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from t2i.checks import check_choice, check_folder_name, check_integer, check_multiple_of, check_range
from t2i.errors import InputError
from t2i.shipped import find_shipped_folder

CONFIG_FOLDER = find_shipped_folder("configs")
TRACKERS = ("tensorboard", "wandb", "trackio")

Config = TypeVar("Config")
Built = TypeVar("Built")


@dataclass
class DataConfig:
    """The images that a stage trains on."""

    path: str = "???"  # a source that `t2i data check` has read; "???" marks a value that the YAML file must contain
    image_size: int = 256  # pixels; images are resized on the short side and cropped to a square
    num_workers: int = 2  # processes that decode images, for each training process; 0 decodes in the training process
    # Column of labels, kept by `t2i data check --label-column`, whose values are all drawn equally often
    balance_by: str | None = None
    neighbours: int = 0  # with balance_by: further images of a value that follow each, such as look-alikes for CLIP
    keyword_alone: float = 0.0  # fraction of captions that are a single keyword, where an image has any
    in_sentence: float = 0.0  # fraction of captions that are a caption or keyword in one of the sentences
    sentences: str | None = None  # text file with one sentence a line, each with {} where the caption or keyword stands
    buckets: bool = False  # crop each image to the nearest of several shapes with about as many pixels as the square
    bucket_step: int = 64  # pixels; sides of buckets are multiples of it
    max_ratio: float = 2.0  # of a bucket's longer side to its shorter side
    max_crop: float = 1.0  # leave out images of which a crop would take more than this fraction
    crop: str = "center"  # or random: another part of the image each time, which CLIP sees too
    flip: bool = False  # mirror half of the images, chosen anew each time

    def __post_init__(self) -> None:
        check_integer("data.image_size", self.image_size, 8, 4096)
        check_integer("data.num_workers", self.num_workers, 0, 256)
        check_integer("data.neighbours", self.neighbours, 0, 1024)
        check_fields(self, "data.", keyword_alone=(0, 1), in_sentence=(0, 1))
        if bool(self.in_sentence) != bool(self.sentences):
            raise InputError("data.in_sentence and data.sentences need each other: how often, and the file")
        if self.neighbours and self.balance_by is None:
            raise InputError(f"data.neighbours={self.neighbours} needs data.balance_by, the column of the groups")
        check_integer("data.bucket_step", self.bucket_step, 1, 4096)
        check_fields(self, "data.", max_ratio=(1, 16), max_crop=(0, 1))
        check_choice("data.crop", self.crop, ("center", "random"))
        if self.max_ratio != DataConfig.max_ratio and not self.buckets:
            raise InputError(f"data.max_ratio={self.max_ratio:g} needs data.buckets=true, whose shapes it limits")
        if self.buckets:
            check_multiple_of("data.image_size", self.image_size, self.bucket_step)

    @property
    def bucket_limits(self) -> str | None:
        """Limits of the buckets' shapes, beside the image size; None without buckets."""
        return f"multiples of {self.bucket_step}, ratios up to {self.max_ratio:g}" if self.buckets else None

    def check_center_crops(self) -> None:
        """Refuse random crops, for images that are encoded once."""
        if self.crop != "center":
            raise InputError(f"data.crop={self.crop} needs images in every step: a cache has one crop of each")

    def check_sides(self, multiple: int) -> None:
        """Refuse sides of training images that are no multiples of `multiple`."""
        name = "bucket_step" if self.buckets else "image_size"
        check_multiple_of(f"data.{name}", getattr(self, name), multiple)


@dataclass
class TrainConfig:
    """The training loop of every stage."""

    output: str = "???"  # folder of the run: the trained model, its checkpoints and metrics.jsonl
    steps: int = 100_000  # optimizer steps
    batch_size: int = 32  # images per process and micro-batch
    gradient_accumulation: int = 1  # micro-batches per optimizer step
    optimizer: str = "adamw"  # or adamw8bit of bitsandbytes (the extra 8bit): a quarter of the optimizer's memory
    learning_rate: float = 1e-4
    warmup_steps: int = 1_000  # linear from zero
    decay_steps: int = 0  # the last steps: a cosine down to zero; before them the rate is constant
    schedule_offset: int = 0  # steps of the warm-up that are skipped, for a run that continues the training of another
    weight_decay: float = 0.01  # of matrices and kernels; not of biases, norms and embeddings of one dimension
    adam_beta2: float = 0.99
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999  # of the averaged weights, which are saved; smaller in the first steps
    mixed_precision: str = "auto"  # no, fp16, bf16, or auto: bf16 where the hardware computes in it
    gradient_checkpointing: bool = False  # recompute activations to save memory: a third slower
    compile: bool = False  # torch.compile the model: starts later, runs faster
    log_every: int = 50  # steps
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])  # beside metrics.jsonl; also wandb, trackio
    sample_every: int = 1_000  # steps between sample images; 0: none
    validate_every: int = 500  # steps between losses on the held-out split; 0: none
    validation_samples: int = 512  # at most
    save_every: int = 1_000  # steps
    keep: int = 2  # checkpoints
    resume: str = "latest"  # checkpoint to resume from: latest, or a name such as step-00001000
    stall_timeout: float = 600  # seconds without progress of another process, after which a process names it and ends
    seed: int = 0
    dry_run: bool = False  # take three steps, print the cost of the run, and write nothing

    def __post_init__(self) -> None:
        # Ranges of numbers
        for name in ("steps", "batch_size", "gradient_accumulation", "log_every", "save_every", "keep"):
            check_integer(f"train.{name}", getattr(self, name), 1, 10**9)
        for name in ("warmup_steps", "decay_steps", "schedule_offset", "sample_every", "validate_every"):
            check_integer(f"train.{name}", getattr(self, name), 0, 10**9)
        check_integer("train.validation_samples", self.validation_samples, 1, 10**6)
        check_integer("train.seed", self.seed, 0, 2**20 - 1)
        check_fields(self, "train.", learning_rate=(0, 1), weight_decay=(0, 1), adam_beta2=(0, 0.9999999))
        check_fields(self, "train.", ema_decay=(0, 1), max_grad_norm=(0, 1e9), stall_timeout=(5, 1e6))

        # Names
        check_folder_name("train.output", Path(self.output))
        if self.mixed_precision == "False":  # YAML 1.1 reads a bare `no` as false
            self.mixed_precision = "no"
        check_choice("train.mixed_precision", self.mixed_precision, ("auto", "no", "fp16", "bf16"))
        check_choice("train.optimizer", self.optimizer, ("adamw", "adamw8bit"))
        for tracker in self.trackers:
            check_choice("train.trackers", tracker, TRACKERS)
        self.trackers = list(dict.fromkeys(self.trackers))

        # Limit the schedule to the run, so that train.steps=100 alone is a short run
        self.warmup_steps, self.decay_steps = min(self.warmup_steps, self.steps), min(self.decay_steps, self.steps)


def check_fields(config: Any, prefix: str = "", **ranges: tuple[float, float]) -> None:
    """Refuse fields of a configuration that are not numbers from the first to the second of `ranges`."""
    for name, (low, high) in ranges.items():
        check_range(f"{prefix}{name}", getattr(config, name), low, high)


def resolve_shipped_file(path: Path) -> Path:
    """Return the path; for one below `configs/` that does not exist here, that of the shipped file."""
    if not path.is_file() and path.parts[:1] == ("configs",):  # outside a checkout
        return CONFIG_FOLDER.joinpath(*path.parts[1:])
    return path


def find_default_configuration(stage: str) -> Path:
    """Return the default file of a stage: that of `emoji-quick`, or of `emoji` where it lacks the stage."""
    # configs/emoji balances concepts and fills sentences, for which most data have no columns
    files = [CONFIG_FOLDER / recipe / f"{stage}.yaml" for recipe in ("emoji-quick", "emoji")]
    return files[0] if files[0].is_file() else files[1]


def load_config(config_class: type[Config], stage: str, arguments: list[str]) -> Config:
    """Read `[FILE.yaml] [key=value ...]` into a `config_class`; later values replace earlier ones.

    Without a file: that of `find_default_configuration`. A missing path below `configs/` is that of a shipped file.
    Raises InputError for a key that does not exist, a value of the wrong type or out of range, or a required value that
    is missing.
    """
    # Only here, for drawing imports this module and reads no YAML
    import yaml
    from omegaconf import DictConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    # Split the arguments into a file and overrides
    arguments = list(arguments)
    has_file = bool(arguments) and "=" not in arguments[0]
    path = Path(arguments.pop(0)) if has_file else find_default_configuration(stage)
    path = resolve_shipped_file(path)
    if not path.is_file():
        raise InputError(f"no configuration file {str(path)!r}; give one, such as configs/tiny/{stage}.yaml")
    for argument in arguments:
        if "=" not in argument:
            raise InputError(f"an override must have the form key=value, such as train.steps=100, got {argument!r}")

    # Merge file and overrides into the dataclass, which checks types and ranges
    try:
        overrides = OmegaConf.from_dotlist(arguments)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise InputError(f"{' '.join(arguments)!r} cannot be parsed: {error}") from error
    try:
        file = OmegaConf.load(path)
        if not isinstance(file, DictConfig):
            raise InputError(f"{path} contains no keys; it must be a YAML mapping")
        merged = OmegaConf.merge(OmegaConf.structured(config_class), file, overrides)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        # Its first line, with the key and the keys that exist
        message = next(line for line in str(error).splitlines() if line.strip())
        if key := getattr(error, "full_key", None):
            names = ", ".join(key_field.name for key_field in fields(config_class))  # type: ignore[arg-type]
            message = f"{message} (key {key}; top-level keys: {names})"
        raise InputError(f"{path}: {message}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} is not YAML: {error}") from error


def build_or_explain(factory: Callable[..., Built], name: str, arguments: dict[str, Any], **fixed: Any) -> Built:
    """Return `factory(**arguments, **fixed)`. Raises InputError if it refuses the arguments, which are key `name`."""
    try:
        return factory(**arguments, **fixed)
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, ZeroDivisionError, AssertionError) as error:
        # The text of a KeyError is the bare key
        message = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{name} is not valid for {factory.__name__}: {message}") from error
