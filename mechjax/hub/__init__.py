"""Checkpoints as they lie on disk or on the Hugging Face Hub. Knows files and tokens, nothing of transformers."""

from mechjax.hub.fetch import fetch as fetch
from mechjax.hub.fetch import is_hub_name as is_hub_name
from mechjax.hub.folder import Checkpoint as Checkpoint
from mechjax.hub.folder import read_config as read_config
from mechjax.hub.tensor_file import TensorFile as TensorFile
from mechjax.hub.tokenizer import Tokenizer as Tokenizer
