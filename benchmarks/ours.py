"""mechjax's worker: the jobs that the peers run, through public calls, and two that only a compiler has."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import jaxlib
import numpy as np

import mechjax as mj
from benchmarks.bridged import bridged_jobs
from benchmarks.dictionary_data import STEPS, TOKENS, batches, start
from benchmarks.floor import edge_operations, operations, rate
from benchmarks.for_chips import tpu_job
from benchmarks.worker import Job, peak_mb, peak_of, steering
from mechjax.base.catalogue import SITES
from mechjax.dictionaries.largest import largest_of_all
from mechjax.dictlearn.loop import advance
from mechjax.dictlearn.plan import planned
from mechjax.dictlearn.step import begun

OVER = {"resid_pre": ("layer", "pos"), "z": ("layer", "head")}
MILLIONTHS = 1e6  # scores of a random model are small
COMPILED = "/jax/core/compile/backend_compile_duration"


def sites_of(model: Any, tokens: Any) -> list[str]:
    """What the peers' cache of everything holds: every site that costs nothing to form, and attention's inside."""
    return [
        name for name in mj.list_sites(model, tokens) if not SITES[name].costly or "query" in SITES[name].axes
    ]


def program(model: Any, job: str, site: str) -> Callable[..., Any]:
    """The computation of a job as a function of tokens."""
    if job == "forward":
        return model
    if job == "capture":
        return mj.capture(model, sites_of(model, jax.ShapeDtypeStruct((1, 1), jnp.int32)))
    metric, over = mj.metrics.logit_diff(5, 7), OVER[site]
    patch = mj.patching.activation_patch
    return lambda clean, corrupt: patch(model, clean, corrupt, metric, site=site, over=over).scores


def load(settings: dict[str, Any]) -> tuple[dict[str, Job], dict[str, str]]:
    if settings["device"] == "gpu" and jax.default_backend() != "gpu":
        raise RuntimeError(f"--device gpu, but jax {jax.__version__} runs on {jax.default_backend()}")
    model, _ = mj.load(settings["checkpoint"])
    jax.block_until_ready(model)

    def forward(tokens: np.ndarray):
        ids = jnp.asarray(tokens)
        return lambda: jax.block_until_ready(model(ids)), lambda logits: {"logits": np.asarray(logits)}

    def capture(tokens: np.ndarray, compared: list[str]):
        ids, work = jnp.asarray(tokens), program(model, "capture", "")

        def collect(result: Any) -> dict[str, np.ndarray]:
            logits, acts = result
            return {"logits": np.asarray(logits)} | {site: np.asarray(acts[site]) for site in compared}

        return lambda: jax.block_until_ready(work(ids)), collect

    def sweep(clean: np.ndarray, corrupt: np.ndarray, site: str):
        pair = jnp.asarray(clean), jnp.asarray(corrupt)
        patch, axes = program(model, "sweep", site), {"head": model.config.n_heads}

        def work() -> tuple[Any, float]:
            start = time.perf_counter()
            scores = jax.block_until_ready(patch(*pair))
            return scores, time.perf_counter() - start

        def collect(result: tuple[Any, float]) -> dict[str, Any]:
            scores, took = result
            least = operations(model.config, clean.shape, OVER[site], axes) / rate(model.config)
            return {
                "scores": np.asarray(scores),
                "floor_s": round(least, 3),
                "times_floor": round(took / least, 3),
            }

        return work, collect

    def generate(tokens: np.ndarray, n_tokens: int, edited: bool):
        ids, vector = jnp.asarray(tokens), steering(model.config.d_model)
        edits = [mj.add("resid_pre", vector, layer=model.config.n_layers // 2)] if edited else []
        work = lambda: jax.block_until_ready(mj.generate(model, ids, n_tokens, edits=edits))
        return work, lambda out: {"tokens": np.asarray(out.tokens)}

    total = jax.jit(lambda leaves: sum(leaf.sum() for leaf in leaves))

    def reload():
        def work() -> tuple[Any, Any]:
            embedding, *others = jax.tree.leaves(mj.load(settings["checkpoint"])[0])
            return jax.block_until_ready((total([embedding]), total(others)))

        def collect(sums: tuple[Any, Any]) -> dict[str, Any]:
            weights = sum(leaf.nbytes for leaf in jax.tree.leaves(model))
            return {"sums": np.asarray(sums), "peak_over_weights": round(peak_of(work) / weights, 3)}

        return work, collect

    jobs: dict[str, Job] = {"forward": forward, "capture": capture, "sweep": sweep, "generate": generate}
    jobs |= {"load": reload, "train": train_job, **edge_jobs(model), **bridged_jobs(settings["checkpoint"])}
    jobs |= {
        "compile": lambda **job: compile_job(model, **job),
        "compile_tpu": tpu_job,
        "recompile": lambda **job: recompile_job(model, **job),
        "train_many": lambda **job: train_many_job(model, **job),
    }
    return jobs, {
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
        "jax device": jax.devices()[0].device_kind,
    }


def edge_jobs(model: Any) -> dict[str, Job]:
    """Scores of all edges from gradients, of given prompts and at a given size."""

    def edges(clean: np.ndarray, corrupt: np.ndarray, method: str, steps: int | None = None):
        work, graph = edge_scores(model, jnp.asarray(clean), jnp.asarray(corrupt), method, steps)

        def collect(found: Any) -> dict[str, np.ndarray]:
            square = np.zeros((len(graph.nodes), len(graph.readers)), np.float32)
            square[tuple(graph.table.T[:2])] = MILLIONTHS * np.asarray(found.scores)
            return {"scores": square}

        return work, collect

    def edges_at_length(n_prompts: int, n_pos: int):
        pair = np.random.default_rng(0).integers(model.config.d_vocab, size=(2, n_prompts, n_pos))
        work, _ = edge_scores(model, *jnp.asarray(pair, jnp.int32), "EAP", None)
        return work, lambda _: {"peak_gb": round((peak_mb() or float("nan")) / 1e3, 2)}

    def exact_edges(n_pos: int, share: float):
        """Edges evenly spread over all readers, and how long all would take."""
        pair = np.random.default_rng(0).integers(model.config.d_vocab, size=(2, 1, n_pos))
        graph, metric = mj.graph.build(model), mj.metrics.logit_diff(5, 7)
        n = len(graph.table)
        some = np.linspace(0, n - 1, round(share * n)).round().astype(int)

        def timed(which: np.ndarray) -> float:
            start = time.perf_counter()
            found = mj.attribution.exact(
                model, *jnp.asarray(pair, jnp.int32), metric, graph=graph, edges=which
            )
            jax.block_until_ready(found.scores)
            return time.perf_counter() - start

        def collect(took: tuple[float, float]) -> dict[str, Any]:
            least = edge_operations(model.config, n_pos) / rate(model.config)
            every = (took[1] - took[0]) * n / (len(some) - len(some[::2]))  # what every call does, taken out
            return {
                "measured_edges": len(some),
                "all_edges_estimate_s": round(every, 1),
                "floor_s": round(least, 1),
                "times_floor": round(every / least, 2),
            }

        return lambda: (timed(some[::2]), timed(some)), collect

    return {"edges": edges, "edges_at_length": edges_at_length, "exact_edges": exact_edges}


def edge_scores(model: Any, clean: Any, corrupt: Any, method: str, steps: int | None) -> tuple[Any, Any]:
    """The work of scoring all edges as the EAP-IG repository names it, and the graph."""
    graph, metric = mj.graph.build(model), mj.metrics.logit_diff(5, 7)
    how = {"steps": steps, "quadrature": "left"} if steps else {}
    score = mj.attribution.eap_ig if steps else mj.attribution.eap
    return lambda: jax.block_until_ready(score(model, clean, corrupt, metric, graph=graph, **how)), graph


def train_job(kind: str, d_model: int, n_features: int, active: int, threshold: float, bandwidth: float):
    """Steps of training, in one call."""
    of, own = {
        "top_k": (mj.dictionaries.TopK, {"k": active}),
        "batch_top_k": (mj.dictionaries.BatchTopK, {"k": active}),
        "jump_relu": (mj.dictionaries.JumpReLU, {"threshold": threshold, "bandwidth": bandwidth}),
    }[kind]
    rows = jnp.asarray(start(d_model, n_features))
    dictionary = of.init(d_model=d_model, n_features=n_features, key=jax.random.key(0), **own)
    dictionary = eqx.tree_at(lambda d: [d.W_enc, d.W_dec], dictionary, [rows.T, rows])
    stream = jnp.asarray(batches(d_model, n_features, active))
    plan = planned(10_000, 4, 3e-4, 0, 1 / 3, 0.0, None, 10_000_000, None, unit_gradients=True)
    state = begun(dictionary, plan.optimizer)
    ones, first = jnp.ones((2,)), stream[0] + 0
    latents = dictionary.encode(first)
    if kind == "batch_top_k":  # its threshold is not known yet: what training keeps
        z = dictionary.preactivations(first)
        latents = jnp.where(largest_of_all(z, active * len(z)), z, 0)
    made = np.asarray(dictionary.decode(latents))
    work = lambda: jax.block_until_ready(advance((plan, ones, jnp.int32(0), (stream, None)), state))
    return work, lambda _: {"made": made}


def train_many_job(model: Any, n: int, layer: int, n_features: int, active: int, *, apart: bool):
    """Dictionaries with seeds of their own, fed by one forward of the model or, `apart`, each by its own."""
    rng, key, config = np.random.default_rng(0), jax.random.key(0), model.config
    prompts = list(rng.integers(config.d_vocab, size=(STEPS, 8, TOKENS // 8)))
    some = [
        mj.dictionaries.TopK.init(
            d_model=config.d_model, n_features=n_features, k=active, key=jax.random.key(i)
        )
        for i in range(n)
    ]
    how = {"steps": STEPS, "learning_rate": 3e-4, "steps_per_call": STEPS}

    def stream() -> Any:
        return mj.dictlearn.activations(
            model, prompts, "resid_post", layer=layer, batch=TOKENS, buffer=2 * TOKENS, key=key
        )

    def work() -> Any:
        if apart:
            found = [mj.dictlearn.train(one, stream(), key=key, **how) for one in some]
        else:
            found = mj.dictlearn.train_many(some, stream(), **how)
        return jax.block_until_ready([one.history["loss"] for one in found])

    return work, lambda losses: {"losses": np.stack(losses)}


def compile_job(model: Any, *, n_layers: int, job: str, batch: list[int], site: str = ""):
    """Trace, lower and compile a job for a model of `n_layers` layers, from shapes alone: no weights are made."""
    config = dataclasses.replace(model.config, n_layers=n_layers)
    shapes, treedef = jax.tree.flatten(
        jax.eval_shape(lambda key: mj.init(config, key=key), jax.random.key(0))
    )
    tokens = [jax.ShapeDtypeStruct(tuple(batch), jnp.int32)] * (2 if job == "sweep" else 1)

    def traced(leaves: list[Any], *tokens: Any) -> Any:
        return jax.tree.leaves(program(jax.tree.unflatten(treedef, leaves), job, site)(*tokens))

    def work() -> Any:
        jax.clear_caches()
        lowered = jax.jit(traced).lower(shapes, *tokens)
        return lowered, lowered.compile()

    def collect(result: Any) -> dict[str, float]:
        lowered, compiled = result
        temporary = compiled.memory_analysis().temp_size_in_bytes
        return {"program_lines": lowered.as_text().count("\n"), "temp_mb": round(temporary / 2**20, 1)}

    return work, collect


def recompile_job(model: Any, tokens: np.ndarray, *, n_edits: int):
    """How often `n_edits` edits (vector, layer, head, position differ) trace one jitted function or compile eagerly."""
    config, n_pos = model.config, 4
    ids, rng = jnp.asarray(tokens[:1, :4]), np.random.default_rng(0)  # small: programs are counted, not timed
    traces, compilations = [], []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **kwargs: compilations.append(event) if event == COMPILED else None
    )

    def draw() -> Any:
        value = jnp.asarray(rng.standard_normal(config.d_head, dtype=np.float32))
        layer, head, pos = (int(rng.integers(n)) for n in (config.n_layers, config.n_heads, n_pos))
        return mj.replace("z", value, layer=layer, head=head, pos=pos)

    @jax.jit
    def jitted(model: Any, edit: Any, ids: Any) -> Any:
        traces.append(1)
        return mj.intervene(model, [edit])(ids)

    def work() -> dict[str, int]:
        jax.block_until_ready(jitted(model, draw(), ids))
        jax.block_until_ready(mj.run(model, ids, edits=[draw()]))
        first = len(compilations)
        if not first:
            raise RuntimeError(
                f"jax {jax.__version__} reports no compilation as {COMPILED}: nothing was counted"
            )
        for _ in range(n_edits - 1):
            jax.block_until_ready((jitted(model, draw(), ids), mj.run(model, ids, edits=[draw()])))
        return {
            "traces": len(traces),
            "first_compilations": first,
            "later_compilations": len(compilations) - first,
        }

    return work, lambda counts: counts
