"""Commands in processes of their own, which are told to stop when this one is."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from robofactory.errors import EXIT_INTERRUPTED, EXIT_STOPPED


def run(commands: Sequence[Sequence[str]], **environment: str) -> None:
    """Run Python commands side by side; exits as they did unless all of them end well.

    SIGINT, SIGTERM and SIGHUP become one SIGINT to each: a training finishes its step and saves, a recording keeps what
    is complete, and this process exits with EXIT_STOPPED. The commands are in sessions of their own: Ctrl-C reaches all
    processes of a terminal's session, so they would get it twice, and a training stops at once at the second.

    Args:
        commands: arguments of the Python interpreter.
        environment: variables beside those of this process.
    """
    told: list[int] = []
    processes: list[subprocess.Popen[bytes]] = []

    def tell(number: int, frame: Any) -> None:
        told.append(number)
        for process in processes:
            process.send_signal(signal.SIGINT)

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, tell) for number in numbers}
    for command in commands:
        processes.append(
            subprocess.Popen([sys.executable, *command], env=os.environ | environment, start_new_session=True)
        )
    codes = [process.wait() for process in processes]
    for number, handler in before.items():
        signal.signal(number, handler)
    if told and {*codes} <= {0, EXIT_STOPPED, EXIT_INTERRUPTED}:
        sys.exit(EXIT_STOPPED)
    worst = max(codes, key=lambda code: (code != 0, code != EXIT_STOPPED))
    if worst != 0:
        sys.exit(worst if worst > 0 else 128 - worst)
