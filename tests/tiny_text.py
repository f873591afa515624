"""A tiny model with a tokenizer of bytes, both made in code: texts without any download."""

from __future__ import annotations

import functools
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from spectralkv.evaluation import LoadedModel
from tiny_models import make_model

END = "<|end|>"


@functools.cache
def make_tokenizer() -> Any:
    """Return a tokenizer with one token a byte, so that a character may need several."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {END: 0} | {symbol: index + 1 for index, symbol in enumerate(alphabet)}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, pad_token=END)


@functools.cache
def make_loaded() -> LoadedModel:
    model = make_model("llama", dtype=torch.float32, vocab_size=len(make_tokenizer()))
    return LoadedModel(name="tiny", model=model, tokenizer=make_tokenizer())


def make_text(length: int) -> str:
    """Return ASCII text of `length` characters, which are as many tokens."""
    words = " ".join(f"{(i * i) % 97} cats & <dogs> saw line {i}." for i in range(length))
    return words[:length]
