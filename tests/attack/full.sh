#!/usr/bin/env bash
# All of the attack, which `pytest -m slow` runs a seeded tenth of. Prints the figures at the end.
set -euo pipefail

cd "$(dirname "$0")/../.."
figures=$(mktemp)
trap 'rm -f "$figures"' EXIT
export MMCHAT_ATTACK="${MMCHAT_ATTACK:-1}" MMCHAT_ATTACK_FIGURES="$figures"
failed=0
pytest -m slow tests/attack "$@" || failed=$?
python - "$figures" <<'PYTHON'
import json
import sys
from collections import Counter

sums, most = Counter(), 0.0
for line in open(sys.argv[1]):
    found = json.loads(line)
    name = found.pop("test")
    most = max(most, found.pop("most_mib", 0.0))
    sums.update(found)
    print(name, *(f"{key} {value:g}" for key, value in found.items()))
print("in all:", ", ".join(f"{value:,g} {key}" for key, value in sums.items()))
print(f"largest growth of memory in 64 inputs: {most:.1f} MiB")
PYTHON
exit "$failed"
