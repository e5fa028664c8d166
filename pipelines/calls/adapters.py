"""Low-rank adapters (LoRA) of the prior or the decoder, as `t2i train` writes them, on a loaded pipeline."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch.nn import Module

from t2i.checks import check_integer, check_range
from t2i.errors import InputError
from t2i.files.untrusted import check_folder_files, is_folder, read_config, read_safetensors_header
from t2i.runtime.wrappers import has_adapters

ADAPTED_COMPONENTS = ("prior", "decoder")
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"  # peft's names


class Adapters:
    """Base of pipelines that take adapters, at most one for each of prior and decoder."""

    def load_lora_weights(self, folder: str | Path, scale: float = 1.0) -> None:
        """Put the adapters of a folder beside the weights of the prior or the decoder, whichever they were trained on.

        Args:
            folder: `adapters` of a run, or the run's folder itself.
            scale: factor of what they change; 0 changes nothing.

        Raises InputError for a folder without adapters, for those of another model, and where others are loaded.
        """
        # Read
        if find_spec("peft") is None:
            raise InputError("load_lora_weights needs peft, which is not installed; pip install 't2i[lora]'")
        check_range("scale", scale, -10, 10)
        path = Path(folder)
        path = path / "adapters" if is_folder(path / "adapters") else path
        if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
            raise InputError(f"{str(path)!r} has no adapters: {CONFIG} and {WEIGHTS}")
        check_folder_files(path)
        config = read_config(path / CONFIG)
        read_safetensors_header(path / WEIGHTS)
        rank, alpha = config.get("r"), config.get("lora_alpha")
        check_integer("r", rank, 1, 1024)
        check_range("lora_alpha", alpha, 0.001, 10_000)

        # Find the model, and load
        state = load_file(path / WEIGHTS)
        # The configuration may have no more than the ends of their names
        targets = sorted({name.rpartition(".lora_")[0] for name in state})
        model = self.find_adapted_model(targets, state, str(path))
        from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
        from peft.tuners.tuners_utils import BaseTunerLayer

        was_training = model.training
        inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets), model)
        set_peft_model_state_dict(model, state)
        model.to(device=model.device, dtype=model.dtype).train(was_training).requires_grad_(False)
        for layer in model.modules():
            if isinstance(layer, BaseTunerLayer):
                layer.set_scale("default", scale)

    def unload_lora_weights(self) -> None:
        """Take all adapters off again."""
        for model in self.list_adapted_models():
            for name, layer in list(model.named_modules()):
                if hasattr(layer, "get_base_layer"):
                    model.set_submodule(name, layer.get_base_layer())
            del model.peft_config

    def fuse_lora(self) -> None:
        """Merge all adapters into the weights, which makes steps as fast as before; they cannot be taken off then."""
        for model in self.list_adapted_models():
            for layer in model.modules():
                if hasattr(layer, "get_base_layer"):
                    layer.merge()
        self.unload_lora_weights()

    def list_adapted_models(self) -> list[Any]:
        """Return the models that have adapters now."""
        models = [getattr(self, name, None) for name in ADAPTED_COMPONENTS]
        return [model for model in models if model is not None and has_adapters(model)]

    def find_adapted_model(self, targets: list[str], state: dict[str, torch.Tensor], folder: str) -> Any:
        """Return the prior or the decoder, whose layers the adapters fit. Raises InputError for neither."""
        for name in ADAPTED_COMPONENTS:
            model = getattr(self, name, None)
            if model is not None and fits_layers(model, targets, state):
                if has_adapters(model):
                    raise InputError(f"the {name} has adapters already; call unload_lora_weights or fuse_lora first")
                return model
        raise InputError(
            f"the adapters in {folder!r} fit no layers of this prior or decoder: they are of another model"
        )


def fits_layers(model: Module, targets: list[str], state: dict[str, torch.Tensor]) -> bool:
    """Return whether all targets are layers of a model, with the widths that the adapters have."""
    layers = dict(model.named_modules())
    for target in targets:
        layer = layers.get(target)
        layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer  # type: ignore[union-attr]
        low, high = (state.get(f"{target}.lora_{side}.weight") for side in "AB")
        weight = getattr(layer, "weight", None)
        if weight is None or low is None or high is None:
            return False
        if weight.shape[1] != low.shape[1] or weight.shape[0] != high.shape[0]:
            return False
    return True
