"""`t2i eval quality`: the figures against torch-fidelity and against direct computation, and who may be compared."""

import json
import math
import os
import pickle
import sys
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import torch_fidelity
from accelerate import PartialState
from PIL import Image
from safetensors.torch import save_file
from torch_fidelity import feature_extractor_inceptionv3 as inception
from torch_fidelity.feature_extractor_base import FeatureExtractorBase

from t2i.errors import InputError
from t2i.evaluation import quality
from t2i.evaluation.features import CLIPFeatures, load_feature_extractor, to_uint8_pixels
from t2i.evaluation.metrics import (
    MetricSettings,
    compare_feature_sets,
    compute_feature_moments,
    compute_frechet_distance,
    compute_precision_recall,
)
from t2i.evaluation.picture_sets import DrawnPictures, FolderPictures, open_reference_set
from t2i.evaluation.quality import (
    extract_set_features,
    gather_process_rows,
    measure_quality,
    measure_reference_statistics,
    read_reference_statistics,
)
from tests.commands.test_cli import run
from tests.helpers.processes.forked import run_program
from tests.networks.test_clip import make

SMALL = MetricSettings(kid_subset_size=50, kid_subsets=20, seed=7)


def pooled(pictures):
    """(B, 3, 16, 16), uint8 -> (B, 12): colours of the quarters."""
    return F.adaptive_avg_pool2d(pictures.float(), 2).flatten(1) / 64


class Pooled(FeatureExtractorBase):
    """As torch-fidelity wants an extractor."""

    def __init__(self, name, features_list, **_):
        super().__init__(name, features_list)

    @staticmethod
    def get_provided_features_list():
        return ("12",)

    @staticmethod
    def get_default_feature_layer_for_metric(metric):
        return "12"

    @staticmethod
    def can_be_compiled():
        return False

    def forward(self, pictures):
        return (pooled(pictures),)


class Ours:
    """The same, as this project wants one."""

    identity, dim = "pooled", 12

    def __call__(self, pictures):
        return pooled(to_uint8_pixels(pictures))


class Tensors(torch.utils.data.Dataset):
    """A fixed set of images, as a data set for torch-fidelity and as an image set for us."""

    def __init__(self, seed, count, shift=0):
        generator = torch.Generator().manual_seed(seed)
        coarse = torch.randn(count, 3, 4, 4, generator=generator) * 50 + 128 + shift
        self.bytes = F.interpolate(coarse, 16).round().clamp(0, 255).to(torch.uint8)
        self.captions, self.left_out = [None] * count, set()

    def __len__(self):
        return len(self.bytes)

    def __getitem__(self, index):
        return self.bytes[index]

    def get_images(self, indices):
        return self.bytes[indices].float() / 127.5 - 1

    def describe_source(self):
        return {"count": len(self)}


@pytest.fixture(scope="module")
def state():
    return PartialState(cpu=True)


def test_figures_of_two_fixed_sets_equal_torch_fidelitys(state):
    drawn, real = Tensors(0, 120, shift=10), Tensors(1, 150)
    torch_fidelity.register_feature_extractor("pooled", Pooled)
    settings = {
        "feature_extractor": "pooled",
        "cuda": False,
        "cache": False,
        "verbose": False,
        "rng_seed": 7,
        "save_cpu_ram": True,
    }
    settings |= {"kid_subset_size": 50, "kid_subsets": 20, "fid": True, "kid": True, "prc": True}
    theirs = torch_fidelity.calculate_metrics(input1=drawn, input2=real, **settings)
    features = extract_set_features(real, Ours(), state, "real")[0]
    reference = quality.ReferenceStatistics(features, compute_feature_moments(features), real.describe_source())
    ours = measure_quality(drawn, reference, Ours(), SMALL, state)["metrics"]
    assert ours["frechet_distance"] == pytest.approx(theirs["frechet_inception_distance"], abs=1e-6)
    assert ours["kernel_distance"] == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)
    assert ours["kernel_distance_std"] == pytest.approx(theirs["kernel_inception_distance_std"], abs=1e-6)
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=1e-6)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=1e-6)
    assert ours["frechet_distance"] > 0.1 and 0 < ours["precision"] < 1  # there is something to measure


