"""The rules by group, each with the reason to try it.

`make_rules` returns them all. A rule of one's own is one line here: scores from `search.features`,
`search.attention`, `search.walks` and `search.combine`, quotas from `search.selection`.
"""

from __future__ import annotations

import itertools
from typing import Any, Literal

from search.attention import (
    RKV,
    Expected,
    Future,
    Importance,
    Newest,
    Own,
    Received,
    Recurrence,
    Replayed,
    Votes,
)
from search.combine import (
    Across,
    Blocks,
    Nearby,
    PerChance,
    Product,
    Ranks,
    Remembered,
    Softmax,
    Sum,
    Times,
    novelty,
)
from search.features import (
    Apart,
    Chance,
    Even,
    KeyDiff,
    Leverage,
    Marked,
    Norm,
    Position,
    Rarity,
    Recent,
    Surprise,
    Unlike,
    Unrepeated,
)
from search.scores import Score
from search.selection import Division, Merge, Quota, Rule
from search.walks import Graph, PageRank

# Factors for each token that make a sum .8, .9, .95 of itself in 32 tokens.
FAST, MIDDLE, SLOW = 0.9931, 0.9967, 0.9984

LEAKY = Graph(law="absolute")
LEAKY_16 = Graph(law="absolute", top_k=16)
RECENT = PageRank(Recent())
NOVEL = PageRank(novelty(), counts="all")
# What Spectral's default gives six and four tenths.
LASTING = Remembered(PageRank(Recent(), restart_prob=0.7), 0.5)
PHRASES = PageRank(Nearby(novelty(), 5), counts="all", restart_prob=0.7)
EXPECTED = Expected(ahead=64)
HEAVY = Received(decay=SLOW)


def visits(decay: float = 0.9, fraction: float = 0.02, graph: Graph = LEAKY) -> Remembered:
    """Return visits of walks from the newest tokens, remembered from cut to cut."""
    return Remembered(PageRank(Recent(fraction), graph=graph), decay)


def distinctive(start: Score, **options: Any) -> PageRank:
    """Return PageRank that restarts at `start` and counts restarts, too."""
    return PageRank(start, counts="all", **options)


def whole(score: Score) -> tuple[Quota, ...]:
    """Give all places to one score."""
    return (Quota(score),)


def two(first: Score, second: Score, share: float = 0.5) -> tuple[Quota, ...]:
    """Give a share of the places to one score and the rest to another."""
    return (Quota(first, share), Quota(second, 1.0 - share))


def three(first: Score, second: Score, third: Score, a: float, b: float) -> tuple[Quota, ...]:
    """Give two shares and the rest."""
    return (Quota(first, a), Quota(second, b), Quota(third, 1.0 - a - b))


def pooled(own: Score, shared: Score, share: float, pool: str = "layer") -> tuple[Quota, ...]:
    """Give each head a share by `own`, and the rest to the heads that `shared` says need it."""
    return (Quota(own, share), Quota(shared, 1.0 - share, pool=pool, floor=0.1))  # type: ignore[arg-type]


def rivals() -> list[Rule]:
    """Return published policies, as published and tuned, and mixes of two."""
    found = [
        Rule("random", "what any rule must beat", whole(Chance())),
        Rule("streaming", "StreamingLLM: sinks and the newest", whole(Position())),
        Rule("h2o", "as published: half heavy, half recent", whole(Received()), 0.5, 0),
        Rule("snapkv", "as published, at each cut", whole(Votes(64)), 64, 0),
        Rule("snapkv 32", "a shorter vote", whole(Votes(32)), 32, 0),
        Rule("tova", "as published", whole(Newest()), 0, 0),
        Rule("keydiff", "as published", whole(KeyDiff()), 0, 0),
        Rule("keydiff w50 s4", "KeyDiff with our window and sinks", whole(KeyDiff())),
        Rule("lazy", "LazyEviction as published", whole(Recurrence()), 52, 0),
        Rule("lazy .005", "LazyEviction, fewer activations", whole(Recurrence(0.005)), 52, 4),
        Rule("short keys", "keep the shortest keys", whole(Norm("short_key"))),
    ]
    found += [
        Rule(f"rkv {mix:g}", "R-KV at another mix", whole(RKV(mix)), 8, 0)
        for mix in (0.07, 0.2, 0.3, 0.4, 0.5)
    ]
    found += [
        Rule(f"rkv .4 w{window}", "R-KV with a window", whole(RKV(0.4)), window)
        for window in (50, 150)
    ]
    found += [
        Rule(f"h2o {decay:g} w{window:g}", "H2O that forgets", whole(Received(decay)), window, 0)
        for decay, window in itertools.product((FAST, MIDDLE, SLOW), (0.25, 0.35, 0.5))
    ]
    mixes: list[tuple[str, Score, Score]] = [
        ("h2o + keydiff", Received(), KeyDiff()),
        ("h2o decayed + keydiff", Received(MIDDLE), KeyDiff()),
        ("h2o decayed + rkv .4", Received(MIDDLE), RKV(0.4)),
        ("h2o decayed + snapkv", Received(MIDDLE), Votes(32)),
        ("snapkv + keydiff", Votes(32), KeyDiff()),
        ("rkv .4 + keydiff", RKV(0.4), KeyDiff()),
    ]
    for (name, first, second), share in itertools.product(mixes, (0.5, 0.75)):
        window = 0.25 if share > 0.5 else 50
        found.append(
            Rule(f"{name} {share:g}", "quotas of two rivals", two(first, second, share), window)
        )
    return found


