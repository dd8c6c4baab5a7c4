"""Ctrl-C at any moment is one line and exit code 130; output that nobody reads or that has no room ends a command, too."""

import os
import select
import signal
import subprocess
import sys
import time

import pytest

from robofactory import config
from robofactory.interrupts import LINE

SAID = f"{LINE}\n".encode()
SECONDS = 60.0  # on a busy machine


def start(*command: str, **options) -> subprocess.Popen[bytes]:
    """A process as a shell starts it in the foreground."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"}
    environment |= {"PYTHONPATH": str(config.PACKAGE.parent)}
    hears = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)} | options
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, *command], env=environment, **{"stdout": pipe, "stderr": pipe} | hears)


def script(body: str, **options) -> subprocess.Popen[bytes]:
    head = "import os, signal, sys, time\nfrom robofactory.errors import run_command\n"
    return start("-c", f"{head}{body}\nrun_command(main)", **options)


def wait_for(process: subprocess.Popen[bytes], word: bytes) -> bytes:
    """What it wrote to stderr until this word came."""
    assert process.stderr is not None
    seen, until = b"", time.monotonic() + SECONDS
    while word not in seen and time.monotonic() < until:
        if select.select([process.stderr], [], [], 1.0)[0]:
            if not (more := os.read(process.stderr.fileno(), 1 << 16)):
                break
            seen += more
    assert word in seen, seen[-500:]
    return seen


def ended(process: subprocess.Popen[bytes]) -> tuple[int, bytes]:
    _, error = process.communicate(timeout=SECONDS)
    return process.returncode, error


# --------------------------------------------------------------------------------------------- while libraries are loaded


@pytest.mark.parametrize("command", ["robofactory memory", "robofactory.training.memory"])
@pytest.mark.parametrize("module", ["robofactory", "robofactory.config", "yaml", "numpy", "torch.nn", "transformers"])
def test_ctrl_c_while_libraries_are_loaded_is_one_line(command, module):
    """It was swallowed, aborted the process or printed tracebacks in 5 of 18 places. Each import is a line on stderr."""
    process = start("-X", "importtime", "-m", *command.split(), "--recipe", "robot_openvla_tiny")
    wait_for(process, f" {module}\n".encode())
    process.send_signal(signal.SIGINT)
    code, error = ended(process)
    assert code == 130 and error.endswith(SAID) and error.count(SAID) == 1, error[-500:]
    assert b"Traceback" not in error and b"Error" not in error


# ------------------------------------------------------------------------------------------------------------ at work


def test_ctrl_c_at_work_cleans_up_first():
    process = script(
        "def main():\n try:\n  print('at work', file=sys.stderr, flush=True); time.sleep(60)\n"
        " finally: print('cleaned', file=sys.stderr)"
    )
    wait_for(process, b"at work\n")
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, b"cleaned\n" + SAID)


def test_ctrl_c_after_the_work_changes_nothing():
    """It ended the process by the signal itself while the interpreter freed its memory, which takes a second with torch."""
    process = script(
        "class Freed:\n def __del__(self, write=os.write, sleep=time.sleep): write(2, b'done\\n'); sleep(1)\n"
        "freed = Freed()  # the interpreter lets go of it at its end\n"
        "def main(): pass"
    )
    seen = wait_for(process, b"done\n")
    process.send_signal(signal.SIGINT)
    assert ended(process) == (0, b"") and seen == b"done\n"


def test_a_second_ctrl_c_does_not_wait():
    process = script(
        "def main():\n try: print('at work', file=sys.stderr, flush=True); time.sleep(60)\n"
        " finally: print('cleaning', file=sys.stderr, flush=True); time.sleep(60)"
    )
    wait_for(process, b"at work\n")
    process.send_signal(signal.SIGINT)
    wait_for(process, b"cleaning\n")
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    assert ended(process) == (130, SAID) and time.monotonic() - started < 20


@pytest.mark.parametrize(
    "body",
    [
        "class A:\n def __del__(self): os.kill(os.getpid(), signal.SIGINT); time.sleep(60)\ndef main(): A()",
        "import atexit\natexit.register(lambda: (os.kill(os.getpid(), signal.SIGINT), time.sleep(60)))\ndef main(): pass",
        "import weakref\nclass A: pass\ndef main():\n a = A(); r = weakref.ref(a, lambda _: os.kill(os.getpid(), signal.SIGINT))\n"
        " del a; time.sleep(60)",
    ],
    ids=["destructor", "atexit", "callback"],
)
def test_ctrl_c_where_python_swallows_it_ends_the_command(body):
    assert ended(script(body)) == (130, SAID)


def test_ctrl_c_outside_of_main_is_the_same_line():
    process = start(
        "-c", "import sys; sys.argv[0] = '-m'; import robofactory, os, signal; os.kill(os.getpid(), signal.SIGINT)"
    )
    assert ended(process) == (130, SAID)


def test_what_ignores_ctrl_c_goes_on_ignoring_it():
    """Under nohup, or behind `&` in a script."""
    ignore = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)}
    process = script("def main(): os.kill(os.getpid(), signal.SIGINT); print('went on', file=sys.stderr)", **ignore)
    assert ended(process) == (0, b"went on\n")


def test_a_library_changes_nothing_of_ctrl_c():
    code = (
        "import signal, robofactory.errors as e; print(signal.getsignal(signal.SIGINT) is signal.default_int_handler)"
    )
    process = start("-c", code)
    assert process.communicate(timeout=SECONDS)[0] == b"True\n"


# ------------------------------------------------------------------------------------------------------------- output


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["evaluate", "--help"]])
def test_output_that_nobody_reads_ends_a_command_quietly(arguments):
    reads, writes = os.pipe()
    os.close(reads)  # as `| head -1` does, once it has its line
    process = start("-m", "robofactory", *arguments, stdout=writes)
    os.close(writes)
    assert ended(process) == (141, b"")


def test_a_loop_that_prints_ends_once_nobody_reads():
    process = script("def main():\n while True: print('x' * 1000)")
    assert process.stdout is not None and process.stdout.read(1)
    process.stdout.close()
    assert process.stderr is not None
    assert (process.stderr.read(), process.wait(SECONDS)) == (b"", 141)


def test_output_that_has_no_room_is_one_line():
    with open("/dev/full", "wb") as full:
        process = start("-m", "robofactory", "train", "--help", stdout=full)
    assert ended(process) == (2, b"error: No space left on device: standard output\n")


def test_a_closed_pipe_of_our_own_keeps_its_trace():
    code, error = ended(script("def main(): raise BrokenPipeError(32, 'Broken pipe')"))
    assert code == 1 and error.endswith(b"BrokenPipeError: [Errno 32] Broken pipe\n")
