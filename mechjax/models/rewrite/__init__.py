"""The same function in other weights. Each rewrite is `model -> model`, pure, and applied twice equals once.

`load` never rewrites, so these are asked for. Each says what it keeps (logits, or for `center_unembed`
log-probabilities) and refuses, by name, a model of which that would not be true. `quantize` alone changes the function,
within bounds that it states.
"""

from mechjax.models.rewrite.center_unembed import center_unembed as center_unembed
from mechjax.models.rewrite.center_writing import center_writing as center_writing
from mechjax.models.rewrite.fold_norm import fold_norm as fold_norm
from mechjax.models.rewrite.fold_value_bias import fold_value_bias as fold_value_bias
from mechjax.models.rewrite.quantize import dequantize as dequantize
from mechjax.models.rewrite.quantize import quantize as quantize
from mechjax.models.rewrite.refactor_qk_ov import refactor_qk_ov as refactor_qk_ov
from mechjax.models.rewrite.ungroup_kv import ungroup_kv as ungroup_kv
