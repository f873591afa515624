"""Continue a long text with a fixed budget of KV cache.

python examples/quickstart.py --model HuggingFaceTB/SmolLM2-135M-Instruct --text long.txt
"""

import argparse
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

from spectralkv.hf import SpectralCache, cache_argument

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--model", default="HuggingFaceTB/SmolLM2-135M-Instruct")
parser.add_argument("--text", type=Path, required=True)
parser.add_argument("--budget", type=int, default=512, help="tokens that each KV head keeps")
parser.add_argument("--new-tokens", type=int, default=100)
options = parser.parse_args()

model = AutoModelForCausalLM.from_pretrained(options.model)
tokenizer = AutoTokenizer.from_pretrained(options.model)
inputs = tokenizer(options.text.read_text(encoding="utf-8"), return_tensors="pt")

cache = SpectralCache(model.config, budget=options.budget)  # the one line that is new
output = model.generate(**inputs, **cache_argument(cache), max_new_tokens=options.new_tokens)

print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :]))
stats = cache.stats()
print(f"{stats.tokens_seen} tokens seen, {stats.tokens_kept} kept, {stats.kv_bytes:,} bytes of KV")
