"""What Hugging Face modules read and give: which of our sites, and so how Hugging Face spells them.

It follows from the weight rules: the module that holds `W_O` reads `z` and gives `attn_out`, if nothing is done to that
before it is added. A fused matrix gives several sites, and has no spelling for each. Modules without parameters of
their own are listed by their families.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache

from mechjax.base.errors import ArgumentError, did_you_mean
from mechjax.models.config import Config
from mechjax.models.families.family import Family
from mechjax.models.families.known import EVERY
from mechjax.models.families.rule import Rule
from mechjax.models.model_config import ModelConfig
from mechjax.models.shapes import norm_places

_ReadAndGiven = tuple[str | None, tuple[str, ...]]

_ONE_STACK: Mapping[str, _ReadAndGiven] = {
    "W_E": (None, ("embed",)),
    "ln_embed.w": (None, ("ln_embed.normalized", "embed")),
    "W_pos": (None, ("pos_embed",)),
    "W_type": (None, ("token_type_embed",)),
    "blocks.ln1.w": ("attn_in", ("ln1.normalized",)),
    "blocks.attn.W_Q": (None, ("q",)),
    "blocks.attn.W_K": (None, ("k",)),
    "blocks.attn.W_V": (None, ("v",)),
    "blocks.attn.w_q": (None, ("q_latent",)),
    "blocks.attn.w_kv": (None, ("kv_latent",)),
    "blocks.attn.q_norm.w": (None, ("q_norm.normalized",)),
    "blocks.attn.k_norm.w": (None, ("k_norm.normalized",)),
    "blocks.attn.W_O": ("z", ("attn_out",)),
    "blocks.ln1_post.w": (None, ("ln1_post.normalized", "attn_out")),
    "blocks.ln2.w": ("mlp_in", ("ln2.normalized",)),
    "blocks.mlp.W_in": (None, ("mlp_pre",)),
    "blocks.mlp.W_gate": (None, ("mlp_pre",)),
    "blocks.mlp.W_out": ("mlp_post", ("mlp_out",)),
    "blocks.moe.W_router": (None, ("router_scores",)),
    "blocks.moe.shared.W_gate": (None, ("shared_pre",)),
    "blocks.moe.shared.W_in": (None, ("shared_pre_linear",)),
    "blocks.moe.shared.W_out": ("shared_post", ("shared_out",)),
    "blocks.ln2_post.w": (None, ("ln2_post.normalized", "mlp_out")),
    "ln_final.w": (None, ("ln_final.normalized",)),
    "W_nsp": (None, ("nsp_logits",)),
}


def _of_stack(path: str, prefix: str) -> Mapping[str, _ReadAndGiven]:
    """The same of one of several stacks, whose sites begin with `prefix`."""
    named = lambda site: None if site is None else prefix + site
    return {
        f"{path}.{own}": (named(reads), tuple(prefix + site for site in gives))
        for own, (reads, gives) in _ONE_STACK.items()
    }


READ_AND_GIVEN = {**_ONE_STACK, **_of_stack("encoder", "encoder."), **_of_stack("decoder", "")}
"""Parameter -> the site that its module reads, and those that it gives; a spelling means the first of these."""


@dataclass(frozen=True)
class Module:
    """One module of every layer, or of the model: its path (`{}` for the layer), the site it reads, those it gives."""

    path: str
    reads: str | None
    gives: tuple[str, ...]


def modules(family: Family, config: ModelConfig) -> tuple[Module, ...]:
    """The modules of a Hugging Face model that hold exactly our sites' numbers, heads merged."""
    block = next((rule.name.partition(".{}.")[0] for rule in family.weights if rule.layered), None)
    found = {} if block is None else {f"{block}.{{}}": Module(f"{block}.{{}}", "resid_pre", ("resid_post",))}
    for rule in family.weights:
        if _there(rule, config) and (module := _of(rule, family, config)) is not None:
            found[module.path] = module
    for path, (reads, gives) in family.modules.items():
        found[path] = Module(path, reads, () if gives is None else _kept((gives,), path, config))
    for old, new in family.moved.items():
        if old in found:
            found.setdefault(new, replace(found[old], path=new))
    return tuple(module for module in found.values() if module.reads or module.gives)


def fused(family: Family, config: ModelConfig) -> dict[str, Rule]:
    """The modules whose output is several sites, or one once it is clipped: path -> the rule that takes it apart."""
    return {
        rule.name.removesuffix(".weight"): rule
        for rule in family.rules_for(config)
        if rule.name.endswith(".weight")
        and _known(rule, family)
        and (len(rule.paths) > 1 or _clipped(rule, config))
    }


@cache
def spellings(config: ModelConfig) -> Mapping[str, tuple[str, ...]]:
    """Site -> how Hugging Face spells it in models of the family that this config was read from, if any.

    Only what means the same when it is edited: where attention and MLP share a norm, or queries, keys and values read
    the stream itself, no module reads what `attn_in` is.

    Raises:
        ArgumentError: `source` names no family.
    """
    if config.source is None:
        return {}
    families = {family.name: family for family in EVERY}
    if config.source not in families:
        raise ArgumentError(
            f"`source` = {config.source!r} is no family; known are {', '.join(families)}, or None."
            f"{did_you_mean(config.source, families)}"
        )
    found: dict[str, tuple[str, ...]] = {}
    for site, path in _spelled(families[config.source], config):
        found[site] = (*found.get(site, ()), path)
    return found


def own_name(name: str, config: ModelConfig) -> str:
    """mechjax's name of the site that a module's path means in models of this config; other names as they are."""
    return next((site for site, paths in spellings(config).items() if name in paths), name)


def _spelled(family: Family, config: ModelConfig) -> Iterator[tuple[str, str]]:
    # Editing the stream itself is editing more than what attention reads.
    stream = getattr(config, "residual", "serial") == "parallel_shared" or family.reads.get("blocks.ln1.w")
    for module in modules(family, config):
        if module.reads is not None and not (module.reads == "attn_in" and stream):
            yield module.reads, f"{module.path}.input"
        if module.gives:
            yield module.gives[0], f"{module.path}.output"


def _there(rule: Rule, config: ModelConfig) -> bool:
    """Whether a model has the module that would hold a tensor; a norm without scales is a module all the same."""
    norms: set[str] = set()
    if isinstance(config, Config) and not config.norm_weight:
        norms = {f"{place}.w" for place in norm_places(config)}
    return set(rule.paths) <= config.shapes.keys() | norms and rule.when(config)


def _clipped(rule: Rule, config: ModelConfig) -> bool:
    clip = getattr(config, "qkv_clip", None)
    return clip is not None and READ_AND_GIVEN[rule.paths[0]][1][0] in ("q", "k", "v")


def _known(rule: Rule, family: Family) -> bool:
    return all(path in READ_AND_GIVEN or path in family.reads for path in rule.paths) and (
        "head}" not in rule.name
    )


def _of(rule: Rule, family: Family, config: ModelConfig) -> Module | None:
    """The module that holds a tensor, where every site it reads or gives is one of ours."""
    path = rule.name.removesuffix(".weight")
    if path == rule.name or not _known(rule, family):
        return None
    reads, gives = read_and_given(rule.paths[0], family, config)
    return Module(path, reads, _kept(gives, rule.paths[0], config) if len(rule.paths) == 1 else ())


def read_and_given(path: str, family: Family, config: ModelConfig) -> tuple[str | None, tuple[str, ...]]:
    """The site that a parameter's module reads and those that it gives, were nothing done to them afterwards."""
    if path in family.reads:
        return family.reads[path]
    reads, gives = READ_AND_GIVEN[path]
    if path.endswith("blocks.mlp.W_in") and getattr(config, "mlp", "plain") == "gated":
        return reads, tuple(f"{site}_linear" for site in gives)
    return reads, gives


def _kept(sites: tuple[str, ...], path: str, config: ModelConfig) -> tuple[str, ...]:
    """Those to which nothing is done after the module gives them."""
    if not isinstance(config, Config):
        return sites
    normed = path.endswith(".w")
    written = config.residual_scale == 1.0 and (normed or config.norms in ("pre", "none"))
    exact = {
        "embed": config.embed_scale == 1.0 and (normed or not config.embed_norm),
        "attn_out": written,
        "mlp_out": written and not (config.mixed and path == "blocks.mlp.W_out"),  # not in every layer
        "logits": config.logit_scale == 1.0 and config.final_softcap is None,
        "pooled": getattr(config, "pooler", False) not in (False, "none"),
    } | dict.fromkeys(("q", "k", "v"), config.qkv_clip is None)
    return tuple(site for site in sites if exact.get(site, True))
