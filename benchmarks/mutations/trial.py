"""One command in a process of its own, and how it ended: what it printed, took, touched and made."""

import base64
import contextlib
import ctypes
import hashlib
import os
import re
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.mutations.damage import NOT_TO_COPY, SECRET, TOKEN
from robofactory.errors import run_command

HANG_S = 20.0
MEMORY_BYTES = 2_000_000_000
LIBRARIES_BYTES = 500_000_000  # what they take in a process that did nothing yet; here they are in its parent
LONGEST_LINE = 2000  # characters

RIGHT, REFUSED, WARNED, OTHER = "right", "refused", "warned", "other result"
WRONG, TRACEBACK, HANG, MEMORY, OUTSIDE, LINES, OBEYED = (
    "silently wrong", "traceback", "hang", "memory", "outside", "not one line", "text obeyed",
)  # fmt: skip
OUTCOMES = (RIGHT, REFUSED, WARNED, OTHER, WRONG, TRACEBACK, HANG, MEMORY, OUTSIDE, LINES, OBEYED)
FAILURES = OUTCOMES[4:]

TOUCHING = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.symlink", "os.link", "os.chmod", "os.truncate")
ELSEWHERE = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "socket.getaddrinfo")
IN_OPEN_MODIFY_CREATE_DELETE = 0x20 | 0x2 | 0x100 | 0x200
MARKUP = (b"<img src=x onerror", b"<script>alert(1)")
PROGRESS = re.compile(r"\d+%\||\d+(\.\d+)?(it|s|episode|step)/(it|s|episode|step)|^[\w ,.=]+: +\d+\S* \[")


@dataclass(frozen=True)
class Ending:
    """How a command ended.

    outcome: one of OUTCOMES but for what needs a comparison: RIGHT here is any success.
    what: of a failure; of a success its last warning.
    result: a digest of what it made.
    """

    outcome: str
    what: str
    result: str
    seconds: float


