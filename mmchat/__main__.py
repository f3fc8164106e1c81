"""The `mmchat` command: sets up signals, warnings and streams; the rest is in `mmchat.cli`."""

from __future__ import annotations

import io
import signal
import sys
import warnings

SIGTERM_EXIT_CODE = 143
INTERRUPT_EXIT_CODE = 130


def main() -> None:
    """Run the command line and leave with its exit code."""
    try:
        signal.signal(signal.SIGTERM, _exit_on_sigterm)
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
        sys.exit(INTERRUPT_EXIT_CODE)


def _exit_on_sigterm(_signal_number: int, _frame: object) -> None:
    sys.exit(SIGTERM_EXIT_CODE)


if __name__ == "__main__":
    main()
