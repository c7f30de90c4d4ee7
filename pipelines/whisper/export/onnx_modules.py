"""Whisper's encoder and decoder as modules that torch.onnx exports with variable lengths. Imports torch.

Differences from transformers' modules: queries, keys and values come from one matrix product, the scale of attention is
part of the query weights, keys are stored transposed, and the encoder also returns the decoder's cross-attention keys
and values. `onnx_graph.py` describes inputs and outputs.

Attribute names of the modules become names inside the exported files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

if TYPE_CHECKING:
    from transformers import WhisperForConditionalGeneration


_MIN_SCALE = 1e-6
"""Keeps the division by a position's largest value defined at silence."""
_INT8_MAX = 127


def scaled_queries(layer: nn.Linear, head_width: int) -> nn.Linear:
    """Return a copy of a query projection with the scale of attention, 1 / sqrt(head_width), in its weights."""
    scaled = nn.Linear(layer.in_features, layer.out_features)
    scaled.weight, scaled.bias = (
        nn.Parameter(layer.weight * head_width**-0.5),
        nn.Parameter(layer.bias * head_width**-0.5),
    )
    return scaled.requires_grad_(False)


def concatenated(*layers: nn.Linear) -> nn.Linear:
    """Return one layer that computes several layers of the same input, their outputs side by side."""
    layer = nn.Linear(layers[0].in_features, sum(part.out_features for part in layers))
    biases = [torch.zeros(part.out_features) if part.bias is None else part.bias for part in layers]
    layer.weight, layer.bias = (
        nn.Parameter(torch.cat([part.weight for part in layers])),
        nn.Parameter(torch.cat(biases)),
    )
    return layer.requires_grad_(False)


def linear_by_position(layer: nn.Linear, states: Tensor) -> Tensor:
    """Apply a layer to `states` [B, n, d], each position divided by its largest value first and multiplied back after.

    Dynamic quantisation has one range for the whole tensor. Without this, positions whose values are a hundred times
    smaller than others' would have a bit or two left (nine tenths of the error in whisper-tiny's feed-forward layers),
    and a window's transcript would depend on the other windows in its batch.
    """
    largest = states.abs().amax(dim=-1, keepdim=True).clamp(min=_MIN_SCALE)
    return F.linear(states / largest, layer.weight) * largest + layer.bias


