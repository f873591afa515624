"""``spectralkv chat``: talk to a model whose cache never grows beyond its budget."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectralkv.cli import console as shared

if TYPE_CHECKING:
    from spectralkv.evaluation import Generation, Sampling
    from spectralkv.evaluation.conversation import Conversation

_HELP = "/reset forgets the conversation, /quit or the end of input leaves"


def chat(
    model: shared.ModelOption = shared.DEMO_MODEL,
    system: Annotated[str, typer.Option(help="What the model is told before all turns.")] = "",
    budget: Annotated[int, typer.Option(help="Tokens that each KV head keeps.")] = 512,
    policy: shared.PolicyOption = "spectral",
    interval: shared.OwnIntervalOption = None,
    window: shared.WindowOption = None,
    sinks: shared.SinksOption = None,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 256,
    temperature: shared.TemperatureOption = 0.0,
    top_p: shared.TopPOption = 1.0,
    seed: shared.SeedOption = 0,
    chunk: shared.ChunkOption = 256,
    gguf_file: shared.GgufFileOption = "",
    dtype: shared.DtypeOption = "auto",
    device: shared.DeviceOption = "cpu",
) -> None:
    """Talk to a model in the terminal, or a line at a time from standard input.

    Below each answer stands what the cache has seen and keeps, its bytes and the speed. Answers go
    to standard output, all else to standard error.
    """
    from spectralkv import evaluation
    from spectralkv.evaluation.conversation import Conversation
    from spectralkv.evaluation.models import resolve_device
    from spectralkv.evaluation.specs import FULL
    from spectralkv.hf import one_stream

    spec = evaluation.PolicySpec.parse(policy)
    settings = shared.settings_of(interval, window, sinks)
    shared.check_counts(budget=budget, chunk=chunk)
    limit = None if spec.name == FULL else budget
    rules = evaluation.create_policy(spec, limit, settings)
    sampling = evaluation.Sampling(
        max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    device = resolve_device(device)
    with one_stream(device):
        loaded = shared.load(model, gguf_file=gguf_file, dtype=dtype, device=device)
        cache = evaluation.create_cache(loaded.model, rules)
        conversation = Conversation(loaded.model, loaded.tokenizer, cache, system=system)
        screen = shared.console()
        held = "all tokens" if limit is None else f"{limit:,} tokens"
        screen.print(f"{loaded.name}, {spec.label} keeps {held} a head; {_HELP}", style="dim")
        while (line := _next_line(screen)) is not None:
            if line in ("/quit", "/exit"):
                break
            if line == "/reset":
                conversation.reset()
                screen.print("forgotten", style="dim")
            elif line.startswith("/"):
                screen.print(f"{line}: no such command; {_HELP}", style="dim", markup=False)
            elif line:
                _answer(conversation, line, sampling, chunk, screen)


def _next_line(screen: Any) -> str | None:
    """Return the next line without white space around it; None at the end of input."""
    if sys.stdin.isatty():
        screen.print("[bold]you[/bold] ", end="")
    line = sys.stdin.readline()
    return line.strip() if line else None


def _answer(
    conversation: Conversation, text: str, sampling: Sampling, chunk: int, screen: Any
) -> None:
    before = conversation.restarts
    if sys.stdout.isatty():
        answer = _shown_live(conversation, text, sampling, chunk)
    else:
        answer = conversation.ask(text, sampling, chunk=chunk, on_text=_write)
        _write("\n")
    if conversation.restarts > before:
        screen.print("the template rewrote earlier turns: all of them were read again", style="dim")
    screen.print(_state(answer), style="dim")


def _shown_live(
    conversation: Conversation, text: str, sampling: Sampling, chunk: int
) -> Generation:
    """Answer in the terminal, with a line below that tells how far reading and writing are."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.text import Text

    said = Text()
    begin = time.perf_counter()
    pieces = 0

    with Live(console=Console(), refresh_per_second=12, vertical_overflow="visible") as live:

        def show(below: str) -> None:
            live.update(Group(said, Text(below, style="dim")))

        def read(done: int, total: int) -> None:
            nonlocal begin
            begin = time.perf_counter()
            show(f"reading {done:,} of {total:,} tokens")

        def write(piece: str) -> None:
            nonlocal pieces
            pieces += 1
            said.append(piece)
            rate = pieces / max(time.perf_counter() - begin, 1e-6)
            show(f"{pieces:,} tokens, {rate:.1f} tokens/s")

        answer = conversation.ask(text, sampling, chunk=chunk, on_progress=read, on_text=write)
        live.update(said)
    return answer


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _state(answer: Generation) -> str:
    rate = "" if answer.tokens_per_s is None else f" · {answer.tokens_per_s:.1f} tokens/s"
    return (
        f"seen {answer.tokens_seen:,} · kept {answer.tokens_kept:,} tokens · "
        f"KV {shared.size(answer.kv_bytes)} · graph {shared.size(answer.graph_bytes)}{rate}"
    )
