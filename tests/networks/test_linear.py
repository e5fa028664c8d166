"""Linear layers by oneDNN: the same results as torch's, forward and backward, wherever it is asked."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.side_by_side import count_operations
from t2i.diffusion.condition import TextEncoding
from t2i.networks import linear
from t2i.networks.linear import MIN_MULTIPLICATIONS, Linear, is_onednn_faster, multiply_by_onednn, use_onednn_linear
from t2i.networks.prior import Prior
from t2i.runtime import fast_paths

pytestmark = pytest.mark.skipif(not linear.HAS_ONEDNN, reason="torch has no oneDNN here")


def layers(into: int = 192, out: int = 160, bias: bool = True) -> tuple[Linear, nn.Linear]:
    """Ours and torch's, with the same weights."""
    torch.manual_seed(0)
    ours = Linear(into, out, bias)
    theirs = nn.Linear(into, out, bias)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


@contextmanager
def without_onednn() -> Iterator[None]:
    torch.backends.mkldnn.set_flags(_enabled=False)
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(_enabled=True)


@pytest.mark.parametrize("frozen", ["weight", "x", ""])
def test_only_what_a_gradient_needs_is_kept(frozen: str) -> None:
    """As by torch: a frozen layer keeps no input, and the input may change."""
    layer, x = layers(bias=False)[0], torch.randn(64, 192, requires_grad=frozen != "x")
    layer.requires_grad_(frozen != "weight")
    kept: list[tuple[int, ...]] = []

    def keep(one: Tensor) -> Tensor:
        kept.append(tuple(one.shape))
        return one

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda one: one):
        layer(x)
    assert is_onednn_faster(x, layer.weight)
    assert kept == {"weight": [(160, 192)], "x": [(64, 192)], "": [(64, 192), (160, 192)]}[frozen]


def test_an_input_of_another_width_is_refused_in_torchs_words() -> None:
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        layers()[0](torch.randn(64, 100))


@pytest.mark.filterwarnings("ignore:.torch.jit.trace.:FutureWarning", "ignore:.torch.jit:DeprecationWarning")
def test_a_layer_can_be_traced() -> None:
    ours, theirs = layers()
    x = torch.randn(64, 192)
    torch.testing.assert_close(torch.jit.trace(ours, x)(x), theirs(x), atol=1e-5, rtol=1e-5)


