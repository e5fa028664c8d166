"""The classifier of noisy latents, and the labels it learns."""

import json
import re
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from t2i.training import cache_data
from t2i.training.train_classifier import Config, LabelledDataset, compute_level_accuracies

from t2i.config import CONFIG_FOLDER, DataConfig, load_config
from t2i.data import CaptionedPictures
from t2i.data.cache import CachedPairs
from t2i.data.labels import LABELS_FILE, Labels, write_labels
from t2i.data.manifest import write_manifest
from t2i.data.sources.samples import Columns
from t2i.diffusion.stored_schedulers import load_scheduler
from t2i.errors import InputError
from t2i.files.model_folder import load_model
from t2i.networks.classifier import LatentClassifier, compute_noise_level
from tests.helpers.drawings import colored, relabel
from tests.helpers.gaussian import schedule
from tests.helpers.stages import train

COLORS = ["blue", "green", "red"]


def fit(data: Path, runs: Path, output: Path, steps: int, **more: object) -> Path:
    settings = {"clip": runs / "clip", "autoencoder": runs / "autoencoder", "train.learning_rate": 3e-3, **more}
    train("classifier", data, output, steps, **settings)
    return output / "classifier"


def test_it_learns_and_says_how_well_at_each_level_of_noise(classifier_folder, runs):
    rows = [json.loads(line) for line in (classifier_folder / "metrics.jsonl").read_text().splitlines()]
    last = {name: value for row in rows for name, value in row.items()}
    assert last["accuracy_level_1"] > 0.9 and 0 <= last["validation_accuracy_level_1"] <= 1
    assert last["accuracy_level_4"] < last["accuracy_level_1"]  # a colour cannot be seen in pure noise
    classifier, scheduler = (
        load_model(LatentClassifier, classifier_folder),
        load_scheduler(classifier_folder / "scheduler"),
    )
    assert classifier.config.classes == COLORS and scheduler.config.prediction_type == "v_prediction"
    assert len(classifier.config.autoencoder_fingerprint) == len(classifier.config.clip_fingerprint) == 16


def test_a_resumed_run_is_the_unbroken_one_bit_for_bit(labelled, runs, tmp_path):
    settings = {"train.save_every": 2, "train.gradient_accumulation": 2, "train.batch_size": 6}
    for name, steps in (("unbroken", [4]), ("broken", [2, 4])):
        for count in steps:
            fit(labelled, runs, tmp_path / name, count, **settings)
    one, other = (
        tmp_path / name / "classifier/model/diffusion_pytorch_model.safetensors" for name in ("unbroken", "broken")
    )
    assert one.read_bytes() == other.read_bytes()


def test_a_cache_gives_the_same_classes_and_trains(labelled, runs, tmp_path):
    models = [f"{part}={runs / part}" for part in ("clip", "autoencoder")]
    arguments = [
        str(CONFIG_FOLDER / "tiny/cache.yaml"),
        f"data.path={labelled}",
        f"output={tmp_path / 'cache'}",
        "shard_size=7",
    ]
    cache_data.main(load_config(cache_data.Config, "cache", arguments + models))
    labels = Labels(labelled / "t2i/manifest.parquet")
    for dataset in (CachedPairs(tmp_path / "cache"), CaptionedPictures(DataConfig(str(labelled), 32, 0))):
        data = LabelledDataset(dataset, labels)
        batch = data.__getitems__([(20, 0), (3, 1), (11, 0)])
        # The color is a function of the file's number: see the fixture `shapes`.
        true = [("red", "green", "blue")[int(data.get_sample_key(index)[:2]) % 3] for index in (20, 3, 11)]
        assert [COLORS[number] for number in batch.labels.tolist()] == true
    folder = fit(labelled, runs, tmp_path / "run", 2, cache=tmp_path / "cache")
    assert load_model(LatentClassifier, folder).config.latent_size == 8


def make(**more) -> LatentClassifier:
    torch.manual_seed(0)
    return LatentClassifier(["a", "b", "c"], 4, 8, 6, [8, 16], depth=1, heads=2, **more).eval()


def test_both_answers_depend_on_latents_and_noise_and_are_what_they_say():
    classifier, x, level = make(), torch.randn(2, 4, 8, 8), torch.tensor([0.2, 0.9])
    logs, z_i = classifier.predict_log_probs(x, level), classifier.predict_image_embeds(x, level)
    torch.testing.assert_close(logs.exp().sum(dim=1), torch.ones(2))
    torch.testing.assert_close(z_i.norm(dim=1), torch.ones(2))
    for other in (classifier.predict_log_probs(x.flip(0), level), classifier.predict_log_probs(x, level.flip(0))):
        assert (other - logs).abs().max() > 1e-4
    alone = classifier.predict_log_probs(x[1:], level[1:])
    torch.testing.assert_close(alone, logs[1:])


def test_a_noise_level_is_the_same_for_the_same_noise_in_every_schedule():
    x = torch.zeros(3, 4, 8, 8)
    cosine, linear = schedule("cosine"), schedule("linear")
    for t in (0, 300, 700):
        same = (cosine.alphas_cumprod - linear.alphas_cumprod[t]).abs().argmin()
        ours, theirs = compute_noise_level(linear, torch.tensor(t), x), compute_noise_level(cosine, same, x)
        torch.testing.assert_close(ours, theirs, atol=2e-3, rtol=0)
    levels = compute_noise_level(cosine, torch.tensor([-1, 999, 500]), x)
    torch.testing.assert_close(levels, torch.tensor([0.0, 1.0, 0.5]), atol=0.01, rtol=0)


