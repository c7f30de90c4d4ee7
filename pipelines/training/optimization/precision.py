"""Choose the precision of the forward and backward pass on this machine."""

from __future__ import annotations

from pipelines.infra import environment
from pipelines.infra.environment import Environment
from pipelines.infra.errors import LabError

_CPU_CAPABILITIES = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Names in torch of the instructions that multiply in bfloat16: Intel's and AMD's, and those of ARM."""


def of_training(requested: str) -> str:
    """Return `float32`, `bfloat16` or `float16` for a recipe's `training.precision`.

    `auto` is the fastest precision of a GPU, and float32 on a CPU: there, one recipe gives one model on every machine,
    up to rounding. A requested precision is part of a run's identity, so a run resumes in the precision that it began
    with. Raises LabError if bfloat16 is requested on a machine whose device lacks it.
    """
    machine = environment.detect()
    if requested == "auto":
        return machine.dtype
    if requested == "bfloat16" and not has_bfloat16(machine):
        raise LabError(
            "training.precision = 'bfloat16' needs a GPU or a CPU with bfloat16 (avx512_bf16, AMX; ARM: BF16), and "
            f"{machine.device_name} has none: set training.precision=auto, which is another run, or change machines"
        )
    return requested


def has_bfloat16(machine: Environment) -> bool:
    """Return True if the device multiplies in bfloat16 itself: elsewhere it is emulated, which is slow."""
    if machine.device != "cpu":
        return machine.dtype == "bfloat16"
    import torch

    if hasattr(torch.cpu, "get_capabilities"):
        return any(torch.cpu.get_capabilities().get(name) for name in _CPU_CAPABILITIES)
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()  # before torch 2.13
