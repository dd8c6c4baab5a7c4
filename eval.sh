#!/usr/bin/env bash
# Play a task in simulation with trained policies and report how often they succeed; sets everything up the first time.
#
#   bash eval.sh --policy openvla --task LiftBarrier-rf --checkpoint latest
#   bash eval.sh --policy openvla --task LiftBarrier-rf \
#       --config robofactory/configs/table/lift_barrier.yaml --checkpoint epoch_300
#
# All options: bash eval.sh --help

set -euo pipefail
# shellcheck source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
answer_help robofactory.evaluation.evaluate "$@"
set_up
exec "$python" -m robofactory.evaluation.evaluate "$@"
