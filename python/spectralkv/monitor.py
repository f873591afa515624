"""The controller for an engine's loop."""

from __future__ import annotations

from spectralkv import _core
from spectralkv._arrays import Array, filled, readable
from spectralkv.config import EvictionConfig, GraphConfig, MonitorConfig, Solver, WalkConfig
from spectralkv.manager import GraphManager

__all__ = ["Monitor"]


class Monitor:
    """Decides when the graphs are walked and when the cache is cut.

    One monitor serves one batch::

        for each chunk of the prompt and each layer: monitor.on_prefill(layer, queries, keys)
        for each layer: monitor.on_prefill_end(layer, keys)
        for each step and each layer:
            monitor.on_step(layer, query, keys)
            if monitor.is_full(layer):
                keep = monitor.keep(layer, keys)
                monitor.graph.compact(layer, keep, keys, values)
        monitor.on_finish(sequence)

    Each sequence keeps its own schedule, so it is treated in a batch as it would be alone.

    Parameters
    ----------
    graph, walk, eviction
        Configurations.
    solver, walk_interval, top_fraction, row_stride
        See :class:`spectralkv.MonitorConfig`.

    Raises
    ------
    InvalidArgument
        A ``ValueError``; the monitor is as it was before the call.
    BackendUnavailable
        A ``RuntimeError``: there is no backend for ``graph.device`` here.
    """

    def __init__(
        self,
        graph: GraphConfig,
        walk: WalkConfig,
        eviction: EvictionConfig,
        *,
        solver: Solver = "walk",
        walk_interval: int = 0,
        top_fraction: float = 0.2,
        row_stride: int = 1,
    ) -> None:
        self._config = MonitorConfig(
            eviction=eviction,
            solver=solver,
            walk_interval=walk_interval,
            top_fraction=top_fraction,
            row_stride=row_stride,
        )
        self._core = _core.Monitor(graph._to_core(), walk._to_core(), self._config._to_core())
        self._graph = GraphManager._wrap(self._core.graph, graph, walk)

    @property
    def config(self) -> MonitorConfig:
        """Settings."""
        return self._config

    @property
    def graph(self) -> GraphManager:
        """The graphs that this monitor looks after."""
        return self._graph

    def on_prefill(
        self,
        layer: int,
        queries: Array,
        keys: Array,
        *,
        valid: Array | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        """Take in a chunk of prompt; arguments as in :meth:`GraphManager.update_rows`."""
        self._core.on_prefill(
            layer, readable(queries), readable(keys), valid, scale or 0.0, softcap or 0.0
        )

    def on_prefill_end(self, layer: int, keys: Array) -> None:
        """Renew the importance of all sequences of a layer now that their prompt is complete."""
        self._core.on_prefill_end(layer, readable(keys))

    def on_step(
        self,
        layer: int,
        query: Array,
        keys: Array,
        *,
        slots: Array | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> None:
        """Take in one new token a sequence; arguments as in :meth:`GraphManager.update`.

        Renews the importance of the sequences whose ``walk_interval`` is over.
        """
        self._core.on_step(
            layer, readable(query), readable(keys), slots, scale or 0.0, softcap or 0.0
        )

    def on_finish(self, sequence: int) -> None:
        """Free the slots of a sequence that has ended."""
        self._core.on_finish(sequence)

    def is_full(self, layer: int) -> bool:
        """Whether any sequence of the layer holds ``budget + interval`` tokens."""
        return self._core.is_full(layer)

    def keep(self, layer: int, keys: Array) -> Array:
        """Slots that stay: int32 (B, Hkv, M) of the framework of ``keys`` (B, Hkv, S, D).

        Ascending and right-aligned behind -1, see :meth:`GraphManager.select`. First renews the
        importance of full sequences that got tokens since their last walk.
        """
        keys = readable(keys)
        shape = (
            self._graph.batch_size(layer),
            self._graph.graph_config.num_kv_heads,
            self._core.kept_length(layer),
        )
        return filled(keys, shape, "int32", lambda out: self._core.keep(layer, keys, out))

    def safety_mask(self, layer: int, *, like: Array) -> Array:
        """Which tokens may go: uint8 (B, Hkv, length), see :meth:`GraphManager.safety_mask`."""
        shape = (
            self._graph.batch_size(layer),
            self._graph.graph_config.num_kv_heads,
            self._graph.length(layer),
        )
        return filled(like, shape, "uint8", lambda out: self._core.safety_mask(layer, out))
