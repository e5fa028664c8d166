"""Linear layers alone: `t2i.networks.linear`, by oneDNN, beside torch's own, on the layers of a prior and the same
weights."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.side_by_side import Row, alternate, device, difference, flops, relative_difference, row, run
from t2i.networks.linear import use_onednn_linear

WIDTH, DEPTH = 768, 12
ROWS = (4, 64, 512)  # 4: one prompt with guidance, two tokens a step


def main(quick: bool) -> list[Row]:
    width, depth, rounds = (256, 1, 1) if quick else (WIDTH, DEPTH, 9)
    torch.manual_seed(0)
    theirs = nn.ModuleList(layer for _ in range(depth) for layer in block(width)).to(device())
    ours = use_onednn_linear(copy.deepcopy(theirs))
    rows = []
    for count in ROWS:
        x = torch.randn(count, 4 * width, device=device())
        what = f"{len(ours)} linear layers of a prior {depth} x {width}, {count} rows"
        for title, work in {what: forward, f"{what}, with gradients": backward}.items():
            rows.append(compare(title, work, ours, theirs, x, rounds))
    return rows


def block(width: int) -> list[nn.Linear]:
    sizes = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    return [nn.Linear(into, out) for into, out in sizes]


def compare(
    what: str,
    work: Callable[..., dict[str, Tensor]],
    ours: nn.ModuleList,
    theirs: nn.ModuleList,
    x: Tensor,
    n: int,
) -> Row:
    works = {"ours": partial(work, ours, x), "torch": partial(work, theirs, x)}
    found = {name: one(keep=True) for name, one in works.items()}
    if work is forward:
        worst = max(difference(out, found["torch"][name]) for name, out in found["ours"].items())
    else:
        worst = relative_difference(found["ours"], found["torch"])
    found.clear()
    counts = dict.fromkeys(works, flops(works["torch"]))
    return row(what, alternate(works, rounds=n), None, worst, counts)


def of_width(x: Tensor, width: int) -> Tensor:
    """As many rows of the same random numbers, contiguous as a network's are."""
    return x.view(-1)[: len(x) * width].view(len(x), width)


@torch.no_grad()
def forward(layers: nn.ModuleList, x: Tensor, keep: bool = False) -> dict[str, Tensor]:
    """Outputs by layer, if they are to be kept."""
    kept = {}
    for i, layer in enumerate(layers):
        out = layer(of_width(x, layer.in_features))
        if keep:
            kept[str(i)] = out
    return kept


def backward(layers: nn.ModuleList, x: Tensor, keep: bool = False) -> dict[str, Tensor]:
    """Gradients of weights, biases and inputs for the output's gradient x, if they are to be kept."""
    layers.zero_grad()
    kept = {}
    for i, layer in enumerate(layers):
        rows = of_width(x, layer.in_features).detach().requires_grad_(True)
        layer(rows).backward(of_width(x, layer.out_features))
        if keep and rows.grad is not None:
            kept[f"input {i}"] = rows.grad
    if keep:
        kept |= {name: one.grad.clone() for name, one in layers.named_parameters() if one.grad is not None}
    return kept


if __name__ == "__main__":
    run("linear_layers", main)
