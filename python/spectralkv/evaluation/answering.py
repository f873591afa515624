"""Questions about a context that has been cut: feed, evict, ask, decode.

A context goes through an evicting cache as decoding would feed it, a few tokens at a time, each
pass followed by the eviction that is due. The question comes when every head of every layer holds
exactly the budget. In a query-agnostic run no policy has seen it until then; in a query-aware run
it stands before the context as well (and is asked again), where every policy may make use of it.

Many cases run as one batch. Contexts and questions of unequal length are padded on the left, which
the cache leaves out: each sequence fares as it would alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from spectralkv.evaluation.caches import CacheSettings, create_cache, create_policy
from spectralkv.evaluation.errors import EvaluationError
from spectralkv.evaluation.generation import eos_token_ids, last_logits_only
from spectralkv.evaluation.haystack import encode
from spectralkv.evaluation.perplexity import is_left_aligned, most_kept
from spectralkv.evaluation.specs import FULL, Budget, PolicySpec

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from spectralkv.evaluation.models import LoadedModel
    from spectralkv.evaluation.progress import Progress
    from spectralkv.evaluation.runs import RunFile
    from spectralkv.hf import EvictingCache, EvictionEvent
    from spectralkv.policies import Policy

Asking = Literal["agnostic", "aware"]
AGNOSTIC: Asking = "agnostic"
AWARE: Asking = "aware"

#: Most tokens a pass while nothing can be evicted yet; bounds the memory of a batch.
_FIRST_PASSES = 1024
#: New tokens between two looks whether all answers have ended, which wait for the device.
_LOOK_EVERY = 8
_HERE = "\N{OBJECT REPLACEMENT CHARACTER}"


class Prompt(NamedTuple):
    """One case as tokens."""

    context: tuple[int, ...]
    """All that is fed before the cut."""
    question: tuple[int, ...]
    """What follows it, up to the first token of the answer."""


@dataclass(frozen=True, kw_only=True)
class Ask:
    """The words around a context.

    Attributes
    ----------
    intro : str
        Comes before the context, and ends where the context begins.
    question : str
        Comes after it.
    answer : str
        How the answer begins; the model goes on from there.
    """

    intro: str
    question: str
    answer: str = ""


@dataclass(frozen=True, kw_only=True)
class PromptForm:
    """What a model wants around a question: the marks of its chat template, or nothing.

    Attributes
    ----------
    name : {"chat", "plain"}
        Which of the two.
    head, tail : tuple of int
        Tokens before the user's words, and between them and the answer.
    """

    name: str
    head: tuple[int, ...]
    tail: tuple[int, ...]

    @classmethod
    def of(cls, tokenizer: Any, name: Literal["auto", "chat", "plain"] = "auto") -> PromptForm:
        """Read the form off a tokenizer.

        Parameters
        ----------
        tokenizer : transformers.PreTrainedTokenizerBase
            The model's tokenizer.
        name : {"auto", "chat", "plain"}
            "auto": the chat template where there is one.

        Raises
        ------
        EvaluationError
            The name is another, or the chat template is missing or does not show the user's words.
        """
        if name not in ("auto", "chat", "plain"):
            raise EvaluationError(f"prompt form must be auto, chat or plain, got {name!r}")
        has_template = bool(getattr(tokenizer, "chat_template", None))
        if name == "chat" and not has_template:
            raise EvaluationError("prompt form chat: this model's tokenizer has no chat template")
        if name == "plain" or not has_template:
            bos = tokenizer.bos_token_id
            begins = bos is not None and bos in tokenizer.encode("")
            return cls(name="plain", head=(bos,) if begins else (), tail=())
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": _HERE}], add_generation_prompt=True, tokenize=False
        )
        head, found, tail = text.partition(_HERE)
        if not found:
            raise EvaluationError("prompt form chat: the template does not show the user's words")
        return cls(name="chat", head=encode(tokenizer, head), tail=encode(tokenizer, tail))

    def before(self, tokenizer: Any, ask: Ask, asking: Asking) -> tuple[int, ...]:
        """Return the tokens that come before the context."""
        words = ask.intro if asking == AGNOSTIC else f"{ask.question}\n\n{ask.intro}"
        return self.head + encode(tokenizer, words)

    def after(self, tokenizer: Any, ask: Ask) -> tuple[int, ...]:
        """Return the tokens between the context and the answer."""
        answer = ask.answer
        if self.tail:
            return encode(tokenizer, f"\n\n{ask.question}") + self.tail + encode(tokenizer, answer)
        return encode(tokenizer, f"\n\n{ask.question}\n{answer}")


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What a model answered.

    Attributes
    ----------
    text : str
        The answer up to the end-of-sequence token.
    token_ids : tuple of int
        Its tokens.
    held : int
        Tokens a layer and KV head when the question came: the budget, or all for the full cache.
    kv_bytes, graph_bytes : int
        The sequence's share of the bytes of the batch's cache, at the end.
    evictions : int
        Cuts, summed over the layers; those of a batch are made together.
    seconds : float
        The sequence's share of the wall-clock time.
    """

    text: str
    token_ids: tuple[int, ...]
    held: int
    kv_bytes: int
    graph_bytes: int
    evictions: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Item:
    """One case of a study: what is asked, what is recorded with it, and how it is scored.

    Attributes
    ----------
    key : str
        Tells the case from the others of the study.
    length : int
        Nominal length of the context in tokens, of which a budget may be a share.
    prompt : Prompt
        The tokens.
    max_new_tokens : int
        Tokens that the answer may have.
    figures : mapping
        Plain values for the run file.
    score : callable
        From the answer's text to the figures that judge it.
    """

    key: str
    length: int
    prompt: Prompt
    max_new_tokens: int
    figures: Mapping[str, Any]
    score: Callable[[str], dict[str, Any]]