class Trial:
    """A command that runs below a directory: `given` to read, `home` to write, `outside` that it may not reach."""

    def __init__(
        self, root: Path, prepare: Callable[[], None], command: Callable[[], None], results: Iterable[str],
        said_by_code: tuple[int, ...] = (),
    ):  # fmt: skip
        """
        Args:
            prepare: makes what is below the directory, in the new process, before anything is watched.
            results: patterns below the directory; `stdout` is what was printed.
            said_by_code: exit codes other than 2 by which it tells that its input is not right.
        """
        self.root, self.results, self.said_by_code = root, tuple(results), said_by_code
        root.mkdir(parents=True)
        self._libc = ctypes.CDLL(None)
        self._events = self._libc.inotify_init1(os.O_NONBLOCK)
        self._started = time.monotonic()
        self._cut, self._waited_s = "", 0.0
        sys.stdout.flush()
        sys.stderr.flush()
        self._pid = os.fork()
        if self._pid == 0:
            self._run(prepare, command)
        self._memory_at_start = self._memory()

    # ------------------------------------------------------------------------------------------------ in the child

    def _run(self, prepare: Callable[[], None], command: Callable[[], None]) -> None:
        code = 1
        try:
            os.setsid()
            os.chdir(self.root)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            signal.signal(signal.SIGINT, signal.default_int_handler)
            for number, name, flags in ((0, os.devnull, os.O_RDONLY), *((n, self.root / f"std{w}", os.O_WRONLY | os.O_CREAT) for n, w in ((1, "out"), (2, "err")))):  # fmt: skip
                os.dup2(os.open(name, flags), number)
            sys.stdout, sys.stderr = (open(number, "w", encoding="utf-8", closefd=False) for number in (1, 2))  # noqa: SIM115
            self._plant()
            prepare()
            os.environ |= {
                "ROBOFACTORY_HOME": str(self.root / "home"),
                "WANDB_MODE": "disabled",
                TOKEN: SECRET.decode(),
            }
            for directory in [self.root / "outside", *(self.root / "outside").glob("**/")]:
                self._libc.inotify_add_watch(self._events, str(directory).encode(), IN_OPEN_MODIFY_CREATE_DELETE)
            self._watch()
            run_command(command)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def _plant(self) -> None:
        import h5py
        import numpy as np
        from PIL import Image

        place = self.root / "outside"
        place.mkdir()
        (place / "secret.txt").write_bytes(SECRET + b"\n")
        Image.new("RGB", (64, 48)).save(place / "secret.png")
        with h5py.File(place / "secret.h5", "w") as file:
            file["data"] = np.zeros((1000, 8), np.float32)

    def _watch(self) -> None:
        """Write down whatever Python touches elsewhere; what C touches is found by `outside` alone.

        What leads out of this process is not done.
        """
        log = open(self.root / "touched", "w", buffering=1)  # noqa: SIM115 (for as long as the process lives)
        caches = [os.path.expanduser(f"~/{name}") for name in (".cache/matplotlib", ".config/matplotlib", ".cache/huggingface")]  # fmt: skip
        written = (
            str(self.root / "home"),
            "/dev/null",
            "/dev/shm",
            os.environ.get("MPLCONFIGDIR") or caches[0],
            *caches,
        )
        code = (str(Path(__file__).parents[2]), sys.prefix, sys.base_prefix, *sys.path)
        system = ("/proc", "/sys", "/usr", "/etc", "/lib", "/dev/urandom")
        read = tuple(os.path.realpath(path) for path in (str(self.root), *written, *code, *system) if path)

        def is_in(path: str, places: tuple[str, ...]) -> bool:
            return any(path == place or path.startswith(place + "/") for place in places)

        def hook(event: str, given: tuple) -> None:
            if event in ELSEWHERE:
                log.write(f"{event} {str(given)[:200]}\n")
                raise RuntimeError("no program is started and nobody asked from here")
            if event == "open" and isinstance(given[0], (str, bytes)):
                path, mode, flags = os.fsdecode(given[0]), given[1] or "", given[2] or 0
                writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or bool(set(mode) & set("wax+"))
                if "\0" not in path and not is_in(os.path.realpath(path), written if writes else read):
                    log.write(f"{'write' if writes else 'read'} {path!r}\n")
            elif event in TOUCHING:
                changed = given[1:2] if event in ("os.symlink", "os.link") else given[:2]
                beside = f"/proc/self/fd/{given[-1]}" if isinstance(given[-1], int) and given[-1] >= 0 else ""
                for path in (os.fsdecode(each) for each in changed if isinstance(each, (str, bytes))):
                    folder, name = os.path.split(os.path.join(beside, path))
                    if "\0" not in path and not is_in(os.path.join(os.path.realpath(folder), name), written):
                        log.write(f"{event} {path!r}\n")

        sys.addaudithook(hook)

    # ----------------------------------------------------------------------------------------------- in the parent

    def _memory(self) -> int:
        try:
            return int(Path(f"/proc/{self._pid}/statm").read_text().split()[1]) * resource.getpagesize()
        except (FileNotFoundError, ProcessLookupError, IndexError):
            return 0

    def _seconds(self) -> float:
        """So far, without those in which it waited for a processor that others had."""
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            self._waited_s = int(Path(f"/proc/{self._pid}/schedstat").read_text().split()[1]) / 1e9
        return time.monotonic() - self._started - self._waited_s

    def poll(self) -> Ending | None:
        """How it ended, once it has; what takes too long or too much is killed."""
        pid, status = os.waitpid(self._pid, os.WNOHANG)
        if pid == 0:
            seconds, grown = self._seconds(), self._memory() - self._memory_at_start
            if not self._cut and (seconds > HANG_S or grown > MEMORY_BYTES - LIBRARIES_BYTES):
                self._cut = HANG if seconds > HANG_S else MEMORY
                os.killpg(self._pid, signal.SIGKILL)
            return None
        seconds = self._seconds()
        try:
            os.killpg(self._pid, signal.SIGKILL)  # what it left behind
            orphans = True
        except ProcessLookupError:
            orphans = False
        ending = self._ending(os.waitstatus_to_exitcode(status), seconds, orphans)
        os.close(self._events)
        return ending

    def _ending(self, code: int, seconds: float, orphans: bool) -> Ending:
        stdout, stderr = ((self.root / name).read_text(errors="replace") for name in ("stdout", "stderr"))
        outcome, what = self._judged(code, stdout, stderr, orphans)
        return Ending(outcome, what, self.digest() if outcome == RIGHT else "", seconds)

    def _judged(self, code: int, stdout: str, stderr: str, orphans: bool) -> tuple[str, str]:
        last = next((line for line in reversed(stderr.splitlines()) if line.strip()), "")[:300]
        if reached := self._reached():
            return OUTSIDE, f"{reached} ({last})"
        if self._cut:
            return self._cut, last
        if "Traceback (most recent call last)" in stderr or code not in (0, 2, *self.said_by_code):
            places = re.findall(r'File ".*?/(robofactory/[^"]+)", line (\d+)', stderr)
            return TRACEBACK, f"{last} at {':'.join(places[-1]) if places else f'exit code {code}'}"
        if orphans:
            return HANG, "processes were left behind"
        if obeyed := self._obeyed(stdout, stderr):
            return OBEYED, obeyed
        if code == 2:
            said = [line for line in re.split(r"[\r\n]+", stderr) if line.strip() and not PROGRESS.search(line)]
            errors = [line for line in said if not line.startswith(("warning:", "usage:"))]
            is_plain = len(errors) == 1 and errors[0].startswith("error: ") and len(errors[0]) <= LONGEST_LINE
            return (REFUSED, errors[0]) if is_plain else (LINES, " / ".join(each[:200] for each in errors[:3]))
        if code in self.said_by_code:
            return REFUSED, last
        warnings = [line for line in stderr.splitlines() if line.startswith("warning:")]
        return RIGHT, warnings[-1] if warnings else ""

    def _reached(self) -> str:
        touched = self.root / "touched"
        if touched.exists() and (lines := touched.read_text().splitlines()):
            return lines[0]
        if select.select([self._events], [], [], 0)[0]:
            return "a file of outside/ was opened"
        secrets = [SECRET, base64.b64encode(SECRET + b"\n")]
        not_to_copy = [NOT_TO_COPY, base64.b64encode(NOT_TO_COPY + b"\n")]
        for path in sorted(self.root.glob("**/*")):
            if path.is_file() and not path.is_symlink() and not {"outside", "elsewhere.txt"} & set(path.parts):
                content, made = path.read_bytes(), path.is_relative_to(self.root / "home")
                if any(secret in content for secret in (secrets + not_to_copy if made else secrets)):
                    return f"the secret is in {path.relative_to(self.root)}"
        return ""

    def _obeyed(self, stdout: str, stderr: str) -> str:
        """Text from files that a terminal or a browser would act on."""
        if "\x1b[2J" in stdout + stderr or "\x1b]0;" in stdout + stderr:
            return "control characters were printed"
        pages = [path for path in (self.root / "home").glob("**/*.html") if path.is_file()]
        found = [path.name for path in pages if any(mark in path.read_bytes() for mark in MARKUP)]
        return f"markup stands in {found[0]}" if found else ""

    def digest(self) -> str:
        """Of what it made, wherever that lies."""
        digest = hashlib.sha256()
        for pattern in self.results:
            for path in sorted(self.root.glob(pattern)):
                if path.is_file():
                    content = path.read_bytes()
                    if path.suffix not in (".parquet", ".safetensors", ".png"):
                        content = content.replace(str(self.root).encode(), b"ROOT")
                    digest.update(f"{path.relative_to(self.root)} {len(content)} ".encode() + content)
        return digest.hexdigest()[:16]

    def clear(self) -> None:
        shutil.rmtree(self.root, ignore_errors=True)
