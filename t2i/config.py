"""YAML files and command-line overrides become checked dataclasses."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from t2i.checks import check_choice, check_range
from t2i.errors import InputError
from t2i.shipped import find_shipped_folder

CONFIG_FOLDER = find_shipped_folder("configs")
TRACKERS = ("tensorboard", "wandb", "trackio")

Config = TypeVar("Config")
Built = TypeVar("Built")


@dataclass
class DataConfig:
    path: str = "???"  # what `t2i data check` read or wrote; "???" marks a value that the YAML file must give
    image_size: int = 256  # pixels; pictures are resized on the short side and cropped to a square
    num_workers: int = 2  # processes that decode pictures, per training process; 0 decodes in the training process

    def __post_init__(self) -> None:
        check_range("data.image_size", self.image_size, 8, 4096)
        check_range("data.num_workers", self.num_workers, 0, 256)


@dataclass
class TrainConfig:
    output: str = "???"  # folder of the run: the trained model, its checkpoints and metrics.jsonl
    steps: int = 100_000  # optimizer steps
    batch_size: int = 32  # pictures per process and micro-batch
    gradient_accumulation: int = 1  # micro-batches per optimizer step
    optimizer: str = "adamw"  # or adamw8bit: bitsandbytes' (the extra 8bit), a quarter of the optimizer's memory
    learning_rate: float = 1e-4
    warmup_steps: int = 1_000  # linear from zero
    decay_steps: int = 0  # the last steps, a cosine down to zero; the rate is constant in between
    schedule_offset: int = 0  # steps of the warm-up that count as done: for a run that goes on from another's
    weight_decay: float = 0.01  # of matrices and kernels; not of biases, norms and embeddings of one dimension
    adam_beta2: float = 0.99
    max_grad_norm: float = 1.0
    ema_decay: float = 0.999  # of the averaged weights, which are what is saved; approached from below at first
    mixed_precision: str = "auto"  # no, fp16, bf16, or auto: bf16 where the hardware computes in it
    gradient_checkpointing: bool = False  # compute activations twice instead of keeping them: a third slower
    compile: bool = False  # torch.compile the model: slower to start, faster after
    log_every: int = 50
    trackers: list[str] = field(default_factory=lambda: ["tensorboard"])  # beside metrics.jsonl; also wandb, trackio
    sample_every: int = 1_000  # steps between two pictures of what the model does; 0 is never
    validate_every: int = 500  # steps between two losses on what is held out; 0 is never
    validation_samples: int = 512  # at most
    save_every: int = 1_000
    keep: int = 2  # checkpoints
    resume: str = "latest"  # checkpoint to go on from; or the name of one, such as step-00001000
    stall_timeout: float = 600  # seconds that a process waits for the others before it says which is missing and ends
    seed: int = 0
    dry_run: bool = False  # take three steps, say what the run would cost, and write nothing

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "gradient_accumulation", "log_every", "save_every", "keep"):
            check_range(f"train.{name}", getattr(self, name), 1, 10**9)
        for tracker in self.trackers:
            check_choice("train.trackers", tracker, TRACKERS)
        self.trackers = list(dict.fromkeys(self.trackers))
        for name in ("warmup_steps", "decay_steps"):
            check_range(f"train.{name}", getattr(self, name), 0, 10**9)
            setattr(self, name, min(getattr(self, name), self.steps))  # so that train.steps=100 alone is a short run
        for name in ("schedule_offset", "sample_every", "validate_every"):
            check_range(f"train.{name}", getattr(self, name), 0, 10**9)
        check_range("train.validation_samples", self.validation_samples, 1, 10**6)
        check_range("train.learning_rate", self.learning_rate, 0, 1)
        check_range("train.weight_decay", self.weight_decay, 0, 1)
        check_range("train.adam_beta2", self.adam_beta2, 0, 0.9999999)
        check_range("train.ema_decay", self.ema_decay, 0, 1)
        check_range("train.max_grad_norm", self.max_grad_norm, 0, 1e9)
        check_range("train.stall_timeout", self.stall_timeout, 5, 1e6)
        check_range("train.seed", self.seed, 0, 2**20 - 1)
        if self.mixed_precision == "False":  # YAML 1.1 reads a bare `no` as false
            self.mixed_precision = "no"
        check_choice("train.mixed_precision", self.mixed_precision, ("auto", "no", "fp16", "bf16"))
        check_choice("train.optimizer", self.optimizer, ("adamw", "adamw8bit"))


def load_config(config_class: type[Config], stage: str, arguments: list[str]) -> Config:
    """Read `[FILE.yaml] [key=value ...]`, later values winning, into a `config_class`.

    Without a file: `configs/emoji/{stage}.yaml`. A path below `configs/` that does not exist is that of a shipped file.
    Raises InputError for a key that does not exist, a value of the wrong
    type or out of range, or one that is required and missing.
    """
    arguments = list(arguments)
    has_file = bool(arguments) and "=" not in arguments[0]
    path = Path(arguments.pop(0)) if has_file else CONFIG_FOLDER / "emoji" / f"{stage}.yaml"
    if not path.is_file() and path.parts[:1] == ("configs",):  # a shipped one, from outside a checkout
        path = CONFIG_FOLDER.joinpath(*path.parts[1:])
    if not path.is_file():
        raise InputError(f"no configuration file {str(path)!r}; give one, such as configs/emoji/{stage}.yaml")
    for argument in arguments:
        if "=" not in argument:
            raise InputError(f"{argument!r} is not of the form key=value; an override looks like train.steps=100")
    try:
        overrides = OmegaConf.from_dotlist(arguments)
    except (OmegaConfBaseException, yaml.YAMLError) as error:
        raise InputError(f"{' '.join(arguments)!r} does not parse: {error}") from error
    try:
        file = OmegaConf.load(path)
        if not isinstance(file, DictConfig):
            raise InputError(f"{path} holds no keys; it must be a YAML mapping")
        merged = OmegaConf.merge(OmegaConf.structured(config_class), file, overrides)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise InputError(f"{path}: {explain_config_error(error, config_class)}") from error
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise InputError(f"{path} is not YAML: {error}") from error


def format_config_yaml(config: Any) -> str:
    """Every key of a configuration with its value."""
    return OmegaConf.to_yaml(OmegaConf.structured(config)).rstrip()


def explain_config_error(error: Exception, config_class: type) -> str:
    """One line of what OmegaConf says: the key, what is wrong, and the keys there are."""
    message = next(line for line in str(error).splitlines() if line.strip())
    key = getattr(error, "full_key", None)
    return (
        f"{message} (key {key}; top-level keys: {', '.join(f.name for f in fields(config_class))})" if key else message
    )


def build_or_explain(factory: Callable[..., Built], name: str, arguments: dict[str, Any], **more: Any) -> Built:
    """`factory(**arguments, **more)`; what is wrong with arguments that a user wrote under `name`, in one line."""
    try:
        return factory(**arguments, **more)
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError, ZeroDivisionError, AssertionError) as error:
        message = f"{type(error).__name__}: {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{name} does not make a {factory.__name__}: {message}") from error
