"""Public priors: what they draw is what diffusers' pipelines draw; and PriorTransformer from Prior and back."""

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    DDPMScheduler,
    KandinskyPriorPipeline,
    KandinskyV22PriorPipeline,
    PriorTransformer,
    UnCLIPScheduler,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from t2i.diffusion.condition import TextEncoding
from t2i.diffusion.respaced import UnCLIPRespacedScheduler
from t2i.diffusion.sampling_loop import Sampling
from t2i.errors import InputError
from t2i.files.component import Component
from t2i.files.model_folder import load_model
from t2i.files.untrusted import TensorSpec, check_tensor_specs
from t2i.interop.prior_transformer import (
    RenamedComponent,
    convert_prior_config,
    load_prior_transformer,
    map_tensor_names,
    read_prior_config,
    to_prior_transformer,
)
from t2i.networks.prior import Prior
from t2i.networks.public.eclipse import EclipsePrior
from t2i.networks.public.transformers_clip import TransformersCLIP
from t2i.sampling.embeddings import get_default_guidance_scale, sample_image_embeds
from tests.helpers.kandinsky_folders import kandinsky_22_combined, kandinsky_22_prior
from tests.helpers.public_folders import (
    EMBED_DIM,
    prior_scheduler,
    randomised,
    save_eclipse_prior,
    tiny_image_processor,
    tiny_image_tower,
    tiny_prior_transformer,
    tiny_text_tower,
    tiny_tokenizer,
)

EMOJI = Path(__file__).parents[2] / "models" / "emoji"
CAPTIONS = ["a cat", "two red dogs and a cat, " * 3, "", "red dog"]
STEPS = 4


class ToldDDPM(DDPMScheduler):
    """DDPM for the reference's pipelines, which tell every scheduler the next timestep."""

    def step(self, model_output, timestep, sample, prev_timestep=None, generator=None):  # type: ignore[override]  # noqa: ANN001, ANN201
        return super().step(model_output, int(timestep), sample, generator)


def ddpm(kind: type[DDPMScheduler]) -> DDPMScheduler:
    return kind(beta_schedule="squaredcos_cap_v2", prediction_type="sample", clip_sample_range=5.0)


SCHEDULERS: dict[str, Any] = {
    "unclip": lambda: (prior_scheduler(), UnCLIPRespacedScheduler(**of_config(prior_scheduler()))),
    "ddpm": lambda: (ddpm(ToldDDPM), ddpm(DDPMScheduler)),
}


def of_config(scheduler: UnCLIPScheduler) -> dict[str, Any]:
    return {key: value for key, value in scheduler.config.items() if not key.startswith("_")}


@cache
def clip() -> TransformersCLIP:
    folder = kandinsky_22_prior()
    text, image = (Component(folder / name, folder, stem="model") for name in ("text_encoder", "image_encoder"))
    return TransformersCLIP.from_components(text, folder / "tokenizer", image, folder / "image_processor")


@cache
def imported() -> Prior:
    prior = load_prior_transformer(Component(kandinsky_22_prior() / "prior"), clip())
    assert isinstance(prior, Prior)
    return prior


