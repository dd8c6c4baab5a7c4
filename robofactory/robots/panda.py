"""Franka Emika's Panda with its two-finger hand, as ManiSkill simulates it."""

from robofactory.robots import Robot

ROBOT = Robot(
    uid="panda",
    joint_names=tuple(f"panda_joint{i}" for i in range(1, 8)),
    gripper_closed_m=-0.01,
    gripper_open_m=0.04,
    control_mode="pd_joint_pos",
    finger_links=("panda_leftfinger", "panda_rightfinger"),
    tcp_link="panda_hand_tcp",
    fine_links=("hand", "finger"),
)