def test_precision_and_recall_equal_a_direct_computation():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(40, 5, generator=generator) * 0.8
    real = torch.randn(60, 5, generator=generator)
    drawn[:3] = real[:3]  # at distance zero

    def share(of, within, neighbours):
        inside = 0
        for row in of.double():
            for center in within.double():
                radius = sorted((center - other).norm().item() for other in within.double())[neighbours]
                if (row - center).norm().item() <= radius:
                    inside += 1
                    break
        return inside / len(of)

    for neighbours in (1, 3):
        precision, recall = compute_precision_recall(drawn, real, neighbours)
        assert precision == pytest.approx(share(drawn, real, neighbours), abs=1e-6)
        assert recall == pytest.approx(share(real, drawn, neighbours), abs=1e-6)


def test_the_frechet_distance_of_gaussians_is_the_closed_form():
    generator = torch.Generator().manual_seed(0)
    white = torch.randn(500, 4, generator=generator, dtype=torch.float64)
    white -= white.mean(dim=0)
    white = white @ torch.linalg.inv(torch.linalg.cholesky(white.T.cov())).T  # covariance exactly 1
    scales, shift = torch.tensor([1.0, 2.0, 0.5, 3.0]), torch.tensor([0.0, 1.0, -2.0, 0.5])
    found = compute_frechet_distance(
        compute_feature_moments((white * scales + shift).float()), compute_feature_moments(white.float())
    )
    expected = (scales - 1).square().sum() + shift.square().sum()
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_a_set_is_at_no_distance_from_itself():
    features = torch.randn(200, 6, generator=torch.Generator().manual_seed(0))
    found = compare_feature_sets(features, features, compute_feature_moments(features), SMALL)
    assert abs(found["frechet_distance"]) < 1e-4 and found["precision"] == found["recall"] == 1
    assert abs(found["kernel_distance"]) < 3 * found["kernel_distance_std"] + 0.1


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ({"drawn": 12, "reference": 100}, "drawn: 12 images are too few, .* needs 13 for full rank"),
        ({"drawn": 100, "reference": 40}, "reference: 40 images are too few, --kid-subset-size is 50"),
    ],
)
def test_too_few_pictures_are_refused_with_what_is_needed(counts, message):
    with pytest.raises(InputError, match=message):
        SMALL.check_image_counts(counts, 12)
    MetricSettings(metrics=("prc",)).check_image_counts(counts, 12)
    with pytest.raises(InputError, match="too few for 3 neighbours"):
        MetricSettings(metrics=("prc",)).check_image_counts({"drawn": 3}, 12)