def test_accuracy_is_told_by_rising_noise():
    right = torch.tensor([1.0, 1, 1, 0, 0, 1, 0, 0])
    assert list(compute_level_accuracies(right).values()) == [1.0, 0.5, 0.5, 0.0]
    assert list(compute_level_accuracies(right[:2])) == ["accuracy_level_1", "accuracy_level_2"]


def test_a_class_that_there_is_not_is_refused_with_those_there_are():
    with pytest.raises(InputError, match="the classifier has no class 'd'; it has a, b, c$"):
        make().find_class_index("d")
    many = LatentClassifier([str(i) for i in range(20)], 4, 8, 6, [8], depth=1, heads=2)
    with pytest.raises(InputError, match="the classifier has no class 'x'; it has 0, 1, 2, 3, 4, 5, 6, 7 and 12 more$"):
        many.find_class_index("x")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.pop("color"), "'05.png' has no label in column 'color'; every image needs one"),
        (lambda row: row.update(color=" "), "'05.png' has no label in column 'color'"),
        (lambda row: row.update(color=["red", "blue"]), "'05.png' has 2 labels, 'red', 'blue' in column 'color'"),
    ],
)
def test_labels_given_twice_or_not_at_all_are_refused_by_the_check(change, message, shapes, tmp_path):
    folder = colored(shapes, tmp_path / "shapes")
    relabel(folder, lambda row, number: change(row) if number == 5 else None)
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        write_manifest(folder, columns=Columns(labels=("color",)), quiet=True)
    assert "\n" not in str(caught.value) and not (folder / "t2i").exists()
    write_manifest(folder, quiet=True)  # without labels it is as good as ever
    assert not (folder / "t2i" / LABELS_FILE).exists()


def test_a_column_that_there_is_not_is_refused_with_those_there_are(shapes, tmp_path):
    with pytest.raises(InputError, match="no column 'group'; the columns of .*: file_name, text, keywords, split"):
        write_manifest(shapes, tmp_path / "out", columns=Columns(labels=("group",)), quiet=True)


def test_numbers_and_parquet_columns_are_labels_too(shapes, tmp_path):
    import pyarrow as pa

    pictures = sorted(shapes.glob("*.png"))[:4]
    rows = {"image": [path.read_bytes() for path in pictures], "text": ["a"] * 4, "kind": [3, 1, 3, 1]}
    pq.write_table(pa.table(rows), tmp_path / "data.parquet")
    write_manifest(tmp_path / "data.parquet", tmp_path / "out", Columns(labels=("kind",)), 0, quiet=True)
    labels = Labels(tmp_path / "out/manifest.parquet")
    assert labels.classes == ["1", "3"]
    assert labels.find_classes(CaptionedPictures(DataConfig(str(tmp_path / "out"), 32, 0))).tolist() == [1, 0, 1, 0]


def test_training_without_labels_or_with_some_missing_is_refused_before_any_work(shapes, labelled, runs, tmp_path):
    with pytest.raises(InputError, match="no labels in .*labels.parquet'; `t2i data check .* --label-column COLUMN`"):
        fit(shapes, runs, tmp_path, 1)
    folder = Path(shutil.copytree(labelled, tmp_path / "shapes"))
    table = pq.read_table(folder / "t2i" / LABELS_FILE).to_pylist()
    known = {row["key"]: row["label"] for row in table}
    write_labels(folder / "t2i", {"color": {key: known[key] for key in list(known)[1:]}})
    with pytest.raises(InputError, match="1 of 32 images have no label, such as '00.png'"):
        fit(folder, runs, tmp_path, 1)
    write_labels(folder / "t2i", {"color": dict.fromkeys(known, "red")})
    with pytest.raises(InputError, match="has 1 classes; it needs from 2 to"):
        fit(folder, runs, tmp_path, 1)
    twice = pq.read_table(labelled / "t2i" / LABELS_FILE)
    import pyarrow as pa

    pq.write_table(pa.concat_tables([twice, twice.slice(3, 1)]), folder / "t2i" / LABELS_FILE)
    with pytest.raises(InputError, match="gives '03.png' 2 labels; every image needs one"):
        fit(folder, runs, tmp_path, 1)
    assert not (tmp_path / "classifier").exists()


def test_the_real_size_is_what_its_file_says():
    path = CONFIG_FOLDER / "base/classifier.yaml"
    config = load_config(Config, "classifier", [str(path)])
    with torch.device("meta"):
        classifier = LatentClassifier([str(i) for i in range(1000)], 4, 32, 768, **config.model)
        logits, z_i = classifier(torch.randn(2, 4, 32, 32), torch.tensor([0.1, 0.5]))
    assert logits.shape == (2, 1000) and z_i.shape == (2, 768)
    said = re.search(r"([\d.]+) M parameters", path.read_text())
    assert said is not None
    assert sum(p.numel() for p in classifier.parameters()) == pytest.approx(float(said[1]) * 1e6, rel=0.05)
