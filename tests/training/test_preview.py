"""What a run shows of itself: the right images in the right cells, and a run that is the same without them."""

import copy
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from t2i.training.common.encodings import FrozenModels
from t2i.training.common.preview import (
    PreviewInput,
    PreviewPipeline,
    SampleConfig,
    TrainingPreviews,
    draw_autoencoder_preview,
    draw_clip_preview,
    draw_column_images,
    draw_decoder_preview,
    draw_prior_preview,
    encode_preview_input,
    read_fixed_records,
    sample_column_embeds,
)

from t2i.config import DataConfig
from t2i.data import CaptionedPictures
from t2i.diffusion.condition import TextEncoding
from t2i.errors import InputError
from t2i.evaluation.contact_sheet import (
    FONT,
    GREEN,
    RED,
    build_labelled_rows,
    build_similarity_matrix,
    to_pil_images,
    wrap_text,
)
from tests.helpers.stages import seeds, train

FAST = {"prior_num_inference_steps": 3, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def dataset(shapes) -> CaptionedPictures:
    return CaptionedPictures(DataConfig(path=str(shapes), image_size=32))


@pytest.fixture
def columns(dataset, pipeline) -> PreviewInput:
    """Three records and a prompt."""
    return encode_columns(dataset, pipeline.clip, 3, ["a blue square"])


def encode_columns(dataset, clip, count: int, prompts: list[str]) -> PreviewInput:
    """Columns as CLIP encodes them."""
    records = read_fixed_records(dataset, count)
    captions = [*records.captions, *prompts]
    with torch.no_grad():
        return PreviewInput(captions, clip.encode_text(captions), clip.encode_image(records.image), records.image)


def decoding(pipeline) -> PreviewPipeline:
    parts = {"decoder": pipeline.decoder, "decoder_scheduler": pipeline.decoder_scheduler}
    return PreviewPipeline(**parts, autoencoder=pipeline.autoencoder)


def count_pixels(image: Image.Image, color: tuple[int, int, int]) -> int:
    return sum(pixel == color for pixel in image.get_flattened_data())


def states() -> list:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()]


# Drawing


def test_rows_have_their_pictures_in_their_cells_and_blanks_where_there_is_none():
    red, blue = Image.new("RGB", (100, 100), "red"), Image.new("RGB", (100, 100), "blue")
    sheet = build_labelled_rows({"first": [red, None, red], "second": [blue]}, ["one", "two", "three"])
    assert count_pixels(sheet, (255, 0, 0)) == 2 * 100 * 100 and count_pixels(sheet, (0, 0, 255)) == 100 * 100
    middles = [[sheet.getpixel((120 + 108 * i + 50, 8 + 108 * j + 50)) for i in range(3)] for j in range(2)]
    assert middles == [[(255, 0, 0), (244,) * 3, (255, 0, 0)], [(0, 0, 255), (244,) * 3, (244,) * 3]]


def test_many_columns_become_bands_of_equal_width():
    sheet = build_labelled_rows({"all": [Image.new("RGB", (96, 96), (i + 1, 0, 0)) for i in range(12)]}, ["x"] * 12)
    one = build_labelled_rows({"all": [Image.new("RGB", (96, 96))] * 6}, ["x"] * 6)
    assert sheet.width == one.width and sheet.height == 2 * (one.height - 8) + 8
    assert all(count_pixels(sheet, (i + 1, 0, 0)) == 96 * 96 for i in range(12))


def test_small_pictures_are_enlarged_and_large_ones_shrunk():
    small = build_labelled_rows({"a": [Image.new("RGB", (32, 32), "red")]}, ["x"])
    large = build_labelled_rows({"a": [Image.new("RGB", (512, 512), "red")]}, ["x"])
    assert count_pixels(small, (255, 0, 0)) == 96 * 96 and count_pixels(large, (255, 0, 0)) == 256 * 256


def test_captions_are_wrapped_to_their_width_and_cut_with_an_ellipsis():
    assert wrap_text("a cat", 100) == ["a cat"]
    long = wrap_text("several words that need more than two lines of a narrow column", 100)
    assert len(long) == 2 and long[0] == "several words that" and long[1].endswith("…")
    for text in ("w" * 5000, "one " + "w" * 5000 + " two", "\ud800 half", "猫 の 絵"):
        assert all(FONT.getlength(line) <= 100 for line in wrap_text(text, 100)), text
    assert wrap_text("", 100) == [""]