def noise(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def generators(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(100 + i) for i in range(count)]


def padded(text: TextEncoding, length: int = 77) -> dict[str, Tensor]:
    """What a PriorTransformer reads of captions; what stands in the padding, nobody may see."""
    missing = length - text.mask.shape[1]
    states = torch.cat([text.states, noise(len(text), missing, text.states.shape[2])], dim=1)
    mask = nn.functional.pad(text.mask, (0, missing))
    return {"proj_embedding": text.embedding, "encoder_hidden_states": states, "attention_mask": mask}


def test_one_prediction_of_an_imported_prior_is_diffusers() -> None:
    prior, text = imported(), clip().encode_text(CAPTIONS)
    x, t = noise(len(CAPTIONS), EMBED_DIM), torch.tensor([999, 500, 20, 0])
    with torch.no_grad():
        theirs = tiny_prior_transformer()(x, t, **padded(text)).predicted_image_embedding
        whole, stepwise = prior(x, t, text), prior.step(x, t, prior.prepare(text))
    torch.testing.assert_close(whole, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(stepwise, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        prior.unscale_image_embeds(x), tiny_prior_transformer().post_process_latents(x), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(prior.scale_image_embeds(prior.unscale_image_embeds(x)), x, atol=1e-5, rtol=0)


def reference(kind: type, scheduler: Any, pad: str = "!") -> Any:
    pipe = kind(
        prior=tiny_prior_transformer(),
        image_encoder=tiny_image_tower(),
        text_encoder=tiny_text_tower(),
        tokenizer=tiny_tokenizer(pad),
        scheduler=scheduler,
        image_processor=tiny_image_processor(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(prompts: list[str], negatives: list[str] | None, scheduler: Any, scale: float, x: Tensor) -> Tensor:
    text, away = clip().encode_text(prompts), None if negatives is None else clip().encode_text(negatives)
    return sample_image_embeds(
        imported(), scheduler, text, away, Sampling(STEPS, generators(len(prompts)), scale, noise=x)
    )


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize(
    ("kind", "prompts", "negatives"),
    [
        (KandinskyV22PriorPipeline, ["a red cat"], None),
        (KandinskyV22PriorPipeline, CAPTIONS, None),
        (KandinskyV22PriorPipeline, CAPTIONS, ["a dog", "", "red", "a cat and a dog"]),
        (KandinskyPriorPipeline, ["a red cat"], ["dogs, many dogs"]),
        (KandinskyPriorPipeline, CAPTIONS, None),
    ],
)
def test_embeddings_are_those_of_kandinsky_s_prior_pipelines(
    kind: type, prompts: list[str], negatives: list[str] | None, scale: float, scheduler: str
) -> None:
    theirs, ours = SCHEDULERS[scheduler]()
    count = len(prompts)
    x = noise(2 * count if negatives else count, EMBED_DIM)  # with negatives it draws those too
    pad = "!" if kind is KandinskyV22PriorPipeline else "<|endoftext|>"
    settings = {"num_inference_steps": STEPS, "guidance_scale": scale, "latents": x, "generator": generators(len(x))}
    expected = reference(kind, theirs, pad)(prompts, negatives, **settings).image_embeds
    found = drawn(prompts, negatives, ours, scale, x[:count])
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    assert (found - drawn(prompts, negatives, ours, scale + 0.5, x[:count])).abs().max() > 1e-3  # it can fail


class Stopped(Exception):
    pass


class Stop(nn.Module):
    """Karlo's text_proj, at which the prior's stage ends, and what comes after it."""

    device = torch.device("cpu")

    def forward(self, image_embeddings: Tensor, **_: Any) -> None:
        raise Stopped(image_embeddings)


@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize("prompts", [["a red cat"], CAPTIONS])
def test_embeddings_are_those_of_the_prior_stage_of_diffusers_unclip_pipeline(prompts: list[str], scale: float) -> None:
    from diffusers.pipelines.deprecated.unclip.pipeline_unclip import UnCLIPPipeline

    theirs, ours = SCHEDULERS["unclip"]()
    pipe = UnCLIPPipeline(
        prior=tiny_prior_transformer(),
        decoder=Stop(),
        text_encoder=tiny_text_tower(),
        tokenizer=tiny_tokenizer("!"),
        text_proj=Stop(),
        super_res_first=Stop(),
        super_res_last=Stop(),
        prior_scheduler=theirs,
        decoder_scheduler=theirs,
        super_res_scheduler=theirs,
    )
    pipe.set_progress_bar_config(disable=True)
    x = noise(len(prompts), EMBED_DIM)
    settings = {"prior_num_inference_steps": STEPS, "prior_guidance_scale": scale, "prior_latents": x}
    with pytest.raises(Stopped) as stopped:
        pipe(prompts, generator=generators(len(prompts)), **settings)
    torch.testing.assert_close(drawn(prompts, None, ours, scale, x), stopped.value.args[0], atol=1e-5, rtol=1e-5)


def test_a_picture_does_not_depend_on_its_batch() -> None:
    _, scheduler = SCHEDULERS["unclip"]()
    x = noise(len(CAPTIONS), EMBED_DIM)
    whole = drawn(CAPTIONS, None, scheduler, 4.0, x)
    torch.testing.assert_close(drawn(CAPTIONS[:1], None, scheduler, 4.0, x[:1]), whole[:1], atol=1e-5, rtol=1e-5)


def test_a_public_prior_is_guided_by_4_and_its_null_is_the_empty_caption() -> None:
    prior, empty = imported(), clip().encode_text([""])
    assert get_default_guidance_scale(prior) == 4 and get_default_guidance_scale(None) == 2
    assert not prior.config.unit_length
    torch.testing.assert_close(prior.null(2).expand().states[1], empty.states[0])
    torch.testing.assert_close(prior.null(2).expand().embedding[1], empty.embedding[0])


def test_weights_of_16_bits_stay_so(tmp_path: Path) -> None:
    tiny_prior_transformer().half().save_pretrained(tmp_path)
    prior = load_prior_transformer(Component(tmp_path), clip())
    assert {value.dtype for value in prior.state_dict().values()} == {torch.float16}
    assert load_prior_transformer(Component(tmp_path), clip(), torch.float32).dtype == torch.float32


def random_prior(**changed: Any) -> Prior:
    torch.manual_seed(0)
    sizes = {"embed_dim": 12, "text_width": 12, "context_length": 9, "width": 16, "depth": 2, "heads": 2}
    prior = randomised(Prior(**sizes | changed))
    prior.std.abs_().add_(0.1)
    return prior


def caption(prior: Prior, lengths: tuple[int, ...] = (3, 7)) -> TextEncoding:
    config = prior.config
    z_t = nn.functional.normalize(noise(len(lengths), config.embed_dim, seed=6), dim=-1)
    states = noise(len(lengths), max(lengths), config.text_width, seed=7)
    return TextEncoding(z_t, states, torch.arange(max(lengths)) < torch.tensor(lengths)[:, None])


class UnitCLIP:
    """Stands for a CLIP of this project's own."""

    unit_length, embed_dim, text_width = True, 12, 12

    def encode_text(self, texts: list[str]) -> TextEncoding:
        return random_prior().null(len(texts))


@pytest.mark.parametrize("unit_length", [True, False])
def test_a_prior_exported_and_imported_again_is_the_same(tmp_path: Path, unit_length: bool) -> None:
    prior = random_prior(unit_length=unit_length)
    made = to_prior_transformer(prior)
    made.save_pretrained(tmp_path)
    loaded, text = PriorTransformer.from_pretrained(tmp_path), caption(prior)
    x, t = noise(2, 12), torch.tensor([700, 3])
    with torch.no_grad():
        expected = prior(x, t, text)
        theirs = loaded(x, t, **padded(text, 9)).predicted_image_embedding
    torch.testing.assert_close(theirs, expected, atol=1e-5, rtol=0)
    z_i = loaded.post_process_latents(x)
    wanted_z_i = nn.functional.normalize(z_i, dim=-1) if unit_length else z_i
    torch.testing.assert_close(wanted_z_i, prior.unscale_image_embeds(x), atol=1e-5, rtol=0)

    again = load_prior_transformer(Component(tmp_path), UnitCLIP() if unit_length else None)
    assert isinstance(again, Prior) and again.config.unit_length == unit_length
    state = prior.state_dict()
    for name, value in again.state_dict().items():
        if unit_length or not name.startswith("null_"):
            torch.testing.assert_close(value, state[name], atol=1e-6, rtol=1e-6)


def test_the_shipped_prior_predicts_the_same_in_diffusers(tmp_path: Path) -> None:
    prior = load_model(Prior, EMOJI / "prior")
    to_prior_transformer(prior).save_pretrained(tmp_path)
    theirs, text = PriorTransformer.from_pretrained(tmp_path), caption(prior, (4, 11, 32))
    x, t = noise(3, prior.config.embed_dim), torch.tensor([999, 400, 1])
    with torch.no_grad():
        expected = prior(x, t, text)
        found = theirs(x, t, **padded(text, prior.config.context_length)).predicted_image_embedding
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changed", "said"),
    [({"learned_variance": True}, "learned the variance"), ({"text_width": 10}, "10 and 12 dimensions")],
)
def test_a_prior_that_no_prior_transformer_can_be_is_not_exported(changed: dict, said: str) -> None:
    with pytest.raises(InputError, match=said):
        to_prior_transformer(random_prior(**changed))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"added_emb_type": None}, "added_emb_type = None, only 'prd' is read"),
        ({"embedding_proj_norm_type": "layer"}, "no norm of z_t"),
        ({"norm_in_type": "layer"}, "no norm before its first block"),
        ({"encoder_hid_proj_type": None}, "through a linear layer"),
        ({"time_embed_act_fn": "gelu"}, "has SiLU"),
        ({"embedding_proj_dim": 20}, "embedding_proj_dim = 20, only 16 is read"),
        ({"time_embed_dim": 20}, "time_embed_dim = 20, only 32 is read"),
        ({"additional_embeddings": 5}, "additional_embeddings = 5; 4 are read: z_t, time"),
    ],
)
def test_a_prior_transformer_that_no_prior_can_be_is_refused(tmp_path: Path, changed: dict, said: str) -> None:
    tiny_prior_transformer(**{"num_layers": 1, **changed}).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=said) as found:
        load_prior_transformer(Component(tmp_path))
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config, tensors: config.update(num_layers=3), "lacks tensors.*transformer_blocks.2"),
        (lambda config, tensors: config.update(num_embeddings=76), "misshapen.*positional_embedding"),
        (lambda config, tensors: config.update(num_attention_heads="2"), "num_attention_heads"),
        (lambda config, tensors: config.update(additional_embeddings=3), "unknown.*time|misshapen"),
        (lambda config, tensors: config.update(clip_embed_dim=20), "clip_embed_dim = 20, only 16 is read"),
        (lambda config, tensors: config.update(_class_name="Prior"), "must be a PriorTransformer"),
        (lambda config, tensors: tensors.pop("transformer_blocks.1.attn1.to_q.weight"), "lacks tensors.*to_q"),
        (lambda config, tensors: tensors["clip_std"].zero_(), "statistics were never set"),
    ],
)
def test_files_of_another_shape_than_their_configuration_are_refused(tmp_path: Path, change: Any, said: str) -> None:
    shutil.copytree(kandinsky_22_prior() / "prior", tmp_path / "prior")
    weights, path = tmp_path / "prior" / "diffusion_pytorch_model.safetensors", tmp_path / "prior" / "config.json"
    config, tensors = json.loads(path.read_text()), load_file(weights)
    change(config, tensors)
    path.write_text(json.dumps(config))
    save_file(tensors, weights)
    with pytest.raises(InputError, match=said):
        load_prior_transformer(Component(tmp_path / "prior"))


