"""Writes docs/models.md: which families of the installed transformers a cache here serves.

Each family is made small, with random weights, and fed three times: with transformers' own cache,
with a cache that has room for all tokens, which must compute the same, and with one that has not,
which must keep its budget.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import multiprocessing
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from spectralkv.hf import SpectralCache, cache_argument

DOCUMENT = Path(__file__).resolve().parent.parent / "docs" / "models.md"
VOCABULARY = 97
BUDGET, INTERVAL, WINDOW = 24, 8, 6
TOKENS, PROMPT = 48, 36

# Whatever of these a configuration has is set so.
_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "embed_dim": 64,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "num_hidden_layers": 6,
    "n_layer": 6,
    "n_layers": 6,
    "num_layers": 6,
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 16,
    "kv_channels": 16,
    "rotary_dim": 16,
    "max_position_embeddings": 512,
    "n_positions": 512,
    "max_seq_len": 512,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


# As most models of the family are, where its configuration's defaults are otherwise.
_OWN: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": None}}
# Decoders whose configuration does not say so.
_DECODERS = ("gpt_neox", "gpt_neox_japanese")
# Slower or larger than this is not what these sizes were to make.
_MOST_PARAMETERS = 4_000_000
_MOST_SECONDS = 60
_CLOSE = 1e-4  # float32 logits, of the order of 1


@dataclass(frozen=True)
class Row:
    """What was found for one family."""

    family: str
    verdict: str
    """``served``, ``not served``, or ``not tried``."""
    what: str
    """Of a family that is served, how many layers evict; else why not."""


def families() -> list[str]:
    """Return the families of causal language models that transformers knows."""
    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def examine(family: str) -> Row:
    """Find out whether a family is served."""
    try:
        config = _tiny_config(family)
        is_decoder = getattr(config, "is_decoder", True) or family in _DECODERS
        if getattr(config, "is_encoder_decoder", False) or not is_decoder:
            return Row(family, "not tried", "an encoder")
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(config)
        if sum(weight.numel() for weight in model.parameters()) > _MOST_PARAMETERS:
            return Row(family, "not tried", "stays large")
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config).eval()
        expected = _feed(model, transformers.DynamicCache(config=model.config))
    except Exception as error:  # a family of any age may refuse sizes that fit the others
        return Row(family, "not tried", f"cannot be made small ({type(error).__name__})")
    try:
        roomy = SpectralCache(model.config, budget=10 * TOKENS)
        difference = float((_feed(model, roomy) - expected).abs().max())
        cache = SpectralCache(model.config, budget=BUDGET, interval=INTERVAL, window=WINDOW)
        is_finite = bool(_feed(model, cache).isfinite().all())
    except (ValueError, RuntimeError) as error:
        return Row(family, "not served", _reason(error))
    stats = cache.stats()
    if stats.evicting_layers == 0:
        return Row(family, "not served", "no layer has plain attention")
    if stats.tokens_kept == 0:
        return Row(family, "not served", "it puts nothing into the cache")
    keeps_budget = BUDGET <= stats.tokens_kept < BUDGET + INTERVAL
    if not (difference < _CLOSE and is_finite and keeps_budget):
        raise RuntimeError(
            f"[model_table] {family}: expected logits as without eviction and {BUDGET} to "
            f"{BUDGET + INTERVAL - 1} tokens, got a difference of {difference} and "
            f"{stats.tokens_kept} tokens"
        )
    return Row(family, "served", f"{stats.evicting_layers} of {stats.total_layers}")


def _tiny_config(family: str) -> Any:
    kind = transformers.CONFIG_MAPPING[family]
    known = kind().to_dict()
    sizes = {name: value for name, value in _SIZES.items() if name in known}
    if "qk_rope_head_dim" in sizes and "head_dim" in sizes:  # there it is the turned part's
        sizes["head_dim"] = sizes["qk_rope_head_dim"]
    return kind(**sizes, **_OWN.get(family, {}))


def _feed(model: Any, cache: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, VOCABULARY, (1, TOKENS), generator=generator)
    chunks = ids.split([PROMPT, *[1] * (TOKENS - PROMPT)], dim=1)
    with torch.no_grad():
        return torch.cat([model(chunk, **cache_argument(cache)).logits for chunk in chunks], 1)


def _reason(error: Exception) -> str:
    text = str(error)
    if "through transformers' attention interface" in text:
        return "the cache's keys do not come to transformers' attention interface as they are"
    found = re.match(r"\[EvictingCache\] (.*)", text, re.DOTALL)
    return found[1].split(";")[0] if found else f"{type(error).__name__}: {text.splitlines()[0]}"


def _examine_apart(family: str) -> Row:
    """Examine a family in a process of its own, which may take long or all memory."""
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        future = pool.submit(examine, family)
        try:
            return future.result(timeout=_MOST_SECONDS)
        except concurrent.futures.TimeoutError:
            for process in pool._processes.values():
                process.kill()
            return Row(family, "not tried", "stays slow")
        except concurrent.futures.process.BrokenProcessPool:
            return Row(family, "not tried", "stays large")


def document(rows: list[Row]) -> str:
    """Return docs/models.md."""
    served = [row for row in rows if row.verdict == "served"]
    refused = [row for row in rows if row.verdict == "not served"]
    untried: dict[str, list[str]] = {}
    for row in rows:
        if row.verdict == "not tried":
            untried.setdefault(row.what, []).append(f"`{row.family}`")
    lines = [
        "# Models",
        "",
        f"What `EvictingCache` serves of the {len(rows)} families of causal language models in",
        f"transformers {transformers.__version__}. Each was made small, with random weights, and",
        "fed three times: with transformers' own cache, with a cache that has room for all tokens,",
        f"whose logits must be the same to {_CLOSE:.0e}, and with one of {BUDGET} tokens, which",
        "must keep that budget. `python tools/model_table.py` wrote this page.",
        "",
        "Layers with a sliding window or linear attention stay as transformers made them, and",
        "evict nothing; their number depends on the model's configuration, here on a small one.",
        "",
        f"## Served: {len(served)}",
        "",
        "| family | layers that evict |",
        "|---|---:|",
        *(f"| `{row.family}` | {row.what} |" for row in served),
        "",
        f"## Not served: {len(refused)}",
        "",
        "| family | why |",
        "|---|---|",
        *(f"| `{row.family}` | {row.what} |" for row in refused),
        "",
        f"## Not tried: {sum(map(len, untried.values()))}",
        "",
        "The same sizes do not make all families small. Of these nothing is known.",
        "",
        *(f"- {why}: {', '.join(names)}" for why, names in sorted(untried.items())),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Examine all families and write the document, or show the families that are named."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("families", nargs="*", help="only show these; none: write docs/models.md")
    names = parser.parse_args().families
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    rows = []
    for family in names or families():
        rows.append(_examine_apart(family))
        print(f"{family}: {rows[-1].verdict}: {rows[-1].what}", flush=True)
    if not names:
        DOCUMENT.write_text(document(rows), encoding="utf-8")


if __name__ == "__main__":
    main()
