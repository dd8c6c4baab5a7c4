"""W&B is on where there is a login, and a run that goes on is one run there too."""

import wandb

from robofactory.training import log


def test_a_login_in_netrc_turns_it_on_and_a_resumed_run_goes_on_in_its_own(tmp_path, monkeypatch):
    """Only the environment was asked, while `wandb login` writes netrc; and every resume was a run of its own."""
    started = []
    monkeypatch.setattr(wandb, "init", lambda **given: started.append(given))
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    netrc = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(netrc))
    log._start_wandb(tmp_path, {})
    netrc.write_text(f"machine api.wandb.ai login user password {'0' * 40}\n")
    netrc.chmod(0o600)
    log._start_wandb(tmp_path, {})
    (tmp_path / "latest").mkdir()
    log._start_wandb(tmp_path, {})
    assert [given["mode"] for given in started] == ["offline", "online", "online"]
    first, second, third = (given["id"] for given in started)
    assert first != second == third, "a run that never got to a checkpoint starts over"
    assert {given["resume"] for given in started} == {"allow"}