def test_a_prior_of_another_clip_s_width_is_refused() -> None:
    with pytest.raises(InputError, match="they do not belong together"):
        load_prior_transformer(Component(kandinsky_22_prior() / "prior"), UnitCLIP())


# ECLIPSE


@pytest.mark.parametrize("prompts", [["a red cat"], CAPTIONS])
def test_an_eclipse_prior_is_a_prior_transformer_whose_time_no_token_sees(tmp_path: Path, prompts: list[str]) -> None:
    theirs = save_eclipse_prior(tmp_path / "prior")
    prior = load_prior_transformer(Component(tmp_path / "prior"), clip())
    assert isinstance(prior, EclipsePrior)
    text, x = clip().encode_text(prompts), noise(len(prompts), EMBED_DIM)
    with torch.no_grad():
        expected = theirs(x, 7, **padded(text)).predicted_image_embedding
    given = sample_image_embeds(prior, None, text, None, Sampling(1, generators(len(prompts)), noise=x), candidates=3)
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=0)

    own = torch.stack([torch.randn(EMBED_DIM, generator=one) for one in generators(len(prompts))])
    with torch.no_grad():
        expected = theirs(own, 7, **padded(text)).predicted_image_embedding
    free = sample_image_embeds(prior, None, text, None, Sampling(1, generators(len(prompts))))
    torch.testing.assert_close(free, expected, atol=1e-5, rtol=0)
    best = sample_image_embeds(prior, None, text, None, Sampling(1, generators(len(prompts))), candidates=4)
    cosines = [nn.functional.cosine_similarity(one, text.embedding) for one in (free, best)]
    assert (cosines[1] >= cosines[0] - 1e-6).all()


