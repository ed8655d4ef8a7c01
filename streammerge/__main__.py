"""`streammerge`, and `python -m streammerge`."""

import sys
from collections.abc import Sequence

from streammerge import signals


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line as a process of its own, which signals stop; the exit status."""
    signals.take_over()
    from streammerge.cli import main as run
    from streammerge.heap import leave_all_to_the_system

    status = run(arguments)
    signals.leave(status)
    leave_all_to_the_system()
    return status


if __name__ == "__main__":
    sys.exit(main())
