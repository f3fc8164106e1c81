"""A C compiler that compiles no file twice with the same flags and headers.

Where it is $CC, the package compiles, links and checks as ever, and waits only for the files that a
test has changed.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

START = '#!/bin/sh\nexec "{python}" -ISE "{script}" "{compiler}" "{objects}" "$@"\n'


def keeping(folder: Path, compiler: str) -> None:
    """Make a folder for objects, and in it `cc`, which takes what `compiler` takes."""
    folder.mkdir()
    text = START.format(python=sys.executable, script=__file__, compiler=compiler, objects=folder)
    (folder / "cc").write_text(text)
    (folder / "cc").chmod(0o755)


def _read(path: Path, seen: dict[Path, bytes]) -> None:
    """The file and the headers beside it that it includes."""
    if path not in seen and path.is_file():
        seen[path] = path.read_bytes()
        for name in re.findall(rb'^\s*#\s*include\s*"([^"]+)"', seen[path], re.M):
            _read(path.parent / os.fsdecode(name), seen)


def _key(command: list[str], source: Path) -> str:
    seen: dict[Path, bytes] = {}
    _read(source, seen)
    digest = hashlib.sha256(repr(command).encode())
    for path, content in sorted(seen.items()):
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return digest.hexdigest()


def main(compiler: str, folder: str, *arguments: str) -> int:
    flags = [word for word in arguments if not word.endswith(".c")]
    sources = [Path(word) for word in arguments if word.endswith(".c")]
    if "-c" not in flags or "-o" in flags or "-include" in flags:
        return subprocess.run([compiler, *arguments], check=False).returncode
    for source in sources:
        kept = Path(folder) / f"{_key([compiler, *flags], source)}.o"
        if not kept.exists():
            with tempfile.TemporaryDirectory(dir=folder) as place:
                draft = Path(place) / "kept.o"
                done = subprocess.run([compiler, *flags, source, "-o", draft], check=False)
                if done.returncode:
                    return done.returncode
                draft.replace(kept)
        shutil.copyfile(kept, f"{source.stem}.o")
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
