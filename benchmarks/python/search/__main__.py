"""Judge eviction rules on perplexity and on needles at once.

    python benchmarks/python/search --wikitext wiki.test.raw --device cuda --output search.json
    python benchmarks/python/search --show search*.json --picture search.png

The texts and needles are those of the tuning split of benchmarks/python/study.py: the first
sequences of each text, and needles of seed 1. Every rule meets the same texts and needles. Results
are saved after each rule; the same command goes on where it stopped. Several processes may share a
device, each with a --shard and an --output of its own.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

if not __package__:  # started by its folder's name
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from search import results, simulate
from search.model import Decoder
from search.results import FULL, NEEDLES, PERPLEXITY
from search.rules import make_rules
from search.selection import Rule
from spectralkv.evaluation import (
    Budget,
    EvaluationError,
    LoadedModel,
    MissingDependencyError,
    load_demo_model,
    load_model,
    read_corpora,
    token_sequences,
)
from spectralkv.evaluation.answering import PromptForm
from spectralkv.evaluation.datasets import ESSAYS, Corpus
from spectralkv.evaluation.haystack import Haystack
from spectralkv.evaluation.needle import Case, CaseMaker
from spectralkv.evaluation.report import environment

TASKS = (PERPLEXITY, NEEDLES)
# Tokens that are fed to both forward passes before a search, to see that they agree.
_CHECKED = 128


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", default="demo", help="demo (SmolLM2-135M-Instruct), a hub name, folder or .gguf")
    add("--device", default="cpu")
    add("--wikitext", help="WikiText-2 raw, test split: a UTF-8 file; put before the texts")
    add("--text", action="append", help="essays (the default), demo or a file; repeatable")
    add("--sequences", type=int, default=8, help="of each text; 0: no perplexity")
    add("--skip", type=int, default=0, help="sequences left out at the beginning of each text")
    add("--length", type=int, default=2048, help="tokens a sequence")
    add("--budget", action="append", help="share or tokens, for perplexity; repeatable; 0.2")
    add("--needles", type=int, default=8, help="cases at each depth; 0: none")
    add("--depth", action="append", type=float, help="repeatable; 0.1 0.3 0.5 0.7")
    add("--variant", default="single", help="of needle: single, multi_key, multi_value ...")
    add("--context", type=int, default=1800, help="tokens of a haystack, from the last text")
    add("--seed", type=int, default=1, help="of the needles")
    add("--needle-budget", action="append", help="repeatable; 0.5 0.25")
    add("--interval", type=int, default=32, help="tokens between two cuts")
    add("--batch", type=int, default=32, help="sequences or cases at a time")
    add("--task", action="append", choices=TASKS, help="for now this one alone; repeatable")
    add("--only", action="append", default=[], help="groups or names, * and ? allowed; repeatable")
    add("--shard", default="0/1", help="i/n: every n-th rule, from the i-th on")
    add("--limit", type=float, default=0.0, help="seconds after which no rule is begun; 0: none")
    add("--output", type=Path, default=Path("build/search.json"))
    add("--list", action="store_true", help="print the rules and their reasons")
    add("--show", type=Path, nargs="+", metavar="FILE", help="print the table of such files")
    add("--picture", type=Path, help="PNG; beside --output if left out")
    options = parser.parse_args(arguments)
    options.budget = options.budget or ["0.2"]
    options.needle_budget = options.needle_budget or ["0.5", "0.25"]
    options.depth = options.depth or [0.1, 0.3, 0.5, 0.7]
    options.text = [*filter(None, [options.wikitext]), *(options.text or [ESSAYS])]
    return options


def chosen(
    groups: dict[str, list[Rule]], only: Sequence[str], shard: str
) -> list[tuple[str, Rule]]:
    """Return (group, rule) of this process.

    Raises
    ------
    EvaluationError
        Nothing has such a name, or the shard is none.
    """
    every = [(group, rule) for group, rules in groups.items() for rule in rules]
    for pattern in only:
        if not any(fnmatchcase(name, pattern) for g, rule in every for name in (g, rule.name)):
            raise EvaluationError(f"no group or rule is called {pattern!r}; see --list")
    picked = [
        (group, rule)
        for group, rule in every
        if not only
        or any(fnmatchcase(name, pattern) for pattern in only for name in (group, rule.name))
    ]
    first, _, count = shard.partition("/")
    if not (first.isdigit() and count.isdigit() and int(first) < int(count)):
        raise EvaluationError(f"shard must be i/n with i from 0 to n - 1, got {shard!r}")
    return picked[int(first) :: int(count)]


class Judge:
    """Texts, needles and a model to judge rules with.

    Parameters
    ----------
    loaded : LoadedModel
        The model, in float32, and its tokenizer.
    corpora : sequence of Corpus
        Texts; the last one is the haystack.
    options : argparse.Namespace
        See `parse`.
    """

    def __init__(
        self, loaded: LoadedModel, corpora: Sequence[Corpus], options: argparse.Namespace
    ) -> None:
        self.decoder = Decoder(loaded.model)
        self.tokenizer = loaded.tokenizer
        self._options = options
        sequences = [
            ids
            for corpus in corpora
            for ids in token_sequences(
                self.tokenizer,
                corpus.text,
                length=options.length,
                count=max(1, options.sequences),
                skip=options.skip,
            )
        ]
        self._ids = torch.tensor(sequences, device=self.decoder.device)
        self._check()
        self._cases: list[Case] = []
        if options.needles:
            maker = CaseMaker(
                tokenizer=self.tokenizer,
                form=PromptForm.of(self.tokenizer),
                haystack=Haystack.of(corpora[-1], self.tokenizer),
                seed=options.seed,
            )
            self._cases = [
                maker.make(options.variant, length=options.context, depth=depth, index=index)
                for depth in options.depth
                for index in range(options.needles)
            ]
        self._full: torch.Tensor | None = None

    @torch.inference_mode()
    def _check(self) -> None:
        ids = self._ids[:2, :_CHECKED]
        run = simulate.Simulation(self.decoder, ids)
        where = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape[0], -1)
        hidden, _ = run.forward(ids, where)
        self.decoder.check(self.decoder.logits(hidden), ids)

    def tasks(self) -> list[tuple[str, str]]:
        """Return (task, budget) of all that is asked for."""
        texts = self._options.budget if self._options.sequences else []
        haystacks = self._options.needle_budget if self._cases else []
        every = [(PERPLEXITY, b) for b in texts] + [(NEEDLES, b) for b in haystacks]
        return [(task, b) for task, b in every if task in (self._options.task or TASKS)]

    def full(self, task: str, budget: str) -> dict[str, Any]:
        """Return the figures of the full cache on the tokens that count at a budget."""
        begin = time.perf_counter()
        options = self._options
        if task == PERPLEXITY:
            if self._full is None:
                self._full = simulate.perplexity(
                    self.decoder, self._ids, None, budget=0, batch=options.batch
                ).nats
            first = Budget.parse(budget).resolve(options.length)
            figures = {"nats": self._full[:, first - 1 :].mean(1).tolist()}
        else:
            asked = simulate.needles(
                self.decoder, self.tokenizer, self._cases, None, budget=0, batch=options.batch
            )
            figures = {"exact": asked.exact, "digits": asked.digits, "answers": asked.answers}
        seconds = round(time.perf_counter() - begin, 2)
        return {"budget": None, **figures, "longest": 0, "seconds": seconds}

    def judge(self, rule: Rule, task: str, budget: str) -> dict[str, Any]:
        """Return the figures of a rule."""
        begin = time.perf_counter()
        options = self._options
        common = {"interval": options.interval, "batch": options.batch}
        if task == PERPLEXITY:
            tokens = Budget.parse(budget).resolve(options.length)
            read = simulate.perplexity(self.decoder, self._ids, rule, budget=tokens, **common)
            figures = {"nats": read.nats[:, tokens - 1 :].mean(1).tolist()}
            longest = read.longest
        else:
            tokens = Budget.parse(budget).resolve(options.context)
            asked = simulate.needles(
                self.decoder, self.tokenizer, self._cases, rule, budget=tokens, **common
            )
            figures = {"exact": asked.exact, "digits": asked.digits, "answers": asked.answers}
            longest = asked.longest
        seconds = round(time.perf_counter() - begin, 2)
        return {"budget": tokens, **figures, "longest": longest, "seconds": seconds}


def search(
    judge: Judge, rules: Sequence[tuple[str, Rule]], found: results.Results, limit: float
) -> int:
    """Judge all rules that are not judged yet; return how many failed."""
    start, failed = time.perf_counter(), 0
    full = {"group": "full", "why": "nothing is evicted", "definition": "full", "limit": False}
    for task, budget in judge.tasks():
        key = budget if task == PERPLEXITY else "all"
        if not found.is_done(FULL, "full", task, key):
            found.add(FULL, full, task, key, judge.full(task, budget))
    for order, (group, rule) in enumerate(rules, start=1):
        if limit and time.perf_counter() - start > limit:
            print(f"time is over after {order - 1} of {len(rules)} rules", flush=True)
            break
        facts = {
            "group": group,
            "why": rule.why,
            "limit": rule.limit,
            # A new reason makes no new rule.
            "definition": repr(rule).replace(f", why={rule.why!r}", ""),
        }
        told = []
        try:
            for task, budget in judge.tasks():
                if found.is_done(rule.name, facts["definition"], task, budget):
                    continue
                figures = judge.judge(rule, task, budget)
                found.add(rule.name, facts, task, budget, figures)
                told.append(_told(found, task, budget, figures))
        except EvaluationError as error:
            failed += 1
            told.append(str(error))
        except Exception:  # one rule's mistake must not cost the others their time
            failed += 1
            told.append(traceback.format_exc(limit=-2))
        if told:
            print(f"{order}/{len(rules)} {rule.name}: {'; '.join(told)}", flush=True)
        if judge.decoder.device.type == "cuda":
            torch.cuda.empty_cache()  # other processes may want it
    if judge.decoder.device.type == "cuda":
        print(f"most memory: {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB", flush=True)
    return failed


def _told(found: results.Results, task: str, budget: str, figures: dict[str, Any]) -> str:
    if task == NEEDLES:
        exact = sum(figures["exact"]) / len(figures["exact"])
        return f"needles at {budget} {exact:.2f} ({figures['seconds']} s)"
    base = found.content["rules"][FULL][PERPLEXITY][budget]["nats"]
    above = (sum(figures["nats"]) - sum(base)) / len(base)
    return f"excess at {budget} {above:.4f} ({figures['seconds']} s)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    options = parse(arguments)
    try:
        return _run(options)
    except (EvaluationError, MissingDependencyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    if options.show:
        content = results.gather(options.show)
        print(results.table(content))
        if options.picture:
            results.draw(content, options.picture)
        return 0
    if options.model == "demo":
        loaded = load_demo_model(dtype="float32", device=options.device)
    else:
        loaded = load_model(options.model, dtype="float32", device=options.device)
    groups = make_rules(loaded.tokenizer)
    rules = chosen(groups, options.only, options.shard)
    if options.list:
        for group, rule in rules:
            print(f"{group:10s} {rule.name:50s} {rule.why}")
        return 0
    corpora = read_corpora(options.text)
    judge = Judge(loaded, corpora, options)
    found = results.Results(
        options.output,
        config={
            "model": loaded.name,
            "texts": {corpus.name: corpus.sha256 for corpus in corpora},
            **{
                name: getattr(options, name)
                for name in ("sequences", "skip", "length", "needles", "depth", "variant")
            },
            **{name: getattr(options, name) for name in ("context", "seed", "interval")},
        },
        environment=environment(options.device, "float32"),
    )
    failed = search(judge, rules, found, options.limit)
    print(results.table(found.content))
    picture = options.picture or options.output.with_suffix(".png")
    try:
        results.draw(found.content, picture)
    except EvaluationError as error:
        print(f"no picture: {error}")
    if failed:
        print(f"{failed} rules failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
