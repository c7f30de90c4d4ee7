"""Why an example is not used."""

from __future__ import annotations

from pipelines.errors import LabError


class Rejected(LabError):
    """An example that cannot be used: `reason` is one word for tables, `detail` says it in full."""

    def __init__(self, reason: str, detail: str):
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail
