"""A conversation of many turns over one cache: each turn feeds only what is new."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from spectralkv.evaluation.errors import EvaluationError
from spectralkv.evaluation.generation import Generation, Sampling, continue_text, prefill

if TYPE_CHECKING:
    from collections.abc import Callable

    from spectralkv.evaluation.datasets import Tokenizer
    from spectralkv.hf import EvictingCache


class Conversation:
    """Turns between a user and a model, of which a cache remembers what its policy keeps.

    Parameters
    ----------
    model : transformers.PreTrainedModel
        A causal language model.
    tokenizer : Tokenizer
        Its tokenizer, with a chat template.
    cache : spectralkv.hf.EvictingCache
        Empty; mutated.
    system : str
        What the model is told before all turns; empty: what its template says.

    Raises
    ------
    EvaluationError
        The tokenizer has no chat template.

    Attributes
    ----------
    messages : list of dict
        All that was said, as chat templates take it.
    token_ids : list of int
        All that the cache has read.
    restarts : int
        How often the whole conversation had to be read again, because the template writes earlier
        turns in another way once later ones follow.
    """

    def __init__(
        self, model: Any, tokenizer: Tokenizer, cache: EvictingCache, *, system: str = ""
    ) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise EvaluationError("this model's tokenizer has no chat template")
        self._model, self._tokenizer, self._cache = model, tokenizer, cache
        self._system = system
        self._read = ""  # what the cache has read, as text
        self.token_ids: list[int] = []
        self.reset()

    def reset(self) -> None:
        """Forget all turns."""
        self._forget()
        self.messages: list[dict[str, str]] = []
        self.restarts = 0
        if self._system:
            self.messages.append({"role": "system", "content": self._system})

    def ask(
        self,
        text: str,
        sampling: Sampling,
        *,
        chunk: int = 256,
        on_progress: Callable[[int, int], None] | None = None,
        on_text: Callable[[str], None] | None = None,
    ) -> Generation:
        """Say something, and let the model answer.

        Parameters
        ----------
        text : str
            The user's turn.
        sampling, chunk, on_progress, on_text
            As for `spectralkv.evaluation.generate`.

        Returns
        -------
        Generation
            The answer, and what it took; the prefill is that of this turn.
        """
        turns = [*self.messages, {"role": "user", "content": text}]
        whole = self._write(turns)
        if not whole.startswith(self._read):
            self._forget()
            self.restarts += 1
        new = self._tokenizer.encode(  # type: ignore[call-arg]
            whole[len(self._read) :], add_special_tokens=False
        )
        start = time.perf_counter()
        logits = prefill(self._model, new, self._cache, chunk=chunk, on_progress=on_progress)
        answer = continue_text(
            self._model,
            self._tokenizer,
            logits,
            self._cache,
            sampling,
            prefill_seconds=time.perf_counter() - start,
            captured=True,
            on_text=on_text,
        )
        # A token that ended the answer by number was chosen, but not fed.
        fed = answer.token_ids
        if len(fed) == sampling.max_new_tokens:
            fed = fed[:-1]
        self.token_ids += [*new, *fed]
        self._read = whole + self._tokenizer.decode(list(fed))
        self.messages = [*turns, {"role": "assistant", "content": answer.text}]
        return answer

    def _forget(self) -> None:
        self._cache.reset()  # type: ignore[no-untyped-call]
        self._read = ""
        self.token_ids = []

    def _write(self, messages: list[dict[str, str]]) -> str:
        text = self._tokenizer.apply_chat_template(  # type: ignore[attr-defined]
            messages, add_generation_prompt=True, tokenize=False
        )
        return str(text)
