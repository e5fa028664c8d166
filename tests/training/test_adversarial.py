"""The autoencoder against a discriminator: losses in closed form, and a run of two models that keeps all promises."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from t2i.training import train_autoencoder
from t2i.training.common.checkpoint import CHECKPOINT_MANIFEST
from t2i.training.common.loop import Critic, Stage, build_accelerator, fit
from torch.optim import AdamW
from torchvision.transforms.v2.functional import gaussian_blur

from t2i.config import DataConfig, TrainConfig, load_config
from t2i.data import CaptionedPictures, iterate_batches
from t2i.errors import InputError
from t2i.files.atomic import compute_file_sha256
from t2i.interop.by_name import load_autoencoder, load_clip
from t2i.networks.clip import CLIP
from t2i.networks.discriminator import Discriminator, compute_adaptive_weight, compute_frozen_logits, compute_hinge_loss
from t2i.networks.perceptual import PerceptualDistance
from tests.faults.tiny_run import SETTINGS, Layers, Numbers
from tests.helpers.stages import arguments, train

SMALL = {"width": 8, "depth": 1}
ADVERSARIAL = {"adversarial_weight": 0.5, "discriminator.width": 8, "discriminator.depth": 1}


def weights(folder: Path) -> bytes:
    return (folder / "model" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_the_hinge_loss_asks_for_logits_beyond_one_and_no_more():
    real, fake = torch.tensor([2.0, 1.0, 0.25]), torch.tensor([-3.0, -1.0, 0.5])
    assert compute_hinge_loss(real, fake).item() == pytest.approx((0.75 / 3 + 1.5 / 3) / 2)
    assert compute_hinge_loss(real[:2], fake[:2]) == 0
    assert compute_hinge_loss(torch.zeros(4), torch.zeros(4)) == 1  # one that cannot tell


def test_the_adaptive_weight_is_the_ratio_of_the_gradients_at_the_last_layer():
    last, a, b = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4), torch.randn(3, 4)
    weight = compute_adaptive_weight(3 * (last * a).sum(), -0.5 * (last * b).sum(), last)
    assert weight.item() == pytest.approx(6 * a.norm().item() / b.norm().item(), rel=1e-4)
    assert not weight.requires_grad and last.grad is None
    assert compute_adaptive_weight((last * a).sum(), 0 * last.sum(), last) == 1e4  # and not infinite


def test_frozen_logits_move_the_picture_and_not_the_discriminator():
    discriminator, image = Discriminator(**SMALL), torch.randn(2, 3, 32, 32, requires_grad=True)
    logits = compute_frozen_logits(discriminator, image)
    logits.sum().backward()
    assert all(one.grad is None for one in discriminator.parameters())
    found, image.grad = image.grad.clone(), None
    expected = discriminator(image)
    expected.sum().backward()
    assert torch.equal(logits, expected) and torch.equal(found, image.grad) and found.abs().sum() > 0


def test_a_verdict_does_not_depend_on_the_batch_and_all_state_is_weights():
    discriminator = Discriminator(width=16, depth=3)
    assert not list(discriminator.buffers())
    image = torch.randn(4, 3, 64, 64)
    together = discriminator(image)
    assert together.shape == (4, 1, 6, 6)  # 64 / 2**3, and one less for each convolution at full step
    assert torch.allclose(together[2:3], discriminator(image[2:3]), atol=1e-5)
    smallest = discriminator.min_image_size
    assert discriminator(torch.randn(1, 3, smallest, smallest)).shape == (1, 1, 1, 1)


def test_the_perceptual_distance_is_zero_for_the_same_picture_and_grows_with_blur(runs, shapes):
    perceptual = PerceptualDistance(load_clip(runs / "clip"))
    image = CaptionedPictures(DataConfig(str(shapes), 32)).__getitems__([(i, 0) for i in range(6)]).image
    blurred = [gaussian_blur(image, [9, 9], [sigma, sigma]) for sigma in (0.6, 1.2, 2.4)]
    distances = torch.stack([perceptual(one, image) for one in (image, *blurred)])
    assert torch.equal(distances[0], torch.zeros(6))
    assert (distances.diff(dim=0) > 0).all() and (distances < 4).all()
    assert torch.equal(perceptual(image, blurred[1]), perceptual(blurred[1], image))
    assert torch.allclose(perceptual(blurred[2][:1], image[:1]), distances[3, :1], atol=1e-6)


def test_a_perceptual_network_is_frozen_and_lets_gradients_through(runs):
    perceptual = PerceptualDistance(load_clip(runs / "clip")).train()
    image = torch.rand(2, 3, 32, 32, requires_grad=True)
    perceptual(image, torch.rand(2, 3, 32, 32)).sum().backward()
    assert image.grad.abs().sum() > 0 and not perceptual.clip.training
    assert all(one.grad is None for one in perceptual.parameters())


def test_a_convolutional_tower_tells_its_layers_too():
    vision, text = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}, {"vocab_size": 99, "width": 32, "layers": 1}
    model = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": {**text, "context_length": 8, "heads": 2}}
    perceptual = PerceptualDistance(CLIP(model, {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3}))
    image = torch.rand(2, 3, 32, 32)
    assert len(perceptual.extract_layer_features(image)) == 5  # its stem and four stages
    assert perceptual(image, image).tolist() == [0, 0] and (perceptual(image, image.flip(3)) > 0).all()


def test_one_pass_trains_both_models_as_two_optimizers_in_turn_do(shapes, runs, tmp_path):
    """The oracle: VQGAN's own way, each loss with its own backward pass and its own Adam."""
    settings = {**ADVERSARIAL, "perceptual_weight": 2.0, "perceptual_clip": runs / "clip", "train.ema_decay": 0}
    settings |= {"adversarial_start": 1, "kl_weight": 0.01, "train.max_grad_norm": 1e9}
    train("autoencoder", shapes, tmp_path, 4, **settings)
    found = load_file(tmp_path / "autoencoder/checkpoints/step-00000004/model.safetensors")
    critic = load_file(tmp_path / "autoencoder/checkpoints/step-00000004/critic.safetensors")

    config = load_config(
        train_autoencoder.Config, "autoencoder", arguments("autoencoder", shapes, tmp_path, 4, **settings)
    )
    torch.manual_seed(config.train.seed)
    model = train_autoencoder.Autoencoder(**config.model).to(memory_format=torch.channels_last)
    discriminator, perceptual = Discriminator(**SMALL), PerceptualDistance(load_clip(runs / "clip"))
    optimizers = [
        AdamW([{"params": [p for p in net.parameters() if p.ndim > 1], "weight_decay": config.train.weight_decay},
               {"params": [p for p in net.parameters() if p.ndim <= 1], "weight_decay": 0.0}],
              lr=config.train.learning_rate, betas=betas)
        for net, betas in ((model, (0.9, config.train.adam_beta2)), (discriminator, (0.5, 0.9)))
    ]  # fmt: skip
    begun = [{name: value.clone() for name, value in net.state_dict().items()} for net in (model, discriminator)]
    loader = iterate_batches(CaptionedPictures(config.data), 0, batch_size=8, seed=0)
    last = model.coder.decoder.conv_out.weight
    for step in range(4):
        image = next(loader).image
        torch.manual_seed(step)
        reconstruction, kl = model(image)
        likeness = (reconstruction - image).abs().mean() + 2 * perceptual(reconstruction, image).mean()
        loss = likeness + 0.01 * kl.mean()
        if step >= 1:
            verdict = -discriminator(reconstruction).mean()
            norms = [torch.autograd.grad(one, last, retain_graph=True)[0].norm() for one in (likeness, verdict)]
            loss = loss + 0.5 * (norms[0] / norms[1]) * verdict
        optimizers[0].zero_grad()
        loss.backward()
        optimizers[1].zero_grad()
        compute_hinge_loss(discriminator(image), discriminator(reconstruction.detach())).backward()
        for optimizer in optimizers:
            optimizer.step()
    # Compared by how far each model went: where a gradient is zero, Adam makes steps of its rounding.
    for net, start_of, end in ((model, begun[0], found), (discriminator, begun[1], critic)):
        off = sum((end[name] - value).square().sum() for name, value in net.state_dict().items())
        went = sum((start_of[name] - value).square().sum() for name, value in net.state_dict().items())
        assert went > 0.01 and off < 1e-4 * went