def context_passes(
    lengths: Sequence[int], *, budget: int | None, interval: int, chunk: int
) -> list[tuple[int, int]]:
    """Return the forward passes that feed a batch of contexts, left-padded to one length.

    The passes are laid out from the end: the last one fills every sequence up to ``budget +
    interval`` tokens or more, so that the cut to exactly the budget comes right after it. Before
    the first cut, when a policy has nothing to decide, the passes are long.

    Parameters
    ----------
    lengths : sequence of int
        Tokens of each context.
    budget : int or None
        Tokens each head keeps; None: nothing is evicted.
    interval : int
        The policy's interval.
    chunk : int
        Tokens a pass. 0: the whole context is there before the one and only cut.

    Returns
    -------
    list of (int, int)
        First and last + 1 column of each pass.

    Raises
    ------
    EvaluationError
        A context is too short to be cut, or `chunk` is negative.
    """
    if chunk < 0:
        raise EvaluationError(f"chunk must be at least 0 tokens, got {chunk}")
    longest, shortest = max(lengths), min(lengths)
    if budget is None:
        ends = [*range(_FIRST_PASSES, longest, _FIRST_PASSES), longest]
        return list(zip([0, *ends], ends, strict=False))
    if shortest < budget + interval:
        raise EvaluationError(
            f"a context must have at least budget + interval = {budget} + {interval} tokens to be "
            f"cut, got {shortest}"
        )
    block = max(chunk, interval)
    blocks = (shortest - budget - interval) // block if chunk else 0
    first_cut = longest - blocks * block
    ends = [*range(_FIRST_PASSES, min(budget + interval, first_cut), _FIRST_PASSES), first_cut]
    for begin in range(first_cut, longest, block):
        ends += [*range(begin + chunk, begin + block, chunk), begin + block]
    return list(zip([0, *ends], ends, strict=False))


class BudgetAudit:
    """An eviction callback that looks whether each sequence that is due keeps exactly its budget.

    It asks the device once, at the end (`verify`), where a check at each cut would wait each time.
    Where heads keep different numbers of tokens, those of all layers that were cut at once must
    keep the budget at most, on average.

    Parameters
    ----------
    label : str
        Name of the policy in the error.
    budget, interval : int
        The policy's.
    """

    def __init__(self, label: str, budget: int, interval: int) -> None:
        self._label, self._budget, self._interval = label, budget, interval
        self._cuts: list[tuple[int, int, Any]] = []
        self._kept: dict[int, list[Any]] = {}  # of heads that keep different numbers

    def __call__(self, event: EvictionEvent) -> None:
        """Take one eviction event."""
        import torch

        held = (event.positions >= 0).sum(-1)
        kept = (event.keep >= 0).sum(-1)
        if event.is_divided:
            fine = is_left_aligned(event.keep) & (kept <= held).all()
            self._cuts.append((event.layer, event.tokens_seen, fine))
            self._kept.setdefault(event.tokens_seen, []).append(kept)
            return
        due = held >= self._budget + self._interval
        expected = torch.where(due, self._budget, held)
        is_empty = event.keep[..., :-1] < 0
        ordered = ((event.keep.diff(dim=-1) > 0) | is_empty).all()
        self._cuts.append((event.layer, event.tokens_seen, (kept == expected).all() & ordered))

    def verify(self) -> None:
        """Raise RuntimeError if a cut kept other than its budget, or a slot twice."""
        import torch

        if not self._cuts:
            return
        mean = most_kept(self._kept)
        if mean > self._budget:
            raise RuntimeError(
                f"[answering] policy {self._label!r} must keep {self._budget} slots a head on "
                f"average, kept {mean:g}; this is a bug in the policy or the cache"
            )
        fine = torch.stack([cut for _, _, cut in self._cuts]).tolist()
        for (layer, seen, _), is_fine in zip(self._cuts, fine, strict=True):
            if not is_fine:
                raise RuntimeError(
                    f"[answering] policy {self._label!r} must keep {self._budget} ascending, "
                    f"unique slots of each sequence that is due, and did not in layer {layer} "
                    f"at {seen} tokens; this is a bug in the policy or the cache"
                )


