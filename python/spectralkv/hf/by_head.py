"""Heads of a layer that hold different numbers of tokens: their slabs and their attention.

Decode steps are for :mod:`spectralkv`'s own attention, which reads such slabs as they are. What is
here serves the passes between: a prompt that goes on, the next turn of a talk.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import torch
from torch.nn import functional


def in_a_row(slab: torch.Tensor, rooms: Sequence[int], used: int) -> torch.Tensor:
    """Return (B, 1, pool, D): the first slots of each head of (B, Hkv, S, D), head behind head.

    Parameters
    ----------
    slab : torch.Tensor
        (B, Hkv, S, D).
    rooms : sequence of int
        Slots of each head.
    used : int
        Slots that may be in use: of each head so many are taken over, or as many as have room.
    """
    # Zeros: what an empty slot holds is masked, but must be a number.
    pool = slab.new_zeros(slab.shape[0], 1, sum(rooms), slab.shape[3])
    for head, (first, room) in enumerate(_each(rooms)):
        count = min(used, room)
        pool[:, 0, first : first + count].copy_(slab[:, head, :count])
    return pool


def side_by_side(pool: torch.Tensor, rooms: Sequence[int], used: int, size: int) -> torch.Tensor:
    """Return (B, Hkv, `size`, D) of what `in_a_row` returned; the heads' slots come first."""
    slab = pool.new_zeros(pool.shape[0], len(rooms), size, pool.shape[3])
    for head, (first, room) in enumerate(_each(rooms)):
        count = min(used, room)
        slab[:, head, :count].copy_(pool[:, 0, first : first + count])
    return slab


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    *,
    live: torch.Tensor,
    new: torch.Tensor,
    scaling: float,
    softcap: float | None,
) -> torch.Tensor:
    """Return the attention (B, Q, Hq, Dv) of new tokens over heads with empty slots.

    Parameters
    ----------
    query : torch.Tensor
        (B, Hq, Q, D).
    keys, values : torch.Tensor
        (B, Hkv, S, D) and (B, Hkv, S, Dv); the last Q slots are the new tokens.
    live : torch.Tensor
        Bool (B, Hkv, S - Q): which older slots hold a token; all new tokens see it.
    new : torch.Tensor
        (B or 1, 1 or Hq, Q, Q), bool or additive: what new tokens see of each other.
    scaling : float
        Factor of the dot products.
    softcap : float or None
        Logits become ``softcap * tanh(logits / softcap)``. None: they stay as they are.
    """
    batch, query_heads, count, _ = query.shape
    group = query_heads // keys.shape[1]
    attended = query.new_empty(batch, count, query_heads, values.shape[3])
    for head in range(keys.shape[1]):
        heads = slice(head * group, (head + 1) * group)
        among = (new if new.shape[1] == 1 else new[:, heads]).expand(batch, -1, -1, -1)
        older = live[:, head, None, None].expand(batch, among.shape[1], count, -1)
        if new.dtype != torch.bool:
            older = torch.zeros(older.shape, dtype=new.dtype, device=new.device).masked_fill_(
                ~older, torch.finfo(new.dtype).min
            )
        mask = torch.cat((older, among), -1)
        own = query[:, heads]
        # Views of one head for all queries of its group.
        key, value = (slab[:, head, None].expand(-1, group, -1, -1) for slab in (keys, values))
        if softcap is None:
            mixed = functional.scaled_dot_product_attention(
                own, key, value, attn_mask=mask, scale=scaling
            )
        else:
            logits = softcap * torch.tanh((own @ key.transpose(2, 3)) * scaling / softcap)
            low = torch.finfo(logits.dtype).min
            logits = logits.masked_fill(~mask, low) if mask.dtype == torch.bool else logits + mask
            mixed = logits.float().softmax(-1).to(value.dtype) @ value
        attended[:, :, heads] = mixed.transpose(1, 2)
    return attended


def _each(rooms: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield the first slot and the room of each head."""
    return zip(itertools.accumulate(rooms, initial=0), rooms)  # noqa: B905 - one more at the end