def attention_weights(queries: Tensor, keys: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(queries @ keys + mask): [B, heads, n, m] from [B, heads, n, width] and [B, heads, width, m]."""
    scores = queries @ keys
    return F.softmax(scores if mask is None else scores + mask, dim=-1)


@dataclass(frozen=True)
class Layout:
    """Sizes of the attention layers, and whether products with weights will be quantised to int8."""

    d_model: int
    n_heads: int
    int8: bool

    @property
    def head_width(self) -> int:
        return self.d_model // self.n_heads

    def linear(self, layer: nn.Linear, states: Tensor) -> Tensor:
        return linear_by_position(layer, states) if self.int8 else layer(states)

    def self_attention(self, layer: nn.Module) -> nn.Linear:
        """Return one projection to queries, keys and values of a layer's self-attention."""
        attention = layer.self_attn
        return concatenated(scaled_queries(attention.q_proj, self.head_width), attention.k_proj, attention.v_proj)

    # `batch` is passed on: flatten and unflatten would read every shape again, in every call of the decoder
    def split_heads(self, states: Tensor, batch: Any) -> Tensor:
        """Return [B, heads, n, width] from [B, n, d_model]."""
        return states.reshape(batch, -1, self.n_heads, self.head_width).transpose(1, 2)

    def split_keys(self, states: Tensor, batch: Any) -> Tensor:
        """Return [B, heads, width, n] from [B, n, d_model]."""
        return self.split_heads(states, batch).transpose(2, 3)

    def attend(self, weights: Tensor, values: Tensor, batch: Any) -> Tensor:
        """Return the weighted values of all heads, [B, n, d_model]."""
        return (weights @ values).transpose(1, 2).reshape(batch, -1, self.d_model)


def layout_of(model: WhisperForConditionalGeneration, int8: bool) -> Layout:
    return Layout(model.config.d_model, model.config.decoder_attention_heads, int8)


class Encoder(nn.Module):
    """Log-mel features to cross-attention keys and values of every decoder layer."""

    def __init__(self, model: WhisperForConditionalGeneration, int8: bool):
        super().__init__()
        self.layout, self.encoder = layout_of(model, int8), model.model.encoder
        self.products = nn.ModuleList(self.layout.self_attention(layer) for layer in self.encoder.layers)
        self.cross = nn.ModuleList(
            concatenated(layer.encoder_attn.k_proj, layer.encoder_attn.v_proj) for layer in model.model.decoder.layers
        )

    def forward(self, features: Tensor) -> tuple[Tensor, ...]:
        encoder, batch = self.encoder, features.shape[0]
        states = F.gelu(encoder.conv2(F.gelu(encoder.conv1(features)))).permute(0, 2, 1)
        states = states + encoder.embed_positions.weight[: states.shape[1]]
        for layer, product in zip(encoder.layers, self.products):
            states = self._layer(layer, product, states, batch)
        return self.keys_and_values(encoder.layer_norm(states))

    def keys_and_values(self, states: Tensor) -> tuple[Tensor, ...]:
        """Return keys and values of every decoder layer for the encoder's output `states` [B, T / 2, d_model]."""
        batch = states.shape[0]
        return tuple(state for layer in self.cross for state in self._keys_values(layer, states, batch))

    def _layer(self, layer: nn.Module, product: nn.Linear, states: Tensor, batch: Any) -> Tensor:
        layout = self.layout
        projected = layout.linear(product, layer.self_attn_layer_norm(states))
        queries, keys, values = projected.split(layout.d_model, dim=-1)
        weights = attention_weights(layout.split_heads(queries, batch), layout.split_keys(keys, batch))
        attended = layout.attend(weights, layout.split_heads(values, batch), batch)
        states = states + layout.linear(layer.self_attn.out_proj, attended)
        hidden = layer.activation_fn(layout.linear(layer.fc1, layer.final_layer_norm(states)))
        return states + layout.linear(layer.fc2, hidden)

    def _keys_values(self, layer: nn.Linear, states: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        keys, values = self.layout.linear(layer, states).split(self.layout.d_model, dim=-1)
        return self.layout.split_keys(keys, batch), self.layout.split_heads(values, batch)


class Decoder(nn.Module):
    """Tokens and keys and values of earlier tokens to the logits of the next token.

    Only the second feed-forward layer scales by position: elsewhere, with one position per text and call, it would cost
    more time than the accuracy is worth.
    """

    def __init__(self, model: WhisperForConditionalGeneration, int8: bool):
        super().__init__()
        self.layout, self.decoder = layout_of(model, int8), model.model.decoder
        layers = self.decoder.layers
        self.products = nn.ModuleList(self.layout.self_attention(layer) for layer in layers)
        self.queries = nn.ModuleList(
            scaled_queries(layer.encoder_attn.q_proj, self.layout.head_width) for layer in layers
        )
        self.alignment_heads = [
            (layer, head)
            for layer, head in getattr(model.generation_config, "alignment_heads", None) or []
            if layer < len(layers) and head < self.layout.n_heads
        ]
        if int8:
            self._quantise_embedding()

    def _quantise_embedding(self) -> None:
        """Store the embedding in int8 with a scale per token; the output layer keeps a float32 copy to be quantised."""
        embedding = self.decoder.embed_tokens.weight
        scale = embedding.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / _INT8_MAX
        self.scale = nn.Parameter(scale, False)
        self.table = nn.Parameter((embedding / scale).round().to(torch.int8), False)
        self.words = nn.Parameter(embedding.T.contiguous(), False)

    def forward(self, tokens: Tensor, window_rows: Tensor, slots: Tensor, *states: Tensor) -> tuple[Tensor, ...]:
        """`states`: past keys and values of every layer, then the encoder's (see onnx_graph.py)."""
        decoder, present, cross_attention, layout = self.decoder, [], {}, (window_rows, slots)
        n_states, batch = 2 * len(decoder.layers), tokens.shape[0]
        past, cross = states[:n_states], states[n_states:]
        positions = torch.arange(past[1].shape[2] + tokens.shape[1])
        new_positions = positions[past[1].shape[2] :]
        mask = (positions[None, :] > new_positions[:, None]).to(torch.float32) * torch.finfo(torch.float32).min
        hidden = self._embed(tokens) + decoder.embed_positions.weight[new_positions]
        for n in range(len(decoder.layers)):
            hidden, keys_values = self._attend_to_text(n, hidden, past[2 * n : 2 * n + 2], mask, batch)
            hidden, weights = self._attend_to_audio(n, hidden, cross[2 * n : 2 * n + 2], layout)
            hidden = self._feed_forward(n, hidden)
            present += keys_values
            cross_attention |= weights
        outputs = (self._logits(decoder.layer_norm(hidden[:, -1])), *present)
        if not cross_attention:
            return outputs
        return (*outputs, torch.stack([cross_attention[key] for key in self.alignment_heads]))

    def _embed(self, tokens: Tensor) -> Tensor:
        if self.layout.int8:
            return self.table[tokens].to(torch.float32) * self.scale[tokens]
        return self.decoder.embed_tokens(tokens)

    def _logits(self, last: Tensor) -> Tensor:
        if self.layout.int8:
            return last @ self.words
        # in this order the embedding is used as it is stored: transposed it would be written to the file a second time
        return (self.decoder.embed_tokens.weight @ last.T).T

    def _attend_to_text(
        self, n: int, hidden: Tensor, past: tuple[Tensor, ...], mask: Tensor, batch: Any
    ) -> tuple[Tensor, list[Tensor]]:
        layer, layout = self.decoder.layers[n], self.layout
        projected = self.products[n](layer.self_attn_layer_norm(hidden))
        queries, keys, values = projected.split(layout.d_model, dim=-1)
        keys = torch.cat([past[0], layout.split_keys(keys, batch)], dim=3)
        values = torch.cat([past[1], layout.split_heads(values, batch)], dim=2)
        weights = attention_weights(layout.split_heads(queries, batch), keys, mask)
        return hidden + layer.self_attn.out_proj(layout.attend(weights, values, batch)), [keys, values]

    def _attend_to_audio(
        self, n: int, hidden: Tensor, cross: tuple[Tensor, ...], rows: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, dict[tuple[int, int], Tensor]]:
        """Return the hidden states and the attention weights [B, m n, T / 2] of the layer's alignment heads."""
        layer, layout, (window_rows, slots) = self.decoder.layers[n], self.layout, rows
        queries = self.queries[n](layer.encoder_attn_layer_norm(hidden))[window_rows]
        # the texts of a window are so many further positions of one text: they share its keys and values
        weights = attention_weights(layout.split_heads(queries, cross[0].shape[0]), cross[0])
        aligned = {(n, head): weights[:, head] for number, head in self.alignment_heads if number == n}
        attended = layout.attend(weights, cross[1], cross[0].shape[0])
        attended = attended.reshape(-1, hidden.shape[1], layout.d_model)[slots]
        return hidden + layer.encoder_attn.out_proj(attended), aligned

    def _feed_forward(self, n: int, hidden: Tensor) -> Tensor:
        layer = self.decoder.layers[n]
        wide = layer.activation_fn(layer.fc1(layer.final_layer_norm(hidden)))
        return hidden + self.layout.linear(layer.fc2, wide)
