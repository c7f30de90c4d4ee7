"""A Whisper as two ONNX graphs, written out layer by layer so that every length in them may vary.

    encoder.onnx   features float32 [B, n_mels, T]
                   ->  key_l float32 [B, heads, width, T / 2], value_l float32 [B, heads, T / 2, width]
    decoder.onnx   tokens int64 [B, n], past_key_l [B, heads, width, p], past_value_l [B, heads, p, width],
                   key_l, value_l
                   ->  logits float32 [B, vocabulary] of the last token, present_key_l, present_value_l: past and the
                       n tokens, attention float32 [A, B, n, T / 2]

for each of the decoder's layers l = 0, 1, ... Keys and values over the recording are computed once, those over the text
grow by what each call adds; with p = 0 the decoder takes a whole prompt. Keys lie as the products take them, so that
nothing is turned round at every token. `attention` is where the A heads look that follow the sound
(generation_config.alignment_heads); it is absent where the model names none.

In eight bits every product with weights is one of integers: weights by output channel, what comes in by its own range
(ONNX Runtime's dynamic quantisation), evened out place by place in the encoder and where the decoder's values differ
most (`by_rows`). Convolutions, attention and norms stay in float32.
"""

from __future__ import annotations

import contextlib
import io
import logging
import platform
import tempfile
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.infra.errors import LabError

if TYPE_CHECKING:
    from torch import nn
    from transformers import WhisperForConditionalGeneration


FORMAT = "4"
"""Version of the graphs: raised whenever the same weights would give others."""
OPSET = 17
ENCODER, DECODER = "encoder.onnx", "decoder.onnx"
STATES = ("key", "value")


def write(
    model: WhisperForConditionalGeneration, folder: Path, *, int8: bool = False, seven_bits: bool = False
) -> None:
    """Write both graphs into `folder`, in float32 or with products of `int8`; see `wants_seven_bits`.

    Raises LabError where torch cannot export them.
    """
    import torch

    config = model.eval().requires_grad_(False).config
    encoder, decoder = _halves(model, int8)
    layers, heads = range(config.decoder_layers), config.decoder_attention_heads
    width = config.d_model // heads
    features = torch.zeros(2, config.num_mel_bins, 24)
    written = [torch.zeros(2, heads, *shape) for _ in layers for shape in ((width, 3), (3, width))]
    heard = [torch.zeros(2, heads, *shape) for _ in layers for shape in ((width, 12), (12, width))]
    tokens = torch.zeros(2, 2, dtype=torch.int64)
    cross, past, present = (_axes(layers, prefix) for prefix in ("", "past_", "present_"))
    cross_attention = {"attention": {1: "batch", 2: "new", 3: "heard"}} if decoder.alignment_heads else {}
    told = {"tokens": {0: "batch", 1: "new"}, **past, **cross}
    with tempfile.TemporaryDirectory(prefix=".float32-", dir=folder.parent) as aside:
        place = Path(aside) if int8 else folder
        _export(encoder, (features,), place / ENCODER, {"features": {0: "batch", 2: "frames"}}, cross)
        telling = {"logits": {0: "batch"}, **present, **cross_attention}
        _export(decoder, (tokens, *written, *heard), place / DECODER, told, telling)
        for name in (ENCODER, DECODER) if int8 else ():
            _quantise(place / name, folder / name, seven_bits)


def wants_seven_bits() -> bool:
    """Whether this machine needs weights of seven bits for products in eight.

    x86 processors without VNNI add two products of bytes in sixteen bits, which eight-bit weights overflow: wrong sums,
    and no error (onnxruntime.ai, "Quantize ONNX models", reduce_range).
    """
    if platform.machine().lower() not in ("x86_64", "amd64", "i386", "i686"):
        return False
    try:
        return "vnni" not in Path("/proc/cpuinfo").read_text("utf-8")
    except OSError:
        return True


def state_names(layers: int, prefix: str = "") -> list[str]:
    """The names of keys and values in the order in which the graphs have them."""
    return [f"{prefix}{state}_{layer}" for layer in range(layers) for state in STATES]


