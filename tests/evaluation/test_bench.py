"""The measurements of `spectralkv bench`: steps of every kind of cache, and prompts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Cache, StaticCache

import spectralkv
from spectralkv.evaluation import (
    EvaluationError,
    bench,
    bench_caches,
    bench_clock,
    bench_prompt,
    bench_report,
)
from spectralkv.evaluation.bench import (
    BenchConfig,
    BenchResult,
    BenchRow,
    FlatRun,
    random_model,
    run_bench,
    spread_head_shares,
)
from spectralkv.evaluation.bench_caches import GROUPS, CacheKind, Setting, Subject
from spectralkv.evaluation.bench_prompt import PromptCost, PromptRow, prompt_cost
from spectralkv.hf import EvictingCache
from spectralkv.hf.layer import EvictingLayer
from spectralkv.policies import Spectral
from spectralkv.policies.head_shares import check_head_shares

OURS = ("dynamic", "static", "fused", "loop", "policy", "model")
SMALL = BenchConfig(
    contexts=(100, 200),
    budgets=(0.2, 0.5),
    steps=4,
    repeats=2,
    interval=2,
    window=8,
    chunk=30,
    caches=OURS,
)
PROMPTS = replace(SMALL, contexts=(100,), caches=(), prefill=True, prompt_rows=(7,))
SLOT = 2 * 2 * 2 * 64 * 4  # layers, keys and values, heads, dimensions, bytes
ROW = BenchRow(kind="a", group="static", context=100, step_seconds=(2.0, 1.0, 3.0), batch=4)


def only(*kinds: CacheKind) -> Any:
    return lambda *_: (list(kinds), [])


def failing(error: Exception, group: str = "loop") -> CacheKind:
    @contextmanager
    def make(_: Setting) -> Iterator[Subject]:
        raise error
        yield

    return CacheKind(name=type(error).__name__, group=group, open=make)


def test_every_cache_at_every_context() -> None:
    told: list[tuple[str, int, int]] = []
    seen: list[BenchResult] = []
    result = run_bench(
        random_model("tiny"),
        SMALL,
        on_progress=lambda *step: told.append(step),
        on_result=seen.append,
    )
    assert [row.label for row in result.rows if row.context == 100] == [
        "StaticCache fused",
        "StaticCache",
        "DynamicCache",
        "Spectral loop 20%",
        "Spectral loop 50%",
        "Spectral policy 50%",
        "Spectral model 50%",
    ]
    assert told[0] == ("measuring", 0, 14)
    assert told[-1] == ("measuring", 14, 14)
    assert [len(one.rows) for one in seen] == list(range(1, 15))
    assert seen[-1] == result
    for row in result.rows:
        assert row.failure == ""
        assert len(row.step_seconds) == 2
        assert row.tokens_per_s == 1 / row.seconds > 0
        assert not row.is_captured
        assert row.peak_bytes is None
        over = result.over_full(row)
        assert over is not None
        assert over >= 1.0 or row.budget is not None
        if row.budget is None:
            assert row.kv_bytes == (row.context + 2 + 2 * 4) * SLOT
        else:
            assert row.budget == row.context * (row.share or 0.0)
            assert row.kv_bytes == (row.budget + 2) * SLOT
            assert row.graph_bytes > 0
    assert result.to_dict()["rows"][0]["over_full"] >= 1.0


def test_compiled_steps_are_timed() -> None:
    config = replace(
        SMALL, contexts=(100,), budgets=(0.5,), caches=("static", "fused", "loop"), compiled="eager"
    )
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    result = run_bench(random_model("tiny"), config)
    labels = {row.label for row in result.rows}
    assert labels == {"StaticCache", "StaticCache fused", "Spectral loop 50%"}
    assert all(row.seconds > 0 and not row.failure for row in result.rows)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= before + 3
    with pytest.raises(EvaluationError, match=r"compiled expected a backend of torch\.compile"):
        run_bench(random_model("tiny"), replace(config, compiled="gcc"))


@pytest.mark.parametrize("group", ["loop", "policy", "model"])
def test_a_cut_comes_before_the_clock_and_in_each_measurement(group: str) -> None:
    model = random_model("tiny").model
    (kind,), _ = bench_caches.cache_kinds((group,), (0.5,), (0.5,))
    setting = Setting(
        model=model,
        batch=2,
        context=100,
        policy=replace(SMALL.policy(100, 0.5), interval=8),
        steps=24,
        chunk=7,
    )
    with torch.no_grad(), kind.open(setting) as subject:
        layer = subject.cache.evicting_layers[0]
        slabs = layer.slabs
        assert layer.lengths == (56, 56)
        subject.run(subject.warm_up)
        cuts = layer.evictions
        assert cuts == (2 if group == "loop" else 1)
        for count in (1, 2, 3):
            subject.run(subject.period)
            assert layer.evictions == cuts + count
        assert layer.slabs == slabs  # of the right size from the beginning


def test_slabs_do_not_grow_while_they_are_filled(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    resize = EvictingLayer._resize

    def spy(layer: EvictingLayer, capacity: int, used: int) -> None:
        sizes.append(capacity)
        resize(layer, capacity, used)

    monkeypatch.setattr(EvictingLayer, "_resize", spy)
    run_bench(random_model("tiny"), replace(SMALL, contexts=(100,), caches=("loop", "model")))
    assert sizes == [22, 22, 52, 52, 52, 52]


def test_rows_stop_when_their_time_is_over() -> None:
    config = replace(SMALL, contexts=(100,), repeats=50, row_seconds=0.0, caches=("dynamic",))
    (row,) = run_bench(random_model("tiny"), config).rows
    assert len(row.step_seconds) == 1
    assert row.quartiles == (row.seconds, row.seconds)


def test_a_fused_cache_attends_to_all_its_slots_without_a_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[tuple[Any, ...]] = []
    attend = bench_caches._attend_fused

    def spy(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        attended, weights = attend(module, query, key, value, mask, **options)
        seen.append((query, key.clone(), value.clone(), mask, options["scaling"], attended))
        return attended, weights

    monkeypatch.setattr(bench_caches, "_attend_fused", spy)
    loaded = random_model("tiny")
    before = loaded.model.config._attn_implementation
    row = run_bench(loaded, replace(SMALL, contexts=(100,), caches=("fused",))).rows[0]
    assert row.kind == "StaticCache fused"
    assert loaded.model.config._attn_implementation == before
    query, key, value, mask, scaling, attended = seen[0]
    assert mask is None
    assert key.shape[2] > 100
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) * scaling
    expected = scores.softmax(-1) @ value.repeat_interleave(group, 1)
    torch.testing.assert_close(attended, expected.transpose(1, 2))


def test_bytes_of_a_quantized_cache() -> None:
    transformers = pytest.importorskip("transformers")
    if not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no fp8 cache")
    config = replace(SMALL, contexts=(100,), caches=("quantized",))
    row = run_bench(random_model("tiny"), config).rows[0]
    assert row.kind == "QuantizedCache fp8"
    # A byte each, and two scales of a float32 a layer.
    assert row.kv_bytes == (100 + 2 + 2 * 4) * SLOT // 4 + 2 * 2 * 4


def test_what_is_missing_is_told_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_caches, "_is_installed", lambda _: False)
    kinds, notes = bench_caches.cache_kinds(GROUPS, (0.2,), (0.2,))
    assert {"kvpress", "QuantizedCache quanto"} & {kind.name for kind in kinds} == set()
    assert any("pip install optimum-quanto, or hqq" in note for note in notes)
    assert any("pip install kvpress" in note for note in notes)
    monkeypatch.setattr(bench_caches, "_is_installed", lambda _: True)
    kinds, notes = bench_caches.cache_kinds(GROUPS, (0.2,), (0.2,))
    assert notes == []
    assert [kind.name for kind in kinds][-3:] == [
        "QuantizedCache quanto",
        "kvpress Knorm",
        "kvpress SnapKV",
    ]


def test_presses_cut_in_each_measurement() -> None:
    pytest.importorskip("kvpress", exc_type=ImportError)
    config = replace(SMALL, interval=4, contexts=(100,), caches=("kvpress",))
    for row in run_bench(random_model("tiny"), config).rows:
        assert row.failure == ""
        assert row.kv_bytes == (50 + 2) * SLOT


def test_what_cannot_be_measured_has_a_row_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    refused = RuntimeError("[decode] the step cannot be captured, because ...\nand more")
    masked = RuntimeError("operation failed due to a previous error during capture")
    masked.__context__ = torch.cuda.OutOfMemoryError("of 9 GiB")
    kinds = [
        failing(torch.cuda.OutOfMemoryError("of 9 GiB")),
        replace(failing(spectralkv.CudaError("cudaMalloc: out of memory: asked for 1")), name="b"),
        replace(failing(masked), name="c"),
        replace(failing(refused), name="d"),
        replace(failing(KeyError("cache_position"), "kvpress"), name="e"),
    ]
    monkeypatch.setattr(bench, "cache_kinds", only(*kinds))
    config = replace(SMALL, contexts=(100,))
    result = run_bench(random_model("tiny"), config)
    assert [row.failure for row in result.rows] == [
        "does not fit",
        "does not fit",
        "does not fit",
        "not captured: [decode] the step cannot be captured, because ...",
        "failed: KeyError: 'cache_position'",
    ]
    assert all(result.over_full(row) is None for row in result.rows)
    monkeypatch.setattr(bench, "cache_kinds", only(failing(RuntimeError("another fault"))))
    with pytest.raises(RuntimeError, match="another fault"):
        run_bench(random_model("tiny"), config)


def test_what_a_failed_row_held_is_gone_before_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    import weakref

    held: list[weakref.ref[Any]] = []

    @contextmanager
    def make(setting: Setting) -> Iterator[Subject]:
        cache = StaticCache(config=setting.model.config, max_cache_len=9)
        cache.itself = [cache]  # only the collector finds it
        assert all(one() is None for one in held)
        held.append(weakref.ref(cache))
        raise torch.cuda.OutOfMemoryError("of 9 GiB")
        yield

    kind = CacheKind(name="full", group="static", open=make)
    monkeypatch.setattr(bench, "cache_kinds", only(kind, replace(kind, name="again")))
    assert len(run_bench(random_model("tiny"), SMALL).rows) == 4
    assert len(held) == 4


def test_the_largest_batch_is_computed_then_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    model = random_model("tiny").model
    row = replace(
        ROW, step_seconds=(1.0,), kv_bytes=3_000_000, graph_bytes=1_000_000, peak_bytes=6_000_000
    )
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (100_000_000, 1))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 1_500_000)
    tried: list[int] = []

    def measure(_: Any, config: BenchConfig, *__: Any) -> BenchRow:
        tried.append(config.batch)
        failure = "does not fit" if len(tried) < 3 else ""
        return replace(row, batch=config.batch, failure=failure)

    monkeypatch.setattr(bench, "_row", measure)
    kind = failing(ValueError())
    found = bench._largest(model, SMALL, 100, kind, row)
    a_sequence = 1_000_000 + 3 * 4 * 256
    assert tried == [int((share * 1e8 - 500_000) / a_sequence) for share in (0.96, 0.9, 0.8)]
    assert (found.batch, found.failure) == (tried[-1], "")
    failed = replace(row, failure="does not fit")
    assert bench._largest(model, SMALL, 100, kind, failed) == failed


def test_a_long_generation_is_measured_in_windows() -> None:
    config = replace(SMALL, caches=(), flat=40)
    result = run_bench(random_model("tiny"), config)
    flat = result.flat
    assert flat is not None
    assert result.rows == ()
    assert (flat.window, len(flat.step_seconds), flat.budget) == (20, 2, 50)
    assert flat.begin_bytes == flat.end_bytes > 52 * SLOT
    assert result.to_dict()["flat"]["growth"] == flat.growth


def test_prompts_are_read_whole_with_each_sampling_uncut_and_cut(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded, read = random_model("tiny"), []
    forward = loaded.model.forward

    def spy(*, input_ids: torch.Tensor, **options: Any) -> Any:
        cache = next(one for one in options.values() if isinstance(one, Cache))
        held = cache.get_seq_length()
        output = forward(input_ids=input_ids, **options)
        read.append((input_ids.clone(), held, cache))
        return output

    spy.__signature__ = inspect.signature(forward)  # type: ignore[attr-defined]
    config = replace(PROMPTS, contexts=(100, 130), batch=2, row_seconds=60.0)
    told: list[tuple[str, int, int]] = []
    seen: list[BenchResult] = []
    with monkeypatch.context() as patch:
        patch.setattr(bench, "_wake", lambda *_: None)
        patch.setattr(loaded.model, "forward", spy)
        result = run_bench(
            loaded, config, on_progress=lambda *step: told.append(step), on_result=seen.append
        )
    assert told == [("measuring", done, 2) for done in range(3)]
    assert [len(one.prompts) for one in seen] == [5, 10]
    assert result.rows == ()
    wanted = [(None, None), (7, None), (7, 50), (100, None), (100, 50)]
    short = result.prompts[:5]
    assert [(row.prompt_rows, row.budget) for row in short] == wanted
    assert [row.is_default for row in short] == [False, False, False, True, True]
    assert [row.budget for row in result.prompts[5:]] == [None, None, 65, None, 65]
    for row in result.prompts:
        assert (row.failure, row.batch, row.split) == ("", 2, {})
        assert len(row.prompt_seconds) == 2
        assert min(row.prompt_seconds) > 0.0
    # Two measurements behind a warm-up, in turns, each into an empty cache of its own.
    assert len(read) == 2 * 3 * 5
    assert len({id(cache) for _, _, cache in read}) == len(read)
    for i, (ids, held, cache) in enumerate(read[:15]):
        assert (ids.shape, held) == ((2, 100), 0)
        assert torch.equal(ids, read[0][0])
        rows, budget = wanted[i % 5]
        if rows is None:
            assert not isinstance(cache, EvictingCache)
            continue
        assert isinstance(cache.policy, Spectral)
        assert (cache.policy.prompt_rows, cache.policy.budget) == (rows, budget)
        assert cache.stats().evictions == (0 if budget is None else 2)
        assert {layer.lengths for layer in cache.evicting_layers} == {(budget or 100,) * 2}
    assert read[0][0].unique().numel() > 50


def test_prompts_stop_when_their_time_is_over() -> None:
    result = run_bench(random_model("tiny"), replace(PROMPTS, repeats=50, row_seconds=0.0))
    assert [len(row.prompt_seconds) for row in result.prompts] == [1] * 5


def test_a_prompt_that_does_not_fit_has_a_row_that_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reader = bench_prompt._reader
    refused: list[Any] = []

    def make(model: Any, ids: torch.Tensor, policy: Any) -> Any:
        if policy is not None and policy.budget is None and policy.prompt_rows == 100:
            refused.append(policy)
            raise spectralkv.CudaError("cudaMalloc: out of memory: asked for 1")
        return reader(model, ids, policy)

    monkeypatch.setattr(bench_prompt, "_reader", make)
    result = run_bench(random_model("tiny"), PROMPTS)
    assert [row.failure for row in result.prompts] == ["", "", "", "does not fit", ""]
    assert len(refused) == 1
    assert [len(row.prompt_seconds) for row in result.prompts] == [2, 2, 2, 0, 2]
    costs = [prompt_cost(row, result.prompts) for row in result.prompts]
    assert costs[3] == PromptCost(over_full=None, rows_seconds=None, cut_seconds=None)
    assert costs[4].over_full is not None
    assert costs[4].cut_seconds is None
    assert costs[2].cut_seconds is not None
    monkeypatch.setattr(bench_prompt, "_reader", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        run_bench(random_model("tiny"), PROMPTS)


def test_what_a_prompt_costs_is_a_difference_of_medians() -> None:
    full = PromptRow(context=100, prompt_seconds=(2.0, 1.0, 9.0))
    uncut = replace(full, prompt_rows=4, prompt_seconds=(3.0,))
    cut = replace(uncut, budget=50, prompt_seconds=(3.5, 3.25))
    other = replace(full, context=200, prompt_seconds=(7.0,))
    rows = (other, full, uncut, cut)
    assert prompt_cost(full, rows) == PromptCost(over_full=1.0, rows_seconds=None, cut_seconds=None)
    assert prompt_cost(uncut, rows) == PromptCost(over_full=1.5, rows_seconds=1.0, cut_seconds=None)
    assert prompt_cost(cut, rows) == PromptCost(
        over_full=1.6875, rows_seconds=1.0, cut_seconds=0.375
    )
    result = BenchResult(model="m", config=SMALL, prompts=rows).to_dict()
    assert result["prompts"][3]["seconds"] == 3.375
    assert result["prompts"][3]["cut_seconds"] == 0.375
    assert [row["kind"] for row in result["prompts"]] == ["DynamicCache"] * 2 + ["Spectral"] * 2


def test_growth_is_that_of_the_fitted_line() -> None:
    flat = FlatRun(
        context=100,
        budget=50,
        batch=1,
        window=500,
        step_seconds=(1.0, 1.1, 1.2, 1.3, 1.4),
        begin_bytes=1,
        end_bytes=1,
    )
    assert flat.growth == pytest.approx(5 * 0.1 / 1.2)
    assert replace(flat, step_seconds=(2.0, 2.0)).growth == 0.0


def test_a_long_generation_that_does_not_fit_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        bench, "cache_kinds", only(failing(spectralkv.CudaError("cudaMalloc: out of memory")))
    )
    result = run_bench(random_model("tiny"), replace(SMALL, contexts=(100,), flat=40))
    assert result.flat is None
    assert result.notes == ("left out: the long generation, which does not fit",)


@pytest.mark.parametrize(
    ("kernel", "part"),
    [
        ("void spectralkv::cuda::(anonymous namespace)::attend_kernel<float>(int)", "attention"),
        ("void pytorch_flash::flash_fwd_splitkv_kernel<...>", "attention"),
        ("fmha_cutlassF_bf16_aligned_64x128_rf_sm80(...)", "attention"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16", "attention"),
        ("void spectralkv::cuda::(anonymous namespace)::place_kernel<...>", "side work"),
        ("nvjet_tst_128x8_64x12_4x1_v_bz_TNT", "other"),
        ("Memcpy DtoD (Device -> Device)", "other"),
    ],
)
def test_kernels_are_told_apart_by_name(kernel: str, part: str) -> None:
    assert bench_clock.part_of(kernel) == part


def test_a_split_adds_up_to_the_step() -> None:
    split = bench_clock.split_by_part({"flash": 2.0, "gemm": 3.0, "spectralkv::x": 0.5}, 6.0)
    assert split == {"attention": 2.0, "side work": 0.5, "other": 3.0, "idle": 0.5}
    assert bench_clock.split_by_part({"gemm": 3.0}, 2.0)["idle"] == 0.0


def test_tables_and_pictures_show_rows_with_and_without_figures(tmp_path: Path) -> None:
    split = dict.fromkeys(bench_clock.PARTS, 0.001)
    loop = replace(
        ROW,
        kind="Spectral loop",
        group="loop",
        share=0.2,
        budget=20,
        step_seconds=(1.0,),
        kv_bytes=2**20,
        peak_bytes=2**30,
        split=split,
        is_captured=True,
    )
    rows = (ROW, loop, replace(loop, context=200, failure="does not fit"))
    flat = FlatRun(
        context=100,
        budget=20,
        batch=4,
        window=500,
        step_seconds=(1.0, 1.0),
        begin_bytes=2**20,
        end_bytes=2**20,
    )
    full = PromptRow(context=100, batch=4, prompt_seconds=(0.5, 0.25, 0.75))
    uncut = replace(full, prompt_rows=1, is_default=True, prompt_seconds=(1.0,), split=split)
    prompts = (full, uncut, replace(uncut, budget=2000, prompt_seconds=(), failure="does not fit"))
    result = BenchResult(
        model="m",
        config=SMALL,
        rows=rows,
        prompts=prompts,
        largest=(replace(loop, batch=77), rows[2]),
        flat=flat,
        notes=("left out: x",),
    )
    text = bench_report.markdown(result, where="float32 on cpu", command="spectralkv bench")
    lines = text.splitlines()
    assert lines[0] == "m, float32 on cpu: `spectralkv bench`"
    assert (
        "| 100 | Spectral loop 20% | CUDA graph | 1000.00 [1000.00, 1000.00] | 4.0 | 0.50 | 1.0 MiB"
        " | 1.00 GiB | 1.00 | 1.00 | 1.00 | 1.00 |"
    ) in lines
    assert "| 200 | Spectral loop 20% | does not fit |  |  |  |  |  |  |  |  |  |" in lines
    assert (
        "| 100 | a | plain | 2000.00 [1500.00, 2500.00] | 2.0 | 1.00 | 0 B | - | - | - | - | - |"
        in lines
    )
    assert "Prompts, batch 1:" in lines
    assert (
        "| 100 | DynamicCache | - | all | 500.0 [250.0, 750.0] | 1.000 | - | - | - | - | - | - |"
        in lines
    )
    assert (
        "| 100 | Spectral | 1 (default) | all | 1000.0 [1000.0, 1000.0] | 2.000 | 500.0 | - | 1.00"
        " | 1.00 | 1.00 | 1.00 |"
    ) in lines
    assert "| 100 | Spectral | 1 (default) | 2,000 | does not fit |  |  |  |  |  |  |  |" in lines
    assert "| 100 | Spectral loop 20% | 77 | 77.0 | 1.0 MiB |" in lines
    assert "| 1000.00 | 1000.00 | +0.00% | 1.0 MiB | 1.0 MiB |" in lines
    assert "- left out: x" in lines
    bench_report.plot_bench(result, tmp_path / "bench.png", where="here")
    bench_report.plot_flat(result, flat, tmp_path / "flat.png", where="here")
    for name in ("bench.png", "flat.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"contexts": ()}, "contexts must be numbers of 1 or more, got ()"),
        ({"budgets": (1.5,)}, "budgets must be shares between 0 and 1, got 1.5"),
        ({"budgets": ()}, "budgets must be at least one share, got none"),
        ({"eager_budgets": (0.0,)}, "budgets must be shares between 0 and 1, got 0.0"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"row_seconds": -1.0}, "row_seconds must be 0 or more, got -1.0"),
        ({"flat": 1}, "flat must be 0 or at least 2 tokens, got 1"),
        ({"prompt_rows": (4, 0)}, "prompt_rows must be 1 or more, got (4, 0)"),
        (
            {"prefill": True, "interval": 60},
            "must have at least budget + interval = 110 tokens, got a context of 100",
        ),
        ({"caches": ("paged",)}, "caches must be of dynamic, static, fused, loop, policy,"),
        ({"budgets": (0.05,)}, "5% of a context of 100: [spectral] budget must be at least"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(EvaluationError) as error:
        replace(SMALL, **options)
    assert said in str(error.value)


@pytest.mark.parametrize("option", ["split", "largest_batch"])
def test_what_needs_cuda_says_so(option: str) -> None:
    config = replace(SMALL, **{option: True})
    with pytest.raises(
        EvaluationError, match=f"{option} must have a model on CUDA, got one on cpu"
    ):
        run_bench(random_model("tiny"), config)


def test_shapes_have_names() -> None:
    with pytest.raises(EvaluationError, match="shape must be one of 8b, 135m, tiny, got '9b'"):
        random_model("9b")


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_rows_on_cuda_are_captured_and_split(monkeypatch: pytest.MonkeyPatch) -> None:
    # As if the device had little left: the largest batch is then found in no time.
    loaded = random_model("tiny", device="cuda")
    before = bench_clock.DeviceMemory.now(loaded.model.device)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (1 << 27, 1 << 30))
    config = replace(
        SMALL, contexts=(400,), interval=4, repeats=1, split=True, largest_batch=True, flat=40
    )
    result = run_bench(loaded, config)
    assert [row.failure for row in (*result.rows, *result.largest)] == [""] * 10
    captured = {row.group for row in result.rows if row.is_captured}
    assert captured == {"static", "fused", "loop"}
    for row in result.rows:
        assert row.peak_bytes is not None
        assert row.peak_bytes > row.kv_bytes
        assert row.split["attention"] > 0.0
        assert (row.split["side work"] > 0.0) == (row.budget is not None)
    assert all(row.batch > 1 for row in result.largest)
    assert result.flat is not None
    # torch may have asked for another segment of 2 MiB.
    assert abs(result.flat.begin_bytes - result.flat.end_bytes) <= 1 << 21
    monkeypatch.undo()
    bench_clock.free_memory(loaded.model.device)
    # A workspace of cuBLAS stays for each stream, captures' included.
    assert bench_clock.DeviceMemory.now(loaded.model.device).allocated - before.allocated < 1 << 27


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_prompts_on_cuda_are_split() -> None:
    config = replace(PROMPTS, contexts=(400,), split=True)
    full, *ours = run_bench(random_model("tiny", device="cuda"), config).prompts
    assert [row.failure for row in (full, *ours)] == [""] * 5
    assert full.split["side work"] == 0.0
    assert all(row.split["attention"] > 0.0 for row in (full, *ours))
    assert all(row.split["side work"] > 0.0 for row in ours)


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda")
def test_on_cuda_a_run_goes_on_where_something_does_not_fit() -> None:
    loaded = random_model("tiny", device="cuda")
    # Grids of kernels have at most 65,535 blocks along their second axis, for instance sequences.
    config = replace(SMALL, contexts=(1 << 16,), batch=1 << 15, caches=("dynamic", "fused", "loop"))
    result = run_bench(loaded, config)
    assert {row.failure for row in result.rows} == {"does not fit"}
    (row,) = run_bench(loaded, replace(SMALL, contexts=(100,), caches=("fused",))).rows
    assert row.failure == ""


def test_shares_are_spread_over_a_model_of_another_shape() -> None:
    shares = ((0.5, 1.5), (0.8, 1.2))
    spread = spread_head_shares(shares, 3, 4)
    assert [len(layer) for layer in spread] == [4] * 3
    assert check_head_shares(spread) is None
    values = sorted(share for layer in spread for share in layer)
    assert 0.5 <= values[0] < 0.7
    assert 1.3 < values[-1] <= 1.5
    assert spread != tuple(sorted(spread))
    assert spread_head_shares(shares, 3, 4) == spread


def test_heads_of_different_budgets_are_full_when_steps_begin() -> None:
    config = replace(SMALL, caches=("loop",), head_shares=((1.4, 0.8), (0.7, 1.1)))
    result = run_bench(random_model("tiny"), config)
    rows = [row for row in result.rows if row.kind == "Spectral loop"]
    assert rows
    assert not any(row.failure for row in rows)
    even = run_bench(random_model("tiny"), replace(config, head_shares=None))
    for row, other in zip(rows, even.rows, strict=True):
        assert 0.9 * other.kv_bytes < row.kv_bytes <= other.kv_bytes
