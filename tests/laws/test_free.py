"""Law 1: untransformed, sites cost nothing. The compiled program is the one without sites."""

import re
from collections import Counter

import jax
import pytest

from mechjax.models import decoder
from mechjax.models import marks as marks_module
from tests.laws.subjects import BATCH, Nesting, build

X = BATCH[0]
PROGRAMS = {
    "forward": lambda f: (f, X),
    "grad": lambda f: (jax.grad(lambda x: (f(x) ** 2).sum()), X),
    "vmap": lambda f: (jax.vmap(f), BATCH),
    "vmap of grad": lambda f: (jax.vmap(jax.grad(lambda x: (f(x) ** 2).sum())), BATCH),
    "jvp of grad": lambda f: (lambda x: jax.jvp(jax.grad(lambda x: (f(x) ** 2).sum()), (x,), (x,)), X),
}


# Everything but fusion: which of two equal neighbours is fused first depends on the order of instructions, and sites
# leave a dead counter behind in reverse mode that is gone before, but has moved others.
NO_FUSION = {"xla_disable_hlo_passes": "fusion"}
INSTRUCTION = re.compile(r"= \(?(\w+\[[^\]]*\])[^=]*?[)}\] ] ?([a-z][\w-]*)\(")


def compiled(fn, *args):
    """The instructions of the optimised program with the shapes of their results, counted."""
    text = jax.jit(fn).lower(*args).compile(compiler_options=NO_FUSION).as_text()
    found = Counter(INSTRUCTION.findall(text))
    assert sum(found.values()) > 10, text  # or the pattern no longer reads what XLA prints
    return found


def law_1(nesting, program):
    tagged = compiled(*PROGRAMS[program](build(nesting)))
    untagged = compiled(*PROGRAMS[program](build(nesting, tagged=False)))
    assert tagged == untagged


@pytest.mark.parametrize("program", PROGRAMS)
@pytest.mark.parametrize(
    "nesting", [Nesting(), Nesting("scanned", ("remat",))], ids=lambda n: "+".join(n.bodies)
)
def test_law_1__sites_cost_nothing(nesting, program):
    law_1(nesting, program)


@pytest.mark.parametrize("layout", ["pairs", "counted"])
def test_law_1__other_layouts(layout):
    law_1(Nesting(layout, ("jit",)), "grad")


def test_law_1__decoder(tiny_model, tiny_tokens, monkeypatch):
    def programs():
        def forward(model, tokens):
            return model(tokens)

        def loss(model, tokens):
            return (model(tokens) ** 2).mean()

        jax.clear_caches()
        return [
            compiled(forward, tiny_model, tiny_tokens),
            compiled(jax.grad(loss), tiny_model, tiny_tokens),
            compiled(jax.vmap(forward, (None, 0)), tiny_model, tiny_tokens),
        ]

    tagged = programs()
    monkeypatch.setattr(marks_module, "site", lambda x, name, **_: x)
    assert "site" not in vars(decoder)  # the decoder tags through marks alone, or this test would see nothing
    assert programs() == tagged