def test_the_frame_tells_which_captions_find_their_picture():
    images, captions = [Image.new("RGB", (8, 8))] * 3, ["a", "b", "c"]
    cosines = torch.tensor([[0.9, 0.1, 0.2], [0.3, 0.2, 0.1], [0.0, 0.1, 0.8]])
    frames = build_similarity_matrix(cosines, images, captions, "cosine")
    own = [frames.getpixel((170 + 64 * i + 1, 64 + 16 + 64 * i + 1)) for i in range(3)]
    assert own == [GREEN, RED, GREEN]
    blank = build_similarity_matrix(torch.full((3, 3), torch.nan), [], captions, "cosine")
    assert blank.height == frames.height - 64  # no images above


def test_values_become_pixels_and_what_is_not_finite_is_black():
    values = torch.tensor([-1.0, 0.0, 1.0, 7.0, torch.nan, torch.inf]).expand(1, 3, 1, 6)
    (image,) = to_pil_images(values)
    assert [image.getpixel((i, 0))[0] for i in range(6)] == [0, 128, 255, 255, 0, 0]


# What is drawn


def test_records_are_spread_over_the_data_and_always_the_same(dataset):
    records = read_fixed_records(dataset, 4)
    assert records.index.tolist() == [0, 8, 16, 24]
    assert records.captions == read_fixed_records(dataset, 4).captions
    assert torch.equal(records.image[1], dataset.load_image(8))
    assert len(read_fixed_records(dataset, 64).captions) == len(dataset) == 32
    assert read_fixed_records(dataset, 0) is None


def test_columns_are_records_of_the_held_out_split_and_prompts_in_single_precision(shapes, runs, pipeline):
    source = FrozenModels(DataConfig(str(shapes), 32, 0), str(runs / "clip"), None, reads_captions=True)
    source.clip_model.half()
    prompts = ["a rather long prompt about a blue square and a red circle"]
    columns = encode_preview_input(source, SampleConfig(count=3, prompts=prompts))
    expected = encode_columns(source.validation, pipeline.clip, 3, prompts)
    assert columns.captions == expected.captions and columns.captions[3:] == prompts
    assert all(map(torch.equal, columns.pictures, expected.pictures)) and len(columns.pictures) == 3
    assert torch.equal(columns.text.mask, expected.text.mask)
    assert isinstance(columns.text, TextEncoding) and columns.text.states.dtype == columns.z_i.dtype == torch.float32
    kept, close = expected.text.mask[..., None], {"atol": 1e-2, "rtol": 1e-2}
    torch.testing.assert_close(columns.z_i, expected.z_i, **close)
    torch.testing.assert_close(columns.text.embedding, expected.text.embedding, **close)
    torch.testing.assert_close(columns.text.states * kept, expected.text.states * kept, **close)


def test_columns_may_be_prompts_alone_or_none(shapes, runs):
    source = FrozenModels(DataConfig(str(shapes), 32, 0), str(runs / "clip"), None, reads_captions=True)
    alone = encode_preview_input(source, SampleConfig(count=0, prompts=["a cat"]))
    assert (
        alone.captions == ["a cat"] and alone.pictures is None and alone.z_i.shape == (0, source.clip_facts.embed_dim)
    )
    assert encode_preview_input(source, SampleConfig(count=0)) is None


def test_a_column_is_what_the_pipeline_draws_with_its_seed(columns, pipeline):
    config = SampleConfig(seed=5, **FAST)
    z_i = sample_column_embeds(columns, config, PreviewPipeline(pipeline.prior, pipeline.prior_scheduler))
    stages = decoding(pipeline)
    expected = pipeline(columns.captions, generator=seeds(5, 6, 7, 8), output_type="pt", **FAST)
    torch.testing.assert_close(z_i, expected.image_embeds)
    pictures = torch.stack(draw_column_images(columns, z_i, config, stages))
    torch.testing.assert_close((pictures / 2 + 0.5).clamp(0, 1), expected.images)
    true = torch.stack(draw_column_images(columns, columns.z_i, config, stages))
    expected = pipeline(
        columns.captions[:3], image_embeds=columns.z_i, generator=seeds(5, 6, 7), output_type="pt", **FAST
    )
    torch.testing.assert_close((true / 2 + 0.5).clamp(0, 1), expected.images)
    other = torch.stack(draw_column_images(columns, columns.z_i, SampleConfig(seed=6, **FAST), stages))
    assert not torch.allclose(true, other, atol=1e-2)


def test_more_columns_than_a_batch_are_drawn_each_with_its_own_caption_and_seed(dataset, pipeline):
    columns = encode_columns(dataset, pipeline.clip, 19, [])
    config = SampleConfig(**FAST)
    z_i = sample_column_embeds(columns, config, PreviewPipeline(pipeline.prior, pipeline.prior_scheduler))
    assert z_i.shape == (19, 32)
    expected = pipeline(columns.captions[18], generator=seeds(18), output_type="latent", **FAST)
    torch.testing.assert_close(z_i[18:], expected.image_embeds, atol=1e-4, rtol=1e-3)


