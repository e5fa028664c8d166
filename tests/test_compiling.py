"""A decoder's compiled steps, and what a machine without compiler or bf16 is told."""

import logging
from pathlib import Path

import pytest
import torch

from pipelines import Text2ImagePipeline
from t2i.compiling import check_compiler, compile_steps
from t2i.condition import ImageCondition
from t2i.errors import InputError
from t2i.interop.kandinsky import KandinskyDecoder, described
from tests.interop_folders import EMBED_DIM
from tests.interop_kandinsky_folders import tiny_kandinsky_unet

EMOJI = Path(__file__).parents[1] / "models" / "emoji"


@torch.no_grad()
@pytest.mark.filterwarnings("ignore")  # of torch's own, while it compiles
def test_compiled_steps_are_the_same_and_say_how_long_they_took_to_compile(caplog: pytest.LogCaptureFixture) -> None:
    settings = dict(tiny_kandinsky_unet("2.2").config)
    torch.manual_seed(0)
    decoder = KandinskyDecoder(settings, **described(settings)).eval()
    context = decoder.prepare(ImageCondition(torch.randn(2, EMBED_DIM)))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([400, 400])
    plain = decoder.step(x, t, context)
    compiled = compile_steps(decoder, backend="eager")  # the tracing is torch's; what it writes then takes minutes
    assert compile_steps(decoder) is compiled
    with caplog.at_level(logging.INFO, "t2i"):
        torch.testing.assert_close(decoder.step(x, t, context), plain, atol=1e-5, rtol=1e-5)
        decoder.step(x, t, context)
    assert [record.message[:44] for record in caplog.records] == ["compiled the decoder for noisy latents (2, 4"]
    assert list(compiled.warm_up) == [(2, 4, 8, 8)]


def test_no_compiler_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(InputError, match="compile needs a C.. compiler, and there is no no-such-compiler here"):
        check_compiler()
    with pytest.raises(InputError, match="compile needs"):
        Text2ImagePipeline.from_pretrained("no such folder", compile=True)


@pytest.mark.parametrize("name", ["dtype", "torch_dtype"])
def test_bf16_where_the_machine_lacks_it_is_one_line(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setattr("t2i.devices.computes_in_bf16", lambda device: False)
    with pytest.raises(InputError, match="dtype bfloat16 is not what this machine computes in"):
        Text2ImagePipeline.from_pretrained(EMOJI, **{name: torch.bfloat16})
