"""CLIP sees an image resized once in evaluation too, from the file and not from what is compared."""

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.functional import to_pil_image

from t2i.config import DataConfig
from t2i.data import CaptionedPictures, to_tensor
from t2i.data.pictures import Resizing
from t2i.evaluation import likelihood
from t2i.evaluation.picture_sets import DrawnPictures, FolderPictures, SourcePictures
from t2i.evaluation.quality import extract_set_features
from tests.data.test_framing import build_clip, noise
from tests.helpers.samples import write_mixed_pictures


class Means:
    """Colours of whole images, of a size that is checked."""

    identity, dim, size = "means", 3, 24

    def __call__(self, images: Tensor) -> Tensor:
        assert images.shape[-2:] == (self.size, self.size)
        return images.mean(dim=(2, 3))


class OneProcess:
    process_index, num_processes, is_main_process = 0, 1, True


def test_a_clip_score_is_of_the_files(tmp_path, monkeypatch):
    for number in range(3):
        noise(60, 60, seed=number).save(tmp_path / f"{number}.png")
    images, clip = FolderPictures(tmp_path, 24), build_clip(16).eval()
    images.captions, scored = ["a", "b", "c"], []
    monkeypatch.setattr(
        "t2i.evaluation.quality.compute_clip_scores",
        lambda clip, seen, captions: scored.append(seen) or torch.zeros(len(seen)),
    )
    extract_set_features(images, Means(), OneProcess(), "drawn", clip)
    once = torch.stack([to_tensor(noise(60, 60, seed=number), 16) for number in range(3)])
    twice = clip.preprocess(images.get_images([0, 1, 2])) * 0.5 + 0.5
    assert scored[0].equal(once) and (scored[0] - twice).abs().max() > 0.1


def test_every_set_has_what_clip_sees_beside_its_images(tmp_path):
    write_mixed_pictures(tmp_path, [(60, 40), (40, 60)])
    resizing = Resizing((16,), 16)
    source, folder = SourcePictures(tmp_path, 24, "train"), FolderPictures(tmp_path, 24)
    for images in (source, folder):
        compared, seen = images.get_views([0, 1], resizing)
        assert compared.equal(images.get_images([0, 1])) and compared.shape[-2:] == (24, 24)
        assert seen.equal(torch.stack([to_tensor(Image.open(path), resizing) for path in folder.paths]))

    class Pipeline:
        def set_progress_bar_config(self, **_):
            pass

        def resolve_options(self, **_):
            pass

        def __call__(self, prompts, **_):
            return type("Output", (), {"images": torch.rand(len(prompts), 3, 24, 24, generator=torch.Generator())})

    drawn = DrawnPictures(Pipeline(), ["a", "b"], 2, 0)
    compared, seen = drawn.get_views([0, 1], resizing)
    files = [to_pil_image(image / 2 + 0.5) for image in compared]
    assert seen.equal(torch.stack([to_tensor(file, resizing) for file in files]))


def test_the_likelihood_of_latents_is_given_what_clip_sees_of_the_file(tmp_path):
    write_mixed_pictures(tmp_path, [(60, 40), (40, 60)])
    dataset, given = CaptionedPictures(DataConfig(str(tmp_path), 24, 0)), {}

    class Prior:
        dtype = torch.float32
        scale_image_embeds = staticmethod(lambda z_i: z_i)
        prepare = staticmethod(lambda condition: None)

    class Pipeline:
        clip, prior, prior_scheduler = build_clip(16), Prior(), object()

        def encode_image(self, images):
            given["seen"] = images
            return torch.zeros(len(images), 8)

        def encode_prompt(self, prompts):
            return torch.zeros(len(prompts), 8)

    likelihood.prepare_stage_data(Pipeline(), dataset, [0, 1], "prior")
    files = [Image.open(tmp_path / dataset.get_sample_key(index)) for index in (0, 1)]
    assert given["seen"].equal(torch.stack([to_tensor(file, 16) for file in files]))
