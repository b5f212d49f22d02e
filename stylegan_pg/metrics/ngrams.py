"""How well generated texts match real ones: the divergence of their n-grams, and how many of them differ."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence


def ngrams(texts: Iterable[str], n: int) -> Counter[str]:
    """How often each sequence of n characters occurs."""
    return Counter(text[i : i + n] for text in texts for i in range(len(text) - n + 1))


def ngram_divergence(a: Iterable[str], b: Iterable[str], n: int = 4) -> float:
    """The Jensen-Shannon divergence, in nats, of the distributions of sequences of n characters in two sets of texts: 0
    for equal ones, ln 2 for those that have none in common (Gulrajani et al. 2017, section 5.3, for n = 4 and 6). Where
    a set has none, it is ln 2."""
    counts = ngrams(a, n), ngrams(b, n)
    totals = [sum(count.values()) for count in counts]
    if not all(totals):
        return math.log(2)
    found = 0.0
    for gram in counts[0].keys() | counts[1].keys():
        p, q = (count[gram] / total for count, total in zip(counts, totals, strict=True))
        found += sum(0.5 * x * math.log(2 * x / (p + q)) for x in (p, q) if x)
    return max(found, 0.0)


def distinct_share(texts: Sequence[str]) -> float:
    """The share of different texts among all."""
    return len(set(texts)) / len(texts)
