#!/usr/bin/env bash
# The whole road on a CPU: expert demonstrations -> two policies -> what the expert says to their own attempts -> more
# training on that -> both play together -> a report.
#
#   bash runs/laptop.sh [--recipe NAME] [--num N] [--episodes N] [section.key=value ...]
#
#   --recipe NAME        model and training, robofactory/configs/NAME.yaml (default: robot_openvla_tiny)
#   --num N              demonstrations (default: the recipe's data.num_episodes)
#   --episodes N         of each evaluation, on seeds that no demonstration has (default: 50)
#   section.key=value    overrides the recipe, for instance training.num_epochs=4
#
# About 40 minutes on 2 cores with bfloat16 instructions, an hour and more without; less than 4 GB of memory. What is
# complete is kept: after an interruption the same command continues, and once all is done it only shows where the report
# is. $ROBOFACTORY_HOME moves all it writes elsewhere.

set -euo pipefail
# shellcheck source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../setup.sh"
answer_help "" "$@"

task=LiftBarrier-rf recipe=robot_openvla_tiny episodes=50 overrides=()
while (($#)); do
    case "$1" in
    --recipe | --num | --episodes)
        (($# >= 2)) || stop "$1 needs a value; see bash runs/laptop.sh --help"
        case "$1" in
        --recipe) recipe="$2" ;;
        --num) overrides+=("data.num_episodes=$2") ;;
        --episodes) episodes="$2" ;;
        esac
        shift 2
        ;;
    *=*) overrides+=("$1") && shift ;;
    *) stop "unknown option $1; see bash runs/laptop.sh --help" ;;
    esac
done
[[ "$episodes" =~ ^[1-9][0-9]*$ ]] || stop "--episodes takes a number of at least 1, not '$episodes'"

SECONDS=0
set_up
summary="$(mktemp)"
trap 'rm -f "$summary"' EXIT
stage() { # name module arguments...
    printf '\n== %s\n' "$1"
    "$python" "$root/runs/stage.py" "$summary" "$1" "$python" -m "${@:2}"
}

numbers="$(
    "$python" - "$recipe" "${overrides[@]}" <<'PYTHON'
import sys

from robofactory.config import load_recipe
from robofactory.errors import run_command


def main() -> None:
    recipe = load_recipe(sys.argv[1], sys.argv[2:])
    print(recipe.data.num_episodes, recipe.relabel.num_rounds if recipe.relabel else 0)


run_command(main)
PYTHON
)"
read -r num num_rounds <<<"$numbers"

# ---- demonstrations, and a policy for each agent; then, by rounds, the expert relabels where they got to, and they
# ---- learn from that
as_the_recipe_says=(--task "$task" --recipe "$recipe" "${overrides[@]}")
record=(robofactory.demos.record "${as_the_recipe_says[@]}")
train=(robofactory.training.train --policy openvla --all_agents --resume "${as_the_recipe_says[@]}")
stage "demonstrations" "${record[@]}"
stage "training, both agents" "${train[@]}"
for ((round = 1; round <= num_rounds; round++)); do
    stage "relabelling, round $round" "${record[@]}" --round "$round"
    stage "training, round $round" "${train[@]}" --round "$round"
done

# ---- how often they lift the barrier: together, and each beside the expert
play=(robofactory.evaluation.evaluate --policy openvla --task "$task" --data_num "$num" --checkpoint latest
    --episodes "$episodes")
stage "both policies together" "${play[@]}"
stage "agent 0 beside the expert" "${play[@]}" --partner expert --agent_id 0
stage "agent 1 beside the expert" "${play[@]}" --partner expert --agent_id 1

printf '\n== all stages, %d min %d s with set-up\n' $((SECONDS / 60)) $((SECONDS % 60))
cat "$summary"
report="$(find "$home/results/openvla/${task}_$num" -mindepth 2 -name report.html -printf '%T@ %p\n' | sort -n | tail -n 1)"
printf '\nThe report, with curves and videos: %s\n' "${report#* }"