def limits() -> list[Rule]:
    """Return what a policy could reach that knew the attention to come."""
    return [
        Rule("future all", "all attention to come", whole(Future()), limit=True),
        Rule("future 256", "that of the next 256 tokens", whole(Future(256)), limit=True),
        Rule("future 64", "that of the next 64 tokens", whole(Future(64)), limit=True),
        Rule(
            "future all pooled",
            "the same, heads competing",
            (Quota(Future(), pool="layer"),),
            limit=True,
        ),
    ]


def defaults() -> list[Rule]:
    """Return Spectral's default, what its parts do alone, and single tokens for its phrases."""
    return [
        Rule("default", "recent tokens and novel phrases", two(LASTING, PHRASES, 0.6)),
        Rule("halves", "half recent, half novel tokens", two(RECENT, NOVEL)),
        Rule("novel phrases", "novel phrases alone", whole(PHRASES)),
        Rule("recent", "recent restart alone", whole(RECENT)),
        Rule("novelty", "novelty restart alone", whole(NOVEL)),
        Rule("uniform restart", "PageRank without a person", whole(PageRank(Even()))),
        Rule(
            "halves, adaptive",
            "recent takes what covers 95 % of its visits, novelty the rest",
            (Quota(RECENT, 0.75, cover=0.95), Quota(NOVEL, 0.25)),
        ),
        Rule(
            "halves, adaptive .8",
            "the same for 80 %",
            (Quota(RECENT, 0.75, cover=0.8), Quota(NOVEL, 0.25)),
        ),
    ]


def restarts() -> list[Rule]:
    """Return other restart distributions beside recent visits."""
    starts: list[tuple[str, Score, str]] = [
        ("unrepeated keys", Softmax(Unrepeated()), "R-KV's redundancy as a restart"),
        ("unrepeated plain", Softmax(Unrepeated("plain")), "likeness without position"),
        ("expected", EXPECTED, "walk from whom queries will want"),
        ("votes", Votes(32), "walk from whom the newest queries want"),
        ("importance", Importance(), "R-KV's importance as a restart"),
        ("per chance", PerChance(Received()), "walk from what was wanted all along"),
        ("heavy values", Times(HEAVY), "attention times what it fetched"),
        ("value norms", Norm("value"), "walk from what weighs most once fetched"),
        ("novelty as keys lie", novelty("key"), "without turning them back"),
        ("sharp novelty", novelty(sharpness=2.0), "fewer tokens to restart from"),
        ("soft novelty", novelty(sharpness=0.5), "more tokens to restart from"),
        ("novelty and recent", Sum(((0.5, novelty()), (0.5, Recent()))), "one walk for both"),
        ("novelty x recent visits", Product(((0.5, novelty()), (0.5, RECENT))), "novel and used"),
    ]
    found = [
        Rule(f"recent + ppr {name}", why, two(RECENT, distinctive(start)))
        for name, start, why in starts
    ]
    found += [
        Rule(
            f"recent {fraction:g} + novelty",
            "how far back recent goes",
            two(PageRank(Recent(fraction)), NOVEL),
        )
        for fraction in (0.02, 0.05, 0.2, 0.4)
    ]
    return found


def redundancy() -> list[Rule]:
    """Return R-KV's strength, redundancy among keys, beside walks."""
    seconds: list[tuple[str, Score, str]] = [
        ("rkv .4", RKV(0.4), "all of R-KV in the other half"),
        ("unrepeated", Unrepeated(), "its redundancy alone"),
        ("unrepeated plain", Unrepeated("plain"), "likeness without position"),
        ("unrepeated values", Unrepeated("value"), "likeness of what is said"),
        ("unrepeated x novelty", Product(((0.5, Softmax(Unrepeated())), (0.5, novelty()))), "both"),
    ]
    found = []
    for name, second, why in seconds:
        found.append(Rule(f"recent + {name}", why, two(RECENT, second)))
        found.append(Rule(f"visits .75 + {name}", why, two(visits(), second, 0.75), 100))
    return found


