"""Public models trained on: what they learned is kept, the null that sampling uses is trained, and the result loads
here and in diffusers."""

import functools
import json
import shutil
from fnmatch import fnmatch
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PriorTransformer,
    StableUnCLIPImg2ImgPipeline,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import get_timestep_embedding
from t2i.pipelines.jobs.assemble import assemble_pipeline_folder
from t2i.pipelines.jobs.convert import convert_folder

from t2i import Text2ImagePipeline
from t2i.config import CONFIG_FOLDER, load_config
from t2i.data.cache import CachedPairs
from t2i.diffusion.condition import ImageCondition
from t2i.errors import InputError
from t2i.files.component import Component
from t2i.files.model_folder import load_model
from t2i.interop.by_name import load_autoencoder, load_clip, load_text_encoder
from t2i.interop.prior_transformer import load_prior_transformer
from t2i.networks.prior import Prior
from t2i.networks.public.eclipse import EclipsePrior
from t2i.networks.public.kandinsky import KandinskyDecoder
from t2i.networks.public.karlo import KarloDecoder
from t2i.networks.public.stable_unclip import StableUnCLIPDecoder
from tests.helpers.kandinsky_folders import (
    kandinsky_21_decoder,
    kandinsky_21_prior,
    kandinsky_22_controlnet,
    kandinsky_22_decoder,
    kandinsky_22_inpaint,
    kandinsky_22_prior,
)
from tests.helpers.karlo_folders import karlo, karlo_variations
from tests.helpers.public_folders import save_eclipse_prior, session_folder, tiny_prior_transformer, tiny_text_tower
from tests.helpers.stable_unclip_folders import stable_unclip_images, stable_unclip_small

CLASSES = {
    "prior": Prior,
    "eclipse": EclipsePrior,
    "karlo": KarloDecoder,
    "kandinsky": KandinskyDecoder,
    "kandinsky21": KandinskyDecoder,
    "stable": StableUnCLIPDecoder,
}
FIRST = ("prior", "karlo", "kandinsky", "kandinsky21")  # the others have tests of their own below


@functools.cache
def eclipse() -> Path:
    """A prior alone, in ECLIPSE's layout."""
    folder = session_folder() / "eclipse-to-train"
    save_eclipse_prior(folder)
    return folder


def names(kind: str) -> dict[str, object]:
    """What a configuration names of the public model: "prior" is Kandinsky's."""
    match kind:
        case "prior":
            return {"clip": kandinsky_22_prior(), "init": kandinsky_22_prior()}
        case "eclipse":
            return {"clip": kandinsky_22_prior(), "init": eclipse(), "architecture": "eclipse"}
        case "stable":  # whose CLIP has no text tower
            folder = stable_unclip_images()
            named = {"clip": folder, "autoencoder": folder, "init": folder, "text_encoder": folder}
            return named | {"reads_captions": True}
        case "kandinsky":
            decoder = kandinsky_22_decoder()
            return {"clip": kandinsky_22_prior(), "autoencoder": decoder, "init": decoder}
        case "kandinsky21":
            decoder = kandinsky_21_decoder()
            named = {"clip": kandinsky_21_prior(), "autoencoder": decoder, "init": decoder, "text_encoder": decoder}
            return named | {"reads_captions": True}
        case _:
            return {"clip": karlo_variations(), "autoencoder": karlo(), "init": karlo(), "reads_captions": True}


def stage_of(kind: str) -> str:
    return "prior" if kind in ("prior", "eclipse") else "decoder"


def configured(kind: str, data: Path, folder: Path, steps: int = 2, **overrides: object):
    """The configuration of a short run on 16 x 16 pixels, into `folder/kind`."""
    train = {"output": str(folder / kind), "steps": steps, "batch_size": 8, "learning_rate": 1e-2, "warmup_steps": 0}
    train |= {"trackers": [], "sample_every": 0, "validate_every": 0, "mixed_precision": "no", "log_every": 1}
    settings = {"data": {"path": str(data), "image_size": 16, "num_workers": 0}, "train": train | {"ema_decay": 0.0}}
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{kind}.yaml"
    file.write_text(yaml.safe_dump(settings))
    given = {**names(kind), **overrides}
    script = import_module(f"t2i.training.train_{stage_of(kind)}")
    arguments = [f"{key}={value}" for key, value in given.items()]
    return script, load_config(script.Config, stage_of(kind), [str(file), *arguments])


def tune(kind: str, data: Path, folder: Path, steps: int = 2, **overrides: object):
    script, config = configured(kind, data, folder, steps, **overrides)
    script.main(config)
    return load_model(CLASSES[kind], folder / kind)


@pytest.fixture(scope="module")
def trained(shapes, tmp_path_factory):
    """`trained(kind)`: two steps from the public model, once."""
    folder = tmp_path_factory.mktemp("tuned")

    @functools.cache
    def made(kind: str) -> Path:
        tune(kind, shapes, folder)
        return folder / kind

    return made


