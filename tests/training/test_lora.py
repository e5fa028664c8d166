"""Adapters: nothing at first, alone in learning, and plain weights when they are exported."""

import json
import sys

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model_state_dict, inject_adapter_in_model, set_peft_model_state_dict
from safetensors.torch import load_file
from t2i.training.common.lora import (
    LoraConfig,
    add_adapters,
    export_adapted_model,
    merge_adapters,
)

from t2i.config import load_config
from t2i.diffusion.condition import ImageCondition
from t2i.errors import InputError
from t2i.files.model_folder import load_model
from t2i.networks.prior import Prior
from t2i.networks.unet_decoder import UNetDecoder
from tests.helpers.stages import arguments, train
from tests.training.test_large import D, captions, loss_of, make, one_process, shard  # noqa: F401


def load_adapters(model, folder):
    """As users of peft would, on the model that they were trained on."""
    inject_adapter_in_model(PeftConfig.from_pretrained(folder), model)
    state = load_file(folder / "adapter_model.safetensors")
    assert set(state) == set(get_peft_model_state_dict(model))
    set_peft_model_state_dict(model, state)


DENOISERS = ("prior", "transformer", "unet")


def drift(model):
    """Weights as if trained longer: layers that started at zero are not."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    return model


def outputs(kind, model):
    """In one pass, and prepared once as in sampling."""
    torch.manual_seed(1)
    t, text = torch.tensor([3, 500]), captions(2)
    x = torch.randn(2, D) if kind == "prior" else torch.randn(2, 4, 8, 8)
    condition = text if kind == "prior" else ImageCondition(torch.randn(2, D), text)
    with torch.no_grad():
        return model(x, t, condition), model.step(x, t, model.prepare(condition))


def adapted(kind, steps=3, **settings):
    model = make(kind)
    add_adapters(model, LoraConfig(**{"rank": 2, "alpha": 4.0, **settings}))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(steps):
        loss_of(kind, model).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("kind", DENOISERS)
def test_adapters_add_nothing_before_training(kind):
    before, after = outputs(kind, make(kind)), outputs(kind, adapted(kind, steps=0))
    for one, other in zip(before, after):
        assert torch.equal(one, other)


@pytest.mark.parametrize("kind", DENOISERS)
def test_only_adapters_learn(kind):
    base, model = make(kind), adapted(kind)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable and all(".lora_" in name for name in trainable)
    own = {n.replace(".base_layer", ""): v for n, v in model.state_dict().items() if ".lora_" not in n}
    assert set(own) == set(base.state_dict())
    for name, value in base.state_dict().items():
        assert torch.equal(own[name], value), name
    assert not torch.allclose(outputs(kind, model)[0], outputs(kind, base)[0], atol=1e-3)
    # rank (in + out) numbers for each layer of (in, out)
    layers = {name.split(".lora_")[0] for name in trainable}
    counted = sum(2 * sum(base.get_submodule(layer).weight.shape) for layer in layers)
    assert counted == sum(value.numel() for value in get_peft_model_state_dict(model).values())
    assert counted < 0.2 * sum(parameter.numel() for parameter in base.parameters())


@pytest.mark.parametrize("kind", DENOISERS)
def test_merged_the_model_is_plain_and_says_the_same(kind):
    model = adapted(kind)
    plain = merge_adapters(model)
    assert type(plain) is type(model) and set(plain.state_dict()) == set(make(kind).state_dict())
    for one, other in zip(outputs(kind, plain), outputs(kind, model)):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert any(".lora_" in name for name in model.state_dict())  # which is left as it was
    assert not torch.allclose(outputs(kind, plain)[0], outputs(kind, make(kind))[0], atol=1e-3)


@pytest.mark.parametrize("kind", DENOISERS)
def test_what_is_exported_loads_as_a_model_and_as_adapters(kind, tmp_path):
    model = adapted(kind)
    export_adapted_model(model, tmp_path)
    plain = load_model(type(make(kind)), tmp_path)
    assert {path.name for path in (tmp_path / "adapters").iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    again = make(kind)
    load_adapters(again, tmp_path / "adapters")
    for one, two, three in zip(outputs(kind, model), outputs(kind, plain.train()), outputs(kind, again)):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
        assert torch.equal(three, one)


def test_adapters_checkpoint_gradients_too():
    model = adapted("transformer")
    one = torch.autograd.grad(loss_of("transformer", model), [p for p in model.parameters() if p.requires_grad])
    model.enable_gradient_checkpointing()
    two = torch.autograd.grad(loss_of("transformer", model), [p for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(two, one)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("kind", DENOISERS)
def test_adapters_learn_beside_weights_in_shards(kind):
    model = adapted(kind)
    loss_of(kind, model).backward()
    whole = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    shard(model)
    loss_of(kind, model).backward()
    sharded = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    assert whole and all(".lora_" in name for name in whole)
    torch.testing.assert_close(sharded, whole, rtol=1e-4, atol=1e-6)


def test_targets_are_chosen_by_the_ends_of_names():
    names = {
        name.split(".lora_")[0]
        for name in get_peft_model_state_dict(adapted("prior", steps=0, targets=["mlp.0", "to_image"]))
    }
    assert names == {*(f"blocks.{i}.mlp.0" for i in range(4)), "to_image"}
    with pytest.raises(InputError, match="no layer of a Prior is called 'to_q'; the default is to_qkv, to_out"):
        adapted("prior", targets=["to_q"])
    with pytest.raises(InputError, match="no layer of a Prior is called 'norm'"):  # it is not a linear one
        adapted("prior", targets=["norm"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"lora.rank": 4}, "lora adapts a trained model, but init is null"),
        ({"init": "somewhere", "lora.rank": 0}, "lora.rank must be an integer from 1 to 1024, got 0"),
        ({"init": "somewhere", "lora.alpha": 0}, "lora.alpha must be from 0.001"),
        ({"init": "somewhere", "lora.targets": "[]"}, "lora.targets must name a layer"),
        ({"init": "somewhere", "lora.ranks": 4}, "ranks"),
    ],
)
@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_a_mistake_in_the_configuration_is_refused(stage, overrides, message, tmp_path):
    from importlib import import_module

    config_class = import_module(f"t2i.training.train_{stage}").Config
    with pytest.raises(InputError, match=message) as caught:
        load_config(config_class, stage, arguments(stage, tmp_path, tmp_path, **overrides))
    assert "\n" not in str(caught.value)


def test_without_peft_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)  # as Python marks what cannot be imported
    with pytest.raises(InputError, match=r"peft, which is not installed; pip install 't2i\[lora\]'"):
        LoraConfig()


@pytest.mark.parametrize(("stage", "kind"), [("prior", Prior), ("decoder", UNetDecoder)])
def test_a_stage_trains_adapters_and_resumes(stage, kind, shapes, runs, tmp_path):
    base = load_model(kind, runs / stage)
    drift(base).save_pretrained(tmp_path / "base")
    elsewhere = {part: runs / part for part in ("clip", "autoencoder")[: 1 if stage == "prior" else 2]}
    settings = {"init": tmp_path / "base", "lora.rank": 2, "train.learning_rate": 0.02, **elsewhere}
    train(stage, shapes, tmp_path, steps=2, **settings)
    train(stage, shapes, tmp_path, steps=4, **settings)
    tuned, again = load_model(kind, tmp_path / stage), load_model(kind, tmp_path / "base")
    load_adapters(again, tmp_path / stage / "adapters")
    difference = {n for n, v in tuned.state_dict().items() if not torch.equal(v, base.state_dict()[n])}
    changed = {name.split(".lora_")[0] + ".weight" for name in get_peft_model_state_dict(again)}
    assert difference == changed  # all else is the base's, bit for bit
    for name, value in merge_adapters(again).state_dict().items():
        torch.testing.assert_close(value, tuned.state_dict()[name])
    settings_of = json.loads((tmp_path / stage / "adapters/adapter_config.json").read_text())
    assert settings_of["r"] == 2
    with pytest.raises(InputError, match="was trained with lora.alpha=16.0, now 1.0"):
        train(stage, shapes, tmp_path, steps=5, **settings, **{"lora.alpha": 1})
