"""A cache under a rule, simulated densely: all layers, sequences and heads in one tensor.

The figures are those that `spectralkv.evaluation` would give: text is fed a few tokens at a time,
every cut leaves exactly the budget, and what is evicted is gone. The code is another, so that a
rule costs a few lines and all heads are rated at once.

One difference: while a question is read and answered, nothing more is evicted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional

from search.attention import Replayed
from search.model import Decoder
from search.scores import Memory, Pass, View
from search.selection import Division, Rule, choose, merge_into
from spectralkv.evaluation.answering import context_passes
from spectralkv.evaluation.haystack import encode
from spectralkv.evaluation.needle import Case

# Most tokens of a pass: what attention of all layers is held at once grows with it.
_MOST_AT_ONCE = 64
# Of rules with Division.profile, at each budget: see Simulation.profile.
_PROFILES: dict[tuple[Rule, int], torch.Tensor] = {}
# Logits that are turned to nats at a time: 64 MiB in float32.
_BLOCK_ELEMENTS = 1 << 24


class Foresight:
    """Attention that the full cache pays, pass by pass; for `search.scores.Future`."""

    def __init__(self) -> None:
        self._begins: list[int] = []
        self._drawn: list[torch.Tensor] = []  # each (L, B, Hkv, N)

    def add(self, begin: int, drawn: torch.Tensor) -> None:
        """Take what the queries from position `begin` on paid to the tokens of the text."""
        self._begins.append(begin)
        self._drawn.append(drawn)

    def coming(self, seen: int, ahead: int | None) -> torch.Tensor:
        """Return (L, B, Hkv, N) of the passes that begin in the next `ahead` tokens."""
        last = float("inf") if ahead is None else seen + ahead
        total = torch.zeros_like(self._drawn[0])
        for begin, drawn in zip(self._begins, self._drawn, strict=True):
            if seen <= begin < last:
                total += drawn
        return total


class Simulation:
    """A batch of sequences and their cache.

    Parameters
    ----------
    decoder : Decoder
        The model.
    ids : torch.Tensor
        int64 (B, N): texts of one length.
    rule : Rule or None
        None: the full cache.
    budget : int
        Tokens a head keeps (on average, where heads compete).
    interval : int
        A cut is due when so many tokens more are held.
    foresight : Foresight or None
        What limits know.
    record : Foresight or None
        Takes what is paid, for a later run.
    """

    def __init__(
        self,
        decoder: Decoder,
        ids: torch.Tensor,
        rule: Rule | None = None,
        *,
        budget: int = 0,
        interval: int = 32,
        foresight: Foresight | None = None,
        record: Foresight | None = None,
    ) -> None:
        self.decoder, self.ids, self.rule = decoder, ids, rule
        self.budget, self.interval = budget, interval
        self._foresight, self._record = foresight, record
        batch, length = ids.shape
        shape = (decoder.num_layers, batch, decoder.heads)
        options = {"device": decoder.device, "dtype": decoder.dtype}
        self.keys = torch.empty(*shape, 0, decoder.head_dim, **options)
        self.values = self.keys.clone()
        self.positions = torch.empty(*shape, 0, device=decoder.device, dtype=torch.long)
        self.mass: torch.Tensor | None = None  # (L, B, Hkv, S): tokens that a slot stands for
        self.bias: torch.Tensor | None = None  # the same, added to logits
        self.seen = 0
        self.held = 0
        self.cuts = 0
        self.surprise = torch.zeros(batch, length, **options)
        self.memory = Memory(shape, length, decoder)
        self._last: torch.Tensor | None = None  # hidden state (B, hidden) of the last token
        self._exact: list[torch.Tensor] = []
        self._parts: list[torch.Tensor] = []  # each (L, B, Hkv): what heads kept at a cut
        self._widest = 0
        self._scores = rule.scores() if rule is not None else ()
        self._wants = rule.wants() if rule is not None else frozenset()
        if record is not None:
            self._wants = frozenset({"attention"})
        replays = [score.tokens for score in self._scores if isinstance(score, Replayed)]
        self._replayed = max(replays, default=0)

        profile = _PROFILES.get((rule, budget)) if rule is not None else None
        if profile is not None:
            parts = (profile * budget).floor().long()[:, None].expand(shape)
            self.memory.set(rule, "parts", parts.reshape(-1, 1).to(decoder.device))

    def profile(self) -> torch.Tensor:
        """Return (L, Hkv): what heads kept on average, as a part of the budget."""
        return torch.stack(self._parts).double().mean((0, 2)) / self.budget

    @property
    def longest(self) -> int:
        """Most tokens that a head ever kept."""
        return self._widest

    def read(self, passes: Sequence[tuple[int, int]], *, nats: bool) -> None:
        """Feed the texts and cut; `nats`: note how likely each token was (`surprise`)."""
        score = nats or "surprise" in self._wants
        for begin, end in passes:
            for start in range(begin, end, _MOST_AT_ONCE):
                stop = min(start + _MOST_AT_ONCE, end)
                hidden = self._read(start, stop)
                if score:
                    self._note_nats(hidden, start, stop)
            if self.rule is not None and self.held >= self.budget + self.interval:
                self.cut()

    def _read(self, begin: int, end: int) -> torch.Tensor:
        count = end - begin
        where = torch.arange(begin, end, device=self.ids.device).expand(self.ids.shape[0], -1)
        hidden, seen = self.forward(self.ids[:, begin:end], where, begin=begin, wants=self._wants)
        self.seen, self.held = end, self.held + count
        for score in self._scores:
            score.watch(seen, self.memory)
        if self._record is not None:
            drawn = seen.attention.sum(3)
            self._record.add(begin, functional.pad(drawn, (0, self.ids.shape[1] - drawn.shape[3])))
        if self._replayed:
            again = min(self._replayed, end)
            _, seen = self.forward(
                self.ids[:, end - again : end],
                where[:, -1:] + 1 + torch.arange(again, device=where.device),
                begin=end,
                wants=frozenset({"attention_max"}),
                store=False,
            )
            for score in self._scores:
                score.watch_replay(seen, self.memory)
        return hidden

    def forward(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        *,
        begin: int = 0,
        wants: frozenset[str] = frozenset(),
        store: bool = True,
    ) -> tuple[torch.Tensor, Pass]:
        """Feed ids (B, Q) at positions (B, Q), -1 for padding; return hidden states and the pass.

        With ``store=False`` the tokens see the cache, and leave nothing in it.
        """
        decoder = self.decoder
        batch, count = ids.shape
        layers, heads, group, dim = (
            decoder.num_layers,
            decoder.heads,
            decoder.group,
            decoder.head_dim,
        )
        new = positions[None, :, None].expand(layers, batch, heads, count)
        slots = torch.cat((self.positions, new), 3)
        size = slots.shape[3]
        keys = functional.pad(self.keys, (0, 0, 0, count))
        values = functional.pad(self.values, (0, 0, 0, count))
        bias = self.bias if self.bias is None else functional.pad(self.bias, (0, count))
        hidden_from = slots[..., None, :] > positions[None, :, None, :, None]
        hidden_from |= (slots < 0)[..., None, :]  # (L, B, Hkv, Q, S)
        shapes = {
            "attention": (layers, batch, heads, count, size),
            "attention_max": (layers, batch, heads, count, size),
            "queries": (layers, batch, heads * group, count, dim),
            "plain_queries": (layers, batch, heads * group, count, dim),
        }
        seen = {name: keys.new_empty(shape) for name, shape in shapes.items() if name in wants}
        angles = tuple(angle[:, None] for angle in decoder.angles(positions))
        # A row of padding sees nobody: it gets an even distribution, which nothing reads.
        low = torch.finfo(decoder.dtype).min
        x = functional.embedding(ids, decoder.embedding)
        for order, layer in enumerate(decoder.layers):
            h = decoder.norm(x, layer.before_attention)
            plain = layer.query(h).view(batch, count, heads * group, dim).transpose(1, 2)
            query = decoder.rotate(plain, angles)
            key = layer.key(h).view(batch, count, heads, dim).transpose(1, 2)
            keys[order, :, :, size - count :] = decoder.rotate(key, angles)
            values[order, :, :, size - count :] = (
                layer.value(h).view(batch, count, heads, dim).transpose(1, 2)
            )
            grouped = (query * decoder.scaling).reshape(batch, heads, group * count, dim)
            logits = grouped @ keys[order].transpose(2, 3)
            logits = logits.view(batch, heads, group, count, size)
            if bias is not None:
                logits = logits + bias[order, :, :, None, None]
            logits = logits.masked_fill_(hidden_from[order, :, :, None], low)
            attention = logits.softmax(-1)
            mixed = attention.view(batch, heads, group * count, size) @ values[order]
            mixed = mixed.view(batch, heads * group, count, dim).transpose(1, 2)
            x = x + layer.output(mixed.reshape(batch, count, -1))
            h = decoder.norm(x, layer.before_mlp)
            x = x + layer.down(functional.silu(layer.gate(h)) * layer.up(h))
            if "attention" in seen:
                torch.mean(attention, 2, out=seen["attention"][order])
            if "attention_max" in seen:
                torch.amax(attention, 2, out=seen["attention_max"][order])
            if "queries" in seen:
                seen["queries"][order] = query
            if "plain_queries" in seen:
                seen["plain_queries"][order] = plain
        if "value_norms" in wants:
            seen["value_norms"] = values.norm(dim=-1)
        if "new_keys" in wants:
            seen["new_keys"] = keys[:, :, :, size - count :]
        if "new_values" in wants:
            seen["new_values"] = values[:, :, :, size - count :]
        if store:
            self.keys, self.values, self.positions = keys, values, slots
            self.bias = bias
            if self.mass is not None:
                self.mass = functional.pad(self.mass, (0, count), value=1.0)
        return x, Pass(begin=begin, count=count, positions=slots, **seen)

    def cut(self) -> None:
        """Evict down to the budget, whether or not that is due."""
        rule, shape = self.rule, self.memory.shape
        rows, size = shape[0] * shape[1] * shape[2], self.positions.shape[3]
        view = View(
            decoder=self.decoder,
            memory=self.memory,
            seen=self.seen,
            positions=self.positions.reshape(rows, size),
            keys=self.keys.reshape(rows, size, -1),
            values=self.values.reshape(rows, size, -1),
            ids=self.ids,
            surprise=self.surprise,
            future=self._foresight,
            sinks=rule.sinks,
        )
        keep = choose(view, rule, self.budget)
        counts = keep.sum(1)
        by_pool = counts.view(shape)
        if rule.pool == "layer":
            by_pool = by_pool.sum(2).true_divide(shape[2])
        elif rule.pool == "model":
            by_pool = by_pool.sum((0, 2)).true_divide(shape[0] * shape[2])
        # Parts that were given before may be more than a head holds at its first cut.
        is_exact = by_pool == self.budget if rule.division == Division() else by_pool <= self.budget
        self._exact.append(is_exact.all() & ~(keep & ~view.live).any())
        self._parts.append(counts.view(shape))
        keys, values = view.keys, view.values
        if rule.merge is not None:
            mass = self.mass if self.mass is not None else torch.ones_like(keys[..., 0])
            keys, values, mass = merge_into(view, rule.merge, keep, mass.reshape(rows, size))
            self.mass = mass.view(*shape, size)
            if rule.merge.count:
                self.bias = rule.merge.count * self.mass.log()
        # Only where heads compete is the width not known; then the device is waited for.
        width = int(counts.max()) if rule.pool else self.budget
        self._widest = max(self._widest, width)
        # Stable: what goes comes first, what stays keeps its order, and empty slots stand left.
        order = keep.to(torch.uint8).sort(dim=1, stable=True).indices[:, size - width :]
        stays = keep.gather(1, order)
        index = order[..., None].expand(-1, -1, keys.shape[2])
        self.keys = keys.gather(1, index).view(*shape, width, -1)
        self.values = values.gather(1, index).view(*shape, width, -1)
        positions = view.positions.gather(1, order).masked_fill(~stays, -1)
        self.positions = positions.view(*shape, width)
        for name in ("mass", "bias"):
            held = getattr(self, name)
            if held is not None:
                moved = held.reshape(rows, size).gather(1, order)
                setattr(self, name, moved.view(*shape, width))
        self.held = self.budget
        self.cuts += 1

    def verify(self) -> None:
        """Raise RuntimeError if a cut kept other than the budget."""
        if self._exact and not bool(torch.stack(self._exact).all()):
            wrong = [order for order, fine in enumerate(self._exact) if not bool(fine)]
            raise RuntimeError(
                f"[search] rule {self.rule.name!r} must keep {self.budget} tokens a head, and did "
                f"not at cuts {wrong}"
            )

    def answer(self, questions: torch.Tensor, padding: torch.Tensor, most: int) -> torch.Tensor:
        """Read questions (B, Q), padded on the left by (B,), and decode greedily: ids (B, most)."""
        positions = self._behind(questions.shape[1], padding)
        hidden, _ = self.forward(questions, positions)
        next_position = positions[:, -1:] + 1
        tokens = []
        for step in range(most):
            token = self.decoder.logits(hidden[:, -1]).argmax(-1)
            tokens.append(token)
            if step + 1 < most:
                hidden, _ = self.forward(token[:, None], next_position + step)
        return torch.stack(tokens, 1)

    def foresee(self, questions: torch.Tensor, padding: torch.Tensor) -> None:
        """Record what the queries of (B, Q) tokens behind the text pay to it."""
        positions = self._behind(questions.shape[1], padding)
        _, seen = self.forward(questions, positions, wants=self._wants)
        paid = seen.attention.masked_fill((positions < 0)[None, :, None, :, None], 0.0).sum(3)
        self._record.add(self.seen, paid[..., : self.ids.shape[1]].contiguous())

    def _behind(self, count: int, padding: torch.Tensor) -> torch.Tensor:
        place = torch.arange(count, device=padding.device) - padding[:, None]
        return torch.where(place >= 0, self.seen + place, -1)

    def _note_nats(self, hidden: torch.Tensor, begin: int, end: int) -> None:
        targets = self.ids[:, begin + 1 : end + 1]
        rows, wanted = hidden[:, : targets.shape[1]].flatten(0, 1), targets.flatten()
        step = max(1, _BLOCK_ELEMENTS // self.decoder.embedding.shape[0])
        parts = [
            functional.cross_entropy(self.decoder.logits(block), aims, reduction="none")
            for block, aims in zip(rows.split(step), wanted.split(step), strict=True)
        ]
        if parts:
            self.surprise[:, begin + 1 : begin + 1 + targets.shape[1]] = torch.cat(parts).view(
                targets.shape
            )


@dataclass(frozen=True)
class Read:
    """What reading texts under a rule gave."""

    nats: torch.Tensor
    """(sequences, N - 1), on the CPU: of tokens 1 .. N - 1."""
    longest: int
    """Most tokens a head kept; 0 for the full cache."""


@torch.inference_mode()
def perplexity(
    decoder: Decoder,
    ids: torch.Tensor,
    rule: Rule | None,
    *,
    budget: int,
    chunk: int = 32,
    interval: int = 32,
    batch: int = 16,
) -> Read:
    """Stream texts through a cache under a rule.

    Parameters
    ----------
    decoder : Decoder
        The model.
    ids : torch.Tensor
        int64 (sequences, N), on the decoder's device.
    rule : Rule or None
        None: the full cache.
    budget, interval : int
        See `Simulation`.
    chunk : int
        Tokens a pass.
    batch : int
        Sequences at a time.

    Raises
    ------
    EvaluationError
        The rule cannot have such a budget.
    RuntimeError
        It kept another.
    """
    passes = [(start, min(start + chunk, ids.shape[1])) for start in range(0, ids.shape[1], chunk)]
    if rule is not None and rule.division.profile and (rule, budget) not in _PROFILES:
        run = Simulation(
            decoder,
            ids[:batch],
            replace(rule, division=Division()),
            budget=budget,
            interval=interval,
        )
        run.read(passes, nats=False)
        _PROFILES[rule, budget] = run.profile()
    nats, longest = [], 0
    for part in ids.split(batch):
        foresight = None
        if rule is not None and "future" in rule.wants():
            foresight = Foresight()
            Simulation(decoder, part, record=foresight).read(passes, nats=False)
        run = Simulation(decoder, part, rule, budget=budget, interval=interval, foresight=foresight)
        run.read(passes, nats=True)
        run.verify()
        nats.append(run.surprise[:, 1:].cpu())
        longest = max(longest, run.longest)
    return Read(torch.cat(nats), longest)


@dataclass(frozen=True)
class Asked:
    """What asking about contexts under a rule gave."""

    digits: list[float]
    """Of each case: share of the digits that are right."""
    exact: list[bool]
    """Of each case: whether the whole number is right."""
    answers: list[str]
    longest: int


@torch.inference_mode()
def needles(
    decoder: Decoder,
    tokenizer: Any,
    cases: Sequence[Case],
    rule: Rule | None,
    *,
    budget: int,
    chunk: int = 32,
    interval: int = 32,
    batch: int = 32,
) -> Asked:
    """Feed contexts of one length, cut them, ask, and decode greedily.

    Parameters
    ----------
    decoder, rule, budget, chunk, interval
        See `perplexity`.
    tokenizer : transformers.PreTrainedTokenizerBase
        The model's.
    cases : sequence of Case
        Query-agnostic ones, with contexts of one length.
    batch : int
        Cases at a time.
    """
    digits: list[float] = []
    exact: list[bool] = []
    answers: list[str] = []
    longest = 0
    most = max(case.item().max_new_tokens for case in cases)
    length = len(cases[0].prompt.context)
    passes = context_passes(
        [length], budget=None if rule is None else budget, interval=interval, chunk=chunk
    )
    for start in range(0, len(cases), batch):
        part = cases[start : start + batch]
        ids = torch.tensor([case.prompt.context for case in part], device=decoder.device)
        questions, padding = _padded([case.prompt.question for case in part], decoder.device)
        foresight = None
        if rule is not None and "future" in rule.wants():
            foresight = Foresight()
            run = Simulation(decoder, ids, record=foresight)
            run.read(passes, nats=False)
            known = [
                (*case.prompt.question, *encode(tokenizer, " " + " ".join(case.expected)))
                for case in part
            ]
            run.foresee(*_padded(known, decoder.device))
            del run
        run = Simulation(decoder, ids, rule, budget=budget, interval=interval, foresight=foresight)
        run.read(passes, nats=False)
        run.verify()
        rows = run.answer(questions, padding, most)
        ended = torch.isin(rows, decoder.ends).cumsum(1) > 0
        texts = [
            tokenizer.decode([token for token, over in zip(row, end, strict=True) if not over])
            for row, end in zip(rows.tolist(), ended.tolist(), strict=True)
        ]
        for case, text in zip(part, texts, strict=True):
            score = case.score(text)
            digits.append(score["digits"])
            exact.append(score["exact"])
        answers += texts
        longest = max(longest, run.longest)
    return Asked(digits, exact, answers, longest)


def _padded(
    rows: Sequence[Sequence[int]], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (B, Q), padded on the left, and by how much (B,)."""
    most = max(map(len, rows))
    ids = [[0] * (most - len(row)) + list(row) for row in rows]
    padding = torch.tensor([most - len(row) for row in rows], device=device)
    return torch.tensor(ids, device=device), padding
