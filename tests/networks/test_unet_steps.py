"""U-Nets whose condition is prepared once: what they predict is what diffusers' own `forward` does."""

import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnAddedKVProcessor
from diffusers.models.transformers.dual_transformer_2d import DualTransformer2DModel
from torch import Tensor, nn

from t2i.networks.unet_steps import prepare_unconditional_context, prepare_unet_context, run_unet_step
from t2i.runtime import fast_paths
from tests.helpers.kandinsky_folders import KANDINSKY_TEXT, tiny_controlnet_unet, tiny_kandinsky_unet
from tests.helpers.karlo_folders import karlo_super_resolution
from tests.helpers.public_folders import EMBED_DIM, randomised


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def tiny_unet() -> UNet2DConditionModel:
    """As `t2i.networks.unet_decoder` has it: transformers between pixels and tokens, and a class."""
    torch.manual_seed(0)
    made = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 24),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
        cross_attention_dim=12,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=EMBED_DIM,
    )
    return randomised(made)


IMAGES = {"image_embeds": random(3, EMBED_DIM, seed=1)}
MASK = torch.tensor([[True] * 5, [True] * 3 + [False] * 2, [True] * 4 + [False]])
CASES = {
    "2.2": (lambda: tiny_kandinsky_unet("2.2"), {"added_cond_kwargs": IMAGES}),
    "2.2 ControlNet": (
        tiny_controlnet_unet,
        {"added_cond_kwargs": IMAGES | {"hint": random(3, 3, 64, 64, seed=7)}},
    ),
    "2.1": (
        lambda: tiny_kandinsky_unet("2.1"),
        {
            "encoder_hidden_states": random(3, 7, KANDINSKY_TEXT, seed=2),
            "added_cond_kwargs": IMAGES | {"text_embeds": random(3, EMBED_DIM, seed=3)},
        },
    ),
    "ours": (
        tiny_unet,
        {
            "encoder_hidden_states": random(3, 5, 12, seed=4),
            "class_labels": random(3, EMBED_DIM, seed=5),
            "encoder_attention_mask": MASK,
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("gradient", [False, True])
def test_a_step_is_the_forward_of_diffusers(case: str, gradient: bool) -> None:
    unet, condition = CASES[case][0](), CASES[case][1]
    x, t = random(3, 4, 8, 8, seed=6).requires_grad_(gradient), torch.tensor([400, 20, 999])
    with torch.set_grad_enabled(gradient):
        context = prepare_unet_context(unet, **condition)
        assert context is not None
        run_unet_step(unet, x, t, context)
        assert context.packed_weights is None or bool(context.packed_weights) != gradient  # where oneDNN convolves
        mine, theirs = (
            run_unet_step(unet, x, t, context),
            unet(x, t, **{"encoder_hidden_states": None} | condition).sample,
        )
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)
        if gradient:
            expected = [torch.autograd.grad(one.square().sum(), x, retain_graph=True)[0] for one in (mine, theirs)]
            torch.testing.assert_close(*expected, atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_contexts_share_packed_weights_until_these_change() -> None:
    """Of any number of images; nothing of them outlives the contexts."""
    unet, condition = tiny_unet(), CASES["ours"][1]
    x, t = random(3, 4, 8, 8, seed=6), torch.tensor([400, 20, 999])
    whole, part = (
        prepare_unet_context(unet, **condition),
        prepare_unet_context(unet, **{name: one[:1] for name, one in condition.items()}),
    )
    assert whole is not None and part is not None
    if whole.packed_weights is None:
        pytest.skip("oneDNN does not convolve here")
    first = run_unet_step(unet, x, t, whole)
    torch.testing.assert_close(run_unet_step(unet, x[:1], t[:1], part), first[:1], atol=1e-5, rtol=1e-5)
    convolutions = [one for one in unet.modules() if isinstance(one, torch.nn.Conv2d)]
    assert part.packed_weights is whole.packed_weights and 0 < len(whole.packed_weights) <= len(convolutions)
    for one in convolutions:
        one.weight.mul_(2)
    changed = prepare_unet_context(unet, **condition)
    torch.testing.assert_close(run_unet_step(unet, x, t, changed), unet(x, t, **condition).sample, atol=1e-4, rtol=1e-4)
    held = weakref.ref(changed.packed_weights)
    del changed
    assert held() is None


@torch.no_grad()
def test_sides_that_do_not_halve_are_those_of_diffusers() -> None:
    unet, condition = tiny_unet(), CASES["ours"][1]
    x, t = random(3, 4, 7, 10, seed=6), torch.tensor([400, 20, 999])
    torch.testing.assert_close(
        run_unet_step(unet, x, t, prepare_unet_context(unet, **condition)),
        unet(x, t, **condition).sample,
        atol=1e-5,
        rtol=1e-5,
    )


@torch.no_grad()
def test_nothing_of_the_condition_is_computed_in_a_step_and_the_same_condition_only_once() -> None:
    unet, rows = tiny_kandinsky_unet("2.1"), []
    condition = CASES["2.1"][1]
    same = torch.tensor([0, 0, 0, 1])
    added = {name: value[same] for name, value in condition["added_cond_kwargs"].items()}
    parts = [unet.encoder_hid_proj, unet.add_embedding]
    parts += [part for one in unet.modules() if isinstance(one, Attention) for part in (one.add_k_proj, one.add_v_proj)]
    for part in parts:
        part.register_forward_hook(lambda _, __, out: rows.append(len(out)))
    unique = (torch.tensor([0, 3]), same)
    states = condition["encoder_hidden_states"][same]
    context = prepare_unet_context(unet, states, added_cond_kwargs=added, unique_rows=unique)
    assert len(rows) >= len(parts) and set(rows) == {2}
    rows.clear()
    assert context is not None
    out = run_unet_step(unet, random(1, 4, 8, 8, seed=6).expand(4, -1, -1, -1), torch.full((4,), 100), context)
    assert not rows
    assert out[0].equal(out[1]) and not torch.allclose(out[0], out[3])


@torch.no_grad()
def test_a_step_without_a_condition_is_the_forward_of_diffusers() -> None:
    unet, x = karlo_super_resolution(0), random(2, 6, 16, 16, seed=6)
    context = prepare_unconditional_context(unet, x)
    assert context is not None
    for t in (torch.tensor([400, 20]), torch.tensor([999, 0])):
        torch.testing.assert_close(run_unet_step(unet, x, t, context), unet(x, t).sample, atol=1e-5, rtol=1e-5)


def test_a_u_net_that_divides_by_the_time_is_left_to_diffusers() -> None:
    unet = karlo_super_resolution(0)
    unet.register_to_config(time_embedding_type="fourier")
    assert prepare_unconditional_context(unet, torch.zeros(1)) is None


@torch.no_grad()
def test_hooks_of_a_convolution_run_in_a_step() -> None:
    unet, condition = tiny_unet(), CASES["ours"][1]
    x, t, seen = random(3, 4, 8, 8, seed=6), torch.tensor([400, 20, 999]), []
    context = prepare_unet_context(unet, **condition)
    assert context is not None
    run_unet_step(unet, x, t, context)
    unet.conv_in.register_forward_pre_hook(lambda *_: seen.append("before"))
    unet.down_blocks[0].resnets[0].conv1.register_forward_hook(lambda _, __, out: 2 * out)
    mine, theirs = run_unet_step(unet, x, t, context), unet(x, t, **condition).sample
    assert seen == ["before"] * 2
    torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-5)


BF16_WITHOUT_AVX512 = """
import torch
from t2i.networks.unet_steps import prepare_unet_context, run_unet_step
from tests.networks.test_unet_steps import random, tiny_unet

unet, x, t = tiny_unet().bfloat16(), random(1, 4, 8, 8, seed=6).bfloat16(), torch.tensor([400])
condition = {"encoder_hidden_states": random(1, 5, 12, seed=4), "class_labels": random(1, 16, seed=5)}
condition = {name: one.bfloat16() for name, one in condition.items()}
with torch.no_grad():
    mine, theirs = run_unet_step(unet, x, t, prepare_unet_context(unet, **condition)), unet(x, t, **condition).sample
torch.testing.assert_close(mine, theirs, atol=0.05, rtol=0.05)
"""


def test_a_step_in_bf16_runs_on_a_processor_without_avx512() -> None:
    """In a process of its own, for oneDNN looks once."""
    ended = subprocess.run(
        [sys.executable, "-c", BF16_WITHOUT_AVX512],
        env=os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr


def of_another_attention(unet: nn.Module) -> None:
    unet.set_attn_processor(AttnAddedKVProcessor())


def of_another_block(unet: nn.Module) -> None:
    unet.mid_block = nn.Identity()


def free(unet: nn.Module) -> None:
    unet.up_blocks[0].b1 = 1.2


def of_two_attentions(unet: nn.Module) -> None:
    """As `dual_cross_attention=True` makes them."""
    unet.down_blocks[-1].attentions[0] = DualTransformer2DModel(4, 6, 24, norm_num_groups=4)


def of_another_resnet(unet: nn.Module) -> None:
    unet.up_blocks[0].resnets[0] = nn.Identity()


@pytest.mark.parametrize("change", [of_another_attention, of_another_block, of_two_attentions, of_another_resnet, free])
def test_a_u_net_that_the_steps_do_not_know_is_left_to_diffusers(change) -> None:
    unet = tiny_kandinsky_unet("2.2")
    change(unet)
    assert prepare_unet_context(unet, **CASES["2.2"][1]) is None


def test_the_switch_of_the_fast_paths_leaves_every_u_net_to_diffusers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_paths, "enabled", False)
    assert prepare_unet_context(tiny_unet(), **CASES["ours"][1]) is None
    assert prepare_unconditional_context(karlo_super_resolution(0), torch.zeros(1)) is None