def edges() -> list[Rule]:
    """Return other graphs under the two halves."""
    graphs: list[tuple[str, Graph, str]] = [
        ("K 4", Graph(top_k=4), "fewer edges"),
        ("K 16", Graph(top_k=16), "more edges"),
        ("K 32", Graph(top_k=32), "many edges"),
        ("uniform K 8", Graph(law="uniform"), "edges alike"),
        ("leaky", LEAKY, "a token that attends to nobody passes nothing on"),
        ("leaky K 16", LEAKY_16, "the same with more edges"),
        ("group maximum", Graph(group="max"), "one query head suffices for an edge"),
        ("leaky maximum", Graph(law="absolute", group="max"), "both"),
        ("value norms", Graph(values=True), "edges weigh what they fetched"),
        ("leaky values", Graph(law="absolute", values=True), "both"),
        ("sinks in", Graph(sinks=0), "sinks as a part of the graph"),
    ]
    found = []
    for name, graph, why in graphs:
        halves = two(PageRank(Recent(), graph=graph), distinctive(novelty(), graph=graph))
        found.append(Rule(f"edges: {name}", why, halves))
    for p in (0.15, 0.3, 0.7, 0.99):
        halves = two(
            PageRank(Recent(), restart_prob=p, steps=16),
            distinctive(novelty(), restart_prob=p, steps=16),
        )
        found.append(Rule(f"restart prob {p:g}", "how far walks go", halves))
    return found


def decay() -> list[Rule]:
    """Return walks and sums that are remembered from cut to cut."""
    found = [
        Rule(f"visits .02 decay {keep:g}, w{window}", "recurrence over many walks", quotas, window)
        for keep in (0.5, 0.8, 0.9, 0.95)
        for quotas, window in (
            (whole(visits(keep)), 150),
            (two(visits(keep), NOVEL, 0.75), 100),
        )
    ]
    found += [
        Rule(
            "visits K 16 + novelty .25, w150",
            "the best found without expected attention",
            two(visits(graph=LEAKY_16), NOVEL, 0.75),
            150,
        ),
        Rule("visits forever", "never forget", two(visits(1.0), NOVEL, 0.75), 100),
        Rule(
            "novelty remembered",
            "survivors are novel all, so novelty pales: keep the most it ever was",
            two(RECENT, distinctive(Remembered(novelty(), 1.0, "max"))),
        ),
        Rule(
            "heavy .95 + novelty",
            "H2O that forgets as the first half",
            two(HEAVY, NOVEL, 0.75),
            100,
        ),
        Rule(
            "heavy max + novelty",
            "one query head suffices",
            two(Received(SLOW, group="max"), NOVEL, 0.75),
            100,
        ),
        Rule(
            "heavy per chance + novelty",
            "no favour for the old",
            two(PerChance(Received()), NOVEL),
            75,
        ),
    ]
    return found


def windows() -> list[Rule]:
    """Return windows, as tokens and as shares of the budget, and shares of the two halves."""
    found = [
        Rule(f"halves w{window:g} recent {share:g}", "how much is recency worth", quotas, window)
        for window in (8, 16, 32, 75, 100, 150, 0.1, 0.2, 0.35)
        for share, quotas in ((0.5, two(RECENT, NOVEL)), (0.75, two(RECENT, NOVEL, 0.75)))
    ]
    found += [
        Rule(
            f"novelty first {share:g}, w32",
            "novelty takes first, and more",
            two(NOVEL, RECENT, share),
            32,
        )
        for share in (0.5, 0.67, 0.8)
    ]
    return found


def heads() -> list[Rule]:
    """Return budgets that heads compete for."""
    shared: list[tuple[str, Score]] = [
        ("recent", RECENT),
        ("visits", visits()),
        ("heavy", HEAVY),
        ("expected", EXPECTED),
        ("votes", Votes(32)),
    ]
    found = []
    for (name, score), pool in itertools.product(shared, ("layer", "model")):
        found.append(
            Rule(
                f"pool {name}, {pool}, novelty .25",
                "heads that attend widely get more places",
                pooled(NOVEL, score, 0.25, pool),
                75,
            )
        )
    found += [
        Rule(
            "expected .5 + pool recent",
            "best of the first search",
            pooled(EXPECTED, RECENT, 0.5),
        ),
        Rule(
            "expected .3 + novelty .2 + pool visits",
            "the same with needles in mind",
            (Quota(EXPECTED, 0.3), Quota(NOVEL, 0.2), Quota(visits(), 0.5, "layer", 0.1)),
            75,
        ),
        Rule(
            "expected .3 + novelty .3 + pool recent",
            "more novelty",
            (Quota(EXPECTED, 0.3), Quota(NOVEL, 0.3), Quota(RECENT, 0.4, "layer", 0.1)),
            32,
        ),
        Rule(
            "pool novelty + recent",
            "heads whose keys stand out get more places for them",
            (Quota(RECENT, 0.5), Quota(NOVEL, 0.5, "layer", 0.3)),
        ),
        Rule(
            "pool novelty + recent, model",
            "retrieval heads are few: let them have the places",
            (Quota(RECENT, 0.5), Quota(NOVEL, 0.5, "model", 0.3)),
        ),
    ]
    return found


