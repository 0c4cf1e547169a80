"""What both sides of the comparison on SynthSAEBench's world train. Only numpy: this runs in every environment.

Numbers of the published runs, brought to 1/16 of the world: 4,096 latents become 1/16, 768 dimensions and 25 active
latents 1/4 (the square root), as in the world itself. 200 million samples would take a day here: there are 3 million,
and the learning rate is 1e-3, where 3e-4 was published and entries of unit rows are twice as large.
"""

from typing import Any

N_FEATURES = 256  # latents
BATCH = 1024
STEPS = 3000
LEARNING_RATE = 1e-3
K = 6
PREFIXES = (16, 32, 64, 128, 256)
DEAD_AFTER = 1000  # steps, as SAELens has it
WARM_UP = 0.05  # part of the run over which penalties grow

# Coefficients were chosen on a short run of another stream, for some K active latents.
RECIPES: dict[str, dict[str, Any]] = {
    "top_k": {"k": K},
    "batch_top_k": {"k": K},
    "matryoshka": {"k": K, "prefixes": PREFIXES},
    "jump_relu": {"coefficient": 3.0, "threshold": 0.5, "bandwidth": 0.5},
    "relu": {"coefficient": 2.0},
}
