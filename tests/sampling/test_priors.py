"""Priors of every kind: one function draws with any of them; trained ones save, load and resume."""

import json
from pathlib import Path

import pytest
import torch
from t2i.training.common.preview import SampleConfig
from t2i.training.train_prior import Config, main

from t2i import Text2ImagePipeline
from t2i.config import load_config
from t2i.diffusion.condition import TextEncoding
from t2i.diffusion.guidance import Guidance
from t2i.diffusion.sampling_loop import Sampling
from t2i.errors import InputError
from t2i.evaluation.priors import evaluate_prior_splits
from t2i.networks.autoregressive_prior import AutoregressivePrior
from t2i.networks.regression_prior import RegressionPrior
from t2i.sampling.embeddings import (
    build_candidate_generators,
    load_prior,
    sample_image_embeds,
    select_nearest_candidates,
)
from t2i.sampling.sample import sample_prior
from tests.helpers.processes.forked import run_program
from tests.helpers.small_priors import LENGTH, D, W, autoregressive, captions, diffusion, shaken, unit
from tests.helpers.stages import CONFIGS, arguments, seeds

# Candidates


def test_the_nearest_candidate_has_the_largest_cosine():
    z_t = torch.tensor([[1.0, 0], [0, 1]])
    z_i = torch.tensor([[0.6, 0.8], [0.8, 0.6], [-1, 0], [1, 0], [0, 1], [0, -1]])
    assert select_nearest_candidates(z_i, z_t).tolist() == [[0.800000011920929, 0.6000000238418579], [0, 1]]
    assert torch.equal(select_nearest_candidates(z_t, z_t), z_t)
    long = torch.tensor([[9.0, 9], [0.5, 0]])  # of embeddings that are not of unit length
    assert select_nearest_candidates(long, z_t[:1]).tolist() == [[0.5, 0]]


def draw_any(kind: str, text: TextEncoding, numbers: list[int], candidates: int, noise=None) -> torch.Tensor:
    prior, scheduler = diffusion() if kind == "diffusion" else (autoregressive(), None)
    return sample_image_embeds(prior, scheduler, text, None, Sampling(4, seeds(*numbers), 2.0, noise), candidates)


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_candidates_are_the_plain_draw_and_others_of_which_the_nearest_is_taken(kind):
    text = captions(4, 6, 9)
    if kind == "diffusion":
        plain = sample_prior(*diffusion(), text, None, Sampling(4, seeds(1, 2, 3), 2.0))
    else:
        plain = autoregressive().sample_image_embeds(text, None, Sampling(1, seeds(1, 2, 3), 2.0))
    torch.testing.assert_close(draw_any(kind, text, [1, 2, 3], 1), plain)
    for i in range(3):
        one = text.map_tensors(lambda tensor, i=i: tensor[i : i + 1])
        generators = build_candidate_generators(*seeds(i + 1), 4)
        if kind == "diffusion":
            candidates = [sample_prior(*diffusion(), one, None, Sampling(4, [stream], 2.0)) for stream in generators]
        else:
            candidates = [
                autoregressive().sample_image_embeds(one, None, Sampling(1, [stream], 2.0)) for stream in generators
            ]
        torch.testing.assert_close(candidates[0][0], plain[i], atol=1e-5, rtol=0)
        dots = torch.cat(candidates) @ text.embedding[i]
        best = draw_any(kind, text, [1, 2, 3], 4)[i]
        torch.testing.assert_close(best, candidates[int(dots.argmax())][0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["diffusion", "autoregressive"])
def test_a_draw_does_not_depend_on_its_batch(kind):
    text = captions(6, 6, 6)
    together = draw_any(kind, text, [5, 6, 7], 2)
    alone = draw_any(kind, text.map_tensors(lambda tensor: tensor[1:2]), [6], 2)
    torch.testing.assert_close(alone[0], together[1], atol=1e-5, rtol=0)


def test_a_given_noise_is_the_only_candidate():
    text, noise = captions(4, 6), torch.randn(2, D)
    one = draw_any("diffusion", text, [1, 2], 1, noise=noise)
    torch.testing.assert_close(draw_any("diffusion", text, [8, 9], 5, noise=noise), one)


def test_what_has_no_effect_on_a_prior_is_said_once_and_changes_nothing(caplog):
    text = captions(4, 6)
    regression = shaken(RegressionPrior(D, W, "mlp", 8))
    cases = (
        (*diffusion(), {"temperature": 0.5}, ["prior_temperature"]),
        (autoregressive(), None, {"noise": torch.randn(2, D), "candidates": 8}, ["prior_latents"]),
        (
            regression,
            None,
            {"noise": torch.randn(2, D), "temperature": 1.0, "guidance": 3.0, "negative": text},
            ["prior_latents", "prior_temperature", "prior_guidance_scale", "negative_prompt"],
        ),
    )
    for prior, scheduler, unused, names in cases:
        candidates, temperature = unused.get("candidates", 1), unused.get("temperature")
        expected = sample_image_embeds(prior, scheduler, text, None, Sampling(2, seeds(0, 1)), candidates)
        assert not caplog.records
        sampling = Sampling(2, seeds(0, 1), unused.get("guidance"), unused.get("noise"))
        negative = unused.get("negative")
        drawn = sample_image_embeds(prior, scheduler, text, negative, sampling, candidates, temperature)
        assert torch.equal(drawn, expected)
        assert [record.message.split()[0] for record in caplog.records] == names
        caplog.clear()


def test_an_evaluation_and_a_preview_guide_a_prior_as_the_pipeline_does_if_nothing_is_said():
    torch.manual_seed(0)
    prior = AutoregressivePrior(D, W, LENGTH, 32, 2, 4, 6, 32, regression={"kind": "mlp", "width": 8})
    null = TextEncoding(torch.zeros(1, D), torch.zeros(1, 2, W), torch.ones(1, 2, dtype=torch.bool))
    prior.set_embed_statistics(null, unit(300, D))
    shaken(prior)
    pairs = {"train": Pairs(unit(10, D), unit(10, D, seed=3))}
    default, one, two = (
        evaluate_prior_splits(prior, None, pairs, Sampling(25, guidance=scale)) for scale in (None, 1.0, 2.0)
    )
    assert default == one != two
    assert SampleConfig().prior_guidance_scale is None and SampleConfig(prior_guidance_scale=1.5).prior_guidance_scale


def test_without_a_prior_the_text_embedding_is_drawn():
    text = captions(4, 6)
    torch.testing.assert_close(
        sample_image_embeds(None, None, text, None, Sampling(4, seeds(1, 2), 2.0)), text.embedding
    )


def test_guidance_by_noise_levels_is_refused_by_a_prior_that_has_none():
    with pytest.raises(InputError, match="autoregressive prior must be a number alone"):
        sample_image_embeds(
            autoregressive(), None, captions(4), None, Sampling(4, seeds(1), Guidance(2.0, rescale=0.5))
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prior_guidance_scale": Guidance(2.0, rescale=0.5)}, "autoregressive prior must be a number alone"),
        ({"prior_sampler": "ddim"}, "prior_sampler needs a diffusion prior, which this is not; got 'ddim'"),
    ],
)
def test_what_is_of_diffusion_is_refused_by_a_pipeline_of_another_prior_before_work_starts(
    pipeline, monkeypatch, arguments, message
):
    other = Text2ImagePipeline.from_pipe(
        pipeline, prior=autoregressive(embed_dim=pipeline.clip.embed_dim), prior_scheduler=None
    )
    monkeypatch.setattr(other, "encode_prompt", lambda *_: pytest.fail("work has started"))
    with pytest.raises(InputError, match=message):
        other("red circle", **arguments)


