"""Errors that a script reports in one line, without a traceback. `status` is the exit status of the process."""


class InputError(Exception):
    """A flag, file or folder that the user gave is invalid. The message names it and says how to fix it."""

    status = 2


class RunError(Exception):
    """The work cannot be completed, although the input was valid. The message says what was kept and what to try."""

    status = 1
