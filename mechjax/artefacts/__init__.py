"""What mechjax writes, recognised again and compared with the checksums that it was written with."""

from mechjax.artefacts.verified import Verified as Verified
from mechjax.artefacts.verify import verify as verify