# Trained, saved, loaded, measured


def train_kind(kind: str, data: Path, runs: Path, folder: Path, **settings) -> Path:
    file = str(CONFIGS / "tiny" / ("prior.yaml" if kind == "diffusion" else f"prior-{kind}.yaml"))
    given = arguments("prior", data, folder, **{"clip": runs / "clip", "train.output": folder / kind} | settings)
    main(load_config(Config, "prior", [file, *given[1:]]))
    return folder / kind


@pytest.mark.parametrize("kind", ["autoregressive", "linear", "mlp"])
def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(kind, shapes, runs, tmp_path):
    whole = load_prior(train_kind(kind, shapes, runs, tmp_path / "whole", steps=4))[0]
    train_kind(kind, shapes, runs, tmp_path / "broken", steps=2)
    again = load_prior(train_kind(kind, shapes, runs, tmp_path / "broken", steps=4))[0]
    assert all(torch.equal(one, again.state_dict()[name]) for name, one in whole.state_dict().items())


SCRIPT = """
import json, sys, torch
from t2i import Text2ImagePipeline
found = {}
for folder in sys.argv[1:]:
    pipeline = Text2ImagePipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    drawn = pipeline("red circle", generator=torch.Generator().manual_seed(3), output_type="latent",
        num_inference_steps=2, prior_num_inference_steps=3)
    found[folder] = [drawn.image_embeds[0].tolist(), pipeline.components["prior"].__class__.__name__]
print(json.dumps(found))
"""


