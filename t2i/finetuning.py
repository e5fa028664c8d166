"""Training that starts from a trained model instead of random weights."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from diffusers import ModelMixin, SchedulerMixin

from t2i.checkpoint import loaded
from t2i.errors import InputError

Model = TypeVar("Model", bound=ModelMixin)


def start_from(load: Callable[[str], Model], init: str, stated: dict[str, Any], **needed: Any) -> Model:
    """The model that `init` names, in fp32, to be trained further.

    Args:
        load: what loads it, such as `t2i.clip.load_clip`.
        init: a folder that a training script wrote, or another name that `load` knows.
        stated: what the configuration says of its architecture; empty, or the same as the model's own.
        needed: arguments of the model that the data and the frozen models decide.

    Raises InputError, in one line, if the model does not load or was made with other arguments.
    """
    model = load(init)
    check_same("", {**stated, **needed}, model.config, init)
    return model.float()


def check_same(name: str, ours: Any, theirs: Any, init: str) -> None:
    """Refuse a value that is not the model's; of mappings, each that we give."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        for key, value in ours.items():
            check_same(f"{name}.{key}".lstrip("."), value, theirs.get(key), init)
    elif plain(ours) != plain(theirs):
        raise InputError(f"init={init!r} was trained with {name} {theirs!r}, this run has {ours!r}; they must agree")


def check_prediction(init: str | None, scheduler: SchedulerMixin) -> None:
    """Refuse to let a model that learned to predict one thing predict another, if its run says what it learned."""
    if init is None:
        return
    folder = Path(init)  # of a run, of the model in a run, or of a part of a pipeline
    places = (folder / "scheduler", folder.parent / "scheduler", folder.parent / f"{folder.name}_scheduler")
    path = next((file for place in places if (file := place / "scheduler_config.json").is_file()), None)
    if path is None:
        print(f"init={init!r} does not say what it learned to predict; scheduler.prediction_type has to be that")
        return
    theirs = loaded(lambda path: json.loads(path.read_text())["prediction_type"], path)
    check_same("scheduler.prediction_type", scheduler.config.prediction_type, theirs, init)


def plain(value: Any) -> Any:
    """JSON has no tuples."""
    return list(value) if isinstance(value, tuple) else value
