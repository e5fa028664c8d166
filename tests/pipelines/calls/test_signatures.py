"""Signatures of the pipelines' calls: what is taken is shown, what is not is refused with the nearest name."""

import ast
import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import t2i.pipelines as pipelines
import torch
from diffusers import DiffusionPipeline
from t2i.pipelines.base import UnCLIPPipeline
from t2i.pipelines.calls.signature import MODEL_DEFAULTS
from t2i.pipelines.inversion import DECODER_REDRAWING_OPTIONS, REDRAWING_OPTIONS
from t2i.pipelines.options import GUIDANCE_OPTIONS, OPTION_NAMES, PRIOR_OPTION_NAMES, DecoderOptions, PriorOptions
from t2i.pipelines.prior import OPTION_ALIASES

import t2i
from t2i import InputError, Text2ImagePipeline
from t2i.diffusion.guidance import Guidance
from tests.helpers.stages import seeds

ROOT = Path(__file__).resolve().parents[3]
ALL = [getattr(pipelines, name) for name in pipelines.__all__ if name.endswith("Pipeline")]
OPTIONS = {field.name: field for options in (PriorOptions, DecoderOptions) for field in fields(options)}
TAKEN = {
    "Text2ImagePipeline": OPTION_NAMES,
    "ImageToImagePipeline": OPTION_NAMES,
    "InpaintPipeline": OPTION_NAMES,
    "OutpaintPipeline": OPTION_NAMES,
    "InterpolationPipeline": REDRAWING_OPTIONS,
    "ImageVariationPipeline": DECODER_REDRAWING_OPTIONS,
    "TextDiffPipeline": REDRAWING_OPTIONS,
    "PriorPipeline": PRIOR_OPTION_NAMES | OPTION_ALIASES.keys(),
}


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_a_signature_shows_all_that_a_call_takes(kind):
    shown = inspect.signature(kind.__call__).parameters
    behind = inspect.signature(inspect.unwrap(kind.__call__)).parameters
    assert not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in shown.values())
    options = {name: one for name, one in shown.items() if name not in behind and name != "resolved"}
    assert options.keys() == TAKEN.get(kind.__name__, frozenset()) - behind.keys()
    for name, parameter in options.items():
        model_decides = name in MODEL_DEFAULTS
        assert parameter.kind is inspect.Parameter.KEYWORD_ONLY
        assert parameter.default == (None if model_decides else OPTIONS[name].default)
        expected: Any = float | Guidance | dict[str, Any] if name in GUIDANCE_OPTIONS else OPTIONS[name].type
        assert parameter.annotation == (expected | None if model_decides else expected)
    assert kind.__call__.__annotations__.keys() == shown.keys() - {"self"} | {"return"}


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
def test_help_describes_every_option(kind):
    parameters = inspect.signature(kind.__call__).parameters
    described = inspect.getdoc(kind.__call__) + inspect.getdoc(UnCLIPPipeline)
    assert [name for name in parameters if name not in ("self", "resolved") and name not in described] == []


def test_an_unknown_keyword_is_one_line_with_the_nearest_name(pipeline):
    with pytest.raises(TypeError, match=r"^unknown argument 'guidance_scal'; did you mean 'guidance_scale'\?$"):
        pipeline("a cat", guidance_scal=3.0)
    with pytest.raises(TypeError, match="^unknown argument 'xyzzy'; the arguments are prompt, negative_prompt,"):
        pipeline("a cat", xyzzy=3)


def test_none_is_the_default_of_every_option(pipeline):
    quick = {"prior_num_inference_steps": 2, "output_type": "pt"}
    plain = pipeline("a cat", generator=seeds(1), **quick).images
    nothing = dict.fromkeys(OPTION_NAMES - quick.keys())
    torch.testing.assert_close(pipeline("a cat", generator=seeds(1), **nothing, **quick).images, plain, rtol=0, atol=0)


def test_options_beside_resolved_ones_are_refused(pipeline):
    resolved = pipeline.resolve_options(num_inference_steps=2)
    with pytest.raises(InputError, match="^guidance_scale has no effect beside resolved"):
        pipeline("a cat", resolved=resolved, guidance_scale=3.0)


SNIPPET = """
from t2i import ImageVariationPipeline, PriorPipeline, Text2ImagePipeline, UpsamplePipeline

pipeline = Text2ImagePipeline.from_pretrained("folder")
pipeline("a cat", num_inference_steps=3, guidance_scale={"scale": 2.0}, height=None, prior_candidates=1)
pipeline("a cat", num_inference_stepz=3)  # no such argument
pipeline("a cat", num_inference_steps="many")  # another type
PriorPipeline.from_pretrained("folder")("a cat", prior_sampler="ddim", height=32)  # of the decoder
ImageVariationPipeline.from_pretrained("folder")("a.png", eta=0.5, sigmas=[3.0])  # not for inverted images
UpsamplePipeline.from_pretrained("folder")("a.png", timez=2)  # no such argument
"""


def test_a_type_checker_sees_every_argument(tmp_path):
    """The package is laid out as it is installed."""
    package = tmp_path / "t2i"
    package.mkdir()
    for path in (*(ROOT / "t2i").iterdir(), ROOT / "pipelines", ROOT / "training"):
        (package / path.name).symlink_to(path)
    (tmp_path / "snippet.py").write_text(SNIPPET)
    words = [sys.executable, "-m", "mypy", "--config-file", ROOT / "pyproject.toml", "snippet.py"]
    found = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    errors = [line for line in found.stdout.splitlines() if ": error: " in line]
    wrong = [number for number, line in enumerate(SNIPPET.splitlines(), 1) if "  # " in line]
    assert [int(line.split(":")[1]) for line in errors] == wrong, found.stdout + found.stderr
    assert 'Unexpected keyword argument "num_inference_stepz"' in errors[0]
    assert 'did you mean "num_inference_steps"' in errors[0]


def test_public_names_are_shown_to_type_checkers_as_they_are_imported():
    assert t2i.__all__ == sorted(t2i._MODULES)
    tree = ast.parse(Path(t2i.__file__).read_text())
    [block] = [node for node in tree.body if isinstance(node, ast.If)]
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    assert {alias.name: node.module for node in imports for alias in node.names} == t2i._MODULES


def test_all_pipelines_are_compared():
    assert all(issubclass(kind, DiffusionPipeline) for kind in ALL) and Text2ImagePipeline in ALL
    assert {kind.__name__ for kind in ALL} == TAKEN.keys() | {"UpsamplePipeline"}
