"""Ranks that start a command, but for one that ends before MPI; see test_ending.py.

Arguments: the number of that rank, the seconds that MPI may take, and whether Ctrl-C comes.
"""

import os
import signal
import sys
import time

from pympa.command import line as command
from pympa.session.launch import launched_tasks

MISSING, SECONDS, INTERRUPTED = int(sys.argv[1]), float(sys.argv[2]), sys.argv[3] == "interrupted"


def main(arguments: list[str]) -> int:
    """Start MPI as commands do."""
    if INTERRUPTED:
        os.kill(os.getpid(), signal.SIGINT)
    command.start(command.Parser(prog="start"), arguments)
    return 0


command._START_SECONDS = SECONDS
if launched_tasks(os.environ).number == MISSING:
    time.sleep(0.5)
    os._exit(1)
sys.exit(command.command_line(main))
