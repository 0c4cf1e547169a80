"""Does this checkpoint compute in mechjax what it computes elsewhere, and does every tool's premise hold on it?

On the checkpoint's own weights and a few short prompts:

- against transformers, where it is installed: the logits and every site that its modules expose, layer by layer;
- the sum of what components write is the residual stream, in every layer;
- padding on the left and on the right changes no real position;
- an example alone gives what it gives among others;
- a prompt that comes in pieces, its keys and values kept in a cache, gives what it gives at once.

The decoder of an encoder-decoder reads the same prompts backwards, after its start token.

Where one weight differs between the two sides, the first site in forward order that differs says which component it is
in. Cost: a few forward passes of each side and as many compilations; one side's weights are in memory at a time.
Misleads where the prompts do not reach what differs: rows of the embedding of tokens that do not occur, windows longer
than the prompts (a note says so), experts to which no token is routed.
"""

import os
import warnings
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from mechjax.base.catalogue import SITES
from mechjax.base.errors import ArgumentError, MissingExtraError, ShapeError
from mechjax.base.optional import require
from mechjax.base.progress import bar
from mechjax.models.cache import Cache
from mechjax.models.config import Config
from mechjax.models.encoder import Encoder
from mechjax.models.encoder_config import EncoderConfig
from mechjax.models.load import load, load_config, locate
from mechjax.models.mamba_config import MambaConfig
from mechjax.models.model_config import ModelConfig
from mechjax.models.params import parameters
from mechjax.models.positions import other_angles
from mechjax.models.state_cache import StateCache
from mechjax.models.t5 import T5
from mechjax.models.t5_config import T5Config
from mechjax.models.t5_runs import t5_runs
from mechjax.models.vit import ViT
from mechjax.models.vit_config import ViTConfig
from mechjax.studies.checked import Checked, tolerances_of, verdict_of
from mechjax.studies.hf_sites import Sites, hf_sites
from mechjax.transform import capture, list_sites

_N_PROMPTS, _N_POS, _LONGEST = 3, 16, 128
_WRITES = ("resid_pre", "attn_out", "cross_attn_out", "mlp_out", "mixer_out")
_ENCODER = "encoder."  # what sites of an encoder-decoder's encoder begin with

Found = Sequence[tuple[str, np.ndarray, np.ndarray]]
"""What is compared: where, ours, and what it should be."""


@dataclass(frozen=True)
class Run:
    """A model, prompts, and what it computes on them; `second` are the decoder's, beside an encoder."""

    model: Any
    tokens: np.ndarray
    second: np.ndarray | None
    logits: np.ndarray
    sites: Sites

    def again(self, tokens: np.ndarray, second: np.ndarray | None = None, **masks: np.ndarray) -> np.ndarray:
        """What the model gives of other prompts."""
        texts = (tokens,) if second is None else (tokens, second)
        return _float(self.model(*texts, **{name: jnp.asarray(mask) for name, mask in masks.items()}))


