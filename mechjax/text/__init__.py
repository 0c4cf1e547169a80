"""Text in: documents from files or any iterable, packed into batches of tokens, at a position that can be saved."""

from mechjax.text.documents import Document as Document
from mechjax.text.documents import Documents as Documents
from mechjax.text.documents import documents as documents
from mechjax.text.pack import PackedBatch as PackedBatch
from mechjax.text.pack import Packing as Packing
from mechjax.text.pack import pack as pack
