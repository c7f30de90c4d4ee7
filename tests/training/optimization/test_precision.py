"""Which precision training has on which machine."""

from __future__ import annotations

import pytest
import torch

from pipelines.infra import environment
from pipelines.infra.environment import Environment
from pipelines.infra.errors import LabError
from pipelines.training.optimization import precision


@pytest.fixture
def machine(monkeypatch):
    """`machine("cuda", "float16")`: the environment from now on; a CPU has the capabilities that are named."""

    def become(device: str, dtype: str, *capabilities: str) -> None:
        monkeypatch.setattr(environment, "detect", lambda: Environment("local", device, dtype, "this processor"))
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: dict.fromkeys(capabilities, True), raising=False)

    return become


@pytest.mark.parametrize(
    ("device", "dtype", "requested", "expected"),
    [
        ("cpu", "float32", "auto", "float32"),
        ("cuda", "bfloat16", "auto", "bfloat16"),
        ("cuda", "float16", "auto", "float16"),
        ("cuda", "bfloat16", "float32", "float32"),
        ("cuda", "bfloat16", "bfloat16", "bfloat16"),
        ("cpu", "float32", "bfloat16", "bfloat16"),
    ],
)
def test_precision_is_the_devices_or_the_requested_one(machine, device, dtype, requested, expected):
    machine(device, dtype, "avx512_bf16")
    assert precision.of_training(requested) == expected


@pytest.mark.parametrize(("device", "dtype"), [("cpu", "float32"), ("cuda", "float16"), ("mps", "float32")])
def test_bfloat16_without_support_is_a_one_line_error(machine, device, dtype):
    machine(device, dtype, "avx2")
    with pytest.raises(LabError, match=r"this processor has none: set training.precision=auto") as error:
        precision.of_training("bfloat16")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("flag", ["_is_avx512_bf16_supported", "_is_amx_tile_supported", None])
def test_older_torch_is_asked_for_its_own_flags(machine, monkeypatch, flag):
    machine("cpu", "float32")
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name == flag, raising=False)
    assert precision.has_bfloat16(environment.detect()) == (flag is not None)
