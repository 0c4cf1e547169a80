"""Things to look into: a decoder whose every activation is a named site, its config, and how it starts."""

from mechjax.models.config import Config as Config
from mechjax.models.decoder import Decoder as Decoder
from mechjax.models.init import init as init
from mechjax.models.params import assemble as assemble
from mechjax.models.params import parameters as parameters
from mechjax.models.resume import resume as resume