def answer_batch(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    policy: Policy,
    *,
    chunk: int = 32,
    max_new_tokens: int = 16,
    label: str | None = None,
    on_evict: Callable[[EvictionEvent], None] | None = None,
    on_pass: Callable[[int, int], None] | None = None,
) -> list[Answer]:
    """Feed contexts, cut them to the budget, ask, and decode greedily.

    Parameters
    ----------
    loaded : LoadedModel
        The model and its tokenizer.
    prompts : sequence of Prompt
        B cases.
    policy : spectralkv.policies.Policy
        What the cache keeps; it goes on evicting while the answers come.
    chunk : int
        Tokens a pass, see `context_passes`.
    max_new_tokens : int
        Tokens an answer may have. It ends earlier at an end-of-sequence token.
    label : str, optional
        The policy's name in an error.
    on_evict : callable, optional
        Called with every eviction event.
    on_pass : callable, optional
        Called with (columns fed, columns of the context) after each pass of the context.

    Returns
    -------
    list of Answer
        One a prompt.

    Raises
    ------
    EvaluationError
        There are no prompts, one of them is empty, too short to be cut, or too long for the model.
    RuntimeError
        A cut kept other than the budget.
    """
    _check(loaded.model, prompts, max_new_tokens)
    found: dict[int, Answer] = {}
    for rows in _together(loaded.model.config, prompts):
        part = _answer(
            loaded,
            [prompts[row] for row in rows],
            policy,
            chunk=chunk,
            max_new_tokens=max_new_tokens,
            label=label or policy.name,
            on_evict=on_evict,
            on_pass=on_pass,
        )
        found.update(zip(rows, part, strict=True))
    return [found[row] for row in range(len(prompts))]


def _answer(
    loaded: LoadedModel,
    prompts: Sequence[Prompt],
    policy: Policy,
    *,
    chunk: int,
    max_new_tokens: int,
    label: str,
    on_evict: Callable[[EvictionEvent], None] | None,
    on_pass: Callable[[int, int], None] | None,
) -> list[Answer]:
    import torch

    start = time.perf_counter()
    audit = None
    if policy.budget is not None:
        audit = BudgetAudit(label, policy.budget, policy.cut_interval)

    def evicting(event: EvictionEvent) -> None:
        if audit is not None:
            audit(event)
        if on_evict is not None:
            on_evict(event)

    cache = create_cache(loaded.model, policy, on_evict=evicting)
    feeder = _Feeder(loaded.model, cache)
    contexts, valid = _padded([prompt.context for prompt in prompts], loaded.model.device)
    lengths = [len(prompt.context) for prompt in prompts]
    passes = context_passes(
        lengths, budget=policy.budget, interval=policy.cut_interval, chunk=chunk
    )
    padding = max(lengths) - min(lengths)
    with torch.inference_mode():
        for begin, end in passes:
            is_padded = valid is not None and begin < padding
            feeder.feed(contexts[:, begin:end], valid[:, begin:end] if is_padded else None)
            feeder.note_cuts()
            if on_pass is not None:
                on_pass(end, contexts.shape[1])
        held = _held(cache, policy, prompts)
        logits = feeder.feed(*_padded([prompt.question for prompt in prompts], contexts.device))
        rows = _decode(feeder, logits, eos_token_ids(loaded.model), max_new_tokens)
    if audit is not None:
        audit.verify()
    stats, batch = cache.stats(), len(prompts)
    seconds = (time.perf_counter() - start) / batch
    return [
        Answer(
            text=loaded.tokenizer.decode(row),
            token_ids=tuple(row),
            held=count,
            kv_bytes=stats.kv_bytes // batch,
            graph_bytes=stats.graph_bytes // batch,
            evictions=stats.evictions,
            seconds=seconds,
        )
        for row, count in zip(rows, held, strict=True)
    ]