INPUTS = {
    "rows": lambda x: x.flatten(0, 1),
    "sequences": lambda x: x,
    "of other strides": lambda x: x.transpose(0, 1),
    "a part": lambda x: x[:, ::2],
    "of four dimensions": lambda x: x.unflatten(0, (2, 2)),
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("given", INPUTS)
def test_outputs_and_gradients_are_those_of_torch(given: str, bias: bool) -> None:
    ours, theirs = layers(bias=bias)
    x = INPUTS[given](torch.randn(4, 40, 192)).requires_grad_(True)
    assert is_onednn_faster(x, ours.weight)
    grad = torch.randn(*x.shape[:-1], 160)
    found = []
    for layer in (ours, theirs):
        out = layer(x)
        found.append([out, *torch.autograd.grad(out, [x, *layer.parameters()], grad)])
    for mine, other in zip(*found):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


class Weights(TorchDispatchMode):
    """Every second factor that oneDNN is given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        if function is torch.ops.mkldnn._linear_pointwise.default:
            self.seen.append(arguments[1])
        return function(*arguments, **(options or {}))


@pytest.mark.parametrize("given", INPUTS)
def test_onednn_is_only_given_weights_that_it_multiplies_by_fast(given: str) -> None:
    layer, _ = layers()
    x = INPUTS[given](torch.randn(4, 40, 192)).requires_grad_(True)
    with Weights() as weights:
        layer(x).sum().backward()  # a gradient without memory of its own
        multiply_by_onednn(x.detach(), torch.randn(320, 384)[::2, ::2])
    assert len(weights.seen) == 4
    assert all(weight.is_contiguous() or weight.t().is_contiguous() for weight in weights.seen)


def test_only_the_gradients_that_are_needed_are_computed() -> None:
    ours, _ = layers()
    x = torch.randn(64, 192, requires_grad=True)
    ours.weight.requires_grad_(False)
    ours(x).sum().backward()
    assert ours.weight.grad is None and ours.bias.grad is not None
    torch.testing.assert_close(x.grad, ours.weight.sum(dim=0).expand(64, -1), rtol=1e-4, atol=1e-4)


def test_a_bias_learns_alone() -> None:
    layer, _ = layers()
    layer.weight.requires_grad_(False)
    layer(torch.randn(64, 192)).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((160,), 64.0))


def test_a_compiler_sees_torchs_product() -> None:
    ours, theirs = layers()
    x = torch.randn(64, 192)
    compiled = torch.compile(ours, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x), theirs(x))


@pytest.mark.filterwarnings("ignore:`torch.jit.script`:FutureWarning")  # torch uses it itself for jvp
def test_transforms_of_functions_and_forward_derivatives_go_through_torch() -> None:
    ours, theirs = layers()
    x, direction = torch.randn(64, 192), torch.randn(64, 192)
    for layer in (ours, theirs):
        layer.requires_grad_(False)
    derivatives = [torch.func.jvp(layer, (x,), (direction,))[1] for layer in (ours, theirs)]
    assert torch.equal(*derivatives) and derivatives[0].abs().sum() > 0
    gradients = [torch.func.grad(lambda x, layer=layer: layer(x).square().sum())(x) for layer in (ours, theirs)]
    assert torch.equal(*gradients)
    with forward_ad.dual_level():
        out = ours(forward_ad.make_dual(x, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, derivatives[0])


class Kept(Tensor):
    """Of another kind, as quantised weights are."""


def test_tensors_of_other_kinds_are_left_to_torch() -> None:
    x, weight = torch.randn(64, 192), torch.randn(160, 192)
    assert is_onednn_faster(x, weight) and not is_onednn_faster(x, weight.as_subclass(Kept))


def test_a_gradient_can_be_differentiated_again() -> None:
    ours, theirs = layers()
    x, found = torch.randn(64, 192, requires_grad=True), []
    for layer in (ours, theirs):
        (first,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), [x, layer.weight]))
    for mine, other in zip(*found):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-3)


def refused() -> dict[str, tuple[Tensor, Tensor]]:
    x, weight = torch.randn(64, 192), torch.randn(160, 192)
    return {
        "few operations": (torch.randn(MIN_MULTIPLICATIONS // weight.numel(), 192), weight),
        "another dtype": (x.bfloat16(), weight.bfloat16()),
        "a vector": (torch.randn(MIN_MULTIPLICATIONS), torch.randn(1, MIN_MULTIPLICATIONS)),
        "no memory": (x.to("meta"), weight.to("meta")),
        "no rows": (x[:0], weight),
    }


@pytest.mark.parametrize("what", refused())
def test_torch_multiplies_what_is_nothing_for_onednn(what: str) -> None:
    x, weight = refused()[what]
    assert not is_onednn_faster(x, weight)


def test_torch_multiplies_where_onednn_is_off_and_under_autocast() -> None:
    ours, theirs = layers()
    x = torch.randn(64, 192)
    with without_onednn():
        assert not is_onednn_faster(x, ours.weight) and torch.equal(ours(x), theirs(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x).dtype == torch.bfloat16


def test_a_foreign_model_keeps_its_weights_and_its_other_layers() -> None:
    class Other(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(192, 160), nn.GELU(), Other(160, 8), nn.Conv2d(1, 1, 1))
    before, names = copy.deepcopy(model), list(model.state_dict())
    assert use_onednn_linear(model) is model
    assert [type(layer) for layer in model] == [Linear, nn.GELU, Other, nn.Conv2d]
    assert list(model.state_dict()) == names and all(
        torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters())
    )
    x = torch.randn(64, 192)
    torch.testing.assert_close(model[0](x), before[0](x), rtol=1e-4, atol=1e-4)


def test_a_prior_draws_and_learns_as_with_torchs_products() -> None:
    torch.manual_seed(0)
    prior = Prior(256, 256, 20, 256, 2, 4)
    text = TextEncoding(torch.randn(8, 256), torch.randn(8, 12, 256), torch.arange(12) < torch.arange(5, 13)[:, None])
    x, t, found = torch.randn(8, 256), torch.full((8,), 300), []
    for context in (nullcontext, without_onednn):
        with context():
            loss = prior(x, t, text).square().mean()
            gradients = torch.autograd.grad(loss, list(prior.blocks.parameters()))
            with torch.no_grad():
                found.append([loss, *gradients, prior.step(x, t, prior.prepare(text, torch.tensor([300])))])
    for mine, other in zip(*found):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5)
    assert not torch.equal(found[0][-1], found[1][-1]), "both were torch's"


def test_products_of_onednn_are_counted() -> None:
    x, weight = torch.randn(64, 192), torch.randn(160, 192)
    expected = 2 * 64 * 192 * 160
    assert count_operations(lambda: multiply_by_onednn(x, weight)) == expected
    assert count_operations(lambda: F.linear(x, weight)) == expected


def test_the_switch_of_the_fast_paths_leaves_products_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = layers()
    x = torch.randn(64, 192)
    assert is_onednn_faster(x, ours.weight)
    monkeypatch.setattr(fast_paths, "enabled", False)
    assert not is_onednn_faster(x, ours.weight) and torch.equal(ours(x), theirs(x))
