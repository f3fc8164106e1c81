"""`mmchat` as a program in which torch is not imported before a file says so.

python -m tests.repl.held_torch FOLDER chat tiny: the file is FOLDER/go. FOLDER/imported gets the
names of what is imported when torch is first asked for.
"""

from __future__ import annotations

import sys
import time
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from mmchat.__main__ import main


class Holding(MetaPathFinder):
    """Finds torch, whose code waits before it runs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
        if fullname != "torch":
            return None
        spec: Any = PathFinder.find_spec(fullname, path, target)
        run = spec.loader.exec_module

        def wait(module: ModuleType) -> None:
            (self.folder / "imported").write_text("\n".join(sys.modules))
            while not (self.folder / "go").exists():
                time.sleep(0.01)
            run(module)

        spec.loader.exec_module = wait
        return spec


if __name__ == "__main__":
    sys.meta_path.insert(0, Holding(Path(sys.argv.pop(1))))
    main()
