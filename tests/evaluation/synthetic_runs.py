"""Run files with invented figures, in the shape in which the studies leave them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from spectralkv.evaluation.runs import RunFile

ENVIRONMENT = {
    "commit": "0123456789abcdef0123456789abcdef01234567",
    "uncommitted_changes": False,
    "device": "cuda:0",
    "device_name": "NVIDIA Imagined",
    "dtype": "bfloat16",
    "command": "spectralkv evaluate",
}
#: Nats lost at a budget of 20 %.
LOSSES = {
    "spectral": 0.055,
    "spectral:populations=recent:edges:1.0": 0.066,
    "rkv:mix=0.3": 0.075,
    "h2o": 0.092,
    "snapkv": 0.090,
    "keydiff": 0.115,
    "tova": 0.104,
    "mix:of=h2o+keydiff": 0.082,
    "lazy_eviction": 0.098,
    "streaming_llm": 0.14,
    "random": 0.13,
}
LIMITS = {"clairvoyant:ahead=all": 0.004, "clairvoyant:ahead=256": 0.048}
LENGTH, FIRST = 2048, 1024
BUDGETS = {102: 0.05, 205: 0.1, 410: 0.2, 512: 0.25, 1024: 0.5}
VARIANTS = ("single", "multi_key", "multi_value", "multi_query")


def write_perplexity(
    folder: Path,
    *,
    name: str = "perplexity",
    policies: dict[str, float] | None = None,
    budgets: dict[int, float] | None = None,
    sequences: int = 12,
    finished: bool = True,
    model: str = "SmolLM2-135M-Instruct",
) -> Path:
    """Write a run of two texts; every policy's loss falls with the budget."""
    losses = {**LOSSES, **LIMITS} if policies is None else policies
    budgets = BUDGETS if budgets is None else budgets
    config = {"model": model, "dtype": "bfloat16", "first_scored": FIRST, "block": 64, "chunk": 32}
    path = folder / f"{name}.json"
    config |= {"interval": 32, "policies": list(losses), "window": None}
    with RunFile.open(path, kind="perplexity", config=config, environment=ENVIRONMENT) as run:
        for corpus in ("wikitext", "essays"):
            for sequence in range(sequences):
                text = _nats(corpus, sequence)
                _add_nats(run, "full", None, None, corpus, sequence, text)
                for policy, loss in losses.items():
                    for budget, fraction in budgets.items():
                        rng = np.random.default_rng([len(policy), budget, sequence])
                        at = loss * (0.2 / fraction) ** 1.3
                        noise = at * (1 + 0.35 * rng.standard_normal(text.size))
                        nats = text + 64 * noise
                        _add_nats(run, policy, budget, fraction, corpus, sequence, nats)
        if finished:
            run.finish()
    return path


def write_ablations(folder: Path) -> None:
    """Write a run an axis, in which one option at a time was changed."""
    axes: dict[str, dict[Any, float]] = {
        "hops": {1: 0.02, 2: 0.011, 5: 0.001, 20: 0.0003},
        "top_k": {4: 0.006, 8: 0.0, 16: -0.002, 32: 0.004},
        "restart_prob": {0.15: 0.008, 0.3: -0.004, 0.5: 0.0, 0.85: 0.012},
    }
    for axis, values in axes.items():
        config = {"model": "SmolLM2-135M-Instruct", "first_scored": FIRST, "block": 64}
        config |= {"base": "spectral", "axis": axis, "axis_title": f"what {axis} is"}
        config |= {"values": list(values)}
        path = folder / f"ablations-{axis}.json"
        with RunFile.open(path, kind="perplexity", config=config, environment=ENVIRONMENT) as run:
            for sequence in range(8):
                text = _nats("wikitext", sequence)
                said: dict[str, Any] = {"axis": axis, "value": None}
                _add_nats(run, "full", None, None, "wikitext", sequence, text, **said)
                if 0.0 not in values.values():
                    said["value"] = "base"
                    nats = text + 64 * 0.055
                    _add_nats(run, "spectral", 410, 0.2, "wikitext", sequence, nats, **said)
                for value, loss in values.items():
                    rng = np.random.default_rng([sequence, len(axis), int(100 * loss) % 7])
                    noise = 0.004 * rng.standard_normal(text.size) if loss else 0.0
                    nats = text + 64 * (0.055 + loss + noise)
                    policy = f"spectral:{axis}={value}" if loss else "spectral"
                    said["value"] = value
                    _add_nats(run, policy, 410, 0.2, "wikitext", sequence, nats, **said)
            run.finish()


