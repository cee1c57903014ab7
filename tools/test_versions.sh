#!/usr/bin/env bash
# Runs the tests with the oldest or the newest releases of all dependencies, in an environment of their own:
#
#     tools/test_versions.sh oldest [pytest's arguments]
#     tools/test_versions.sh newest tests/test_canaries.py
#
# The oldest are the lower bounds in pyproject.toml. ENVIRONMENT=path takes another folder than .venv-oldest.
set -euo pipefail
cd "$(dirname "$0")/.."

which="${1:-}"
case "$which" in oldest|newest) shift ;; *) echo "Say which: tools/test_versions.sh oldest|newest" >&2; exit 2 ;; esac
environment="${ENVIRONMENT:-.venv-$which}"
python="$environment/bin/python"
pip=("$python" -m pip install --quiet --disable-pip-version-check)

test -x "$python" || "${PYTHON:-python3}" -m venv "$environment"
if [ "$which" = oldest ]; then
    "${pip[@]}" packaging
    "$python" tools/lowest_versions.py dev > "$environment/constraints.txt"
    "${pip[@]}" --constraint "$environment/constraints.txt" --editable '.[dev]'
else
    "${pip[@]}" --upgrade --upgrade-strategy eager --editable '.[dev]'
    # trackio, of the tests, holds Pillow back; users who do without it get the newest.
    "${pip[@]}" --upgrade --no-deps pillow
fi
"$python" -m pip freeze --exclude-editable | grep -iE '^(trl|transformers|accelerate|datasets|peft|torch|pillow|numpy)=='
"$python" -m pytest --numprocesses "${NUMPROCESSES:-2}" --dist loadfile "$@"
