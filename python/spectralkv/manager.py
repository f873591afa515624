"""The graphs of a model, over tensors of any framework."""

from __future__ import annotations

from collections.abc import Sequence

from spectralkv import _core
from spectralkv._arrays import Array, Queue, StreamLike, handle_of
from spectralkv._core import ALL_LAYERS, MemoryUse, Statistics
from spectralkv.config import EvictionConfig, GraphConfig, WalkConfig

__all__ = ["ALL_LAYERS", "GraphManager"]


class GraphManager:
    """One graph for each layer, sequence and KV head.

    A *slot* is where a token's key lies in the cache, its *position* where it stands in the text.
    Slots ``[0, length)`` are in use. Tensors are of any DLPack framework (torch, numpy, cupy,
    jax); axes are B sequences, Hq query heads, Hkv KV heads, S slots, Q tokens, D head_dim and
    K neighbours. Keys and queries are float32, float16 or bfloat16 with a contiguous last axis;
    nothing is copied. All tensors lie on ``graph.device``.

    On CUDA calls are queued and return; nothing is waited for, and no stream but the call's own
    and the manager's is touched. By default that is the current stream of the tensors' framework
    on the manager's device, and of a call without tensors that of the call before it. ``stream=``
    names another one: its handle as an integer, or an object with ``cuda_stream`` (torch), ``ptr``
    (cupy) or ``__cuda_stream__``. A CUDA graph captures these calls after `synchronize`, as long
    as nothing must be allocated or counted by the host; `refresh` follows its replays.

    jax has no streams to name. Calls with its arrays use the legacy default stream, wait for what
    computes the arrays on the device, and return when the device is done.

    Parameters
    ----------
    graph, walk
        Configurations.
    stream
        Where the graphs' memory is first written, on CUDA; None: the legacy default stream. A
        process that works on a stream of its own names it here, and so uses no other one.

    Raises
    ------
    InvalidArgument
        A ``ValueError``; the manager is as it was before the call.
    BackendUnavailable
        A ``RuntimeError``: there is no backend for ``graph.device`` here.
    CudaError
        A ``RuntimeError``: a call of the CUDA runtime failed.
    """

    def __init__(
        self, graph: GraphConfig, walk: WalkConfig | None = None, *, stream: StreamLike = None
    ) -> None:
        self._graph_config = graph
        self._walk_config = walk or WalkConfig()
        first = 0 if stream is None else handle_of(stream)
        self._core = _core.GraphManager(graph._to_core(), self._walk_config._to_core(), first)
        self._queue = Queue(graph.device, self._core.synchronize, first)

    @classmethod
    def _wrap(
        cls, core: _core.GraphManager, graph: GraphConfig, walk: WalkConfig, first: int
    ) -> GraphManager:
        self = cls.__new__(cls)
        self._graph_config = graph
        self._walk_config = walk
        self._core = core
        self._queue = Queue(graph.device, core.synchronize, first)
        return self

    def _here(self) -> _core.GraphManager:
        """Return the core, whose next call without a stream goes where the caller works."""
        self._core.use_stream(self._queue.enter(None))
        return self._core

    @property
    def graph_config(self) -> GraphConfig:
        """Configuration of the graphs."""
        return self._graph_config

    @property
    def walk_config(self) -> WalkConfig:
        """Configuration of the walks."""
        return self._walk_config

    # -- growing the graph

    def update(
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
        """Draw the row of one new token a sequence.

        Parameters
        ----------
        layer
            Which layer.
        query
            (B, Hq, D), with its rotary position.
        keys
            (B, Hkv, S, D), the new token's key already in its slot.
        slots
            int32 (B, Hkv): a free slot of each head (see `next_slots`); None: the slot ``length``.
        scale, softcap
            How the model scales and caps scores; None: ``1 / sqrt(D)`` and no cap.
        stream
            See the class.
        """
        self._queue.submit(
            self._core.update,
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
        """Attend with one new token a sequence, and draw its row: `update` with its attention.

        The scores that the attention needs give the row of the graph, so keys are read once for
        both.

        Parameters
        ----------
        layer
            Which layer.
        query
            (B, Hq, D), with its rotary position.
        keys, values
            (B, Hkv, S, D), of query's dtype, the new token's key and value already in its slot.
            Slots without a token are not attended to.
        slots, scale, softcap
            As in `update`.
        out
            (B, Hq, D) of query's dtype, written; None: a new tensor of query's framework.
        stream
            See the class.

        Returns
        -------
        out
            NaN where a head sees nothing with a finite score.

        Raises
        ------
        InvalidArgument
            As `update`; or values or ``out`` do not fit; or on CUDA D is above 256.
        """
        queue = self._queue

        def write(into: Array, handle: int) -> None:
            self._core.attend(
                layer,
                queue.read(query, handle),
                queue.read(keys, handle),
                queue.read(values, handle),
                queue.read(slots, handle),
                into,
                scale or 0.0,
                softcap or 0.0,
                handle,
            )

        if out is None:
            return queue.filled(query, query.shape, None, write, stream)
        handle = queue.enter(stream, keys)
        try:
            write(queue.write(out, handle), handle)
        finally:
            queue.leave()
        return out

    def update_rows(
        self,
        layer: int,
        queries: Array,
        keys: Array,
        *,
        valid: Array | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        row_stride: int = 1,
        stream: StreamLike = None,
    ) -> None:
        """Draw the rows of Q new tokens a sequence, appended at slots ``[length, length + Q)``.

        Parameters
        ----------
        layer
            Which layer.
        queries
            (B, Hq, Q, D); each token sees the tokens up to itself.
        keys
            (B, Hkv, S, D) with the new tokens' keys in their slots.
        valid
            bool or uint8 (B, Q): False marks padding, which takes a slot but no position.
        scale, softcap
            As in `update`.
        row_stride
            Only every so many tokens, counted from the newest, get a row. 0: none does; they take
            their slots, and neither queries nor keys are read.
        stream
            See the class. With ``valid`` the call waits for the device, to count the tokens.
        """
        self._queue.submit(
            self._core.update_rows,
            layer,
            (queries, keys, valid),
            (scale or 0.0, softcap or 0.0, row_stride),
            stream,
            keys,
        )

    # -- importance

    def update_novelty(self, layer: int, keys: Array, *, stream: StreamLike = None) -> None:
        """Renew the restart weights of novelty populations from the keys (B, Hkv, S, D)."""
        self._queue.submit(self._core.update_novelty, layer, (keys,), (), stream, keys)

    def load_restart_weights(
        self, layer: int, weights: Array, *, stream: StreamLike = None
    ) -> None:
        """Replace the restart weights of novelty populations.

        Parameters
        ----------
        layer
            Which layer.
        weights
            uint32 (B, G, length), relative to each other; a slot without a token has none.
        stream
            See the class.
        """
        self._queue.submit(self._core.load_restart_weights, layer, (weights,), (), stream, weights)

    def walk(
        self,
        layer: int = ALL_LAYERS,
        sequences: Sequence[bool] = (),
        *,
        beside: bool = True,
        stream: StreamLike = None,
    ) -> None:
        """Walk the graphs of a layer, or of all; of the marked sequences, or of all.

        Populations with ``solver="exact"`` are solved instead, as `solve` does. On CUDA this runs
        beside what the caller queues next, on a stream of the manager's own, until a call needs its
        result. With ``beside=False`` it runs on the caller's: for callers that need it at once.
        """
        handle = self._queue.enter(stream)
        self._core.walk(layer, [int(mark) for mark in sequences], handle, beside)

    def solve(
        self,
        layer: int = ALL_LAYERS,
        sequences: Sequence[bool] = (),
        *,
        beside: bool = True,
        stream: StreamLike = None,
    ) -> None:
        """Compute the same scores of all populations without noise, in units of visits.

        `beside` is as in `walk`.
        """
        handle = self._queue.enter(stream)
        self._core.solve(layer, [int(mark) for mark in sequences], handle, beside)

    def update_and_step(
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
        """`update`, `update_novelty` where the walk needs it, and `walk`."""
        self._queue.submit(
            self._core.update_and_step,
            layer,
            (query, keys, slots),
            (scale or 0.0, softcap or 0.0),
            stream,
            keys,
        )

    def scores(
        self, layer: int, *, like: Array, population: int = -1, stream: StreamLike = None
    ) -> Array:
        """Decayed visits of a population, or of all together: float32 (B, Hkv, length).

        The result is of the framework of ``like``, on its device; so it is with all results.
        """
        return self._queue.filled(
            like,
            self._slot_shape(layer),
            "float32",
            lambda out, handle: self._core.scores(layer, out, population, handle),
            stream,
        )

    def visits(
        self, layer: int, *, like: Array, population: int = 0, stream: StreamLike = None
    ) -> Array:
        """Visits of a population in the last walk: uint32 (B, Hkv, length).

        Where it was solved exactly, what is expected of a walk, rounded.
        """
        return self._queue.filled(
            like,
            self._slot_shape(layer),
            "uint32",
            lambda out, handle: self._core.visits(layer, out, population, handle),
            stream,
        )

    # -- eviction

    def is_full(self, layer: int, eviction: EvictionConfig) -> bool:
        """Whether a head of any sequence holds its ``budget + interval`` tokens or more."""
        return self._core.is_full(layer, eviction._to_core())

    def full_sequences(
        self, layer: int, eviction: EvictionConfig, *, force: bool = False
    ) -> list[bool]:
        """Which sequences `select` cuts, with ``force`` as there."""
        marks = self._core.full_sequences(layer, eviction._to_core(), force)
        return [bool(mark) for mark in marks]

    def kept_length(self, layer: int, eviction: EvictionConfig, *, force: bool = False) -> int:
        """Slots a head needs after `select`: the M of its result."""
        return self._core.kept_length(layer, eviction._to_core(), force)

    def kept_counts(
        self, layer: int, eviction: EvictionConfig, *, force: bool = False
    ) -> list[int]:
        """Tokens that each head keeps after `select`.

        One entry a sequence; one a head, (B, Hkv) flattened, where heads have budgets of their own
        or hold different numbers.
        """
        return self._core.kept_counts(layer, eviction._to_core(), force)

    def select(
        self,
        layer: int,
        eviction: EvictionConfig,
        *,
        like: Array,
        force: bool = False,
        stream: StreamLike = None,
    ) -> Array:
        """Slots that stay: int32 (B, Hkv, M), ascending, right-aligned behind -1.

        Of a sequence that is full (``force``: that holds more than the budget) a head keeps its
        sinks, its window and, each population its share, the highest scores; of equal scores the
        newer token stays. Other sequences keep all they have. M is the most that a head keeps. With
        ``head_budgets`` lists are left-aligned, -1 behind them.
        """
        core = eviction._to_core()
        batch, heads, _ = self._slot_shape(layer)
        return self._queue.filled(
            like,
            (batch, heads, self._core.kept_length(layer, core, force)),
            "int32",
            lambda out, handle: self._core.select(layer, core, force, out, handle),
            stream,
        )

    def safety_mask(
        self,
        layer: int,
        eviction: EvictionConfig,
        top_fraction: float,
        *,
        like: Array,
        stream: StreamLike = None,
    ) -> Array:
        """Which tokens may go: uint8 (B, Hkv, length).

        1 where a token is not among the best ``top_fraction`` of its head's scores and lies outside
        sinks and window.
        """
        core = eviction._to_core()
        return self._queue.filled(
            like,
            self._slot_shape(layer),
            "uint8",
            lambda out, handle: self._core.safety_mask(layer, core, top_fraction, out, handle),
            stream,
        )

    def compact(
        self,
        layer: int,
        keep: Array,
        keys: Array | None = None,
        values: Array | None = None,
        *,
        kept: Sequence[int] = (),
        stream: StreamLike = None,
    ) -> None:
        """Move the kept slots to the front, in place.

        Parameters
        ----------
        layer
            Which layer.
        keep
            int32 (B, Hkv, M) as `select` returns it.
        keys, values
            (B, Hkv, S, D), mutated; None: only the graph moves.
        kept
            How many slots of ``keep`` are not -1, as `kept_counts` returns it. Left out, they are
            counted, for which the call waits on CUDA.
        stream
            See the class.
        """
        queue = self._queue
        handle = queue.enter(stream, keep)
        try:
            self._core.compact(
                layer,
                queue.read(keep, handle),
                queue.write(keys, handle),
                queue.write(values, handle),
                list(kept),
                handle,
            )
        finally:
            queue.leave()

    def release(
        self,
        layer: int,
        keep: Array,
        *,
        kept: Sequence[int] = (),
        stream: StreamLike = None,
    ) -> None:
        """Free every slot that is not in ``keep`` int32 (B, Hkv, M); nothing moves.

        ``kept`` is as in `compact`.
        """
        self._queue.submit(self._core.release, layer, (keep,), (list(kept),), stream, keep)

    def next_slots(self, layer: int, *, like: Array, stream: StreamLike = None) -> Array:
        """Find the lowest free slot of each head: int32 (B, Hkv)."""
        return self._queue.filled(
            like,
            self._slot_shape(layer)[:2],
            "int32",
            lambda out, handle: self._core.next_slots(layer, out, handle),
            stream,
        )

    def place(
        self,
        layer: int,
        new_keys: Array,
        new_values: Array,
        keys: Array,
        values: Array,
        *,
        stream: StreamLike = None,
    ) -> Array:
        """Write a new token's key and value into the lowest free slot of each head, in place.

        Parameters
        ----------
        layer : int
            Index of the layer.
        new_keys, new_values
            (B, Hkv, D) and (B, Hkv, Dv): one new token a sequence.
        keys, values
            (B, Hkv, S, D) and (B, Hkv, S, Dv), of the same dtypes: written. Not of jax, whose
            arrays never change.
        stream
            CUDA stream to work on; None: the framework's current one.

        Returns
        -------
        slots
            int32 (B, Hkv), for `update`, which takes them.

        Raises
        ------
        InvalidArgument
            Shapes or dtypes differ, or a head has no free slot.
        """
        queue = self._queue

        def write(out: Array, handle: int) -> None:
            self._core.place(
                layer,
                queue.read(new_keys, handle),
                queue.read(new_values, handle),
                queue.write(keys, handle),
                queue.write(values, handle),
                out,
                handle,
            )

        return queue.filled(keys, self._slot_shape(layer)[:2], "int32", write, stream)

    # -- sequences

    def truncate(self, layer: int, count: int) -> None:
        """Forget the newest ``count`` tokens; all of them must still be there."""
        self._here().truncate(layer, count)

    def select_batch(self, layer: int, sequences: Sequence[int]) -> None:
        """Make sequence i a copy of what ``sequences[i]`` was."""
        self._here().select_batch(layer, list(sequences))

    def reset(self, layer: int = ALL_LAYERS, sequence: int | None = None) -> None:
        """Forget all tokens; random numbers go on."""
        self._here().reset(layer, sequence)

    def reserve(self, layer: int, capacity: int) -> None:
        """Give each head of a layer room for ``capacity`` slots, no less than its length."""
        self._here().reserve(layer, capacity)

    def divide(self, layer: int, rooms: Sequence[int]) -> None:
        """Give each head of a layer a room of its own: slots in a pool that the heads share.

        From then on keys and values of the layer are (B, 1, pool, D): head behind head, each with
        ``rooms[head]`` slots. Slots keep their numbers, which count from the beginning of a room,
        so every token must lie in what becomes its head's room, as it does behind `select` with
        ``head_budgets`` and `compact`. Until `reserve` makes the layer even again, new tokens need
        slots (see `place`), and `update_rows` and `compact` refuse it. Waits for the device.

        Raises
        ------
        InvalidArgument
            A room is smaller than what its head holds, or heads share a graph.
        """
        self._here().divide(layer, list(rooms))

    def synchronize(self) -> None:
        """Wait for the device's work of this manager."""
        self._core.synchronize()

    def refresh(self) -> None:
        """Read lengths and counts from the device, after replays of captured calls; waits."""
        self._here().refresh()

    # -- inspection

    def length(self, layer: int) -> int:
        """Slots in use."""
        return self._core.length(layer)

    def capacity(self, layer: int) -> int:
        """Slots that a head has room for; of a divided layer: the most that one has."""
        return self._core.capacity(layer)

    def rooms(self, layer: int) -> list[int]:
        """Slots of each head of a divided layer; empty: the layer is even."""
        return self._core.rooms(layer)

    def batch_size(self, layer: int) -> int:
        """Sequences of a layer."""
        return self._core.batch_size(layer)

    def tokens_seen(self, layer: int, sequence: int = 0) -> int:
        """Tokens a sequence has seen, evicted ones included."""
        return self._core.tokens_seen(layer, sequence)

    def tokens_held(self, layer: int, sequence: int = 0) -> int:
        """Tokens that the head of a sequence holds that holds most."""
        return self._core.tokens_held(layer, sequence)

    def tokens_walked(self, layer: int, sequence: int = 0) -> int:
        """`tokens_seen` at the sequence's last walk or solve; -1 if none covers what it holds."""
        return self._core.tokens_walked(layer, sequence)

    @property
    def graphs_per_sequence(self) -> int:
        """Graphs that a sequence has in a layer: Hkv, or 1 where a layer's heads share one."""
        return self._core.graphs_per_sequence()

    def positions(self, layer: int, *, like: Array, stream: StreamLike = None) -> Array:
        """Position of the token in each slot, -1 if empty: int32 (B, Hkv, length)."""
        return self._queue.filled(
            like,
            self._slot_shape(layer),
            "int32",
            lambda out, handle: self._core.positions(layer, out, handle),
            stream,
        )

    def rows(self, layer: int, *, like: Array, stream: StreamLike = None) -> tuple[Array, Array]:
        """Neighbours int32 and probabilities float32, both (B, G, length, K).

        G is the number of graphs a sequence. Absent and stale edges are -1 and 0; the others are as
        walks follow them: a row sums to 1, or to less with ``edge_law="attention"``.
        """
        batch, _, length = self._slot_shape(layer)
        shape = (
            batch,
            self.graphs_per_sequence,
            length,
            self._graph_config.top_k,
        )
        probabilities: list[Array] = []

        def write(neighbors: Array, _: int) -> None:
            probabilities.append(
                self._queue.filled(
                    like,
                    shape,
                    "float32",
                    lambda out, handle: self._core.rows(layer, neighbors, out, handle),
                    stream,
                )
            )

        neighbors = self._queue.filled(like, shape, "int32", write, stream)
        return neighbors, probabilities[0]

    def load_rows(
        self,
        layer: int,
        positions: Array,
        neighbors: Array,
        probabilities: Array,
        *,
        stream: StreamLike = None,
    ) -> None:
        """Replace the graphs of a layer.

        Parameters
        ----------
        layer
            Which layer.
        positions
            int32 (B, G, S), unique in a graph where not -1.
        neighbors, probabilities
            int32 and float32 (B, G, S, K): edges to slots with older tokens; a row's probabilities
            sum to 1, or to 0 where it has no edges; with ``edge_law="attention"`` to 1 at most.
        stream
            See the class; the call waits.
        """
        self._queue.submit(
            self._core.load_rows,
            layer,
            (positions, neighbors, probabilities),
            (),
            stream,
            positions,
        )

    def save_layer(self, layer: int) -> bytes:
        """Return all that the graphs of a layer hold; waits.

        A manager of the same configuration, on any device, that loads it goes on as this one
        would. After replays of captured calls, `refresh` first.
        """
        return self._here().save_layer(layer)

    def load_layer(self, layer: int, saved: bytes) -> None:
        """Replace a layer, its number of sequences included, by a saved one; waits.

        Raises
        ------
        InvalidArgument
            A ``ValueError``: the bytes are damaged, of another version, or of graphs with another
            edge law, top_k, scope, number of heads or populations; or they are longer than the
            layer's capacity.
        """
        self._here().load_layer(layer, saved)

    def restart_distribution(
        self, layer: int, population: int, *, like: Array, stream: StreamLike = None
    ) -> Array:
        """Where a population's walkers restart: float32 (B, G, length), sums to 1."""
        batch, _, length = self._slot_shape(layer)
        return self._queue.filled(
            like,
            (batch, self.graphs_per_sequence, length),
            "float32",
            lambda out, handle: self._core.restart_distribution(layer, population, out, handle),
            stream,
        )

    def statistics(self) -> Statistics:
        """Rows drawn, rows left empty because of NaN or infinity, walks, tokens evicted."""
        return self._here().statistics()

    def memory_use(self) -> MemoryUse:
        """Bytes of the graphs and of scratch buffers."""
        return self._core.memory_use()

    def _slot_shape(self, layer: int) -> tuple[int, int, int]:
        return (
            self._core.batch_size(layer),
            self._graph_config.num_kv_heads,
            self._core.length(layer),
        )
