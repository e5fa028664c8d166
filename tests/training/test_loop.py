"""Training: a run that stops and resumes is the unbroken run, on one process and on two."""

import itertools
import json
import math
import os
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from t2i.training.common.ema import EMA
from t2i.training.common.loop import suggest_less_memory
from t2i.training.common.optimizer import compute_learning_rate
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.training_step import build_steps
from t2i.config import TrainConfig
from t2i.data.manifest import write_manifest
from t2i.errors import InputError
from t2i.networks.layers import PackedSequences
from tests.helpers.processes.forked import ForkedProgram, run_program
from tests.helpers.stages import arguments, train

ROOT = Path(__file__).resolve().parents[2]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "diffusion_pytorch_model.safetensors").read_bytes()


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_rate_warms_up_stays_and_decays_to_zero():
    config = TrainConfig(output="x", steps=100, learning_rate=1.0, warmup_steps=10, decay_steps=20)
    rates = [compute_learning_rate(step, config) for step in range(100)]
    assert rates[:10] == [pytest.approx((i + 1) / 10) for i in range(10)]
    assert set(rates[10:80]) == {1.0}
    assert rates[89] == pytest.approx(0.5) and rates[-1] == pytest.approx(0, abs=1e-9)
    assert all(a >= b for a, b in itertools.pairwise(rates[80:]))


def test_what_takes_less_memory_is_as_many_samples_a_step():
    def advice(batch_size: int, accumulation: int = 1, checkpointing: bool = False) -> str:
        settings = {"batch_size": batch_size, "gradient_accumulation": accumulation}
        return suggest_less_memory(TrainConfig(output="x", **settings, gradient_checkpointing=checkpointing))

    for size in range(2, 50):
        fewer, often = map(int, re.findall(r"=(\d+)", advice(size, 3)))
        assert fewer * often == 3 * size and fewer <= size / 2
    assert advice(1, 8) == "the same samples a step take less with train.gradient_checkpointing=true"
    assert advice(9, checkpointing=True).endswith("with train.batch_size=3 train.gradient_accumulation=3")
    assert advice(1, checkpointing=True) == "use a smaller model"


class Asked(TorchDispatchMode):
    """Counts how often a value of a tensor is asked for: on a GPU each time waits for all that was begun there."""

    VALUES = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)  # of item() and of x[mask]

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        super().__init__()
        self.count, self.counts = 0, True
        tolist, of = torch.Tensor.tolist, PackedSequences.from_token_mask

        def listed(x):  # calls no operator
            self.count += self.counts
            return tolist(x)

        def packed(known):  # asks for lengths, on a processor alone
            self.counts = False
            try:
                return of(known)
            finally:
                self.counts = True

        monkeypatch.setattr(torch.Tensor, "tolist", listed)
        monkeypatch.setattr(PackedSequences, "from_token_mask", packed)

    def __torch_dispatch__(self, operator, types, arguments=(), options=None):
        self.count += self.counts and operator in self.VALUES
        return operator(*arguments, **(options or {}))


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_a_step_of_the_loop_asks_the_device_once(stage, monkeypatch):
    """In the verdict's exchange; one more, in the loss or around the optimizer, is found."""
    step = build_steps(f"configs/tiny/{stage}.yaml", ["train.mixed_precision=no"], lambda i: 5 + i % 3)
    loader, loss, update = step.loader, step.stage.loss, step.state.optimizer.step
    step.loader = itertools.repeat(next(loader))  # what reads the data does not count
    step()  # the optimizer's state is there from now on

    def asked() -> int:
        with pytest.MonkeyPatch.context() as patch, Asked(patch) as asked:
            step()
            step()
        return asked.count

    assert asked() == 2

    def curious_loss(model, batch):
        metrics = loss(model, batch)
        assert metrics["loss"].item() > 0
        return metrics

    step.stage.loss = curious_loss
    assert asked() == 4
    step.stage.loss = loss
    weight = next(step.state.model.parameters())
    monkeypatch.setattr(step.state.optimizer, "step", lambda: update() if weight.isfinite().all() else None)
    assert asked() == 4
    loader.close()
    step.watch.close()


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_a_loss_and_its_gradient_ask_the_device_for_no_value(stage):
    """On the meta device, whose tensors have none to give: `.item()` and what needs it raise there."""
    step = build_steps(f"configs/tiny/{stage}.yaml", ["train.mixed_precision=no"], lambda i: 5 + i % 3)
    model, batch = step.state.model.to("meta"), next(step.loader).to(torch.device("meta"))
    with pytest.raises(RuntimeError, match="meta"):
        float(batch.image_embeds.sum())
    loss = step.stage.loss(model, batch)["loss"]
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    EMA(model).update(0.9)
    step.health.add_micro_batch(batch, loss)
    assert loss.is_meta and norm.is_meta and all(one.grad.is_meta for one in model.parameters() if one.requires_grad)
    step.loader.close()
    step.watch.close()


