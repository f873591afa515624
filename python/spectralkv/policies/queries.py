"""The newest queries of a layer, for policies that rank by them."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping

import torch

from spectralkv.policies.base import Observation, PolicyT, ScoreTracker


class QueryWindow:
    """The newest queries of each sequence.

    Parameters
    ----------
    size : int
        Queries to hold, of each sequence.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        # Blocks (B, Hq, q, D), oldest first; only the first may have empty places, at its front.
        self._blocks: deque[torch.Tensor] = deque()
        self._valid: torch.Tensor | None = None
        self._count = 0  # queries in all blocks

    def push(self, query: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Add `query` (B, Hq, Q, D); bool `valid` (B, Q) marks padding with False."""
        if valid is not None:
            self._push_padded(query, valid)
            return
        newest = query[:, :, max(0, query.shape[2] - self._size) :]
        # A copy: the model may overwrite its query, and a slice would keep the whole prompt's.
        self._blocks.append(newest.clone(memory_format=torch.contiguous_format))
        self._count += newest.shape[2]
        while self._count - self._blocks[0].shape[2] >= self._size:
            self._count -= self._blocks.popleft().shape[2]
            self._valid = None

    def _push_padded(self, query: torch.Tensor, valid: torch.Tensor) -> None:
        held = self.queries()
        if held is not None:
            old, old_valid = held
            if old_valid is None:
                old_valid = valid.new_ones(old.shape[0], old.shape[2])
            query, valid = torch.cat((old, query), 2), torch.cat((old_valid, valid), 1)
        order = valid.to(torch.uint8).sort(dim=-1, stable=True).indices[:, -self._size :]
        index = order[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        self._blocks, self._valid = deque([query.gather(2, index)]), valid.gather(1, order)
        self._count = self._valid.shape[1]

    def queries(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Return the queries, newest last, and which of them are there; None when there are none.

        Returns
        -------
        query : torch.Tensor
            (B, Hq, n, D), n at most the window's size.
        valid : torch.Tensor or None
            bool (B, n); None: all are there. A sequence with fewer has them at the end.
        """
        if not self._blocks:
            return None
        query, valid = torch.cat(tuple(self._blocks), 2), self._valid
        if valid is not None:
            new = valid.new_ones(valid.shape[0], query.shape[2] - valid.shape[1])
            valid = torch.cat((valid, new), 1)[:, -self._size :]
        return query[:, :, -self._size :], valid

    def truncate(self, count: int) -> None:
        """Forget the newest `count` queries."""
        while count and self._blocks:
            newest = self._blocks.pop()
            self._count -= min(count, newest.shape[2])
            left = newest.shape[2] - count
            if left > 0:
                self._blocks.append(newest[:, :, :left])
                if self._valid is not None and len(self._blocks) == 1:
                    self._valid = self._valid[:, :left]
            count = max(0, -left)
        if not self._blocks:
            self._valid = None

    def select_batch(self, indices: torch.Tensor) -> None:
        """Make sequence i a copy of what sequence ``indices[i]`` was."""
        self._blocks = deque(block.index_select(0, indices) for block in self._blocks)
        if self._valid is not None:
            self._valid = self._valid.index_select(0, indices)

    def reset(self) -> None:
        """Forget everything."""
        self._blocks.clear()
        self._valid, self._count = None, 0

    def load(self, query: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Hold what :meth:`queries` returned, and nothing else."""
        self._blocks, self._valid, self._count = deque([query]), valid, query.shape[2]

    def nbytes(self) -> int:
        """Bytes held."""
        valid = 0 if self._valid is None else self._valid.nbytes
        return valid + sum(block.nbytes for block in self._blocks)


class QueryTracker(ScoreTracker[PolicyT]):
    """A tracker that ranks by the attention of each sequence's newest queries.

    Only the queries are held. Their attention is computed anew, over the keys that are left, when
    scores are asked for.

    Parameters
    ----------
    policy : Policy
        The configuration.
    num_queries : int
        Queries to hold. Their tokens must be among those that a cut never takes, or be one.
    """

    def __init__(self, policy: PolicyT, num_queries: int) -> None:
        super().__init__(policy)
        self._queries = QueryWindow(num_queries)

    def observe(self, observation: Observation) -> None:
        """Take in the new tokens."""
        super().observe(observation)
        self._queries.push(observation.query, observation.new_valid)

    def truncate(self, count: int) -> None:
        """Forget the newest `count` slots."""
        super().truncate(count)
        self._queries.truncate(count)

    def select_batch(self, indices: torch.Tensor) -> None:
        """Make sequence i a copy of what sequence ``indices[i]`` was."""
        super().select_batch(indices)
        self._queries.select_batch(indices)

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self._queries.reset()

    def nbytes(self) -> int:
        """Bytes of this state."""
        return self._queries.nbytes()

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Return the newest queries, and which of them are there."""
        state = super().state_dict()
        held = self._queries.queries()
        if held is not None:
            state["queries"] = held[0]
            if held[1] is not None:
                state["queries_valid"] = held[1]
        return state

    def load_state_dict(self, state: Mapping[str, torch.Tensor], held: Observation) -> None:
        """Take over what :meth:`state_dict` returned; this tracker has seen nothing yet."""
        super().load_state_dict(state, held)
        if "queries" in state:
            self._queries.load(state["queries"].clone(), state.get("queries_valid"))

    def _newest_queries(self) -> torch.Tensor:
        # A sequence that holds fewer is never cut, so which of them are empty does not matter.
        held = self._queries.queries()
        if held is None:
            raise RuntimeError(f"[{self._policy.name}] scores need a query, got none")
        return held[0]
