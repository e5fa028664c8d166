"""A decoder's compiled steps, and what a machine without compiler or bf16 is told."""

import copy
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from t2i.pipelines import Text2ImagePipeline

from t2i.diffusion.condition import ImageCondition
from t2i.errors import InputError
from t2i.networks.decoder import Decoder
from t2i.networks.public.kandinsky import KandinskyDecoder, derive_kandinsky_config
from t2i.runtime.compiling import CompiledStep, check_compiler, compile_steps
from tests.commands.test_cli import QUICK, run
from tests.helpers.kandinsky_folders import tiny_kandinsky_unet
from tests.helpers.public_folders import EMBED_DIM

EMOJI = Path(__file__).parents[2] / "models" / "emoji"


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # of torch's own, while it compiles
def test_compiled_steps_are_the_same_and_say_how_long_they_took_to_compile(caplog: pytest.LogCaptureFixture) -> None:
    settings = dict(tiny_kandinsky_unet("2.2").config)
    torch.manual_seed(0)
    decoder = KandinskyDecoder(settings, **derive_kandinsky_config(settings)).eval()
    context = decoder.prepare(ImageCondition(torch.randn(2, EMBED_DIM)))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([400, 400])
    plain = decoder.step(x, t, context)
    compiled = compile_steps(decoder, backend="eager")  # the tracing is torch's; what it writes then takes minutes
    assert compile_steps(decoder) is compiled
    with caplog.at_level(logging.WARNING, "t2i"):
        torch.testing.assert_close(decoder.step(x, t, context), plain, atol=1e-5, rtol=1e-5)
        decoder.step(x, t, context)
    said = [record.message.partition(" for noisy latents (2, 4")[0] for record in caplog.records]
    assert said == ["compiling the decoder", "compiled the decoder"]
    assert [key[0][0] for key in compiled.warm_up] == [(2, 4, 8, 8)]


@pytest.mark.filterwarnings("ignore")
def test_a_copy_of_a_compiled_decoder_steps_with_its_own_weights() -> None:
    settings = dict(tiny_kandinsky_unet("2.2").config)
    decoder = KandinskyDecoder(settings, **derive_kandinsky_config(settings)).eval()
    compile_steps(decoder, backend="eager")
    other = copy.deepcopy(decoder)
    for one in other.parameters():
        torch.nn.init.normal_(one, std=0.1)
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([400, 400])
    with torch.no_grad():
        context = other.prepare(ImageCondition(torch.randn(2, EMBED_DIM)))
        expected = KandinskyDecoder.step(other, x, t, context)
        torch.testing.assert_close(other.step(x, t, context), expected, atol=1e-4, rtol=1e-4)


@dataclass
class Words:
    """A context as a decoder's that reads captions."""

    tokens: dict[str, tuple[torch.Tensor | None, ...]]


def of_length(length: int) -> Words:
    return Words({"keys": (None, torch.ones(2, length, 3))})


@pytest.mark.filterwarnings("ignore")
def test_captions_of_every_length_are_compiled_and_said(caplog: pytest.LogCaptureFixture) -> None:
    """Of more lengths than torch compiles by itself, which then goes on without a word and without compiling."""
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        made.append(1)
        return graph.forward

    step = CompiledStep(lambda x, t, context: x + context.tokens["keys"][1].sum(), backend)
    x, t = torch.zeros(2, 4), torch.ones(2)
    with caplog.at_level(logging.WARNING, "t2i"):
        for length in (*range(1, 12), 3, 11):
            assert step(x, t, of_length(length))[0, 0] == 6 * length
    assert len(made) == len(step.warm_up) == 11
    said = [record.message.partition(": ")[0] for record in caplog.records]
    assert said[:2] == [f"{what} the decoder for noisy latents (2, 4)" for what in ("compiling", "compiled")]
    new = "noisy latents (2, 4) and a context with (2, 11, 3) of float32"
    assert said[-2:] == [f"{what} the decoder for {new}" for what in ("compiling", "compiled")] and len(said) == 22