def merging() -> list[Rule]:
    """Return what averages evicted tokens into those that stay."""
    ways: list[tuple[str, Merge, str]] = [
        ("edges", Merge("edges"), "an evicted token's value goes along its strongest edge"),
        ("edges, keys too", Merge("edges", keys=True), "with its key"),
        ("edges, counted", Merge("edges", count=1.0), "and the count in the logits"),
        ("keys .8", Merge("keys", threshold=0.8), "into the most similar key"),
        ("keys .9", Merge("keys", threshold=0.9), "only near-copies"),
        ("keys .9, counted", Merge("keys", threshold=0.9, keys=True, count=1.0), "all of it"),
    ]
    return [
        Rule(f"merge {name}", why, two(RECENT, NOVEL), merge=merge) for name, merge, why in ways
    ]


def expected() -> list[Rule]:
    """Return expected attention, alone and in mixes."""
    found = [
        Rule(f"expected {ahead}", "how far ahead", whole(Expected(ahead)), 100)
        for ahead in (1, 64, 512, 2048)
    ]
    heavy, nov = HEAVY, NOVEL
    found += [
        Rule("expected, no values", "is it the values", whole(Expected(values=False)), 100),
        Rule("expected maximum", "one query head suffices", whole(Expected(group="max")), 100),
        Rule("expected, forgetting", "queries of now", whole(Expected(decay=SLOW)), 100),
        Rule("expected + recent", "habit and presence", two(EXPECTED, RECENT)),
        Rule("expected + visits", "habit and recurrence", two(EXPECTED, visits()), 75),
        Rule("expected + heavy", "habit and history", two(EXPECTED, heavy), 75),
        Rule("expected + novelty", "habit and needles", two(EXPECTED, nov)),
        Rule(
            "expected .3 + visits .45 + novelty",
            "best of the first search without pools",
            three(EXPECTED, visits(), nov, 0.3, 0.45),
            150,
        ),
        Rule(
            "expected .3 + heavy .45 + novelty", "H2O", three(EXPECTED, heavy, nov, 0.3, 0.45), 150
        ),
        Rule(
            "expected x heavy + novelty .25",
            "wanted by habit and in fact",
            two(Product(((0.5, EXPECTED), (0.5, heavy))), nov, 0.75),
            75,
        ),
        Rule(
            "expected x visits + novelty .25",
            "the same with walks",
            two(Product(((0.5, EXPECTED), (0.5, visits()))), nov, 0.75),
            75,
        ),
        Rule("ppr expected edges", "what those wanted need", whole(PageRank(EXPECTED)), 100),
        Rule("ppr expected all", "and themselves", whole(distinctive(EXPECTED)), 100),
        Rule(
            "expected 512 maximum + novelty",
            "far and any head: who may be wanted",
            two(Expected(512, group="max"), nov),
        ),
    ]
    return found


