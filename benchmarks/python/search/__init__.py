"""A search for eviction rules: many rules, judged on perplexity and on needles at once.

``python benchmarks/python/search --help`` says how to run it. The modules:

``model``
    A decoder of Llama's kind, written out so that its cache can be cut in any way.
``scores``
    What a score is, and what it sees.
``features``, ``attention``, ``walks``, ``combine``
    Scores of keys and of the text, of attention, by PageRank, and made of others.
``selection``
    Rules: quotas of a budget, for each head or pooled over heads, and merging.
``simulate``
    The dense simulation of a cache under a rule; perplexity and needles.
``rules``
    The rules by name, each with its reason.
``results``
    The file of results, the table and the picture.
"""