@pytest.mark.filterwarnings("ignore:This DataLoader will create:UserWarning")  # on a machine with one core
@pytest.mark.parametrize("stage", ["autoencoder", "clip", "prior", "decoder"])
def test_a_run_resumed_in_mid_epoch_and_mid_pass_is_bit_identical(stage, shapes, runs, tmp_path):
    for name in ("unbroken", "broken"):
        (tmp_path / name).mkdir()
        for part in ("clip", "autoencoder"):
            if part != stage:
                shutil.copytree(runs / part, tmp_path / name / part)
    settings = {"train.save_every": 2, "train.gradient_accumulation": 2, "train.batch_size": 6, "train.keep": 9}
    train(stage, shapes, tmp_path / "unbroken", 5, **settings)
    expected = weights(tmp_path / "unbroken" / stage)
    train(stage, shapes, tmp_path / "broken", 5, **settings)
    folder = tmp_path / "broken" / stage
    for later in ("step-00000004", "step-00000005"):
        shutil.rmtree(folder / "checkpoints" / later)
    shutil.rmtree(folder / "model")
    train(stage, shapes, tmp_path / "broken", 5, **settings, **{"data.num_workers": 1})
    assert weights(folder) == expected
    # The control: another seed gives other weights, so the comparison can fail.
    train(stage, shapes, tmp_path / "broken", 5, **settings, **{"train.seed": 1, "train.output": tmp_path / "other"})
    assert weights(tmp_path / "other") != expected


def test_a_killed_run_resumes_bit_for_bit(shapes, tmp_path):
    """The real thing: SIGKILL between checkpoints, then the same command again."""
    settings = {"train.save_every": 3, "train.log_every": 1}
    script = ROOT / "training/train_autoencoder.py"
    process = ForkedProgram([script, *arguments("autoencoder", shapes, tmp_path / "broken", 400, **settings)])
    folder = tmp_path / "broken" / "autoencoder"
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or len(metrics(folder)) < 7:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = metrics(folder)[-1]["step"]
    steps = int(done) + 5
    train("autoencoder", shapes, tmp_path / "broken", steps, **settings)
    train("autoencoder", shapes, tmp_path / "unbroken", steps, **settings)
    assert weights(folder) == weights(tmp_path / "unbroken" / "autoencoder")


def test_a_damaged_checkpoint_is_skipped_by_name(shapes, tmp_path, capsys):
    settings = {"train.save_every": 2, "train.keep": 9}
    train("autoencoder", shapes, tmp_path, 4, **settings)
    expected = weights(tmp_path / "autoencoder")
    newest = tmp_path / "autoencoder/checkpoints/step-00000004/model.safetensors"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    train("autoencoder", shapes, tmp_path, 4, **settings)
    assert "step-00000004/model.safetensors does not match" in capsys.readouterr().out
    assert weights(tmp_path / "autoencoder") == expected


def test_resuming_with_what_would_change_the_samples_is_refused(shapes, tmp_path):
    train("autoencoder", shapes, tmp_path, 2)
    with pytest.raises(InputError, match="8 samples a step .* now 4 x 1 x 1 = 4"):
        train("autoencoder", shapes, tmp_path, 4, **{"train.batch_size": 4})
    with pytest.raises(InputError, match="was trained with model.patch_size=2, now 4"):
        train("autoencoder", shapes, tmp_path, 4, **{"model.patch_size": 4})