@pytest.mark.parametrize("name", ["TritonMissing", "GPUTooOldForTriton"])
@pytest.mark.filterwarnings("ignore")
def test_a_gpu_without_triton_is_one_line_also_for_captions_of_another_length(name: str) -> None:
    from torch._inductor import exc

    old = SimpleNamespace(name="an old GPU", major=6, minor=1)
    failure = exc.TritonMissing(None) if name == "TritonMissing" else exc.GPUTooOldForTriton(old, None)
    failing: list[Exception] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        for one in failing:
            raise one
        return graph.forward

    step = CompiledStep(lambda x, t, context: x * context.tokens["keys"][1].sum(), backend)
    step(torch.zeros(2, 4), torch.ones(2), of_length(1))
    failing.append(failure)
    said = r"the decoder cannot be compiled here \((Cannot find a working triton|Found an old GPU).*; leave out compile"
    with pytest.raises(InputError, match=said) as raised:
        step(torch.zeros(2, 4), torch.ones(2), of_length(2))
    assert "\n" not in str(raised.value)


def test_no_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="compile needs a C.. compiler, and there is no no-such-compiler here"):
        check_compiler()
    with pytest.raises(InputError, match="compile needs"):
        Text2ImagePipeline.from_pretrained("no such folder", compile=True)


@pytest.mark.parametrize("without", ["PATH", "CXX"])
def test_a_command_that_is_to_compile_without_a_compiler_says_so_in_one_line(
    monkeypatch, capsys, pipeline_folder, tmp_path, without: str
) -> None:
    """A PATH of nothing, and a CXX that names nothing."""
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv(without, str(tmp_path / "nowhere"))
    words = ["generate", "red circle", "--model", pipeline_folder, "--out", tmp_path / "out", "--compile", *QUICK]
    status, out, err = run(monkeypatch, capsys, *words)
    assert (status, out) == (2, "") and err.count("\n") == 1
    assert "compile needs a C++ compiler, and there is no " in err and not (tmp_path / "out").exists()


@pytest.mark.skipif(shutil.which("false") is None, reason="there is no program that fails")
@pytest.mark.filterwarnings("ignore")
def test_a_compiler_that_does_not_compile_is_one_line() -> None:
    from torch._inductor import config  # seconds, for this test alone

    step = CompiledStep(lambda x, t, context: x.sin() + t)
    said = (
        r"the decoder cannot be compiled here \(InvalidCxxCompiler: No working C.. compiler found.*; leave out compile"
    )
    with config.patch({"cpp.cxx": (None, shutil.which("false"))}), pytest.raises(InputError, match=said) as raised:
        step(torch.ones(2, 3), torch.ones(1), None)
    assert "\n" not in str(raised.value)


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no compiler here")
@pytest.mark.filterwarnings("ignore")
def test_a_command_draws_the_same_when_compiled(monkeypatch, capsys, caplog, pipeline, tmp_path) -> None:
    """Truly compiled: one block, in the way that takes the least time."""
    from torch._inductor import config

    torch.manual_seed(0)
    decoder = Decoder(pipeline.clip.embed_dim, *pipeline.latent_shape[:2], width=16, depth=1, heads=2)
    for parameter in decoder.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    Text2ImagePipeline.from_pipe(pipeline, decoder=decoder).save_pretrained(tmp_path / "model")
    drawn = {}
    for name, more in {"plain": [], "compiled": ["--compile"]}.items():
        words = ["generate", "red circle", "--model", tmp_path / "model", "--seed", 1, "--out", tmp_path / name]
        with config.patch({"compile_threads": 1, "cpp.simdlen": 1, "cpp.vec_isa_ok": True}):
            status, out, err = run(monkeypatch, capsys, *words, *QUICK, *more)
        assert status == 0, err
        with Image.open(out.strip()) as image:
            drawn[name] = np.asarray(image).astype(int)
    assert abs(drawn["plain"] - drawn["compiled"]).max() <= 1 and drawn["plain"].std() > 1
    said = [record.message.split(" for ")[0] for record in caplog.records if record.name.startswith("t2i.")]
    assert said == ["compiling the decoder", "compiled the decoder"]


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_bf16_where_the_machine_lacks_it_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("t2i.runtime.devices.can_compute_bf16", lambda device: False)
    with pytest.raises(InputError, match="dtype bfloat16 is not what this machine computes in"):
        Text2ImagePipeline.from_pretrained(EMOJI, **{name: torch.bfloat16})
