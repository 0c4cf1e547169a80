"""One small network written three times, with its layers in a Python loop or in a scan, as those libraries' users do."""

import equinox as eqx
import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import nnx

LAYERS, POS, D, HIDDEN, VOCAB = 3, 4, 6, 10, 11
TOKENS = jnp.array([[1, 2, 3, 4], [5, 6, 7, 8]])


class LinenAttention(nn.Module):
    @nn.compact
    def __call__(self, x):
        q, k, v = (nn.Dense(D, name=name)(x) for name in ("query", "key", "value"))
        mask = jnp.tril(jnp.ones((x.shape[-2],) * 2, bool))
        pattern = nn.softmax(jnp.where(mask, q @ k.mT, -1e9))
        return nn.Dense(D, name="out")(pattern @ v)


class LinenMLP(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(D)(nn.gelu(nn.Dense(HIDDEN)(x)))


class LinenBlock(nn.Module):
    @nn.compact
    def __call__(self, x, _=None):
        x = x + LinenAttention(name="attn")(nn.LayerNorm(name="norm1")(x))
        x = x + LinenMLP(name="mlp")(nn.LayerNorm(name="norm2")(x))
        return x, None


class LinenNet(nn.Module):
    layout: str = "loop"
    remat: bool = False

    @nn.compact
    def __call__(self, tokens):
        embed = nn.Embed(VOCAB, D, name="embed")
        x = embed(tokens)
        block = nn.remat(LinenBlock) if self.remat else LinenBlock
        if self.layout == "scan":
            stack = nn.scan(block, variable_axes={"params": 0}, split_rngs={"params": True}, length=LAYERS)
            x, _ = stack(name="blocks")(x, None)
        else:
            block = nn.jit(LinenBlock) if self.layout == "jit" else block
            for i in range(LAYERS):
                x, _ = block(name=f"blocks_{i}")(x)
        return embed.attend(nn.LayerNorm(name="norm")(x))


def linen(**how):
    """The network and its variables; stacked for a scan, they hold the same numbers as in a loop."""
    variables = LinenNet().init(jax.random.key(0), TOKENS)
    if how.get("layout") == "scan":
        params = dict(variables["params"])
        blocks = [params.pop(f"blocks_{i}") for i in range(LAYERS)]
        params["blocks"] = jax.tree.map(lambda *xs: jnp.stack(xs), *blocks)
        variables = {"params": params}
    return LinenNet(**how), variables


class NNXMLP(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(D, HIDDEN, rngs=rngs)
        self.down = nnx.Linear(HIDDEN, D, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.gelu(self.up(x)))


class NNXBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.mlp = NNXMLP(rngs)

    def __call__(self, x):
        return x + self.mlp(self.norm(x))


class NNXNet(nnx.Module):
    def __init__(self, layout, rngs):
        self.layout = layout
        self.embed = nnx.Embed(VOCAB, D, rngs=rngs)
        if layout == "scan":
            self.blocks = nnx.split_rngs(splits=LAYERS)(nnx.vmap(NNXBlock))(rngs)
        else:
            self.blocks = nnx.List([NNXBlock(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(D, rngs=rngs)
        self.unembed = nnx.Linear(D, VOCAB, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        if self.layout == "scan":
            step = nnx.scan(lambda x, block: block(x), in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
            x = step(x, self.blocks)
        else:
            for block in self.blocks:
                x = block(x)
        return self.unembed(self.norm(x))


def nnx_net(layout):
    return NNXNet(layout, nnx.Rngs(0))


class EqxMLP(eqx.Module):
    layers: list[eqx.nn.Linear]

    def __init__(self, key):
        up, down = jax.random.split(key)
        self.layers = [eqx.nn.Linear(D, HIDDEN, key=up), eqx.nn.Linear(HIDDEN, D, key=down)]

    def __call__(self, x):
        return self.layers[1](jax.nn.gelu(self.layers[0](x)))


class EqxBlock(eqx.Module):
    norm: eqx.nn.LayerNorm
    mlp: EqxMLP

    def __init__(self, key):
        self.norm = eqx.nn.LayerNorm(D)
        self.mlp = EqxMLP(key)

    def __call__(self, x):  # (pos, d_model)
        return x + jax.vmap(self.mlp)(jax.vmap(self.norm)(x))


class EqxNet(eqx.Module):
    """Written for one example, as Equinox has it."""

    embed: eqx.nn.Embedding
    blocks: EqxBlock | list[EqxBlock]
    unembed: eqx.nn.Linear
    dropout: eqx.nn.Dropout
    layout: str = eqx.field(static=True)

    def __init__(self, layout, key):
        keys = jax.random.split(key, LAYERS)
        self.embed = eqx.nn.Embedding(VOCAB, D, key=jax.random.key(1))
        self.blocks = eqx.filter_vmap(EqxBlock)(keys) if layout == "scan" else [EqxBlock(key) for key in keys]
        self.unembed = eqx.nn.Linear(D, VOCAB, key=jax.random.key(2))
        self.dropout = eqx.nn.Dropout(0.1)
        self.layout = layout

    def __call__(self, tokens, *, key=None):
        x = jax.vmap(self.embed)(tokens)
        x = self.dropout(x, key=key, inference=key is None)
        if self.layout == "scan":
            arrays, rest = eqx.partition(self.blocks, eqx.is_array)
            x, _ = jax.lax.scan(lambda x, one: (eqx.combine(one, rest)(x), None), x, arrays)
        else:
            for block in self.blocks:
                x = block(x)
        return jax.vmap(self.unembed)(x)


def equinox(layout):
    return EqxNet(layout, jax.random.key(0))
