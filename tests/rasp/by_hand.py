"""What each standard program should give, written out without RASP."""


def _prefixes(word):
    return [word[: i + 1] for i in range(len(word))]


def _balances(word, left, right):
    return [p.count(left) - p.count(right) for p in _prefixes(word)]


def _balanced(word, pairs):
    return all(min(b := _balances(word, *pair)) >= 0 and b[-1] == 0 for pair in pairs)


def _by_frequency(word):
    return sorted(word, key=lambda token: -word.count(token))


def _everywhere(value, word):
    return [value] * len(word)


def _after(word, token):
    at = word.index(token) if token in word else len(word)
    return word[at + 1] if at + 1 < len(word) else None


BY_HAND = {
    "length": lambda w: _everywhere(len(w), w),
    "reverse": lambda w: list(w[::-1]),
    "hist": lambda w: [w.count(t) for t in w],
    "double_hist": lambda w: [sum(w.count(u) == w.count(t) for u in set(w)) for t in w],
    "sort": sorted,
    "sort_by_frequency": _by_frequency,
    "most_frequent": lambda w: _everywhere(_by_frequency(w)[0], w),
    "dyck": lambda w: _everywhere(_balanced(w, ["()"]), w),
    "shuffle_dyck": lambda w: _everywhere(_balanced(w, ["()", "[]"]), w),
    "pair_balance": lambda w: [b / (i + 1) for i, b in enumerate(_balances(w, "(", ")"))],
    "frac_prevs": lambda w: [p.count("x") / len(p) for p in _prefixes(w)],
    "shift": lambda w: ([None, None, *w])[: len(w)],
    "detect_pattern": lambda w: ["".join(p).endswith("abc") for p in _prefixes(w)],
    "count": lambda w: [p.count("a") for p in _prefixes(w)],
    "count_rare": lambda w: _everywhere(sum(w.count(t) < 2 for t in w), w),
    "is_first": lambda w: [w.index(t) == i for i, t in enumerate(w)],
    "parity": lambda w: _everywhere(w.count("a") % 2 == 1, w),
    "after_first": lambda w: _everywhere(_after(w, "a"), w),
}
"""Name of a standard program -> its values, given a tuple of tokens, in the direction it is meant for."""
