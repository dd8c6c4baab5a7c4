"""Run one stage of a pipeline, and say how long it took and how much memory its processes held together at the most.

    python runs/stage.py SUMMARY NAME COMMAND...

The line is printed, and appended to the file SUMMARY. Exits as the command did.
"""

import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

SECONDS_BETWEEN_LOOKS = 2.0  # a look takes the kernel a few ms for each GB


def descendants(root_pid: int) -> list[int]:
    """The process and all that it started, directly or not."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = stat.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, ProcessLookupError):  # it ended in between
            continue
        parent = int(text.rpartition(")")[2].split()[1])  # the name before it may hold anything
        children.setdefault(parent, []).append(int(stat.parent.name))
    found = [root_pid]
    for pid in found:
        found += children.get(pid, [])
    return found


def memory_bytes(pid: int) -> int:
    """What the process holds, with shared pages divided among those who share them (PSS)."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text(encoding="ascii").splitlines()
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        return 0
    return sum(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))


def main() -> int:
    summary, name, *command = sys.argv[1:]
    started = time.monotonic()
    process = subprocess.Popen(command)
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())  # who ends the stage ends its command
    peak_bytes = 0

    def watch() -> None:
        nonlocal peak_bytes
        while process.poll() is None:
            peak_bytes = max(peak_bytes, sum(memory_bytes(pid) for pid in descendants(process.pid)))
            time.sleep(SECONDS_BETWEEN_LOOKS)

    threading.Thread(target=watch, daemon=True).start()
    while True:
        try:
            code = process.wait()
            break
        except KeyboardInterrupt:  # the command got the signal too, and finishes what it has to
            continue
    minutes, seconds = divmod(round(time.monotonic() - started), 60)
    line = f"{name:<28}{minutes:>4} min {seconds:>2} s    at most {peak_bytes / 1e9:.1f} GB of memory"
    print(line if code == 0 else f"{line}    exit code {code}", flush=True)
    with open(summary, "a", encoding="utf-8") as file:
        file.write(line + "\n")
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    sys.exit(main())
