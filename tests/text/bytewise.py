"""A tokenizer whose tokens are the bytes of the text, so that what becomes of every token can be seen."""

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors

from mechjax.hub import Tokenizer

SPECIAL = ["<bos>", "<eos>", "<pad>"]
BOS, EOS, PAD = 256, 257, 258


def bytewise(bos: bool = True) -> Tokenizer:
    """Writes <bos> in front, as Llama's does, or nothing, as GPT-2's."""
    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {name: 256 + i for i, name in enumerate(SPECIAL)}
    backend = tokenizers.Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(SPECIAL)
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", BOS)]
        )
    return Tokenizer(backend, special={f"{name[1:-1]}_token": name for name in SPECIAL})
