"""Low-rank adapters (Hu et al. 2021) on a trained prior or decoder: peft's layers.

The model keeps its class and its contract; its own weights are frozen, and beside some of them small matrices learn.
What is exported has the adapters merged into plain weights, so it loads wherever the model does.
"""

import copy
import json
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from t2i.checks import check_integer, check_range
from t2i.errors import InputError
from t2i.files.atomic import create_folder_atomically
from t2i.files.model_folder import load_or_explain, save_model_folder

ADAPTER_WEIGHTS, ADAPTER_SETTINGS = "adapter_model.safetensors", "adapter_config.json"  # peft's names


@dataclass
class LoraConfig:
    rank: int = 16
    alpha: float = 16.0  # what the adapters add is scaled by alpha / rank
    targets: list[str] | None = None  # the layers by the ends of their names; none given: those of the attention

    def __post_init__(self) -> None:
        check_integer("lora.rank", self.rank, 1, 1024)
        check_range("lora.alpha", self.alpha, 0.001, 10_000)
        if self.targets is not None and not self.targets:
            raise InputError("lora.targets must name a layer, got []; leave it out for those of the attention")
        if find_spec("peft") is None:
            raise InputError("lora needs peft, which is not installed; pip install 't2i[lora]'")


def check_lora_init(lora: LoraConfig | None, init: str | None) -> None:
    if lora is not None and init is None:
        raise InputError("lora adapts a trained model, but init is null; give its folder, init=FOLDER")


def add_adapters(model: Any, config: LoraConfig) -> None:
    """Put adapters beside the target layers, in place; they add nothing yet. Only they are trainable from here on.

    Raises InputError for a target that no layer's name ends with.
    """
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    targets = find_target_layers(model, config.targets or list(model.lora_targets))
    model.requires_grad_(False)
    inject_adapter_in_model(PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets), model)


def find_target_layers(model: Any, targets: list[str]) -> list[str]:
    """The full names of the linear and convolutional layers whose names end with one of `targets`."""
    layers = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    found = {target: [name for name in layers if f".{name}".endswith(f".{target}")] for target in targets}
    for target, names in found.items():
        if not names:
            usual = ", ".join(model.lora_targets)
            raise InputError(f"lora.targets: no layer of a {type(model).__name__} is called {target!r}; usual: {usual}")
    return sorted({name for names in found.values() for name in names})


def collect_adapter_state(model: Any) -> dict[str, Tensor]:
    """The adapters' weights alone, by the names of their layers."""
    from peft import get_peft_model_state_dict

    return get_peft_model_state_dict(model)


def merge_adapters(model: Any) -> Any:
    """A copy with the adapters merged into plain weights: a model like any other."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    del model.peft_config
    return model


def export_adapted_model(model: Any, folder: Path) -> None:
    """Save a model as `folder/model`; one with adapters merged, and the adapters alone as `folder/adapters`."""
    if not hasattr(model, "peft_config"):
        save_model_folder(model, folder)
        return
    save_model_folder(merge_adapters(model), folder)
    with create_folder_atomically(folder / "adapters") as unfinished:
        save_file(collect_adapter_state(model), unfinished / ADAPTER_WEIGHTS)
        model.peft_config["default"].save_pretrained(unfinished)


def load_adapters(model: Any, folder: str | Path) -> None:
    """Put the adapters that `export_adapted_model` wrote onto the model that they were trained on, in place.

    Raises InputError, in one line, if they are missing or do not fit the model.
    """
    path = Path(folder) / "adapters" if (Path(folder) / "adapters").is_dir() else Path(folder)
    load_or_explain(lambda path: read_adapters(model, path), path)


def read_adapters(model: Any, path: Path) -> None:
    from peft import set_peft_model_state_dict

    settings, state = json.loads((path / ADAPTER_SETTINGS).read_text()), load_file(path / ADAPTER_WEIGHTS)
    add_adapters(model, LoraConfig(settings["r"], settings["lora_alpha"], sorted(settings["target_modules"])))
    if differing := set(collect_adapter_state(model)) ^ set(state):
        raise InputError(f"{str(path)!r} and the model's adapters differ in {len(differing)}, as {min(differing)!r}")
    set_peft_model_state_dict(model, state)
