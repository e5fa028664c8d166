"""Starting from a trained model: what it learned is kept, and what does not fit it is refused by name."""

import json
import shutil

import pytest
import torch
from t2i.training.common.finetuning import prepare_init_model

from t2i.config import load_config
from t2i.data.manifest import write_manifest
from t2i.diffusion.condition import ImageCondition
from t2i.errors import InputError
from t2i.files.model_folder import load_model
from t2i.interop.by_name import load_autoencoder, load_clip
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.decoder import Decoder
from t2i.networks.prior import Prior
from t2i.networks.unet_decoder import UNetDecoder
from tests.helpers.stages import arguments, train
from tests.training.test_lora import drift

STAGES = ("clip", "autoencoder", "prior", "decoder")
LOADERS = {
    "clip": load_clip,
    "autoencoder": load_autoencoder,
    "prior": lambda folder: load_model(Prior, folder),
    "decoder": lambda folder: load_model((Decoder, UNetDecoder), folder),
}


def tune(stage, shapes, runs, folder, steps=3, **overrides):
    """Train on, from `runs/stage` into `folder/stage`, with the CLIP and the autoencoder of `runs`."""
    elsewhere = {part: runs / part for part in {"prior": ["clip"], "decoder": ["clip", "autoencoder"]}.get(stage, [])}
    train(stage, shapes, folder, steps, **{"init": runs / stage, **elsewhere, **overrides})
    return LOADERS[stage](folder / stage)


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_without_a_step_of_its_own_is_the_trained_model(stage, shapes, runs, tmp_path):
    """With a learning rate of zero what comes out is what went in."""
    before, after = LOADERS[stage](runs / stage), tune(stage, shapes, runs, tmp_path, **{"train.learning_rate": 0})
    moved = ("mean", "std") if stage == "autoencoder" else ()  # measured again, on the new images
    old, new = before.state_dict(), after.state_dict()
    assert set(old) == set(new)
    for name in set(old) - set(moved):
        torch.testing.assert_close(new[name], old[name], msg=name)


def test_another_seed_starts_elsewhere_without_init(shapes, runs, tmp_path):
    """What the test above rests on."""
    train("autoencoder", shapes, tmp_path, **{"train.learning_rate": 0, "train.seed": 1})
    old = load_autoencoder(runs / "autoencoder").state_dict()
    new = load_autoencoder(tmp_path / "autoencoder").state_dict()
    assert not torch.allclose(new["coder.encoder.conv_in.weight"], old["coder.encoder.conv_in.weight"], atol=1e-2)


def test_the_vocabulary_is_kept_and_the_fingerprint_is_not(shapes, runs, tmp_path):
    before, after = load_clip(runs / "clip"), tune("clip", shapes, runs, tmp_path)
    assert after.tokenizer(["red circle"]).equal(before.tokenizer(["red circle"]))
    assert after.identity == after.compute_fingerprint() != before.identity


def test_a_prior_keeps_its_scale_and_its_null_and_still_tells_them_apart(shapes, runs, tmp_path):
    before, other = load_model(Prior, runs / "prior"), tmp_path / "start" / "prior"
    before.mean += 1  # a scale that no data of today gives
    drift(before)
    before.save_pretrained(other)
    after = tune("prior", shapes, runs, tmp_path, init=other)
    for name in ("mean", "std", "null_embedding", "null_states"):
        assert torch.equal(getattr(after, name), getattr(before, name)), name
    assert not torch.equal(after.to_image.weight, before.to_image.weight)
    text = load_clip(runs / "clip").encode_text(["red circle"])
    x, t = torch.randn(1, 32), torch.tensor([500])
    assert not torch.allclose(after(x, t, text), after(x, t, after.null(1)), atol=1e-4)


def test_a_decoder_still_tells_an_embedding_from_none(shapes, runs, tmp_path):
    other = tmp_path / "start" / "decoder"
    drift(load_model(UNetDecoder, runs / "decoder")).save_pretrained(other)
    after = tune("decoder", shapes, runs, tmp_path, init=other)
    text = load_clip(runs / "clip").encode_text(["red circle"])
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    assert not torch.allclose(after(x, t, ImageCondition(text.embedding, text)), after(x, t, after.null(1)), atol=1e-4)