def check(
    name_or_folder: str | os.PathLike[str],
    *,
    tokens: Int[Array, "batch pos"] | np.ndarray | Sequence[Any] | None = None,
    seed: int = 0,
    dtype: str | None = None,
    against: str | os.PathLike[str] | None = None,
) -> Checked:
    """Check a checkpoint: against transformers at every site, and against itself where order must not matter.

    Args:
        name_or_folder: A shipped model, a folder in Hugging Face layout, or a name on the Hub.
        tokens: Prompts of equal length, without padding, or normalised images; random ones by default. Of an
            encoder-decoder, the encoder's.
        seed: Which random ones.
        dtype: Of the weights on both sides; None keeps the checkpoint's. "float32" compares a bfloat16 checkpoint
            without the rounding, in twice the memory.
        against: Another checkpoint of the same shape for transformers to load, such as the original of a converted one.

    Returns:
        A record that prints as a table; `.ok` is False where something is wrong.

    Raises:
        CheckpointError, UnsupportedModelError, HubError: What `load` refuses.
        ShapeError, TokenError: Prompts that cannot be used.
        ArgumentError: A negative seed, a dtype that cannot be used, or `against` of another config.
    """
    folder = locate(name_or_folder)
    other = folder if against is None else locate(against)
    model, _ = load(folder, dtype=dtype)
    config, kept = model.config, next(iter(parameters(model).values())).dtype.name
    if against is not None and load_config(other) != config:
        raise ArgumentError(
            f"`{against}` is a model of another config than `{name_or_folder}`, so their sites do not correspond. Pass "
            "a checkpoint whose config.json says the same."
        )
    prompts = _prompts(tokens, config, seed)
    rows: list[_Row] = []
    with bar("Reading our sites", len(CHECKS) + 2) as progress:
        run = _run(model, prompts)
        progress.advance()
        for name, compare in CHECKS.items():
            progress.begin(f"Checking {name}")
            if found := compare(run):
                rows.append(_worst(name, found, kept, config.n_layers))
            progress.advance()
        sites = run.sites
        del model, run  # one side's weights at a time
        progress.begin("Running transformers")
        reference, theirs = _theirs(other, config, prompts, kept)
        progress.advance()
    if isinstance(theirs, str):
        compared = [_Row("transformers", float("nan"), theirs, "skipped")]
        first = None
    else:
        compared, first = _by_site(sites, theirs, config, kept)
    rows = compared + rows
    return Checked(
        difference=jnp.asarray([row.difference for row in rows], jnp.float32),
        checks=tuple(row.check for row in rows),
        verdicts=tuple(row.verdict for row in rows),
        where=tuple(row.where for row in rows),
        first=first,
        tolerance=tolerances_of(kept, config.n_layers)[0],
        dtype=kept,
        model=Path(name_or_folder).name or str(name_or_folder),
        reference=reference,
        notes=_notes(config, prompts.shape[1], kept, first),
    )


def sum_of_writes(run: Run) -> Found:
    """`resid_post == resid_pre + attn_out + mlp_out + mixer_out`, where these are; what leaves a layer enters the next.

    In an encoder every sum is normed: `resid_mid == ln1(resid_pre + attn_out)`, and so on; in CLIP the first is.
    """
    if isinstance(run.model, Encoder):
        return _normed_sums(run.model, run.sites)
    stacks = [prefix for prefix in (_ENCODER, "") if (f"{prefix}resid_pre", 0) in run.sites]
    return [row for prefix in stacks for row in _sums(prefix, run)]


def _sums(prefix: str, run: Run) -> Found:
    """The sums of one stack of layers, whose sites begin with `prefix`."""
    sites, where = run.sites, "encoder's " if prefix else ""
    # The sum is normed; a decoder norms tokens alone.
    normed = isinstance(run.model, ViT) and run.model.ln_embed is not None
    names = ("ln_embed.normalized",) if normed else ("embed", "pos_embed")
    start = [sites[prefix + name, None] for name in names if (prefix + name, None) in sites]
    found = [(f"entering {where}layer 0", sites[f"{prefix}resid_pre", 0], np.sum(start, 0))]
    after = f"{prefix}resid_post"
    for layer in sorted(layer for name, layer in sites if name == after and layer is not None):
        names = (prefix + name for name in _WRITES)
        read = [sites[name, layer] for name in names if (name, layer) in sites]
        found.append((f"{where}layer {layer}", sites[after, layer], np.sum(read, 0)))
        if layer:
            entering = sites[f"{prefix}resid_pre", layer]
            found.append((f"entering {where}layer {layer}", entering, sites[after, layer - 1]))
    return found


def _normed_sums(model: Encoder, sites: Sites) -> Found:
    """Every sum normed, by a norm written out here."""

    def normed(names: Sequence[str], layer: int | None, norm: Any) -> np.ndarray:
        x = np.sum([sites[name, layer] for name in names], 0, np.float64)
        x = x - x.mean(-1, keepdims=True)
        w, b = (np.asarray(p if layer is None else p[layer], np.float64) for p in (norm.w, norm.b))
        return x / np.sqrt(np.square(x).mean(-1, keepdims=True) + model.config.norm_eps) * w + b

    parts = ("embed", "pos_embed", "token_type_embed")
    found = [("entering layer 0", sites["resid_pre", 0], normed(parts, None, model.ln_embed))]
    for layer in range(model.config.n_layers):
        for mid, read, norm in (
            ("resid_mid", ("resid_pre", "attn_out"), model.blocks.ln1),
            ("resid_post", ("resid_mid", "mlp_out"), model.blocks.ln2),
        ):
            found.append((f"{mid} of layer {layer}", sites[mid, layer], normed(read, layer, norm)))
        if layer:
            found.append(
                (f"entering layer {layer}", sites["resid_pre", layer], sites["resid_post", layer - 1])
            )
    return found


