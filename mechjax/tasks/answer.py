"""Next words as tokens."""

from mechjax.hub.tokenizer import Tokenizer


def answer_token(tokenizer: Tokenizer, prompt: str, word: str) -> int:
    """The one token of a prompt's next word; a space is put in front where the prompt ends without.

    Raises:
        TokenError: The word is several tokens, or none that the tokenizer has.
    """
    spaced = word.startswith((" ", "\n")) or prompt.endswith((" ", "\n"))
    return tokenizer.token(word if spaced else f" {word}")
