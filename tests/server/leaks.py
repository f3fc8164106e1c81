"""What no answer of the server may say."""

import re
import sys
from pathlib import Path

_PLACES = [str(Path(__file__).parents[2]), sys.prefix, sys.base_prefix, str(Path.home()), "/usr"]
_WORDS = [
    r"0x[0-9a-fA-F]{6}",
    "/home",
    "Traceback",
    "site-packages",
    r"\.py\b",
    "<class",
    "object at 0x",
]
LEAKS = re.compile("|".join([*map(re.escape, _PLACES), *_WORDS]))
