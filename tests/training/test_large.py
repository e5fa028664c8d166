"""Large training: activations computed twice instead of kept, weights in shards, real sizes on the meta device."""

import argparse
import re
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import open_clip
import pytest
import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
from accelerate.utils.launch import prepare_multi_gpu_env
from t2i.training.train_decoder import ARCHITECTURES
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from t2i import STAGES
from t2i.config import CONFIG_FOLDER, load_config
from t2i.diffusion.condition import Condition, ImageCondition, TextEncoding
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.autoregressive_prior import AutoregressivePrior
from t2i.networks.clip import CLIP
from t2i.networks.decoder import Decoder
from t2i.networks.prior import Prior
from t2i.networks.unet_decoder import UNetDecoder
from tests.networks.test_decoder import UNET

D, W, LENGTH = 8, 6, 5
VAE = {
    "latent_channels": 4,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownEncoderBlock2D", "DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D", "UpDecoderBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 8,
}
TOWERS = {
    "embed_dim": D,
    "vision_cfg": {"image_size": 16, "patch_size": 8, "width": 64, "layers": 3, "head_width": 32},
    "text_cfg": {"context_length": LENGTH, "vocab_size": 64, "width": 32, "heads": 2, "layers": 3},
}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "clip": lambda: CLIP(TOWERS, {"size": 16, "mean": [0.5] * 3, "std": [0.5] * 3}),
    "autoencoder": lambda: Autoencoder(VAE),
    "prior": lambda: Prior(D, W, LENGTH, width=32, depth=4, heads=2),
    "transformer": lambda: Decoder(D, 4, 8, width=32, depth=4, heads=2, condition_width=16, text_width=W),
    "unet": lambda: UNetDecoder(D, 4, 8, unet=UNET, context_width=16, text_width=W),
}


def make(kind: str) -> nn.Module:
    torch.manual_seed(0)
    model = MODELS[kind]()
    for parameter in model.parameters():  # nothing starts at zero, where gradients would not reach
        parameter.data += 0.05 * torch.randn_like(parameter)
    return model.train()


def captions(count: int, device: str = "cpu") -> TextEncoding:
    mask = torch.ones(count, LENGTH, dtype=torch.bool, device=device)
    return TextEncoding(torch.randn(count, D, device=device), torch.randn(count, LENGTH, W, device=device), mask)


def loss_of(kind: str, model: nn.Module) -> Tensor:
    """What training computes, of inputs that are always the same."""
    torch.manual_seed(1)
    t = torch.tensor([3, 500])
    match kind:
        case "clip":
            tokens = torch.tensor([[1, 5, 63, 0, 0], [1, 7, 9, 63, 0]])
            z_i, z_t, scale = model(torch.rand(2, 3, 16, 16) * 2 - 1, tokens)
            return (scale * (z_i @ z_t.T)).square().mean()
        case "autoencoder":
            reconstruction, kl = model(torch.rand(2, 3, 16, 16) * 2 - 1)
            return reconstruction.square().mean() + kl.mean()
        case "prior":
            return model(torch.randn(2, D), t, captions(2)).square().mean()
        case _:
            return model(torch.randn(2, 4, 8, 8), t, ImageCondition(torch.randn(2, D), captions(2))).square().mean()


def gradients_of(kind: str, model: nn.Module) -> tuple[Tensor, dict[str, Tensor], int]:
    """The loss, its gradients, and the bytes that autograd kept between the passes."""
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = loss_of(kind, model)
    loss.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return loss.detach(), gradients, sum(kept.values())


def counted(model: nn.Module) -> list[nn.Module]:
    """A list that grows by every block that starts to run."""
    runs: list[nn.Module] = []
    for layer in model.modules():
        if type(layer).__name__ in model._no_split_modules:
            layer.register_forward_pre_hook(lambda layer, _: runs.append(layer))
    return runs


