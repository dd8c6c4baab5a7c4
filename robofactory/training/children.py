"""Commands in processes of their own, which are told to stop when this one is."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from robofactory import processes
from robofactory.errors import EXIT_INTERRUPTED, EXIT_STOPPED


def run(commands: Mapping[str, Sequence[str]], **environment: str) -> None:
    """Run Python commands side by side; exits as they did unless all of them end well.

    SIGINT, SIGTERM and SIGHUP become one SIGINT to each: a training finishes its step and saves, a recording keeps what
    is complete, and this process exits with EXIT_STOPPED. The commands are in sessions of their own: Ctrl-C reaches all
    processes of a terminal's session, so they would get it twice, and a training stops at once at the second. When this
    process is killed, so are they: what starts it again must not find them at work.

    Args:
        commands: arguments of the Python interpreter, by what a message calls them.
        environment: variables beside those of this process.
    """
    told: list[int] = []
    started: list[subprocess.Popen[bytes]] = []

    def tell(number: int, frame: Any) -> None:
        told.append(number)
        for process in started:
            process.send_signal(signal.SIGINT)

    numbers = [n for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) != signal.SIG_IGN]
    before = {number: signal.signal(number, tell) for number in numbers}
    for command in commands.values():
        arguments = [sys.executable, *processes.attached(command)]
        process = subprocess.Popen(arguments, env=os.environ | environment, start_new_session=True)
        started.append(process)
        if told:  # before it was there to hear it
            process.send_signal(signal.SIGINT)
    codes = [process.wait() for process in started]
    for number, handler in before.items():
        signal.signal(number, handler)
    for name, code in zip(commands, codes, strict=True):
        if code not in (0, 2, EXIT_STOPPED, EXIT_INTERRUPTED, -signal.SIGINT):  # these have said why
            print(
                f"error: {name} ended: {processes.how_it_ended(code)}{_what_helps(code, len(codes))}", file=sys.stderr
            )
    if len(told) > 1:
        raise KeyboardInterrupt  # a training then stops at once
    codes = [EXIT_INTERRUPTED if code == -signal.SIGINT else code for code in codes]
    if told and {*codes} <= {0, EXIT_STOPPED, EXIT_INTERRUPTED}:
        sys.exit(EXIT_STOPPED)
    worst = max(codes, key=lambda code: (code != 0, code != EXIT_STOPPED))
    if worst != 0:
        sys.exit(worst if worst > 0 else 128 - worst)


def _what_helps(code: int, how_many: int) -> str:
    if code >= 0:
        return "; its own message is above"
    fewer = "run them one after the other, " if how_many > 1 else ""
    return f"; {fewer}use a smaller dataloader.batch_size or fewer dataloader.num_workers; what was saved is kept"
