"""The shell scripts, on a machine made of stubs: nothing here installs anything or asks the network."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from robofactory.__main__ import STAGES

ROOT = Path(__file__).parents[1]
SCRIPTS = ["train.sh", "eval.sh", "test.sh", "runs/laptop.sh", "runs/openvla_7b.sh"]
TOOLS = ["awk", "bash", "cat", "chmod", "dirname", "dpkg", "env", "flock", "grep", "head", "id", "mkdir", "mktemp"]
TOOLS += ["rm", "sed", "sha256sum", "sleep", "sort", "tail", "tee", "touch", "find"]

# Answers as a Python does that set-up would take; makes a .venv whose Python is the stub below.
BASE_PYTHON = """#!/usr/bin/env bash
echo "base $*" >>"$LOG"
if [[ "$1" == -c && "$2" == *print* ]]; then echo 3.11; fi
if [[ "$1" == -c && "$2" == *ensurepip* && -e "$MACHINE/no-venv" ]]; then exit 1; fi
if [[ "$1 $2" == "-m venv" ]]; then
    rm -rf "$4" && mkdir -p "$4/bin" && cat "$MACHINE/venv-python" >"$4/bin/python" && chmod +x "$4/bin/python"
fi
exit 0
"""
VENV_PYTHON = """#!/usr/bin/env bash
echo "venv $*" >>"$LOG"
case "$*" in
*"sys.exit(sys.version_info"*) exit 1 ;;
*stage.py*) exec "$MACHINE/real-python" "$@" ;;
"- robot_openvla_tiny"*) echo "6 2" ;;
"- robot_openvla"*) echo 6 ;;
*robofactory.evaluation*)
    folder="$ROBOFACTORY_HOME/results/openvla/LiftBarrier-rf_6/epoch_8"
    mkdir -p "$folder" && touch "$folder/report.html"
    ;;
*robofactory.training*) [[ ! -e "$MACHINE/training-fails" ]] || exit 7 ;;
-) [[ -e "$MACHINE/renders" ]] || { echo "RuntimeError: no driver" && exit 1; } ;;
*"pip install"*)
    [[ ! -e "$MACHINE/pip-is-slow" ]] || sleep 2
    echo "Collecting torch" && echo "ERROR: no network here" && [[ ! -e "$MACHINE/pip-fails" ]]
    ;;
