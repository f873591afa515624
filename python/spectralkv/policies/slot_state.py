"""Numbers that a policy holds for each slot, and that move with its token."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from spectralkv.policies.base import Observation, PolicyT, ScoreTracker, move_slots


class SlotTracker(ScoreTracker[PolicyT]):
    """A tracker with `width` numbers a slot, in a slab as large as the cache's own.

    Parameters
    ----------
    policy : Policy
        The configuration.
    width : int
        Numbers to hold for each slot of each KV head.
    """

    def __init__(self, policy: PolicyT, width: int) -> None:
        super().__init__(policy)
        self._width = width
        self._slab: torch.Tensor | None = None  # (B, Hkv, capacity, width)
        self._size = 0  # slots in use
        self._capacity = 0

    def compact(self, keep: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Move the kept slots of `keys`, `values` (in place) and of this state to the front."""
        super().compact(keep, keys, values)
        if self._slab is not None:
            move_slots(self._slab[:, :, : self._size], keep)
        self._size = keep.shape[-1]

    def truncate(self, count: int) -> None:
        """Forget the newest `count` slots."""
        super().truncate(count)
        self._size -= count

    def select_batch(self, indices: torch.Tensor) -> None:
        """Make sequence i a copy of what sequence ``indices[i]`` was."""
        super().select_batch(indices)
        if self._slab is not None:
            self._slab = self._slab.index_select(0, indices)

    def reserve(self, capacity: int) -> None:
        """Make room for `capacity` slots, and give back memory beyond that."""
        super().reserve(capacity)
        self._capacity = capacity
        if self._slab is not None and self._slab.shape[2] != capacity:
            batch, heads, _, width = self._slab.shape
            slab = self._slab.new_empty(batch, heads, capacity, width)
            slab[:, :, : self._size] = self._slab[:, :, : self._size]
            self._slab = slab

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._slab, self._size = None, 0

    def nbytes(self) -> int:
        """Bytes of this state."""
        return 0 if self._slab is None else self._slab.nbytes

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the numbers of the slots in use, (B, Hkv, S, width)."""
        state = super().state_dict()
        if self._slab is not None:
            state["slots"] = self._slab[:, :, : self._size]
        return state

    def load_state_dict(self, state: Mapping[str, torch.Tensor], held: Observation) -> None:
        """Take over what :meth:`state_dict` returned; this tracker has seen nothing yet."""
        super().load_state_dict(state, held)
        if "slots" in state:
            self._slab, self._size = state["slots"].clone(), state["slots"].shape[2]

    def _take_in(self, observation: Observation, dtype: torch.dtype) -> torch.Tensor:
        """Make the new tokens' slots zero, and return a view (B, Hkv, S, width) of all slots.

        `dtype` is that of the numbers, the same at each call.
        """
        batch, heads, size, _ = observation.keys.shape
        if self._slab is None:
            capacity = max(self._capacity, size)
            shape = (batch, heads, capacity, self._width)
            self._slab = torch.empty(shape, dtype=dtype, device=observation.keys.device)
        elif self._slab.shape[2] < size:
            self.reserve(size)
        self._last = observation  # `reserve` forgets it
        self._slab[:, :, self._size : size] = 0
        self._size = size
        return self._slab[:, :, :size]

    def _held(self) -> torch.Tensor:
        """Return (B, Hkv, S, width) of the slots in use."""
        self._observed()
        if self._slab is None:
            raise RuntimeError(f"[{self._policy.name}] there is no state yet")
        return self._slab[:, :, : self._size]
