"""A decoder's compiled steps, and the errors on a machine without a compiler or bf16."""

import copy
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
def test_compiled_steps_are_the_same() -> None:
    settings = dict(tiny_kandinsky_unet("2.2").config)
    torch.manual_seed(0)
    decoder = KandinskyDecoder(settings, **derive_kandinsky_config(settings)).eval()
    context = decoder.prepare(ImageCondition(torch.randn(2, EMBED_DIM)))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([400, 400])
    plain = decoder.step(x, t, context)
    compiled = compile_steps(decoder, backend="eager")  # the tracing is torch's; what it writes then takes minutes
    assert compile_steps(decoder) is compiled
    assert decoder.step is compiled
    for _ in range(2):
        torch.testing.assert_close(decoder.step(x, t, context), plain, atol=1e-5, rtol=1e-5)


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
def test_captions_of_every_length_are_compiled() -> None:
    """More lengths than torch's own limit, beyond which it runs uncompiled code without an error."""
    made: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        made.append(1)
        return graph.forward

    step = CompiledStep(lambda x, t, context: x + context.tokens["keys"][1].sum(), backend)
    x, t = torch.zeros(2, 4), torch.ones(2)
    for length in (*range(1, 12), 3, 11):
        assert step(x, t, of_length(length))[0, 0] == 6 * length
    assert len(made) == 11


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
    with pytest.raises(InputError, match="compile needs a C.. compiler, but no-such-compiler is not installed"):
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
    assert "compile needs a C++ compiler, but " in err and not (tmp_path / "out").exists()


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
def test_a_command_draws_the_same_when_compiled(monkeypatch, capsys, pipeline, tmp_path) -> None:
    """Truly compiled: one block, in the way that takes the least time."""
    from torch._dynamo.utils import counters
    from torch._inductor import config

    torch.manual_seed(0)
    graphs = counters["stats"]["unique_graphs"]
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
    assert counters["stats"]["unique_graphs"] > graphs


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_bf16_where_the_machine_lacks_it_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("t2i.runtime.devices.can_compute_bf16", lambda device: False)
    with pytest.raises(InputError, match="dtype bfloat16 needs bfloat16 instructions, which this machine lacks"):
        Text2ImagePipeline.from_pretrained(EMOJI, **{name: torch.bfloat16})
