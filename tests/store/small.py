"""A small store: two sites, two layers, shards of fifty rows that no batch of prompts ends with."""

import hashlib

import jax
import jax.numpy as jnp
import numpy as np

import mechjax as mj
from mechjax.store.rows import NUMPY

SITES, LAYERS = ["resid_post", "z"], [0, 2]
COLUMNS = [(site, layer) for site in SITES for layer in LAYERS]
BATCHES, ROWS = 11, 241  # nine batches of 24, one without 8 padded ones, and one of 9 tokens after the first
SHARD = 50


def prompts(seed=3):
    """Eleven batches: one is padded, and the last is smaller. Every text begins otherwise, so that no row comes twice."""
    keys = jax.random.split(jax.random.key(seed), BATCHES)
    some = [jax.random.randint(key, (4, 6), 0, 50) for key in keys]
    some = [ids.at[:, 0].set(4 * i + jnp.arange(4)) for i, ids in enumerate(some)]
    some[4] = some[4].at[2, 5].set(49)  # the one token of its text
    ones = jnp.ones((4, 6), bool)
    masks = [ones] * BATCHES
    masks[4] = ones.at[0, 3:].set(False).at[2, :5].set(False)
    some = [mj.Prompts(ids, mask) for ids, mask in zip(some, masks, strict=True)]
    some[-1] = mj.Prompts(some[-1].tokens[:2], ones[:2].at[1, 3:].set(False))
    return some


def write(folder, model, some=None, **changed):
    """The store, or one that differs in something."""
    how = {"sites": SITES, "layers": LAYERS, "shard_rows": SHARD} | changed
    return mj.store.write(folder, model, prompts() if some is None else some, **how)


def expected(model, some=None, dtype="float32", skip_first=False):
    """Every row by a loop: one text after another, as `capture` has it."""
    found = {column: [] for column in COLUMNS}
    for batch in prompts() if some is None else some:
        found_here = mj.capture(model, SITES)(batch)[1]
        acts = {site: np.asarray(found_here[site]) for site in SITES}
        for example, mask in enumerate(np.asarray(batch.mask)):
            for pos in np.flatnonzero(mask)[int(skip_first) :]:
                for site, layer in COLUMNS:
                    found[site, layer].append(acts[site][layer, example, pos].reshape(-1))
    return {column: np.stack(rows).astype(NUMPY[dtype]) for column, rows in found.items()}


def digests(store):
    """For each column the checksum of all its rows, read again."""
    stored = store.manifest.specification.dtype
    rows = (store.rows(slice(None), site, layer=layer, dtype=stored) for site, layer in COLUMNS)
    return [hashlib.sha256(x.tobytes()).hexdigest() for x in rows]


def files(folder):
    """Every file by its place, but for the lock."""
    found = (path for path in folder.rglob("*") if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def stamps(folder):
    """When each file of rows was written, and which file it is."""
    found = (path for path in folder.rglob("c/*/0") if path.is_file())
    return {str(p.relative_to(folder)): (p.stat().st_mtime_ns, p.stat().st_ino) for p in found}
