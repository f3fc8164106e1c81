"""One reader under a fuzzer that follows the code: `python -m tests.attack.guided NAME RUNS DIR`.

Inputs that reach new lines of mmchat are changed further. What a reader raises besides its own
errors ends the process with another exit code than 0, as do too much time and memory.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import atheris

SECONDS, MEBIBYTES = 30, 2048  # for one input; for the process, torch included
LONGEST = 8192  # bytes of an input


def main() -> None:
    """Run `sys.argv[1:]`: a reader's name, how many changed inputs, and a folder for its files."""
    name, runs, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    with atheris.instrument_imports(include=["mmchat"]):
        from tests.attack.readers import readers
    reader = readers(folder)[name]
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


if __name__ == "__main__":
    main()
