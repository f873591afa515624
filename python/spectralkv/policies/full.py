"""Keep everything: the yardstick that the others are measured against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from spectralkv.policies.base import Policy, Tracker


@dataclass(frozen=True, kw_only=True)
class Full(Policy):
    """Never evict.

    Parameters
    ----------
    budget : None
        There is none.
    """

    name: ClassVar[str] = "full"
    watches: ClassVar[bool] = False

    budget: int | None = None

    def __post_init__(self) -> None:
        self._require(self.budget is None, "budget", "None")
        super().__post_init__()

    def trackers(self, num_layers: int) -> list[Tracker]:  # noqa: ARG002
        """Return no trackers: there is nothing to watch."""
        return []