def test_resuming_with_other_data_or_another_clip_is_refused(shapes, runs, tmp_path):
    shutil.copytree(runs / "clip", tmp_path / "clip")
    train("prior", shapes, tmp_path, 2)
    other = tmp_path / "shapes"
    shutil.copytree(shapes, other)
    lines = (other / "metadata.jsonl").read_text().splitlines()
    (other / "metadata.jsonl").write_text("\n".join(reversed(lines)))
    write_manifest(other, quiet=True)
    with pytest.raises(InputError, match="trained with another data"):
        train("prior", other, tmp_path, 4)
    shutil.rmtree(tmp_path / "clip")
    train("clip", shapes, tmp_path, 1, **{"train.seed": 5})
    with pytest.raises(InputError, match="trained with another clip"):
        train("prior", shapes, tmp_path, 4)


def test_metrics_are_logged(shapes, runs):
    row = metrics(runs / "prior")[-1]
    assert {"step", "loss", "learning_rate", "samples_per_second", "cosine", "cosine_text"} <= set(row)
    assert math.isfinite(row["loss"]) and row["samples_per_second"] > 0
    assert metrics(runs / "decoder")[-1]["loss"] > 0


def test_saved_files_are_readable_by_others(runs):
    mask = os.umask(0)
    os.umask(mask)
    for path in (runs / "clip").rglob("*"):
        if path.is_file():
            assert path.stat().st_mode & 0o777 == 0o666 & ~mask, path


@pytest.mark.parametrize("stage", ["clip", "prior", "decoder", "autoencoder"])
def test_two_processes_end_with_equal_weights(stage, shapes, runs, tmp_path):
    for part in ("clip", "autoencoder"):
        if part != stage:
            shutil.copytree(runs / part, tmp_path / part)
    script = tmp_path / "both.py"
    script.write_text(
        "import sys, torch\n"
        "from accelerate import PartialState\n"
        "from safetensors.torch import save_file\n"
        f"import t2i.training.common.loop, t2i.training.train_{stage} as stage\n"
        "from t2i.training.common.entry import run\n"
        "loop = t2i.training.common.loop\n"
        "def fit(accelerator, task, *rest, original=loop.fit, train=loop.train):\n"
        "    kept = []\n"
        "    loop.train = lambda a, s, state: (kept.append(state), train(a, s, state))\n"
        "    original(accelerator, task, *rest)\n"
        "    both = {f'ema.{k}': v for k, v in kept[0].average.values.items()}\n"
        "    both |= {f'model.{k}': v for k, v in kept[0].model.state_dict().items()}\n"
        "    critic = kept[0].critic.state_dict() if kept[0].critic else {}\n"
        "    both |= {f'critic.{k}': v for k, v in critic.items()}\n"
        "    both = {k: v.contiguous().clone() for k, v in both.items()}\n"
        "    save_file(both, f'{sys.argv[1]}/{PartialState().process_index}.safetensors')\n"
        "stage.fit = fit\n"
        f"run(stage.main, stage.Config, {stage!r}, sys.argv[2:])\n"
    )
    against = {"adversarial_weight": 0.5, "discriminator.width": 8, "discriminator.depth": 1}
    more = {**against, "train.gradient_accumulation": 2} if stage == "autoencoder" else {}
    command = [script, tmp_path, *arguments(stage, shapes, tmp_path, 3, **more)]
    result = run_program(command, ranks=2)
    assert result.returncode == 0, result.stderr[-3000:]
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys() and len(first) > 10
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(name.startswith("critic.") for name in first) == (stage == "autoencoder")
    saved = load_file(tmp_path / stage / "model" / "diffusion_pytorch_model.safetensors")
    expected = {name: first.get(f"ema.{name}", first[f"model.{name}"]) for name in saved}  # buffers are not averaged
    if stage == "autoencoder":  # measured when it is saved
        del saved["mean"], saved["std"]
    assert all(torch.equal(expected[name], value) for name, value in saved.items())
    if stage == "clip":  # negatives come from all processes: one process with the whole batch learns the same
        train("clip", shapes, tmp_path / "alone", 3, **{"train.batch_size": 16})
        alone = load_file(tmp_path / "alone/clip/model/diffusion_pytorch_model.safetensors")
        for name, value in saved.items():
            torch.testing.assert_close(value, alone[name], atol=2e-4, rtol=1e-3)
