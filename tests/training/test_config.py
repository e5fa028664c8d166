"""Configurations: every one that ships is one that its script accepts, and mistakes are refused in one line."""

from importlib import import_module
from pathlib import Path

import pytest
import torch
from t2i.training.train_decoder import ARCHITECTURES
from t2i.training.train_prior import ARCHITECTURES as PRIORS
from t2i.training.train_prior import collect_clip_arguments, collect_model_arguments

from t2i.config import CONFIG_FOLDER, find_default_configuration, load_config
from t2i.data.cache import ClipFacts
from t2i.diffusion.flow import get_prediction_type
from t2i.diffusion.process import build_noise_scheduler
from t2i.errors import InputError
from t2i.networks.autoencoder import Autoencoder
from t2i.networks.classifier import LatentClassifier
from t2i.networks.clip import CLIP
from t2i.networks.upsampler import Upsampler
from tests.helpers.stages import train

SHIPPED = sorted(path for path in CONFIG_FOLDER.glob("*/*.yaml") if path.parent.name not in ("accelerate", "deploy"))
PUBLIC = {
    "karlo",
    "kandinsky-2-1",
    "kandinsky-2-2",
    "stable-unclip",
}  # start from public models: tests/training/test_public_finetuning.py builds
STYLES = "emoji-styles"  # starts from models/emoji
MODELS = [path for path in SHIPPED if path.stem != "cache" and path.parent.name not in PUBLIC | {STYLES}]


def stage_of(path: Path) -> str:
    """A folder may hold several sizes of a stage: prior.yaml and prior-1b.yaml."""
    return path.stem.split("-")[0]


def sibling(path: Path, stage: str) -> Path:
    """Of the same size; a folder may hold one stage alone, beside those of configs/emoji."""
    here = path.with_name(f"{stage}.yaml")
    return here if here.exists() else CONFIG_FOLDER / "emoji" / here.name


def config_of(path: Path):
    script = "cache_data" if path.stem == "cache" else f"train_{stage_of(path)}"
    return load_config(import_module(f"t2i.training.{script}").Config, stage_of(path), [str(path)])


def clip_of(path: Path):
    """The CLIP of these stages; clip.yaml may train only the text tower of clip-pairs.yaml further."""
    file = sibling(path, "clip")
    pairs = file.with_name("clip-pairs.yaml")
    return config_of(pairs if pairs.exists() else file)


@pytest.mark.parametrize("path", MODELS, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_configuration_builds_its_model(path):
    config = config_of(path)
    clip = clip_of(path)
    embed_dim, text = clip.model["embed_dim"], clip.model["text_cfg"]
    with torch.device("meta"):
        match stage_of(path):
            case "clip":
                model = CLIP(clip.model, clip.preprocess)
            case "autoencoder":
                model = Autoencoder(**config.model)
            case "prior":
                model = make_prior(config, embed_dim, text)
            case "classifier":
                make_scheduler(config)
                coder = Autoencoder(**config_of(sibling(path, "autoencoder")).model)
                size = config.data.image_size // coder.factor
                model = LatentClassifier(["a", "b"], coder.channels, size, embed_dim, **config.model)
            case "upsampler":
                make_scheduler(config)
                model = Upsampler(config.factor, config.crop_size // config.factor, **config.model)
                assert config.crop_size % max(model.image_size_multiple, config.factor) == 0
            case "decoder":
                make_scheduler(config)
                autoencoder = Autoencoder(**config_of(sibling(path, "autoencoder")).model)
                model = ARCHITECTURES[config.architecture](
                    embed_dim=embed_dim,
                    latent_channels=autoencoder.channels,
                    latent_size=config.data.image_size // autoencoder.factor,
                    text_width=text["width"] if config.reads_captions else None,
                    **config.model,
                )
    assert sum(parameter.numel() for parameter in model.parameters()) > 1000


def make_prior(config, embed_dim: int, text: dict):
    facts = ClipFacts("", "", embed_dim, text["width"], text["context_length"])
    arguments = collect_model_arguments(config) | collect_clip_arguments(config, facts)
    if config.architecture == "diffusion":
        make_scheduler(config)
    if config.architecture == "autoregressive":  # the data say how many
        arguments = {"components": 4} | arguments
    return PRIORS[config.architecture](**arguments)


def make_scheduler(config) -> None:
    with torch.device("cpu"):
        kind = get_prediction_type(build_noise_scheduler(config.scheduler))
        assert kind in ("sample", "v_prediction", "flow_prediction")


def test_a_stage_without_a_file_takes_the_recipe_that_fits_any_data_where_it_has_the_stage():
    assert find_default_configuration("clip") == CONFIG_FOLDER / "emoji-quick/clip.yaml"
    assert config_of(find_default_configuration("clip")).data.balance_by is None
    assert find_default_configuration("upsampler") == CONFIG_FOLDER / "emoji/upsampler.yaml"


def test_configurations_exist_for_every_stage_and_size():
    assert {path.parent.name for path in SHIPPED} == {
        "tiny",
        "emoji",
        "emoji-quick",
        "emoji-variants",
        "base",
        STYLES,
    } | PUBLIC
    for size in ("tiny", "emoji", "base"):
        assert {stage_of(path) for path in SHIPPED if path.parent.name == size} == {
            "clip",
            "autoencoder",
            "cache",
            "prior",
            "decoder",
            "upsampler",
            "classifier",
        }


def test_the_recipe_of_styles_starts_from_the_shipped_model_and_from_its_own_stages():
    files = {path.stem: config_of(path) for path in SHIPPED if path.parent.name == STYLES}
    assert set(files) == {"clip-pairs", "clip", "autoencoder", "cache", "prior", "decoder"}
    inits = {stage: Path(config.init) for stage, config in files.items() if stage != "cache"}
    assert inits.pop("clip") == Path(files["clip-pairs"].train.output)
    assert all((CONFIG_FOLDER.parent / init / "config.json").is_file() for init in inits.values())


@pytest.mark.parametrize("path", sorted(CONFIG_FOLDER.glob("*/cache.yaml")), ids=lambda path: path.parent.name)
def test_every_shipped_cache_is_of_the_pictures_that_its_stages_train_on(path):
    cache = config_of(path)
    for stage in ("prior", "decoder"):
        config = config_of(path.with_name(f"{stage}.yaml"))
        assert config.data.path == cache.data.path and config.data.image_size == cache.data.image_size
        if config.cache is not None:
            assert (config.cache, config.clip) == (cache.output, cache.clip)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.learning_rat=1", "learning_rat"),
        ("traim.steps=1", "traim"),
        ("train.steps=many", "many"),
        ("train.steps=0", "train.steps must be an integer from 1"),
        ("train.learning_rate=nan", "train.learning_rate must be a number from 0 to 1, got nan"),
        ("train.mixed_precision=int8", "must be one of auto, no, fp16, bf16"),
        ("data.image_size=-8", "data.image_size must be an integer from 8"),
        ("caption_dropout=1.5", "caption_dropout must be from 0 to 1"),
        ("nonsense", "must have the form key=value"),
    ],
)
def test_a_mistake_is_refused_in_one_line_that_names_it(override, message):
    from t2i.training.train_prior import Config

    with pytest.raises(InputError, match=message) as caught:
        load_config(Config, "prior", [str(CONFIG_FOLDER / "tiny/prior.yaml"), override])
    assert "\n" not in str(caught.value)