def test_a_frozen_encoder_gives_the_same_latents_bit_for_bit(shapes, runs, tmp_path):
    settings = {**ADVERSARIAL, "init": runs / "autoencoder", "freeze_encoder": True, "train.learning_rate": 1e-2}
    train("autoencoder", shapes, tmp_path, 3, **settings)
    before, after = load_autoencoder(runs / "autoencoder"), load_autoencoder(tmp_path / "autoencoder")
    image = torch.rand(4, 3, 32, 32) * 2 - 1
    latents = before.encode(image)
    assert torch.equal(latents, after.encode(image))
    assert not torch.allclose(before.decode(latents), after.decode(latents), atol=1e-3)
    train("autoencoder", shapes, tmp_path / "free", 3, **{**settings, "freeze_encoder": False})
    assert not torch.allclose(latents, load_autoencoder(tmp_path / "free/autoencoder").encode(image), atol=1e-3)


def test_a_run_with_a_discriminator_resumes_bit_for_bit(shapes, runs, tmp_path):
    settings = {**ADVERSARIAL, "adversarial_start": 3, "perceptual_weight": 1.0, "perceptual_clip": runs / "clip"}
    settings |= {"train.save_every": 2, "train.gradient_accumulation": 2, "train.batch_size": 6, "train.keep": 9}
    train("autoencoder", shapes, tmp_path, 6, **settings)
    folder = tmp_path / "autoencoder"
    expected, last = weights(folder), folder / "checkpoints/step-00000006"
    critic = (last / "critic.safetensors").read_bytes()
    shutil.rmtree(folder / "model")
    for later in ("step-00000004", "step-00000006"):
        shutil.rmtree(folder / "checkpoints" / later)
    train("autoencoder", shapes, tmp_path, 6, **settings)
    assert weights(folder) == expected
    assert (last / "critic.safetensors").read_bytes() == critic
    # The control: from another critic the run becomes another one, so the comparison can fail.
    for later in ("step-00000004", "step-00000006"):
        shutil.rmtree(folder / "checkpoints" / later)
    train("autoencoder", shapes, tmp_path / "other", 2, **settings, **{"train.seed": 1})
    other = tmp_path / "other/autoencoder/checkpoints/step-00000002/critic.safetensors"
    shutil.copy(other, folder / "checkpoints/step-00000002/critic.safetensors")
    write_manifest(folder / "checkpoints/step-00000002")
    train("autoencoder", shapes, tmp_path, 6, **settings)
    assert weights(folder) != expected