def test_an_eclipse_prior_is_saved_loaded_and_never_guided(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_eclipse_prior(tmp_path / "prior")
    prior = load_prior_transformer(Component(tmp_path / "prior"))
    prior.save_pretrained(tmp_path / "saved")
    again = load_model((Prior, EclipsePrior), tmp_path / "saved")
    text = clip().encode_text(CAPTIONS)
    draws = [sample_image_embeds(one, None, text, text, Sampling(1, generators(4), 3.0)) for one in (prior, again)]
    torch.testing.assert_close(*draws)
    assert get_default_guidance_scale(prior) == 1
    assert "prior_guidance_scale has no effect: it cannot guide a prior of one pass" in caplog.text


def test_an_eclipse_prior_draws_in_a_pipeline_and_is_saved_with_it(tmp_path: Path) -> None:
    """As in ECLIPSE's own use of Kandinsky, what the decoder is guided away from is the prior's own answer."""
    from t2i.pipelines import Text2ImagePipeline

    shutil.copytree(kandinsky_22_combined(), tmp_path / "public")
    shutil.rmtree(tmp_path / "public" / "prior_prior")
    theirs = save_eclipse_prior(tmp_path / "public" / "prior_prior")
    pipe = Text2ImagePipeline.from_pretrained(tmp_path / "public")
    pipe.set_progress_bar_config(disable=True)
    assert isinstance(pipe.prior, EclipsePrior) and pipe.prior_scheduler is None
    x, prompts = noise(2, EMBED_DIM), ["a red cat", "a dog"]
    with torch.no_grad():
        expected, away = (
            theirs(x, 0, **padded(clip().encode_text(texts))).predicted_image_embedding
            for texts in (prompts, ["red"] * 2)
        )
    settings = {"num_inference_steps": 2, "output_type": "pt", "prior_latents": x}
    drawn = pipe(prompts, decoder_negative_prompt="red", generator=generators(2), **settings)
    torch.testing.assert_close(drawn.image_embeds, expected, atol=1e-5, rtol=0)
    given = pipe(prompts, negative_image_embeds=away, generator=generators(2), **settings)
    torch.testing.assert_close(drawn.images, given.images, atol=1e-4, rtol=0)
    pipe.save_pretrained(tmp_path / "saved")
    again = Text2ImagePipeline.from_pretrained(tmp_path / "saved")
    again.set_progress_bar_config(disable=True)
    embeds = again(prompts, generator=generators(2), **settings).image_embeds
    torch.testing.assert_close(embeds, expected, atol=1e-5, rtol=0)


def test_a_prior_with_the_time_s_weights_but_not_its_token_is_refused(tmp_path: Path) -> None:
    tiny_prior_transformer(additional_embeddings=3).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="unknown tensors.*time_embedding"):
        load_prior_transformer(Component(tmp_path))


