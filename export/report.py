"""What `verify` found: one line for every thing that was looked at. Does not know how it was found."""

from __future__ import annotations

from collections.abc import Iterator
from enum import StrEnum

import msgspec


class Verdict(StrEnum):
    """How a check ended. SKIPPED: it could not be made here, which is no fault of the release."""

    OK = "ok"
    BROKEN = "broken"
    SKIPPED = "skipped"


class Check(msgspec.Struct, frozen=True):
    """One thing that was looked at, and a clause about what was seen."""

    verdict: Verdict
    subject: str
    detail: str


class Report(msgspec.Struct, frozen=True):
    """All checks of one release, in the order in which they were made."""

    release: str
    variant: str
    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return not self.having(Verdict.BROKEN)

    def having(self, verdict: Verdict) -> list[Check]:
        """The checks that ended so."""
        return [check for check in self.checks if check.verdict is verdict]

    def lines(self) -> Iterator[str]:
        """For people: a line a check, and what it comes to."""
        width = max((len(check.subject) for check in self.checks), default=0)
        for check in self.checks:
            yield f"{check.verdict:<7}  {check.subject:<{width}}  {check.detail}"
        counts = ", ".join(f"{len(self.having(verdict))} {verdict}" for verdict in Verdict)
        yield f"{self.release} ({self.variant}): {counts}."

    def to_json(self) -> bytes:
        """For programs: the same, and `ok`."""
        return msgspec.json.format(msgspec.json.encode({"ok": self.ok} | msgspec.structs.asdict(self)), indent=2)
