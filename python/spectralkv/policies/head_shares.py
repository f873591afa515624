"""Which part of a budget each head gets: heads that attend widely need more tokens than others."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TypeAlias

import torch

#: (L, Hkv): parts of an even budget, 1 on average.
HeadShares: TypeAlias = tuple[tuple[float, ...], ...]

#: (L, Hkv): tokens that each head keeps.
HeadBudgets: TypeAlias = tuple[tuple[int, ...], ...]

_FORMAT = "spectralkv head shares"


def check_head_shares(shares: HeadShares) -> str | None:
    """Return what is wrong with shares, as what was expected, or None."""
    is_table = bool(shares) and all(len(layer) == len(shares[0]) > 0 for layer in shares)
    if not is_table:
        return "as many shares for each layer, one a KV head"
    if not all(math.isfinite(share) and share > 0.0 for layer in shares for share in layer):
        return "finite shares above 0"
    mean = sum(map(sum, shares)) / (len(shares) * len(shares[0]))
    return None if abs(mean - 1.0) <= 0.01 else f"shares of mean 1, got {mean:.3f}"


def budgets_of(shares: HeadShares, budget: int, least: int) -> HeadBudgets:
    """Return the tokens that each head keeps.

    Parameters
    ----------
    shares : HeadShares
        (L, Hkv).
    budget : int
        Tokens that a head keeps on average.
    least : int
        Tokens that each head needs: sinks, window and one more.

    Returns
    -------
    tuple of tuple of int
        (L, Hkv), of mean `budget` at most. In each layer some head keeps no more than `budget`, so
        that all layers come to be cut at the same time.
    """
    # Above what every head needs shares are taken as they are: a mean of 1 stays one.
    rows = [[least + int(share * (budget - least)) for share in layer] for layer in shares]
    for row in rows:
        smallest = min(range(len(row)), key=row.__getitem__)
        row[smallest] = min(row[smallest], budget)
    return tuple(map(tuple, rows))


def shares_of(budgets: Sequence[Sequence[float]], budget: float, least: int) -> HeadShares:
    """Return the shares of which `budgets_of` makes `budgets`, up to rounding: of mean 1."""
    free = budget - least
    rows = [[max((tokens - least) / free, 1e-3) for tokens in layer] for layer in budgets]
    mean = sum(map(sum, rows)) / (len(rows) * len(rows[0]))
    return tuple(tuple(round(share / mean, 4) for share in row) for row in rows)


def places_won(scores: torch.Tensor, free: torch.Tensor, places: int, sure: int) -> torch.Tensor:
    """Let heads compete for places: the scores of each are made to sum to 1, and the best ones win.

    Parameters
    ----------
    scores : torch.Tensor
        float32 (L, B, Hkv, S), 0 or more: of the tokens in all slots.
    free : torch.Tensor
        Bool, of the same shape: which tokens need a place.
    places : int
        Places a head, on average.
    sure : int
        Of these places those that a head has without a competition, at most `places`.

    Returns
    -------
    torch.Tensor
        float64 (L, B, Hkv): places that each head gets, no more than it has free tokens. All heads
        of a sequence compete.
    """
    layers, batch, heads, size = scores.shape
    parts = scores / scores.sum(-1, keepdim=True).clamp_min(1e-20)
    parts = parts.masked_fill(~free, -1.0)
    sure = min(sure, size)
    # Which tokens are a head's best does not matter, only how far down its list the places reach.
    ranked = parts.sort(-1, descending=True).values[..., sure:]
    rest = ranked.transpose(0, 1).reshape(batch, -1)  # (B, L x Hkv x ...)
    count = min((places - sure) * layers * heads, rest.shape[1])
    best = rest.topk(count, dim=1)
    owner = best.indices // max(ranked.shape[3], 1)
    won = torch.zeros(batch, layers * heads, dtype=torch.float64, device=scores.device)
    won.scatter_add_(1, owner, (best.values >= 0.0).to(torch.float64))
    return won.view(batch, layers, heads).transpose(0, 1) + free.sum(-1).clamp_max(sure)


def save_head_shares(path: str | os.PathLike[str], shares: HeadShares, **about: object) -> None:
    """Write shares to a JSON file, with what is known `about` them."""
    head = {"format": _FORMAT, **about, "layers": len(shares), "kv_heads": len(shares[0])}
    rows = ",\n".join("  " + json.dumps(list(layer)) for layer in shares)
    body = json.dumps(head, indent=1)[:-2] + ',\n "shares": [\n' + rows + "\n ]\n}\n"
    Path(path).write_text(body)


def load_head_shares(path: str | os.PathLike[str]) -> HeadShares:
    """Read what :func:`save_head_shares` wrote.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    ValueError
        It holds something else.
    """
    try:
        data = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"[head_shares] {path} must be a JSON file, got {error}") from None
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise ValueError(
            f"[head_shares] {path} must be a file that `spectralkv calibrate` wrote, got another"
        )
    return tuple(tuple(float(share) for share in layer) for layer in data["shares"])