def needle(marks: dict[str, tuple[int, ...]]) -> list[Rule]:
    """Return rules made for phrases that nothing has asked for yet."""
    phrase = Nearby(novelty(), 9)
    agreed = Across(novelty(), "model")
    common = Softmax(Nearby(agreed, 9))  # a mean over all heads is nearly flat
    value = Softmax(Leverage("value"))
    seconds: list[tuple[str, Score, str]] = [
        ("keydiff", KeyDiff(), "novelty without a walk"),
        ("novelty as keys lie", distinctive(novelty("key")), "position turns keys: leave it so"),
        ("value novelty", distinctive(novelty("value")), "values tell what is said, not where"),
        ("leverage", Leverage(), "alone in a direction of all, not only off the mean"),
        ("plain leverage", Leverage("plain"), "the same without position"),
        ("value leverage", Leverage("value"), "what no sum of other values can replace"),
        ("ppr plain leverage", distinctive(Softmax(Leverage("plain"))), "and its phrase"),
        ("unlike all seen", distinctive(Softmax(Unlike())), "survivors must not move the mean"),
        ("unlike all seen, plain", distinctive(Softmax(Unlike("plain"))), "without position"),
        ("unlike all values", distinctive(Softmax(Unlike("value"))), "of what is said"),
        ("odd for all seen", Unlike("plain", "leverage"), "leverage against all that was seen"),
        ("odd values", Unlike("value", "leverage"), "the same of what is said"),
        ("apart 65", distinctive(Softmax(Apart(65))), "unlike the text around it"),
        ("apart 257 plain", distinctive(Softmax(Apart(257, "plain"))), "in a wider circle"),
        ("phrases of novelty", phrase, "all seven digits must stay: rate what stands together"),
        ("phrases of 15", Nearby(novelty(), 15), "a needle has about 15 tokens"),
        ("best of phrase", Nearby(novelty(), 9, "max"), "one novel token saves its neighbours"),
        ("neighbours of the novel", Nearby(novelty(), 3, "max"), "closer ones"),
        ("after the novel", Nearby(novelty(), 9, after=True), "a name, then its number"),
        ("blocks of novelty", Blocks(novelty(), 10), "fixed chunks as ChunkKV has them"),
        ("novelty of the layer", Across(novelty()), "heads of a layer agree"),
        ("novelty of the model", agreed, "reading a number back takes many layers"),
        ("any head's novelty", Across(novelty(), "layer", "max"), "one head that knows suffices"),
        ("phrases, model", Nearby(agreed, 9), "the whole phrase in all heads, or nowhere"),
        ("phrases of 15, model", Nearby(agreed, 15), "wider"),
        ("ppr phrases, model", distinctive(common), "and whom they look at"),
        (
            "own and model novelty",
            Sum(((0.5, novelty()), (0.5, common))),
            "a head's own view and the common one",
        ),
        ("surprise", Surprise(), "what the model did not expect it cannot make up again"),
        ("ppr surprise", distinctive(Surprise()), "and its phrase"),
        ("phrases of surprise", Nearby(Surprise(), 9), "stretches of surprise"),
        ("rarity", Rarity(), "digits are rare in prose"),
        ("ppr rarity", distinctive(Rarity()), "and whom they look at"),
        ("ppr rarity .5", distinctive(Rarity(0.5)), "less extreme"),
        ("phrases of rarity", Nearby(Rarity(0.5), 9), "rare tokens together"),
        ("rarity x surprise", Product(((0.5, Rarity()), (0.5, Surprise()))), "both"),
        (
            "phrases of rarity x novelty",
            Nearby(Product(((0.5, Rarity(0.5)), (0.5, agreed))), 9),
            "rare in the text and unlike it in all layers",
        ),
        (
            "ppr rarity x novelty",
            distinctive(Product(((0.5, Rarity(0.5)), (0.5, novelty())))),
            "ppr",
        ),
        ("replayed", Replayed(), "who is needed to repeat the text, without a question"),
        ("replayed 64", Replayed(64), "with more text before"),
        ("ppr replayed", distinctive(Replayed()), "and whom they look at"),
        ("phrases replayed", Nearby(Replayed(), 5), "with neighbours"),
        ("replayed, model", Across(Replayed(), "model"), "wanted in many heads"),
        ("replayed x novelty", Product(((0.5, Replayed()), (0.5, novelty()))), "both"),
        ("peak", Received(kind="max"), "one query that really wanted it"),
        ("peak from afar", Received(kind="max", far=32), "neighbours always look at each other"),
        ("far attention", Received(far=64), "what was found again once is found again"),
        ("own attention", Own("self"), "a token that reads itself brings something new"),
        ("own content", Own("content"), "its head was at work"),
        ("own entropy", Softmax(Own("entropy")), "it knew whom it wanted"),
        ("separators", Marked("separators", marks["separators"]), "SepLLM: they sum up"),
        ("walks back", distinctive(novelty(), direction="in"), "to who looked at a novel token"),
        ("walks both ways", distinctive(novelty(), direction="both"), "name to digits, too"),
        ("walks both ways, .3", distinctive(novelty(), direction="both", restart_prob=0.3), "far"),
        (
            "novelty or leverage",
            Ranks(((1.0, novelty()), (1.0, value)), "max"),
            "union of unlike keys and irreplaceable values",
        ),
        (
            "novelty and rarity ranks",
            Ranks(((1.0, novelty()), (1.0, Rarity()))),
            "no scale between them",
        ),
    ]
    found = [
        Rule(f"needle: recent + {name}", why, two(RECENT, second)) for name, second, why in seconds
    ]
    alone = ("phrases, model", "replayed", "phrases of rarity x novelty", "value leverage")
    found += [
        Rule(f"needle: {name} alone", f"{why}; nothing else", whole(second), 32)
        for name, second, why in seconds
        if name in alone
    ]
    found.append(
        Rule(
            "needle: numerals",
            "told what to look for: digits and capitals",
            two(RECENT, Nearby(Marked("numerals", marks["numerals"]), 3, "max")),
            limit=True,
        )
    )
    return found


