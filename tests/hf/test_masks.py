"""Masks: reading new tokens off them, and building them for a cut cache."""

from __future__ import annotations

import pytest
import torch
from helpers import make_cache
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask

from spectralkv import policies
from spectralkv.hf import cache_argument, masks
from tiny_models import make_model, random_ids

LOW = torch.finfo(torch.float32).min


def causal(count: int, size: int) -> torch.Tensor:
    return torch.ones(count, size, dtype=torch.bool).tril(size - count)


def test_no_mask_means_no_padding() -> None:
    assert masks.MaskReader().new_tokens(None, 2, 3, 3) == ((3, 3), None, None)


@pytest.mark.parametrize("form", ["bool", "additive", "infinite", "biased"])
def test_padding_is_read_off_the_diagonal(form: str) -> None:
    seen = causal(3, 5).expand(2, 1, 3, 5).clone()
    seen[1, :, :, 2] = False  # the first new token of sequence 1 is padding
    mask = seen
    if form != "bool":
        closed = float("-inf") if form == "infinite" else LOW
        mask = torch.zeros(2, 1, 3, 5).masked_fill(~seen, closed)
    if form == "biased":
        mask = mask + torch.randn(2, 1, 3, 5).clamp(-5, 0)
    counts, valid, visible = masks.MaskReader().new_tokens(mask, 2, 3, 5)
    assert counts == (3, 2)
    assert valid is not None
    assert valid.tolist() == [[True] * 3, [False, True, True]]
    if form == "biased":
        assert visible is not None
        assert visible[1] < 4  # what has a bias is not seen as it is
    else:
        assert visible == (5, 4)


def test_two_dimensional_and_shared_masks() -> None:
    reader = masks.MaskReader()
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    assert reader.new_tokens(mask, 2, 2, 4) == ((2, 2), None, (4, 2))
    assert reader.new_tokens(mask, 2, 3, 4 + 1).counts == (3, 2)
    assert reader.new_tokens(causal(2, 6)[None, None], 3, 2, 6) == ((2, 2, 2), None, (6, 6, 6))
    by_heads = causal(2, 6).expand(3, 4, 2, 6)
    assert reader.new_tokens(by_heads, 3, 2, 6).visible == (-1, -1, -1)


def test_a_mask_that_was_changed_in_place_is_read_again() -> None:
    reader = masks.MaskReader()
    mask = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    assert reader.new_tokens(mask, 1, 1, 4).counts == (1,)
    mask[..., -1] = False
    assert reader.new_tokens(mask, 1, 1, 4).counts == (1,)  # the same forward pass
    assert reader.new_tokens(mask, 1, 1, 5).counts == (0,)


@pytest.mark.parametrize("shape", [(2, 3, 5), (2, 1, 4, 5), (2, 1, 3, 2), (2, 2)])
def test_other_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"attention mask must be \(B, 1, 3, S\) or .* got"):
        masks.MaskReader().new_tokens(torch.ones(shape), 2, 3, 5)


def test_rebuilt_masks_in_every_form() -> None:
    query = torch.zeros(2, 4, 3, 8)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1, :2] = False  # the longest has 3 older tokens, the other 1
    expected = torch.stack([causal(3, 6), causal(3, 6) & valid[1]])[:, None]
    own = causal(3, 9).expand(2, 1, 3, 9)  # for nine columns, from before a cut
    assert torch.equal(masks.rebuild(own, valid, query, 6, "sdpa"), expected)
    assert torch.equal(masks.rebuild(None, valid, query, 6, "sdpa"), expected)
    additive = torch.zeros(2, 1, 3, 9).masked_fill(~own, LOW)
    for mask in (additive, None):
        rebuilt = masks.rebuild(mask, valid, query, 6, "eager")
        assert rebuilt.dtype == torch.float32
        assert torch.equal(rebuilt == 0, expected)
        assert rebuilt.min() == LOW
    flat = torch.ones(2, 9)
    assert masks.rebuild(flat, valid, query, 6, "anything") is valid
    assert masks.rebuild(None, valid, query, 6, "flash_attention_2") is valid
    assert masks.rebuild(flat, None, query, 6, "flash_attention_2") is None


