"""What the tour found, and the page that tells it to somebody who has never seen inside a transformer.

Every sentence of the page that states a finding is filled in from the numbers of the record.
"""

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mechjax.base.records import Record
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
    shown,
    tag,
    tokens_line,
)
from mechjax.viz.heatmap import number

_ROLES = {
    "IO": "the other name, which is the answer",
    "S1": "the repeated name, first time",
    "S2": "the repeated name, second time",
    "END": "the last word, where the model answers",
}
_LEDE = """A small language model reads a sentence in which two people appear and one of them is named twice.
The next word should be the other one. It gets this right, even for pairs of names that it never met in
training. We open it up and look for the parts that do the work."""
_PATCH = """Now run the model on the changed sentence, but put back one piece of what it had computed on the
original: its notes at one position, as they enter one layer. If the right answer comes back, that piece carries
it."""
_HEADS = """Attention heads are the only parts that carry information from one position to another. So the same
again, with the output of one head put back at a time:"""
_LOOKS = """A head looks from one word at the words before it, or at that word itself, and copies from where it
looks. The framed word is the one that looks; the stronger the colour of a word, the more of the attention it gets.
Choose any word to see where it looks."""
_TEST = """Bringing an answer back shows that a head can carry it, not that the model needs it. So we take the three
heads away: each now says, everywhere, what it says on average over all sentences and words, which tells nothing about
these names. To compare, we do the same to random triples of other heads."""
_LEGEND = ("−1 worse", "0 no change", "1 all of it back")
_WORDS = {
    "token": "A piece of text, here a word. The model reads tokens and predicts the next one.",
    "position": "The place of a token in the sentence. <bos> marks the beginning.",
    "layer": "One round of computation. Layers are counted from 0.",
    "residual stream": "The running notes at each position. Every layer reads them and adds to them.",
    "attention head": "A part of a layer that copies information between positions. L2.H3 is head 3 of layer 2.",
    "attention pattern": "Where a head copies from: for each position, how its attention is shared out.",
    "logit": "The model's score for a possible next token, before scores become probabilities.",
    "logit difference": "The score of the right name minus that of the wrong one. Above zero, the model is right.",
    "clean, corrupt": "The sentence as it is, and the same sentence with one word changed so that the answer flips.",
    "patching": "Running the model on one sentence with one piece of its computation taken from the other.",
    "recovered": "How far a patch brings the answer back: 0 not at all, 1 all the way.",
    "mean ablation": "Replacing what a head says by what it says on average over many sentences.",
}


class Story(Record):
    """One prompt, told in detail.

    Attributes:
        residual: Recovered by the residual stream entering each layer, at each token.
        patterns: Attention patterns of the leading heads.
        tokens: The clean prompt, piece by piece (static).
        corrupt_tokens: Its corrupt version (static).
        at: Index in `tokens` of each named position (static).
        answer: The right next token (static).
        wrong: The wrong one (static).
        guesses: The model's next tokens with their probabilities, the first first (static).
    """

    residual: Float[Array, "layer pos"]
    patterns: Float[Array, "leader query key"]
    tokens: tuple[str, ...] = eqx.field(static=True)
    corrupt_tokens: tuple[str, ...] = eqx.field(static=True)
    at: tuple[int, ...] = eqx.field(static=True)
    answer: str = eqx.field(static=True)
    wrong: str = eqx.field(static=True)
    guesses: tuple[tuple[str, float], ...] = eqx.field(static=True)


