"""The transform: `site` names activations of any JAX function, `capture` and `intervene` read and change them."""

from mechjax.transform.captured import Activations as Activations
from mechjax.transform.edits import Edit as Edit
from mechjax.transform.edits import add as add
from mechjax.transform.edits import apply as apply
from mechjax.transform.edits import clamp as clamp
from mechjax.transform.edits import mean_ablate as mean_ablate
from mechjax.transform.edits import project_out as project_out
from mechjax.transform.edits import replace as replace
from mechjax.transform.edits import resample as resample
from mechjax.transform.edits import scale as scale
from mechjax.transform.edits import zero as zero
from mechjax.transform.gradients import value_and_grad_at as value_and_grad_at
from mechjax.transform.log import compile_log as compile_log
from mechjax.transform.means import means as means
from mechjax.transform.select import per_example as per_example
from mechjax.transform.site import site as site
from mechjax.transform.transforms import capture as capture
from mechjax.transform.transforms import intervene as intervene
from mechjax.transform.transforms import list_sites as list_sites
from mechjax.transform.transforms import run as run