def phrases() -> list[Rule]:
    """Return scores that are pooled over neighbouring tokens: what belongs together stays so."""
    firsts: list[tuple[str, Score]] = [
        ("recent", RECENT),
        ("visits .5", visits(0.5, 0.1, Graph())),
        ("visits K 16", visits(graph=LEAKY_16)),
    ]
    seconds: list[tuple[str, Score]] = [
        ("novelty", NOVEL),
        *((f"pooled {width}", Nearby(NOVEL, width)) for width in (3, 5, 9, 15)),
        *((f"restart {width}", distinctive(Nearby(novelty(), width))) for width in (5, 9)),
        ("best of 5", Nearby(NOVEL, 5, "max")),
        ("after 5", Nearby(NOVEL, 5, after=True)),
    ]
    found = [
        Rule(
            f"phrases: {habit} + {name} {share:g}, w{window}",
            "a phrase is worth something only whole",
            two(first, second, 1.0 - share),
            window,
        )
        for (habit, first), (name, second), (share, window) in itertools.product(
            firsts, seconds, ((0.5, 50), (0.6, 32))
        )
    ]
    found += [
        Rule(
            f"phrases: {habit} pooled {width} + novelty, w50",
            "SnapKV pools the votes of its window as well",
            two(Nearby(first, width), NOVEL),
            50,
        )
        for (habit, first), width in itertools.product(firsts, (3, 7))
    ]
    return found


def widths() -> list[Rule]:
    """Return the default with restarts that phrases share: how wide, and for what share."""

    def restart(width: int, **options: Any) -> PageRank:
        return distinctive(Nearby(novelty(), width), **options)

    shares = ((0.5, 50), (0.6, 50), (0.5, 75), (0.6, 75), (0.7, 75))
    found: list[tuple[str, Score, Score, float, float]] = [
        (f"restart {width}", RECENT, restart(width), share, window)
        for width, (share, window) in itertools.product((3, 5, 7), shares)
    ]
    visited = visits(graph=LEAKY_16)
    found += [
        ("visits K 16, restart 5", visited, restart(5), share, window)
        for share, window in ((0.6, 50), (0.6, 75), (0.7, 100))
    ]
    sharp = distinctive(Nearby(novelty(sharpness=2.0), 5))
    soft = distinctive(Nearby(novelty(sharpness=0.5), 5))
    seen = distinctive(Nearby(Softmax(Unlike("plain")), 5))
    seconds: list[tuple[str, Score]] = [
        ("restart 5, p .7", restart(5, restart_prob=0.7)),
        ("restart 9, p .7", restart(9, restart_prob=0.7)),
        ("restart 5 sharp", sharp),
        ("restart 5 soft", soft),
        ("restart 5 of all seen", seen),
        ("blocks of 8", distinctive(Blocks(novelty(), 8))),
        ("no walk 5", Nearby(novelty(), 5)),
        ("no walk 9", Nearby(novelty(), 9)),
    ]
    found += [
        (name, RECENT, second, share, window)
        for (name, second), (share, window) in itertools.product(seconds, ((0.5, 50), (0.65, 75)))
    ]
    return [
        Rule(
            f"widths: {name}, recent {share:g} w{window:g}",
            "a phrase is worth something only whole",
            two(first, second, share),
            window,
        )
        for name, first, second, share, window in found
    ]


