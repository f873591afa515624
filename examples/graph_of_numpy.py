"""The attention graph without any model or framework but numpy: rank tokens, evict, go on.

python examples/graph_of_numpy.py
"""

import numpy as np

import spectralkv

HEADS, DIM, CAPACITY, BUDGET = 2, 64, 256, 100
rng = np.random.default_rng(0)
keys = np.zeros((HEADS, CAPACITY, DIM), dtype=np.float32)  # the caller's own cache
values = np.zeros_like(keys)
graph = spectralkv.SpectralGraph(CAPACITY, DIM, num_kv_heads=HEADS)

for _ in range(600):
    slot = len(graph)
    keys[:, slot] = rng.standard_normal((HEADS, DIM))
    values[:, slot] = rng.standard_normal((HEADS, DIM))
    query = rng.standard_normal((HEADS, DIM), dtype=np.float32)
    graph.update(query, keys, slot)  # whom this token attends to
    if len(graph) == CAPACITY:
        graph.walk(keys)
        keep = graph.select(budget=BUDGET)  # (HEADS, BUDGET) slots
        graph.compact(keep, keys, values)  # moved to the front, in place

print(f"600 tokens went by, {len(graph)} of at most {CAPACITY} slots are in use")
