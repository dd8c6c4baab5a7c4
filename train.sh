#!/usr/bin/env bash
# Train an OpenVLA policy for one agent of a task, or for all of them; the first time this sets everything up.
#
#   bash train.sh --policy openvla --task LiftBarrier-rf --agent_id 0 --recipe robot_openvla_tiny    a laptop's CPU
#   bash train.sh --policy openvla --task LiftBarrier-rf --agent_id 0 --gpus 8                       the 7B
#
# All options: bash train.sh --help

set -euo pipefail
# shellcheck source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
answer_help robofactory.training.train "$@"

# Only recording demonstrations renders: a machine that was given some needs no graphics driver.
if compgen -G "$home/data/*_Agent*/meta/info.json" >/dev/null; then
    set_up_without_renderer
else
    set_up
fi

exec "$python" -m robofactory.training.train "$@"
