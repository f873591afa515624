"""Questions after a cut: exact budgets, batches as single sequences, no answer that was seen."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from spectralkv import policies
from spectralkv.evaluation import (
    Budget,
    CacheSettings,
    EvaluationError,
    LoadedModel,
    PolicySpec,
    RunFile,
    answering,
)
from spectralkv.evaluation.answering import (
    AGNOSTIC,
    AWARE,
    Answer,
    Ask,
    BudgetAudit,
    Item,
    Prompt,
    PromptForm,
    answer_batch,
    context_passes,
    run_cases,
)
from spectralkv.evaluation.perplexity import BudgetCheck
from spectralkv.hf import EvictionEvent
from tiny_models import make_model
from tiny_text import make_text, make_tokenizer

BUDGET, INTERVAL = 48, 16


def make_prompts(tiny: LoadedModel, count: int = 3) -> list[Prompt]:
    """Return cases whose contexts and questions all differ in length."""
    text = make_text(900)
    encode = tiny.tokenizer.encode
    return [
        Prompt(
            tuple(encode(text[31 * n : 31 * n + 190 - 7 * n])),
            tuple(encode(f"\nWhat did line {n * 37} say?"[: 24 - 3 * n])),
        )
        for n in range(count)
    ]


def policy_of(name: str, **options: Any) -> policies.Policy:
    if name == "full":
        return policies.create("full")
    return policies.create(
        name, budget=BUDGET, **{"interval": INTERVAL, "window": 8, "sinks": 2, **options}
    )


@pytest.mark.parametrize("chunk", [0, 1, 5, 16, 23, 64, 500])
@pytest.mark.parametrize("interval", [1, 8, 32])
def test_the_last_pass_leaves_exactly_the_budget(chunk: int, interval: int) -> None:
    """Follow every sequence of some batches through its passes, as a cache cuts it."""
    budget = 40
    for lengths in ((budget + interval,), (300,), (129, 200, 150), (2600, 2311)):
        passes = context_passes(lengths, budget=budget, interval=interval, chunk=chunk)
        assert passes[0][0] == 0
        assert passes[-1][1] == max(lengths)
        assert all(end == begin for (_, end), (begin, _) in itertools.pairwise(passes))
        cut_once = False
        held = [0] * len(lengths)
        for begin, end in passes:
            if cut_once and chunk:
                assert end - begin <= max(chunk, 1)
            for row, length in enumerate(lengths):
                padding = max(lengths) - length
                held[row] += max(0, end - max(begin, padding))
                if held[row] >= budget + interval:
                    held[row], cut_once = budget, True
        assert held == [budget] * len(lengths)


def test_nothing_is_cut_before_the_first_long_pass_ends() -> None:
    passes = context_passes([3000], budget=1500, interval=32, chunk=32)
    assert passes[0] == (0, 1024)
    assert passes[1][0] == 1024
    assert 1532 <= passes[1][1] < 1564
    assert len(passes) == 2 + (3000 - passes[1][1]) // 32
    assert context_passes([3000], budget=1500, interval=32, chunk=0) == [(0, 1024), (1024, 3000)]
    full = context_passes([2500, 10], budget=None, interval=32, chunk=1)
    assert full == [(0, 1024), (1024, 2048), (2048, 2500)]


def test_bad_layouts_are_refused() -> None:
    message = r"at least budget \+ interval = 40 \+ 8 tokens to be cut, got 47"
    with pytest.raises(EvaluationError, match=message):
        context_passes([90, 47], budget=40, interval=8, chunk=8)
    with pytest.raises(EvaluationError, match="chunk must be at least 0 tokens, got -1"):
        context_passes([90], budget=40, interval=8, chunk=-1)


def test_the_full_cache_answers_as_transformers_does(tiny: LoadedModel) -> None:
    prompts = make_prompts(tiny)
    answers = answer_batch(tiny, prompts, policy_of("full"), max_new_tokens=12)
    for prompt, answer in zip(prompts, answers, strict=True):
        ids = torch.tensor([prompt.context + prompt.question])
        expected = tiny.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False
        )
        assert list(answer.token_ids) == expected[0, ids.shape[1] :].tolist()
        assert answer.text == tiny.tokenizer.decode(answer.token_ids)
        assert answer.held == len(prompt.context)
        assert answer.evictions == 0


@pytest.mark.parametrize("name", ["spectral", "h2o", "snapkv", "keydiff", "tova", "rkv"])
@pytest.mark.parametrize("chunk", [0, 5, 32])
def test_a_batch_answers_as_each_case_alone(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch, name: str, chunk: int
) -> None:
    """With its padding left out, a sequence goes through the same passes alone."""
    prompts = make_prompts(tiny)
    policy = policy_of(name)
    together = answer_batch(tiny, prompts, policy, chunk=chunk, max_new_tokens=24)
    lengths = [len(prompt.context) for prompt in prompts]
    passes = context_passes(lengths, budget=BUDGET, interval=INTERVAL, chunk=chunk)
    for prompt, answer, length in zip(prompts, together, lengths, strict=True):
        padding = max(lengths) - length
        own = [(max(0, a - padding), b - padding) for a, b in passes if b > padding]
        monkeypatch.setattr(answering, "context_passes", lambda *_, own=own, **__: own)
        (alone,) = answer_batch(tiny, [prompt], policy, chunk=chunk, max_new_tokens=24)
        assert answer.token_ids == alone.token_ids
        assert answer.held == alone.held == BUDGET


def test_layers_with_a_window_are_told_of_padding_to_the_end(tiny: LoadedModel) -> None:
    """Gemma 3's sliding layers do not evict: their mask still comes from the model."""
    model = make_model("gemma3", dtype=torch.float32, vocab_size=len(tiny.tokenizer))
    gemma = LoadedModel(name="gemma", model=model, tokenizer=tiny.tokenizer)
    prompts = [
        Prompt(prompt.context[:120], prompt.question[: 2 + 8 * n])
        for n, prompt in enumerate(make_prompts(tiny))
    ]
    with pytest.warns(UserWarning, match="1 of 3 layers"):
        together = answer_batch(gemma, prompts, policy_of("h2o"), chunk=8, max_new_tokens=20)
    for prompt, answer in zip(prompts, together, strict=True):
        with pytest.warns(UserWarning, match="1 of 3 layers"):
            (alone,) = answer_batch(gemma, [prompt], policy_of("h2o"), chunk=8, max_new_tokens=20)
        assert answer.token_ids == alone.token_ids