def run_cases(
    loaded: LoadedModel,
    items: Sequence[Item],
    policies: Sequence[PolicySpec],
    budgets: Sequence[Budget],
    run: RunFile,
    *,
    settings: CacheSettings | None = None,
    chunk: int = 32,
    batch: int = 1,
    on_progress: Progress | None = None,
) -> None:
    """Ask all cases under the full cache and under every policy at every budget.

    Parameters
    ----------
    loaded : LoadedModel
        The model and its tokenizer.
    items : sequence of Item
        The cases.
    policies : sequence of PolicySpec
        Policies; the full cache is always run first.
    budgets : sequence of Budget
        Tokens, or shares of a case's length.
    run : RunFile
        Takes the figures; what is done in it is left out.
    settings : CacheSettings, optional
        Interval, window and sinks.
    chunk : int
        Tokens a pass.
    batch : int
        Cases that run together.
    on_progress : Progress, optional
        Called with (what runs, cases done, cases of it).

    Raises
    ------
    EvaluationError
        A policy refuses its arguments, or a case cannot be asked.
    """
    settings = settings if settings is not None else CacheSettings()
    if batch < 1:
        raise EvaluationError(f"batch must be at least 1, got {batch}")
    groups: dict[tuple[int, int], list[Item]] = {}
    for item in items:
        groups.setdefault((item.length, item.max_new_tokens), []).append(item)
    plan: list[tuple[PolicySpec, Budget | None]] = [(PolicySpec(name=FULL), None)]
    plan += [(spec, budget) for budget in budgets for spec in policies if spec.name != FULL]
    # All policies first: a bad argument is refused before the first minute is spent.
    made = {
        (order, length): create_policy(
            spec, None if budget is None else budget.resolve(length), settings
        )
        for order, (spec, budget) in enumerate(plan)
        for length, _ in groups
    }
    for order, (spec, share) in enumerate(plan):
        title = spec.label if share is None else f"{spec.label} at {_said(share)}"
        finished = 0
        for (length, most), group in groups.items():
            policy = made[order, length]
            todo = [(_key(spec, policy, item), item) for item in group]
            todo = [(key, item) for key, item in todo if not run.done(key)]
            finished += len(group) - len(todo)
            for first in range(0, len(todo), batch):
                part = todo[first : first + batch]
                answers = answer_batch(
                    loaded,
                    [item.prompt for _, item in part],
                    policy,
                    chunk=chunk,
                    max_new_tokens=most,
                    label=spec.label,
                )
                for (key, item), answer in zip(part, answers, strict=True):
                    run.add(
                        key,
                        policy=spec.label,
                        budget=policy.budget,
                        budget_fraction=None if share is None else share.fraction,
                        **item.figures,
                        **item.score(answer.text),
                        answer=answer.text,
                        context_tokens=len(item.prompt.context),
                        held=answer.held,
                        kv_bytes=answer.kv_bytes,
                        graph_bytes=answer.graph_bytes,
                        seconds=round(answer.seconds, 4),
                    )
                finished += len(part)
                if on_progress is not None:
                    on_progress(title, finished, len(items))


