"""Which machines compute in bf16."""

import platform
from pathlib import Path

import pytest
import torch

from t2i.errors import InputError
from t2i.runtime import devices

X86, ARM = "x86_64", "aarch64"


@pytest.fixture(autouse=True)
def any_machine_takes_bf16() -> None:
    """Here it is asked."""


@pytest.mark.parametrize(("avx512", "amx"), [(True, False), (False, True), (False, False)])
def test_a_processor_of_intels_kind_has_it_by_either_instruction(monkeypatch, avx512: bool, amx: bool) -> None:
    monkeypatch.setattr(platform, "machine", lambda: X86)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert devices.can_compute_bf16("cpu") == (avx512 or amx)
    assert devices.choose_training_precision("cpu") == ("bf16" if avx512 or amx else "no")


@pytest.mark.parametrize(("features", "has"), [("fp asimd svebf16 i8mm bf16 dgh", True), ("fp asimd svebf16", False)])
def test_linux_on_arm_says_so_among_the_processors_features(monkeypatch, tmp_path, features: str, has: bool) -> None:
    said = tmp_path / "cpuinfo"
    said.write_text(f"processor\t: 0\nBogoMIPS\t: 50.00\nFeatures\t: {features}\nCPU part\t: 0xd40\n")
    monkeypatch.setattr(platform, "machine", lambda: ARM)
    monkeypatch.setattr(devices, "Path", lambda name: said if name == "/proc/cpuinfo" else Path(name))
    assert devices.can_compute_bf16("cpu") == has


@pytest.mark.parametrize("has", [True, False])
def test_other_systems_on_arm_are_asked_by_torch(monkeypatch, tmp_path, has: bool) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "arm64")
    monkeypatch.setattr(devices, "Path", lambda name: tmp_path / "none")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": has}, raising=False)
    assert devices.can_compute_bf16("cpu") == has


@pytest.mark.parametrize("new", [True, False])
def test_metal_has_it_from_macos_14_on(monkeypatch, new: bool) -> None:
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: new and (major, minor) == (14, 0))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(devices, "has_bf16_instructions", lambda: False)
    assert devices.resolve_device_name("auto") == "mps"
    if new:
        devices.check_bf16_support("mps")
        devices.check_bf16_support()
        return
    for device in ("mps", None):
        with pytest.raises(InputError, match="dtype bfloat16 needs .*, which (device 'mps'|this machine) lacks"):
            devices.check_bf16_support(device)


@pytest.mark.parametrize("index", ["2", "²", "١", "01", "9" * 5000, "-1", ""])
def test_a_number_that_no_gpu_has_is_said_in_a_line(monkeypatch, index: str) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert devices.resolve_device_name("cuda:1") == "cuda:1"
    with pytest.raises(InputError, match="device 'cuda:.* is not available here; `t2i doctor` lists the devices"):
        devices.resolve_device_name(f"cuda:{index}")
