"""How fast a prior trains beside diffusers', with the same weights, and dalle2-pytorch's, of as many parameters.

Ours is the training loop's own step: loss, gradient clipping, checks that all is finite, fused AdamW, moving average.

- diffusers: the step of its examples/kandinsky2_2 (train_text_to_image_prior.py): noise, PriorTransformer, squared
  error, clipping, `torch.optim.AdamW`; captions padded to 77 tokens, as its tokenizer does. No moving average.
- dalle2-pytorch: `DiffusionPrior`'s loss, backward, clipping and `torch.optim.AdamW`, which is what its
  DiffusionPriorTrainer does, without that trainer: it adds a moving average and warm-up by libraries of its own, which
  cost time and change nothing of the step. Captions padded to 77 tokens, as it does.

The loss and all gradients of the same weights agree before anything is timed, each tensor relative to the largest value
in the peer's. Each step has other captions than the one before. Peers do without an average: in their favour.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from t2i.training.common.loop import build_accelerator
from t2i.training.train_prior import Config, build_stage
from torch import Tensor, nn

from benchmarks.peers import dalle2_pytorch, is_there
from benchmarks.side_by_side import Row, Work, alternate, difference, relative_difference, row, run
from benchmarks.training_step import QUIET, MadeUp, Steps
from t2i.config import load_config
from t2i.diffusion.condition import TextEncoding
from t2i.diffusion.process import compute_prediction_target
from t2i.interop.prior_transformer import map_tensor_names, to_prior_transformer
from t2i.networks.prior import Prior

BATCH, WIDTH, DEPTH = 64, 512, 6
EXAMPLE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}


def main(quick: bool) -> list[Row]:
    batch, width, depth = (4, 64, 2) if quick else (BATCH, WIDTH, DEPTH)
    torch.manual_seed(0)
    rows, peers = [], ("diffusers", "dalle2-pytorch") if is_there() else ("diffusers",)
    captions = {"captions of 5 to 20 tokens": (5, 20, 4.0, 3), "captions of 77 tokens": (77, 77, 1.2, 7)}
    for what, (shortest, longest, wanted, rounds) in captions.items():
        source = MadeUp([shortest + i % (longest - shortest + 1) for i in range(batch)], width=width)
        for peer in peers:
            deeper = depth if peer == "diffusers" else depth + depth // 6  # its layers are larger
            ours, prior = our_step(source, width, deeper)
            if peer == "diffusers":
                theirs, parameters, worst = diffusers_step(source, prior)
            else:
                theirs, parameters, worst = *dalle2_step(source, width, depth), None
            counts = {"ours": ours.operations(min(8, len(source.batches)))}
            times = alternate({"ours": ours, peer: theirs}, rounds=1 if quick else rounds)
            mine = sum(one.numel() for one in prior.parameters())
            note = (
                f"{mine / 1e6:.1f} M parameters, {deeper} x {width}; theirs {parameters / 1e6:.1f} M, {depth} x {width}"
            )
            title = f"prior training step, batch {batch}, {what}"
            rows.append(row(title, times, wanted, worst, counts, note=f"fp32, {note}"))
    return rows


def our_step(source: MadeUp, width: int, depth: int) -> tuple[Steps, Prior]:
    """The loop's step on a new prior: no caption is dropped, for the peers drop none."""
    model = [f"model.width={width}", f"model.depth={depth}", f"model.heads={width // 64}"]
    batch = [f"train.batch_size={len(source.batches[0].index)}", "train.mixed_precision=no", "train.steps=100"]
    schedule = [f"scheduler.{name}={value}" for name, value in EXAMPLE.items()]
    config = load_config(Config, "prior", ["clip=made up", *QUIET, *model, *batch, *schedule, "caption_dropout=0"])
    accelerator = build_accelerator(config.train)
    stage = build_stage(config, source, accelerator.device)  # type: ignore[arg-type]
    step = Steps(accelerator, stage, config.train)
    return step, stage.model