def write_manifest(checkpoint: Path) -> None:
    manifest = {
        path.name: compute_file_sha256(path)
        for path in sorted(checkpoint.iterdir())
        if path.name != CHECKPOINT_MANIFEST
    }
    (checkpoint / CHECKPOINT_MANIFEST).write_text(json.dumps(manifest))


def test_a_checkpoint_from_before_an_option_goes_on_with_it_off_and_not_with_it_on(shapes, tmp_path):
    train("autoencoder", shapes, tmp_path, 2)
    checkpoint = tmp_path / "autoencoder/checkpoints/step-00000002"
    state = json.loads((checkpoint / "state.json").read_text())
    for name in ("freeze_encoder", "discriminator", *(key for key in state["stage"] if "adversarial" in key)):
        del state["stage"][name]
    (checkpoint / "state.json").write_text(json.dumps(state))
    write_manifest(checkpoint)
    train("autoencoder", shapes, tmp_path, 3)
    shutil.rmtree(tmp_path / "autoencoder/checkpoints/step-00000003")
    with pytest.raises(InputError, match="was trained with adversarial_weight=None, now 0.5"):
        train("autoencoder", shapes, tmp_path, 4, adversarial_weight=0.5)


def test_a_step_whose_critic_alone_is_not_finite_is_skipped_for_both(tmp_path):
    config = TrainConfig(output=str(tmp_path), **{**SETTINGS, "steps": 3})
    accelerator = build_accelerator(config)
    critic, model, seen = Critic(torch.nn.Linear(8, 1), (0.5, 0.9)), Layers(), []

    def loss(model, batch):
        seen.append([one.detach().clone() for one in (*model.parameters(), *critic.model.parameters())])
        factor = 1e30 if critic.step == 1 else 1.0  # a loss that is finite, with a gradient whose norm is not
        return {
            "loss": (model(batch.image) - batch.image).square().mean(),
            "critic_loss": (critic.model(batch.image) - 1).square().mean() * factor,
        }

    fit(accelerator, Stage(model, loss, Numbers(), lambda model: None, {}, {}, critic=critic), config)
    equal = [[torch.equal(a, b) for a, b in zip(*pair)] for pair in zip(seen, seen[1:])]
    assert not any(equal[0]) and all(equal[1])
    (row,) = map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())
    assert row["step"] == 2 and row["not_finite"] == "gradient"


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"freeze_encoder": True}, "freeze_encoder=true needs init"),
        ({"perceptual_weight": 1}, "perceptual_weight=1 needs perceptual_clip"),
        ({"adversarial_weight": -1}, "adversarial_weight must be from 0"),
        ({"adversarial_weight": 1, "train.compile": True}, "adversarial_fixed=true"),
        (
            {"adversarial_weight": 1, "discriminator.depth": 5},
            "data.image_size=32 is smaller than a patch of this discriminator",
        ),
        ({"adversarial_weight": 1, "discriminator.width": 12}, "discriminator.width must be a multiple of 8, got 12"),
        ({"adversarial_weight": 1, "discriminator.layers": 3}, "discriminator is not valid for Discriminator"),
    ],
)
def test_what_does_not_go_together_is_refused_before_any_work(settings, message, shapes, tmp_path):
    with pytest.raises(InputError, match=message):
        train("autoencoder", shapes, tmp_path, 1, **settings)
    assert not (tmp_path / "autoencoder/checkpoints").exists()
