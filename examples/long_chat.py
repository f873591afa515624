"""A talk that goes on another day: the cache lies in a file, and each call reads only what is new.

python examples/long_chat.py --talk talk "Who was Du Fu?"
python examples/long_chat.py --talk talk "And when did he live?"
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from spectralkv.hf import SpectralCache, generate

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("say", help="your turn")
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--talk", type=Path, required=True, help="where the talk is kept")
parser.add_argument("--budget", type=int, default=512, help="tokens that each KV head keeps")
parser.add_argument("--new-tokens", type=int, default=100)
options = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(options.model)
tokenizer = AutoTokenizer.from_pretrained(options.model)

kept = options.talk.with_suffix(".safetensors")  # keys, values and graphs
said = options.talk.with_suffix(".json")  # all tokens of the talk
if kept.exists():
    cache, ids = SpectralCache.load(kept, model.config), json.loads(said.read_text())
else:
    cache, ids = SpectralCache(model.config, budget=options.budget), []

ids += tokenizer.encode(f"\nUser: {options.say}\nAssistant:", add_special_tokens=not ids)
unread = len(ids) - cache.get_seq_length()
streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
output = generate(
    model, torch.tensor([ids]), cache, max_new_tokens=options.new_tokens, streamer=streamer
)

cache.save(kept)
said.write_text(json.dumps(output[0].tolist()))
stats = cache.stats()
print(f"{unread} tokens read now, {stats.tokens_seen} seen in all, {stats.tokens_kept} kept")
