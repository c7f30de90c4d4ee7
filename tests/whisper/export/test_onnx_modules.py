from __future__ import annotations

import pytest
import torch
from torch import nn

from pipelines.whisper.export.onnx_modules import (
    Layout,
    attention_weights,
    concatenated,
    linear_by_position,
    scaled_queries,
)


@pytest.fixture
def states() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 5, 8)


def test_concatenated_layer_equals_its_parts(states):
    parts = [nn.Linear(8, 4), nn.Linear(8, 6, bias=False)]
    expected = torch.cat([part(states) for part in parts], dim=-1)
    torch.testing.assert_close(concatenated(*parts)(states), expected)


def test_scaled_queries_hold_the_attention_scale(states):
    layer = nn.Linear(8, 8)
    torch.testing.assert_close(scaled_queries(layer, 4)(states), layer(states) / 2)


def test_scaling_by_position_does_not_change_the_product(states):
    layer = nn.Linear(8, 3)
    states[0, 0] *= 1e3
    states[1, 2] = 0
    torch.testing.assert_close(linear_by_position(layer, states), layer(states))


def test_masked_positions_get_no_attention():
    queries, keys = torch.randn(1, 2, 3, 4), torch.randn(1, 2, 4, 3)
    mask = torch.full((3, 3), torch.finfo(torch.float32).min).triu(1)
    weights = attention_weights(queries, keys, mask)
    assert torch.equal(weights.triu(1), torch.zeros_like(weights))
    torch.testing.assert_close(weights.sum(-1), torch.ones(1, 2, 3))


def test_split_heads_and_attend_are_inverse(states):
    layout = Layout(d_model=8, n_heads=2, int8=False)
    heads = layout.split_heads(states, 2)
    assert heads.shape == (2, 2, 5, 4)
    assert layout.split_keys(states, 2).shape == (2, 2, 4, 5)
    assert torch.equal(layout.attend(torch.eye(5).expand(2, 2, 5, 5), heads, 2), states)