# Features


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Inception's tensors, random, as .pth and as .safetensors."""
    folder = tmp_path_factory.mktemp("inception")
    torch.manual_seed(0)
    with (
        mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: {}),
        mock.patch.object(inception.FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        tensors = inception.FeatureExtractorInceptionV3("random", ["2048"]).state_dict()
    torch.save(tensors, folder / "weights.pth")
    save_file(tensors, folder / "weights.safetensors")
    return folder


def test_inception_sees_what_torch_fidelitys_does(weights):
    pictures = Tensors(0, 2)
    ours = load_feature_extractor("inception", weights / "weights.safetensors", "cpu")
    theirs = inception.FeatureExtractorInceptionV3(
        "theirs", ["2048"], feature_extractor_weights_path=weights / "weights.pth"
    )
    assert torch.equal(ours(pictures.get_images([0, 1])), theirs(pictures.bytes)[0])
    again = load_feature_extractor("inception", weights / "weights.pth", "cpu")
    assert again.identity == ours.identity and ours.dim == 2048


class Hostile:
    def __reduce__(self):
        return (pytest.fail, ("the pickle was run",))


def test_weights_that_are_no_inception_or_run_code_are_one_line(weights, tmp_path, monkeypatch):
    (tmp_path / "hostile.pth").write_bytes(pickle.dumps({"weight": Hostile()}))
    save_file({"weight": torch.zeros(1)}, tmp_path / "other.safetensors")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name, file, message in (
        ("inception", "hostile.pth", "hostile.pth' does not load"),
        ("inception", "other.safetensors", "other.safetensors' does not load"),
        ("inception", "nowhere.pth", "no file"),
        ("inception", None, "give --inception FILE, or --features clip:"),
        ("clip:nowhere", None, "nowhere"),
        ("clip:", None, "features must be inception or clip:"),
        ("clip:x", "other.safetensors", "does not apply to"),
    ):
        with pytest.raises(InputError, match=message):
            load_feature_extractor(name, file and tmp_path / file, "cpu")


def test_clip_features_are_not_normalised_and_belong_to_one_clip():
    clip = make()
    extractor, pictures = CLIPFeatures(clip), torch.rand(2, 3, 32, 32) * 2 - 1
    features = extractor(pictures)
    torch.testing.assert_close(F.normalize(features, dim=-1), clip.encode_image(pictures))
    assert (features.norm(dim=-1) - 1).abs().min() > 1e-3
    assert extractor.identity == f"clip-{clip.identity}" and extractor.dim == 16


# References


def test_statistics_are_kept_and_of_another_extractor_refused(shapes, tmp_path, state, monkeypatch):
    extractor = CLIPFeatures(make())
    pictures = open_reference_set(shapes, 32, "train")
    file = tmp_path / "kept.safetensors"
    first = measure_reference_statistics(pictures, extractor, 32, file, state)
    assert first.features.shape == (32, 16) and first.source_facts["digest"] == pictures.digest
    with monkeypatch.context() as patched:
        patched.setattr(quality, "extract_set_features", pytest.fail)
        second = measure_reference_statistics(pictures, extractor, 32, file, state)
    assert torch.equal(first.features, second.features) and torch.equal(first.moments[1], second.moments[1])

    for extractor_, pictures_, size, what in (
        (Ours(), pictures, 32, "another extractor, 'clip-.*'; this .* is 'pooled'"),
        (extractor, pictures, 16, "another image size, 32; this .* is 16"),
        (extractor, open_reference_set(shapes, 32, None), 32, "another set of images"),
    ):
        with pytest.raises(InputError, match=what):
            measure_reference_statistics(pictures_, extractor_, size, file, state)
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(InputError, match="not a whole safetensors file"):
        read_reference_statistics(file, {})


def test_without_a_file_statistics_are_kept_in_the_folder_by_what_they_are_of(shapes, tmp_path, state):
    for i in range(20):
        Image.new("RGB", (16, 16), (i * 10, 255 - i * 10, i)).save(tmp_path / f"{i}.png")
    before = open_reference_set(tmp_path, 16, None)
    measure_reference_statistics(before, Ours(), 16, None, state)
    Image.new("RGB", (16, 16), "red").save(tmp_path / "3.png")
    after = open_reference_set(tmp_path, 16, None)
    measure_reference_statistics(after, Ours(), 16, None, state)
    kept = sorted(path.name for path in tmp_path.glob(".t2i-*"))
    assert kept == sorted(f".t2i-statistics-pooled-16-{one.digest}.safetensors" for one in (before, after))
    assert len(after) == 20 and before.digest != after.digest


def test_a_damaged_picture_is_named_once_and_left_out(tmp_path, state, capsys):
    for i in range(23):
        Image.new("RGB", (16, 16), (i * 10, 255 - i * 10, i)).save(tmp_path / f"{i:02}.png")
    whole = measure_reference_statistics(FolderPictures(tmp_path), Ours(), 16, tmp_path / "a.safetensors", state)
    for name in ("00.png", "07.png"):
        (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-30])
    (tmp_path / "09.png").write_text("<!DOCTYPE html>")
    damaged = FolderPictures(tmp_path)
    rest = measure_reference_statistics(damaged, Ours(), 16, tmp_path / "b.safetensors", state)
    named = [line for line in capsys.readouterr().err.splitlines() if line.startswith("left out:")]
    assert len(named) == 3 and all(name in line for name, line in zip(("00.png", "07.png", "09.png"), named))
    assert (rest.source_facts["count"], rest.source_facts["left_out"]) == (20, 3)
    good = [i for i in range(23) if i not in (0, 7, 9)]
    torch.testing.assert_close(rest.features, whole.features[good], rtol=0, atol=0)
    small = MetricSettings(("fd",), seed=0)
    result = measure_quality(damaged, whole, Ours(), small, state)
    assert (result["drawn"]["count"], result["drawn"]["left_out"], "left_out" in result["reference"]) == (20, 3, False)
    for path in tmp_path.glob("*.png"):
        path.write_text("no picture")
    with pytest.raises(InputError, match="none of 23 images can be used"):
        FolderPictures(tmp_path)