def test_the_answer_depends_on_what_was_kept(tiny: LoadedModel) -> None:
    (prompt,) = make_prompts(tiny, 1)
    answers = {
        name: answer_batch(tiny, [prompt], policy_of(name), max_new_tokens=16)[0].token_ids
        for name in ("full", "keydiff", "streaming_llm")
    }
    assert len(set(answers.values())) == 3


def test_no_token_of_the_question_is_there_at_the_last_cut(tiny: LoadedModel) -> None:
    prompts = make_prompts(tiny)
    longest = max(len(prompt.context) for prompt in prompts)
    events: list[EvictionEvent] = []
    answer_batch(
        tiny,
        prompts,
        policy_of("h2o"),
        chunk=8,
        max_new_tokens=INTERVAL + 8,
        on_evict=events.append,
    )
    before = [event for event in events if event.tokens_seen <= longest]
    assert before[-1].tokens_seen == longest
    kept = (before[-1].keep >= 0).sum(-1)
    assert kept.tolist() == [[BUDGET] * kept.shape[1]] * len(prompts)
    # The question and the answer filled the interval: eviction went on.
    assert events[-1].tokens_seen > longest


def test_another_number_of_tokens_than_the_budget_is_refused(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_early(lengths: list[int], **_: object) -> list[tuple[int, int]]:
        longest = max(lengths)
        return [(0, longest - 3), (longest - 3, longest)]

    monkeypatch.setattr(answering, "context_passes", too_early)
    message = rf"\[answering\] layer 0 must hold {BUDGET} tokens of each sequence .* got \(51,"
    with pytest.raises(RuntimeError, match=message):
        answer_batch(tiny, make_prompts(tiny), policy_of("keydiff"))


@pytest.mark.parametrize(
    ("keep", "fine"),
    [
        ([[[1, 3, 4], [0, 2, 4]]], True),
        ([[[1, 3, 3], [0, 2, 4]]], False),
        ([[[1, 4, 3], [0, 2, 4]]], False),
        ([[[1, 3, 4, 5], [0, 2, 4, 5]]], False),
        ([[[1, 3, 4], [-1, 2, 4]]], False),
    ],
)
def test_the_audit_finds_what_keeps_other_than_its_budget(keep: Any, fine: bool) -> None:
    audit = BudgetAudit("greedy", budget=3, interval=2)
    positions = torch.arange(6, dtype=torch.int32).expand(1, 2, 6)
    audit(
        EvictionEvent(
            layer=7,
            tokens_seen=6,
            positions=positions,
            scores=torch.zeros(1, 2, 6),
            keep=torch.tensor(keep, dtype=torch.int32),
        )
    )
    if fine:
        audit.verify()
        return
    message = r"policy 'greedy' must keep 3 ascending, unique slots .* in layer 7 at 6 tokens"
    with pytest.raises(RuntimeError, match=message):
        audit.verify()


@pytest.mark.parametrize(
    ("keeps", "message"),
    [
        ([[[0, 2, 4, 5], [1, 3, -1, -1]], [[5, -1, -1, -1], [0, 1, 2, 3]]], ""),
        ([[[0, 2, 4, 5], [1, 3, 4, -1]], [[5, -1, -1, -1], [0, 1, 2, 3]]], "kept 3"),
        ([[[0, 4, 2, -1], [1, 3, -1, -1]], [[5, -1, -1, -1], [0, 1, 2, 3]]], "ascending"),
        ([[[-1, 0, 2, 4], [1, 3, -1, -1]], [[5, -1, -1, -1], [0, 1, 2, 3]]], "ascending"),
        ([[[0, -1, 2, 4], [1, 3, -1, -1]], [[5, -1, -1, -1], [0, 1, 2, 3]]], "ascending"),
    ],
)
@pytest.mark.parametrize("kind", ["audit", "check"])
def test_heads_that_keep_different_numbers_keep_the_budget_on_average(
    keeps: Any, message: str, kind: str
) -> None:
    # Two heads in each of two layers keep 11 of 2.75 x 4 tokens.
    budget = 2.75
    looks: Any = (
        BudgetAudit("greedy", budget=budget, interval=2)  # type: ignore[arg-type]
        if kind == "audit"
        else BudgetCheck("greedy", budget, wait=False)  # type: ignore[arg-type]
    )
    for layer, keep in enumerate(keeps):
        looks(
            EvictionEvent(
                layer=layer,
                tokens_seen=6,
                positions=torch.arange(6, dtype=torch.int32).expand(1, 2, 6),
                scores=torch.zeros(1, 2, 6),
                keep=torch.tensor([keep], dtype=torch.int32),
                is_divided=True,
            )
        )
    if not message:
        looks.verify()
        return
    with pytest.raises(RuntimeError, match=message):
        looks.verify()


def test_the_audit_lets_a_sequence_that_is_not_due_keep_all() -> None:
    audit = BudgetAudit("any", budget=3, interval=2)
    positions = torch.tensor([[[0, 1, 2, 3, 4]], [[-1, 0, 1, 2, 3]]], dtype=torch.int32)
    keep = torch.tensor([[[-1, 0, 1, 4]], [[1, 2, 3, 4]]], dtype=torch.int32)
    event = {"layer": 0, "tokens_seen": 5, "scores": torch.zeros(2, 1, 5)}
    audit(EvictionEvent(positions=positions, keep=keep, **event))  # type: ignore[arg-type]
    audit.verify()
    audit(EvictionEvent(positions=positions, keep=keep[:, :, 1:], **event))  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="must keep 3"):
        audit.verify()