class _Feeder:
    """Feeds a batch, and keeps count of positions and padding."""

    def __init__(self, model: Any, cache: EvictingCache) -> None:
        self._model, self._cache = model, cache
        self._last_only = last_logits_only(model)
        self._mask: Any = None  # (B, tokens fed); None: there has been no padding
        self._next: Any = None  # (B, 1): position of each sequence's next token
        self._fed = 0
        self._layers_know = False

    def note_cuts(self) -> None:
        """Look whether all layers were cut: from then on they know of padding themselves.

        A mask, for which the device must be waited for, is then needed only by a pass that has
        padding in it. Layers of a cache of their own, with a sliding window, need it always.
        """
        layers = self._cache.evicting_layers
        cut = sum(layer.evictions > 0 for layer in layers)
        self._layers_know = cut == len(self._cache.layers)

    def feed(self, ids: Any, valid: Any = None) -> Any:
        """Feed ids (B, Q), of which bool `valid` (B, Q) marks padding; return logits (B, V)."""
        import torch

        from spectralkv.hf import cache_argument

        batch, count = ids.shape
        options: dict[str, Any] = {}
        if self._mask is None and valid is not None:
            self._mask = torch.ones(batch, self._fed, dtype=torch.long, device=ids.device)
            self._next = torch.full((batch, 1), self._fed, device=ids.device)
        if self._mask is not None:
            fresh = torch.ones_like(ids) if valid is None else valid.to(torch.long)
            self._mask = torch.cat((self._mask, fresh), 1)
            upto = fresh.cumsum(1)
            options["position_ids"] = (self._next + upto - 1).clamp_min(0)
            self._next = self._next + upto[:, -1:]
            if valid is not None or not self._layers_know:
                options["attention_mask"] = self._mask
        output = self._model(
            input_ids=ids,
            **cache_argument(self._cache),
            use_cache=True,
            **options,
            **self._last_only,
        )
        self._fed += count
        return output.logits[:, -1]


def _decode(feeder: _Feeder, logits: Any, eos: frozenset[int], most: int) -> list[list[int]]:
    import torch

    ends = torch.tensor(sorted(eos), dtype=torch.long, device=logits.device)
    token = logits.argmax(-1)
    tokens, finished = [token], torch.isin(token, ends)
    for step in range(1, most):
        if step % _LOOK_EVERY == 0 and bool(finished.all()):
            break
        token = feeder.feed(token[:, None]).argmax(-1)
        tokens.append(token)
        finished = finished | torch.isin(token, ends)
    rows = []
    for row in torch.stack(tokens, 1).tolist():
        end = next((i for i, token_id in enumerate(row) if token_id in eos), len(row))
        rows.append(row[:end])
    return rows


def _padded(rows: Sequence[Sequence[int]], device: Any) -> tuple[Any, Any]:
    """Return ids (B, N), padded on the left, and bool (B, N) of what is real, None if all is."""
    import torch

    longest = max(map(len, rows))
    # What stands in the padding is never looked at; 0 is in every vocabulary.
    ids = torch.tensor([[0] * (longest - len(row)) + list(row) for row in rows], device=device)
    if min(map(len, rows)) == longest:
        return ids, None
    counts = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(longest, device=device) >= longest - counts[:, None]


def _held(cache: EvictingCache, policy: Policy, prompts: Sequence[Prompt]) -> list[int]:
    """Return what each sequence holds, having made sure that it is the budget."""
    if policy.budget is None:
        return [len(prompt.context) for prompt in prompts]
    for layer in cache.evicting_layers:
        if any(length != policy.budget for length in layer.lengths):
            raise RuntimeError(
                f"[answering] layer {layer.index} must hold {policy.budget} tokens of each "
                f"sequence when the question comes, got {layer.lengths}; this is a bug in the "
                "layout of the passes or in the cache"
            )
    return [policy.budget] * len(prompts)


def _together(config: Any, prompts: Sequence[Prompt]) -> list[list[int]]:
    """Return which prompts may run as one batch: all, unless a layer has a sliding window.

    Such a window counts columns, so padding before a question would take the place of tokens.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    if all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers):
        return [list(range(len(prompts)))]
    by_length: dict[int, list[int]] = {}
    for row, prompt in enumerate(prompts):
        by_length.setdefault(len(prompt.question), []).append(row)
    return list(by_length.values())


def _check(model: Any, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
    if not prompts:
        raise EvaluationError("there are no cases to ask")
    if max_new_tokens < 1:
        raise EvaluationError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    for prompt in prompts:
        if not prompt.context or not prompt.question:
            raise EvaluationError(
                "a case must have a context and a question, got "
                f"{len(prompt.context)} and {len(prompt.question)} tokens"
            )
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = max(len(prompt.context) + len(prompt.question) for prompt in prompts)
    if most is not None and longest + max_new_tokens > most:
        raise EvaluationError(
            f"the model knows {most:,} positions; {longest:,} tokens of context and question and "
            f"{max_new_tokens} of the answer are more"
        )


def _said(budget: Budget) -> str:
    return f"{budget.tokens}" if budget.fraction is None else f"{budget.fraction:.3g}"


def _key(spec: PolicySpec, policy: Policy, item: Item) -> str:
    budget = "full" if policy.budget is None else policy.budget
    return f"{spec.label}|{budget}|{item.key}"
