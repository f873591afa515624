"""Policies as plain data, for files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import Any

from spectralkv.config import Population
from spectralkv.policies.base import Policy


def to_dict(policy: Policy) -> dict[str, Any]:
    """Return a policy's name and all its options, as JSON can hold them.

    Raises
    ------
    TypeError
        An option is neither a number, a text, a truth value, None, a Population, nor a tuple of
        these.
    """
    options = {
        field.name: _plain(getattr(policy, field.name), f"{policy.name}'s {field.name}")
        for field in fields(policy)
    }
    return {"name": policy.name, "options": options}


def from_dict(data: Mapping[str, Any]) -> Policy:
    """Make the policy that :func:`to_dict` described.

    Raises
    ------
    ValueError
        There is no such policy, or it does not have these options.
    """
    from spectralkv import policies

    options = {name: _restored(value) for name, value in data["options"].items()}
    return policies.create(data["name"], **options)


def _plain(value: Any, what: str) -> Any:
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Population):
        return {"population": asdict(value)}
    if isinstance(value, (tuple, list)):
        return [_plain(item, what) for item in value]
    raise TypeError(
        f"[to_dict] {what} must be made of numbers, texts and populations, "
        f"got {type(value).__name__}"
    )


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_restored(item) for item in value)
    return Population(**value["population"]) if isinstance(value, dict) else value
