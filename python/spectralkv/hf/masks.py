"""Attention masks: what they say about new tokens, and masks for a cache with empty slots."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch


class NewTokens(NamedTuple):
    """Which of a forward pass's tokens are real."""

    counts: tuple[int, ...]
    """Real tokens of each sequence."""
    valid: torch.Tensor | None
    """Bool (B, Q); None: all are real."""
    visible: tuple[int, ...] | None = None
    """Columns that the newest token of each sequence sees as they are, without a bias; -1: that
    differs by heads. None: all it can."""


class MaskReader:
    """Reads masks; all layers of a forward pass share one mask, so the last answer is kept."""

    def __init__(self) -> None:
        self._mask: weakref.ref[torch.Tensor] | None = None
        self._seen = -1
        self._answer: NewTokens | None = None

    def __deepcopy__(self, memo: dict[int, object]) -> MaskReader:
        return MaskReader()

    def new_tokens(self, mask: torch.Tensor | None, batch: int, count: int, seen: int) -> NewTokens:
        """Return which of the `count` newest tokens are real.

        A token is real if it may attend to itself: the mask's diagonal says so.

        Parameters
        ----------
        mask : torch.Tensor or None
            Bool or additive float (B or 1, ·, Q, S), or 2-D (B, ≥ Q) with 0 for padding. None:
            all are real.
        batch, count : int
            B and Q.
        seen : int
            Tokens seen, these included: tells one forward pass from the next.

        Raises
        ------
        ValueError
            The mask has another shape.
        """
        if mask is None:
            return NewTokens((count,) * batch, None)
        is_known = self._mask is not None and self._mask() is mask and self._seen == seen
        if is_known and self._answer is not None:
            return self._answer
        # A copy: a view would keep the whole mask of a prompt.
        valid = _diagonal(mask, count).expand(batch, count).clone()
        both = torch.stack((valid.sum(-1), _visible(mask).expand(batch)))
        counts, visible = map(tuple, both.tolist())  # one wait for the device
        answer = NewTokens(counts, None if min(counts, default=count) == count else valid, visible)
        self._mask, self._seen, self._answer = weakref.ref(mask), seen, answer
        return answer


def _diagonal(mask: torch.Tensor, count: int) -> torch.Tensor:
    if mask.dim() == 2 and mask.shape[1] >= count:
        return mask[:, mask.shape[1] - count :] != 0
    if mask.dim() != 4 or mask.shape[2] != count or mask.shape[3] < count:
        raise ValueError(
            f"[hf] attention mask must be (B, 1, {count}, S) or (B, S) with S >= {count}, "
            f"got {tuple(mask.shape)}"
        )
    diagonal = mask[:, 0].diagonal(mask.shape[3] - count, dim1=-2, dim2=-1)
    return is_open(diagonal)


def _visible(mask: torch.Tensor) -> torch.Tensor:
    """Return int64 (B) or (1): the columns that the newest token sees without a bias."""
    if mask.dim() == 2:
        return (mask != 0).sum(-1)
    if mask.shape[1] != 1:
        return torch.full((1,), -1, device=mask.device)
    newest = mask[:, 0, -1]
    return (newest if mask.dtype == torch.bool else newest == 0).sum(-1)


def is_open(mask: torch.Tensor) -> torch.Tensor:
    """Return bool: where a bool or additive mask lets a query look."""
    if mask.dtype == torch.bool:
        return mask
    # Additive masks close by the dtype's minimum or -inf; position biases stay far from both.
    return mask > torch.finfo(mask.dtype).min / 2


def rebuild(
    mask: torch.Tensor | None,
    valid: torch.Tensor | None,
    query: torch.Tensor,
    size: int,
    implementation: str,
) -> torch.Tensor | None:
    """Return a mask for a cache whose slots no longer follow the text.

    Among the new tokens the model's own mask holds; all of them see every older token that is
    left, and no empty slot.

    Parameters
    ----------
    mask : torch.Tensor or None
        The model's mask. Its last Q columns are used.
    valid : torch.Tensor or None
        Bool (B, S): False marks an empty slot. None: none is empty.
    query : torch.Tensor
        (B, Hq, Q, D).
    size : int
        S, the new tokens included.
    implementation : str
        Name of the attention implementation, which tells the mask's form where `mask` does not.

    Returns
    -------
    torch.Tensor or None
        2-D bool (B, S) where the model's mask is 2-D or the implementation is a flash attention,
        else 4-D, additive or bool as the model's mask is.
    """
    batch, count = query.shape[0], query.shape[2]
    if mask.dim() == 2 if mask is not None else "flash" in implementation:
        return valid
    additive = implementation == "eager" if mask is None else mask.dtype != torch.bool
    if count == 1:
        if valid is None:
            return None if not additive else query.new_zeros(1, 1, 1, size)
        seen = valid[:, None, None]
        return _additive(seen, query.dtype) if additive else seen
    old = size - count
    if mask is None:
        new = torch.ones(count, count, dtype=torch.bool, device=query.device).tril()[None, None]
        if valid is not None:
            new = new & valid[:, None, None, old:]
    else:
        new = mask[..., mask.shape[-1] - count :]
    if additive and new.dtype == torch.bool:
        new = _additive(new, query.dtype)
    shape = (max(new.shape[0], batch if valid is not None else 1), new.shape[1], count, old)
    if valid is None:
        seen = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=query.device)
    else:
        seen = valid[:, None, None, :old]
    if additive:
        seen = _additive(seen, new.dtype)
    return torch.cat((seen.expand(shape), new.expand(shape[0], -1, -1, -1)), -1)


def among_new(
    mask: torch.Tensor | None, valid: torch.Tensor | None, query: torch.Tensor
) -> torch.Tensor:
    """Return what new tokens see of each other, (B or 1, ·, Q, Q), bool or additive as `mask` is.

    Parameters
    ----------
    mask : torch.Tensor or None
        The model's mask; None: causal.
    valid : torch.Tensor or None
        Bool (B, Q): False marks padding.
    query : torch.Tensor
        (B, Hq, Q, D).
    """
    count = query.shape[2]
    if mask is not None and mask.dim() == 4:
        return mask[..., mask.shape[3] - count :]
    causal = torch.ones(count, count, dtype=torch.bool, device=query.device).tril()[None, None]
    return causal if valid is None else causal & valid[:, None, None]


def _additive(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(
        ~mask, torch.finfo(dtype).min
    )
