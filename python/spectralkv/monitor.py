"""The controller for an engine's loop."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence

from spectralkv import _core
from spectralkv._arrays import Array, StreamLike, handle_of
from spectralkv.config import EvictionConfig, GraphConfig, MonitorConfig, Solver, WalkConfig
from spectralkv.manager import ALL_LAYERS, GraphManager

__all__ = ["Monitor"]


class Monitor:
    """Decides when the graphs are walked and when the cache is cut.

    One monitor serves one batch::

        for each chunk of the prompt and each layer: monitor.on_prefill(layer, queries, keys)
        for each layer: monitor.on_prefill_end(layer, keys)
        for each step and each layer:
            monitor.on_step(layer, query, keys)
            if monitor.is_full(layer):
                kept = monitor.kept_counts(layer)
                keep = monitor.keep(layer, keys)
                monitor.graph.compact(layer, keep, keys, values, kept=kept)
        monitor.on_finish(sequence)

    Each sequence keeps its own schedule, so it is treated in a batch as it would be alone.
    Devices, frameworks and ``stream=`` are as in :class:`GraphManager`.

    Parameters
    ----------
    graph, walk, eviction
        Configurations.
    solver, walk_interval, top_fraction, row_stride, prompt_rows, head_budgets
        See :class:`spectralkv.MonitorConfig`.
    stream
        As of :class:`GraphManager`.

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
        prompt_rows: int = 1024,
        head_budgets: Sequence[Sequence[int]] = (),
        stream: StreamLike = None,
    ) -> None:
        self._config = MonitorConfig(
            eviction=eviction,
            solver=solver,
            walk_interval=walk_interval,
            top_fraction=top_fraction,
            row_stride=row_stride,
            prompt_rows=prompt_rows,
            head_budgets=tuple(map(tuple, head_budgets)),
        )
        # Asked for at each cut of each layer.
        self._evictions = [self._config.eviction_of(layer) for layer in range(graph.num_layers)]
        first = 0 if stream is None else handle_of(stream)
        self._core = _core.Monitor(
            graph._to_core(), walk._to_core(), self._config._to_core(), first
        )
        self._graph = GraphManager._wrap(self._core.graph, graph, walk, first)
        self._queue = self._graph._queue

    def __deepcopy__(self, memo: dict[int, object]) -> Monitor:
        graph, config = self._graph, self._config
        copied = Monitor(
            graph.graph_config,
            graph.walk_config,
            config.eviction,
            solver=config.solver,
            walk_interval=config.walk_interval,
            top_fraction=config.top_fraction,
            row_stride=config.row_stride,
            prompt_rows=config.prompt_rows,
            head_budgets=config.head_budgets,
            stream=graph._queue.enter(None),
        )
        for layer in range(graph.graph_config.num_layers):
            rooms = graph.rooms(layer)
            if rooms:
                copied.graph.divide(layer, rooms)
            else:
                copied.graph.reserve(layer, graph.capacity(layer))
            copied.graph.load_layer(layer, graph.save_layer(layer))
        return copied

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
        stream: StreamLike = None,
    ) -> None:
        """Take in a chunk of prompt; arguments as in :meth:`GraphManager.update_rows`."""
        self._queue.submit(
            self._core.on_prefill,
            layer,
            (queries, keys, valid),
            (scale or 0.0, softcap or 0.0),
            stream,
            keys,
        )

    def on_prefill_end(self, layer: int, keys: Array, *, stream: StreamLike = None) -> None:
        """Renew the importance of all sequences of a layer now that their prompt is complete."""
        self._queue.submit(self._core.on_prefill_end, layer, (keys,), (), stream, keys)

    def on_step(
        self,
        layer: int,
        query: Array,
        keys: Array,
        *,
        slots: Array | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        stream: StreamLike = None,
    ) -> None:
        """Take in one new token a sequence; arguments as in :meth:`GraphManager.update`.

        Renews the importance of the sequences whose ``walk_interval`` is over.
        """
        self._queue.submit(
            self._core.on_step,
            layer,
            (query, keys, slots),
            (scale or 0.0, softcap or 0.0),
            stream,
            keys,
        )

    def attend(
        self,
        layer: int,
        query: Array,
        keys: Array,
        values: Array,
        *,
        slots: Array | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        out: Array | None = None,
        stream: StreamLike = None,
    ) -> Array:
        """`on_step` with its attention; arguments and result as in :meth:`GraphManager.attend`."""
        attended = self._graph.attend(
            layer,
            query,
            keys,
            values,
            slots=slots,
            scale=scale,
            softcap=softcap,
            out=out,
            stream=stream,
        )
        self._renew_due(layer, keys, stream)
        return attended

    def admit(
        self,
        layer: int,
        queries: Array,
        keys: Array,
        *,
        valid: Array | None = None,
        stream: StreamLike = None,
    ) -> None:
        """Take in new tokens at a step, or at several, without rows, so that no key is scanned.

        Such tokens have no edges of their own; edges of later tokens lead to them. Arguments are as
        in `on_prefill`. Renews importance as `on_step` does.
        """
        self._graph.update_rows(layer, queries, keys, valid=valid, row_stride=0, stream=stream)
        self._renew_due(layer, keys, stream)

    def _renew_due(self, layer: int, keys: Array, stream: StreamLike) -> None:
        if self._config.walk_interval > 0:
            self._queue.submit(self._core.renew_due, layer, (keys,), (), stream, keys)

    def on_finish(self, sequence: int) -> None:
        """Free the slots of a sequence that has ended."""
        self._graph._here()
        self._core.on_finish(sequence)

    def is_full(self, layer: int) -> bool:
        """Whether a head of any sequence of the layer holds its ``budget + interval`` tokens."""
        return self._core.is_full(layer)

    def kept_counts(self, layer: int, *, force: bool = False) -> list[int]:
        """Tokens that each head keeps after the cut, see :meth:`GraphManager.kept_counts`.

        Handed to :meth:`GraphManager.compact` or `release` it spares them counting, for which they
        would wait on CUDA.
        """
        return self._graph.kept_counts(layer, self._evictions[layer], force=force)

    def keep(self, layer: int, keys: Array, *, stream: StreamLike = None) -> Array:
        """Slots that stay: int32 (B, Hkv, M) of the framework of ``keys`` (B, Hkv, S, D).

        Ascending, see :meth:`GraphManager.select`. First renews the
        importance of full sequences that got tokens since their last walk.
        """
        shape = (
            self._graph.batch_size(layer),
            self._graph.graph_config.num_kv_heads,
            self._core.kept_length(layer),
        )
        queue = self._queue
        return queue.filled(
            keys,
            shape,
            "int32",
            lambda out, handle: self._core.keep(layer, queue.read(keys, handle), out, handle),
            stream,
        )

    def renew(self, layer: int, keys: Array, *, stream: StreamLike = None) -> None:
        """Renew the importance of the sequences of a layer that got tokens since their last walk.

        A cut that follows at once takes it as it is.
        """
        self._renew({layer: keys}, {layer: self._with_news(layer)}, stream)

    def keep_all(
        self, keys: Mapping[int, Array], *, force: bool = False, stream: StreamLike = None
    ) -> dict[int, Array]:
        """Slots that stay in several layers, as `keep` returns them; their walks go together.

        Parameters
        ----------
        keys
            (B, Hkv, S, D) of each layer, by its index.
        force
            Cut every sequence that holds more than the budget.
        stream
            See :class:`GraphManager`. Replays of a capture cut the sequences that were full, as far
            as the host knew, when it was made.
        """
        graph = self._graph
        self._renew(keys, {layer: self._to_renew(layer, force=force) for layer in keys}, stream)
        return {
            layer: graph.select(
                layer, self._evictions[layer], like=tensor, force=force, stream=stream
            )
            for layer, tensor in keys.items()
        }

    def _renew(
        self, keys: Mapping[int, Array], marks: Mapping[int, list[bool]], stream: StreamLike
    ) -> None:
        """Renew the importance of the sequences that are marked, of all layers together."""
        graph = self._graph
        renew = graph.solve if self._config.solver == "exact" else graph.walk
        due = [layer for layer in keys if any(marks[layer])]
        if graph.walk_config.needs_novelty:
            for layer in due:
                graph.update_novelty(layer, keys[layer], stream=stream)
        if len(due) == graph.graph_config.num_layers and len(set(map(tuple, marks.values()))) == 1:
            renew(ALL_LAYERS, marks[due[0]], beside=False, stream=stream)
        else:
            for layer in due:
                renew(layer, marks[layer], beside=False, stream=stream)

    def _to_renew(self, layer: int, *, force: bool) -> list[bool]:
        """Sequences that are cut and got tokens since their last walk."""
        full = self._graph.full_sequences(layer, self._evictions[layer], force=force)
        return list(map(operator.and_, full, self._with_news(layer)))

    def _with_news(self, layer: int) -> list[bool]:
        """Sequences that got tokens since their last walk."""
        graph = self._graph
        return [
            graph.tokens_walked(layer, sequence) != graph.tokens_seen(layer, sequence)
            for sequence in range(graph.batch_size(layer))
        ]

    def set_head_budgets(self, layer: int, budgets: Sequence[int]) -> None:
        """Let the heads of a layer keep so many tokens each from now on; empty: the budget.

        Heads that hold more are cut back at the next cut.
        """
        self._core.set_head_budgets(layer, list(budgets))
        rows = list(self._config.head_budgets or [()] * len(self._evictions))
        rows[layer] = tuple(budgets)
        self._config = dataclasses.replace(self._config, head_budgets=tuple(rows))
        self._evictions[layer] = self._config.eviction_of(layer)

    def safety_mask(self, layer: int, *, like: Array, stream: StreamLike = None) -> Array:
        """Which tokens may go: uint8 (B, Hkv, length), see :meth:`GraphManager.safety_mask`."""
        shape = (
            self._graph.batch_size(layer),
            self._graph.graph_config.num_kv_heads,
            self._graph.length(layer),
        )
        return self._queue.filled(
            like,
            shape,
            "uint8",
            lambda out, handle: self._core.safety_mask(layer, out, handle),
            stream,
        )