def test_the_grid_has_a_row_for_each_stage_at_hand(columns, pipeline):
    config = SampleConfig(**FAST)
    stages = decoding(pipeline)
    z_i = sample_column_embeds(columns, config, PreviewPipeline(pipeline.prior, pipeline.prior_scheduler))
    whole, alone = draw_decoder_preview(columns, config, stages, z_i), draw_decoder_preview(columns, config, stages)
    assert whole.height - alone.height == 96 + 8  # the row of the prior
    assert whole.width - alone.width == 96 + 8  # the column of the prompt, which the prior alone can draw
    blind = PreviewInput(columns.captions, columns.text, columns.z_i, None)
    assert alone.height - draw_decoder_preview(blind, config, stages).height == 96 + 8  # the row of the images
    prompts = PreviewInput(["a cat"], columns.text.map_tensors(lambda tensor: tensor[:1]), torch.zeros(0, 32), None)
    assert draw_decoder_preview(prompts, config, stages) is None and draw_prior_preview(prompts, z_i[:1]) is None
    assert draw_decoder_preview(prompts, config, stages, z_i[:1]).width == 120 + 96 + 2 * 8


def test_a_perfect_prior_finds_every_picture(columns):
    z_i = torch.nn.functional.one_hot(torch.arange(3), 32).float()
    columns = PreviewInput(columns.captions, columns.text, z_i, columns.pictures)
    perfect, wrong = draw_prior_preview(columns, torch.cat([z_i, z_i[:1]])), draw_prior_preview(columns, z_i.roll(1, 0))
    assert count_pixels(perfect, GREEN) > 300 and count_pixels(perfect, RED) == 0
    assert count_pixels(wrong, RED) > 300 and count_pixels(wrong, GREEN) == 0


def test_the_previews_of_clip_and_autoencoder_show_every_record(dataset, pipeline):
    records = read_fixed_records(dataset, 3)
    matrix = draw_clip_preview(pipeline.clip, records.image, records.captions)
    assert matrix.size == (170 + 3 * 64 + 8, 64 + 16 + 3 * 64 + 3 * 14)
    assert count_pixels(matrix, GREEN) + count_pixels(matrix, RED) > 3 * 100
    grid = draw_autoencoder_preview(pipeline.autoencoder, records.image)
    with torch.no_grad():
        again = pipeline.autoencoder.decode(pipeline.autoencoder.encode(records.image))
    for row, pictures in enumerate((records.image, again)):
        for i, image in enumerate(to_pil_images(pictures)):
            left, top = 120 + i * 104, 8 + row * 104
            assert grid.crop((left, top, left + 96, top + 96)) == image.resize((96, 96), Image.Resampling.NEAREST)


def test_weights_that_are_not_finite_stop_nothing_and_are_named(columns, runs, pipeline, caplog):
    preview = preview_of(runs, columns, pipeline.clip)
    next(pipeline.prior.parameters()).data.fill_(torch.nan)
    assert preview.preview_prior(pipeline.prior, pipeline.prior_scheduler) == {}
    assert "sample images lack a stage: the prior returned values that are not finite" in caplog.text
    next(pipeline.decoder.parameters()).data.fill_(torch.nan)
    assert preview.preview_decoder(pipeline.decoder, pipeline.decoder_scheduler, lambda: pipeline.autoencoder) == {}
    assert "sample images lack a stage: the decoder returned values that are not finite" in caplog.text


# In a run


def preview_of(runs, columns, clip, **settings) -> TrainingPreviews:
    folders = {name: str(runs / name) for name in ("prior", "decoder", "autoencoder")}
    return TrainingPreviews(SampleConfig(**{**FAST, **folders, **settings}), columns, clip.identity)


def test_previews_leave_random_numbers_models_and_schedulers_as_they_were(dataset, runs, pipeline):
    before = states()
    models = {name: copy.deepcopy(getattr(pipeline, name).state_dict()) for name in ("clip", "prior", "decoder")}
    scheduler = pipeline.decoder_scheduler
    records = read_fixed_records(dataset, 3)
    preview = preview_of(runs, encode_columns(dataset, pipeline.clip, 3, ["a cat"]), pipeline.clip)
    images = preview.preview_decoder(pipeline.decoder, scheduler, lambda: pipeline.autoencoder)
    images |= preview.preview_prior(pipeline.prior, pipeline.prior_scheduler)
    draw_clip_preview(pipeline.clip, records.image, records.captions)
    draw_autoencoder_preview(pipeline.autoencoder, records.image)
    assert set(images) == {"pictures", "embeddings"}
    assert states() == before
    assert scheduler.num_inference_steps is None
    for name, weights in models.items():
        now = getattr(pipeline, name).state_dict()
        assert all(torch.equal(value, now[key]) for key, value in weights.items())


