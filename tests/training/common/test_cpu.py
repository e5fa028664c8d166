"""What makes training faster on processors: attention of few queries in fp32, and memory that is kept."""

import ctypes
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState
from t2i.training.common.cpu import MAX_SHORT_QUERIES, attend_few_queries_in_fp32, keep_memory
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.training_step import build_steps

KEEPING = """
import resource, sys, torch
from t2i.training.common.cpu import keep_memory

def faults(megabytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(megabytes, 2**18)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if not keep_memory():
    sys.exit(print("cannot be told"))
for _ in range(3):
    faults(256)  # once it has as much as the largest step takes
print(sum(faults(64) for _ in range(8)))
"""


class Dtypes(TorchDispatchMode):
    """In which dtypes torch's kernel of attention runs."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[torch.dtype] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default:
            self.found.add(args[0].dtype)
        return func(*args, **(kwargs or {}))


def inputs(queries: int) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(1, 2, length, 32) for length in (queries, 40, 40)]
    return [torch.randn(shape).to(torch.bfloat16).requires_grad_(True) for shape in shapes]


def test_attention_of_few_queries_is_that_of_fp32_rounded_once_and_so_are_its_gradients():
    query, key, value = inputs(MAX_SHORT_QUERIES)
    mask = torch.rand(1, 1, 1, 40) > 0.3
    wide = [one.detach().float().requires_grad_(True) for one in (query, key, value)]
    expected = F.scaled_dot_product_attention(*wide, attn_mask=mask)
    with torch.autocast("cpu", torch.bfloat16), attend_few_queries_in_fp32():
        found = F.scaled_dot_product_attention(query, key, value=value, attn_mask=mask)
    assert found.dtype == torch.bfloat16 and torch.equal(found, expected.to(torch.bfloat16))
    grad = torch.randn_like(found)
    gradients = torch.autograd.grad(found, (query, key, value), grad)
    for mine, other in zip(gradients, torch.autograd.grad(expected, wide, grad.float())):
        assert torch.equal(mine, other.to(torch.bfloat16))


def test_longer_attention_and_that_of_fp32_stay_as_they_are():
    for given in (inputs(MAX_SHORT_QUERIES + 1), [one.detach().float() for one in inputs(64)]):
        expected = F.scaled_dot_product_attention(*given)
        with attend_few_queries_in_fp32():
            assert torch.equal(F.scaled_dot_product_attention(*given), expected)


def test_attention_inside_of_torchs_own_layers_takes_it_too():
    """As in open_clip's towers: of few queries, it is what fp32 gives to its weights and inputs rounded to bf16."""
    torch.manual_seed(0)
    layer, x = torch.nn.MultiheadAttention(64, 2, batch_first=True), torch.randn(3, 17, 64)

    def kernels() -> set[torch.dtype]:
        with torch.autocast("cpu", torch.bfloat16), Dtypes() as seen:
            layer(x, x, x, need_weights=False)
        return seen.found

    plain = F.scaled_dot_product_attention
    with attend_few_queries_in_fp32():
        assert kernels() == {torch.float32}
    assert kernels() == {torch.bfloat16} and F.scaled_dot_product_attention is plain


@pytest.mark.parametrize("option", [[], ["train.gradient_checkpointing=true"]])
def test_a_step_in_bf16_takes_it_unless_the_backward_pass_computes_again(option):
    step = build_steps("configs/tiny/decoder.yaml", ["train.mixed_precision=bf16", *option], lambda _: 5)
    with Dtypes() as seen:
        step()
    AcceleratorState._reset_state()  # later runs in this process are of their own precision
    assert seen.found == {torch.bfloat16 if option else torch.float32}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_memory_that_was_freed_is_not_asked_for_again():
    """In a process of its own, for what is kept is kept until the end."""
    ended = subprocess.run([sys.executable, "-c", KEEPING], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    if ended.stdout.strip() == "cannot be told":
        pytest.skip("an allocator that cannot be told")
    assert int(ended.stdout) < 16384  # the pages of one of the eight


def test_systems_without_glibc_are_not_asked(monkeypatch):
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr(ctypes, "CDLL", None)  # it takes no None there
    assert keep_memory() is False
