"""Text towers trained against all images."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from t2i.training.common.picture_bank import PictureBank

from t2i.config import DataConfig
from t2i.data import CaptionedPictures
from t2i.data.groups import open_groups
from t2i.data.manifest import write_manifest
from t2i.data.sources.samples import Columns
from t2i.errors import InputError
from t2i.interop.by_name import load_clip
from tests.helpers.stages import train


@pytest.fixture(scope="module")
def bank(shapes: Path, runs: Path) -> PictureBank:
    clip = load_clip(str(runs / "clip")).eval()
    return PictureBank(clip, CaptionedPictures(DataConfig(str(shapes), 32, 0)))


def test_pictures_are_right_for_a_caption_if_they_have_all_its_phrases(bank, shapes):
    dataset = CaptionedPictures(DataConfig(str(shapes), 32, 0))
    rows = list(dataset.manifest.iterate_rows("captions", "keywords"))
    phrases = [dataset.draw_caption(index, draw).phrases for index in range(len(dataset)) for draw in range(4)]
    right = bank.find_right_pictures(phrases)
    for row, parts in zip(right, phrases):
        expected = [set(parts) <= {*known["captions"], *known["keywords"]} for known in rows]
        assert [value > 0 for value in row.tolist()] == expected
        assert row.sum().item() == pytest.approx(1)


def test_a_phrase_fits_captions_before_keywords_and_groups_share_a_weight(tmp_path, runs):
    """Four images: a lion, a sea lion, a seal with the keyword lion, and two variants of a king."""
    rows = [
        ("lion", []),
        ("sea lion", ["lion"]),
        ("seal", ["lion"]),
        ("king: old", ["lion"]),
        ("king: young", ["lion"]),
    ]
    lines = []
    for number, (text, keywords) in enumerate(rows):
        Image.new("RGB", (32, 32), (40 * number, 90, 200)).save(tmp_path / f"{number}.png")
        lines.append({"file_name": f"{number}.png", "text": text, "keywords": keywords, "concept": text.split(":")[0]})
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_manifest(str(tmp_path), columns=Columns(labels=("concept",)), held_out=0.0, quiet=True)
    config = DataConfig(str(tmp_path), 32, 0, balance_by="concept")
    dataset = CaptionedPictures(config)
    bank = PictureBank(load_clip(str(runs / "clip")).eval(), dataset, open_groups(config, dataset))
    lion, sea_lion = bank.find_right_pictures([["lion"], ["sea lion", "lion"]])
    weights = torch.tensor([1, 0.1, 0.05, 0.025, 0.025])
    torch.testing.assert_close(lion, weights / weights.sum())
    assert sea_lion.tolist() == [0, 1, 0, 0, 0]


def test_the_loss_is_the_cross_entropy_of_the_right_pictures(bank):
    count, dim = bank.z_i.shape
    z_t = F.normalize(torch.randn(1, dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    name, right = next((name, right) for name, right in bank.weights.items() if 1 < len(right) < count)
    cosines = (z_t @ bank.z_i.T)[0].tolist()
    total = math.log(sum(math.exp(5 * value) for value in cosines))
    expected = sum(weight * (total - 5 * cosines[index]) for index, weight in right.items()) / sum(right.values())
    metrics = bank.compute_loss(z_t, torch.tensor(5.0), [[name]])
    assert metrics["loss"].item() == pytest.approx(expected, rel=1e-4)
    assert metrics["found"].item() == float(max(range(count), key=cosines.__getitem__) in right)


def test_only_the_text_tower_changes(shapes, runs, tmp_path):
    train("clip", shapes, tmp_path, init=runs / "clip", text_only="true")
    before, after = (load_clip(str(folder / "clip")).net for folder in (runs, tmp_path))
    same = {name: torch.equal(value, after.state_dict()[name]) for name, value in before.state_dict().items()}
    assert all(equal for name, equal in same.items() if name.startswith("visual."))
    assert not any(equal for name, equal in same.items() if "token_embedding" in name)


def test_text_alone_needs_a_trained_clip(shapes, tmp_path):
    with pytest.raises(InputError, match="text_only=true needs init"):
        train("clip", shapes, tmp_path, text_only="true")
