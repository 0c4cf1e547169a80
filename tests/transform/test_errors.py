"""Bad input to the transform: one clear typed error each, before anything runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import mechjax as mj
from mechjax.base.errors import ArgumentError, JitError, ShapeError, SiteError


def tower(x):
    """Three layers over [batch, pos, unit], and a site outside them."""
    for layer in range(3):
        x = mj.site(x + 1, "h", layer=layer, layers=3, axes=("pos", "unit"))
    return mj.site(x, "out", axes=("pos", "unit"))


X = jnp.zeros((2, 4, 5))


def edited(*edits):
    return mj.intervene(tower, edits)(X)


BAD = {
    "unknown site": (SiteError, lambda: edited(mj.zero("hh")), r"no site is named `hh`. .*sites: `h`, `out`"),
    "did you mean": (SiteError, lambda: mj.capture(tower, "resid_pots")(X), r"Did you mean `resid_post`"),
    "site of other models": (SiteError, lambda: edited(mj.zero("rot_q")), r"has no site `rot_q`: .*rotary"),
    "no layers": (SiteError, lambda: edited(mj.zero("out", layer=0)), "outside the layers, so it takes no layer"),
    "no layers to capture": (SiteError, lambda: mj.capture(tower, "out", layers=[0])(X), "lie outside the layers"),
    "layer": (SiteError, lambda: edited(mj.zero("h", layer=3)), r"layer 3 is out of range; site `h` has 3 \(0 to 2, or -3"),
    "negative layer": (SiteError, lambda: edited(mj.zero("h", layer=[0, -4])), "layer -4 is out of range"),
    "captured layer": (SiteError, lambda: mj.capture(tower, "h", layers=[3])(X), "layer 3 is out of range; there are 3"),
    "layer twice": (SiteError, lambda: mj.capture(tower, "h", layers=[1, -2])(X), r"name one layer twice"),
    "site twice": (SiteError, lambda: mj.capture(tower, ["h", "h"]), "captured twice: `h`"),
    "no axis": (SiteError, lambda: edited(mj.zero("h", head=0)), r"has no axis `head`; its axes are \('pos', 'unit'\)"),
    "position": (SiteError, lambda: edited(mj.zero("h", pos=4)), "pos 4 is out of range; site `h` has 4"),
    "per example": (SiteError, lambda: edited(mj.zero("h", pos=[[0], [9]])), "pos 9 is out of range"),
    "capture position": (SiteError, lambda: mj.capture(tower, "h", pos=9)(X), "pos 9 is out of range"),
    "mask length": (ShapeError, lambda: edited(mj.zero("h", pos=[True, False])), "mask `pos=` has length 2; .* has 4"),
    "mask to capture": (ShapeError, lambda: mj.capture(tower, "h", pos=[True] * 4)(X), "is a mask, whose size is data"),
    "layer mask length": (ShapeError, lambda: edited(mj.zero("h", layer=[True, False])), "mask `layer=` has length 2"),
    "too many batch axes": (ShapeError, lambda: edited(mj.zero("h", pos=np.zeros((1, 2, 1), int))), "indices per example"),
    "looks per example": (ShapeError, lambda: edited(mj.zero("h", pos=np.array([0, 1]))), r"array of 2 indices for 2 examples.*per_example"),
    "looks per example to capture": (ShapeError, lambda: mj.capture(tower, "h", pos=jnp.array([0, 1]))(X), "mechjax.per_example"),
    "float index": (ShapeError, lambda: mj.zero("h", pos=1.5), "an index must be integers or booleans, got float32"),
    "boolean index": (ShapeError, lambda: mj.zero("h", pos=True), "a single boolean selects nothing"),
    "layer rank": (ShapeError, lambda: mj.zero("h", layer=[[1]]), "one layer, a list of layers or a mask"),
    "shape": (ShapeError, lambda: edited(mj.replace("h", np.zeros(4))), r"shape \(4,\) does not fit site `h`, which has \(batch, pos, unit\)"),
    "layer axis": (ShapeError, lambda: edited(mj.replace("h", np.zeros((3, 2, 4, 5)))), "say per_layer=True"),
    "rows": (ShapeError, lambda: edited(mj.replace("h", np.zeros((2, 5)), per_layer=True)), r"first axis is the layer; it has shape \(2, 5\), and site `h` has 3"),
    "two readings": (
        ShapeError,
        lambda: mj.intervene(tower, [mj.replace("h", np.zeros((2, 5)), pos=1)])(jnp.zeros((2, 2, 5))),
        r"can be read in two ways at site `h`.*Give it all 3 axes",
    ),
    "text": (ShapeError, lambda: mj.replace("h", "text"), "expected numbers, got 'text'"),
    "ragged": (ShapeError, lambda: mj.replace("h", [[1.0], [1.0, 2.0]]), "expected numbers of one shape"),
    "strength": (ShapeError, lambda: mj.add("h", 1.0, strength=[1, 2]), "strength must be one number"),
    "fraction into integers": (
        ShapeError,
        lambda: mj.intervene(lambda x: mj.site(x, "n"), [mj.replace("n", 0.5)])(jnp.arange(3)),
        "would lose its fraction",
    ),
    "function's shape": (ShapeError, lambda: edited(mj.apply("h", lambda x, info: x[0])), "it must return the same shape"),
    "direction": (ShapeError, lambda: edited(mj.project_out("h", np.ones(4))), "directions of length 4; the site's last axis is 5"),
    "direction's rank": (ShapeError, lambda: mj.project_out("h", np.ones((1, 2, 5))), r"must be \[d\] or \[k, d\]"),
    "zero direction": (ArgumentError, lambda: mj.project_out("h", np.zeros(5)), "nothing to project out"),
    "clamp": (ArgumentError, lambda: mj.clamp("h"), "give low=, high= or both"),
    "resample": (ArgumentError, lambda: mj.resample("h", np.zeros((1, 4, 5)), key=jax.random.key(0)), "two examples or more"),
    "on_miss": (ArgumentError, lambda: mj.zero("h", on_miss="maybe"), "expected 'nan', 'raise' or 'allow'"),
    "no function": (ArgumentError, lambda: mj.apply("h", 3), "fn must be callable, got int"),
    "no edit": (ArgumentError, lambda: mj.intervene(tower, [("h", 0)]), "intervene takes edits such as .* got tuple"),
    "nothing to capture": (ArgumentError, lambda: mj.capture(tower, []), "capture was given no sites"),
    "layer said twice": (SiteError, lambda: mj.zero("blocks.1.attn.hook_z", layer=2), "already says layer 1"),
    "layers said twice": (SiteError, lambda: mj.capture(tower, "blocks.1.attn.hook_z", layers=2), "already says layer 1"),
    "unhashable": (JitError, lambda: mj.capture(tower, "h")({"a": {1, 2}}), "static part that cannot be hashed"),
    "gradient of a gradient": (SiteError, lambda: mj.value_and_grad_at(tower, jnp.sum, "h@cotangent"), "takes names of sites"),
    "gradient of whole numbers": (SiteError, lambda: mj.value_and_grad_at(lambda x: mj.site(x, "ids").astype(float), jnp.sum, "ids")(jnp.arange(3)), r"site `ids` holds int32, which has no gradient"),
    "metric": (ArgumentError, lambda: mj.value_and_grad_at(tower, lambda y: y.argmax(), "h")(X), "one real number, or one per example"),
    "means": (ArgumentError, lambda: mj.means(tower, X, "h", per="batch"), "expected 'pos' or 'all'"),
    "means without batch": (ArgumentError, lambda: mj.means(tower, X[0], "h"), "prompts have no batch axis"),
    "means of two lengths": (ArgumentError, lambda: mj.means(tower, [X, X[:, :2]], "h", per="pos"), "batches differ in shape"),
}  # fmt: skip


@pytest.mark.usefixtures("as_a_user")
@pytest.mark.parametrize("case", BAD)
def test_bad_input__teaches(case):
    error, run, message = BAD[case]
    with pytest.raises(error, match=message):
        run()


def test_site__bad_declaration__teaches():
    with pytest.raises(SiteError, match="names 2 axes"):
        mj.site(jnp.ones(3), "h", axes=("pos", "unit"))
    with pytest.raises(SiteError, match="not how many there are: pass `layers=`"):
        mj.site(jnp.ones(3), "h", layer=0)
    with pytest.raises(SiteError, match="was given layer 3; with layers=3 it must be 0 to 2"):
        mj.site(jnp.ones(3), "h", layer=3, layers=3)


def test_site__one_name_for_two_activations__teaches():
    def f(x):
        return mj.site(x, "h", layer=0, layers=2).sum() + mj.site(x[:1], "h", layer=1, layers=2).sum()

    with pytest.raises(SiteError, match="names two different activations"):
        mj.capture(f, "h")(jnp.ones(3))


def test_while__without_layers__says_what_to_declare():
    def f(x):
        return lax.while_loop(lambda x: x.sum() < 9, lambda x: mj.site(x + 1, "h"), x)

    with pytest.raises(SiteError, match=r"site\(x, name, layer=i, layers=n\)"):
        mj.capture(f, "h")(jnp.ones(3))

    def g(x):
        return lax.while_loop(lambda x: mj.site(x, "c").sum() < 9, lambda x: x + 1, x)

    with pytest.raises(SiteError, match="stands in the condition of a `while_loop`"):
        mj.intervene(g, [mj.zero("c")])(jnp.ones(3))


def test_primitive__that_cannot_be_opened__is_named():
    @jax.custom_batching.custom_vmap
    def f(x):
        return mj.site(2 * x, "h")

    f.def_vmap(lambda size, batched, x: (2 * x, True))
    with pytest.raises(SiteError, match="inside `custom_vmap_call`, which mechjax cannot open"):
        mj.intervene(f, [mj.zero("h")])(jnp.ones(3))


def test_record__missing_name_or_layer__teaches():
    _, acts = mj.capture(tower, "h", layers=[0, 2])(X)
    with pytest.raises(SiteError, match="`z` was not captured; this record holds h"):
        acts["z"]
    assert "z" not in acts and "h" in acts and list(acts) == ["h"] and len(acts) == 1
    with pytest.raises(SiteError, match=r"the record holds layers \(0, 2\) of `h`, not layer 1"):
        edited(mj.replace("h", acts, layer=1))
    np.testing.assert_array_equal(edited(mj.replace("h", acts, layer=-1)), acts["h"][1])
    run = jax.jit(lambda layer: mj.intervene(tower, [mj.replace("h", acts, layer=layer)])(X))
    assert np.isnan(run(1)).all() and np.isfinite(run(2)).all()


def test_list_sites__prints_a_table_and_runs_nothing():
    sites = mj.list_sites(tower, jax.ShapeDtypeStruct((2, 4, 5), jnp.float32))
    assert list(sites) == ["h", "out"] and sites["h"].layers == 3 and sites["out"].layers is None
    assert repr(sites).splitlines()[1].split() == [
        "h",
        "3",
        "batch",
        "pos",
        "unit",
        "(2,",
        "4,",
        "5)",
        "float32",
    ]
    with pytest.raises(SiteError, match="no site `z` here; there are h, out"):
        sites["z"]
