"""The one exception for everything a user can cause or mend."""

UNFINISHED = 75
"""Exit code of a command that was asked to end and is to be run again: EX_TEMPFAIL of sysexits.h."""


class LabError(Exception):
    """One line that says what was expected, what came instead, and what to do next.

    Commands print it without a traceback; notebooks show it as the last line of the failing cell.
    """


def missing_package(package: str, install: str, why: str) -> LabError:
    """The error for an optional package that is not installed.

    `install` is the exact requirement to give pip; `why` says what needs it.
    """
    return LabError(f"{why} needs the package {package}, which is not installed. Run: pip install '{install}'")


class Unfinished(LabError):
    """A run was asked to end before it was done: nothing is lost, and the same call goes on where it was.

    Commands end with the exit code UNFINISHED, so that a batch system can tell this from a fault and start them again.
    """
