"""Low-rank adapters (LoRA, Hu et al. 2021) on a trained prior or decoder, by peft.

The model keeps its class; its own weights are frozen, and small matrices learn beside some of its layers. The exported
model has the adapters merged into its weights, so that it loads like any other.
"""

import copy
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from t2i.checks import check_integer, check_range
from t2i.errors import InputError
from t2i.files.atomic import create_folder_atomically
from t2i.files.model_folder import save_model_folder
from t2i.runtime.wrappers import has_adapters

ADAPTER_WEIGHTS = "adapter_model.safetensors"  # peft's name; adapter_config.json lies beside it


@dataclass
class LoraConfig:
    rank: int = 16
    alpha: float = 16.0  # the output of the adapters is scaled by alpha / rank
    targets: list[str] | None = None  # ends of the names of adapted layers; the attention's if left out

    def __post_init__(self) -> None:
        check_integer("lora.rank", self.rank, 1, 1024)
        check_range("lora.alpha", self.alpha, 0.001, 10_000)
        if self.targets is not None and not self.targets:
            raise InputError("lora.targets must name a layer, got []; leave it out for the layers of the attention")
        if find_spec("peft") is None:
            raise InputError("lora needs peft, which is not installed; pip install 't2i[lora]'")


def check_lora_init(lora: LoraConfig | None, init: str | None) -> None:
    if lora is not None and init is None:
        raise InputError("lora adapts a trained model, but init is null; give its folder, init=FOLDER")


def add_adapters(model: Any, config: LoraConfig) -> None:
    """Add adapters to the target layers in place, and freeze all other weights. New adapters change no output.

    Raises InputError for a target that matches no layer.
    """
    # Imported only here, because peft is optional
    from peft import LoraConfig as PeftConfig
    from peft import inject_adapter_in_model

    targets = find_target_layers(model, config.targets or list(model.lora_targets))
    model.requires_grad_(False)
    inject_adapter_in_model(PeftConfig(r=config.rank, lora_alpha=config.alpha, target_modules=targets), model)


def find_target_layers(model: Any, targets: list[str]) -> list[str]:
    """Return the full names of the linear and convolutional layers whose names end with one of `targets`."""
    layers = [name for name, layer in model.named_modules() if isinstance(layer, (nn.Linear, nn.Conv2d))]
    matches: set[str] = set()
    for target in targets:
        # Whole parts of a name: `to_q` is no end of `into_q`
        names = [name for name in layers if f".{name}".endswith(f".{target}")]
        if not names:
            default = ", ".join(model.lora_targets)
            raise InputError(
                f"lora.targets: no layer of a {type(model).__name__} is called {target!r}; the default is {default}"
            )
        matches.update(names)
    return sorted(matches)


def merge_adapters(model: Any) -> Any:
    """Return a copy of a model with its adapters merged into plain weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    # The run itself goes on with its adapters
    model = copy.deepcopy(model)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            model.set_submodule(name, layer.get_base_layer())
    # `export_adapted_model` takes it as the sign of adapters
    del model.peft_config
    return model


def export_adapted_model(model: Any, folder: Path) -> None:
    """Save a model as `folder/model`; one with adapters merged, and the adapters alone as `folder/adapters`."""
    if not has_adapters(model):
        save_model_folder(model, folder)
        return
    from peft import get_peft_model_state_dict

    save_model_folder(merge_adapters(model), folder)
    with create_folder_atomically(folder / "adapters") as unfinished:
        save_file(get_peft_model_state_dict(model), unfinished / ADAPTER_WEIGHTS)
        model.peft_config["default"].save_pretrained(unfinished)
