"""Activations on disk."""

from mechjax.store.batches import Batches as Batches
from mechjax.store.moments import Moments as Moments
from mechjax.store.read import Store as Store
from mechjax.store.read import read as read
from mechjax.store.repair import repair as repair
from mechjax.store.rows import Column as Column
from mechjax.store.verify import Verification as Verification
from mechjax.store.verify import verify as verify
from mechjax.store.write import write as write