def test_a_missing_required_value_and_a_missing_file_are_refused(tmp_path):
    from t2i.training.train_prior import Config

    (tmp_path / "half.yaml").write_text("clip: somewhere\n")
    with pytest.raises(InputError, match="path"):
        load_config(Config, "prior", [str(tmp_path / "half.yaml")])
    from t2i.training.train_clip import Config as ClipConfig

    (tmp_path / "half.yaml").write_text("model: {embed_dim: 3}\ndata: {path: x}\ntrain: {output: y}\n")
    with pytest.raises(InputError, match="model lacks vision_cfg, text_cfg"):
        load_config(ClipConfig, "clip", [str(tmp_path / "half.yaml")])
    (tmp_path / "half.yaml").write_text("- a list\n")
    with pytest.raises(InputError, match="it must be a YAML mapping"):
        load_config(ClipConfig, "clip", [str(tmp_path / "half.yaml")])
    with pytest.raises(InputError, match="no configuration file"):
        load_config(Config, "prior", [str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(
    ("stage", "override", "message"),
    [
        ("clip", "model.vision_cfg.widht=3", "model is not valid for CLIP.*widht"),
        ("autoencoder", "model.vae.latent_chanels=3", "model is not valid for Autoencoder.*latent_chanels"),
        ("autoencoder", "kl_weight=nan", "kl_weight must be a number from 0"),
        ("prior", "model.widht=3", "model is not valid for Prior.*widht"),
        ("prior", "scheduler.predicton_type=sample", "scheduler is not valid for DDIMScheduler.*predicton_type"),
        ("decoder", "model.widht=3", "model is not valid for UNetDecoder.*widht"),
        ("decoder", "model.unet.layers=3", "model is not valid for UNetDecoder.*layers"),
        ("decoder", "data.image_size=30", "data.image_size must be a multiple of 4, got 30"),
        ("autoencoder", "data.image_size=30", "data.image_size must be a multiple of 4, got 30"),
        ("prior", "model.heads=5", "heads must divide width 64, got 5"),
        ("clip", "model.text_cfg.vocab_size=abc", "vocab_size must be an integer from 300"),
        ("clip", "preprocess.sise=3", "preprocess has no sise"),
        ("clip", "train.steps={", "train.steps=.* cannot be parsed"),
        ("decoder", "architecture=gan", "architecture must be one of transformer, unet"),
    ],
)
def test_a_mistake_in_a_models_own_arguments_is_refused_before_any_work(
    stage, override, message, runs, shapes, tmp_path, monkeypatch
):
    key, value = override.split("=", 1)
    for work in (
        "t2i.training.train_prior.fit",
        "t2i.training.train_decoder.fit",
        "t2i.training.common.encodings.FrozenModels.compute_statistics",
    ):
        monkeypatch.setattr(work, lambda *_: pytest.fail("work has started"))
    elsewhere = {part: runs / part for part in {"prior": ["clip"], "decoder": ["clip", "autoencoder"]}.get(stage, [])}
    with pytest.raises(InputError, match=message) as caught:
        train(stage, shapes, tmp_path, **elsewhere, **{key: value})
    assert "\n" not in str(caught.value) and list(tmp_path.iterdir()) == []


def test_a_short_run_shortens_warm_up_and_decay():
    from t2i.training.train_prior import Config

    config = load_config(Config, "prior", [str(CONFIG_FOLDER / "emoji/prior.yaml"), "train.steps=10"])
    assert config.train.warmup_steps == config.train.decay_steps == 10


def test_yaml_no_is_not_false():
    from t2i.training.train_prior import Config

    config = load_config(Config, "prior", [str(CONFIG_FOLDER / "tiny/prior.yaml"), "train.mixed_precision=no"])
    assert config.train.mixed_precision == "no"
