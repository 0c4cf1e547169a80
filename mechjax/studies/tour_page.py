"""The page of the tour: what was done and found, in words for somebody who has never seen inside a transformer.

Every sentence that states a finding is filled in from the numbers of the record.
"""

from typing import Any

import numpy as np

from mechjax.viz import (
    Arc,
    BarRow,
    Html,
    Page,
    arcs,
    attention,
    bars,
    escape,
    heatmap,
    legend,
    section,
    tag,
    tokens_line,
)
from mechjax.viz.attention import shown
from mechjax.viz.heatmap import number

_ROLES = {
    "IO": "the other name, which is the answer",
    "S1": "the repeated name, first time",
    "S2": "the repeated name, second time",
    "END": "the last word, where the model answers",
}
_WORDS = {
    "token": "A piece of text, here a word. The model reads tokens and predicts the next one.",
    "position": "The place of a token in the sentence.",
    "layer": "One round of computation. This model has a few, counted from 0.",
    "residual stream": "The running notes at each position. Every layer reads them and adds to them.",
    "attention head": "A part of a layer that copies information between positions. L2.H3 is head 3 of layer 2.",
    "attention pattern": "Where a head copies from: for each position, how its attention is shared out.",
    "logit": "The model's score for a possible next token, before scores become probabilities.",
    "logit difference": "The score of the right name minus the score of the wrong one. Above zero: the model is right.",
    "clean, corrupt": "The sentence as it is, and the same sentence with one word changed so that the answer flips.",
    "patching": "Running the model on one sentence with one piece of its computation taken from the other.",
    "recovered": "How far a patch brings the answer back: 0 not at all, 1 all the way.",
    "mean ablation": "Replacing what a head says by what it says on average: it knows nothing of this sentence.",
}


def tour_page(tour: Any) -> Page:
    """The page for the record of `mechjax.studies.tour`."""
    parts = [
        _opening(tour),
        _short(tour),
        _stream(tour),
        _heads(tour),
        _looks(tour),
        _test(tour),
        _words(),
        _closing(tour),
    ]
    return Page(f"mechjax tour: {_listed(tour.names)}", escape(parts))


def _percent(share: float) -> str:
    return "less than 1%" if 0 < share < 0.005 else f"{100 * share:.0f}%"


def _listed(names: tuple[str, ...]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}"


def _roles_at(story: Any, roles: tuple[str, ...]) -> dict[int, str]:
    return dict(zip(story.at, roles, strict=True))


def _sentence(tokens: tuple[str, ...], roles: dict[int, str], answer: str, answer_class: str) -> Html:
    return tokens_line(tokens, roles, tag("span", shown(answer), class_=f"tok {answer_class}"))


def _opening(tour: Any) -> Html:
    story = tour.story
    rows = [
        BarRow(shown(word), chance, _percent(chance), strong=i == 0)
        for i, (word, chance) in enumerate(story.guesses)
    ]
    return tag(
        "header",
        tag("p", "mechjax tour", class_="eyebrow"),
        tag("h1", f"How does this model know that the answer is {shown(story.answer)}?"),
        tag(
            "p", "A small language model, trained for this tour, reads a sentence in which two people appear and one of "
            "them is named twice. The next word should be the other one. It gets this right, for names that it never "
            "saw together. We open it up and look for the parts that do the work.", class_="lede",
        ),
        _sentence(story.tokens, _roles_at(story, tour.roles), story.answer, "answer"),
        bars(rows, caption="What the model expects next, and how surely"),
    )  # fmt: skip


def _short(tour: Any) -> Html:
    chips = [
        tag(
            "li",
            tag("b", name),
            f"brings back {_percent(float(tour.heads[layer, head]))} of the answer by itself",
        )
        for name, (layer, head) in zip(tour.names, tour.leading, strict=True)
    ]
    story, n_heads = tour.story, tour.heads.size
    return section(
        "The short answer",
        f"Of its {n_heads} attention heads, three carry most of it. Take these three away, and {_percent(tour.drop)} of "
        f"the model's lead for the right name is gone. Take three random others away, and the lead usually changes by "
        f"{_percent(abs(tour.random_drop))}.",
        tag("ul", chips, class_="chips"),
        arcs(
            story.tokens, [_arc(tour, i) for i in range(len(tour.leading))], roles=_roles_at(story, tour.roles),
            caption="What they do here: an arrow from the word that a head looks at to the word where it writes what it saw",
        ),
    )  # fmt: skip


def _writes(tour: Any, which: int) -> int:
    """The named position where a leading head's output matters most."""
    return int(np.argmax(np.asarray(tour.places[tour.leading[which]])))


def _seen(tour: Any, which: int) -> int:
    """The named position that it looks at most from there."""
    return int(np.argmax(np.asarray(tour.looks[which, _writes(tour, which)])))


def _arc(tour: Any, which: int) -> Arc:
    end, start = (tour.story.at[role] for role in (_writes(tour, which), _seen(tour, which)))
    return Arc(start, end, tour.names[which], float(tour.story.patterns[which, end, start]))


def _changed(story: Any) -> Html:
    pairs = enumerate(zip(story.tokens, story.corrupt_tokens, strict=True))
    roles = {i: f"was {shown(old)}" for i, (old, new) in pairs if old != new}
    return _sentence(story.corrupt_tokens, roles, story.wrong, "wrong")


