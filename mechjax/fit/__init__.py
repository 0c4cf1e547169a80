"""Fitting: a training loop for any model and loss, its optimiser and its checkpoints; logistic probes."""

from mechjax.fit.checkpoint import (
    log_spaced as log_spaced,
)
from mechjax.fit.checkpoint import (
    restore_all as restore_all,
)
from mechjax.fit.checkpoint import (
    restore_checkpoint as restore_checkpoint,
)
from mechjax.fit.checkpoint import (
    said_of as said_of,
)
from mechjax.fit.checkpoint import (
    save_checkpoint as save_checkpoint,
)
from mechjax.fit.checkpoint import (
    saved_steps as saved_steps,
)
from mechjax.fit.logistic import Logistic as Logistic
from mechjax.fit.logistic import logistic as logistic
from mechjax.fit.loop import History as History
from mechjax.fit.loop import fit as fit
from mechjax.fit.optimizer import adamw as adamw
from mechjax.fit.optimizer import muon as muon
