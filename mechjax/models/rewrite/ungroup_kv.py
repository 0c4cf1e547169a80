"""Give every query head keys and values of its own."""

import jax.numpy as jnp

from mechjax.base.meshes import on_any_mesh
from mechjax.models.decoder import Decoder
from mechjax.models.needs import needs_decoder
from mechjax.models.params import parameters
from mechjax.models.rewrite.premises import presume, rebuild

_GROUPED = ("W_K", "W_V", "b_K", "b_V", "k_norm.w", "k_norm.b")


@needs_decoder("weights")
@on_any_mesh
def ungroup_kv(model: Decoder) -> Decoder:
    """Repeat shared keys and values for each query head that reads them: `k` and `v` have as many as `q`.

    Then keys of one head can be edited without those of its group, and methods that go head by head
    (`refactor_qk_ov`) apply.

    Keeps: logits and every site, the heads of `k`, `rot_k`, `v` repeated. Exact to the bit in the weights; a
    second time, and where no keys are shared (Ainslie et al. 2023, arXiv:2305.13245), nothing changes. Costs
    `n_heads / n_kv_heads` times the weights and the cache of keys and values.

    Raises:
        UnsupportedModelError: The model has a choice that this was not written for.
    """
    presume(model, "ungroup_kv")
    config = model.config
    group = config.n_heads // config.n_kv_heads
    params = parameters(model)
    for path in params.keys() & {f"blocks.attn.{name}" for name in _GROUPED}:
        if path.startswith("blocks.attn.k_norm") and config.qk_norm == "shared":
            continue  # one scale for all heads
        params[path] = jnp.repeat(params[path], group, axis=-2)
    return rebuild(model, params, n_kv_heads=config.n_heads)