def null_of(kind: str):
    """What sampling takes for nothing, from the public model's own encoders."""
    clip = load_clip(str(names(kind)["clip"]))
    with torch.no_grad():
        return clip.encode_zero_image()[0] if kind.startswith("kandinsky") else clip.encode_text([""])


def conditions(decoder, count: int = 2):
    generator = torch.Generator().manual_seed(3)
    z_i = torch.randn(count, decoder.config.embed_dim, generator=generator)
    condition = decoder.null(count)
    return ImageCondition(decoder.noise_image_embeds(z_i), condition.text)


@pytest.mark.parametrize("kind", FIRST)
def test_a_run_without_a_step_of_its_own_is_the_public_model_with_its_schedule_and_its_null(kind, shapes, tmp_path):
    after = tune(kind, shapes, tmp_path, steps=1, **{"train.learning_rate": 0})
    init = Path(str(names(kind)["init"]))
    if kind == "prior":
        before = load_prior_transformer(Component(init / "prior")).state_dict()
        null = null_of(kind)
        torch.testing.assert_close(after.null_embedding, null.embedding[0])
        torch.testing.assert_close(after.null_states, null.states[0])
        assert not after.config.unit_length
    else:
        part = Component(init / ("decoder" if kind == "karlo" else "unet"))
        before = {f"unet.{name}": tensor for name, tensor in part.iterate_tensors()}
        if kind != "karlo":
            torch.testing.assert_close(after.null(1).embedding[0], null_of(kind))
            if kind == "kandinsky21":
                reader = load_text_encoder(init)
                torch.testing.assert_close(after.null(1).text.states, reader.encode([""]).states)
                torch.testing.assert_close(after.null(1).text.pooled, reader.encode([""]).pooled)
        else:
            learned = dict(Component(init / "text_proj").iterate_tensors())[
                "learned_classifier_free_guidance_embeddings"
            ]
            torch.testing.assert_close(after.null(1).embedding[0], learned.view(-1))
            torch.testing.assert_close(after.null(1).text.states, null_of(kind).states)
            torch.testing.assert_close(after.null(1).text.pooled, null_of(kind).embedding)
    state = after.state_dict()
    for name in before.keys() - {"null_embedding", "null_states"}:
        torch.testing.assert_close(state[name], before[name], msg=name)
    place = {"karlo": "decoder_scheduler"}.get(kind, "scheduler")
    theirs = json.loads((init / place / "scheduler_config.json").read_text())
    scheduler = DDIMScheduler.from_pretrained(tmp_path / kind / "scheduler")
    assert scheduler.config.prediction_type == ("sample" if kind == "prior" else "epsilon")
    ddim = theirs["_class_name"] == "DDIMScheduler"  # which is kept as it is
    assert scheduler.config.timestep_spacing == (theirs["timestep_spacing"] if ddim else "trailing")
    for key in ("clip_sample", "thresholding", "sample_max_value", "num_train_timesteps"):  # which bound and count
        assert scheduler.config[key] == theirs.get(key, scheduler.config[key]), key
    if theirs["_class_name"] == "UnCLIPScheduler":
        assert scheduler.config.clip_sample_range == theirs["clip_sample_range"]
        angle = (torch.arange(1001, dtype=torch.float64) / 1000 + 0.008) / 1.008 * torch.pi / 2
        betas = (1 - (angle[1:].cos() / angle[:-1].cos()) ** 2).clamp(max=0.999)
    else:
        betas = torch.linspace(theirs["beta_start"], theirs["beta_end"], 1000)
    torch.testing.assert_close(scheduler.betas, betas.float(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("kind", FIRST)
def test_what_was_trained_predicts_the_same_here_and_in_diffusers(kind, trained, tmp_path):
    model = load_model(CLASSES[kind], trained(kind)).eval()
    generator, t = torch.Generator().manual_seed(1), torch.tensor([20, 700])
    if kind == "prior":
        text = load_clip(str(names(kind)["clip"])).encode_text(["red circle", ""])
        x = torch.randn(2, model.config.embed_dim, generator=generator)
        convert_folder(str(trained(kind)), tmp_path / "prior", "prior-transformer")
        theirs = PriorTransformer.from_pretrained(tmp_path / "prior").eval()
        width = 77 - text.states.shape[1]
        states = torch.nn.functional.pad(text.states, (0, 0, 0, width))
        mask = torch.nn.functional.pad(text.mask, (0, width))
        with torch.no_grad():
            ours, reference = model(x, t, text), theirs(x, t, text.embedding, states, mask).predicted_image_embedding
        torch.testing.assert_close(theirs.clip_mean[0], model.mean)
        start = PriorTransformer.from_pretrained(kandinsky_22_prior() / "prior")
        moved = (start.proj_in.weight - theirs.proj_in.weight).abs().max()
    else:
        x, condition = torch.randn(2, 3 if kind == "karlo" else 4, 8, 8, generator=generator), conditions(model)
        model.unet.save_pretrained(tmp_path / "unet")
        theirs = UNet2DConditionModel.from_pretrained(tmp_path / "unet").eval()
        context = model.prepare(condition)
        with torch.no_grad():
            ours = model(x, t, condition)
            if kind == "karlo":
                reference = theirs(x, t, **context.arguments).sample
            else:
                condition = condition.expand()  # the reference takes a row for each image
                added, text = {"image_embeds": condition.embedding}, condition.text
                added |= {} if text is None else {"text_embeds": text.pooled}
                reference = theirs(x, t, None if text is None else text.states, added_cond_kwargs=added).sample
        place = Path(str(names(kind)["init"])) / ("decoder" if kind == "karlo" else "unet")
        start = UNet2DConditionModel.from_pretrained(place)
        moved = (start.conv_in.weight - theirs.conv_in.weight).abs().max()
    torch.testing.assert_close(ours, reference, atol=1e-4, rtol=1e-4)
    assert moved > 1e-3, "two steps at this rate move every weight"


def rows(tensor: torch.Tensor, row: torch.Tensor) -> torch.Tensor:
    return (tensor - row).abs().flatten(1).amax(dim=1) < 1e-6


@pytest.mark.parametrize("kind", [*FIRST, "stable"])
def test_half_of_the_conditions_are_the_null_and_the_others_are_the_pictures_own(kind, shapes, tmp_path, monkeypatch):
    seen: list = []
    forward = CLASSES[kind].forward

    def recorded(self, x, t, condition):
        seen.append((condition, self.null(1)))
        return forward(self, x, t, condition)

    monkeypatch.setattr(CLASSES[kind], "forward", recorded)
    dropouts = {"caption_dropout": 0.5} | ({} if kind == "prior" else {"embedding_dropout": 0.5})
    tune(kind, shapes, tmp_path, steps=8, **dropouts, **{"train.learning_rate": 0})
    embeddings = torch.cat([condition.embedding for condition, _ in seen])
    null = seen[0][1]
    dropped = rows(embeddings, null.embedding[0])
    assert 16 < int(dropped.sum()) < 48 == len(dropped) - 16
    distances = torch.cdist(embeddings[~dropped], null.embedding)
    assert (distances > 1e-2).all(), "images say something else than the null"
    if kind == "prior":
        for condition, null in seen:
            without = rows(condition.embedding, null.embedding[0])
            assert (condition.mask[without].sum(dim=1) == len(null.states[0])).all()
            length = null.states.shape[1]
            torch.testing.assert_close(
                condition.states[without][:, :length], null.states.expand(int(without.sum()), -1, -1)
            )
    if kind in ("karlo", "kandinsky21", "stable"):  # captions are dropped on their own
        name = "states" if kind == "stable" else "pooled"
        pairs = [(getattr(condition.text, name), getattr(null.text, name)[0]) for condition, null in seen]
        texts = torch.cat([rows(texts, nothing) for texts, nothing in pairs])
        assert 16 < int(texts.sum()) < 48 and int((texts & ~dropped).sum()) > 0 and int((~texts & dropped).sum()) > 0


@pytest.mark.parametrize(("dropout", "moves"), [(1.0, True), (0.0, False)])
def test_karlos_learned_null_is_trained_where_it_is_drawn_and_nowhere_else(dropout, moves, shapes, tmp_path):
    after = tune("karlo", shapes, tmp_path, embedding_dropout=dropout, **{"train.weight_decay": 0})
    before = dict(Component(karlo() / "text_proj").iterate_tensors())["learned_classifier_free_guidance_embeddings"]
    assert torch.allclose(after.null(1).embedding[0], before.view(-1), atol=1e-6) != moves


def metrics(run: Path) -> list[dict[str, float]]:
    """Of each step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize("kind", ["kandinsky", "karlo"])
def test_a_learned_variance_is_trained_by_the_hybrid_loss(kind, trained):
    lines = metrics(trained(kind))
    assert len(lines) == 2 and all(line["loss"] > 0.001 * line["bound"] > 0 for line in lines)
    place = kandinsky_22_decoder() / "unet" if kind == "kandinsky" else karlo() / "decoder"
    before, after = dict(Component(place).iterate_tensors()), load_model(CLASSES[kind], trained(kind)).state_dict()
    half = len(before["conv_out.weight"]) // 2
    for part in (slice(0, half), slice(half, None)):
        moved = (after["unet.conv_out.weight"][part] - before["conv_out.weight"][part]).abs().max()
        assert moved > 1e-3, "the mean and the variance learn"


@pytest.mark.parametrize("kind", CLASSES)
def test_training_goes_on_from_what_was_trained_by_its_own_schedule(kind, trained, shapes, tmp_path):
    before = load_model(CLASSES[kind], trained(kind)).state_dict()
    after = tune(kind, shapes, tmp_path, steps=1, init=trained(kind), **{"train.learning_rate": 0}).state_dict()
    for name, value in before.items():
        torch.testing.assert_close(after[name], value, msg=name)
    if kind == "eclipse":
        assert not (tmp_path / kind / "scheduler").exists()
        return
    one, other = (DDIMScheduler.from_pretrained(folder / "scheduler") for folder in (trained(kind), tmp_path / kind))
    assert torch.equal(one.betas, other.betas) and one.config.prediction_type == other.config.prediction_type


def test_a_part_of_a_pipeline_is_a_name_too(shapes, tmp_path):
    folders = {"prior": kandinsky_22_prior() / "prior", "kandinsky": kandinsky_22_decoder() / "unet"}
    folders["karlo"] = karlo() / "decoder"
    more = {"kandinsky": {"autoencoder": kandinsky_22_decoder() / "movq"}}
    for kind, folder in folders.items():
        _, config = configured(kind, shapes, tmp_path, init=folder, **more.get(kind, {}))
        whole = configured(kind, shapes, tmp_path)[1]
        made, usual = (stage(kind, one) for one in (config, whole))
        for name, value in usual.state_dict().items():
            assert torch.equal(made.state_dict()[name], value), name


PUBLIC_CONFIGS = (*CONFIG_FOLDER.glob("ka*/*.yaml"), *CONFIG_FOLDER.glob("stable-unclip/*.yaml"))
SHIPPED = [path for path in sorted(PUBLIC_CONFIGS) if path.stem != "cache"]


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_shipped_configuration_builds_the_model_that_it_names(path, shapes, tmp_path):
    """With tiny folders in the place of the repositories of these names."""
    tiny = {
        "kakaobrain/karlo-v1-alpha": karlo,
        "kakaobrain/karlo-v1-alpha-image-variations": karlo_variations,
        "kandinsky-community/kandinsky-2-1": kandinsky_21_decoder,
        "kandinsky-community/kandinsky-2-1-prior": kandinsky_21_prior,
        "kandinsky-community/kandinsky-2-2-prior": kandinsky_22_prior,
        "kandinsky-community/kandinsky-2-2-decoder": kandinsky_22_decoder,
        "ECLIPSE-Community/ECLIPSE_KandinskyV22_Prior": eclipse,
        "stabilityai/stable-diffusion-2-1-unclip": stable_unclip_images,
    }
    written = yaml.safe_load(path.read_text())
    public = ("clip", "autoencoder", "init", "text_encoder")
    given = {key: tiny[written[key]]() for key in public if written.get(key)}
    given |= {"cache": "null", "data.path": shapes, "data.image_size": 16, "train.sample_every": 0}
    name, _, architecture = path.stem.partition("-")
    script = import_module(f"t2i.training.train_{name}")
    config = load_config(script.Config, name, [str(path), *(f"{key}={value}" for key, value in given.items())])
    kind = architecture or ("prior" if name == "prior" else path.parent.name.split("-")[0])
    model = stage(kind, config)
    assert isinstance(model, CLASSES[kind]) and all(one.requires_grad for one in model.parameters())
    cache = path.with_name("cache.yaml")
    if cache.exists():
        held = yaml.safe_load(cache.read_text())
        assert written["cache"] == held["output"] and written["data"] == held["data"]
        assert all(held[key] == written.get(key, held[key]) for key in ("clip", "autoencoder"))


def stage(kind: str, config):
    """The model that a run would train."""
    from t2i.training.common.encodings import open_encodings

    from t2i.interop.trainable import DECODER_PARTS, find_trainable_part

    script = import_module(f"t2i.training.train_{stage_of(kind)}")
    names, part = (config.clip,), ("prior",)
    if stage_of(kind) == "decoder":
        names = (config.clip, config.autoencoder, config.reads_captions, config.load_text_encoder)
        part = ("unet", DECODER_PARTS)
    source = open_encodings(config.cache, config.data, *names)
    return script.build_stage(config, source, torch.device("cpu"), find_trainable_part(config.init, *part)).model


def test_of_a_repository_on_the_hub_the_parts_in_question_are_fetched_alone(shapes, tmp_path, monkeypatch):
    hub = {"kandinsky-community/prior": kandinsky_22_prior(), "kandinsky-community/decoder": kandinsky_22_decoder()}
    asked: dict[str, list[list[str]]] = {}

    def snapshot_download(name: str, allow_patterns: list[str], **_) -> str:
        asked.setdefault(name, []).append(allow_patterns)
        return str(hub[name])

    monkeypatch.setattr("t2i.interop.fetching.snapshot_download", snapshot_download)
    prior, decoder = hub
    _, config = configured("kandinsky", shapes, tmp_path, clip=prior, autoencoder=decoder, init=decoder)
    assert isinstance(stage("kandinsky", config), KandinskyDecoder)
    for name, expected in {prior: [("text_encoder", "image_encoder")], decoder: [("movq",), ("unet",)]}.items():
        for patterns, places in zip(asked[name], expected, strict=True):
            files = [path.relative_to(hub[name]).as_posix() for path in hub[name].rglob("*") if path.is_file()]
            fetched = [file for file in files if any(fnmatch(file, pattern) for pattern in patterns)]
            assert {file for file in files if file.endswith((".json", ".txt"))} <= set(fetched)
            assert {Path(file).parent.name for file in fetched if file.endswith(".safetensors")} == set(places)


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("prior", {"scheduler.beta_schedule": "linear"}, "trained with other noise than scheduler.beta_schedule='lin"),
        ("prior", {"scheduler.prediction_type": "epsilon"}, "trained with scheduler.prediction_type 'sample', this"),
        ("kandinsky", {"scheduler.beta_end": 0.02}, "trained with other noise than scheduler.beta_end=0.02"),
        ("kandinsky", {"scheduler.num_train_timesteps": 500}, "trained with other noise than"),
        ("kandinsky", {"data.image_size": 32}, "trained with latent_size 8, this run has 16"),
        ("kandinsky", {"reads_captions": True}, "trained with text_width None, this run has 16"),
        ("kandinsky", {"reads_masks": True}, "trained with reads_masks False, this run has True"),
        ("karlo", {"reads_captions": False}, "trained with text_width 16, this run has None"),
        ("karlo", {"model.extra_tokens": 8}, "trained with extra_tokens 4, this run has 8"),
        ("prior", {"model.depth": 3}, "trained with depth 2, this run has 3"),
        ("prior", {"architecture": "linear", "init": "null", "caption_dropout": 0.1}, "embeddings of unit length"),
        ("prior", {"init": "DECODER"}, "Kandinsky 2.2 .* holds .*, and no prior"),
        ("kandinsky", {"init": "PRIOR"}, "Kandinsky 2.2 .* and no unet"),
        ("kandinsky", {"autoencoder": "PRIOR"}, "and no movq or super_res_first"),
        ("karlo", {"init": "ALONE"}, "goes with the folder 'projection' of its pipeline, which is not there"),
        ("prior", {"clip": "TEXT"}, "no image encoder in the folder"),
        ("prior", {"init": "ECLIPSE"}, "has a prior of architecture=eclipse, got diffusion"),
        ("eclipse", {"init": "PRIOR"}, "has a prior of architecture=diffusion, got eclipse"),
        ("eclipse", {"init": "null"}, "architecture=eclipse trains an ECLIPSE prior further; give it as init"),
        ("eclipse", {"caption_dropout": 0.2}, "caption_dropout needs architecture=diffusion or autoregressive"),
        ("prior", {"contrastive_weight": 0.5}, "contrastive_weight needs architecture=eclipse, got diffusion"),
        (
            "stable",
            {"text_encoder": "null", "clip": "BOTH", "init": "SMALL", "autoencoder": "SMALL"},
            "reads captions: it needs its text_encoder",
        ),
        ("stable", {"reads_captions": False, "text_encoder": "null"}, "no text encoder in the folder"),
        ("kandinsky", {"init": "CONTROLNET"}, "a ControlNet's U-Net, which is not trained here"),
        ("prior", {"init": "WIDER"}, "reads embeddings and token states of .* they do not belong together"),
    ],
)
def test_what_contradicts_the_public_model_is_refused_in_one_line(kind, overrides, message, shapes, tmp_path):
    alone = tmp_path / "alone"
    if overrides.get("init") == "ALONE":
        shutil.copytree(karlo() / "decoder", alone)
    for name, changed in {"ECLIPSE": {"additional_embeddings": 3}, "WIDER": {"embed_dim": 24}}.items():
        if overrides.get("init") == name:
            made = tiny_prior_transformer(**changed)
            if name == "ECLIPSE":  # whose files hold no time
                del made.time_embedding
            made.save_pretrained(tmp_path / name)
    places = {"DECODER": kandinsky_22_decoder(), "PRIOR": kandinsky_22_prior(), "TEXT": karlo(), "ALONE": alone}
    places |= {"ECLIPSE": tmp_path / "ECLIPSE", "WIDER": tmp_path / "WIDER"}
    places |= {"SMALL": stable_unclip_small(), "BOTH": karlo_variations(), "CONTROLNET": kandinsky_22_controlnet()}
    given = {key: places.get(value, value) if isinstance(value, str) else value for key, value in overrides.items()}
    with pytest.raises(InputError, match=message) as caught:
        script, config = configured(kind, shapes, tmp_path, **given)
        script.main(config)
    assert "\n" not in str(caught.value) and not (tmp_path / kind).exists()


def test_the_nine_channels_of_the_inpainting_decoder_see_masks(shapes, tmp_path):
    folder = kandinsky_22_inpaint()
    after = tune("kandinsky", shapes, tmp_path, init=folder, reads_masks=True, **{"train.weight_decay": 0})
    before = dict(Component(folder / "unet").iterate_tensors())["conv_in.weight"]
    assert after.config.reads_masks
    assert ((after.unet.conv_in.weight - before).abs().amax(dim=(0, 2, 3)) > 1e-3).all(), "all nine of them"


@pytest.mark.parametrize("kind", CLASSES)
def test_adapters_learn_alone_and_merge_into_plain_weights(kind, shapes, tmp_path):
    pytest.importorskip("peft")
    after = tune(kind, shapes, tmp_path, **{"lora.rank": 2}).state_dict()
    script, config = configured(kind, shapes, tmp_path / "again")
    before = stage(kind, config).state_dict()
    moved = {name for name in before if not torch.allclose(after[name], before[name], atol=1e-7)}
    targets = (".to_qkv.", ".to_out.") if stage_of(kind) == "prior" else (".to_", ".add_k_proj.", ".add_v_proj.")
    assert moved and all(any(part in name for part in targets) and name.endswith("weight") for name in moved)
    assert (tmp_path / kind / "adapters").is_dir()


def cached(data: Path, folder: Path, **settings: object) -> Path:
    from t2i.training.cache_data import Config, main

    file = folder.parent / f"{folder.name}.yaml"
    file.write_text(yaml.safe_dump({"data": {"path": str(data), "image_size": 16, "num_workers": 0}}))
    given = [f"{key}={value}" for key, value in {"output": folder, "dtype": "float32", **settings}.items()]
    main(load_config(Config, "cache", [str(file), *given]))
    return folder


def test_a_cache_holds_embeddings_as_they_are_and_trains_the_same(shapes, tmp_path):
    """Of a copy of the public folders, whose change it then sees."""
    clip, decoder = tmp_path / "clip", tmp_path / "decoder"
    shutil.copytree(kandinsky_22_prior(), clip)
    shutil.copytree(kandinsky_22_decoder(), decoder)
    cache = cached(shapes, tmp_path / "cache", clip=clip, autoencoder=decoder, variations=8)
    pairs = CachedPairs(cache)
    batch = pairs.__getitems__([(0, 0), (5, 0)])
    assert pairs.clip_facts is not None and not pairs.clip_facts.unit_length
    pictures = import_module("t2i.data").CaptionedPictures(configured("prior", shapes, tmp_path)[1].data)
    image = torch.stack([pictures.load_image(index) for index in (0, 5)])
    with torch.no_grad():
        z_i = load_clip(str(clip)).encode_image(image)
        torch.testing.assert_close(batch.latents, load_autoencoder(str(decoder)).encode(image), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(batch.image_embeds, z_i, atol=1e-5, rtol=1e-5)
    assert ((z_i.norm(dim=-1) - 1).abs() > 0.01).all()
    for kind in ("prior", "kandinsky"):
        more = {"clip": clip} | ({} if kind == "prior" else {"autoencoder": decoder})
        tune(kind, shapes, tmp_path / "cached", steps=1, cache=cache, **more)
        tune(kind, shapes, tmp_path / "frozen", steps=1, **more)
        one, other = ([line["loss"] for line in metrics(tmp_path / way / kind)] for way in ("cached", "frozen"))
        assert len(one) == 1 and one == pytest.approx(other, rel=1e-4)
    with pytest.raises(InputError, match="makes a vector for each caption .* leave it out"):
        cached(shapes, tmp_path / "other", clip=clip, text_encoder=kandinsky_21_decoder())
    movq = decoder / "movq" / "diffusion_pytorch_model.safetensors"
    movq.write_bytes(movq.read_bytes()[:-4] + b"\0\0\0\0")
    with pytest.raises(InputError, match="is stale: it was made with another autoencoder"):
        tune("kandinsky", shapes, tmp_path / "again", cache=cache, clip=clip, autoencoder=decoder)
    shutil.rmtree(clip / "text_encoder")
    tiny_text_tower(seed=9).save_pretrained(clip / "text_encoder")
    with pytest.raises(InputError, match="is stale: it was made with another clip"):
        tune("prior", shapes, tmp_path / "again", cache=cache, clip=clip)


LAYOUTS = {
    "karlo": "karlo",
    "kandinsky": "kandinsky-2-2-combined",
    "kandinsky21": "kandinsky-2-1-combined",
}


def drawn(pipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    steps = {"prior_num_inference_steps": 2, "num_inference_steps": 2, "guidance_scale": 3.0}
    return pipeline("red circle", **steps, generator=torch.Generator().manual_seed(0), output_type="pt").images


@pytest.mark.parametrize("kind", ["kandinsky", "kandinsky21", "karlo"])
def test_what_was_trained_is_assembled_into_a_pipeline_that_draws(kind, trained, tmp_path):
    given = names(kind)
    stages = {"clip": str(given["clip"]), "autoencoder": str(given["autoencoder"]), "decoder": str(trained(kind))}
    stages["prior"] = str(trained("prior"))
    folder = assemble_pipeline_folder(tmp_path, tmp_path / "model", **stages)
    pipeline = Text2ImagePipeline.from_pretrained(folder)
    for name in ("prior", "decoder"):
        kept = load_model((Prior, KandinskyDecoder, KarloDecoder), stages[name]).state_dict()
        assert all(torch.equal(value, kept[key]) for key, value in getattr(pipeline, name).state_dict().items())
    image = drawn(pipeline)
    assert image.shape == (1, 3, 16, 16) and image.std() > 0
    # In the public layout, and the trained prior beside a public decoder's folder.
    public = convert_folder(str(folder), tmp_path / "public", LAYOUTS[kind])
    unet = UNet2DConditionModel.from_pretrained(public / ("decoder" if kind == "karlo" else "unet"))
    assert all(torch.equal(value, pipeline.decoder.unet.state_dict()[key]) for key, value in unet.state_dict().items())
    torch.testing.assert_close(drawn(Text2ImagePipeline.from_pretrained(public)), image, atol=1e-4, rtol=1e-4)
    mixed = Text2ImagePipeline.from_pretrained(given["init"], prior=stages["prior"], clip=kandinsky_22_prior())
    assert torch.equal(mixed.prior.to_image.weight, pipeline.prior.to_image.weight)


@pytest.mark.parametrize("kind", CLASSES)
def test_previews_are_drawn(kind, shapes, tmp_path):
    more = {"sample.count": 2, "sample.prior_num_inference_steps": 2, "sample.num_inference_steps": 2}
    tune(kind, shapes, tmp_path, steps=1, **more, **{"train.sample_every": 1})
    assert list((tmp_path / kind).rglob("*.png"))


# Stable unCLIP's decoder


def test_stable_unclip_starts_as_it_is_published_with_its_schedule_and_its_null(shapes, tmp_path):
    folder = stable_unclip_images()
    after = tune("stable", shapes, tmp_path, steps=1, **{"train.learning_rate": 0})
    published = [("unet.", "unet"), ("normalizer.", "image_normalizer")]
    before = {f"{prefix}{name}": value for prefix, part in published for name, value in read(folder / part).items()}
    assert after.state_dict().keys() - before.keys() == {"null_states"}
    for name, value in before.items():
        torch.testing.assert_close(after.state_dict()[name], value, msg=name)
    null = after.null(1).expand()
    torch.testing.assert_close(null.text.states, load_text_encoder(folder).encode([""]).states)
    assert null.text.states.shape[1] == 77 and not null.embedding.any()
    own, theirs = (DDIMScheduler.from_pretrained(path / "scheduler") for path in (tmp_path / "stable", folder))
    torch.testing.assert_close(own.betas, theirs.betas)
    assert own.config.prediction_type == theirs.config.prediction_type == "v_prediction"
    vae = load_autoencoder(folder)
    picture = torch.rand(1, 3, 16, 16) * 2 - 1
    scaled = AutoencoderKL.from_pretrained(folder / "vae").encode(picture).latent_dist.mode() * 0.18215
    torch.testing.assert_close(vae.encode(picture), scaled, atol=1e-5, rtol=1e-4)


def read(part: Path) -> dict[str, torch.Tensor]:
    return dict(Component(part).iterate_tensors())


def test_stable_unclip_is_trained_on_all_levels_of_noise_and_told_of_each(shapes, tmp_path, monkeypatch):
    told: list = []
    noise = StableUnCLIPDecoder.noise_image_embeds

    def recorded(self, z_i, noisy=None, level=0):
        embedding = noise(self, z_i, noisy, level)
        told.append((self, z_i, noisy, level, embedding))
        return embedding

    monkeypatch.setattr(StableUnCLIPDecoder, "noise_image_embeds", recorded)
    tune("stable", shapes, tmp_path, steps=4, **{"train.learning_rate": 0})
    levels = torch.cat([level for _, _, _, level, _ in told])
    assert len(levels) == 32 and levels.unique().numel() > 25 and levels.min() < 200 < 800 < levels.max() < 1000
    # As diffusers' pipeline noises z_i and tells of the level, one by one
    decoder, z_i, noisy, level, embedding = told[-1]
    reference = StableUnCLIPImg2ImgPipeline.from_pretrained(stable_unclip_images())
    normalizer, schedule = reference.image_normalizer, reference.image_noising_scheduler
    scaled = schedule.add_noise(normalizer.scale(z_i), noisy, level)
    waves = get_timestep_embedding(level, 20, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(embedding, torch.cat([normalizer.unscale(scaled), waves], dim=1), atol=1e-5, rtol=1e-5)


def test_stable_unclip_trained_predicts_the_same_in_diffusers_and_goes_back_into_its_layout(trained, tmp_path):
    folder = stable_unclip_images()
    stages = {"clip": str(folder), "autoencoder": str(folder), "prior": "none", "decoder": str(trained("stable"))}
    own = assemble_pipeline_folder(tmp_path, tmp_path / "own", **stages)
    public = convert_folder(str(own), tmp_path / "public", "stable-unclip")
    mine, theirs = Text2ImagePipeline.from_pretrained(own), StableUnCLIPImg2ImgPipeline.from_pretrained(public)
    for pipeline in (mine, theirs):
        pipeline.set_progress_bar_config(disable=True)
    start = UNet2DConditionModel.from_pretrained(folder / "unet")
    assert (start.conv_in.weight - theirs.unet.conv_in.weight).abs().max() > 1e-3
    z_i, noise = (torch.randn(1, 20, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2))
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    settings = {"num_inference_steps": 3, "guidance_scale": 4.0, "latents": latents, "noise_level": 100}
    noised = partial(theirs.noise_image_embeddings, noise=noise)
    theirs.noise_image_embeddings = lambda image_embeds, noise_level, generator: noised(image_embeds, noise_level)
    expected = theirs(prompt="a cat", image_embeds=z_i, output_type="pt", **settings).images
    got = mine("a cat", image_embeds=z_i, image_embeds_noise=noise, output_type="pt", **settings).images
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=0)
    assert read(public / "image_normalizer").keys() == {"mean", "std"}


def test_stable_unclip_trains_the_same_from_a_cache(shapes, tmp_path):
    """Which needs a CLIP with both towers: here that of the small variant, whose text tower is in Karlo's folder."""
    folder, clip = stable_unclip_small(), karlo_variations()
    named = {"clip": clip, "autoencoder": folder, "text_encoder": folder}
    cache = cached(shapes, tmp_path / "cache", **named, variations=8)
    for way, more in {"cached": {"cache": cache}, "frozen": {}}.items():
        tune("stable", shapes, tmp_path / way, steps=1, init=folder, **named, **more)
    one, other = ([line["loss"] for line in metrics(tmp_path / way / "stable")] for way in ("cached", "frozen"))
    assert len(one) == 1 and one == pytest.approx(other, rel=1e-4)


# ECLIPSE's prior


def test_eclipse_starts_as_it_is_published_and_its_loss_is_that_of_the_paper(shapes, tmp_path):
    script, config = configured("eclipse", shapes, tmp_path)
    model = stage("eclipse", config)
    before = load_prior_transformer(Component(eclipse())).state_dict()
    assert before.keys() == model.state_dict().keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    text = load_clip(str(kandinsky_22_prior())).encode_text(["red circle", "blue circle", "red circle"])
    z_i, seen = torch.randn(3, 16, generator=torch.Generator().manual_seed(1)), []

    def drawn(noise, captions):
        seen.append(noise)
        return model(noise, captions)

    with torch.no_grad():
        parts = script.compute_eclipse_loss(config, drawn, text, z_i)
        prediction = model(seen[0], text)
    assert seen[0].std() > 0.5 and seen[0].shape == z_i.shape
    z_t = text.expand().embedding
    contrast = 0.0
    for row, others in enumerate([(0, 1), (0, 1, 2), (1, 2)]):  # the third caption is the first one's
        scores = [torch.cosine_similarity(prediction[row], z_t[other], dim=0) / 0.07 for other in others]
        own = torch.cosine_similarity(prediction[row], z_t[row], dim=0) / 0.07
        contrast += float(torch.tensor(scores).logsumexp(dim=0) - own) / 3
    error = float((prediction - z_i).square().mean())
    assert float(parts["contrast"]) == pytest.approx(contrast, rel=1e-4)
    assert float(parts["loss"]) == pytest.approx(error + 0.2 * contrast, rel=1e-4)


def test_eclipse_trained_predicts_the_same_in_diffusers_and_learns(trained, shapes, tmp_path):
    """No class of diffusers has its sequence: the reference is a PriorTransformer whose time no token attends to."""
    model = load_model(EclipsePrior, trained("eclipse")).eval()
    exported = convert_folder(str(trained("eclipse")), tmp_path / "prior", "prior-transformer")
    stored, start = read(exported), read(eclipse())
    assert stored.keys() == start.keys() and (stored["proj_in.weight"] - start["proj_in.weight"]).abs().max() > 1e-3
    theirs = save_eclipse_prior(tmp_path / "masked")
    time = theirs.config.num_embeddings + 1  # the place of its token
    places = stored["positional_embedding"]
    stored["positional_embedding"] = torch.cat([places[:, :time], places[:, :1], places[:, time:]], dim=1)
    assert not theirs.load_state_dict(stored, strict=False).unexpected_keys
    text = load_clip(str(kandinsky_22_prior())).encode_text(["red circle", ""])
    noise, width = torch.randn(2, 16, generator=torch.Generator().manual_seed(1)), 77 - text.states.shape[1]
    states = torch.nn.functional.pad(text.states, (0, 0, 0, width))
    mask = torch.nn.functional.pad(text.mask, (0, width))
    with torch.no_grad():
        reference = theirs(noise, 0, text.embedding, states, mask).predicted_image_embedding
        torch.testing.assert_close(model(noise, text), reference, atol=1e-4, rtol=1e-4)
    tune("eclipse", shapes, tmp_path, steps=30)
    lines = metrics(tmp_path / "eclipse")
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"] and lines[-1]["cosine"] > lines[0]["cosine"]


def test_eclipse_trained_draws_with_a_public_decoder(trained):
    settings = {"prior": str(trained("eclipse")), "clip": kandinsky_22_prior()}
    pipeline = Text2ImagePipeline.from_pretrained(kandinsky_22_decoder(), **settings)
    kept = load_model(EclipsePrior, trained("eclipse"))
    assert torch.equal(pipeline.prior.to_image.weight, kept.to_image.weight)
    assert drawn(pipeline).std() > 0