def _stream(tour: Any) -> Html:
    story, numbers = tour.story, np.asarray(tour.residual)
    layers = [f"layer {i}" for i in range(numbers.shape[0])]
    first, last = (tour.roles[int(np.argmax(row))] for row in (numbers[0], numbers[-1]))
    roles_at = _roles_at(story, tour.roles)

    def tip(where: str, value: float, layer: int) -> str:
        return (
            f"Entering layer {layer}, at {where}: putting this back recovers {number(value)} of the answer."
        )

    return section(
        "Where is the answer, layer by layer?",
        "Change one word, and the answer flips:",
        _changed(story),
        "Now run the model on the changed sentence, but put back one piece of what it had computed on the original: its "
        "notes at one position, as they enter one layer. If the right answer comes back, that piece carries it.",
        heatmap(
            numbers, layers, tour.roles, under=[_ROLES.get(role, "") for role in tour.roles], limit=1.0,
            caption=f"How much of the answer comes back (mean of {tour.n} sentences)", corner="entering",
            tip=lambda i, j: tip(tour.roles[j], float(numbers[i, j]), i),
        ),
        legend("−1 worse", "0 no change", "1 all of it back"),
        _journey(first, last),
        heatmap(
            story.residual, layers, [shown(token) for token in story.tokens], limit=1.0,
            caption="The same for every word of the sentence above", corner="entering",
            under=[roles_at.get(i, "") for i in range(len(story.tokens))],
            tip=lambda i, j: tip(f"“{shown(story.tokens[j])}”", float(story.residual[i, j]), i),
        ),
    )  # fmt: skip


def _journey(first: str, last: str) -> str:
    if first == last:
        return f"Read it from top to bottom: what decides the answer stays at {first}."
    return (
        f"Read it from top to bottom: what decides the answer starts at {first} ({_ROLES.get(first, first)}) and has moved "
        f"to {last} ({_ROLES.get(last, last)}) by the last layer. Something moved it there."
    )


def _heads(tour: Any) -> Html:
    numbers, places = np.asarray(tour.heads), np.asarray(tour.places)
    n_layers, n_heads = numbers.shape
    picked = np.stack([places[layer, head] for layer, head in tour.leading])
    return section(
        "Which heads move it?",
        "Attention heads are the only parts that carry information from one position to another. The same game again, "
        "with one head's output put back at a time:",
        heatmap(
            numbers, [f"layer {i}" for i in range(n_layers)], [f"head {i}" for i in range(n_heads)], limit=1.0,
            caption=f"How much of the answer comes back with one head (mean of {tour.n} sentences)", marked=tour.leading,
            tip=lambda i, j: f"L{i}.H{j}: putting this head back recovers {number(float(numbers[i, j]))} of the answer.",
        ),
        legend("−1 worse", "0 no change", "1 all of it back"),
        "The three leading heads are framed. Where in the sentence does their output matter?",
        heatmap(
            picked, tour.names, tour.roles, under=[_ROLES.get(role, "") for role in tour.roles], limit=1.0,
            caption="How much comes back when the head is put back at one position only",
            tip=lambda i, j: f"{tour.names[i]} at {tour.roles[j]}: {number(float(picked[i, j]))} of the answer.",
        ),
    )  # fmt: skip


def _looks(tour: Any) -> Html:
    figures = []
    for i, name in enumerate(tour.names):
        writes, seen = _writes(tour, i), _seen(tour, i)
        share = _percent(float(tour.looks[i, writes, seen]))
        note = (
            f"does its work at {tour.roles[writes]}. From there {share} of its attention goes to {tour.roles[seen]} (mean "
            f"of {tour.n} sentences)."
        )
        figures.append(
            attention(
                tour.story.patterns[i], tour.story.tokens, title=name, note=note, query=tour.story.at[writes]
            )
        )
    return section(
        "What do they look at?",
        "A head at one position looks at the words before it and copies from where it looks. The framed word is the one "
        "that looks; the darker a word, the more of the attention it gets. Choose another word to see where it looks.",
        *figures,
    )


def _test(tour: Any) -> Html:
    random = np.asarray(tour.random)
    median = float(np.median(random))
    rows = [
        BarRow("the whole model", float(tour.intact), number(float(tour.intact))),
        BarRow("without three random heads", median, number(median), ticks=tuple(float(x) for x in random)),
        BarRow(
            f"without {_listed(tour.names)}", float(tour.ablated), number(float(tour.ablated)), strong=True
        ),
    ]
    return section(
        "Is it really these heads?",
        "Bringing an answer back shows that a head can carry it, not that the model needs it. So we take the three heads "
        "away: each says what it says on average, and knows nothing of this sentence. And, for comparison, we do the same "
        f"to {random.size} random triples of other heads.",
        bars(rows, caption=f"Logit difference: the right name above the wrong one (mean of {tour.n} sentences)"),
        tag("p", "Each tick is one random triple; the bar is their median.", class_="fine"),
    )  # fmt: skip


def _words() -> Html:
    return section(
        "Words", tag("dl", [[tag("dt", word), tag("dd", meaning)] for word, meaning in _WORDS.items()])
    )


def _closing(tour: Any) -> Html:
    took = sum(seconds for _, seconds in tour.seconds)
    code = (
        "import mechjax as mj\n\n"
        f"tour = mj.tour(n={tour.n}, seed={tour.seed})\n"
        "tour.heads           # what each head brings back, [layer, head]\n"
        "tour.top(5)          # the leading heads by name"
    )
    return tag(
        "footer",
        tag("p", "To do it yourself:"),
        tag("pre", tag("code", code)),
        tag(
            "p", f"Model {tour.model}, {tour.n} held-out sentences, seed {tour.seed}; computed in {took:.0f} seconds, "
            "compilation included. Every number is exact: each cell is a run of the model.", class_="fine",
        ),
    )  # fmt: skip