# Real sizes, without memory


class Described(Component):
    """A component of which only the header is there."""

    def __init__(self, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]):
        self.folder, self.root, self.config, self.files = Path("prior"), None, config, {}
        self.tensor_specs = {name: TensorSpec("F16", shape) for name, shape in shapes.items()}


def published(dim: int) -> dict[str, tuple[int, ...]]:
    """The tensors of Karlo's prior (768 dimensions) and of Kandinsky 2.2's (1280)."""
    shapes: dict[str, tuple[int, ...]] = {"positional_embedding": (1, 81, 2048), "prd_embedding": (1, 1, 2048)}
    shapes |= {"clip_mean": (1, dim), "clip_std": (1, dim)}
    layers = {"time_embedding.linear_1": (2048, 2048), "time_embedding.linear_2": (2048, 2048)}
    layers |= {name: (2048, dim) for name in ("proj_in", "embedding_proj", "encoder_hidden_states_proj")}
    layers |= {"norm_out": (2048,), "proj_to_clip_embeddings": (dim, 2048)}  # type: ignore[dict-item]
    for i in range(20):
        block = f"transformer_blocks.{i}."
        layers |= {block + norm: (2048,) for norm in ("norm1", "norm3")}  # type: ignore[misc]
        layers |= {f"{block}attn1.{name}": (2048, 2048) for name in ("to_q", "to_k", "to_v", "to_out.0")}
        layers |= {block + "ff.net.0.proj": (8192, 2048), block + "ff.net.2": (2048, 8192)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return shapes


@pytest.mark.parametrize("dim", [768, 1280])
def test_the_published_priors_have_the_listed_tensors_and_become_this_project_s(dim: int) -> None:
    config = {"num_attention_heads": 32, "attention_head_dim": 64, "num_layers": 20, "embedding_dim": dim}
    config |= {"num_embeddings": 77, "additional_embeddings": 4, "dropout": 0.0}
    shapes = published(dim)
    with torch.device("meta"):
        theirs = {name: tuple(one.shape) for name, one in PriorTransformer(**config).state_dict().items()}
    assert theirs == shapes and len(shapes) == 338

    part = Described(config, shapes)
    settings = read_prior_config(part, 4)
    with torch.device("meta"):
        prior = Prior(**convert_prior_config(settings))
    expected = {name: one for name, one in prior.state_dict().items() if not name.startswith("null_")}
    check_tensor_specs(expected, RenamedComponent(part, map_tensor_names(20)).tensor_specs, part.folder)
    assert sum(one.numel() for one in prior.parameters()) == sum(
        torch.Size(shape).numel() for name, shape in shapes.items() if not name.startswith("clip_")
    )


def test_the_published_eclipse_prior_becomes_this_project_s() -> None:
    config = {"num_attention_heads": 16, "attention_head_dim": 32, "num_layers": 10, "embedding_dim": 1280}
    with torch.device("meta"):
        theirs = PriorTransformer(**config, additional_embeddings=3).state_dict()
    shapes = {name: tuple(one.shape) for name, one in theirs.items() if not name.startswith("time_embedding.")}
    part = Described(config | {"additional_embeddings": 3}, shapes)
    with torch.device("meta"):
        prior = EclipsePrior(**convert_prior_config(read_prior_config(part, 3)))
    names = {ours: parts for ours, parts in map_tensor_names(10, time=False).items() if ours not in ("mean", "std")}
    check_tensor_specs(prior.state_dict(), RenamedComponent(part, names).tensor_specs, part.folder)
    assert 33e6 < sum(one.numel() for one in prior.parameters()) < 36e6  # "33 million" (Patel et al. 2023)
