"""The documentation says what the code does: generated pages are up to date, links lead somewhere, examples run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
RUNS_IN_CI = re.compile(r"<!-- runs in CI -->\n```bash\n(.*?)```", re.DOTALL)


def test_commands_and_settings_are_those_of_the_code():
    """`python docs/generate.py` was run after the last change of an option, a setting or their explanation."""
    check = [sys.executable, "docs/generate.py", "--check"]
    done = subprocess.run(check, cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES], ids=lambda page: page.name)
def test_links_lead_to_files_that_are_there(page: Path):
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
        assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_site_builds_strictly(tmp_path: Path):
    """Broken links and anchors fail it."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    done = subprocess.run([sys.executable, "-m", "zensical", "build", "--strict"], cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "out" / "site" / "settings" / "index.html").is_file()


def test_the_readme_fits_on_a_page():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.slow
@pytest.mark.sim
@pytest.mark.parametrize("page", [page for page in PAGES if RUNS_IN_CI.search(page.read_text(encoding="utf-8"))], ids=lambda page: page.stem)  # fmt: skip
def test_the_examples_of_a_page_run_one_after_the_other(page: Path, tmp_path: Path):
    """As written, but for where data lies: `robofactory/data` is below a home of the test's own."""
    blocks = RUNS_IN_CI.findall(page.read_text(encoding="utf-8"))
    script = "set -e\n" + "\n".join(blocks).replace(" robofactory/data/", f" {tmp_path}/data/")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"ROBOFACTORY_HOME": str(tmp_path), "WANDB_MODE": "disabled", "PATH": path}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
