"""One layer's graph in the shapes that people have at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from spectralkv._arrays import Array, constant_int32
from spectralkv._core import InvalidArgument, MemoryUse, Statistics
from spectralkv.config import (
    EvictionConfig,
    GraphConfig,
    GraphScope,
    Preset,
    WalkConfig,
    apply_preset,
)
from spectralkv.manager import GraphManager

__all__ = ["SpectralGraph"]


class SpectralGraph:
    """The attention graph of one layer.

    Feed it each token's query and the cached keys; it tells how important every cached token is.
    Tensors are of any DLPack framework, float32, float16 or bfloat16, and are never copied. Three
    ranks of shapes are understood; results have the matching one:

    ============  ===========  =================  ==================
    call          query        keys               scores
    ============  ===========  =================  ==================
    one head      (1, D)       (N, D)             (length,)
    one sequence  (Hq, D)      (Hkv, N, D)        (Hkv, length)
    a batch       (B, Hq, D)   (B, Hkv, N, D)     (B, Hkv, length)
    ============  ===========  =================  ==================

    Parameters
    ----------
    capacity
        Most tokens held.
    head_dim
        D.
    num_kv_heads, num_query_heads, batch_size
        Hkv, Hq (None: as many as Hkv) and B.
    preset
        Edge law, top_k and walk: ``"default"``, ``"uniform32"`` or ``"weighted4"``.
    walk
        Used instead of the preset's walk.
    top_k
        Used instead of the preset's.
    scope, num_sinks, seed, device, num_threads
        See :class:`spectralkv.GraphConfig`.

    Raises
    ------
    InvalidArgument
        A ``ValueError`` that names what was expected and what came; nothing has changed.

    Examples
    --------
    >>> import numpy as np, spectralkv
    >>> graph = spectralkv.SpectralGraph(capacity=128, head_dim=64)
    >>> rng = np.random.default_rng(0)
    >>> keys = rng.standard_normal((128, 64), dtype=np.float32)
    >>> for i in range(100):
    ...     graph.update_and_step(rng.standard_normal((1, 64), dtype=np.float32), keys, i)
    >>> graph.get_scores().shape
    (100,)
    """

    def __init__(
        self,
        capacity: int,
        head_dim: int,
        *,
        num_kv_heads: int = 1,
        num_query_heads: int | None = None,
        batch_size: int = 1,
        preset: Preset | str = "default",
        walk: WalkConfig | None = None,
        top_k: int | None = None,
        scope: GraphScope = "head",
        num_sinks: int = 4,
        seed: int = 0,
        device: str = "cpu",
        num_threads: int = 0,
    ) -> None:
        graph, preset_walk = apply_preset(
            preset,
            GraphConfig(
                batch_size=batch_size,
                num_query_heads=num_kv_heads if num_query_heads is None else num_query_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                capacity=capacity,
                scope=scope,
                num_sinks=num_sinks,
                seed=seed,
                device=device,
                num_threads=num_threads,
            ),
        )
        if top_k is not None:
            graph = replace(graph, top_k=top_k)
        self._manager = GraphManager(graph, walk or preset_walk)
        self._like: Array | None = None
        self._keys_rank = 4

    @property
    def manager(self) -> GraphManager:
        """The manager underneath, whose only layer is 0."""
        return self._manager

    def __len__(self) -> int:
        """Slots in use."""
        return self._manager.length(0)

    def update_and_step(self, query: Array, keys: Array, current_idx: int) -> None:
        """Take in one token (a sequence) and walk the graph.

        Parameters
        ----------
        query
            (1, D), (Hq, D) or (B, Hq, D).
        keys
            (N, D), (Hkv, N, D) or (B, Hkv, N, D), the token's key at ``current_idx``. N may exceed
            the tokens held.
        current_idx
            Slot of the token: the next one (``len(graph)``), or one that was freed.
        """
        query, keys = self._batched(query, keys, query_rank=3)
        self._manager.update_and_step(0, query, keys, slots=self._slots(current_idx))

    def update(self, query: Array, keys: Array, current_idx: int) -> None:
        """`update_and_step` without the walk."""
        query, keys = self._batched(query, keys, query_rank=3)
        self._manager.update(0, query, keys, slots=self._slots(current_idx))

    def update_rows(self, queries: Array, keys: Array) -> None:
        """Take in Q tokens at once, a prompt for instance, behind those already held.

        Parameters
        ----------
        queries
            (Q, D), (Hq, Q, D) or (B, Hq, Q, D).
        keys
            (N, D), (Hkv, N, D) or (B, Hkv, N, D), with all new keys in their slots.
        """
        queries, keys = self._batched(queries, keys, query_rank=4)
        self._manager.update_rows(0, queries, keys)

    def walk(self, keys: Array | None = None) -> None:
        """Renew the scores by random walks; novelty restarts are renewed from ``keys`` if given."""
        self._renew_novelty(keys)
        self._manager.walk(0)

    def solve(self, keys: Array | None = None) -> None:
        """Renew the scores exactly; novelty restarts are renewed from ``keys`` if given."""
        self._renew_novelty(keys)
        self._manager.solve(0)

    def get_scores(self) -> Array:
        """Return the importance of every slot in use, in the framework of the last keys.

        Returns
        -------
        Array
            float32 (length,), (Hkv, length) or (B, Hkv, length), like the last keys.
        """
        return self._unbatched(self._manager.scores(0, like=self._known_like("get_scores")))

    def positions(self) -> Array:
        """Position of the token in each slot, -1 if empty: int32, shaped as the scores."""
        return self._unbatched(self._manager.positions(0, like=self._known_like("positions")))

    def select(self, budget: int, *, window: int = 50, sinks: int = 4) -> Array:
        """Slots to keep when every head is cut to ``budget`` tokens: int32, ascending.

        Returns
        -------
        Array
            (M,), (Hkv, M) or (B, Hkv, M), like the last keys.
        """
        eviction = EvictionConfig(budget=budget, interval=1, window=window, sinks=sinks)
        like = self._known_like("select")
        return self._unbatched(self._manager.select(0, eviction, like=like, force=True))

    def compact(self, keep: Array, keys: Array, values: Array | None = None) -> None:
        """Move the kept slots of keys, values and graph to the front, in place."""
        rank = len(keys.shape)
        add = (None,) * (4 - rank)
        self._manager.compact(0, keep[add], keys[add], None if values is None else values[add])

    def truncate(self, count: int) -> None:
        """Forget the newest ``count`` tokens."""
        self._manager.truncate(0, count)

    def select_batch(self, sequences: Sequence[int]) -> None:
        """Make sequence i a copy of what ``sequences[i]`` was."""
        self._manager.select_batch(0, sequences)

    def reset(self) -> None:
        """Forget all tokens."""
        self._manager.reset(0)

    def statistics(self) -> Statistics:
        """Rows drawn, rows left empty because of NaN or infinity, walks, tokens evicted."""
        return self._manager.statistics()

    def memory_use(self) -> MemoryUse:
        """Bytes held."""
        return self._manager.memory_use()

    # -- shapes

    def _batched(self, query: Array, keys: Array, query_rank: int) -> tuple[Array, Array]:
        missing = 4 - len(keys.shape)
        if missing not in (0, 1, 2) or len(query.shape) != query_rank - missing + (
            1 if missing == 2 and query_rank == 3 else 0
        ):
            raise InvalidArgument(
                "[SpectralGraph] query and keys must be (1, D) and (N, D), (Hq, D) and (Hkv, N, D) "
                "or (B, Hq, D) and (B, Hkv, N, D), got "
                f"{tuple(query.shape)} and {tuple(keys.shape)}"
            )
        self._like = keys
        self._keys_rank = len(keys.shape)
        return query[(None,) * (query_rank - len(query.shape))], keys[(None,) * missing]

    def _unbatched(self, result: Array) -> Array:
        return result[(0,) * (4 - self._keys_rank)]

    def _slots(self, current_idx: int) -> memoryview | None:
        length = self._manager.length(0)
        if current_idx == length:
            return None
        if current_idx > length:
            raise InvalidArgument(
                f"[SpectralGraph] current_idx must be at most the next slot {length}, "
                f"got {current_idx}"
            )
        shape = (self._manager.batch_size(0), self._manager.graph_config.num_kv_heads)
        return constant_int32(current_idx, shape)

    def _renew_novelty(self, keys: Array | None) -> None:
        if keys is not None and self._manager.walk_config.needs_novelty:
            self._manager.update_novelty(0, keys[(None,) * (4 - len(keys.shape))])

    def _known_like(self, operation: str) -> Array:
        if self._like is None:
            raise InvalidArgument(
                f"[{operation}] the graph must hold a token, got none: call update_and_step first"
            )
        return self._like
