"""The exceptions for errors that a user can cause or fix."""

UNFINISHED = 75
"""Exit code of an interrupted command that continues when it is run again: EX_TEMPFAIL of sysexits.h."""


class LabError(Exception):
    """An error as one line: what was expected, what was received, and what to do next.

    Commands print it without a traceback, and so do notebooks (console.show_errors_in_one_line).
    """


def missing_package(package: str, install: str, why: str) -> LabError:
    """Return the error for an optional package that is not installed.

    `install` is the exact requirement for pip; `why` names the feature that needs it.
    """
    return LabError(f"{why} needs the package {package}, which is not installed. Run: pip install '{install}'")


class Unfinished(LabError):
    """A run was interrupted: nothing is lost, and the same call continues it.

    Commands exit with the code UNFINISHED, so that a batch system can distinguish this from an error and restart them.
    """