def around() -> list[Rule]:
    """Return the default with one thing changed, or added."""

    def lasting(graph: Graph) -> Remembered:
        return Remembered(PageRank(Recent(), restart_prob=0.7, graph=graph), 0.5)

    def phrases_of(of: Score, **options: Any) -> PageRank:
        return distinctive(Nearby(of, 5), restart_prob=0.7, **options)

    found: list[tuple[str, str, tuple[Quota, ...]]] = []
    pools: tuple[Literal["layer", "model"], ...] = ("layer", "model")
    for pool, floor in itertools.product(pools, (0.2, 0.5, 0.8)):
        where = f"over the {pool}, floor {floor:g}"
        mine, theirs = Quota(LASTING, 0.6), Quota(PHRASES, 0.4)
        open_mine = Quota(LASTING, 0.6, pool, floor)
        open_theirs = Quota(PHRASES, 0.4, pool, floor)
        found += [
            (f"both {where}", "budgets go where scores say", (open_mine, open_theirs)),
            (f"recent {where}", "heads that attend widely need more", (open_mine, theirs)),
            (f"novelty {where}", "retrieval heads are few", (mine, open_theirs)),
        ]
    graphs: list[tuple[str, Graph]] = [
        ("K 16", Graph(top_k=16)),
        ("K 16 leaky", LEAKY_16),
        ("edges by value norm", Graph(values=True)),
        ("maximum of the group", Graph(group="max")),
        ("sinks in the graph", Graph(sinks=0)),
    ]
    found += [
        (
            name,
            "another graph under both",
            two(lasting(graph), phrases_of(novelty(), graph=graph), 0.6),
        )
        for name, graph in graphs
    ]
    apart = Product(((0.5, Softmax(Unrepeated("plain"))), (0.5, novelty())))
    found += [
        ("recent x value norm", "long values change more", two(Times(LASTING), PHRASES, 0.6)),
        ("both x value norm", "the same", two(Times(LASTING), Times(PHRASES), 0.6)),
        (
            "phrases of novel values",
            "what is said",
            two(LASTING, phrases_of(novelty("value")), 0.6),
        ),
        ("phrases of unrepeated", "R-KV's likeness", two(LASTING, phrases_of(apart), 0.6)),
        (
            "a tenth unrepeated",
            "R-KV's redundancy in a quota of its own",
            three(LASTING, PHRASES, Unrepeated("plain"), 0.55, 0.35),
        ),
        (
            "recent covers .9",
            "parts adapt to the text",
            (Quota(LASTING, 0.6, cover=0.9), Quota(PHRASES, 0.4)),
        ),
        (
            "novelty covers .9",
            "the other way",
            (Quota(PHRASES, 0.4, cover=0.9), Quota(LASTING, 0.6)),
        ),
        (
            "heads agree on novelty",
            "a phrase stays in a whole layer",
            two(LASTING, phrases_of(Across(novelty())), 0.6),
        ),
        ("a fifth heavy", "H2O's sums that forget", three(LASTING, PHRASES, HEAVY, 0.4, 0.4)),
        ("heavy for recent", "no walk for text", two(HEAVY, PHRASES, 0.6)),
        (
            "heavy, with the group's maximum",
            "no walk",
            two(Received(SLOW, group="max"), PHRASES, 0.6),
        ),
        ("expected for recent", "habit in place of presence", two(EXPECTED, PHRASES, 0.6)),
        ("a third expected", "both", three(LASTING, PHRASES, EXPECTED, 0.35, 0.4)),
    ]
    rules = [Rule(f"around: {name}", why, quotas) for name, why, quotas in found]
    rules += [
        Rule(
            f"around: recent {share:g}, window {window:g}",
            "how much is nearness worth",
            two(LASTING, PHRASES, share),
            window,
        )
        for share, window in ((0.6, 32), (0.6, 75), (0.6, 100), (0.6, 0.25), (0.5, 50), (0.5, 100))
    ]
    ways: list[tuple[str, Merge]] = [
        ("along edges", Merge("edges")),
        ("along edges, counted", Merge("edges", count=1.0)),
        ("into like keys", Merge("keys", threshold=0.8)),
        ("into near-copies", Merge("keys", threshold=0.9)),
        ("into near-copies, counted", Merge("keys", threshold=0.9, keys=True, count=1.0)),
    ]
    rules += [
        Rule(
            f"around: merged {name}",
            "nothing is lost whole",
            two(LASTING, PHRASES, 0.6),
            merge=merge,
        )
        for name, merge in ways
    ]
    return rules


def divisions() -> list[Rule]:
    """Return the default with heads that compete, whose parts change seldom or never."""
    ways = [
        ("each cut", "the most that it can give", Division()),
        ("every eighth cut", "tokens move seldom", Division(every=8)),
        ("once", "shapes never change", Division(every=0)),
        (
            "once, even in layers",
            "layers need more or less, not heads",
            Division(every=0, even=True),
        ),
        ("by profile", "a property of the model", Division(profile=True)),
    ]
    return [
        Rule(
            f"divisions: over the {pool}, floor {floor:g}, {name}",
            why,
            (Quota(LASTING, 0.6, pool, floor), Quota(PHRASES, 0.4)),
            division=division,
        )
        for pool, floor in (("layer", 0.5), ("model", 0.8), ("model", 0.5))
        for name, why, division in ways
        if pool == "model" or not division.even
    ]


def adaptive() -> list[Rule]:
    """Return rivals whose heads compete for all places, with Ada-KV's floor and with a high one."""
    found: list[tuple[str, Score, int | float]] = [
        ("h2o", Received(), 0.5),
        ("h2o 0.9984 w0.35", Received(SLOW), 0.35),
        ("snapkv", Votes(64), 64),
    ]
    ways = [
        ("each cut", "what a rival gains by the same means", Division()),
        ("by profile", "the same, as calibrated", Division(profile=True)),
    ]
    return [
        Rule(
            f"adaptive: {name}, over the {pool}, floor {floor:g}, {way}",
            why,
            (Quota(score, 1.0, pool, floor),),  # type: ignore[arg-type]
            window,
            0,
            division=division,
        )
        for name, score, window in found
        for pool in ("layer", "model")
        for floor in (0.2, 0.8)
        for way, why, division in ways
    ]