@pytest.mark.parametrize("kind", MODELS)
def test_checkpointing_keeps_less_and_changes_no_gradient(kind):
    model = make(kind)
    runs = counted(model)
    loss, gradients, kept = gradients_of(kind, model)
    once = len(runs)
    assert len(gradients) > 10 and once == len(set(runs)) > 2

    model.enable_gradient_checkpointing()
    assert model.is_gradient_checkpointing
    less_loss, same_gradients, less = gradients_of(kind, model)
    assert len(runs) >= 3 * once - 1  # again in the backward pass, but for one in the middle of the U-Net
    assert less < 0.7 * kept
    assert torch.equal(less_loss, loss)
    torch.testing.assert_close(same_gradients, gradients, rtol=1e-5, atol=1e-6)

    model.disable_gradient_checkpointing()
    assert gradients_of(kind, model)[2] == kept


@pytest.mark.parametrize("kind", MODELS)
def test_nothing_is_computed_twice_where_no_gradient_is_asked_for(kind):
    model = make(kind)
    runs = counted(model)
    model.enable_gradient_checkpointing()
    with torch.no_grad():
        loss_of(kind, model)
    assert len(runs) == len(set(runs)) > 2


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def shard(model: nn.Module) -> None:
    """As accelerate does: each block that the model names is a unit, and what is left is one."""
    mesh = init_device_mesh("cpu", (1,))
    for layer in reversed(list(model.modules())):
        if type(layer).__name__ in model._no_split_modules:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["autoencoder", "prior", "transformer", "unet"])
def test_a_model_in_shards_has_the_gradients_of_a_whole_one(kind, checkpointing, one_process):
    model = make(kind)
    loss, gradients, _ = gradients_of(kind, model)
    shard(model)
    if checkpointing:
        model.enable_gradient_checkpointing()
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    sharded_loss = loss_of(kind, model)
    sharded_loss.backward()
    sharded = {name: p.grad.full_tensor() for name, p in model.named_parameters() if p.grad is not None}
    torch.testing.assert_close(sharded_loss.detach(), loss)
    torch.testing.assert_close(sharded, gradients, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["prior", "transformer", "unet"])
def test_the_null_of_a_model_in_shards_is_whole(kind, one_process):
    model = make(kind)
    whole = model.null(2)
    shard(model)

    def check(sharded: Condition, whole: Condition) -> None:
        for name, value in vars(whole).items():
            if isinstance(value, Condition):
                check(getattr(sharded, name), value)
            elif value is None:
                assert getattr(sharded, name) is None
            else:
                assert not isinstance(getattr(sharded, name), DTensor)
                assert torch.equal(getattr(sharded, name), value)

    check(model.null(2), whole)


BASE = sorted(path for path in (CONFIG_FOLDER / "base").glob("*.yaml") if path.stem.split("-")[0] in STAGES)


def real(path: Path) -> tuple[str, nn.Module, tuple]:
    """A configuration's model on the meta device, for a public ViT-L/14 and an 8x VAE of 4 channels; its inputs."""
    stage = path.stem.split("-")[0]
    config = load_config(import_module(f"t2i.training.train_{stage}").Config, stage, [str(path)])
    towers = open_clip.get_model_config("ViT-L-14")
    embed_dim, width, length = (towers["embed_dim"], *(towers["text_cfg"][k] for k in ("width", "context_length")))
    assert (embed_dim, width, length) == (768, 768, 77)
    with torch.device("meta"):
        text = TextEncoding(torch.randn(2, 768), torch.randn(2, 77, 768), torch.ones(2, 77, dtype=torch.bool))
        t = torch.tensor([3, 500])
        match stage:
            case "clip":
                assert config.model["text_cfg"]["width"] == width
                tokens = torch.zeros(2, length, dtype=torch.int64)
                model = CLIP(config.model, config.preprocess)
                return stage, model, (torch.randn(2, 3, config.data.image_size, config.data.image_size), tokens)
            case "autoencoder":
                model = Autoencoder(**config.model)
                assert (model.channels, model.factor) == (4, 8)
                return stage, model, (torch.randn(2, 3, config.data.image_size, config.data.image_size),)
            case "prior" if config.architecture == "autoregressive":
                model = AutoregressivePrior(768, 768, 77, components=319, **config.model)  # as many as in the paper
                return stage, model, (text, torch.zeros(2, 320, dtype=torch.int64))
            case "prior":
                return stage, Prior(768, 768, 77, **config.model), (torch.randn(2, 768), t, text)
        side = config.data.image_size // 8
        model = ARCHITECTURES[config.architecture](
            768, 4, side, text_width=768 if config.reads_captions else None, **config.model
        )
        return stage, model, (torch.randn(2, 4, side, side), t, ImageCondition(torch.randn(2, 768), text))