def write_needles(folder: Path, *, cases: int = 4) -> Path:
    """Write needles of four variants, both questions, three lengths and five depths."""
    skills = {"spectral": 2.2, "keydiff": 1.9, "h2o": 0.3, "snapkv": 0.5, "rkv:mix=0.3": 1.2}
    path = folder / "needles.json"
    config = {"model": "SmolLM2-135M-Instruct", "seed": 0, "chunk": 32}
    rng = np.random.default_rng(0)
    with RunFile.open(path, kind="needle", config=config, environment=ENVIRONMENT) as run:
        for question in ("agnostic", "aware"):
            for variant in VARIANTS:
                for length in (1024, 2048, 4096):
                    for depth in (0.1, 0.3, 0.5, 0.7, 0.9):
                        for case in range(cases):
                            at = f"{question}|{variant}|{length}|{depth}|{case}"
                            for policy, skill in {"full": 4.0, **skills}.items():
                                for fraction in (None,) if policy == "full" else (0.25, 0.5):
                                    level = skill + 2 * (fraction or 1) - 0.3 * length / 1024
                                    level -= 0.4 * VARIANTS.index(variant)
                                    level += (question == "aware") * 0.8
                                    chance = 1 / (1 + math.exp(1.5 - level))
                                    digits = rng.binomial(7, chance) / 7
                                    run.add(
                                        f"{policy}|{fraction}|{at}",
                                        policy=policy,
                                        budget=None if fraction is None else int(fraction * length),
                                        budget_fraction=fraction,
                                        variant=variant,
                                        question=question,
                                        length=length,
                                        depth=depth,
                                        case=case,
                                        digits=digits,
                                        exact=bool(digits == 1),
                                        answer="1",
                                        expected=["1"],
                                        kv_bytes=1,
                                    )
        run.finish()
    return path


def write_ruler(folder: Path, *, cases: int = 6) -> Path:
    """Write RULER scores of four tasks at two lengths."""
    skills = {"full": 0.9, "spectral": 0.6, "h2o": 0.55, "keydiff": 0.4}
    path = folder / "ruler.json"
    rng = np.random.default_rng(1)
    config = {"model": "SmolLM2-135M-Instruct", "seed": 0}
    with RunFile.open(path, kind="ruler", config=config, environment=ENVIRONMENT) as run:
        for length in (2048, 4096):
            for task in ("variable_tracking", "common_words", "frequent_words", "niah_single"):
                for case in range(cases):
                    for policy, skill in skills.items():
                        for fraction in (None,) if policy == "full" else (0.25,):
                            run.add(
                                f"{policy}|{fraction}|{task}|{length}|{case}",
                                policy=policy,
                                budget=None if fraction is None else int(fraction * length),
                                budget_fraction=fraction,
                                task=task,
                                question="agnostic",
                                length=length,
                                case=case,
                                score=round(float(rng.binomial(5, skill)) / 5, 2),
                                answer="",
                                expected=[],
                            )
        run.finish()
    return path


def write_oracle(folder: Path, *, spearman: float | None = 0.99999) -> Path:
    """Write an oracle of 30 layers, of which H2O serves a third better."""
    path = folder / "oracle.json"
    config = {"model": "SmolLM2-135M-Instruct", "length": 1536, "continuation": 512, "budget": 307}
    rng = np.random.default_rng(2)
    gains: dict[str, float] = {"full": 0.0, "pagerank": 0.1, "h2o": 0.12, "clairvoyant": 0.01}
    with RunFile.open(path, kind="oracle", config=config, environment=ENVIRONMENT) as run:
        for sequence in range(4):
            text = _nats("wikitext", sequence)[:8]
            for layer in (None, *range(30)):
                for policy, loss in gains.items():
                    if policy == "full" and layer is not None:
                        continue
                    scale = 1.0 if layer is None else 0.02
                    turned = layer is not None and layer % 3 == 0 and policy == "h2o"
                    nats = text + 64 * scale * (loss - 0.05 * turned)
                    nats = nats + 0.3 * scale * rng.standard_normal(text.size)
                    run.add(
                        f"{sequence}|{policy}|{'all' if layer is None else layer}",
                        case="perplexity",
                        policy=policy,
                        layer=layer,
                        corpus="wikitext",
                        sequence=sequence,
                        budget=None if policy == "full" else 307,
                        budget_fraction=None if policy == "full" else 0.2,
                        nats=nats.tolist(),
                        tokens=512,
                        limit=policy == "clairvoyant",
                    )
            run.add(
                f"{sequence}|agreement|3|0",
                case="agreement",
                sequence=sequence,
                layer=3,
                head=0,
                spearman=spearman,
                spearman_dense=0.9999,
                seconds=1.0,
            )
            run.add(
                f"{sequence}|overlap|3",
                case="overlap",
                sequence=sequence,
                layer=3,
                walk=0.84,
                dense=0.83,
            )
        run.finish()
    return path


def _nats(corpus: str, sequence: int) -> np.ndarray:
    """Sums of 64 tokens each, the last block short."""
    rng = np.random.default_rng([len(corpus), sequence])
    return 64 * (2.9 + 0.2 * rng.standard_normal() + 0.3 * rng.standard_normal(16))


def _add_nats(
    run: RunFile,
    policy: str,
    budget: int | None,
    fraction: float | None,
    corpus: str,
    sequence: int,
    nats: np.ndarray,
    **figures: Any,
) -> None:
    run.add(
        f"{policy}|{budget or 'full'}|{corpus}|{sequence}",
        policy=policy,
        budget=budget,
        budget_fraction=fraction,
        corpus=corpus,
        sequence=sequence,
        length=LENGTH,
        first_scored=FIRST,
        nats=[round(float(x), 6) for x in nats],
        tokens=LENGTH - FIRST,
        kv_bytes=(budget or LENGTH) * 46080,
        graph_bytes=(budget or 0) * 7000 if policy.startswith("spectral") else 0,
        tokens_kept=budget or LENGTH,
        evictions=0,
        seconds=1.0,
        window=50,
        sinks=4,
        limit=policy.startswith("clairvoyant"),
        **figures,
    )
