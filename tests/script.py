"""The scripts, run in the tests' own process: to import torch in another one takes seconds."""

import io
import runpy
import signal
import sys
import threading
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent


def run_script(script, *flags, encoding="utf-8"):
    """Exit code, standard output and standard error, both written in `encoding`."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    # As Python opens the two.
    output = io.TextIOWrapper(io.BytesIO(), encoding)
    error = io.TextIOWrapper(io.BytesIO(), encoding, "backslashreplace")
    code = 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [script, *flags])
        patch.setattr(sys, "stdout", output)
        patch.setattr(sys, "stderr", error)
        patch.setattr(threading, "excepthook", threading.excepthook)  # to be put back
        try:
            runpy.run_path(str(REPO / script), run_name="__main__")
        except SystemExit as stopped:
            code = stopped.code or 0
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    output.flush()
    error.flush()
    return code, *(stream.buffer.getvalue().decode(encoding) for stream in (output, error))