esac
"""
APT_GET = """#!/usr/bin/env bash
echo "apt-get $*" >>"$LOG"
case "$*" in
*"Codename:"*) echo "http://mirror.test/debian/|$MACHINE/debian.sources:1" ;;
*indextargets*) echo bookworm ;;
*install*) touch "$MACHINE/renders" ;;
esac
"""
APT_CACHE = """#!/usr/bin/env bash
[[ "$1" == -t ]] && version="$(cat "$MACHINE/backport")" || version="$(cat "$MACHINE/candidate")"
printf 'mesa-vulkan-drivers:\\n  Installed: (none)\\n  Candidate: %s\\n' "$version"
"""
TEE = """#!/usr/bin/env bash
[[ "$1" == /etc/* ]] && exec cat >"$MACHINE/written"
exec "$MACHINE/real-tee" "$@"
"""


class Machine:
    """A copy of the scripts in a directory of its own, and a PATH that holds stubs and harmless tools alone."""

    def __init__(self, directory: Path):
        self.home, self.path, self.state = directory / "robo factory", directory / "bin", directory / "machine"
        for folder in (self.home / "runs", self.path, self.state):
            folder.mkdir(parents=True)
        for name in (*SCRIPTS, "setup.sh", "runs/stage.py", "pyproject.toml", "constraints.txt"):
            shutil.copy(ROOT / name, self.home / name)
        self.log = directory / "log"
        for tool in TOOLS:
            (self.path / tool).symlink_to(shutil.which(tool) or f"/bin/{tool}")
        (self.state / "real-tee").symlink_to(shutil.which("tee") or "/usr/bin/tee")
        (self.state / "real-python").symlink_to(sys.executable)
        (self.state / "venv-python").write_text(VENV_PYTHON)
        for name, text in {"python3.11": BASE_PYTHON, "apt-get": APT_GET, "apt-cache": APT_CACHE, "tee": TEE}.items():
            self.stub(name, text)
        (self.state / "renders").touch()
        self.is_debian("debian", "bookworm", candidate="22.3.6-1+deb12u2", backport="25.0.7-2~bpo12+1")

    def stub(self, name: str, text: str) -> None:
        (self.path / name).unlink(missing_ok=True)
        (self.path / name).write_text(text)
        (self.path / name).chmod(0o755)

    def is_debian(self, distribution: str, codename: str, candidate: str, backport: str = "(none)") -> None:
        (self.state / "os-release").write_text(f"ID={distribution}\nVERSION_CODENAME={codename}\n")
        (self.state / "candidate").write_text(candidate)
        (self.state / "backport").write_text(backport)
        (self.state / "debian.sources").write_text("Types: deb\nSigned-By: /usr/share/keyrings/debian.gpg\n")

    def is_somebody(self, user_id: int) -> None:
        self.stub("id", f"#!/usr/bin/env bash\necho {user_id}\n")

    def start(self, *command: str | Path, cwd: Path | None = None) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [self.path / "bash", *command],
            env={
                "PATH": str(self.path),
                "LOG": str(self.log),
                "MACHINE": str(self.state),
                "HOME": "/nonexistent",
                "ROBOFACTORY_HOME": str(self.home / "robofactory"),
            },
            cwd=cwd or self.home,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str | Path, cwd: Path | None = None) -> "subprocess.CompletedProcess[str]":
        process = self.start(*command, cwd=cwd)
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    @property
    def setting_up(self) -> tuple[str, str]:
        source = f'set -euo pipefail; source ./setup.sh; os_release="{self.state}/os-release"; set_up; echo complete'
        return "-c", source

    def set_up(self) -> "subprocess.CompletedProcess[str]":
        return self.run(*self.setting_up)

    def calls(self, word: str) -> list[str]:
        """Of the stubs, since the last time this was asked for."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        return [line for line in lines if word in line]

    def forget(self) -> None:
        self.log.unlink(missing_ok=True)


@pytest.fixture
def machine(tmp_path) -> Machine:
    return Machine(tmp_path)


@pytest.fixture
def ready(machine) -> Machine:
    done = machine.set_up()
    assert done.returncode == 0, done.stderr
    machine.forget()
    return machine


# ---------------------------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_answers_without_any_set_up(script, tmp_path):
    """On a machine with a bare Python: `python3 -S -I` has no packages to import."""
    for name in (*SCRIPTS, "setup.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / "robofactory").symlink_to(ROOT / "robofactory")
    bare = tmp_path / "bin" / "python3.11"
    bare.parent.mkdir()
    bare.write_text(f'#!/usr/bin/env bash\nexec "{sys.executable}" -S "$@"\n')
    bare.chmod(0o755)
    environment = {"PATH": f"{bare.parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
    command = ["bash", str(tmp_path / script), "--task", "LiftBarrier-rf", "--help"]
    done = subprocess.run(command, env=environment, cwd="/", capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert Path(script).name in done.stdout
    assert not (tmp_path / ".venv").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_says_something_where_there_is_no_python(script, machine):
    (machine.path / "python3.11").unlink()
    done = machine.run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert script in done.stdout


@pytest.mark.parametrize("script", [*SCRIPTS, "setup.sh", ".ci/run"])
def test_scripts_are_clean(script):
    assert subprocess.run(["bash", "-n", str(ROOT / script)]).returncode == 0
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", "-x", script], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


# -------------------------------------------------------------------------------------------------------------- set-up


def test_set_up_installs_the_pinned_versions_once(machine):
    done = machine.set_up()
    assert done.stdout.endswith("complete\n"), done.stderr
    (install,) = machine.calls("pip install")
    assert f"-c {machine.home}/constraints.txt -e {machine.home}[sim,imports,dev]" in install
    machine.forget()
    again = machine.set_up()
    assert again.stdout == "complete\n", "the second run has nothing to say"
    assert not machine.log.exists(), "the second run calls nothing"


def test_set_up_follows_a_changed_constraint_without_starting_over(ready):
    with (ready.home / "constraints.txt").open("a") as file:
        file.write("numpy==9.9\n")
    assert ready.set_up().returncode == 0
    assert len(ready.calls("pip install")) == 1
    assert not ready.calls("venv --clear"), "what is installed stays"


def test_a_set_up_that_was_cut_off_starts_over(ready):
    """A package of which half is there passes for a whole one with pip."""
    (ready.home / ".venv" / "set-up").unlink()
    (ready.home / ".venv" / "set-up-is-unfinished").touch()
    assert ready.set_up().returncode == 0
    assert ready.calls("venv --clear")
    assert not (ready.home / ".venv" / "set-up-is-unfinished").exists()


def test_a_moved_checkout_is_installed_again(ready):
    ready.home = ready.home.rename(ready.home.with_name("elsewhere"))
    assert ready.set_up().returncode == 0
    assert ready.calls("pip install")


def test_a_failed_install_shows_why_and_heals(machine):
    (machine.state / "pip-fails").touch()
    failed = machine.set_up()
    assert failed.returncode == 2
    assert "ERROR: no network here" in failed.stderr
    assert "run the same command again" in failed.stderr
    (machine.state / "pip-fails").unlink()
    assert machine.set_up().returncode == 0


def test_ctrl_c_while_installing_is_one_line_and_heals(machine):
    (machine.state / "pip-is-slow").touch()
    process = machine.start(*machine.setting_up)
    while not machine.calls("pip install"):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of them
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.strip() == "interrupted; the same command continues"
    machine.forget()
    assert machine.set_up().returncode == 0
    assert machine.calls("venv --clear")


def test_two_terminals_set_up_once(machine):
    (machine.state / "pip-is-slow").touch()
    processes = [machine.start(*machine.setting_up) for _ in range(2)]
    said = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert len(machine.calls("pip install")) == 1
    assert sum("waiting for another one" in text for text in said) == 1


def test_no_python_is_one_line_with_the_command(machine):
    (machine.path / "python3.11").unlink()
    done = machine.set_up()
    assert done.returncode == 2
    assert done.stderr.startswith("error: no Python 3.11")
    assert "apt-get install python3 python3-venv" in done.stderr


def test_no_venv_is_one_line_with_the_command(machine):
    (machine.state / "no-venv").touch()
    done = machine.set_up()
    assert done.returncode == 2
    assert "apt-get install python3.11-venv" in done.stderr


def test_a_newer_python_goes_without_the_package_that_has_no_release_for_it(machine):
    """ManiSkill 3.0.1 asks for mplib 0.1.1, which ends at Python 3.12; Debian 13 has 3.13."""
    stub = machine.state / "venv-python"
    stub.write_text(stub.read_text().replace('"sys.exit(sys.version_info"*) exit 1 ;;', '"never"*) exit 1 ;;'))
    assert machine.set_up().returncode == 0
    everything = (machine.home / ".venv" / "everything.txt").read_text()
    assert "mplib" not in everything
    assert "sapien==" in everything
    assert any("--no-deps" in call and "mani_skill" in call for call in machine.calls("pip install"))


# -------------------------------------------------------------------------------------------------------------- driver


def test_no_driver_is_installed_where_one_renders(machine):
    machine.set_up()
    assert not machine.calls("apt-get")


def test_debian_12_takes_the_driver_from_backports_of_its_own_mirror(machine):
    (machine.state / "renders").unlink()
    done = machine.set_up()
    assert done.returncode == 0, done.stderr
    (install,) = machine.calls("apt-get install")
    assert "-t bookworm-backports mesa-vulkan-drivers" in install
    assert (machine.state / "written").read_text().splitlines() == [
        "Types: deb",
        "URIs: http://mirror.test/debian/",
        "Suites: bookworm-backports",
        "Components: main",
        "Signed-By: /usr/share/keyrings/debian.gpg",
    ]
    machine.forget()
    machine.set_up()
    assert not machine.log.exists(), "the answer is remembered"


@pytest.mark.parametrize(
    ("distribution", "codename", "candidate"),
    [
        ("debian", "trixie", "25.0.7-2"),
        ("ubuntu", "plucky", "25.0.3-1"),
        ("ubuntu", "noble", "25.0.7-0ubuntu0.24.04.1"),
    ],
)
def test_newer_systems_take_the_driver_from_their_own_suite(machine, distribution, codename, candidate):
    machine.is_debian(distribution, codename, candidate)
    (machine.state / "renders").unlink()
    assert machine.set_up().returncode == 0
    (install,) = machine.calls("apt-get install")
    assert "-t " not in install
    assert not (machine.state / "written").exists()


def test_a_system_with_too_old_a_driver_is_told(machine):
    machine.is_debian("ubuntu", "jammy", candidate="23.2.1-1ubuntu3.1")
    (machine.state / "renders").unlink()
    done = machine.set_up()
    assert done.returncode == 2
    assert "ubuntu jammy offers Mesa 23.2.1-1ubuntu3.1; 24.3 is needed" in done.stderr
    assert not machine.calls("apt-get install")


def test_without_root_or_sudo_the_exact_commands_are_shown(machine):
    machine.is_somebody(1000)
    (machine.state / "renders").unlink()
    done = machine.set_up()
    assert done.returncode == 2
    for line in ("URIs: http://mirror.test/debian/", "apt-get update", "apt-get install -t bookworm-backports mesa"):
        assert line in done.stderr
    assert not machine.calls("apt-get install")


def test_with_sudo_the_driver_is_installed_by_it(machine):
    machine.is_somebody(1000)
    machine.stub("sudo", '#!/usr/bin/env bash\necho "sudo $*" >>"$LOG"\n[[ "$1" == -n ]] && exit 0\nexec "$@"\n')
    (machine.state / "renders").unlink()
    done = machine.set_up()
    assert done.returncode == 0, done.stderr
    assert any("apt-get install" in call for call in machine.calls("sudo "))


def test_a_driver_that_still_does_not_render_is_told(machine):
    machine.stub("apt-get", APT_GET.replace('touch "$MACHINE/renders"', ":"))
    (machine.state / "renders").unlink()
    done = machine.set_up()
    assert done.returncode == 2
    assert "rendering still fails" in done.stderr


# ------------------------------------------------------------------------------------------------------------ the doors


def test_train_is_one_python_line(ready, tmp_path):
    done = ready.run(ready.home / "train.sh", "--task", "T", "a.b=c d", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert ready.calls("") == ["venv -m robofactory.training.train --task T a.b=c d"]


def test_a_machine_that_was_given_demonstrations_trains_without_a_driver(machine):
    (machine.state / "renders").unlink()
    meta = machine.home / "robofactory" / "data" / "T_Agent0_9" / "meta"
    meta.mkdir(parents=True)
    (meta / "info.json").touch()
    assert machine.run("train.sh", "--task", "T").returncode == 0
    assert machine.calls("robofactory.training.train")
    assert not machine.calls("apt-get")


def test_eval_is_one_python_line(ready):
    ready.run("eval.sh", "--task", "T", "--checkpoint", "epoch_300")
    assert ready.calls("") == ["venv -m robofactory.evaluation.evaluate --task T --checkpoint epoch_300"]


def test_the_exit_code_of_the_command_is_the_scripts(ready):
    stub = ready.home / ".venv" / "bin" / "python"
    stub.write_text("#!/usr/bin/env bash\nexit 130\n")
    assert ready.run("train.sh", "--task", "T").returncode == 130


@pytest.mark.parametrize("arguments", [["--episods", "3"], ["--num"], ["--episodes", "many"]])
def test_the_laptop_run_refuses_what_it_does_not_know(ready, arguments):
    done = ready.run("runs/laptop.sh", *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert not ready.log.exists()


def test_the_laptop_run_is_the_pipeline_in_order(ready):
    done = ready.run("runs/laptop.sh", "--num", "6", "--episodes", "2", "training.num_epochs=1")
    assert done.returncode == 0, done.stderr
    evaluate = "venv -m robofactory.evaluation.evaluate --policy openvla --task LiftBarrier-rf --data_num 6 "
    evaluate += "--checkpoint latest --episodes 2"
    recipe = "--task LiftBarrier-rf --recipe robot_openvla_tiny data.num_episodes=6 training.num_epochs=1"
    record = f"venv -m robofactory.demos.record {recipe}"
    train = f"venv -m robofactory.training.train --policy openvla --all_agents --resume {recipe}"
    assert ready.calls("venv -m") == [
        record,
        train,
        f"{record} --round 1",
        f"{train} --round 1",
        f"{record} --round 2",
        f"{train} --round 2",
        evaluate,
        f"{evaluate} --partner expert --agent_id 0",
        f"{evaluate} --partner expert --agent_id 1",
    ]
    table = done.stdout.partition("== all stages")[2]
    assert table.count("GB of memory") == 9
    report = ready.home / "robofactory/results/openvla/LiftBarrier-rf_6/epoch_8/report.html"
    assert done.stdout.endswith(f"curves and videos: {report}\n")


def test_the_laptop_run_stops_at_the_stage_that_failed(ready):
    (ready.state / "training-fails").touch()
    done = ready.run("runs/laptop.sh")
    assert done.returncode == 7
    assert "exit code 7" in done.stdout
    assert not ready.calls("robofactory.evaluation")


def test_the_7b_run_is_the_same_pipeline_on_gpus(ready):
    done = ready.run("runs/openvla_7b.sh", "--gpus", "8", "--episodes", "2", "model.lora_rank=16")
    assert done.returncode == 0, done.stderr
    assert "venv - robot_openvla model.lora_rank=16" in ready.calls("venv - ")
    run = "venv -m robofactory.training.train"
    train = [f"{run} --policy openvla --task LiftBarrier-rf --agent_id {agent} --gpus 8 --resume model.lora_rank=16" for agent in (0, 1)]  # fmt: skip
    assert ready.calls("venv -m") == [  # training records, once it knows that the hardware is there
        *train,
        "venv -m robofactory.evaluation.evaluate --policy openvla --task LiftBarrier-rf --data_num 6 "
        "--checkpoint latest --episodes 2",
    ]


@pytest.mark.parametrize("arguments", [["--gpu", "3"], ["--gpus"], ["--gpus", "none"]])
def test_the_7b_run_refuses_what_it_does_not_know(ready, arguments):
    done = ready.run("runs/openvla_7b.sh", *arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert not ready.log.exists()


# ------------------------------------------------------------------------------------------------------- one command


def robofactory(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`robofactory ...` on a bare Python: -S leaves site-packages away."""
    command = [sys.executable, "-S", "-m", "robofactory", *arguments]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": ""}, capture_output=True, text=True)


@pytest.mark.parametrize("arguments", [[], ["--help"]])
def test_the_command_names_its_stages(arguments):
    done = robofactory(*arguments)
    assert done.returncode == 0
    for stage in STAGES:
        assert f"\n  {stage} " in done.stdout


@pytest.mark.parametrize("stage", STAGES)
def test_each_stage_has_its_own_help(stage):
    done = robofactory(stage, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"usage: robofactory {stage} ")


def test_an_unknown_stage_names_the_one_that_was_meant():
    done = robofactory("evalute")
    assert done.returncode == 2
    assert done.stderr == (
        f"error: unknown stage 'evalute' (did you mean 'evaluate'?); there are {', '.join(STAGES)}\n"
    )


# --------------------------------------------------------------------------------------------------- time and memory


def test_a_stage_is_measured_with_all_its_processes(tmp_path):
    """Two children hold 100 MB each: the peak of the stage is their sum, not the largest."""
    child = "import subprocess, sys, time; b = bytearray(b'x') * 100_000_000; time.sleep(4.5)"
    parent = f"import subprocess, sys; p = [subprocess.Popen([sys.executable, '-c', {child!r}]) for _ in range(2)]; [c.wait() for c in p]"
    summary = tmp_path / "summary"
    command = [sys.executable, str(ROOT / "runs/stage.py"), str(summary), "both", sys.executable, "-c", parent]
    assert subprocess.run(command, capture_output=True).returncode == 0
    line = summary.read_text()
    assert line.startswith("both ")
    assert "at most 0.2 GB" in line


def test_a_failed_stage_ends_with_its_own_exit_code(tmp_path):
    command = [sys.executable, str(ROOT / "runs/stage.py"), str(tmp_path / "summary"), "bad", "bash", "-c", "exit 7"]
    assert subprocess.run(command, capture_output=True).returncode == 7
