"""`mechjax VERB ...`: argv in, exit status out. What mechjax raises on purpose is printed without a traceback."""

from collections.abc import Sequence

import tyro
from rich.console import Console
from rich.text import Text

from mechjax.base.errors import MechjaxError
from mechjax.cli.check import check
from mechjax.cli.doctor import doctor
from mechjax.cli.patch import patch
from mechjax.cli.plan import plan
from mechjax.cli.scoreboard import scoreboard
from mechjax.cli.sites import sites
from mechjax.cli.sweep import sweep
from mechjax.cli.tour import tour
from mechjax.cli.verify import verify

VERBS = {
    "tour": tour, "patch": patch, "sites": sites, "check": check, "plan": plan, "doctor": doctor,
    "scoreboard": scoreboard, "sweep": sweep, "verify": verify,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Args:
        argv: Arguments without the program's name; those of the process by default.

    Returns:
        0, or what the verb returns (`check` and `verify`: 1 where something is wrong), or 2 where what was asked cannot
        be done, or 130 where it was interrupted.
    """
    try:
        status = tyro.extras.subcommand_cli_from_dict(
            VERBS, prog="mechjax", description="Look inside language models.", args=argv
        )
    except MechjaxError as error:
        # As Text: what is printed may hold tokens, and is no markup.
        Console(stderr=True).print(
            Text.assemble((f"{type(error).__name__}: ", "bold red"), str(error)), soft_wrap=True
        )
        return 2
    except KeyboardInterrupt:
        Console(stderr=True).print("interrupted")
        return 130
    return status if isinstance(status, int) else 0