def test_an_answer_ends_at_the_end_of_sequence(
    tiny: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = make_prompts(tiny)
    free = answer_batch(tiny, prompts, policy_of("full"), max_new_tokens=40)
    stops = [answer.token_ids[4] for answer in free]
    monkeypatch.setattr(tiny.model.generation_config, "eos_token_id", stops)
    fed = []
    feed = answering._Feeder.feed
    monkeypatch.setattr(
        answering._Feeder, "feed", lambda *args: fed.append(args[1].shape[1]) or feed(*args)
    )
    ended = answer_batch(tiny, prompts, policy_of("full"), max_new_tokens=40)
    for before, after in zip(free, ended, strict=True):
        end = next(i for i, token in enumerate(before.token_ids) if token in stops)
        assert after.token_ids == before.token_ids[:end]
    assert fed.count(1) < 16  # all had ended after 5 tokens at most


def test_bad_cases_are_refused(tiny: LoadedModel) -> None:
    fine = make_prompts(tiny, 1)[0]
    for prompts, most, message in (
        ([], 4, "there are no cases"),
        ([fine], 0, "max_new_tokens must be at least 1, got 0"),
        ([Prompt((), (1,))], 4, "must have a context and a question, got 0 and 1 tokens"),
        ([Prompt((1,) * 1020, (1,))], 4, "knows 1,024 positions; 1,021 tokens of context"),
    ):
        with pytest.raises(EvaluationError, match=message):
            answer_batch(tiny, prompts, policy_of("full"), max_new_tokens=most)


def test_plain_prompts() -> None:
    tokenizer = make_tokenizer()
    form = PromptForm.of(tokenizer)
    assert (form.name, form.head, form.tail) == ("plain", (), ())
    ask = Ask(intro="Read:\n", question="Who?", answer="It was")
    decode = tokenizer.decode
    assert decode(form.before(tokenizer, ask, AGNOSTIC)) == "Read:\n"
    assert decode(form.before(tokenizer, ask, AWARE)) == "Who?\n\nRead:\n"
    assert decode(form.after(tokenizer, ask)) == "\n\nWho?\nIt was"


def test_chat_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer()
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<bot>"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    form = PromptForm.of(tokenizer, "auto")
    assert form.name == "chat"
    ask = Ask(intro="Read:\n", question="Who?", answer="It was")
    decode = tokenizer.decode
    assert decode(form.before(tokenizer, ask, AWARE)) == "<user>Who?\n\nRead:\n"
    assert decode(form.after(tokenizer, ask)) == "\n\nWho?</><bot>It was"
    assert PromptForm.of(tokenizer, "plain").name == "plain"
    monkeypatch.setattr(tokenizer, "chat_template", "always the same")
    with pytest.raises(EvaluationError, match="template does not show the user's words"):
        PromptForm.of(tokenizer, "chat")


def test_forms_that_there_are_not() -> None:
    with pytest.raises(EvaluationError, match="form must be auto, chat or plain, got 'loud'"):
        PromptForm.of(make_tokenizer(), "loud")  # type: ignore[arg-type]
    with pytest.raises(EvaluationError, match="tokenizer has no chat template"):
        PromptForm.of(make_tokenizer(), "chat")


def make_items(tiny: LoadedModel) -> list[Item]:
    return [
        Item(
            key=f"line|{n}",
            length=200,
            prompt=prompt,
            max_new_tokens=6,
            figures={"case": n},
            score=lambda answer: {"letters": len(answer)},
        )
        for n, prompt in enumerate(make_prompts(tiny))
    ]


def test_a_study_records_every_case_and_goes_on(
    tiny: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def counted(loaded: LoadedModel, prompts: Any, policy: Any, **options: Any) -> list[Answer]:
        asked.append((policy.name, len(prompts)))
        return answer_batch(loaded, prompts, policy, **options)

    monkeypatch.setattr(answering, "answer_batch", counted)
    told: list[tuple[str, int, int]] = []

    def study(specs: list[PolicySpec]) -> RunFile:
        with RunFile.open(
            tmp_path / "run.json", kind="ruler", config={"a": 1}, environment={}
        ) as run:
            run_cases(
                tiny,
                make_items(tiny),
                specs,
                [Budget(fraction=0.25)],
                run,
                settings=CacheSettings(interval=16, window=8, sinks=2),
                batch=2,
                on_progress=lambda *step: told.append(step),
            )
        return run

    keydiff, h2o = PolicySpec(name="keydiff"), PolicySpec(name="h2o")
    study([keydiff])
    assert asked == [("full", 2), ("full", 1), ("keydiff", 2), ("keydiff", 1)]
    assert told[-1] == ("keydiff at 0.25", 3, 3)
    asked.clear()
    run = study([keydiff, h2o])
    assert asked == [("h2o", 2), ("h2o", 1)]
    assert [case["key"] for case in run.cases] == [
        f"{policy}|{budget}|line|{n}"
        for policy, budget in (("full", "full"), ("keydiff", 50), ("h2o", 50))
        for n in range(3)
    ]
    last = run.cases[-1]
    assert (last["policy"], last["budget"], last["budget_fraction"]) == ("h2o", 50, 0.25)
    assert last["held"] == 50
    assert last["letters"] == len(last["answer"])
    assert last["kv_bytes"] < run.cases[2]["kv_bytes"]
