"""Settings that train nothing: every setting of every script has an effect by itself, or a run names it."""

from importlib import import_module

import pytest
from t2i.training.common.effects import find_idle_settings, iterate_settings
from t2i.training.common.entry import start_training

from t2i.config import load_config
from t2i.errors import InputError
from tests.helpers.stages import CONFIGS

SCRIPTS = {
    "clip": "train_clip",
    "autoencoder": "train_autoencoder",
    "prior": "train_prior",
    "decoder": "train_decoder",
    "upsampler": "train_upsampler",
    "classifier": "train_classifier",
    "cache": "cache_data",
}
# Settings that change a run whatever the others are. A new setting is added here, or to the cases of its script
ALWAYS = {
    "data": "path image_size num_workers balance_by keyword_alone in_sentence sentences buckets max_crop crop flip",
    "train": "output steps batch_size gradient_accumulation optimizer learning_rate warmup_steps decay_steps "
    "weight_decay adam_beta2 max_grad_norm ema_decay mixed_precision gradient_checkpointing compile log_every trackers "
    "sample_every validate_every save_every keep resume stall_timeout seed dry_run",
    "clip": "model init preprocess",
    "autoencoder": "model init kl_weight perceptual_weight adversarial_weight",
    "prior": "clip cache architecture model init scheduler caption_dropout timestep_shift loss_weighting "
    "explained_variance",
    "decoder": "clip autoencoder cache architecture model init scheduler reads_captions embedding_dropout "
    "embedding_noise reads_masks timestep_shift loss_weighting",
    "upsampler": "model factor crop_size cache blur_probability max_blur init scheduler timestep_shift loss_weighting",
    "classifier": "clip autoencoder cache model scheduler embedding_weight",
    "cache": "output clip autoencoder text text_encoder batch_size shard_size mixed_precision dtype",
}
# Settings that need others, which a script refuses without them: values that it takes, and the others
OWN_VALUES = {
    "prompts": '["a cat"]',
    "data.sentences": "a.txt",
    "discriminator": "{width: 8}",
    "text_encoder_dtype": "bfloat16",
    "dtype": "float32",
    "regression": "runs/linear",
}
# All that the settings above need, so that each has an effect
SUFFICIENT = {
    "clip": [],
    "autoencoder": ["perceptual_weight=0.5", "perceptual_clip=a", "adversarial_weight=0.5"],
    "prior": ["loss_weighting=min_snr", "sample.decoder=a", "sample.autoencoder=a"],
    "decoder": ["loss_weighting=min_snr", "reads_captions=true", "text_encoder=a", "sample.prior=a"],
    "upsampler": ["loss_weighting=min_snr", "cache=a"],
    "classifier": [],
    "cache": ["text_encoder=a"],
}
WITHOUT = ["data.buckets=false", "train.sample_every=0", "train.validate_every=0", "train.warmup_steps=0"]
OFF = dict.fromkeys(SCRIPTS, WITHOUT) | {
    "prior": [*WITHOUT, "loss_weighting=none"],
    "upsampler": [*WITHOUT, "loss_weighting=none"],
    "decoder": [*WITHOUT, "reads_captions=false", "loss_weighting=none"],
    "cache": ["data.buckets=false", "text=false", "autoencoder=null"],
}
EXPECTED = {"classifier": ["train.sample_every=5 has no effect: this stage draws no previews"]}
SHARED = ["data.buckets=true", "data.bucket_step=8", "train.sample_every=5", "train.validate_every=5"]


def load(stage, *overrides):
    script = import_module(f"t2i.training.{SCRIPTS[stage.partition('-')[0]]}")
    return load_config(script.Config, stage, [str(CONFIGS / f"tiny/{stage}.yaml"), *overrides])


def list_keys(stage):
    return [key for key, _, _ in iterate_settings(load(stage))]


def change_value(stage, key):
    """An override of one setting, with another value than the default."""
    name = key.rpartition(".")[2]
    default = {known: value for known, _, value in iterate_settings(load(stage))}[key]
    for known in (key, name):
        if known in OWN_VALUES:
            return f"{key}={OWN_VALUES[known]}"
    match default:
        case bool():
            return f"{key}=true"
        case int():
            return f"{key}={default + 1}"
        case float():
            return f"{key}={default / 2 if default else 0.25}"
    return f"{key}=a"


@pytest.mark.parametrize("stage", SCRIPTS)
def test_every_setting_has_an_effect_or_is_named(stage):
    prefixed = {f"{part}.{name}" for part in ("data", "train") for name in ALWAYS[part].split()}
    always, idle = prefixed | set(ALWAYS[stage].split()), load(stage).idle
    keys = list_keys(stage)
    assert set(idle) <= set(keys), "cases of settings that do not exist"
    unnamed = []
    for key in set(keys) - always:
        try:
            lines = find_idle_settings(load(stage, *OFF[stage], change_value(stage, key)))
        except InputError:
            continue
        if not any(line.startswith(f"{key}=") for line in lines):
            unnamed.append(key)
    assert not unnamed


@pytest.mark.parametrize("stage", SCRIPTS)
def test_settings_that_have_what_they_need_are_not_named(stage):
    shared = SHARED if stage != "cache" else SHARED[:2]
    config = load(stage, *shared, *SUFFICIENT[stage])
    assert find_idle_settings(config) == EXPECTED.get(stage, [])


def test_settings_beside_those_that_replace_them_are_named():
    settings = ["model={components: 4}", "explained_variance=0.5"]
    prior = load("prior-autoregressive", *settings)
    assert "explained_variance=0.5 has no effect beside model.components" in find_idle_settings(prior)
    coder = load("autoencoder", "init=a", "freeze_encoder=true", "kl_weight=0.5")
    assert find_idle_settings(coder) == ["kl_weight=0.5 has no effect beside freeze_encoder"]
    captions = load("decoder", "reads_captions=false", "data.keyword_alone=0.5", "caption_dropout=0.25")
    assert [line.split()[0] for line in find_idle_settings(captions)] == [
        "caption_dropout=0.25",
        "data.keyword_alone=0.5",
    ]


def test_a_run_begins_with_the_warning(capsys, monkeypatch):
    config = load("decoder", "data.bucket_step=8", "text_encoder_tokens=9", "train.sample_every=0", "sample.seed=3")
    started = []
    start_training(started.append, config)
    assert started == [config]
    assert sorted(capsys.readouterr().out.splitlines()) == [
        "warning: data.bucket_step=8 has no effect without data.buckets",
        "warning: sample.seed=3 has no effect without train.sample_every",
        "warning: text_encoder_tokens=9 has no effect without text_encoder",
    ]
    monkeypatch.setenv("RANK", "1")  # said once, not by every process
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "1")
    start_training(started.append, config)
    assert not capsys.readouterr().out