def test_pictures_of_several_sizes_need_a_size(tmp_path):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    Image.new("RGB", (20, 16)).save(tmp_path / "b.png")
    with pytest.raises(InputError, match="b.png' is 20 x 16, others are 16 x 16; give --image-size"):
        FolderPictures(tmp_path).get_images([0, 1])
    assert FolderPictures(tmp_path, 8).get_images([0, 1]).shape == (2, 3, 8, 8)


# Shares and seeds


def test_a_drawn_picture_depends_on_its_seed_alone(pipeline):
    captions = ["red circle", "blue square", None, "green circle"]
    settings = {"num_inference_steps": 2, "prior_num_inference_steps": 2}
    drawn = DrawnPictures(pipeline, captions, 5, 11, **settings)
    assert len(drawn) == 5 and None not in drawn.captions and drawn.captions[3:] == drawn.captions[:2]
    together = drawn.get_images([0, 1, 4])
    torch.testing.assert_close(together[1:2], drawn.get_images([1]), atol=2 / 127.5, rtol=0)
    assert drawn.describe_source()["seeds"] == {"first": 11, "last": 15}
    levels = (together + 1) * 127.5
    assert (levels - levels.round()).abs().max() < 1e-3 and not torch.equal(together[0], together[2])


def test_shares_come_together_in_order_and_none_counts_twice(monkeypatch):
    class Three:
        num_processes, device = 3, "cpu"

    shares = [torch.tensor([[float(i)] for i in range(rank, 7, 3)]) for rank in range(3)]
    padded = torch.cat([F.pad(share, (0, 0, 0, 3 - len(share)), value=99) for share in shares])
    monkeypatch.setattr(quality, "gather", lambda _: padded)
    assert gather_process_rows(shares[0], 7, Three()).flatten().tolist() == [0, 1, 2, 3, 4, 5, 6]


def command(shapes, pipeline_folder, out, *more):
    model = ["--model", pipeline_folder, "--features", f"clip:{pipeline_folder / 'clip'}", "--out", out]
    quick = ["--steps", 2, "--prior-steps", 2, "--device", "cpu"]
    quick += [] if "prc" in more else ["--kid-subset-size", 20]  # refused where no metric takes it
    return ["eval", "quality", shapes, *model, *quick, *more]


def test_a_model_is_measured_with_every_picture_once(monkeypatch, capsys, shapes, pipeline_folder, tmp_path):
    clip = load_feature_extractor(f"clip:{pipeline_folder / 'clip'}", None, "cpu")
    count = clip.dim + 5 - (clip.dim % 2)  # odd, and enough
    arguments = command(shapes, pipeline_folder, tmp_path / "one.json", "--count", count, "--metrics", "fd,kid")
    if count > 36:
        arguments[-1] = "kid"
    arguments += ["--clip-score", pipeline_folder / "clip", "--statistics", tmp_path / "kept.safetensors"]
    status, out, err = run(monkeypatch, capsys, *arguments)
    assert status == 0, err
    assert "the one drawn with" in out and "flatters" in err
    one = json.loads((tmp_path / "one.json").read_text())
    assert one["drawn"]["count"] == count and one["drawn"]["seeds"] == {"first": 0, "last": count - 1}
    assert one["metrics"]["clip_score_by"]["is_conditioning_clip"] is True and one["versions"]["torch"]
    assert math.isfinite(one["metrics"]["kernel_distance"]) and one["reference"]["count"] == 36


