"""One layer's graph in the shapes that people have at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from spectralkv._arrays import Array, StreamLike
from spectralkv._core import InvalidArgument, MemoryUse, Statistics
from spectralkv.config import (
    EdgeLaw,
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
        Edge law, top_k and walk: ``"default"``, ``"walks"``, ``"uniform32"`` or ``"weighted4"``.
    walk
        Used instead of the preset's walk.
    top_k, edge_law
        Used instead of the preset's.
    pack_rows, scope, num_sinks, seed, device, num_threads, eager_checks
        See :class:`spectralkv.GraphConfig`. Tensors lie on ``device``; how calls are ordered on
        CUDA, and ``stream=``, are as in :class:`spectralkv.GraphManager`.

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
        edge_law: EdgeLaw | None = None,
        pack_rows: bool = True,
        scope: GraphScope = "head",
        num_sinks: int = 4,
        seed: int = 0,
        device: str = "cpu",
        num_threads: int = 0,
        eager_checks: bool = False,
    ) -> None:
        graph, preset_walk = apply_preset(
            preset,
            GraphConfig(
                batch_size=batch_size,
                num_query_heads=num_kv_heads if num_query_heads is None else num_query_heads,
                num_kv_heads=num_kv_heads,
                head_dim=head_dim,
                capacity=capacity,
                pack_rows=pack_rows,
                scope=scope,
                num_sinks=num_sinks,
                seed=seed,
                device=device,
                num_threads=num_threads,
                eager_checks=eager_checks,
            ),
        )
        if top_k is not None:
            graph = replace(graph, top_k=top_k)
        if edge_law is not None:
            graph = replace(graph, edge_law=edge_law)
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

    def update_and_step(
        self, query: Array, keys: Array, current_idx: int, *, stream: StreamLike = None
    ) -> None:
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
        stream
            See :class:`spectralkv.GraphManager`.
        """
        query, keys = self._batched(query, keys, query_rank=3)
        slots = self._slots(current_idx, keys, stream)
        self._manager.update_and_step(0, query, keys, slots=slots, stream=stream)

    def update(
        self, query: Array, keys: Array, current_idx: int, *, stream: StreamLike = None
    ) -> None:
        """`update_and_step` without the walk."""
        query, keys = self._batched(query, keys, query_rank=3)
        slots = self._slots(current_idx, keys, stream)
        self._manager.update(0, query, keys, slots=slots, stream=stream)

    def update_rows(self, queries: Array, keys: Array, *, stream: StreamLike = None) -> None:
        """Take in Q tokens at once, a prompt for instance, behind those already held.

        Parameters
        ----------
        queries
            (Q, D), (Hq, Q, D) or (B, Hq, Q, D).
        keys
            (N, D), (Hkv, N, D) or (B, Hkv, N, D), with all new keys in their slots.
        stream
            See :class:`spectralkv.GraphManager`.
        """
        queries, keys = self._batched(queries, keys, query_rank=4)
        self._manager.update_rows(0, queries, keys, stream=stream)

    def walk(self, keys: Array | None = None, *, stream: StreamLike = None) -> None:
        """Renew the scores, by random walks or, of exact populations, exactly.

        Novelty restarts are renewed from ``keys`` if given.
        """
        self._renew_novelty(keys, stream)
        self._manager.walk(0, stream=stream)

    def solve(self, keys: Array | None = None, *, stream: StreamLike = None) -> None:
        """Renew the scores exactly; novelty restarts are renewed from ``keys`` if given."""
        self._renew_novelty(keys, stream)
        self._manager.solve(0, stream=stream)

    def get_scores(self, *, stream: StreamLike = None) -> Array:
        """Return the importance of every slot in use, in the framework of the last keys.

        Returns
        -------
        Array
            float32 (length,), (Hkv, length) or (B, Hkv, length), like the last keys.
        """
        like = self._known_like("get_scores")
        return self._unbatched(self._manager.scores(0, like=like, stream=stream))

    def positions(self, *, stream: StreamLike = None) -> Array:
        """Position of the token in each slot, -1 if empty: int32, shaped as the scores."""
        like = self._known_like("positions")
        return self._unbatched(self._manager.positions(0, like=like, stream=stream))

    def select(
        self, budget: int, *, window: int = 50, sinks: int = 4, stream: StreamLike = None
    ) -> Array:
        """Slots to keep when every head is cut to ``budget`` tokens: int32, ascending.

        Returns
        -------
        Array
            (M,), (Hkv, M) or (B, Hkv, M), like the last keys.
        """
        eviction = EvictionConfig(budget=budget, interval=1, window=window, sinks=sinks)
        like = self._known_like("select")
        keep = self._manager.select(0, eviction, like=like, force=True, stream=stream)
        return self._unbatched(keep)

    def compact(
        self,
        keep: Array,
        keys: Array,
        values: Array | None = None,
        *,
        stream: StreamLike = None,
    ) -> None:
        """Move the kept slots of keys, values and graph to the front, in place."""
        rank = len(keys.shape)
        add = (None,) * (4 - rank)
        moved = None if values is None else values[add]
        self._manager.compact(0, keep[add], keys[add], moved, stream=stream)

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

    def _slots(self, current_idx: int, keys: Array, stream: StreamLike) -> Array | None:
        length = self._manager.length(0)
        if current_idx == length:
            return None
        if current_idx > length:
            raise InvalidArgument(
                f"[SpectralGraph] current_idx must be at most the next slot {length}, "
                f"got {current_idx}"
            )
        shape = (self._manager.batch_size(0), self._manager.graph_config.num_kv_heads)
        return self._manager._queue.constant_int32(current_idx, shape, keys, stream)

    def _renew_novelty(self, keys: Array | None, stream: StreamLike) -> None:
        if keys is not None and self._manager.walk_config.needs_novelty:
            keys = keys[(None,) * (4 - len(keys.shape))]
            self._manager.update_novelty(0, keys, stream=stream)

    def _known_like(self, operation: str) -> Array:
        if self._like is None:
            raise InvalidArgument(
                f"[{operation}] the graph must hold a token, got none: call update_and_step first"
            )
        return self._like