@pytest.mark.parametrize("path", BASE, ids=lambda path: path.stem)
def test_a_real_size_is_what_its_file_says_and_runs(path):
    stage, model, inputs = real(path)
    said = re.search(r"([\d.]+) ([MB]) parameters", path.read_text())
    assert said is not None
    expected = float(said[1]) * {"M": 1e6, "B": 1e9}[said[2]]
    assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(expected, rel=0.02)
    if stage == "clip":  # where a batch of captions ends is read from the tokens, which meta tensors do not have
        assert model.encode_image(inputs[0]).shape == (2, 768)
        return
    out = model(*inputs)
    if isinstance(model, AutoregressivePrior):
        assert out.device.type == "meta" and out.shape == (2, 320, 1024)
        return
    out = out[0] if stage == "autoencoder" else out
    assert out.device.type == "meta" and out.shape == inputs[0].shape
    if stage in ("prior", "decoder"):
        x, t = (torch.cat([one, one]) for one in inputs[:2])  # as guidance does
        assert model.step(x, t, model.prepare(model.null(2).cat(inputs[2]))).shape == x.shape


def test_the_real_sizes_are_those_that_were_promised():
    priors = {"prior", "prior-1b", "prior-autoregressive"}
    decoders = {"decoder", "decoder-900m", "decoder-t5"}
    assert {path.stem for path in BASE} == {"clip", "autoencoder"} | priors | decoders


def launched(name: str) -> argparse.Namespace:
    """What `accelerate launch --config_file configs/accelerate/NAME.yaml` makes of it."""
    path = str(CONFIG_FOLDER / "accelerate" / f"{name}.yaml")
    return _validate_launch_command(launch_command_parser().parse_args(["--config_file", path, "script.py"]))[0]


@pytest.mark.parametrize("name", ["gpus", "machines", "fsdp"])
def test_accelerate_takes_every_way_to_launch(name):
    config = load_config_from_file(str(CONFIG_FOLDER / "accelerate" / f"{name}.yaml"))
    arguments = launched(name)
    assert arguments.num_processes == config.num_processes == {"gpus": 8, "machines": 16, "fsdp": 8}[name]
    assert arguments.num_machines == (2 if name == "machines" else 1)
    assert (arguments.multi_gpu, arguments.use_fsdp) == (name != "fsdp", name == "fsdp")
    assert arguments.mixed_precision == "no"  # the training configuration decides


@pytest.mark.parametrize("kind", ["autoencoder", "prior", "transformer", "unet"])
def test_accelerate_finds_the_blocks_to_shard(kind, monkeypatch):
    arguments = launched("fsdp")
    for name, value in prepare_multi_gpu_env(arguments).items():
        if name.startswith("FSDP_"):
            monkeypatch.setenv(name, value)
    plugin, model = FullyShardedDataParallelPlugin(), make(kind)
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward is True
    plugin.set_auto_wrap_policy(model)
    policy = fsdp2_prepare_auto_wrap_policy(plugin, model)
    wrapped = [layer for layer in model.modules() if policy(layer)]
    inside = {parameter for layer in wrapped for parameter in layer.parameters()}
    assert len(wrapped) > 2 and {type(layer).__name__ for layer in wrapped} == set(model._no_split_modules)
    assert sum(p.numel() for p in inside) > 0.5 * sum(p.numel() for p in model.parameters())