def test_captions_are_still_dropped(shapes, runs, tmp_path):
    """All dropped, it makes no difference which image has which caption; none dropped, it does."""
    swapped = tmp_path / "swapped"
    shutil.copytree(shapes, swapped)
    rows = [json.loads(line) for line in (shapes / "metadata.jsonl").read_text().splitlines()]
    texts = [row["text"] for row in rows]
    rows = [row | {"text": text} for row, text in zip(rows, [*texts[1:], texts[0]])]
    (swapped / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    write_manifest(swapped, quiet=True)
    start = tmp_path / "start"
    drift(load_model(Prior, runs / "prior")).save_pretrained(start)
    weights = [
        tune("prior", data, runs, tmp_path / data.name / str(dropout), init=start, caption_dropout=dropout).state_dict()
        for dropout in (1.0, 0.0)
        for data in (shapes, swapped)
    ]
    torch.testing.assert_close(weights[1], weights[0])
    with pytest.raises(AssertionError):
        torch.testing.assert_close(weights[3], weights[2])


def test_embeddings_are_still_dropped(shapes, runs, tmp_path):
    start = tmp_path / "start"
    before = drift(load_model(UNetDecoder, runs / "decoder"))
    before.save_pretrained(start)
    settings = {"init": start, "train.weight_decay": 0}
    dropped = tune("decoder", shapes, runs, tmp_path / "all", **settings, embedding_dropout=1.0)
    assert torch.equal(dropped.to_tokens.weight, before.to_tokens.weight)  # its gradient: a product with the zero null
    kept = tune("decoder", shapes, runs, tmp_path / "none", **settings, embedding_dropout=0.0)
    assert not torch.equal(kept.to_tokens.weight, before.to_tokens.weight)


def test_half_precision_becomes_single(runs, tmp_path):
    load_model(Prior, runs / "prior").half().save_pretrained(tmp_path / "half")
    half = str(tmp_path / "half")
    model = prepare_init_model(LOADERS["prior"](half), half, {})
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("prior", {"model.width": 128}, "init=.*prior' was trained with width 64, this run has 128; they must agree"),
        ("prior", {"scheduler.prediction_type": "v_prediction"}, "trained with scheduler.prediction_type 'sample'"),
        ("decoder", {"model.unet.layers_per_block": 2}, "trained with unet.layers_per_block 1, this run has 2"),
        ("decoder", {"reads_captions": False}, "trained with text_width 64, this run has None"),
        ("decoder", {"data.image_size": 64}, "trained with latent_size 8, this run has 16"),
        ("autoencoder", {"model.vae.latent_channels": 8}, "trained with vae.latent_channels 4, this run has 8"),
        ("clip", {"model.text_cfg.layers": 3}, "trained with model.text_cfg.layers 2, this run has 3"),
        ("clip", {"preprocess.mean": "[0,0,0]"}, r"trained with preprocess.mean \[0.5, 0.5, 0.5\]"),
        ("prior", {"init": "nowhere"}, "no trained Prior in 'nowhere'"),
    ],
)
def test_what_does_not_agree_with_the_trained_model_is_refused(stage, override, message, shapes, runs, tmp_path):
    with pytest.raises(InputError, match=message) as caught:
        tune(stage, shapes, runs, tmp_path, **override)
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("stage", ["prior", "decoder"])
def test_a_model_learns_the_embeddings_of_another_clip_and_refuses_those_of_another_size(
    stage, shapes, runs, tmp_path, capsys
):
    train("clip", shapes, tmp_path, steps=1, **{"train.seed": 1})
    tune(stage, shapes, runs, tmp_path, clip=tmp_path / "clip")
    assert capsys.readouterr().out.count("was trained with another CLIP") == 1
    before, after = (LOADERS[stage](folder / stage) for folder in (runs, tmp_path))
    identity = load_clip(tmp_path / "clip").identity
    assert before.config.clip_fingerprint != after.config.clip_fingerprint == identity
    if stage == "prior":  # it scales embeddings by those of the data
        assert not torch.equal(before.mean, after.mean) and not torch.equal(before.null_states, after.null_states)
    train("clip", shapes, tmp_path / "wide", steps=1, **{"model.embed_dim": 48})
    with pytest.raises(InputError, match="was trained with embed_dim 32, this run has 48"):
        tune(stage, shapes, runs, tmp_path / "none", clip=tmp_path / "wide" / "clip")
    assert not (tmp_path / "none").exists()


def test_a_configuration_may_say_nothing_of_the_architecture(shapes, runs, tmp_path):
    file = tmp_path / "prior.yaml"
    scheduler = {"prediction_type": "sample", "beta_schedule": "squaredcos_cap_v2", "clip_sample": False}
    settings = {"clip": str(runs / "clip"), "init": str(runs / "prior"), "scheduler": scheduler}
    settings |= {"data": {"path": str(shapes), "image_size": 32, "num_workers": 0}}
    settings |= {"train": {"output": str(tmp_path / "out"), "steps": 1, "batch_size": 8, "mixed_precision": "no"}}
    file.write_text(json.dumps(settings))  # JSON is YAML
    from t2i.training.train_prior import Config, main

    main(load_config(Config, "prior", [str(file)]))
    assert load_model(Prior, tmp_path / "out").config.width == 64


def test_a_checkpoint_of_another_start_is_not_resumed(shapes, runs, tmp_path):
    tune("prior", shapes, runs, tmp_path, steps=1)
    other = tmp_path / "start" / "prior"
    drift(load_model(Prior, runs / "prior")).save_pretrained(other)
    with pytest.raises(
        InputError, match=r"was trained with another init \(.*\); use the same, or use another train.output"
    ):
        tune("prior", shapes, runs, tmp_path, steps=2, init=other)


def test_a_diffusers_vae_can_be_trained_on(shapes, runs, tmp_path):
    from diffusers import AutoencoderKL

    from tests.training.test_large import VAE

    torch.manual_seed(0)
    AutoencoderKL(**VAE).save_pretrained(tmp_path / "vae")
    script_arguments = arguments(
        "autoencoder", shapes, tmp_path, 1, init=tmp_path / "vae", **{"train.learning_rate": 0}
    )
    from t2i.training.train_autoencoder import Config, main

    config = load_config(Config, "autoencoder", script_arguments)
    config.model = {}
    main(config)
    before, after = load_autoencoder(tmp_path / "vae"), load_model(Autoencoder, tmp_path / "autoencoder")
    for name, value in before.coder.state_dict().items():
        torch.testing.assert_close(after.coder.state_dict()[name], value)
