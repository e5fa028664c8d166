"""Steering: exact classifiers, and what it does to a pipeline."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from t2i.diffusion.guidance import build_steered_predict
from t2i.diffusion.samplers import build_sampler
from t2i.diffusion.sampling_loop import Sampling, sample_from_noise
from t2i.errors import InputError
from t2i.files.fingerprints import compute_weights_fingerprint
from t2i.networks.classifier import LatentClassifier, compute_noise_level
from t2i.sampling.steering import Steering, build_class_score, load_classifier
from tests.commands.test_cli import run
from tests.helpers.gaussian import Gaussian, schedule
from tests.helpers.stages import seeds


class ExactClassifier:
    """Of two classes: the second is of samples that were seen as `seen`, with an error of variance `error`."""

    def __init__(self, gaussian: Gaussian, seen: torch.Tensor, error: float):
        self.gaussian, self.seen, self.error = gaussian, seen, error

    def find_class_index(self, name: str) -> int:
        return ["other", "seen"].index(name)

    def predict_log_probs(self, x, level):
        """Up to a constant: p(seen | x_t) is Gaussian about E[x0 | x_t]."""
        alpha, sigma = (function(level.double()[0] * math.pi / 2) for function in (torch.cos, torch.sin))
        covariance, eye = self.gaussian.covariance, torch.eye(len(self.gaussian.mean)).double()
        gain = alpha * torch.linalg.solve(alpha**2 * covariance + sigma**2 * eye, covariance)
        estimate = self.gaussian.mean + (x - alpha * self.gaussian.mean) @ gain
        spread = covariance - alpha * covariance @ gain + self.error * eye
        miss = self.seen - estimate
        log = -(miss * torch.linalg.solve(spread, miss.T).T).sum(dim=1) / 2
        return torch.stack([torch.zeros_like(log), log], dim=1)


@pytest.mark.parametrize("prediction_type", ["v_prediction", "flow_prediction"])
@pytest.mark.parametrize(("name", "steps"), [("ddpm", 250), ("ddim", 150), ("ode", 30)])
def test_an_exact_classifier_samples_the_posterior_in_closed_form(name, steps, prediction_type):
    """A classifier knows noise levels, not processes."""
    torch.manual_seed(0)
    gaussian, scheduler, error = Gaussian(), schedule(prediction_type=prediction_type), 0.5
    seen, eye = torch.tensor([1.0, -0.5, 0.2]).double(), torch.eye(3).double()
    covariance = torch.linalg.inv(torch.linalg.inv(gaussian.covariance) + eye / error)
    mean = covariance @ (torch.linalg.solve(gaussian.covariance, gaussian.mean) + seen / error)
    score = build_class_score(ExactClassifier(gaussian, seen, error), scheduler, ["seen"] * 4000)
    noise = torch.randn(4000, 3, generator=torch.Generator().manual_seed(1)).double()
    for scale, expected in ((1.0, mean), (0.0, gaussian.mean)):
        predict = build_steered_predict(gaussian.denoiser(scheduler), scheduler, score, scale)
        drawn = sample_from_noise(predict, build_sampler(name, scheduler), noise, Sampling(steps))
        torch.testing.assert_close(drawn.mean(dim=0), expected, atol=0.06, rtol=0)
        if scale:
            torch.testing.assert_close(drawn.T.cov(), covariance, atol=0.05, rtol=0)


@pytest.fixture
def classifier(classifier_folder) -> LatentClassifier:
    return load_classifier(classifier_folder)


def draw(pipeline, steering, count=2, **more):
    nothing = torch.zeros(count, pipeline.clip.embed_dim)
    settings = {"num_inference_steps": 12, "guidance_scale": 1.0, "output_type": "latent", "steering": steering} | more
    return pipeline(image_embeds=nothing, generator=seeds(*range(count)), **settings).images


def sees_colors_in_channels(classifier: LatentClassifier) -> None:
    """Instead of what it learnt: blue is a high first channel, green the second, red the third."""
    classifier.predict_log_probs = lambda x, level: (8 * x[:, :3].mean(dim=(2, 3))).log_softmax(dim=1)


def test_gamma_raises_the_probability_of_a_class_each_picture_its_own(pipeline, classifier):
    sees_colors_in_channels(classifier)

    def logs(scale):
        x = draw(pipeline, Steering(scale, classifier, ["red", "blue", "green"]), 3)
        return torch.stack([classifier.predict_log_probs(x, None)[i, n] for i, n in enumerate((2, 0, 1))])

    none, some, more = (logs(scale) for scale in (0.0, 1.0, 4.0))
    assert (none < some).all() and (some < more).all()
    # With a condition, and guided, as well.
    z_i = torch.randn(2, pipeline.clip.embed_dim, generator=torch.Generator().manual_seed(0))
    more = {"image_embeds": z_i, "num_inference_steps": 6, "guidance_scale": 2.0, "output_type": "latent"}
    ends = [
        pipeline(**more, steering=one, generator=seeds(0, 1)).images for one in (None, Steering(2, classifier, "red"))
    ]
    plain, moved = (classifier.predict_log_probs(x, None)[:, 2] for x in ends)
    assert (moved > plain).all()


def test_the_real_classifier_moves_latents_to_where_it_is_surer(pipeline, classifier):
    scheduler, t = pipeline.decoder_scheduler, torch.tensor(300)
    x = torch.randn(4, *pipeline.latent_shape, generator=torch.Generator().manual_seed(0))
    score = build_class_score(classifier, scheduler, ["blue"] * 4)
    steps = [
        build_steered_predict(lambda x, t: torch.zeros_like(x), scheduler, score, scale)(x, t) for scale in (0.0, 0.02)
    ]
    gradient = steps[0] - steps[1]  # of velocity, which falls where the clean sample rises
    with torch.no_grad():
        assert (score(x + 0.1 * gradient / gradient.norm(), t) > score(x, t)).all()


@pytest.mark.parametrize("noise_aware", [False, True])
def test_clip_is_followed_towards_a_text_and_a_picture(noise_aware, pipeline, classifier):
    torch.manual_seed(0)
    if noise_aware:  # instead of what it learnt, the first latents themselves
        classifier.predict_image_embeds = lambda x, level: F.normalize(
            x.flatten(1)[:, : pipeline.clip.embed_dim], dim=1
        )
    judge = classifier if noise_aware else None
    goals = [Steering(0.5, judge, text="red circle"), Steering(0.5, judge, image=torch.rand(1, 3, 32, 32) * 2 - 1)]

    def seen(x):
        return judge.predict_image_embeds(x, None) if judge else pipeline.encode_image(pipeline.autoencoder.decode(x))

    with torch.no_grad():
        targets = [pipeline.clip.encode_text(["red circle"]).embedding, pipeline.encode_image(goals[1].image)]
        plain = seen(draw(pipeline, None))
        for steering, target in zip(goals, targets):
            moved = seen(draw(pipeline, steering))
            assert ((moved * target).sum(dim=1) > (plain * target).sum(dim=1) + 1e-4).all()


def test_a_steered_picture_does_not_depend_on_its_batch(pipeline, classifier):
    both, alone = (draw(pipeline, Steering(1.0, classifier, "red"), count) for count in (3, 1))
    torch.testing.assert_close(alone, both[:1], atol=1e-3, rtol=0)


@pytest.mark.parametrize("judge", ["class", "embedding", "clip"])
def test_images_of_other_shapes_are_steered(pipeline, classifier, judge):
    goal = {"class_name": "red"} if judge == "class" else {"text": "red"}
    goal |= {} if judge == "clip" else {"classifier": classifier}
    plain, moved = (draw(pipeline, Steering(scale, **goal), 1, width=48, num_inference_steps=3) for scale in (0, 4))
    assert plain.shape == (1, 4, 8, 12) and moved.isfinite().all() and not torch.equal(plain, moved)


def test_images_that_a_classifier_cannot_halve_are_refused(pipeline, classifier):
    assert classifier.min_latent_side <= 8
    classifier.register_to_config(widths=[8] * 5)
    with pytest.raises(InputError, match="classifier needs images of 64 x 64 or more"):
        draw(pipeline, Steering(1.0, classifier, "red"))


def test_what_cannot_steer_is_refused_before_any_work(pipeline, classifier, monkeypatch):
    monkeypatch.setattr("t2i.sampling.sample.sample_decoder", lambda *_: pytest.fail("work has started"))
    picture = torch.zeros(1, 3, 8, 8)
    for steering, message in [
        (3.0, "steering must be a Steering, got 3.0"),
        (Steering(1.0), "needs a class_name, a text or an image, got none of them"),
        (Steering(1.0, text="a", image=picture), "got text and image"),
        (Steering(float("nan"), text="a"), "steering.scale must be a number from 0 to 10000, got nan"),
        (Steering(-1.0, text="a"), "steering.scale must be from 0 to 10000, got -1"),
        (Steering(class_name="red"), "steering.class_name needs a classifier"),
        (Steering(1.0, classifier, "purple"), "the classifier has no class 'purple'; it has blue, green, red"),
        (Steering(1.0, classifier, ["red"] * 3), "steering.class_name has 3 texts for 2 images"),
        (Steering(text=""), "steering.text must not be empty"),
        (
            Steering(image=torch.zeros(3, 8, 8)),
            r"steering.image must be a tensor \(1 or N, 3, H, W\), got \(3, 8, 8\)",
        ),
        (Steering(image=picture / 0), "steering.image must be finite"),
        (Steering(image=picture + 255), "steering.image must have values from -1 to 1, got 255 to 255"),
    ]:
        with pytest.raises(InputError, match=message) as caught:
            draw(pipeline, steering)
        assert "\n" not in str(caught.value)


def test_a_classifier_of_another_latent_space_or_clip_is_refused(pipeline, classifier):
    theirs = classifier.config.autoencoder_fingerprint
    classifier.register_to_config(clip_fingerprint="0" * 16)
    draw(pipeline, Steering(1.0, classifier, "red"))  # classes need no CLIP
    with pytest.raises(InputError, match="the classifier was trained with the CLIP 0000"):
        draw(pipeline, Steering(1.0, classifier, text="red"))
    pipeline.autoencoder.mean += 1
    with pytest.raises(InputError, match=f"the classifier was trained with the autoencoder {theirs}, this"):
        draw(pipeline, Steering(1.0, classifier, "red"))


def test_a_noise_level_takes_the_times_of_the_solvers():
    level = compute_noise_level(schedule(), torch.tensor(499.5), torch.zeros(2, 3))
    torch.testing.assert_close(level, torch.full((2,), 0.5), atol=0.01, rtol=0)


def test_the_command_draws_towards_a_class_without_a_prompt(
    monkeypatch,
    capsys,
    pipeline_folder,
    classifier_folder,
    tmp_path,
):
    common = ["generate", "--model", pipeline_folder, "--out", tmp_path / "out", "--seed", 4, "--steps", 3, "-n", 2]
    steer = ["--steer-class", "red", "--classifier", classifier_folder, "--steer-scale", 8]
    status, out, err = run(monkeypatch, capsys, *common, *steer)
    assert status == 0, err
    with Image.open(out.split()[0]) as image:
        by = {
            "folder": classifier_folder.name,
            "fingerprint": compute_weights_fingerprint(load_classifier(classifier_folder)),
        }
        assert json.loads(image.info["t2i"])["steering"] == {"scale": 8.0, "class": "red", "classifier": by}
    status, out, err = run(monkeypatch, capsys, *common, "a circle", "--steer-text", "red", "--prior-steps", 2)
    assert status == 0 and len(out.split()) == 2
    for wrong, message in [
        (["--steer-class", "red"], "--steer-class 'red' needs --classifier"),
        (["--steer-class", "red", "--steer-text", "a"], "--steer-class and --steer-text exclude each other"),
        (["a", "--steer-scale", 3], "--steer-scale needs one of --steer-class, --steer-text, --steer-image"),
        (
            ["--steer-class", "x", "--classifier", classifier_folder],
            "the classifier has no class 'x'; it has blue, green, red",
        ),
        (["--steer-class", "x", "--classifier", tmp_path], "no trained LatentClassifier in"),
        (["--steer-text", "a", "--steer-scale", -1], "--steer-scale must be from 0 to 10000, got -1"),
        (["--steer-picture", tmp_path / "none.png"], "none.png"),
    ]:
        status, _, err = run(monkeypatch, capsys, *common, *wrong)
        assert status == 2 and message in err and err.count("\n") == 1, err


def test_a_score_of_classes_is_the_column_of_each_picture():
    table = torch.log_softmax(torch.randn(3, 4), dim=1)
    fake = SimpleNamespace(find_class_index="abcd".index, predict_log_probs=lambda x, level: table)
    score = build_class_score(fake, schedule(), ["d", "a", "c"])(torch.zeros(3, 2), torch.tensor(5))
    assert torch.equal(score, torch.stack([table[0, 3], table[1, 0], table[2, 2]]))


def test_the_image_may_have_its_old_name():
    image = torch.zeros(1, 3, 8, 8)
    assert Steering(picture=image).image is image
    assert dataclasses.replace(Steering(picture=image), scale=2.0).image is image
