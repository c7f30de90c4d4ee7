"""A Whisper as two ONNX graphs, written out layer by layer so that every length in them may vary.

    encoder.onnx   features float32 [B, n_mels, T]  ->  cross float32 [L, 2, B, heads, T / 2, width]
    decoder.onnx   tokens int64 [B, n], past float32 [L, 2, B, heads, p, width], cross
                   ->  logits float32 [B, vocabulary] of the last token, present: past and the n tokens

`cross` and `past` are keys and values of each of the decoder's L layers: those over the recording are computed once,
those over the text grow by what each call adds. With p = 0 the decoder takes a whole prompt.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.errors import LabError

if TYPE_CHECKING:
    import torch
    from transformers import WhisperForConditionalGeneration

FORMAT = "1"
"""Version of the graphs: raised whenever the same weights would give others."""
OPSET = 17
ENCODER, DECODER = "encoder.onnx", "decoder.onnx"


def write(model: WhisperForConditionalGeneration, folder: Path) -> None:
    """Write both graphs into `folder`. LabError where torch cannot export them."""
    import torch

    config = model.eval().requires_grad_(False).config
    encoder, decoder = _halves(model)
    features = torch.zeros(2, config.num_mel_bins, 24)
    heads, layers = config.decoder_attention_heads, config.decoder_layers
    past = torch.zeros(layers, 2, 2, heads, 3, config.d_model // heads)
    cross = torch.zeros(layers, 2, 2, heads, 12, config.d_model // heads)
    tokens = torch.zeros(2, 2, dtype=torch.int64)
    batch, states = {0: "batch"}, {2: "batch", 4: "length"}
    _export(
        encoder, (features,), folder / ENCODER, {"features": {**batch, 2: "frames"}}, {"cross": {**states, 4: "heard"}}
    )
    _export(
        decoder,
        (tokens, past, cross),
        folder / DECODER,
        {"tokens": {**batch, 1: "new"}, "past": {**states, 4: "written"}, "cross": {**states, 4: "heard"}},
        {"logits": batch, "present": states},
    )


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


def _halves(model: WhisperForConditionalGeneration) -> tuple[torch.nn.Module, torch.nn.Module]:
    import torch
    from torch import nn
    from torch.nn import functional as F

    own_encoder, own_decoder = model.model.encoder, model.model.decoder

    def heads(states: torch.Tensor, attention: nn.Module) -> torch.Tensor:
        return states.unflatten(2, (attention.num_heads, attention.head_dim)).transpose(1, 2)

    def keys_values(attention: nn.Module, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return heads(attention.k_proj(states), attention), heads(attention.v_proj(states), attention)

    def attended(
        attention: nn.Module, states: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: Any = 0.0
    ) -> torch.Tensor:
        queries = heads(attention.q_proj(states) * attention.scaling, attention)
        weights = F.softmax(queries @ keys.transpose(2, 3) + mask, dim=-1)
        return attention.out_proj((weights @ values).transpose(1, 2).flatten(2))

    def fed_forward(layer: nn.Module, states: torch.Tensor) -> torch.Tensor:
        return states + layer.fc2(layer.activation_fn(layer.fc1(layer.final_layer_norm(states))))

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder, self.layers = own_encoder, own_decoder.layers

        def forward(self, features: torch.Tensor) -> torch.Tensor:
            encoder = self.encoder
            states = F.gelu(encoder.conv2(F.gelu(encoder.conv1(features)))).permute(0, 2, 1)
            states = states + encoder.embed_positions.weight[: states.shape[1]]
            for layer in encoder.layers:
                normed = layer.self_attn_layer_norm(states)
                states = states + attended(layer.self_attn, normed, *keys_values(layer.self_attn, normed))
                states = fed_forward(layer, states)
            states = encoder.layer_norm(states)
            return torch.stack([torch.stack(keys_values(layer.encoder_attn, states)) for layer in self.layers])

    class Decoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.decoder = own_decoder

        def forward(
            self, tokens: torch.Tensor, past: torch.Tensor, cross: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            decoder, present = self.decoder, []
            written, new = past.shape[4], tokens.shape[1]
            places = torch.arange(written + new)
            later = places[None, :] > places[written:][:, None]
            mask = later.to(torch.float32) * torch.finfo(torch.float32).min
            states = decoder.embed_tokens(tokens) + decoder.embed_positions.weight[places[written:]]
            for layer, (keys, values), heard in zip(decoder.layers, past, cross):
                normed = layer.self_attn_layer_norm(states)
                more_keys, more_values = keys_values(layer.self_attn, normed)
                keys, values = torch.cat([keys, more_keys], dim=2), torch.cat([values, more_values], dim=2)
                states = states + attended(layer.self_attn, normed, keys, values, mask)
                normed = layer.encoder_attn_layer_norm(states)
                states = states + attended(layer.encoder_attn, normed, heard[0], heard[1])
                states = fed_forward(layer, states)
                present.append(torch.stack([keys, values]))
            last = decoder.layer_norm(states[:, -1])
            # from this side the table of embeddings is used as it is: transposed it would be written a second time
            return (decoder.embed_tokens.weight @ last.T).T, torch.stack(present)

    return Encoder(), Decoder()
