"""Export a Whisper model as two ONNX graphs with variable lengths.

    encoder.onnx   features float32 [B, n_mels, T]
                   ->  key_l float32 [B, heads, width, T / 2], value_l float32 [B, heads, T / 2, width]
    decoder.onnx   tokens int64 [R, n], window_rows int64 [B, m], slots int64 [R],
                   past_key_l [R, heads, width, p], past_value_l [R, heads, p, width], key_l, value_l [B, ...]
                   ->  logits float32 [R, vocabulary] of the last token, present_key_l, present_value_l: past and the
                       n tokens, attention float32 [A, B, m n, T / 2]

for each of the decoder's layers l = 0, 1, ... The R rows are texts, up to m for each of the B windows: `window_rows`
are those of each window, any row in place of missing ones, and `slots` the position of each row in them, flattened.
Cross-attention keys and values (key_l, value_l) are computed once per window, those of the text grow with each call.
With p = 0 the decoder takes a whole prompt. Keys are stored transposed, as the matrix products take them. `attention`
is the cross-attention of the A alignment heads (generation_config.alignment_heads) and is absent if the model names
none.

In int8, every product with weights is an integer product (ONNX Runtime's dynamic quantisation): weights have a scale
per output channel, inputs a scale per call, after a scaling by position where it matters
(onnx_modules.linear_by_position). Convolutions, attention and norms stay in float32.
"""

from __future__ import annotations

import contextlib
import io
import platform
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.infra.errors import LabError
from pipelines.whisper.export import onnx_int8

if TYPE_CHECKING:
    from torch import nn
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    from pipelines.whisper.export.onnx_modules import Decoder


FORMAT = "5"
"""Version of the graphs: raised when they change, so that exports are made again. The engine reads format 4 too."""
OPSET = 17
ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
STATES = ("key", "value")
_TIME_AXES = {"key": 3, "value": 2}
_AXIS_NAMES = {"": "heard", "past_": "written", "present_": "known"}
"""Prefix of a state to the name of its time axis. Names of axes are part of the exported files."""


def write(
    model: WhisperForConditionalGeneration, folder: Path, *, int8: bool = False, seven_bits: bool = False
) -> None:
    """Write both graphs to `folder`, in float32 or with `int8` products; `seven_bits` as `needs_seven_bits` returns.

    Raises LabError if torch cannot export the model.
    """
    from pipelines.whisper.export import onnx_modules

    model.eval().requires_grad_(False)
    encoder, decoder = onnx_modules.Encoder(model, int8), onnx_modules.Decoder(model, int8)
    with tempfile.TemporaryDirectory(prefix=".float32-", dir=folder.parent) as temporary:
        target = Path(temporary) if int8 else folder
        _export_encoder(encoder, model.config, target / ENCODER)
        _export_decoder(decoder, model.config, target / DECODER)
        for name in (ENCODER, DECODER) if int8 else ():
            onnx_int8.quantise(target / name, folder / name, seven_bits=seven_bits)


def needs_seven_bits() -> bool:
    """Return True if int8 products on this machine need weights of seven bits.

    x86 processors without VNNI add two 8-bit products in 16 bits. Weights of eight bits overflow there, which gives
    wrong sums and no error (onnxruntime.ai, "Quantize ONNX models", reduce_range).
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return True


def state_names(layers: int, prefix: str = "") -> list[str]:
    """Return the names of keys and values in the graphs' order: key_0, value_0, key_1, ..."""
    return [f"{prefix}{state}_{layer}" for layer in range(layers) for state in STATES]


def _export_encoder(encoder: nn.Module, config: WhisperConfig, path: Path) -> None:
    import torch

    features = torch.zeros(2, config.num_mel_bins, 24)
    inputs = {"features": {0: "windows", 2: "frames"}}
    _export(encoder, (features,), path, inputs, _state_axes(config.decoder_layers, ""))


def _export_decoder(decoder: Decoder, config: WhisperConfig, path: Path) -> None:
    import torch

    layers, heads = config.decoder_layers, config.decoder_attention_heads
    width = config.d_model // heads
    past = [torch.zeros(2, heads, *shape) for _ in range(layers) for shape in ((width, 3), (3, width))]
    cross = [torch.zeros(2, heads, *shape) for _ in range(layers) for shape in ((width, 12), (12, width))]
    tokens = torch.zeros(2, 2, dtype=torch.int64)
    window_rows, slots = torch.zeros(2, 1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    inputs = {
        "tokens": {0: "batch", 1: "new"},
        "window_rows": {0: "windows", 1: "texts"},
        "slots": {0: "batch"},
        **_state_axes(layers, "past_"),
        **_state_axes(layers, ""),
    }
    outputs = {"logits": {0: "batch"}, **_state_axes(layers, "present_")}
    if decoder.alignment_heads:
        outputs["attention"] = {1: "windows", 2: "aligned", 3: _AXIS_NAMES[""]}
    _export(decoder, (tokens, window_rows, slots, *past, *cross), path, inputs, outputs)


def _state_axes(layers: int, prefix: str) -> dict[str, dict[int, str]]:
    """Return the variable axes of each layer's keys and values, by their names in the graphs."""
    first = "batch" if prefix else "windows"
    axes = {state: {0: first, _TIME_AXES[state]: _AXIS_NAMES[prefix]} for state in STATES}
    return {name: axes[STATES[n % 2]] for n, name in enumerate(state_names(layers, prefix))}


def _export(module: Any, example: tuple, path: Path, inputs: dict[str, dict], outputs: dict[str, dict]) -> None:
    import torch

    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # torch deprecates this exporter; the newer one needs further packages
            torch.onnx.export(
                module,
                example,
                str(path),
                input_names=[*inputs],
                output_names=[*outputs],
                dynamic_axes=inputs | outputs,
                opset_version=OPSET,
                dynamo=False,
            )
    except Exception as error:  # the exporter documents no exception types
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LabError(
            f"torch {torch.__version__} does not export this model to ONNX: {reason}. Take ctranslate2"
        ) from error