def test_two_processes_measure_what_one_does(monkeypatch, capsys, shapes, pipeline_folder, tmp_path):
    more = ["--count", 5, "--metrics", "prc", "--statistics", tmp_path / "kept.safetensors"]
    more += ["--sampler", "ddim", "--eta", 0.5, "--candidates", 1, "--clip-score", pipeline_folder / "clip"]
    status, _, err = run(monkeypatch, capsys, *command(shapes, pipeline_folder, tmp_path / "one.json", *more))
    assert status == 0, err
    # The command becomes torchrun, whose processes run it again
    started: list[list[str]] = []
    with monkeypatch.context() as patch:
        patch.setattr(os, "execv", lambda program, words: (started.append([program, *words[1:]]), sys.exit(0)))
        words = command(shapes, pipeline_folder, tmp_path / "two.json", *more, "--num-processes", 2)
        assert run(monkeypatch, capsys, *words)[0] == 0
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=0"]
    assert started[0][:6] == [sys.executable, *launcher]
    ran = run_program(started[0][6:], ranks=2)
    assert ran.returncode == 0, ran.stderr[-2000:]
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["processes"], two["processes"]) == (1, 2) and one["drawn"] == two["drawn"]
    assert one["drawn"]["settings"].items() >= {"sampler": "ddim", "eta": 0.5, "prior_candidates": 1}.items()
    assert two["metrics"]["clip_score"] == pytest.approx(one["metrics"]["clip_score"], abs=1e-4)


def test_drawn_files_know_their_captions_and_seeds(monkeypatch, capsys, shapes, pipeline_folder, clip_folder, tmp_path):
    quick = ["--steps", 1, "--prior-steps", 1, "--model", pipeline_folder, "--out", tmp_path / "drawn"]
    assert run(monkeypatch, capsys, "generate", "red circle", "--count", 6, "--seed", 3, *quick)[0] == 0
    files = ["eval", "quality", shapes, "--pictures", tmp_path / "drawn", "--features", f"clip:{clip_folder}"]
    files += ["--metrics", "prc", "--clip-score", clip_folder, "--out", tmp_path / "q.json", "--device", "cpu"]
    files += ["--statistics", tmp_path / "kept.safetensors"]
    status, out, err = run(monkeypatch, capsys, *files)
    assert status == 0 and not err, err
    assert "6 drawn and 36 real images" in out and "drawn with: unknown" in out
    result = json.loads((tmp_path / "q.json").read_text())
    assert result["drawn"]["seeds"] == [3, 4, 5, 6, 7, 8] and "frechet_distance" not in result["metrics"]
    # Kept statistics stand for the images; for no other extractor.
    files[2] = tmp_path / "kept.safetensors"
    assert run(monkeypatch, capsys, *files[:-2])[0] == 0
    assert json.loads((tmp_path / "q.json").read_text())["metrics"] == result["metrics"]
    files[files.index(f"clip:{clip_folder}")] = f"clip:{pipeline_folder / 'clip'}"
    status, _, err = run(monkeypatch, capsys, *files[:-2])
    assert status == 2 and "statistics of another extractor" in err and len(err.strip().splitlines()) == 1


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "clip"
    make().save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--metrics", "fid"], "metrics must be one of fd, kid, prc; got 'fid'"),
        (["--metrics", ","], "no metrics"),
        (["--features", "vgg"], "features must be inception or clip:"),
        (["--pictures", "nowhere", "--model", "x"], "not both"),
        (["--pictures", "nowhere", "--count", "3"], "count needs a model that draws"),
        (["--pictures", "nowhere", "--steps", "3"], "num_inference_steps needs a model that draws"),
        (["--count", "0"], "count must be an integer from 1"),
        (["--split", "test"], "split must be one of train, held_out"),
        (["--seed", "-1"], "seed must be an integer from 0"),
        (["--num-processes", "0"], "num-processes must be from 1"),
        (["--image-size", "4"], "image-size must be from 8"),
        (["--features", "inception", "--inception", "nowhere.pth"], "no file 'nowhere.pth'"),
        (["--steps", "0"], "num_inference_steps must be an integer from 1"),
    ],
)
def test_bad_input_is_one_line(monkeypatch, capsys, tmp_path, shapes, more, message):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(monkeypatch, capsys, "eval", "quality", shapes, *more)
    assert status == 2 and message in err and err.startswith("error: ") and len(err.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_too_few_are_refused_before_anything_is_drawn(monkeypatch, capsys, shapes, pipeline_folder, tmp_path):
    arguments = command(shapes, pipeline_folder, tmp_path / "q.json", "--count", 5)
    status, _, err = run(monkeypatch, capsys, *arguments)
    assert status == 2 and "drawn: 5 images are too few" in err and list(tmp_path.iterdir()) == []
    assert not list(shapes.glob(".t2i-*"))
