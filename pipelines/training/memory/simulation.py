"""Count the memory of a training step without doing it: torch's fake tensors have shapes and types but no contents.

The step runs through the same code as in training: model, loss, backward pass and optimizer. Only attention is replaced
by the call of a kernel that stores no matrix of positions by positions, as the kernels of CPUs and GPUs do. Every new
storage adds its bytes until it is released. Real tensors can be counted in the same way, and the counts are equal
(tests/training/memory/test_simulation.py).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

from pipelines.training.adapters import unwrap

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class BatchShape:
    """Sizes of a batch."""

    clips: int
    frames: int
    """Log-mel frames of every clip, padding included."""
    tokens: int
    """Label tokens of every clip, padding included."""

    def is_within(self, other: BatchShape) -> bool:
        """Return whether no size is above that of `other`."""
        return self.clips <= other.clips and self.frames <= other.frames and self.tokens <= other.tokens


class LiveBytes:
    """Counts the bytes of the tensors that exist, and their peak in each phase of a step."""

    def __init__(self):
        self.live, self.phase, self.stage = 0, "model", "training"
        self.peaks: dict[str, int] = {}
        self._seen: set[int] = set()

    def begin(self, phase: str) -> None:
        """Count the peak of `phase` of this stage from here on; the bytes that exist now are part of it."""
        self.phase = f"{self.stage} {phase}"
        self._raise_peak()

    def add(self, tensor: torch.Tensor) -> None:
        """Add a tensor's storage, unless it is counted already, until it is released."""
        storage = tensor.untyped_storage()
        if storage._cdata in self._seen:
            return
        self._seen.add(storage._cdata)
        n_bytes = storage.nbytes()
        self.live += n_bytes
        weakref.finalize(storage, self._release, storage._cdata, n_bytes)
        self._raise_peak()

    def _release(self, key: int, n_bytes: int) -> None:
        self._seen.discard(key)
        self.live -= n_bytes

    def _raise_peak(self) -> None:
        self.peaks[self.phase] = max(self.peaks.get(self.phase, 0), self.live)


