#!/usr/bin/env bash
# Lint, types and tests; sets everything up the first time.
#
#   bash test.sh                      what must pass before a commit, about 9 minutes on 2 cores
#   bash test.sh --all                and the whole pipeline at small size
#   bash test.sh tests/codec -k bins  what else is given goes to pytest

set -euo pipefail
# shellcheck source=setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
answer_help "" "$@"

options=() with_slow=0
for argument in "$@"; do
    if [[ "$argument" == --all ]]; then with_slow=1; else options+=("$argument"); fi
done
set_up
cd "$root"

run() { printf '\n$ %s\n' "$*" && "$python" -m "$@"; }
run ruff check
run ruff format --check
run pyright
export OMP_NUM_THREADS=1 # two tests at a time on two cores
if ((with_slow)); then # the tests of a file in their order, and first the file that takes longest
    ((${#options[@]})) || options=(tests/test_pipeline.py tests)
    run pytest -m "" -n 2 --dist loadfile --no-loadscope-reorder "${options[@]}"
else
    run pytest -n 2 "${options[@]}" # pyproject.toml leaves the slow ones out
fi
