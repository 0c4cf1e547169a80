"""What runs on any subject, by name: what mechjax gives of one, and what the oracle does; the README's table is these."""

import math
import tempfile
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import mechjax as mj
from tests.interop import by_hand
from tests.interop.by_hand import (
    CLEAN,
    CORRUPT,
    EMPTY,
    LAYERS,
    METRIC,
    NOTHING,
    POS,
    D,
    activations,
    forward,
    read,
    slopes,
    subject,
)


def of_capture():
    logits, acts = mj.capture(subject(), "mlp_out")(CLEAN)
    return (logits, acts["mlp_out"]), forward(CLEAN, EMPTY, NOTHING)


def of_edit():
    edited = mj.intervene(subject(), mj.zero("mlp_out", layer=1, pos=2))(CLEAN)
    return edited, forward(CLEAN, EMPTY, NOTHING.at[1, 2].set(True))[0]


def of_run():
    found = mj.run(subject(), CLEAN, edits=[mj.scale("mlp_out", 2.0, layer=0)], capture="mlp_out", layers=1)
    logits, acts = forward(CLEAN, 2 * activations(CLEAN), NOTHING.at[0].set(True))
    return (found[0], found[1]["mlp_out"]), (logits, acts[1:])


def of_list():
    info = mj.list_sites(subject(), CLEAN)["mlp_out"]
    return jnp.array([info.layers, *info.shape]), jnp.array([LAYERS, *CLEAN.shape, D])


def of_gradient():
    value, grads = mj.value_and_grad_at(subject(), METRIC, "mlp_out")(CLEAN)
    found = activations(CLEAN)
    # Of one layer at a time: putting all in at once cuts what later ones owe to earlier ones.
    each = [slopes(CLEAN, found, NOTHING.at[i].set(True))[i] for i in range(LAYERS)]
    return (value, grads["mlp_out"]), (read(forward(CLEAN, EMPTY, NOTHING)[0]), jnp.stack(each))


def of_means():
    found = mj.means(subject(), [CLEAN, CORRUPT], "mlp_out")["mlp_out"]
    return found, jnp.stack([activations(CLEAN), activations(CORRUPT)]).mean((0, 2, 3))


def of_patch():
    found = mj.patching.activation_patch(subject(), CLEAN, CORRUPT, METRIC, site="mlp_out")
    return found.per_example, by_hand.patched(CORRUPT, CLEAN)


def of_attribution():
    found = mj.attribution.attribution_patch(subject(), CLEAN, CORRUPT, METRIC, site="mlp_out")
    moved = activations(CLEAN) - activations(CORRUPT)
    return found.per_example, jnp.moveaxis((moved * of_gradient()[1][1]).sum(-1), 1, -1)


def of_integral():
    found = mj.attribution.integrated_gradients(
        subject(), CLEAN, CORRUPT, METRIC, site="mlp_out", over=("layer", "pos"), steps=2
    )
    clean, corrupt = activations(CLEAN), activations(CORRUPT)
    rows = []
    for i in range(LAYERS):
        at = [
            slopes(CLEAN, corrupt + t * (clean - corrupt), NOTHING.at[i].set(True))[i] for t in (0.25, 0.75)
        ]
        rows.append(((clean - corrupt)[i] * (at[0] + at[1]) / 2).sum(-1).T)
    return found.per_example, jnp.stack(rows)


def of_plan():
    plan = mj.plan(subject(), tuple(CLEAN.shape), capture="mlp_out")
    site = next(s for s in plan.sites if s.name == "mlp_out")
    weights = sum(x.size for x in jax.tree.leaves(subject()))
    of_site = 4 * LAYERS * math.prod(CLEAN.shape) * D
    found = [plan.n_params, plan.param_bytes, site.bytes, plan.captured_bytes]
    return jnp.array(found), jnp.array([weights, 4 * weights, of_site, of_site])


def of_dry_run():
    how = {"site": "mlp_out", "over": ("pos",)}
    shapes = jax.ShapeDtypeStruct(CLEAN.shape, jnp.int32)
    dry = mj.dry_run(mj.patching.activation_patch, subject(), shapes, shapes, METRIC, **how)
    return jnp.array(dict((name, shape) for name, shape, _ in dry.outputs)["per_example"]), jnp.array(
        [POS, 2]
    )


def rows_of(tokens):
    """What every MLP gives, a row for each token. Shape (layer, row, d_model)."""
    return activations(tokens).reshape(LAYERS, -1, D)


def of_stream():
    stream = mj.dictlearn.activations(
        subject(), [CLEAN, CORRUPT], "mlp_out", layer=1, batch=4, buffer=8, key=jax.random.key(0)
    )
    found, expected = np.concatenate(list(stream)), np.concatenate([rows_of(CLEAN)[1], rows_of(CORRUPT)[1]])
    ordered = lambda rows: rows[np.lexsort(np.round(rows, 4).T)]
    return ordered(found), ordered(expected)


def of_store():
    with tempfile.TemporaryDirectory() as folder:
        store = mj.store.write(folder, subject(), [CLEAN, CORRUPT], "mlp_out", shard_rows=5)
        found = [store.rows(slice(None), "mlp_out", layer=i) for i in range(LAYERS)]
    return np.stack(found), np.concatenate([rows_of(CLEAN), rows_of(CORRUPT)], 1)