def both() -> list[Rule]:
    """Return combinations for perplexity and needles at once."""
    habits: list[tuple[str, Score]] = [
        ("recent", RECENT),
        ("visits", visits(graph=LEAKY_16)),
        ("expected", EXPECTED),
        ("expected x visits", Product(((0.5, EXPECTED), (0.5, visits(graph=LEAKY_16))))),
    ]
    agreed = Across(novelty(), "model")
    # A head's own view of what is novel, in small and large shares; then what all heads share.
    own: list[tuple[str, Score]] = [
        ("novelty", NOVEL),
        ("keydiff", KeyDiff()),
        ("novelty as keys lie", distinctive(novelty("key"))),
        ("unlike all seen", distinctive(Softmax(Unlike()))),
        ("remembered novelty", distinctive(Remembered(novelty(), 1.0, "max"))),
        ("value leverage", distinctive(Softmax(Leverage("value")))),
    ]
    common: list[tuple[str, Score]] = [
        # A mean over all heads is nearly flat: the softmax makes a restart of it again.
        ("common phrases", distinctive(Softmax(Nearby(agreed, 9)))),
        ("rare phrases", Nearby(Product(((0.5, Rarity(0.5)), (0.5, agreed))), 9)),
        ("replayed", distinctive(Replayed())),
    ]
    mixes = [
        *(
            (name, score, share, window)
            for name, score in own
            for share, window in ((0.25, 75), (0.4, 32), (0.55, 32))
        ),
        *((name, score, 0.4, 32) for name, score in common),
    ]
    found = [
        Rule(
            f"both: {habit} + {name} {share:g}, w{window}",
            "one part for text, one for what nobody asked for yet",
            two(second, first, share),
            window,
        )
        for (habit, first), (name, second, share, window) in itertools.product(habits, mixes)
    ]
    novel = [*own, *common]
    for name, second in novel:
        found.append(
            Rule(
                f"both: expected .3 + {name} .4 + pool visits",
                "three halves: habit, needles, and recurrence where heads compete",
                (
                    Quota(second, 0.4),
                    Quota(EXPECTED, 0.3),
                    Quota(visits(graph=LEAKY_16), 0.3, "layer", 0.1),
                ),
                32,
            )
        )
    found += [
        Rule(
            "both: novelty restart at the expected",
            "one walk from tokens that are novel and wanted by habit",
            two(distinctive(Product(((0.5, novelty()), (0.5, EXPECTED)))), visits(), 0.5),
            50,
        ),
        Rule(
            "both: ranks of expected and novelty",
            "the better of two ranks",
            whole(Ranks(((1.0, EXPECTED), (1.0, NOVEL)), "max")),
            50,
        ),
        Rule(
            "both: adaptive novelty",
            "expected takes what covers 90 % of it, novelty the rest",
            (Quota(EXPECTED, 0.75, cover=0.9), Quota(NOVEL, 0.25)),
            50,
        ),
    ]
    return found


def marks_of(tokenizer: Any) -> dict[str, tuple[int, ...]]:
    """Return sets of token ids: separators, and numerals with capitals."""
    pieces = [tokenizer.decode([token]) for token in range(len(tokenizer))]
    separators = [i for i, piece in enumerate(pieces) if piece and not piece.strip(" \n\t.,;:!?")]
    numerals = [
        i for i, piece in enumerate(pieces) if piece.strip()[:1].isdigit() or piece[:2].istitle()
    ]
    return {"separators": tuple(separators), "numerals": tuple(numerals)}


def make_rules(tokenizer: Any) -> dict[str, list[Rule]]:
    """Return all rules by group; names are unique."""
    groups = {
        "defaults": defaults(),
        "rivals": rivals(),
        "limits": limits(),
        "phrases": phrases(),
        "widths": widths(),
        "around": around(),
        "divisions": divisions(),
        "adaptive": adaptive(),
        "both": both(),
        "needle": needle(marks_of(tokenizer)),
        "expected": expected(),
        "heads": heads(),
        "decay": decay(),
        "windows": windows(),
        "restarts": restarts(),
        "redundancy": redundancy(),
        "edges": edges(),
        "merging": merging(),
    }
    names = [rule.name for group in groups.values() for rule in group]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"[rules] names must be unique, got twice: {', '.join(twice)}")
    return groups
