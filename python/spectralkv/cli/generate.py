"""``spectralkv generate``: continue a prompt with a bounded cache."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectralkv.cli import console as shared

if TYPE_CHECKING:
    from spectralkv.evaluation import Generation


def generate(
    model: shared.ModelOption = shared.DEMO_MODEL,
    prompt: Annotated[str, typer.Option(help="The prompt itself.")] = "",
    prompt_file: Annotated[
        str, typer.Option(help="A UTF-8 file that holds the prompt; - is standard input.")
    ] = "",
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    budget: shared.BudgetOption = "0.2",
    policy: shared.PolicyOption = "spectral",
    interval: shared.OwnIntervalOption = None,
    window: shared.WindowOption = None,
    sinks: shared.SinksOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens to decode.")] = 128,
    temperature: shared.TemperatureOption = 0.0,
    top_p: shared.TopPOption = 1.0,
    seed: shared.SeedOption = 0,
    chunk: shared.ChunkOption = 256,
    gguf_file: shared.GgufFileOption = "",
    dtype: shared.DtypeOption = "auto",
    device: shared.DeviceOption = "cpu",
) -> None:
    """Continue a prompt from --prompt, --prompt-file or standard input.

    The text goes to standard output as it comes; progress and the closing table to standard error.
    """
    from spectralkv import evaluation
    from spectralkv.evaluation.generation import continue_text, prefill
    from spectralkv.evaluation.models import resolve_device
    from spectralkv.evaluation.report import device_name
    from spectralkv.evaluation.specs import FULL
    from spectralkv.hf import one_stream

    spec = evaluation.PolicySpec.parse(policy)
    wanted = evaluation.Budget.parse(budget)
    settings = shared.settings_of(interval, window, sinks)
    shared.check_budgets([spec], [wanted], settings)
    sampling = evaluation.Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    if chunk < 1:
        raise evaluation.EvaluationError(f"--chunk must be at least 1, got {chunk}")
    text = _prompt(prompt, prompt_file)
    device = resolve_device(device)

    def write(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    with one_stream(device):
        loaded = shared.load(model, gguf_file=gguf_file, dtype=dtype, device=device)
        tokens = _encode(loaded.tokenizer, text, chat=chat)
        limit = None if spec.name == FULL else wanted.resolve(len(tokens))
        cache = evaluation.create_cache(
            loaded.model, evaluation.create_policy(spec, limit, settings)
        )

        start = time.perf_counter()
        with shared.progress_bar() as progress:  # gone before the text begins
            logits = prefill(
                loaded.model,
                tokens,
                cache,
                chunk=chunk,
                on_progress=lambda done, total: progress("reading the prompt", done, total),
            )
        seconds = time.perf_counter() - start
        result = continue_text(
            loaded.model,
            loaded.tokenizer,
            logits,
            cache,
            sampling,
            prefill_seconds=seconds,
            captured=True,
            on_text=write,
        )
        write("\n")
    _show(
        result,
        prompt_tokens=len(tokens),
        policy=spec.label,
        budget=limit,
        where=f"{loaded.dtype} on {device_name(device)}",
    )


def _prompt(prompt: str, prompt_file: str) -> str:
    from spectralkv.evaluation import EvaluationError, read_text

    if prompt and prompt_file:
        raise EvaluationError("give --prompt or --prompt-file, not both")
    if prompt:
        return prompt
    if not prompt_file and sys.stdin.isatty():
        raise EvaluationError("no prompt: give --prompt, --prompt-file or standard input")
    return read_text(prompt_file or "-")


def _encode(tokenizer: Any, text: str, *, chat: bool) -> list[int]:
    from spectralkv.evaluation import EvaluationError

    if not chat:
        return list(tokenizer.encode(text))
    if not getattr(tokenizer, "chat_template", None):
        raise EvaluationError("--chat: this model's tokenizer has no chat template")
    message = [{"role": "user", "content": text}]
    ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    return list(ids)


def _show(
    result: Generation, *, prompt_tokens: int, policy: str, budget: int | None, where: str
) -> None:
    from rich.table import Table

    table = Table(show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rate = "-" if result.tokens_per_s is None else f"{result.tokens_per_s:.1f}"
    for name, value in (
        ("model", where),
        ("policy", policy),
        ("budget", "all tokens" if budget is None else f"{budget:,} tokens"),
        ("prompt", f"{prompt_tokens:,} tokens in {result.prefill_seconds:.1f} s"),
        ("new tokens", f"{len(result.token_ids):,}"),
        ("decode tokens/s", rate),
        ("tokens kept", f"{result.tokens_kept:,} of {result.tokens_seen:,}"),
        ("KV cache", shared.size(result.kv_bytes)),
        ("graph", shared.size(result.graph_bytes)),
    ):
        table.add_row(name, value)
    shared.console().print(table)