class Tour(Record):
    """What the tour found. Shows itself as a page in a notebook.

    Recovered is 0 where a patched corrupt run still answers as the corrupt one and 1 where it answers as the clean one.

    Attributes:
        heads: Recovered by each head's output (`z`) at all positions.
        residual: Recovered by the residual stream entering each layer, at each named position.
        places: Recovered by each head's output at each named position.
        looks: Attention of the leading heads from one named position to another, mean over prompts.
        intact: Logit difference of the clean prompts: the right name above the wrong one, mean over prompts.
        ablated: The same with the leading heads mean-ablated.
        random: The same with each of the random triples of other heads mean-ablated.
        story: One prompt in detail.
        leading: (layer, head) of the leading heads, the first first (static).
        roles: The named positions (static).
        model: The model's name (static).
        n: How many prompts (static).
        seed: Which prompts and triples (static).
        seconds: What took how long, compilation included (static).
    """

    heads: Float[Array, "layer head"]
    residual: Float[Array, "layer role"]
    places: Float[Array, "layer head role"]
    looks: Float[Array, "leader role seen"]
    intact: Float[Array, ""]
    ablated: Float[Array, ""]
    random: Float[Array, " triple"]
    story: Story
    leading: tuple[tuple[int, int], ...] = eqx.field(static=True)
    roles: tuple[str, ...] = eqx.field(static=True)
    model: str = eqx.field(static=True)
    n: int = eqx.field(static=True)
    seed: int = eqx.field(static=True)
    seconds: tuple[tuple[str, float], ...] = eqx.field(static=True)

    def axis_labels(self) -> dict[str, tuple[str, ...]]:
        """Names of the named positions and of the leading heads."""
        return {"role": self.roles, "seen": self.roles, "leader": self.names}

    @property
    def names(self) -> tuple[str, ...]:
        """The leading heads as the field writes them, such as `L2.H3`."""
        return tuple(f"L{layer}.H{head}" for layer, head in self.leading)

    @property
    def drop(self) -> float:
        """Share of the logit difference that goes with the leading heads."""
        return float(1 - self.ablated / self.intact)

    @property
    def random_drop(self) -> float:
        """Median share that goes with three random other heads."""
        return float(1 - jnp.median(self.random) / self.intact)

    @property
    def page(self) -> Page:
        """The page that tells it."""
        return _page(self)

    def _repr_html_(self) -> str:
        return self.page._repr_html_()


def _page(tour: Tour) -> Page:
    parts = (_opening, _short, _stream, _heads, _looks, _test, _words, _closing)
    return Page(f"mechjax tour: {_listed(tour.names)}", escape([part(tour) for part in parts]))


def _percent(share: float) -> str:
    return "under 1%" if 0 < share < 0.005 else f"{100 * share:.0f}%"


def _listed(names: tuple[str, ...]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}"


def _roles_at(tour: Tour) -> dict[int, str]:
    return dict(zip(tour.story.at, tour.roles, strict=True))


def _explained(tour: Tour) -> list[str]:
    return [_ROLES[role] for role in tour.roles]


def _writes(tour: Tour, which: int) -> int:
    """The named position where a leading head's output matters most."""
    return int(np.argmax(np.asarray(tour.places[tour.leading[which]])))


def _seen(tour: Tour, which: int) -> int:
    """The named position that it looks at most from there."""
    return int(np.argmax(np.asarray(tour.looks[which, _writes(tour, which)])))


def _opening(tour: Tour) -> Html:
    story = tour.story
    rows = [
        BarRow(shown(word), chance, _percent(chance), i == 0)
        for i, (word, chance) in enumerate(story.guesses)
    ]
    return tag(
        "header",
        tag("p", "mechjax tour", class_="eyebrow"),
        tag("h1", f"How does this model know that the answer is {shown(story.answer)}?"),
        tag("p", _LEDE, class_="lede"),
        tokens_line(story.tokens, _roles_at(tour), tag("span", shown(story.answer), class_="tok answer")),
        bars(rows, caption="What the model expects next, and how surely"),
    )


def _short(tour: Tour) -> Html:
    chips = [
        tag("li", tag("b", name), f"brings back {_percent(float(tour.heads[head]))} of the answer by itself")
        for name, head in zip(tour.names, tour.leading, strict=True)
    ]
    return section(
        "The short answer",
        f"Of its {tour.heads.size} attention heads, these three bring most of the answer back. Take them away, and "
        f"{_percent(tour.drop)} of the model's lead for the right name is gone. Take three random others away, and the "
        f"lead typically changes by {_percent(abs(tour.random_drop))}.",
        tag("ul", chips, class_="chips"),
        arcs(
            tour.story.tokens,
            [_arc(tour, i) for i in range(len(tour.leading))],
            roles=_roles_at(tour),
            caption="What they do here: each arrow goes from the word that a head looks at to the word where it writes",
        ),
    )


def _arc(tour: Tour, which: int) -> Arc:
    end, start = (tour.story.at[role] for role in (_writes(tour, which), _seen(tour, which)))
    return Arc(start, end, tour.names[which], float(tour.story.patterns[which, end, start]))