def diffusers_step(source: MadeUp, prior: Prior) -> tuple[Work, int, float]:
    """Its step, its parameters, and how far its loss and gradients are from ours with the same noise."""
    theirs = trained(to_prior_transformer(prior), prior.device)
    scheduler = DDPMScheduler(**EXAMPLE)
    batches = cycled(source, prior.device)

    def loss() -> Tensor:
        text, z_i = next(batches)
        x = (z_i - theirs.clip_mean) / theirs.clip_std
        noise = torch.randn_like(x)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x),), device=x.device)
        given = text.embedding, text.states, text.mask
        return F.mse_loss(theirs(scheduler.add_noise(x, noise, t), t, *given).predicted_image_embedding, x)

    first = source.batches[0].to(prior.device)
    our_text, our_z_i = first.text, first.image_embeds
    assert our_text is not None and our_z_i is not None

    def our_loss() -> Tensor:
        x = prior.scale_image_embeds(our_z_i)
        noise = torch.randn_like(x)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x),), device=x.device)
        return F.mse_loss(
            prior(scheduler.add_noise(x, noise, t), t, our_text), compute_prediction_target(scheduler, x, noise, t)
        )

    worst = compared(prior, our_loss, theirs, loss)
    return optimized(theirs, loss), sum(one.numel() for one in theirs.parameters()), worst


def compared(prior: Prior, our_loss: Callable[[], Tensor], theirs: nn.Module, loss: Callable[[], Tensor]) -> float:
    """The largest difference of losses and of all gradients of our parameters, with the same noise."""
    found = []
    for model, one in ((prior, our_loss), (theirs, loss)):
        torch.manual_seed(1)
        value = one()
        value.backward()
        given = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        model.zero_grad()
        found.append((value.detach(), given))
    (mine, gradients), (other, others) = found
    return max(difference(mine, other), relative_difference(gradients, in_our_names(prior, gradients, others)))


def in_our_names(prior: Prior, gradients: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """diffusers' gradients as ours are: queries, keys and values in one, and for z_t of unit length."""
    names = {
        ours: parts
        for ours, parts in map_tensor_names(prior.config.depth).items()
        if parts[0] not in ("clip_mean", "clip_std")
    }
    found = {ours: torch.cat([theirs[part].flatten() for part in parts]) for ours, parts in names.items()}
    if prior.config.unit_length:  # there the weight has the scale of z_t, here z_t itself
        found["from_text.weight"] *= prior.config.embed_dim**0.5
    return {name: one.view_as(gradients[name]) for name, one in found.items()}


def cycled(source: MadeUp, device: torch.device) -> Iterator[tuple[TextEncoding, Tensor]]:
    """The same batches, padded ahead to 77 tokens: encodings of captions, and z_i."""
    made = []
    for batch in source.batches:
        text, z_i = batch.text, batch.image_embeds
        assert text is not None and z_i is not None
        missing = 77 - text.mask.shape[1]
        states, mask = F.pad(text.states, (0, 0, 0, missing)), F.pad(text.mask, (0, missing))
        made.append((TextEncoding(text.embedding, states, mask).to(device), z_i.to(device)))
    return itertools.cycle(made)


def dalle2_step(source: MadeUp, width: int, depth: int) -> tuple[Work, int]:
    """Its step and its parameters."""
    peer = dalle2_pytorch()
    net = peer.DiffusionPriorNetwork(
        dim=width, depth=depth, dim_head=64, heads=width // 64, max_text_len=77, num_timesteps=1000
    )
    model = peer.DiffusionPrior(net, image_embed_dim=width, timesteps=1000, cond_drop_prob=0.0)
    model = trained(model, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    batches = cycled(source, next(model.parameters()).device)

    def loss() -> Tensor:
        text, z_i = next(batches)
        return model(text_embed=text.embedding, text_encodings=text.states, image_embed=z_i)

    return optimized(model, loss), sum(one.numel() for one in model.parameters())


def trained(model: Any, device: torch.device) -> Any:
    return model.to(device).train().requires_grad_(True)


def optimized(model: nn.Module, loss: Any) -> Work:
    """A step as both peers' trainers do it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)

    def step() -> None:
        loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    run("training_speed", main)
