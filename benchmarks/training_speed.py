"""A training step of a prior against diffusers' with the same weights, and dalle2-pytorch's of as many parameters.

    python -m benchmarks.training_speed [--quick]

Ours is the training loop's own step: loss, gradient clipping, checks that all is finite, fused AdamW, moving average.

- diffusers: the step of its examples/kandinsky2_2 (train_text_to_image_prior.py): noise, PriorTransformer, squared
  error, clipping, `torch.optim.AdamW`; captions padded to 77 tokens, as its tokenizer does. No moving average.
- dalle2-pytorch: `DiffusionPrior`'s loss, backward, clipping and `torch.optim.AdamW`, as its DiffusionPriorTrainer has
  them, but without that trainer's moving average and warm-up. Captions padded to 77 tokens, as it does.

The loss and all gradients of the same weights agree before anything is timed, each tensor relative to the largest value
of the peer's. Each step has other captions than the one before. Peers have no moving average, which is in their favour.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from t2i.training.common.loop import build_accelerator
from t2i.training.train_prior import Config, build_stage
from torch import Tensor, nn

from benchmarks.peers import has_dalle2_pytorch, import_dalle2_pytorch
from benchmarks.report import run
from benchmarks.side_by_side import Row, Work, build_row, check_all_equal, check_equal, device, time_in_turns
from benchmarks.training_step import QUIET, RandomEncodings, Steps
from t2i.config import load_config
from t2i.diffusion.condition import TextEncoding
from t2i.diffusion.process import compute_prediction_target
from t2i.interop.prior_transformer import map_tensor_names, to_prior_transformer
from t2i.networks.prior import Prior

BATCH, WIDTH, DEPTH = 64, 512, 6
SCHEDULE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "sample"}  # of diffusers' example
CAPTIONS = {  # shortest and longest, the ratio that is wanted, rounds
    "captions of 5 to 20 tokens": (5, 20, 4.0, 3),
    "captions of 77 tokens": (77, 77, 1.2, 7),
}


def main(quick: bool) -> list[Row]:
    batch, width, depth = (4, 64, 2) if quick else (BATCH, WIDTH, DEPTH)
    torch.manual_seed(0)
    rows, peers = [], ("diffusers", "dalle2-pytorch") if has_dalle2_pytorch() else ("diffusers",)
    for captions, (shortest, longest, at_least, rounds) in CAPTIONS.items():
        lengths = [shortest + i % (longest - shortest + 1) for i in range(batch)]
        source = RandomEncodings(lengths, width=width)
        for name in peers:
            our_depth = depth if name == "diffusers" else depth + depth // 6  # dalle2-pytorch's layers are larger
            ours, prior = build_our_step(source, width, our_depth)
            if name == "diffusers":
                peer, peer_size, worst = build_diffusers_step(source, prior)
            else:
                peer, peer_size, worst = *build_dalle2_step(source, width, depth), None
            counts = {"ours": ours.count_operations(min(8, len(source.batches)))}
            seconds = time_in_turns({"ours": ours, name: peer}, rounds=1 if quick else rounds)
            sizes = f"{count_parameters(prior) / 1e6:.1f} M parameters, {our_depth} x {width}"
            note = f"fp32, {sizes}; peer {peer_size / 1e6:.1f} M, {depth} x {width}"
            what = f"prior training step, batch {batch}, {captions}"
            rows.append(build_row(what, seconds, at_least, counts, difference=worst, note=note))
    return rows


def build_our_step(source: RandomEncodings, width: int, depth: int) -> tuple[Steps, Prior]:
    """Return the loop's step on a new prior. It drops no caption, for the peers drop none."""
    model = [f"model.width={width}", f"model.depth={depth}", f"model.heads={width // 64}", "caption_dropout=0"]
    batch = [f"train.batch_size={len(source.batches[0].index)}", "train.mixed_precision=no", "train.steps=100"]
    schedule = [f"scheduler.{name}={value}" for name, value in SCHEDULE.items()]
    config = load_config(Config, "prior", ["clip=random", *QUIET, *model, *batch, *schedule])
    accelerator = build_accelerator(config.train)
    stage = build_stage(config, source, accelerator.device)  # type: ignore[arg-type]
    step = Steps(accelerator, stage, config.train)
    return step, stage.model


