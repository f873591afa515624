"""Attention as policies need it: recomputed from queries and keys, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch

# Scores that one block of queries may fill: 64 MiB in float32.
_BLOCK_ELEMENTS = 1 << 24


def attention_logits(
    query: torch.Tensor,
    keys: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None,
    valid: torch.Tensor | None,
    offset: int,
) -> torch.Tensor:
    """Return the logits of some queries, grouped by the KV head they read.

    Parameters
    ----------
    query : torch.Tensor
        (B, Hq, Q, D); query i sees the slots up to ``offset + i``.
    keys : torch.Tensor
        (B, Hkv, S, D).
    scaling, softcap : float
        How the model turns dot products into logits.
    valid : torch.Tensor or None
        bool (B, S): False marks an empty slot.
    offset : int
        Slot of the first query.

    Returns
    -------
    torch.Tensor
        (B, Hkv, Hq / Hkv, Q, S), float32 or wider; -inf where a query does not look.
    """
    batch, query_heads, count, dim = query.shape
    heads, size = keys.shape[1], keys.shape[2]
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(dtype).reshape(batch, heads, -1, dim) * scaling
    logits = grouped @ keys.to(dtype).transpose(2, 3)
    logits = logits.view(batch, heads, query_heads // heads, count, size)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if offset < size - 1:
        slot = torch.arange(size, device=keys.device)
        unseen = slot > slot[offset : offset + count, None]
        logits = logits.masked_fill(unseen, float("-inf"))
    if valid is not None:
        logits = logits.masked_fill(~valid[:, None, None, None], float("-inf"))
    return logits


def attention_blocks(
    query: torch.Tensor,
    keys: torch.Tensor,
    *,
    scaling: float,
    softcap: float | None,
    valid: torch.Tensor | None,
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield the attention of queries that stand in the last slots, a block of them at a time.

    Parameters
    ----------
    query : torch.Tensor
        (B, Hq, Q, D), the queries of the last Q slots.
    keys, scaling, softcap, valid
        See :func:`attention_logits`.

    Yields
    ------
    block : slice
        Which of the Q queries.
    weights : torch.Tensor
        (B, Hkv, Hq / Hkv, q, S); rows sum to 1, or to 0 where a query sees nothing.
    """
    batch, query_heads, count, _ = query.shape
    size = keys.shape[2]
    step = max(1, _BLOCK_ELEMENTS // max(1, batch * query_heads * size))
    for start in range(0, count, step):
        block = slice(start, min(start + step, count))
        logits = attention_logits(
            query[:, :, block],
            keys,
            scaling=scaling,
            softcap=softcap,
            valid=valid,
            offset=size - count + start,
        )
        weights = logits.softmax(-1)
        yield block, weights if valid is None else weights.nan_to_num(0.0)