def test_the_same_weights_give_the_same_picture_and_others_another(columns, runs, pipeline):
    preview = preview_of(runs, columns, pipeline.clip)
    parts = (pipeline.decoder, pipeline.decoder_scheduler, pipeline.autoencoder)
    first, torch_state = preview.preview_decoder(*parts[:2], lambda: parts[2])["pictures"], torch.get_rng_state()
    torch.manual_seed(99)
    assert preview.preview_decoder(*parts[:2], lambda: parts[2])["pictures"] == first
    torch.set_rng_state(torch_state)
    for parameter in pipeline.decoder.parameters():
        parameter.data *= 1.5
    assert preview.preview_decoder(*parts[:2], lambda: parts[2])["pictures"] != first


def test_a_prior_without_a_decoder_shows_its_embeddings_and_nothing_to_draw_is_no_picture(columns, runs, pipeline):
    prior = (pipeline.prior, pipeline.prior_scheduler)
    alone = preview_of(runs, columns, pipeline.clip, decoder=None, autoencoder=None)
    assert set(alone.preview_prior(*prior)) == {"embeddings"}
    nothing = preview_of(runs, None, pipeline.clip)
    assert nothing.preview_prior(*prior) == {}
    assert nothing.preview_decoder(pipeline.decoder, pipeline.decoder_scheduler, lambda: pipeline.autoencoder) == {}


def test_a_stage_that_does_not_fit_is_refused_at_the_start(columns, shapes, runs, pipeline, tmp_path):
    with pytest.raises(InputError, match="holds a UNetDecoder; it must be a Prior"):
        preview_of(runs, columns, pipeline.clip, prior=str(runs / "decoder"))
    with pytest.raises(InputError, match="sample.prior is .*, trained with the CLIP [0-9a-f]+; this run has other"):
        TrainingPreviews(SampleConfig(prior=str(runs / "prior")), columns, "other")
    shutil.copytree(runs / "prior", tmp_path / "prior")
    shutil.rmtree(tmp_path / "prior/scheduler")
    with pytest.raises(InputError, match="scheduler"):
        preview_of(runs, columns, pipeline.clip, prior=str(tmp_path / "prior"))
    train("autoencoder", shapes, tmp_path, 1, **{"model.vae.latent_channels": 8})
    with pytest.raises(InputError, match="of 8 channels; those of sample.decoder's latents are 4"):
        preview_of(runs, columns, pipeline.clip, autoencoder=str(tmp_path / "autoencoder"))


def test_a_stage_that_is_not_trained_yet_is_left_out_until_it_is_there(columns, runs, pipeline, tmp_path, caplog):
    preview = preview_of(runs, columns, pipeline.clip, prior=str(tmp_path / "prior"))
    parts = (pipeline.decoder, pipeline.decoder_scheduler, lambda: pipeline.autoencoder)
    without = preview.preview_decoder(*parts)["pictures"]
    assert "sample images lack a stage: no trained Prior" in caplog.text
    shutil.copytree(runs / "prior", tmp_path / "prior")
    assert preview.preview_decoder(*parts)["pictures"].height > without.height


def test_a_stage_that_goes_away_during_the_run_is_left_out_and_named(columns, runs, pipeline, tmp_path, caplog):
    shutil.copytree(runs / "prior", tmp_path / "prior")
    preview = preview_of(runs, columns, pipeline.clip, prior=str(tmp_path / "prior"))
    parts = (pipeline.decoder, pipeline.decoder_scheduler, pipeline.autoencoder)
    whole = preview.preview_decoder(*parts[:2], lambda: parts[2])["pictures"]
    shutil.rmtree(tmp_path / "prior")
    assert preview.preview_decoder(*parts[:2], lambda: parts[2])["pictures"].height < whole.height
    assert "sample images lack a stage: no trained Prior" in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"count": 65}, "sample.count must be an integer from 0 to 64, got 65"),
        ({"prompts": ["a cat", " "]}, "sample.prompts must not be empty"),
        ({"prompts": ["a cat"] * 65}, "sample.prompts has 65 texts; at most 64"),
        ({"seed": -1}, "sample.seed must be an integer from 0"),
        ({"num_inference_steps": 0}, "sample.num_inference_steps must be an integer from 1 to 1000, got 0"),
        ({"prior_guidance_scale": float("nan")}, "sample.prior_guidance_scale must be a number from 0 to 1000"),
        ({"decoder": "runs/decoder"}, "sample.decoder and sample.autoencoder go together"),
    ],
)
def test_settings_that_cannot_be_are_refused_by_name(settings, message):
    with pytest.raises(InputError, match=message):
        SampleConfig(**settings)