def _stream(tour: Tour) -> Html:
    story, numbers = tour.story, np.asarray(tour.residual)
    layers, words = [f"layer {i}" for i in range(numbers.shape[0])], [shown(token) for token in story.tokens]
    pairs = enumerate(zip(story.tokens, story.corrupt_tokens, strict=True))
    changed = {i: f"was {shown(old)}" for i, (old, new) in pairs if old != new}

    def tip(where: str, value: float, layer: int) -> str:
        return (
            f"Entering layer {layer}, at {where}: putting this back recovers {number(value)} of the answer."
        )

    return section(
        "Where is the answer, layer by layer?",
        "Change one word, and the answer flips:",
        tokens_line(story.corrupt_tokens, changed, tag("span", shown(story.wrong), class_="tok wrong")),
        _PATCH,
        heatmap(
            numbers,
            layers,
            tour.roles,
            under=_explained(tour),
            caption=f"How much of the answer comes back (mean of {tour.n} sentences)",
            corner="entering",
            limit=1.0,
            tip=lambda i, j: tip(tour.roles[j], float(numbers[i, j]), i),
        ),
        legend(*_LEGEND),
        _journey(*(tour.roles[int(np.argmax(row))] for row in (numbers[0], numbers[-1]))),
        heatmap(
            story.residual,
            layers,
            words,
            caption="The same for every word of the sentence above",
            corner="entering",
            limit=1.0,
            tip=lambda i, j: tip(f"“{words[j]}”", float(story.residual[i, j]), i),
        ),
    )


def _journey(first: str, last: str) -> str:
    if first == last:
        return f"Read it from top to bottom: what decides the answer stays at {first}."
    return (
        f"Read it from top to bottom: what decides the answer starts at {first} ({_ROLES[first]}) and has moved to "
        f"{last} ({_ROLES[last]}) by the last layer. Something moved it there."
    )


def _heads(tour: Tour) -> Html:
    numbers, places = np.asarray(tour.heads), np.asarray(tour.places)
    picked = np.stack([places[head] for head in tour.leading])

    def tip(name: str, value: float) -> str:
        return f"{name}: putting this head back recovers {number(value)} of the answer."

    return section(
        "Which heads do the work?",
        _HEADS,
        heatmap(
            numbers,
            [f"layer {i}" for i in range(numbers.shape[0])],
            [f"head {i}" for i in range(numbers.shape[1])],
            caption=f"How much of the answer comes back with one head (mean of {tour.n} sentences)",
            limit=1.0,
            marked=tour.leading,
            tip=lambda i, j: tip(f"L{i}.H{j}", float(numbers[i, j])),
        ),
        legend(*_LEGEND),
        "The three leading heads are framed. Where in the sentence does it matter what they write?",
        heatmap(
            picked,
            tour.names,
            tour.roles,
            under=_explained(tour),
            caption="How much comes back when the head is put back at one position only",
            limit=1.0,
            tip=lambda i, j: tip(f"{tour.names[i]} at {tour.roles[j]}", float(picked[i, j])),
        ),
    )


def _looks(tour: Tour) -> Html:
    figures = []
    for i, name in enumerate(tour.names):
        writes, seen = _writes(tour, i), _seen(tour, i)
        share = _percent(float(tour.looks[i, writes, seen]))
        target = "the word itself" if seen == writes else tour.roles[seen]
        note = f"does its work at {tour.roles[writes]}. There, {share} of its attention goes to {target}"
        note += f" (mean of {tour.n} sentences)."
        pattern, tokens = tour.story.patterns[i], tour.story.tokens
        figures.append(attention(pattern, tokens, title=name, note=note, query=tour.story.at[writes]))
    return section("What do they look at?", _LOOKS, *figures)


def _test(tour: Tour) -> Html:
    random = [float(x) for x in tour.random]
    median, intact, ablated = float(np.median(random)), float(tour.intact), float(tour.ablated)
    rows = [
        BarRow("the whole model", intact, number(intact)),
        BarRow("without three random heads", median, number(median), ticks=tuple(random)),
        BarRow(f"without {_listed(tour.names)}", ablated, number(ablated), strong=True),
    ]
    return section(
        "Is it really these heads?",
        _TEST,
        bars(
            rows, caption=f"Logit difference: the right name above the wrong one (mean of {tour.n} sentences)"
        ),
        tag(
            "p", f"Each tick is one of {len(random)} random triples; the bar is their median.", class_="fine"
        ),
    )


def _words(tour: Tour) -> Html:
    return section(
        "Words", tag("dl", [[tag("dt", word), tag("dd", meaning)] for word, meaning in _WORDS.items()])
    )


def _closing(tour: Tour) -> Html:
    took = sum(seconds for _, seconds in tour.seconds)
    code = f"""import mechjax as mj

tour = mj.tour(n={tour.n}, seed={tour.seed})
tour.heads           # how much each head brings back, [layer, head]
tour.top(5)          # the leading heads by name"""
    about = f"""Model {tour.model}, {tour.n} held-out sentences, seed {tour.seed}; computed in {took:.0f} seconds,
compilation included. Nothing is estimated: each cell is a run of the model."""
    return tag(
        "footer",
        tag("p", "To do it yourself:"),
        tag("pre", tag("code", code)),
        tag("p", about, class_="fine"),
    )
