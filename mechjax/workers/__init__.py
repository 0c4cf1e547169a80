"""Many processes, one list of units: who does which, on storage that they share. Knows nothing of transformers."""

from mechjax.workers.lease import Lease as Lease
from mechjax.workers.lease import Leases as Leases
from mechjax.workers.lease import check_sharing as check_sharing
from mechjax.workers.sharing import Sharing as Sharing
from mechjax.workers.store import KINDS as KINDS
from mechjax.workers.store import Entry as Entry
from mechjax.workers.store import Kind as Kind
from mechjax.workers.store import Store as Store
from mechjax.workers.store import opened as opened
from mechjax.workers.team import ALONE as ALONE
from mechjax.workers.team import Team as Team
from mechjax.workers.team import team_of_processes as team_of_processes
from mechjax.workers.work import Worked as Worked
from mechjax.workers.work import work as work
