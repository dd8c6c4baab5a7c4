#!/usr/bin/env bash
# The same road with the real model, on GPUs: demonstrations -> openvla-7b fine-tuned for each agent -> both play -> a report.
#
#   bash runs/openvla_7b.sh [--gpus N] [--episodes N] [section.key=value ...]
#
#   --gpus N             a process on each; every agent is trained on all of them, one after the other (default: 1)
#   --episodes N         of the evaluation, on seeds that no demonstration has (default: 50)
#   section.key=value    overrides the recipe robot_openvla, for instance model.model_name=/my/openvla-7b
#
# GPUs of 40 GB or more; the demonstrations and the evaluation render. What is complete is kept: the same command continues.

set -euo pipefail
# shellcheck source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
answer_help "" "$@"

task=LiftBarrier-rf gpus=1 episodes=50 overrides=()
while (($#)); do
    case "$1" in
    --gpus | --episodes)
        (($# >= 2)) || stop "$1 needs a value; see bash runs/openvla_7b.sh --help"
        [[ "$2" =~ ^[1-9][0-9]*$ ]] || stop "$1 takes a number of at least 1, not '$2'"
        case "$1" in --gpus) gpus="$2" ;; --episodes) episodes="$2" ;; esac
        shift 2
        ;;
    *=*) overrides+=("$1") && shift ;;
    *) stop "unknown option $1; see bash runs/openvla_7b.sh --help" ;;
    esac
done

set_up
num="$(
    "$python" - robot_openvla "${overrides[@]}" <<'PYTHON'
import sys

from robofactory.config import load_recipe
from robofactory.errors import run_command

run_command(lambda: print(load_recipe(sys.argv[1], sys.argv[2:]).data.num_episodes))
PYTHON
)"

# ---- demonstrations where there are none, and a policy for each agent
for agent in 0 1; do
    bash "$root/train.sh" --policy openvla --task "$task" --agent_id "$agent" --gpus "$gpus" --resume "${overrides[@]}"
done

# ---- how often they lift the barrier together
bash "$root/eval.sh" --policy openvla --task "$task" --data_num "$num" --checkpoint latest --episodes "$episodes"
