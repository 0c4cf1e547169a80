"""PyTorch modules as subjects."""

from typing import Any

import equinox as eqx
import jax
from jaxtyping import Array

from mechjax.base.errors import ArgumentError
from mechjax.base.optional import require
from mechjax.interop.naming import Sites, chosen_sites
from mechjax.interop.pytorch.agreement import Watch, check_agreement
from mechjax.interop.pytorch.arguments import arguments
from mechjax.interop.pytorch.export import export
from mechjax.interop.pytorch.program import Program
from mechjax.interop.subject import Subject


def from_torch(
    module: Any, example: Any, *, sites: Sites | None = None, output: str | int | None = None,
    dynamic: bool = True, **fixed: Any,
) -> Subject:  # fmt: skip
    """A PyTorch module as a pure function of its inputs, through `torch.export` and torchax.

    What its submodules take and return when called are sites, exactly what forward hooks see: `transformer.h[3].mlp`
    gives `transformer.h.mlp.input` and `transformer.h.mlp.output` at layer 3. Arguments by name and parts of a tuple
    follow: `model.layers.input.attention_mask`, `h.attn.output.1`. A module called several times has `call_0`,
    `call_1`, ... in the name. Whole numbers are sites too.

        subject = from_torch(model.eval(), {"input_ids": ids}, output="logits", use_cache=False)
        logits, acts = mj.capture(subject, "transformer.h.mlp.output")(ids.numpy())

    The module is copied as it is now. Its parameters are `subject.parameters`, by torch's names, tied ones once, and
    its buffers and constants `subject.buffers`; all are leaves, so that `jax.grad` reaches them. Dtypes stay, but for
    whole numbers of 64 bits, which are 32 without `jax_enable_x64`. What a call would write into a buffer is dropped,
    so that every call starts from the same state.

    **Sizes.** Every axis of the arguments is left open, where the module lets it: one export serves all batches and
    lengths, with one compilation each. Where the module's code makes a number of a size, or takes another way for a
    size of 1, other sizes are refused, with the condition. `transformers` does so for a batch of 1 without an
    `attention_mask`: put the mask into the example.

    **Exact.** Contractions of 32 bits at `Precision.HIGHEST`; gradients as autograd's, `detach` and `no_grad` included.

    **Misleads.** A site is what a *call* of a module takes and returns: weights that a module's owner uses without
    calling it (`nn.MultiheadAttention.out_proj`) give no site. Hooks that the module has, yours or those by which
    `transformers` notes hidden states, come after: they see what an edit puts at a site. An id past the vocabulary
    gives NaN, where torch raises; checks of numbers inside the module are left out. Exported, `transformers` makes
    attention masks explicit that it leaves out otherwise, one for each example; they are sites.

    **Checked.** On the example the program must give what the module gives; else it is refused, and the first operation
    that differs is named.

    **Cost.** The export runs once, here: about 0.6 s for each layer of GPT-2 on one core, three times that
    with `dynamic=True`; then the module and the program, compiled for the example's sizes, are called once. Layers are
    not scanned, so compile time grows with depth.

    Args:
        module: A `torch.nn.Module` in evaluation mode; not changed.
        example: What it is called with: a tensor, a tuple of arguments or a dictionary of named ones, with tensors,
            arrays, numbers and strings in tuples, lists and dictionaries. The subject is called alike, with NumPy or
            JAX arrays, by place or by name. What is no array is part of the program, and may be left out of calls.
        sites: As in `from_linen`.
        output: The part of the module's output to return, by name or place; None for all of it, with dataclasses (and
            the outputs of `transformers`) as dictionaries.
        dynamic: Whether to leave sizes open. `False` exports faster, for the example's sizes alone.
        **fixed: Keyword arguments of every call, as they are: `use_cache=False`.

    Returns:
        The subject.

    Raises:
        ArgumentError: `module` is none, or would train; it cannot be called with the example; its output is no tree
            of tensors (a cache: `use_cache=False`).
        UnsupportedModelError: It does what `torch.export` or JAX cannot carry: ways that depend on the numbers in a
            tensor, random numbers, writes into what is read again, an operation without a counterpart, or whose numbers
            are others. The message names the operation and the module.
        MissingExtraError: torch or torchax is not installed.
        ShapeError: When called, for sizes and dtypes that the exported program does not hold for.
    """
    _check_evaluating(module)
    chosen = chosen_sites(sites)
    taken = arguments(module, example)
    exported = export(module, taken, fixed, output, dynamic=dynamic)
    program = Program(taken, exported)
    state = program.state(exported)

    def run(arrays: list[jax.Array], watch: Watch | None) -> Any:
        return _compiled(program, state, arrays) if watch is None else program(state, arrays, watch)

    check_agreement(module, taken, fixed, output, exported, run)
    return _Torch(chosen, program, **state)


def _check_evaluating(module: Any) -> None:
    """Refuse what is no module, and one that would train."""
    torch = require("torch", extra="torch")
    if not isinstance(module, torch.nn.Module):
        raise ArgumentError(
            f"from_torch takes a torch.nn.Module, got {type(module).__name__}. There are also from_linen, from_nnx and "
            "from_equinox."
        )
    training = [name or type(module).__name__ for name, part in module.named_modules() if part.training]
    if training:
        shown = ", ".join(f"`{name}`" for name in training[:3]) + (" and more" if len(training) > 3 else "")
        raise ArgumentError(f"{shown} would train: dropout draws random numbers. Call module.eval() first.")


class _Torch(Subject):
    program: Program = eqx.field(static=True)
    parameters: dict[str, Array]
    buffers: dict[str, Array]

    def _plain(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return _compiled(self.program, self._state, self._arrays(args, kwargs))

    def _marked(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return self.program(self._state, self._arrays(args, kwargs))

    @property
    def _state(self) -> dict[str, dict[str, Array]]:
        return {"parameters": self.parameters, "buffers": self.buffers}

    def _arrays(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[jax.Array]:
        arrays = self.program.arguments.arrays(args, kwargs)
        self.program.check(arrays)
        return arrays


@eqx.filter_jit
def _compiled(program: Program, state: dict[str, dict[str, Array]], arrays: list[jax.Array]) -> Any:
    return program(state, arrays)
