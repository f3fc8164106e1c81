"""The figures of SECURITY.md are those of the attack that stands here."""

import re
from pathlib import Path

from tests.attack.readers import readers
from tests.attack.test_doubling import SCANNERS
from tests.attack.test_guided import SHARE
from tests.attack.test_hostile_names import COMMANDS, HOSTILE
from tests.attack.test_kernels import BUILDS, CASES
from tests.attack.test_kills_and_faults import FAULTS, KILLS

FILES = 5  # scanners of whole files


def test_the_page_counts_what_the_attack_does(tmp_path):
    page = (Path(__file__).parents[2] / "SECURITY.md").read_text()
    found = [int(n.replace(",", "")) for n in re.findall(r"^\| .* \| ([\d,]+) \| ", page, re.M)]
    every = readers(tmp_path)
    assert found == [
        sum(reader.rounds for reader in every.values()),
        sum(reader.rounds // SHARE for reader in every.values()),
        len(SCANNERS) + FILES,
        sum(KILLS.values()),
        sum(FAULTS.values()),
        len(BUILDS) * CASES,
        len(COMMANDS) * len(HOSTILE),
    ]
    assert f"for {len(every)} readers" in page