def _axes(layers: range, prefix: str) -> dict[str, dict[int, str]]:
    """The axes that vary of each layer's keys and values."""
    length = {"": "heard", "past_": "written", "present_": "known"}[prefix]
    varies = {"key": {0: "batch", 3: length}, "value": {0: "batch", 2: length}}
    return {f"{prefix}{state}_{layer}": varies[state] for layer in layers for state in STATES}


def _export(module: Any, example: tuple, path: Path, inputs: dict[str, dict], outputs: dict[str, dict]) -> None:
    import torch

    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")  # the exporter that needs no further package calls itself the older one
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
    except Exception as error:  # whatever the exporter of this torch stumbles over
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise LabError(
            f"torch {torch.__version__} does not export this model to ONNX: {reason}. Take ctranslate2"
        ) from error


def _quantise(plain: Path, path: Path, seven_bits: bool) -> None:
    """The graph `plain` with products with weights in eight bits, as `path`."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    logging.getLogger().addFilter(_is_no_recommendation)
    try:
        quantize_dynamic(
            plain,
            path,
            op_types_to_quantize=["MatMul"],
            per_channel=True,
            reduce_range=seven_bits,
            weight_type=QuantType.QInt8,
            extra_options={"MatMulConstBOnly": True},  # attention multiplies no weights
        )
    finally:
        logging.getLogger().removeFilter(_is_no_recommendation)


def _is_no_recommendation(record: logging.LogRecord) -> bool:
    """False for the step that ONNX Runtime recommends for graphs that other exporters wrote."""
    return not record.getMessage().startswith("Please consider to run pre-processing")


def _halves(model: WhisperForConditionalGeneration, int8: bool) -> tuple[nn.Module, Any]:
    import torch
    from torch import nn
    from torch.nn import functional as F

    own_encoder, own_decoder = model.model.encoder, model.model.decoder
    d_model, head_count = model.config.d_model, model.config.decoder_attention_heads
    width = d_model // head_count

    # reshaped by a size that is read once: flatten and unflatten ask for every shape anew, at every token
    def split(states: torch.Tensor, batch: Any) -> torch.Tensor:
        return states.reshape(batch, -1, head_count, width).transpose(1, 2)

    def scaled(part: nn.Linear) -> nn.Linear:
        """Queries with the scale of attention in their weights."""
        made = nn.Linear(part.in_features, part.out_features)
        made.weight, made.bias = nn.Parameter(part.weight * width**-0.5), nn.Parameter(part.bias * width**-0.5)
        return made.requires_grad_(False)

    def joined(*parts: nn.Linear) -> nn.Linear:
        """Several layers that see the same states, as one product."""
        made = nn.Linear(parts[0].in_features, sum(part.out_features for part in parts))
        bias = [torch.zeros(part.out_features) if part.bias is None else part.bias for part in parts]
        made.weight, made.bias = nn.Parameter(torch.cat([part.weight for part in parts])), nn.Parameter(torch.cat(bias))
        return made.requires_grad_(False)

    def by_rows(layer: nn.Linear, states: torch.Tensor) -> torch.Tensor:
        """The product of a layer, each place of `states` evened out first.

        One range for all would leave most places a bit or two where some are a hundred times larger (in whisper-tiny's
        feed-forward layers that made nine tenths of the error), and what is heard would hang on the batch's neighbours.
        The decoder, which sees one place of each text at a time, has it where the values differ most: elsewhere it
        costs more time than it is worth.
        """
        if not int8:
            return layer(states)
        largest = states.abs().amax(dim=-1, keepdim=True).clamp(min=1e-6)
        return F.linear(states / largest, layer.weight) * largest + layer.bias

    def keys_values(layer: nn.Linear, states: torch.Tensor, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = by_rows(layer, states).split(d_model, dim=-1)
        return split(keys, batch).transpose(2, 3), split(values, batch)

    def looking(queries: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        scores = queries @ keys
        return F.softmax(scores if mask is None else scores + mask, dim=-1)

    def attended(weights: torch.Tensor, values: torch.Tensor, batch: Any) -> torch.Tensor:
        return (weights @ values).transpose(1, 2).reshape(batch, -1, d_model)

    def self_product(layer: nn.Module) -> nn.Linear:
        return joined(scaled(layer.self_attn.q_proj), layer.self_attn.k_proj, layer.self_attn.v_proj)

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = own_encoder
            self.products = nn.ModuleList(self_product(layer) for layer in own_encoder.layers)
            self.cross = nn.ModuleList(
                joined(layer.encoder_attn.k_proj, layer.encoder_attn.v_proj) for layer in own_decoder.layers
            )

        def forward(self, features: torch.Tensor) -> tuple[torch.Tensor, ...]:
            encoder, batch = self.encoder, features.shape[0]
            states = F.gelu(encoder.conv2(F.gelu(encoder.conv1(features)))).permute(0, 2, 1)
            states = states + encoder.embed_positions.weight[: states.shape[1]]
            for layer, own in zip(encoder.layers, self.products):
                queries, keys, values = by_rows(own, layer.self_attn_layer_norm(states)).split(d_model, dim=-1)
                weights = looking(split(queries, batch), split(keys, batch).transpose(2, 3))
                states = states + by_rows(layer.self_attn.out_proj, attended(weights, split(values, batch), batch))
                wide = layer.activation_fn(by_rows(layer.fc1, layer.final_layer_norm(states)))
                states = states + by_rows(layer.fc2, wide)
            states = encoder.layer_norm(states)
            return tuple(state for layer in self.cross for state in keys_values(layer, states, batch))

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = own_decoder
            self.products = nn.ModuleList(self_product(layer) for layer in own_decoder.layers)
            self.queries = nn.ModuleList(scaled(layer.encoder_attn.q_proj) for layer in own_decoder.layers)
            self.alignment_heads = [
                (layer, head)
                for layer, head in getattr(model.generation_config, "alignment_heads", None) or []
                if layer < len(own_decoder.layers) and head < head_count
            ]
            table = own_decoder.embed_tokens.weight
            if int8:  # each token's row by its own range; the table by which the words are found is the product's
                self.scale = nn.Parameter(table.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / 127, False)
                self.table = nn.Parameter((table / self.scale).round().to(torch.int8), False)
                self.words = nn.Parameter(table.T.contiguous(), False)

        def embedded(self, tokens: torch.Tensor) -> torch.Tensor:
            if int8:
                return self.table[tokens].to(torch.float32) * self.scale[tokens]
            return self.decoder.embed_tokens(tokens)

        def logits(self, last: torch.Tensor) -> torch.Tensor:
            if int8:
                return last @ self.words
            # from this side the table of embeddings is used as it is: transposed it would be written a second time
            return (self.decoder.embed_tokens.weight @ last.T).T

        def forward(self, tokens: torch.Tensor, *states: torch.Tensor) -> tuple[torch.Tensor, ...]:
            decoder, present, cross_attention = self.decoder, [], {}
            count, batch = 2 * len(decoder.layers), tokens.shape[0]
            past, cross = states[:count], states[count:]
            places = torch.arange(past[1].shape[2] + tokens.shape[1])
            here = places[past[1].shape[2] :]
            mask = (places[None, :] > here[:, None]).to(torch.float32) * torch.finfo(torch.float32).min
            states_ = self.embedded(tokens) + decoder.embed_positions.weight[here]
            for n, (layer, own) in enumerate(zip(decoder.layers, self.products)):
                queries, *more = own(layer.self_attn_layer_norm(states_)).split(d_model, dim=-1)
                keys = torch.cat([past[2 * n], split(more[0], batch).transpose(2, 3)], dim=3)
                values = torch.cat([past[2 * n + 1], split(more[1], batch)], dim=2)
                weights = looking(split(queries, batch), keys, mask)
                states_ = states_ + layer.self_attn.out_proj(attended(weights, values, batch))
                queries = self.queries[n](layer.encoder_attn_layer_norm(states_))
                weights = looking(split(queries, batch), cross[2 * n])
                cross_attention |= {(n, head): weights[:, head] for at, head in self.alignment_heads if at == n}
                states_ = states_ + layer.encoder_attn.out_proj(attended(weights, cross[2 * n + 1], batch))
                wide = layer.activation_fn(layer.fc1(layer.final_layer_norm(states_)))
                states_ = states_ + by_rows(layer.fc2, wide)
                present += [keys, values]
            told = (self.logits(decoder.layer_norm(states_[:, -1])), *present)
            return (
                (*told, torch.stack([cross_attention[key] for key in self.alignment_heads]))
                if cross_attention
                else told
            )

    return Encoder(), Decoder()
