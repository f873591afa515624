"""What keys were before a model turned them by their positions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from spectralkv.config import Rotary
from spectralkv.hf import cache_argument
from spectralkv.hf.rotary import rotary_of
from tiny_models import FAMILIES, implementations, make_config, make_model, random_ids

LENGTH = 40


def unrotated(keys: torch.Tensor, rotary: Rotary) -> torch.Tensor:
    """Turn keys (..., S, D) at positions 0 to S - 1 back."""
    count = len(rotary.inv_freq)
    angle = torch.arange(keys.shape[-2])[:, None] * torch.tensor(rotary.inv_freq)
    turn = torch.polar(torch.ones_like(angle), -angle)
    part = keys[..., : 2 * count]
    pairs = part.unflatten(-1, (count, 2) if rotary.interleaved else (2, count))
    axis = -1 if rotary.interleaved else -2
    turned = turn * torch.complex(*pairs.to(torch.float64).unbind(axis))
    back = torch.stack((turned.real, turned.imag), axis).flatten(-2)
    return torch.cat((back, keys[..., 2 * count :].to(back.dtype)), -1)


def keys_before_and_after(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return each layer's keys (1, Hkv, S, D) before and after they are turned."""
    before: list[torch.Tensor] = []
    hooks = []
    for layer in model.get_decoder().layers:
        attention = layer.self_attn
        source = getattr(attention, "k_norm", None) or getattr(attention, "k_proj", None)
        hooks.append(
            (source or attention.qkv_proj).register_forward_hook(
                lambda _module, _inputs, output: before.append(output.detach())
            )
        )
    cache = transformers.DynamicCache()
    with torch.no_grad():
        model(random_ids(1, LENGTH), **cache_argument(cache))
    for hook in hooks:
        hook.remove()
    pairs = []
    for raw, layer in zip(before, cache.layers, strict=True):
        after = layer.keys
        heads, dim = after.shape[1], after.shape[3]
        if raw.dim() == 4:  # behind a norm, of which some come after the transposition
            pairs.append((raw if raw.shape[1] == heads else raw.transpose(1, 2), after))
            continue
        split = raw.unflatten(2, (-1, dim)).transpose(1, 2)
        # Alone, or between queries and values.
        start = 0 if split.shape[1] == heads else split.shape[1] - 2 * heads
        pairs.append((split[:, start : start + heads], after))
    return pairs


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_what_the_model_does(family: str) -> None:
    model = make_model(family, implementations(family)[0])
    for index, (before, after) in enumerate(keys_before_and_after(model)):
        rotary = rotary_of(model.config, index)
        assert rotary is not None
        assert 2 * len(rotary.inv_freq) == after.shape[3]
        torch.testing.assert_close(unrotated(after, rotary), before, atol=1e-5, rtol=1e-5)


def test_pairs_may_be_neighbours_and_some_elements_stay() -> None:
    config = transformers.GlmConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, partial_rotary_factor=0.5,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.GlmForCausalLM(config).to(torch.float64).eval()
    for index, (before, after) in enumerate(keys_before_and_after(model)):
        rotary = rotary_of(config, index)
        assert rotary is not None
        assert rotary.interleaved
        assert len(rotary.inv_freq) == 2
        torch.testing.assert_close(unrotated(after, rotary), before, atol=1e-5, rtol=1e-5)


def test_longer_texts_may_turn_more_slowly() -> None:
    plain = rotary_of(make_config("llama"), 0)
    scaled = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    slow = rotary_of(make_config("llama", rope_parameters=scaled), 0)
    assert plain is not None
    assert slow is not None
    np.testing.assert_allclose(np.array(slow.inv_freq) * 4.0, plain.inv_freq, rtol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        transformers.GPT2Config(),
        make_config(
            "llama",
            rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
        ),
        transformers.PreTrainedConfig(),
    ],
    ids=["learned positions", "changes with the length", "no model"],
)
def test_none_where_it_is_not_known(config: Any) -> None:
    assert rotary_of(config, 0) is None


def test_layers_without_it() -> None:
    config = transformers.SmolLM3Config(num_hidden_layers=4, no_rope_layers=[1, 1, 1, 0])
    assert rotary_of(config, 0) is not None
    assert rotary_of(config, 3) is None
