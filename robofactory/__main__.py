"""`robofactory STAGE ...`: names the stages of the pipeline and hands over to their files; nothing else."""

import runpy
import sys

from robofactory.errors import UserError, did_you_mean, run_command

STAGES = {
    "record": ("robofactory.demos.record", "expert demonstrations in simulation, one dataset for each agent"),
    "import": ("robofactory.data.imports", "your own data: RoboFactory, ManiSkill, LeRobot, RLDS"),
    "inspect": ("robofactory.data.inspect", "what a dataset holds, and what is wrong with it"),
    "summary": ("robofactory.model.summary", "parameters and tokens of the 7B, without its weights"),
    "memory": ("robofactory.training.memory", "predict the GPU memory of training, propose what fits a card"),
    "train": ("robofactory.training.train", "train a policy on the demonstrations of one agent, or of each"),
    "evaluate": (
        "robofactory.evaluation.evaluate",
        "play the task with trained policies: success, videos, report",
    ),
    "compare": ("robofactory.evaluation.compare", "two evaluations on the same seeds: which is better, and how sure"),
    "merge": ("robofactory.export.merge", "a fine-tuned policy as published weights: adapters merged"),
    "preview": ("robofactory.sim.env", "a picture of what every camera of a scene sees"),
}


def main() -> None:
    run_command(run_stage)


def run_stage() -> None:
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: robofactory STAGE ...\n\nThe stages, in the order data flows:\n")
        for name, (_, what) in STAGES.items():
            print(f"  {name:<10}{what}")
        print("\nEach has its own help, for instance: robofactory record --help")
        return
    name, *rest = arguments
    if name not in STAGES:
        raise UserError(f"unknown stage {name!r}{did_you_mean(name, STAGES)}; there are {', '.join(STAGES)}")
    module, _ = STAGES[name]
    sys.argv = [f"robofactory {name}", *rest]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
