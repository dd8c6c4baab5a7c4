"""LiftBarrier-rf: two arms lift a barrier by both ends of its rail, level, and hold it."""

from robofactory.sim.task import Disturbances, Task, own_scene
from robofactory.sim.tasks.lift_barrier.stages import STAGES, LiftBarrierProgress

TASK = Task(
    name="LiftBarrier-rf",
    num_agents=2,
    environment="robofactory.sim.tasks.lift_barrier.environment:LiftBarrierEnv",
    expert="robofactory.sim.tasks.lift_barrier.expert:LiftBarrierExpert",
    objects=("barrier",),
    success=("lift_height_m", "max_tilt_deg", "min_finger_force_n", "hold_steps", "robofactory_height_m"),
    stages=STAGES,
    progress=LiftBarrierProgress,
    scene=own_scene("lift_barrier"),
    secondary={"success_robofactory": "RoboFactory's test"},
    flags=("reached", "lifted", "level"),
    # The expert succeeded in 60 of 60 disturbed episodes, in 70 steps on average (126 at most). With pushes of up to
    # 0.12 rad, a chance of 0.06 in a step and no last step: 36 of 50, in 117 steps.
    disturbances=Disturbances(),
)