def test_every_prior_saves_loads_in_a_fresh_process_and_draws(pipeline, shapes, runs, tmp_path):
    expected = {}
    for kind in ("autoregressive", "linear", "mlp", "none"):
        folder = tmp_path / f"pipeline-{kind}"
        prior, scheduler = load_prior("none" if kind == "none" else train_kind(kind, shapes, runs, tmp_path))
        made = Text2ImagePipeline.from_pipe(pipeline, prior=prior, prior_scheduler=scheduler)
        seen = []
        drawn = made(
            "red circle",
            generator=seeds(3),
            output_type="latent",
            num_inference_steps=2,
            prior_num_inference_steps=3,
            on_preview=seen.append,
        )
        made.save_pretrained(folder)
        expected[str(folder)] = [drawn.image_embeds[0], type(prior).__name__]
        if kind == "autoregressive":
            steps = [one for one in seen if one.stage == "prior"]
            assert [one.step for one in steps] == list(range(1, prior.codes_per_embedding + 1))
            torch.testing.assert_close(steps[-1].estimate, drawn.image_embeds)
            with pytest.raises(InputError, match="only the diffusion prior goes with a scheduler"):
                Text2ImagePipeline.from_pipe(pipeline, prior=prior)
            prior.register_to_config(clip_fingerprint="another")
            with pytest.raises(InputError, match="the prior was trained with the CLIP another"):
                Text2ImagePipeline.from_pipe(pipeline, prior=prior, prior_scheduler=None)
    ran = run_program(["-c", SCRIPT, *expected])
    assert ran.returncode == 0, ran.stderr
    for folder, (z_i, kind) in json.loads(ran.stdout.splitlines()[-1]).items():
        torch.testing.assert_close(torch.tensor(z_i), expected[folder][0], atol=1e-5, rtol=0)
        assert kind == expected[folder][1]


def test_candidates_reach_the_pipeline(pipeline):
    settings = {"output_type": "latent", "num_inference_steps": 1, "prior_num_inference_steps": 3}
    drawn = [
        pipeline("red circle", generator=seeds(*range(8)), num_images_per_prompt=8, prior_candidates=count, **settings)
        for count in (1, 2, 6)
    ]
    z_t = pipeline.encode_prompt(["red circle"]).embedding[0]
    one, two, six = (result.image_embeds @ z_t for result in drawn)
    assert (two >= one - 1e-6).all() and (six >= one - 1e-6).all() and six.mean() > one.mean()
    default = pipeline("red circle", generator=seeds(*range(8)), num_images_per_prompt=8, **settings)
    torch.testing.assert_close(default.image_embeds, drawn[1].image_embeds)
    with pytest.raises(InputError, match="prior_candidates must be an integer from 1 to 64, got 0"):
        pipeline("red circle", prior_candidates=0)


class Pairs:
    """What an evaluation needs of a cache's split; the captions are encoded as `z_t`."""

    def __init__(self, z_i: torch.Tensor, z_t: torch.Tensor):
        self.z_i, self.z_t, self.rows = z_i, z_t, [None]

    def __len__(self) -> int:
        return len(self.z_i)

    def open_shard(self, _: int) -> dict[str, torch.Tensor]:
        return {"image_embeds": self.z_i}

    def __getitems__(self, keys):
        rows = [index for index, _ in keys]
        states = torch.zeros(len(rows), 1, W)
        text = TextEncoding(self.z_t[rows], states, states[..., 0] == 0)
        return type("Batch", (), {"text": text, "image_embeds": self.z_i[rows]})


def test_a_prior_that_knows_the_answer_has_cosine_and_retrieval_1_and_one_that_mixes_them_up_has_none():
    z_i = torch.eye(D)
    right = {"train": Pairs(z_i[:10], z_i[:10]), "held_out": Pairs(z_i[10:], z_i[10:])}
    for split, count in (("train", 10), ("held_out", 6)):
        score = evaluate_prior_splits(None, None, right, Sampling(25))[split]
        assert score == {"captions": count, "cosine": 1, "retrieval": 1, "text": 1, "true_text": 1}
    wrong = {"train": Pairs(z_i, z_i.roll(1, dims=0))}
    assert evaluate_prior_splits(None, None, wrong, Sampling(25))["train"] == {
        "captions": D, "cosine": 0, "retrieval": 0, "text": 1, "true_text": 0,
    }  # fmt: skip


def test_a_regression_is_taken_over_and_what_fits_nothing_is_refused(shapes, runs, tmp_path):
    regression = train_kind("mlp", shapes, runs, tmp_path)
    prior = load_prior(train_kind("autoregressive", shapes, runs, tmp_path, regression=regression))[0]
    started = load_prior(regression)[0].state_dict()  # it is not changed
    assert all(torch.equal(one, started[name]) for name, one in prior.regressor.state_dict().items())
    with pytest.raises(InputError, match="is for new weights, but init='.*' is given; give one"):
        train_kind("autoregressive", shapes, runs, tmp_path, regression=regression, init=runs / "prior")
    cases = (("mlp", "caption_dropout", 0.2), ("linear", "code_noise", 0.1), ("autoregressive", "timestep_shift", 2))
    for kind, name, value in cases:
        with pytest.raises(InputError, match=f"{name} needs architecture=.*, got {kind}; leave it out"):
            train_kind(kind, shapes, runs, tmp_path, **{name: value})
    with pytest.raises(InputError, match="regression needs architecture=autoregressive"):
        train_kind("linear", shapes, runs, tmp_path, regression=regression)
    for setting, message in (("heads=3", "heads must divide"), ("components=99", "components must be from 1")):
        name, value = setting.split("=")
        with pytest.raises(InputError, match=message):
            train_kind("autoregressive", shapes, runs, tmp_path, **{f"model.{name}": value})
