"""Text towers trained against all images."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from t2i.training.common.picture_bank import PictureBank

from t2i.config import DataConfig
from t2i.data import CaptionedPictures
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
    phrases = [dataset.get_phrases(index, draw) for index in range(len(dataset)) for draw in range(4)]
    right = bank.find_right_pictures(phrases)
    for row, parts in zip(right, phrases):
        expected = [set(parts) <= {*known["captions"], *known["keywords"]} for known in rows]
        assert [value > 0 for value in row.tolist()] == expected
        assert row.sum().item() == pytest.approx(1)


def test_the_loss_is_the_cross_entropy_of_the_right_pictures(bank):
    count, dim = bank.z_i.shape
    z_t = F.normalize(torch.randn(1, dim, generator=torch.Generator().manual_seed(0)), dim=-1)
    name, right = next((name, right) for name, right in bank.pictures_by_phrase.items() if 1 < len(right) < count)
    cosines = (z_t @ bank.z_i.T)[0].tolist()
    total = math.log(sum(math.exp(5 * value) for value in cosines))
    expected = sum(total - 5 * cosines[index] for index in right) / len(right)
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
