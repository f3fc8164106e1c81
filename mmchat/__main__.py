"""The `mmchat` command: sets up signals, warnings and streams; the rest is in `mmchat.cli`."""

from __future__ import annotations

import gc
import io
import os
import signal
import sys
import warnings
from pathlib import Path
from types import FrameType


def main() -> None:
    """Run the command line and leave with its exit code."""
    try:
        for number in (signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup sets it
                signal.signal(number, _leave)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            signal.signal(signal.SIGINT, _leave)
        _leave_working_folder_out()
        if not sys.warnoptions:  # third-party warnings are no news for a user; -W shows them
            warnings.simplefilter("ignore")
        from mmchat.cli.console import open_missing_streams

        open_missing_streams()
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):  # a file name may hold bytes without a letter
                stream.reconfigure(errors="backslashreplace")
        from mmchat.cli.app import app

        app(prog_name="mmchat")
    except KeyboardInterrupt:
        from mmchat.errors import INTERRUPTED_EXIT_CODE

        sys.exit(INTERRUPTED_EXIT_CODE)
    finally:
        gc.freeze()  # or Python searches all that torch made for cycles when it ends: 0.4 s


def _leave_working_folder_out() -> None:
    """Import nothing from where the user stands, here or in a Python that a library starts.

    torch's compiler runs `python -c` with `sys.path` in PYTHONPATH; `python -m` puts the folder
    there.
    """
    os.environ["PYTHONSAFEPATH"] = "1"
    ours = Path(__file__).parents[1]
    if not sys.flags.safe_path and sys.path[0] in ("", _here()) and ours != Path(_here()):
        del sys.path[0]


def _here() -> str:
    try:
        return os.getcwd()  # noqa: PTH109 - as Python has it in sys.path
    except OSError:  # the folder is gone
        return ""


def _leave(signal_number: int, frame: FrameType | None) -> None:
    """End by SystemExit, so that terminal and files are put right; 143 for SIGTERM, 129 for SIGHUP.

    Ctrl-C is a KeyboardInterrupt, as always. Within an import all wait for its end: libraries catch
    everything there, and where two threads import, a lock of the import itself may never be free.
    """
    if not _is_importing(frame):
        if signal_number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + signal_number)
    signal.signal(signal.SIGALRM, lambda _, inside: _leave(signal_number, inside))
    signal.setitimer(signal.ITIMER_REAL, 0.02)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


if __name__ == "__main__":
    main()
