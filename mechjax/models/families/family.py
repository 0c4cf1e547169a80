"""Families as tables: how a Hugging Face config and its tensors become a config of ours and our parameters.

A family is data. To add one: write its table, add it to `FAMILIES`, add a case to the parity tests.
Every key of a config is read, ignored by name, or refused by name: nothing that changes numbers passes unread.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from mechjax.base.errors import UnsupportedModelError
from mechjax.models.config import Config
from mechjax.models.families.rule import Rule
from mechjax.models.model_config import MAX_LAYERS, ModelConfig

NO_EFFECT = frozenset({
    "architectures", "model_type", "transformers_version", "torch_dtype", "dtype", "_name_or_path", "name_or_path",
    "_commit_hash", "auto_map", "initializer_range", "use_cache", "bos_token_id", "eos_token_id", "pad_token_id",
    "sep_token_id", "decoder_start_token_id", "unk_token_id", "cls_token_id", "mask_token_id",
    "task_specific_params", "tokenizer_class", "prefix", "gradient_checkpointing", "output_attentions",
    "output_hidden_states", "output_past", "return_dict", "return_dict_in_generate", "use_return_dict",
    "torchscript", "is_encoder_decoder", "is_decoder", "id2label", "label2id", "num_labels", "problem_type",
    "finetuning_task", "_attn_implementation", "_attn_implementation_autoset", "attn_implementation",
    "_flash_attn_2_enabled", "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "typical_p",
    "num_beams", "num_return_sequences", "repetition_penalty", "length_penalty", "no_repeat_ngram_size",
    "early_stopping", "pretraining_tp", "chunk_size_feed_forward",
})  # fmt: skip
"""Config keys of any family that do not change what the model computes from given tokens."""


@dataclass(frozen=True)
class Family:
    """One family of Hugging Face architectures.

    Attributes:
        name: Our name for it.
        architectures: Hugging Face class names, as in `architectures` of a config.
        model_type: Hugging Face's name for it, for configs that name no architecture.
        config: For each of our config's fields a Hugging Face key, or a function of the Hugging Face config.
        choices: Our fields that are the same for the whole family.
        weights: One rule per Hugging Face tensor.
        prefix: What tensor names begin with, in checkpoints of the whole model; those of the bare model lack it.
        defaults: Hugging Face's values of keys that a config may leave out.
        required: Keys that change numbers in ways not implemented, and the values that do not.
        ignored: Keys beside `NO_EFFECT` that change nothing.
        ignored_weights: Patterns of tensors that are no parameters (masks and tables that old checkpoints stored).
        to_hf: The Hugging Face config of one of ours; the inverse of `config` and `choices`.
        kind: The class of our config.
        older: Endings of tensor names, and how old checkpoints spell them.
        modules: Modules without parameters of their own (`{}` for the layer): the sites that they read and give.
        reads: Where the module of a parameter reads or gives other sites than a decoder's (`modules.READ_AND_GIVEN`).
        patterns: Fields of a Hugging Face output that hold patterns of every layer, and our sites.
        settled: The config, once the names of the stored tensors are known, where config.json alone does not tell.
        moved: Modules whose path in newer transformers is not that of their tensors: theirs -> the newer one.
    """

    name: str
    architectures: tuple[str, ...]
    model_type: str
    config: Mapping[str, str | Callable[["HfConfig"], Any]]
    choices: Mapping[str, Any]
    weights: tuple[Rule, ...]
    prefix: str
    to_hf: Callable[[Any], dict[str, Any]]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    required: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    ignored: frozenset[str] = frozenset()
    ignored_weights: tuple[str, ...] = ()
    kind: type[ModelConfig] = Config
    older: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, tuple[str | None, str | None]] = field(default_factory=dict)
    reads: Mapping[str, tuple[str | None, tuple[str, ...]]] = field(default_factory=dict)
    patterns: Mapping[str, str] = field(default_factory=lambda: {"attentions": "pattern"})
    settled: Callable[[Any, Collection[str]], Any] | None = None
    moved: Mapping[str, str] = field(default_factory=dict)

    def spellings(self, name: str) -> tuple[str, ...]:
        """What checkpoints may call a tensor: as the whole model has it, as the bare one, and both in old spelling."""
        old = (name.removesuffix(new) + old for new, old in self.older.items() if name.endswith(new))
        return tuple(n for full in (name, *old) for n in (full, full.removeprefix(self.prefix)))

    def rules_for(self, config: ModelConfig) -> tuple[Rule, ...]:
        """The rules of the tensors that a model of this config has."""
        paths = config.shapes.keys()
        return tuple(rule for rule in self.weights if paths >= set(rule.paths) and rule.when(config))

    def match(self, name: str, config: ModelConfig) -> tuple[Rule, int | None] | None:
        """The rule and layer of a tensor, its name with or without the family's prefix; None for one without a rule."""
        for spelled in (name, self.prefix + name):
            for rule in self.rules_for(config):
                if found := rule.match(spelled):
                    return found
        return None

    def ignorable(self, name: str, config: ModelConfig) -> bool:
        """Whether a tensor without a rule is no parameter: a stored mask, or a tied embedding's second copy."""
        spelled = (name, self.prefix + name)
        if any(re.fullmatch(pattern, s) for pattern in self.ignored_weights for s in spelled):
            return True
        unembedding = (rule for rule in self.weights if rule.paths == ("W_U",))
        return getattr(config, "tied", False) and any(rule.match(s) for rule in unembedding for s in spelled)


