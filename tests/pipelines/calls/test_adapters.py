"""Adapters of a run on a loaded pipeline: the same images as of the merged model, and off again."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from t2i.training.common.lora import LoraConfig, add_adapters, export_adapted_model

from t2i import InputError, PriorPipeline, Text2ImagePipeline
from tests.helpers.stages import seeds

QUICK = {"prior_num_inference_steps": 2, "num_inference_steps": 2, "output_type": "latent"}


def draw(pipeline):
    return pipeline("red circle", generator=seeds(1), **QUICK).images


def train_adapters(model, folder):
    add_adapters(model, LoraConfig(rank=2, alpha=4.0))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter.data, std=0.1, generator=seeds(0)[0])
    export_adapted_model(model, folder)
    return folder


@pytest.mark.parametrize("part", ("prior", "decoder"))
def test_adapters_draw_what_the_merged_model_draws(pipeline, loaded_pipeline, tmp_path, part):
    plain = draw(pipeline)
    folder = train_adapters(getattr(pipeline, part), tmp_path / "run")
    loaded = Text2ImagePipeline.from_pipe(loaded_pipeline)
    model = type(getattr(loaded, part)).from_pretrained(folder / "model")
    merged = draw(Text2ImagePipeline.from_pipe(loaded_pipeline, **{part: model}))
    assert (merged - plain).abs().max() > 1e-4

    fresh = Text2ImagePipeline.from_pipe(loaded_pipeline, **{part: type(model).from_config(model.config)})
    getattr(fresh, part).load_state_dict(getattr(loaded_pipeline, part).state_dict())
    getattr(fresh, part).eval()
    fresh.load_lora_weights(folder)
    torch.testing.assert_close(draw(fresh), merged, atol=1e-4, rtol=0)
    with pytest.raises(InputError, match=f"the {part} has adapters already"):
        fresh.load_lora_weights(folder)
    fresh.unload_lora_weights()
    torch.testing.assert_close(draw(fresh), plain, rtol=0, atol=0)
    fresh.load_lora_weights(folder / "adapters", scale=0.0)
    torch.testing.assert_close(draw(fresh), plain, atol=1e-5, rtol=0)
    fresh.unload_lora_weights()
    fresh.load_lora_weights(folder)
    fresh.fuse_lora()
    torch.testing.assert_close(draw(fresh), merged, atol=1e-4, rtol=0)
    assert not any("lora_" in name for name in getattr(fresh, part).state_dict())


def test_the_prior_alone_takes_its_adapters(pipeline, tmp_path):
    alone = PriorPipeline.from_pipe(pipeline)
    settings = {"num_inference_steps": 2}
    plain = alone("red circle", generator=seeds(1), **settings).image_embeds
    folders = [train_adapters(copy.deepcopy(getattr(pipeline, part)), tmp_path / part) for part in ("prior", "decoder")]
    alone.load_lora_weights(folders[0])
    adapted = alone("red circle", generator=seeds(1), **settings).image_embeds
    assert (adapted - plain).abs().max() > 1e-4
    drawn = pipeline("red circle", generator=seeds(1), **QUICK).image_embeds  # of the same prior
    torch.testing.assert_close(adapted, drawn, atol=1e-6, rtol=0)
    alone.unload_lora_weights()
    torch.testing.assert_close(alone("red circle", generator=seeds(1), **settings).image_embeds, plain)
    with pytest.raises(InputError, match="fit no layers of this prior"):
        alone.load_lora_weights(folders[1])


def test_adapters_of_another_model_are_refused(pipeline, tmp_path):
    with pytest.raises(InputError, match="has no adapters: adapter_config.json"):
        pipeline.load_lora_weights(tmp_path)
    folder = train_adapters(pipeline.prior, tmp_path / "run") / "adapters"
    state = load_file(folder / "adapter_model.safetensors")
    save_file({f"other.{name}": tensor for name, tensor in state.items()}, folder / "adapter_model.safetensors")
    with pytest.raises(InputError, match="fit no layers of this prior or decoder"):
        pipeline.load_lora_weights(folder)
