import pytest
from worker_samples import (
    fail_to_set_up,
    play_all_well,
    play_with_trouble,
    refuse_the_checkpoint,
    refuse_the_observation,
)

from robofactory.config import UserError
from robofactory.evaluation.results import CRASH, FAILURE, SUCCESS
from robofactory.evaluation.workers import play_episodes


def test_every_seed_is_played_once_by_any_number_of_workers():
    assert sorted(episode.seed for episode in play_episodes(play_all_well, range(5), 2)) == [0, 1, 2, 3, 4]


def test_an_exception_and_a_dying_process_are_crashes_and_do_not_stop_the_others(capfd):
    episodes = {episode.seed: episode for episode in play_episodes(play_with_trouble, range(5), 1)}
    assert {seed: e.outcome for seed, e in episodes.items()} == {
        0: SUCCESS, 1: CRASH, 2: FAILURE, 3: CRASH, 4: SUCCESS
    }  # fmt: skip
    assert episodes[1].reason == "RuntimeError: the simulator exploded"
    assert episodes[3].reason == "the process died (killed by SIGSEGV)"
    assert "Traceback" in capfd.readouterr().err, "where an episode crashed has to be findable"


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        (fail_to_set_up, "could not be set up: RuntimeError: no Vulkan device"),
        (refuse_the_checkpoint, "^modules.safetensors cannot be read$"),
        (refuse_the_observation, "^the observation has no view 'wrist'$"),
    ],
)
def test_what_fails_for_every_episode_stops_the_evaluation_with_one_line(setup, message):
    with pytest.raises(UserError, match=message):
        list(play_episodes(setup, range(3), 1))