class HfConfig(Mapping[str, Any]):
    """A Hugging Face config with the family's defaults, which remembers the keys that were read."""

    def __init__(self, given: Mapping[str, Any], defaults: Mapping[str, Any], family: str) -> None:
        self.given, self.defaults, self.family, self.read = given, defaults, family, set[str]()

    def __getitem__(self, key: str) -> Any:
        self.read.add(key)
        if key in self.given:
            return self.given[key]
        if key in self.defaults:
            return self.defaults[key]
        raise UnsupportedModelError(f"The config lacks `{key}`, which every {self.family} config has.")

    def count(self, key: str, most: int = MAX_LAYERS) -> int:
        """A whole number that a table computes with, checked before anything is made of that size."""
        value = self[key]
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
            raise UnsupportedModelError(
                f"The config has `{key}` = {value!r}; it must be a whole number from 1 to {most:,}."
            )
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self.given)

    def __len__(self) -> int:
        return len(self.given)


def read_config(
    hf: Mapping[str, Any], family: Family, *, precision: Literal["highest", "default"] = "highest"
) -> Any:
    """Our config of a Hugging Face config.

    Raises:
        UnsupportedModelError: A key that is unknown, missing, or asks for what is not implemented; it is named.
        ArgumentError: A number that is absurd.
    """
    reading = HfConfig(hf, family.defaults, family.name)
    fields = {
        ours: theirs(reading) if callable(theirs) else reading[theirs]
        for ours, theirs in family.config.items()
    }
    for key, accepted in family.required.items():
        if key in hf and hf[key] not in accepted:
            raise UnsupportedModelError(
                f"The config has `{key}` = {hf[key]!r}, which is not implemented for {family.name}: only "
                f"{' or '.join(map(repr, accepted))} is."
            )
    known = reading.read | family.required.keys() | family.ignored | NO_EFFECT
    if unknown := [key for key in hf if key not in known]:
        listed = ", ".join(f"`{key}` = {hf[key]!r}" for key in unknown)
        raise UnsupportedModelError(
            f"The config has keys that are unknown for {family.name}: {listed}. They may change what the model "
            "computes, so they are refused; remove them from config.json if you know that they do not."
        )
    return family.kind(**{"source": family.name} | fields, **family.choices, precision=precision)


def write_config(config: ModelConfig, family: Family) -> dict[str, Any]:
    """The Hugging Face config of one of ours.

    Raises:
        UnsupportedModelError: This family cannot express the config; the fields that it cannot are named.
    """
    hf = {"architectures": [family.architectures[0]], "model_type": family.model_type} | family.to_hf(config)
    back = read_config(hf, family, precision=config.precision)
    if family.settled is not None:
        back = family.settled(
            back, {name for rule in family.rules_for(config) for name in rule.names(config)}
        )
    computes = family.kind.__dataclass_fields__.keys() - {"source"}
    lost = [
        n
        for n in family.kind.__dataclass_fields__
        if n in computes and getattr(back, n) != getattr(config, n, None)
    ]
    if lost:
        listed = ", ".join(f"`{name}` = {getattr(config, name)!r}" for name in lost)
        raise UnsupportedModelError(f"The {family.name} family cannot express {listed}.")
    return hf


def activation(key: str) -> Callable[[HfConfig], str]:
    """Reads an activation by its Hugging Face name."""
    names = {
        "gelu": "gelu", "gelu_new": "gelu_new", "gelu_pytorch_tanh": "gelu_new", "gelu_fast": "gelu_new",
        "silu": "silu", "swish": "silu", "relu": "relu", "quick_gelu": "quick_gelu",
    }  # fmt: skip

    def read(hf: HfConfig) -> str:
        if (name := hf[key]) not in names:
            raise UnsupportedModelError(
                f"The config has `{key}` = {name!r}; implemented are {', '.join(map(repr, names))}."
            )
        return names[name]

    return read
