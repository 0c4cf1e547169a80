"""What attention heads do: how far they attend where a known kind of head would, what they copy, and who does what."""

from mechjax.heads.copying import copying as copying
from mechjax.heads.detect_heads import DetectedHeads as DetectedHeads
from mechjax.heads.detect_heads import detect_heads as detect_heads
from mechjax.heads.duplicate_token import duplicate_token as duplicate_token
from mechjax.heads.in_context_learning import InContextLearning as InContextLearning
from mechjax.heads.in_context_learning import in_context_learning as in_context_learning
from mechjax.heads.induction import induction as induction
from mechjax.heads.previous_token import previous_token as previous_token
from mechjax.heads.repeated_tokens import repeated_tokens as repeated_tokens
from mechjax.heads.scores import HeadScores as HeadScores
