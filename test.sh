#!/usr/bin/env bash
# Lint, types and tests; sets everything up the first time.
#
#   bash test.sh                      what must pass before a commit, about 5 minutes on 2 cores
#   bash test.sh --all                and the whole pipeline at small size
#   bash test.sh tests/codec -k bins  what else is given goes to pytest

set -euo pipefail
# shellcheck source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
answer_help "" "$@"

options=()
for argument in "$@"; do
    case "$argument" in
    --all) options+=(-m "slow or not slow") ;; # pyproject.toml leaves the slow ones out
    *) options+=("$argument") ;;
    esac
done
set_up
cd "$root"

run() { printf '\n$ %s\n' "$*" && "$python" -m "$@"; }
run ruff check
run ruff format --check
run pyright
export OMP_NUM_THREADS=1 # two tests at a time on two cores
run pytest -n 2 --dist loadgroup "${options[@]}"
