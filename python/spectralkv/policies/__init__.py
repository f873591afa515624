"""Eviction policies: which tokens a cache keeps.

A policy is a frozen configuration; a cache asks it for trackers, the mutable state of its layers.
Own policies derive from :class:`Policy` and :class:`ScoreTracker` and need no registration: hand
them to the cache.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from spectralkv.policies.base import (
    AttendingTracker,
    DecodeStep,
    Observation,
    Policy,
    ScoreTracker,
    Tracker,
    plain_name,
    select_slots,
)
from spectralkv.policies.full import Full
from spectralkv.policies.h2o import H2O
from spectralkv.policies.head_shares import HeadShares, load_head_shares, save_head_shares
from spectralkv.policies.keydiff import KeyDiff
from spectralkv.policies.lazy_eviction import LazyEviction
from spectralkv.policies.mix import Mix
from spectralkv.policies.random_choice import Random
from spectralkv.policies.rkv import RKV
from spectralkv.policies.snapkv import SnapKV
from spectralkv.policies.spectral import Spectral
from spectralkv.policies.streaming_llm import StreamingLLM
from spectralkv.policies.tova import TOVA

__all__ = [
    "H2O",
    "RKV",
    "TOVA",
    "AttendingTracker",
    "DecodeStep",
    "Full",
    "HeadShares",
    "KeyDiff",
    "LazyEviction",
    "Mix",
    "Observation",
    "Policy",
    "Random",
    "ScoreTracker",
    "SnapKV",
    "Spectral",
    "StreamingLLM",
    "Tracker",
    "available",
    "create",
    "load_head_shares",
    "options_of",
    "plain_name",
    "save_head_shares",
    "select_slots",
]

_POLICIES: tuple[type[Policy], ...] = (
    Spectral,
    H2O,
    SnapKV,
    TOVA,
    StreamingLLM,
    KeyDiff,
    RKV,
    LazyEviction,
    Mix,
    Random,
    Full,
)


def available() -> tuple[str, ...]:
    """Return the names that :func:`create` knows."""
    return tuple(policy.name for policy in _POLICIES)


def create(name: str, **options: Any) -> Policy:
    """Make a policy by name.

    Parameters
    ----------
    name : str
        One of :func:`available`; case, hyphens and underscores do not matter.
    **options
        The policy's options, `budget` among them. :class:`Mix` takes those of its parts, named
        ``policy__option``.

    Raises
    ------
    ValueError
        There is no such policy, it has no such option, or an option is out of range.

    Examples
    --------
    >>> create("h2o", budget=512).cut_interval
    32
    """
    policy = _named(name)
    if policy is Mix and (nested := tuple(item for item in options.items() if "__" in item[0])):
        rest = {key: value for key, value in options.items() if "__" not in key}
        options = {**rest, "options": (*rest.get("options", ()), *nested)}
    known = options_of(name)
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"[create] options of {policy.name} must be among {', '.join(known)}, "
            f"got {', '.join(unknown)}"
        )
    if policy is not Full and "budget" not in options:
        raise ValueError(f"[create] {policy.name} must have a budget, got none")
    return policy(**options)


def options_of(name: str) -> tuple[str, ...]:
    """Return the names of a policy's options.

    Raises
    ------
    ValueError
        There is no such policy.
    """
    return tuple(field.name for field in fields(_named(name)))


def _named(name: str) -> type[Policy]:
    by_name = {plain_name(policy.name): policy for policy in _POLICIES}
    policy = by_name.get(plain_name(name))
    if policy is None:
        raise ValueError(f"[create] policy must be one of {', '.join(available())}, got {name!r}")
    return policy
