"""The model of the lm-evaluation-harness; skipped where the harness is not installed."""

from __future__ import annotations

import re
from typing import Any

import pytest

pytest.importorskip("lm_eval", exc_type=ImportError)

import lm_eval
from lm_eval.api.registry import get_model
from lm_eval.api.task import ConfigurableTask

from spectralkv import policies
from spectralkv.hf import EvictingCache
from spectralkv.lm_eval import SpectralLM


def repeat_task() -> ConfigurableTask:
    """Tell a name once, then talk on, then ask for it."""
    import datasets

    filler = "The committee met on the first Monday of every month. " * 12
    rows = [
        {"text": f"{name} is the chair. {filler}The chair is", "answer": name}
        for name in ("Anna", "Boris", "Clara")
    ]
    return ConfigurableTask(
        config={
            "task": "chair",
            "dataset_path": "none",
            "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
            "test_split": "test",
            "output_type": "generate_until",
            "doc_to_text": "{{text}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match"}],
        }
    )


def make_lm(demo_model: Any, **options: Any) -> SpectralLM:
    return SpectralLM(
        demo_model.model, tokenizer=demo_model.tokenizer, device="cpu", batch_size=3, **options
    )


def test_it_is_registered() -> None:
    assert get_model("spectralkv") is SpectralLM


def test_options_are_parted(demo_model: Any) -> None:
    lm = make_lm(demo_model, policy="h2o", budget=128, interval=16, max_length=512)
    assert lm._policy == policies.H2O(budget=128, interval=16)
    assert lm.max_length == 512
    with pytest.raises(ValueError, match="h2o must have a budget, got none"):
        make_lm(demo_model, policy="h2o")


@pytest.mark.slow
def test_a_task_is_generated_in_evicting_caches(
    demo_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    caches = []
    lm = make_lm(demo_model, budget=48, interval=8, window=16)
    generate = lm.model.generate

    def watched(*args: Any, **kwargs: Any) -> Any:
        caches.extend(one for one in kwargs.values() if isinstance(one, EvictingCache))
        return generate(*args, **kwargs)

    monkeypatch.setattr(lm.model, "generate", watched)
    found = lm_eval.simple_evaluate(lm, tasks=[repeat_task()], bootstrap_iters=0)
    answers = [sample["resps"][0][0] for sample in found["samples"]["chair"]]
    assert len(answers) == 3
    assert all(re.search(r"\w", answer) for answer in answers)
    stats = caches[0].stats()
    assert stats.tokens_seen > 120
    assert stats.tokens_kept < 48 + 8


def test_likelihoods_are_refused(demo_model: Any) -> None:
    with pytest.raises(ValueError, match="must be generate_until, got one of likelihoods"):
        make_lm(demo_model, budget=96).loglikelihood([])
