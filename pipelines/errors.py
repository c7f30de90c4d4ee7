"""The one exception for everything a user can cause or mend."""


class LabError(Exception):
    """One line that says what was expected, what came instead, and what to do next.

    Commands print it without a traceback; notebooks show it as the last line of the failing cell.
    """


def missing_package(package: str, install: str, why: str) -> LabError:
    """The error for an optional package that is not installed.

    `install` is the exact requirement to give pip; `why` says what needs it.
    """
    return LabError(f"{why} needs the package {package}, which is not installed. Run: pip install '{install}'")
