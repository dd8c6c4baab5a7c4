"""Where everything lies, below `config.home`: datasets, runs, results; and how a checkpoint or published weights are found."""

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from robofactory.config import home, path_of
from robofactory.errors import UserError

MANIFEST = "manifest.json"  # of a checkpoint: a directory without it is none
LONGEST_NAME = 150  # bytes; file systems have 255, and something is put before and behind it


def require_name(name: str) -> str:
    """The name itself, of a task, policy, checkpoint or dataset, once it is known to be one directory's below its parent.

    Raises:
        UserError: it is empty or too long, begins or ends with a dot or a space, or has characters that are no part of a
            name, such as `/`.
    """
    odd = [c for c in name if unicodedata.category(c)[0] not in "LMN" and c not in "-_.+=@, "]
    if odd or not name or name[0] in ".- " or name[-1] in ". ":
        raise UserError(
            f"{name[:40]!r} is no name{f', because of {odd[0]!r}' if odd else ''}; "
            "letters, digits, - _ . + = @ , and spaces between them make one"
        )
    try:
        size = len(path_of(name).name.encode())
    except UnicodeEncodeError:
        size = LONGEST_NAME + 1
    if size > LONGEST_NAME:
        raise UserError(f"{name[:20]!r}... is too long for a name; it has {size} bytes and may have {LONGEST_NAME}")
    return name


def dataset_dir(task: str, agent_id: int, num_episodes: int) -> Path:
    return home() / "data" / f"{require_name(task)}_Agent{agent_id}_{num_episodes}"


def dataset_place(given: str) -> str:
    """The path or URL of a dataset that a recipe names: a name in robofactory/data, a path or a URL."""
    if "://" in given:
        return given
    return str(path_of(given) if "/" in given else home() / "data" / require_name(given))


def relabelled_dir(task: str, agent_id: int, num_episodes: int, round_number: int) -> Path:
    """Episodes that policies drove which were trained on so many demonstrations, up to the round before this one."""
    return home() / "data" / f"{require_name(task)}_Agent{agent_id}_{num_episodes}_relabelled_{round_number}"


def run_dir(policy: str, task: str, agent_id: int, num_episodes: int) -> Path:
    return home() / "checkpoints" / require_name(policy) / f"{require_name(task)}_Agent{agent_id}_{num_episodes}"


def results_dir(policy: str, task: str, num_episodes: int, checkpoint: str) -> Path:
    return home() / "results" / require_name(policy) / f"{require_name(task)}_{num_episodes}" / require_name(checkpoint)


def expert_results_dir(task: str) -> Path:
    return home() / "results" / "expert" / require_name(task)


def find_checkpoint(run: Path, checkpoint: str) -> Path:
    """The directory that `epoch_N`, `latest` or a path names.

    Raises:
        UserError: it is not there; the line lists the run's checkpoints, or says how to train one.
    """
    directory = path_of(checkpoint) if "/" in checkpoint else run / require_name(checkpoint)
    if directory.is_dir():
        return directory.resolve()
    if not run.is_dir():
        raise UserError(f"no trained policy in {run}; train it first: bash train.sh --help")
    names = sorted((path.parent.name for path in run.glob(f"[!.]*/{MANIFEST}")), key=lambda n: (len(n), n))
    raise UserError(f"no checkpoint {checkpoint!r}; {run} has {', '.join(names) or 'none'}")


def find_checkpoints(
    policy: str, task: str, agents: list[int], checkpoint: str, data_num: int | None
) -> dict[int, Path]:
    """The checkpoint directory of each agent that has to have one.

    Raises:
        UserError: one is missing, or it is not clear which is meant; the line lists what there is.
    """
    if "/" in checkpoint:
        if len(agents) > 1 and "{agent}" not in checkpoint:
            raise UserError(
                f"{checkpoint} is one directory for {len(agents)} agents; write {{agent}} where it has the agent's "
                "number, or evaluate one agent with --partner expert --agent_id K"
            )
        paths = {agent: path_of(checkpoint.replace("{agent}", str(agent))) for agent in agents}
        missing = [str(path) for path in paths.values() if not path.is_dir()]
        if missing:
            raise UserError(f"no checkpoint directory {missing[0]}")
        return {agent: path.resolve() for agent, path in paths.items()}
    data_num = find_data_num(policy, task, agents, data_num) if agents else 0
    return {agent: find_checkpoint(run_dir(policy, task, agent, data_num), checkpoint) for agent in agents}


def find_data_num(policy: str, task: str, agents: list[int], data_num: int | None) -> int:
    """The number of demonstrations that all these agents have policies from; `data_num` itself if it is given.

    Raises:
        UserError: an agent has no policy, or not from that many; several numbers are possible.
    """
    trained = {agent: trained_runs(policy, task, agent) for agent in agents}
    for agent, numbers in trained.items():
        if not numbers:
            command = f"bash train.sh --policy {policy} --task {task} --agent_id {agent}"
            raise UserError(f"agent {agent} of {task} has no trained policy; train it: {command}")
        if data_num not in (None, *numbers):
            have = ", ".join(map(str, numbers))
            raise UserError(f"--data_num {data_num}: agent {agent} of {task} has policies from {have} demonstrations")
    if data_num is not None:
        return data_num
    common = set.intersection(*(set(numbers) for numbers in trained.values()))
    if len(common) != 1:
        have = "; ".join(f"agent {agent}: {', '.join(map(str, numbers))}" for agent, numbers in trained.items())
        raise UserError(f"policies were trained on several numbers of demonstrations ({have}); choose with --data_num")
    return common.pop()


def trained_runs(policy: str, task: str, agent: int) -> list[int]:
    """The numbers of demonstrations that this agent's policies were trained on."""
    name = re.compile(rf"{re.escape(task)}_Agent{agent}_(\d+)")
    parent = run_dir(policy, task, agent, 0).parent
    matches = [name.fullmatch(path.name) for path in parent.iterdir()] if parent.is_dir() else []
    return sorted(int(match[1]) for match in matches if match)


def find_weights(model_name: str, files: Sequence[str] = ("*.json", "*.safetensors", "tokenizer.model")) -> Path:
    """The directory of a published model: `model_name` itself, or the hub's snapshot of that id.

    Args:
        files: patterns of what is fetched from the hub.
    Raises:
        UserError: it is no directory and the hub does not give it.
    """
    tiny = "train the small model instead with `--recipe robot_openvla_tiny`"
    directory = path_of(model_name)
    if (directory / "config.json").is_file():
        return directory
    if directory.is_dir():
        raise UserError(f"{directory} holds no published model: it has no config.json; {tiny}")
    from httpx import HTTPError
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

    try:
        return Path(snapshot_download(model_name, allow_patterns=list(files)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled, HTTPError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(
            f"no weights for model.model_name={model_name!r}: no such directory, and the hub says {reason!r}; "
            f"give a directory with the published weights, or {tiny}"
        ) from None
