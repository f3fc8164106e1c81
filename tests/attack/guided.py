"""Readers under a fuzzer that follows the code: `python -m tests.attack.guided DIR`.

Each line of stdin names a reader, how many changed inputs, and a folder for its files. The fuzzer
ends its process, so each runs in one that is forked from this, which imports the readers once. Its
exit code is printed; what it said is in the file `said`.

Inputs that reach new lines of mmchat are changed further. What a reader raises besides its own
errors ends the fuzzer with another exit code than 0, as do too much time and memory.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import atheris

if TYPE_CHECKING:
    from tests.attack.readers import Reader

SECONDS, MEBIBYTES = 30, 2048  # for one input; for the process, torch included
LONGEST = 8192  # bytes of an input


def fuzz(reader: Reader, runs: int, folder: Path) -> None:
    """Give the reader its whole files and `runs` changed ones; ends the process."""
    said = os.open(folder / "said", os.O_CREAT | os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(said, stream)
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, whole in enumerate(reader.wholes):
        (corpus / str(number)).write_bytes(whole)

    def read(data: bytes) -> None:
        with suppress(*reader.errors):
            reader.read(data)

    runs += len(reader.wholes)  # which are read first
    options = {"runs": runs, "seed": 1, "max_len": LONGEST, "timeout": SECONDS}
    options |= {"rss_limit_mb": MEBIBYTES, "artifact_prefix": f"{folder}/"}
    atheris.Setup([sys.argv[0], *(f"-{n}={v}" for n, v in options.items()), str(corpus)], read)
    atheris.Fuzz()


def main() -> None:
    """Run what stdin asks for; `sys.argv[1]` is a folder that all readers share."""
    with atheris.instrument_imports(include=["mmchat"]):
        from tests.attack.readers import readers
    every = readers(Path(sys.argv[1]))
    for line in sys.stdin:
        name, runs, folder = json.loads(line)
        if (child := os.fork()) == 0:
            fuzz(every[name], runs, Path(folder))
            os._exit(0)
        _, status = os.waitpid(child, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
