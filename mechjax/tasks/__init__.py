"""Tasks: templated English with clean and corrupt prompts, answers, named positions and held-out combinations."""

from mechjax.tasks.agreement import agreement as agreement
from mechjax.tasks.greater_than import greater_than as greater_than
from mechjax.tasks.induction import induction as induction
from mechjax.tasks.ioi import ioi as ioi
from mechjax.tasks.pairs import Pairs as Pairs
from mechjax.tasks.pronouns import pronouns as pronouns