def padding(run: Run) -> Found:
    """Prompts with padding, on the right and on the left, against the same prompts without. Nothing for images."""
    if isinstance(run.model, ViT):
        return []
    tokens, second, n = run.tokens, run.second, run.tokens.shape[1]
    short = n - min(3, n // 2)
    real = np.broadcast_to(np.arange(n) < short, tokens.shape)
    later = np.roll(tokens, n - short, 1)
    alone, at_right = run.again(tokens[:, :short], second), run.again(tokens, second, mask=real)
    at_left = run.again(later, second, mask=real[:, ::-1])
    if second is None:
        return [("right", at_right[:, :short], alone), ("left", at_left[:, n - short :], alone)]
    given, own = run.again(tokens, second[:, :short]), np.roll(second, n - short, 1)
    return [
        ("right", at_right, alone),
        ("left", at_left, alone),
        ("decoder's right", run.again(tokens, second, decoder_mask=real)[:, :short], given),
        ("decoder's left", run.again(tokens, own, decoder_mask=real[:, ::-1])[:, n - short :], given),
    ]


def batch(run: Run) -> Found:
    """Each example alone against all at once."""
    found = []
    for i, tokens in enumerate(run.tokens):
        alone = run.again(tokens, None if run.second is None else run.second[i])
        found.append((f"example {i}", alone[None], run.logits[i : i + 1]))
    return found


def cached(run: Run) -> Found:
    """Prompts in two pieces, and token by token, through a cache, against the same prompts at once.

    Of an encoder-decoder, the decoder's, as in its generation: half of them, then token by token. Nothing for encoders
    and models of images, which have no cache, and for prompts past a length where angles change, which cached keys
    cannot follow.
    """
    model = run.model
    if isinstance(model, T5) and run.second is not None:
        return [_continued(model, run.tokens, run.second, run.logits)]
    if isinstance(model, (Encoder, T5, ViT)):
        return []
    config = model.config
    n_rows, n = run.tokens.shape
    if isinstance(config, Config) and any(length < n for length in other_angles(config)):
        return []

    def in_pieces(*cuts: int) -> np.ndarray:
        cache, logits = _no_cache(config, n_rows, n, model.W_E.dtype), []
        for piece in np.split(run.tokens, cuts, axis=1):
            part, cache = model(piece, cache=cache)
            logits.append(_float(part))
        return np.concatenate(logits, 1)

    return [
        ("two pieces", in_pieces(n // 2), run.logits),
        ("token by token", in_pieces(*range(1, n)), run.logits),
    ]


def _continued(
    model: T5, tokens: np.ndarray, second: np.ndarray, logits: np.ndarray
) -> tuple[str, np.ndarray, np.ndarray]:
    """The decoder from the last token of the first half on, against its `logits` of all at once."""
    n = second.shape[1]
    runs, text, mask = t5_runs(model, tokens, None, second[:, : n // 2])
    cache = runs.empty(text.shape[:-1], n)
    last, *given = eqx.filter_jit(runs.prefill)(text, mask, cache, *runs.beside)
    cache, found, step = runs.filled(cache, n // 2, mask, given), [_float(last)], eqx.filter_jit(runs.step)
    for token in second[:, n // 2 :].T:
        last, *given = step(jnp.asarray(token), cache)
        cache = runs.filled(cache, 1, None, given)
        found.append(_float(last))
    return "token by token", np.stack(found, 1), logits[:, n // 2 - 1 :]


def _no_cache(config: ModelConfig, n_rows: int, n_pos: int, dtype: Any) -> Any:
    if isinstance(config, MambaConfig):
        return StateCache.empty(config, n_rows, dtype)
    return Cache.empty(cast(Config, config), n_rows, n_pos, dtype)


CHECKS: dict[str, Callable[[Run], Found]] = {
    "sum of writes": sum_of_writes,
    "padding left and right": padding,
    "batch of one": batch,
    "cache against full forward": cached,
}
"""What a model is compared with itself on, or nothing where it does not apply. To add a row, add an entry."""


@dataclass(frozen=True)
class _Row:
    check: str
    difference: float
    where: str
    verdict: Any


def _images(tokens: Any, config: ViTConfig, seed: int) -> np.ndarray:
    shape = config.inputs(_N_PROMPTS, 0)[0].shape
    drawn = np.random.default_rng(seed).standard_normal(shape) if tokens is None else np.asarray(tokens)
    if drawn.ndim != 4 or drawn.shape[1:] != shape[1:] or not np.issubdtype(drawn.dtype, np.floating):
        right = ", ".join(map(str, shape[1:]))
        raise ShapeError(
            f"`tokens` of a model of images must be normalised pixels of shape (batch, {right}); got {drawn.dtype} of "
            f"shape {drawn.shape}. Pass none for random ones."
        )
    return drawn.astype(np.float32)


def _prompts(tokens: Any, config: Any, seed: int) -> np.ndarray:
    if tokens is None and seed < 0:
        raise ArgumentError(f"seed={seed} is negative: pass a whole number from 0.")
    if isinstance(config, ViTConfig):
        return _images(tokens, config, seed)
    if tokens is None:
        n_pos = max(_N_POS, min(_windows(config), default=0) + 4)
        n_pos = min(n_pos, _LONGEST, getattr(config, "n_ctx", _LONGEST))
        while n_pos in (
            getattr(config, "n_heads", None),
            getattr(config, "n_kv_heads", None),
        ):  # else heads before positions look like heads after
            n_pos -= 1
        return np.random.default_rng(seed).integers(0, config.d_vocab, (_N_PROMPTS, n_pos), np.int32)
    try:
        ids = np.asarray(tokens)
    except ValueError:
        ids = np.zeros(0)
    if ids.ndim != 2 or not len(ids) or ids.shape[-1] < 2 or not np.issubdtype(ids.dtype, np.integer):
        raise ShapeError(
            f"`tokens` must be integer ids of shape (batch, pos), at least two positions and no padding; got "
            f"{ids.dtype} of shape {ids.shape}. Pass prompts of equal length, or none for random ids."
        )
    return ids.astype(np.int32)


def _windows(config: ModelConfig) -> list[int]:
    """How many positions queries see, in layers where they do not see all."""
    windows = config.windows if isinstance(config, Config) else None
    return [window for window in windows or () if window is not None]


def _second(config: ModelConfig, tokens: np.ndarray) -> np.ndarray | None:
    """What a decoder reads that stands beside an encoder: the start token, then the prompts backwards."""
    if not isinstance(config, T5Config) or not config.n_decoder_layers:
        return None
    return np.concatenate((np.full_like(tokens[:, :1], config.start_token), tokens[:, :0:-1]), 1)


def _run(model: Any, tokens: np.ndarray) -> Run:
    second = _second(model.config, tokens)
    texts = (tokens,) if second is None else (tokens, second)
    asked = [name for name in list_sites(model, *texts) if not SITES[name].costly or name.endswith("pattern")]
    logits, acts = capture(model, asked)(*texts)
    sites: Sites = {}
    for name in asked:
        value = _float(acts[name])
        layers = acts.layers[name]
        sites |= (
            {(name, None): value} if layers is None else {(name, l): value[i] for i, l in enumerate(layers)}
        )
    return Run(model, tokens, second, _float(logits), sites)


def _float(x: Array) -> np.ndarray:
    return np.asarray(x, np.float64 if x.dtype == jnp.float64 else np.float32)


def _theirs(
    folder: Path, config: ModelConfig, tokens: np.ndarray, dtype: str
) -> tuple[str | None, Sites | str]:
    """(whose, what transformers computes), or (None, why it does not)."""
    try:
        transformers = require("transformers", extra="torch")
        require("torch", extra="torch")
    except MissingExtraError as missing:
        return None, str(missing)
    with _quiet(transformers):
        try:
            hf = _in_transformers(transformers, folder, dtype)
            return f"transformers {transformers.__version__}", hf_sites(
                hf, config, tokens, **_inputs(config, tokens)
            )
        except Exception as error:  # whatever a library of others may raise on a user's files
            return None, f"transformers cannot run it: {type(error).__name__}: {error}"


def _inputs(config: ModelConfig, tokens: np.ndarray) -> dict[str, np.ndarray]:
    """Every token is one, whatever its id: models that find padding by its id must not."""
    if isinstance(config, ViTConfig):
        return {}
    inputs = {"attention_mask": np.ones(tokens.shape, np.int64)}
    if (second := _second(config, tokens)) is not None:
        inputs |= {"decoder_input_ids": second, "decoder_attention_mask": inputs["attention_mask"]}
    if isinstance(config, EncoderConfig):
        inputs["position_ids"] = np.broadcast_to(
            np.arange(tokens.shape[1]) + config.position_offset, tokens.shape
        ).copy()
    return inputs


def _in_transformers(transformers: Any, folder: Path, dtype: str) -> Any:
    """The checkpoint as transformers loads it, in our dtype, its attention spelled out so that patterns exist."""
    torch = require("torch", extra="torch")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    names = config.architectures or []
    kind = getattr(transformers, names[0], None) if names else None
    auto = "AutoModelForSeq2SeqLM" if config.is_encoder_decoder else "AutoModelForCausalLM"
    spelled = "torch_dtype" if int(transformers.__version__.partition(".")[0]) < 5 else "dtype"
    return (
        (kind or getattr(transformers, auto))
        .from_pretrained(
            folder,
            attn_implementation="eager",
            local_files_only=True,
            use_safetensors=True,
            **{spelled: getattr(torch, dtype)},
        )
        .eval()
    )


@contextmanager
def _quiet(transformers: Any) -> Generator[None, None, None]:
    """No bars, log lines or warnings of another library between ours; its settings come back."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _by_site(ours: Sites, theirs: Sites, config: ModelConfig, dtype: str) -> tuple[list[_Row], str | None]:
    """One row per site, logits first, and the first place in forward order that differs."""
    order = {name: i for i, name in enumerate(SITES)}

    def place(key: tuple[str, int | None]) -> tuple[bool, float, int]:
        name, layer = key
        prefix = _ENCODER if name.startswith(_ENCODER) else ""
        outside = -1.0 if order[name] < order[f"{prefix}resid_pre"] else float("inf")
        return not prefix, (outside if layer is None else float(layer)), order[name]

    shared = sorted(ours.keys() & theirs.keys(), key=place)
    difference = {key: _difference(ours[key], theirs[key]) for key in shared}
    far = next(
        (key for key in shared if not difference[key] <= tolerances_of(dtype, config.n_layers)[0]), None
    )
    rows = []
    first = ("logits", "class_logits")
    for name in (*first, *(name for name in SITES if name not in first)):
        mine = [key for key in shared if key[0] == name]
        if mine:
            worst = max(mine, key=lambda key: difference[key])
            rows.append(
                _Row(
                    name,
                    difference[worst],
                    _spelled(worst[1]),
                    verdict_of(difference[worst], dtype, config.n_layers),
                )
            )
    return rows, None if far is None else f"{far[0]} {_spelled(far[1])}".rstrip()


def _spelled(layer: int | None) -> str:
    return "" if layer is None else f"in layer {layer}"


def _worst(name: str, found: Found, dtype: str, n_layers: int) -> _Row:
    differences = [(_difference(ours, right), where) for where, ours, right in found]
    difference, where = max(differences, key=lambda pair: pair[0])
    return _Row(name, difference, where, verdict_of(difference, dtype, n_layers))


def _difference(ours: np.ndarray, right: np.ndarray) -> float:
    """`max|ours - right| / max|right|`; infinite where a side is not finite or the shapes disagree."""
    if ours.shape != right.shape or not (np.isfinite(ours).all() and np.isfinite(right).all()):
        return float("inf")
    return float(np.abs(ours - right).max() / (np.abs(right).max() or 1.0))


def _notes(config: ModelConfig, n_pos: int, dtype: str, first: str | None) -> tuple[str, ...]:
    notes = []
    if unreached := {window for window in _windows(config) if window >= n_pos}:
        listed = ", ".join(map(str, sorted(unreached)))
        notes.append(f"Windows of {listed} positions are longer than the prompts of {n_pos}: not exercised.")
    if first and dtype in ("float16", "bfloat16"):
        notes.append(f'In {dtype} rounding adds up over layers: dtype="float32" tells it from a defect.')
    return tuple(notes)
