"""Linear layers alone: `t2i.linear`, by oneDNN, beside torch's own, on the layers of a prior and the same weights."""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.side_by_side import Row, alternate, device, difference, flops, row, run
from t2i.linear import by_onednn

WIDTH, DEPTH = 768, 12
ROWS = (4, 64, 512)  # 4: one prompt with guidance, two tokens a step


def main(quick: bool) -> list[Row]:
    width, depth, rounds = (256, 1, 1) if quick else (WIDTH, DEPTH, 9)
    torch.manual_seed(0)
    theirs = nn.ModuleList(layer for _ in range(depth) for layer in block(width)).to(device())
    ours = by_onednn(copy.deepcopy(theirs))
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
    work: Callable[[nn.ModuleList, Tensor], Tensor],
    ours: nn.ModuleList,
    theirs: nn.ModuleList,
    x: Tensor,
    n: int,
) -> Row:
    works = {"ours": partial(work, ours, x), "torch": partial(work, theirs, x)}
    worst = difference(works["ours"](), works["torch"]())
    counts = dict.fromkeys(works, flops(works["torch"]))
    return row(what, alternate(works, rounds=n), None, worst, counts)


@torch.no_grad()
def forward(layers: nn.ModuleList, x: Tensor) -> Tensor:
    for layer in layers:
        out = layer(x[:, : layer.in_features])
    return out


def backward(layers: nn.ModuleList, x: Tensor) -> Tensor:
    """The last layer's gradient; all are computed."""
    layers.zero_grad()
    for layer in layers:
        rows = x[:, : layer.in_features].detach().requires_grad_(True)
        layer(rows).mean().backward()
    return layer.weight.grad


if __name__ == "__main__":
    run("linear_layers", main)