def build_diffusers_step(source: RandomEncodings, prior: Prior) -> tuple[Work, int, float]:
    """Return its step, its parameters, and the largest difference of its loss and gradients from ours."""
    peer = to_prior_transformer(prior).to(device()).train().requires_grad_(True)
    scheduler = DDPMScheduler(**SCHEDULE)
    batches = cycle_padded(source)

    def compute_loss() -> Tensor:
        text, z_i = next(batches)
        x = (z_i - peer.clip_mean) / peer.clip_std
        noise = torch.randn_like(x)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x),), device=x.device)
        noisy = scheduler.add_noise(x, noise, t)
        return F.mse_loss(peer(noisy, t, text.embedding, text.states, text.mask).predicted_image_embedding, x)

    first = source.batches[0].to(prior.device)
    our_text, our_z_i = first.text, first.image_embeds
    assert our_text is not None and our_z_i is not None

    def compute_our_loss() -> Tensor:
        x = prior.scale_image_embeds(our_z_i)
        noise = torch.randn_like(x)
        t = torch.randint(0, scheduler.config.num_train_timesteps, (len(x),), device=x.device)
        target = compute_prediction_target(scheduler, x, noise, t)
        return F.mse_loss(prior(scheduler.add_noise(x, noise, t), t, our_text), target)

    worst = compare_losses(prior, compute_our_loss, peer, compute_loss)
    return optimize(peer, compute_loss), count_parameters(peer), worst


def compare_losses(
    prior: Prior, our_loss: Callable[[], Tensor], peer: nn.Module, peer_loss: Callable[[], Tensor]
) -> float:
    """Return the largest difference of the losses and of all gradients of our parameters, with the same noise."""
    results = []
    for model, compute in ((prior, our_loss), (peer, peer_loss)):
        torch.manual_seed(1)
        loss = compute()
        loss.backward()
        gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
        model.zero_grad()
        results.append((loss.detach(), gradients))
    (mine, my_gradients), (other, other_gradients) = results
    renamed = rename_gradients(prior, my_gradients, other_gradients)
    return max(check_equal(mine, other), check_all_equal(my_gradients, renamed))


def rename_gradients(prior: Prior, ours: Mapping[str, Tensor], peer: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return diffusers' gradients by our names: queries, keys and values in one tensor, z_t of unit length."""
    renamed = {}
    for name, parts in map_tensor_names(prior.config.depth).items():
        if parts[0] not in ("clip_mean", "clip_std"):
            renamed[name] = torch.cat([peer[part].flatten() for part in parts]).view_as(ours[name])
    if prior.config.unit_length:  # there the weight has the scale of z_t, here z_t itself
        renamed["from_text.weight"] *= prior.config.embed_dim**0.5
    return renamed


def cycle_padded(source: RandomEncodings) -> Iterator[tuple[TextEncoding, Tensor]]:
    """Repeat the batches of `source`, padded to 77 tokens ahead: encodings of captions, and z_i."""
    padded = []
    for batch in source.batches:
        text, z_i = batch.text, batch.image_embeds
        assert text is not None and z_i is not None
        missing = 77 - text.mask.shape[1]
        states, mask = F.pad(text.states, (0, 0, 0, missing)), F.pad(text.mask, (0, missing))
        padded.append((TextEncoding(text.embedding, states, mask).to(device()), z_i.to(device())))
    return itertools.cycle(padded)


def build_dalle2_step(source: RandomEncodings, width: int, depth: int) -> tuple[Work, int]:
    """Return its step and its parameters."""
    package = import_dalle2_pytorch()
    sizes = {"dim": width, "depth": depth, "dim_head": 64, "heads": width // 64}
    net = package.DiffusionPriorNetwork(max_text_len=77, num_timesteps=1000, **sizes)
    model = package.DiffusionPrior(net, image_embed_dim=width, timesteps=1000, cond_drop_prob=0.0)
    model.to(device()).train()
    batches = cycle_padded(source)

    def compute_loss() -> Tensor:
        text, z_i = next(batches)
        return model(text_embed=text.embedding, text_encodings=text.states, image_embed=z_i)

    return optimize(model, compute_loss), count_parameters(model)


def count_parameters(model: nn.Module) -> int:
    return sum(each.numel() for each in model.parameters())


def optimize(model: nn.Module, compute_loss: Callable[[], Tensor]) -> Work:
    """Return an optimizer step as the trainers of both peers have it."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.01)

    def step() -> None:
        compute_loss().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


if __name__ == "__main__":
    run("training_speed", main)
