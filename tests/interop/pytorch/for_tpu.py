"""A bridged decoder compiled for TPUs that are not here: `python -m tests.interop.pytorch.for_tpu TOPOLOGY SIZES NAME...`."""

import json
import sys

import mechjax as mj
from tests.parallel.for_tpu import compiled_here, described

HIDDEN = "transformer.h.mlp.c_fc.output"
PROGRAMS = {
    "forward": lambda f, ids, mask: f(ids, attention_mask=mask),
    "capture": lambda f, ids, mask: mj.capture(f, [HIDDEN])(ids, attention_mask=mask),
    "intervene": lambda f, ids, mask: mj.intervene(f, mj.zero(HIDDEN, layer=1))(ids, attention_mask=mask),
    "gradient": lambda f, ids, mask: mj.value_and_grad_at(f, lambda y: y[:, -1, 3], HIDDEN)(ids, attention_mask=mask),
}  # fmt: skip
BATCH, POS = 8, 16


def bridged():
    """GPT-2, narrow, with an axis for the batch."""
    import torch
    import transformers

    sizes = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": POS}
    model = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    ).eval()
    ids = torch.zeros(BATCH, POS, dtype=torch.int64)
    example = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return mj.interop.from_torch(model, example, output="logits", dynamic=False, use_cache=False)


def main(topology, sizes, names):
    """Compiles programs, examples divided, and writes what was found, one line each."""
    import equinox as eqx
    import jax
    import jax.numpy as jnp

    mesh = described(topology, sizes)

    def shaped(x, *axes):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=jax.NamedSharding(mesh, jax.P(*axes)))

    subject = jax.tree.map(lambda x: shaped(x) if eqx.is_array(x) else x, bridged())
    ids = shaped(jax.ShapeDtypeStruct((BATCH, POS), jnp.int32), "data")
    for name in names:
        found = compiled_here(name, PROGRAMS[name], (subject, ids, ids), mesh)
        sys.stdout.write(json.dumps(found) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3:])