@contextlib.contextmanager
def counted(live: LiveBytes) -> Iterator[None]:
    """Count the tensors that operations create within the context."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    class Counter(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            import torch

            out = func(*args, **(kwargs or {}))
            for value in tree_iter(out):
                if isinstance(value, torch.Tensor):
                    live.add(value)
            return out

    with Counter():
        yield


@contextlib.contextmanager
def simulated() -> Iterator[None]:
    """Let operations create fake tensors, with attention that stores what the kernels of real devices store.

    It replaces functions of torch, for fake tensors alone: other threads may compute at the same time.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    def attention(query: Any, key: Any, value: Any, **kwargs: Any) -> torch.Tensor:
        options = {name: kwargs[name] for name in ("is_causal", "attn_mask", "scale") if name in kwargs}
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, **options)[0]

    def swap(old: torch.Tensor, new: torch.Tensor) -> None:
        """Keep the old tensor: peft converts weights to the type and device that they have."""
        if (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
            raise TypeError(f"a conversion from {old.dtype} to {new.dtype} cannot be simulated")

    def item(tensor: torch.Tensor) -> int:
        """Return some number: Adafactor reads values, and no size depends on them."""
        return 1

    with contextlib.ExitStack() as patches:
        for owner, name, replacement in (
            (torch.nn.functional, "scaled_dot_product_attention", attention),
            (torch.utils, "swap_tensors", swap),
            (torch.Tensor, "item", item),
        ):
            of_fakes = _for_type(FakeTensor, replacement, getattr(owner, name))
            patches.enter_context(mock.patch.object(owner, name, of_fakes))
        yield patches.enter_context(FakeTensorMode())


def _for_type(type_: type, replacement: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls `replacement` if its first argument has the type, and `original` otherwise."""

    def chosen(first: Any, *args: Any, **kwargs: Any) -> Any:
        return (replacement if isinstance(first, type_) else original)(first, *args, **kwargs)

    return chosen


def mark_layers(model: Any, live: LiveBytes) -> None:
    """Begin a phase in the forward and in the backward pass of each layer: `decoder 0 backward`."""
    whisper = unwrap(model).model
    for half in ("encoder", "decoder"):
        layers = getattr(whisper, half).layers
        for number, layer in enumerate(layers):
            name = f"{half} {'last' if number == len(layers) - 1 else number}"
            layer.register_forward_pre_hook(lambda *_, name=name: live.begin(f"{name} forward"))
            layer.register_forward_hook(_mark_backward(live, f"{name} backward"))


def _mark_backward(live: LiveBytes, phase: str) -> Callable[..., None]:
    """Return a forward hook: when the gradient of the layer's output is known, its backward pass begins."""
    import torch

    def hook(layer: Any, inputs: Any, output: Any) -> None:
        states = output if isinstance(output, torch.Tensor) else output[0]
        if states.requires_grad:
            states.register_hook(lambda gradient: live.begin(phase))

    return hook


def use_8bit_linears(model: torch.nn.Module) -> None:
    """Replace linear layers by layers with weights in 8 bits, which store what those of bitsandbytes store."""
    import torch
    import torch.nn.functional as F

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(weight)
            return F.linear(inputs, weight.to(inputs.dtype))

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
            return gradient @ ctx.saved_tensors[0].to(gradient.dtype), None

    class Linear8bit(torch.nn.Linear):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            if torch.is_autocast_enabled("cpu"):
                inputs = inputs.to(torch.get_autocast_dtype("cpu"))
            outputs = Product.apply(inputs, self.weight)
            return outputs if self.bias is None else outputs + self.bias.to(outputs.dtype)

    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.__class__ = Linear8bit
            module.weight = torch.nn.Parameter(module.weight.data.to(torch.int8), requires_grad=False)


def zero_batch(shape: BatchShape, n_mels: int) -> dict[str, torch.Tensor]:
    """Return a silent batch: `input_features` float32 [B, n_mels, T], `attention_mask` int64 [B, T], `labels` int64
    [B, L]."""
    import torch

    return {
        "input_features": torch.zeros(shape.clips, n_mels, shape.frames),
        "attention_mask": torch.ones(shape.clips, shape.frames, dtype=torch.int64),
        "labels": torch.zeros(shape.clips, shape.tokens, dtype=torch.int64),
    }


def train_step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], torch.Tensor],
    live: LiveBytes,
    *,
    accumulates: bool,
) -> None:
    """Do an optimizer step, then the forward and backward pass of `loss`.

    The optimizer's step comes first, because its state exists in all steps but the first. If a step `accumulates` over
    several passes, the gradients exist before the pass, too.
    """
    import torch

    live.begin("optimizer")
    for weight in model.parameters():
        if weight.requires_grad:
            weight.grad = torch.zeros_like(weight)
    optimizer.step()
    if not accumulates:
        optimizer.zero_grad(set_to_none=True)
    live.begin("forward")
    total = loss()
    live.begin("loss")
    total.backward()


def decode(model: Any, features: torch.Tensor, tokens: int, loss_tokens: int, live: LiveBytes) -> None:
    """Encode `features`, decode texts of `tokens` with their keys and values kept, then compute the loss, as validation
    does.
    """
    import torch

    batch = len(features)
    whisper = unwrap(model).eval()
    with torch.no_grad():
        live.begin("decoding")
        encoded = whisper.model.encoder(features)[0]
        ids = torch.zeros(batch, tokens, dtype=torch.int64)
        states = whisper.model.decoder(input_ids=ids, encoder_hidden_states=encoded, use_cache=True)
        whisper.proj_out(states.last_hidden_state[:, -1]).float()
        del states
        labels = torch.zeros(batch, loss_tokens, dtype=torch.int64)
        logits = whisper(encoder_outputs=(encoded,), decoder_input_ids=labels, use_cache=True).logits
        torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten())
