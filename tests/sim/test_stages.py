import pytest

from robofactory.sim.task import find_task
from robofactory.sim.tasks.lift_barrier.stages import LiftBarrierProgress


def failed_at(*steps: dict[str, list[int]]) -> list[str]:
    progress = LiftBarrierProgress(2)
    for step in steps:
        progress.see({"reached": [0, 0], "held": [0, 0], "lifted": [0, 0], "level": [1]} | step)
    return progress.failed_at()


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([{}], ["never reached", "never reached"]),
        ([{"reached": [1, 0]}, {}], ["never held", "never reached"]),
        ([{"held": [1, 0]}, {"reached": [1, 0]}], ["dropped", "never reached"]),
        ([{"held": [1, 1]}], ["lifted too little", "lifted too little"]),
        ([{"held": [1, 1], "lifted": [1, 0]}], ["did its part", "lifted too little"]),
        # one end up and the other not is a tilt, and the fault of the other alone
        ([{"held": [1, 1], "lifted": [1, 0], "level": [0]}], ["did its part", "lifted too little"]),
        ([{"held": [1, 1], "lifted": [1, 1], "level": [0]}], ["tilted", "tilted"]),
        ([{"held": [1, 1], "lifted": [1, 1]}], ["too brief", "too brief"]),
        ([{"held": [1, 1], "lifted": [1, 1]}, {"held": [0, 1], "lifted": [0, 1]}], ["dropped", "did its part"]),
    ],
)
def test_each_agent_fails_at_the_stage_it_did_not_get_beyond(steps, expected):
    assert failed_at(*steps) == expected


def test_the_reason_names_those_who_did_not_do_their_part():
    assert find_task("LiftBarrier-rf").blame(["never held", "dropped"]) == "agent 0 never held it, agent 1 dropped it"
    assert find_task("LiftBarrier-rf").blame(["did its part", "lifted too little"]) == "agent 1 lifted it too little"
