"""Errors that a script reports in one line, without a traceback. `status` is the exit status of the process.

Scripts import this file first: from then on Ctrl-C is such a line too, also during the imports, which take seconds.
"""

import os
import signal
import sys


class InputError(Exception):
    """A flag, file or folder that the user gave is invalid. The message names it and says how to fix it."""

    status = 2


class RunError(Exception):
    """The work cannot be completed, although the input was valid. The message says what was kept and what to try."""

    status = 1


def end_during_imports(*_) -> None:
    """Handles Ctrl-C until command_line.run_script takes over: one line and status 130."""
    os.write(2, f"{os.path.basename(sys.argv[0])}: stopped\n".encode())
    os._exit(130)


# Only in a script of this project, and not where Ctrl-C is ignored, as behind nohup.
main_file = getattr(sys.modules["__main__"], "__file__", None) or ""
if (os.path.dirname(os.path.realpath(main_file)) == os.path.dirname(os.path.realpath(__file__))
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler):
    signal.signal(signal.SIGINT, end_during_imports)