def of_repair():
    with tempfile.TemporaryDirectory() as folder:
        mj.store.write(folder, subject(), [CLEAN, CORRUPT], "mlp_out", shard_rows=5)
        for shard in list(Path(folder).rglob("c/1/0")):
            shard.write_bytes(b"damaged")
        store = mj.store.repair(folder, subject(), [CLEAN, CORRUPT])
        found = [store.rows(slice(None), "mlp_out", layer=i) for i in range(LAYERS)]
    return np.stack(found), np.concatenate([rows_of(CLEAN), rows_of(CORRUPT)], 1)


def of_contexts():
    made = latents()
    found = mj.dicteval.contexts(
        subject(), [CLEAN, CORRUPT], made, layer=1, site="mlp_out", n=1, before=1, after=1
    )
    f = made.encode(jnp.concatenate([rows_of(CLEAN)[1], rows_of(CORRUPT)[1]]))
    best = f.argmax(0)
    ids = jnp.concatenate([CLEAN, CORRUPT]).reshape(-1)[best]
    active = f.max(0) > 0
    return (
        (found.strongest.activation[:, 0], found.strongest.tokens[:, 0, 1], found.density),
        (f.max(0), jnp.where(active, ids, -1), (f > 0).mean(0)),
    )


def latents():
    """A dictionary of what MLPs give."""
    return mj.dictionaries.ReLU.init(d_model=D, n_features=5, key=jax.random.key(1))


def of_splice():
    found = mj.dictionaries.splice(subject(), {1: latents()}, site="mlp_out", error=False)(CLEAN)
    return found, forward(CLEAN, latents()(activations(CLEAN)), NOTHING.at[1].set(True))[0]


def of_loss():
    found = mj.dicteval.loss_recovered(subject(), [CLEAN], {1: latents()}, site="mlp_out", ablation="mean")
    acts, at = activations(CLEAN), NOTHING.at[1].set(True)
    mean = jnp.broadcast_to(acts.mean((1, 2), keepdims=True), acts.shape)
    own, spliced, ablated = (
        jax.nn.log_softmax(forward(CLEAN, put, where)[0][:, :-1])
        for put, where in ((EMPTY, NOTHING), (latents()(acts), at), (mean, at))
    )
    ce = [-jnp.take_along_axis(x, CLEAN[:, 1:, None], -1).mean() for x in (own, spliced, ablated)]
    kl = [(jnp.exp(own) * (own - x)).sum(-1).mean() for x in (spliced, ablated)]
    return (
        (
            found.ce,
            found.ce_spliced,
            found.ce_ablated,
            found.kl_spliced,
            found.kl_ablated,
            found.kl_recovered,
        ),
        (*ce, *kl, 1 - kl[0] / kl[1]),
    )


class Row(NamedTuple):
    """What is checked, and what the README says."""

    check: object
    said: str


ROWS = (
    "from whole runs; axes without a name, and `pos`, `patch`, `height` and `width`, become rows, where none has a name "
    "all but the last; `attention_mask` says what is padding"
)
AS_EVER = "as on a decoder; axes have the names that `sites=` gives them"
RUNS = {
    "list_sites": Row(of_list, AS_EVER),
    "capture": Row(of_capture, AS_EVER),
    "intervene": Row(of_edit, AS_EVER),
    "run": Row(of_run, AS_EVER),
    "value_and_grad_at": Row(of_gradient, AS_EVER),
    "means": Row(of_means, AS_EVER),
    "patching.activation_patch": Row(of_patch, "exact; every cell is a run of the whole subject, in chunks that fit, one program; `folder=` too"),
    "attribution.attribution_patch": Row(of_attribution, "the same, from whole runs"),
    "attribution.integrated_gradients": Row(of_integral, "the same, from whole runs"),
    "dictlearn.activations": Row(of_stream, ROWS),
    "store.write": Row(of_store, ROWS),
    "store.repair": Row(of_repair, ROWS),
    "dicteval.contexts": Row(of_contexts, ROWS + "; what is no text has the numbers of its positions for tokens"),
    "dictionaries.splice": Row(of_splice, "at whatever site; `{None: dictionary}` outside the layers"),
    "dicteval.loss_recovered": Row(of_loss, "by next tokens where the output is logits of a causal model, else by a `loss=` of your own"),
    "plan": Row(of_plan, "given the shapes of its inputs; with `devices=` it is whole on each, and examples are divided"),
    "dry_run": Row(of_dry_run, "given the shapes of its inputs; with `devices=` it is whole on each, and examples are divided"),
}  # fmt: skip

NO_SUBJECT = {
    "make_mesh": "`model` is a number of devices",
    "apply": "`fn` is what an edit does",
    **{f"interop.from_{kind}": "makes a subject" for kind in ("checkpoint_names", "equinox", "nnx")},
    "models.parameters": "names any module's arrays; runs nothing",
    "fit.fit": "trains any module; knows of no sites",
    "fit.save_checkpoint": "keeps any module; knows of no sites",
}
"""Functions with an argument of such a name that run no subject."""