def test_rebuilt_masks_of_one_token() -> None:
    query = torch.zeros(2, 4, 1, 8)
    valid = torch.tensor([[True] * 4, [False, True, True, True]])
    own = torch.ones(2, 1, 1, 7, dtype=torch.bool)
    assert torch.equal(masks.rebuild(own, valid, query, 4, "sdpa"), valid[:, None, None])
    assert torch.equal(masks.rebuild(None, valid, query, 4, "sdpa"), valid[:, None, None])
    assert masks.rebuild(own, None, query, 4, "sdpa") is None
    additive = masks.rebuild(torch.zeros(2, 1, 1, 7), valid, query, 4, "eager")
    assert torch.equal(additive == 0, valid[:, None, None])
    assert torch.equal(
        masks.rebuild(torch.zeros(2, 1, 1, 7), None, query, 4, "eager"), torch.zeros(1, 1, 1, 4)
    )


def test_several_new_tokens_without_a_mask() -> None:
    """Where a model gives no mask, transformers' sdpa takes the first keys for the newest."""
    rebuilt = masks.rebuild(None, None, torch.zeros(1, 4, 3, 8), 7, "sdpa")
    assert torch.equal(rebuilt, causal(3, 7)[None, None])
    model = make_model("llama")
    cache = make_cache(model.config, policies.KeyDiff(budget=24, interval=8))
    with torch.no_grad():
        model(random_ids(1, 50), **cache_argument(cache))
    layer = cache.evicting_layers[0]
    keys = torch.zeros(1, 2, 3, 8, dtype=torch.float64)
    layer.update(keys, keys)
    mask = layer.before_attention(torch.zeros(1, 4, 3, 8), None, "sdpa")
    assert torch.equal(mask, causal(3, 27)[None, None])


def test_the_models_own_pattern_holds_among_the_new_tokens() -> None:
    query = torch.zeros(1, 4, 3, 8)
    tree = torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]], dtype=torch.bool)
    own = torch.cat((torch.ones(3, 5, dtype=torch.bool), tree), 1)[None, None]
    rebuilt = masks.rebuild(own, None, query, 5, "sdpa")
    assert torch.equal(rebuilt[0, 0], torch.cat((torch.ones(3, 2, dtype=torch.bool), tree), 1))


def test_two_dimensional_masks_serve_a_flash_attention() -> None:
    """An attention that is given 2-D masks, as flash attentions are, agrees with sdpa."""

    def flash_like(module, query, key, value, mask, scaling, **kwargs):  # noqa: ANN001, ANN003, ANN202, ARG001
        batch, count, size = query.shape[0], query.shape[2], key.shape[2]
        seen = causal(count, size)[None, None]
        if mask is not None:
            assert mask.shape == (batch, size)
            seen = seen & mask.bool()[:, None, None]
        group = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
        logits = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, float("-inf"))
        weights = logits.softmax(-1).nan_to_num(0.0)
        return (weights @ value).transpose(1, 2), None

    AttentionInterface.register("two_dimensional", flash_like)
    AttentionMaskInterface.register("two_dimensional", flash_attention_mask)
    ids, mask = random_ids(3, 80), torch.ones(3, 80, dtype=torch.long)
    mask[1, :37] = 0
    mask[2, 20:30] = 0
    position_ids = (mask.cumsum(-1) - 1).clamp_min(0)
    results = []
    for implementation in ("sdpa", "two_dimensional"):
        model = make_model("llama", implementation)
        cache = make_cache(model.config, policies.SnapKV(budget=24, interval=8, window=6))
        logits, seen = [], 0
        for chunk in ids.split([50, *[1] * 12, 18], dim=1):
            end = seen + chunk.shape[1]
            with torch.no_grad():
                output = model(
                    chunk,
                    attention_mask=mask[:, :end],
                    position_ids=position_ids[:, seen:end],
                    **cache_argument(cache),
                )
            logits.append(output.logits)
            seen = end
        results.append(torch.cat(logits, 1)[mask.bool()])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
