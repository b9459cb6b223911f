"""What `verify` found: one line for every thing that was looked at. Does not know how it was found."""

from __future__ import annotations

from enum import StrEnum

import msgspec


class Verdict(StrEnum):
    """How a check ended. SKIPPED: it could not be made here, which is no fault of the release."""

    OK = "ok"
    BROKEN = "broken"
    SKIPPED = "skipped"


class Check(msgspec.Struct, frozen=True):
    """One thing that was looked at, and what was seen."""

    verdict: Verdict
    subject: str
    detail: str

    def line(self) -> str:
        """For people."""
        return f"{self.verdict:<7}  {self.subject}: {self.detail}"


class Report(msgspec.Struct, frozen=True):
    """All checks of one release, in the order in which they were made."""

    release: str
    variant: str
    checks: list[Check]

    @property
    def ok(self) -> bool:
        """Whether nothing is broken."""
        return all(check.verdict is not Verdict.BROKEN for check in self.checks)

    def lines(self) -> list[str]:
        """For people: every check, and what they come to."""
        return [*(check.line() for check in self.checks), self.summary()]

    def summary(self) -> str:
        """One line for people."""
        counts = {verdict: sum(check.verdict is verdict for check in self.checks) for verdict in Verdict}
        found = ", ".join(f"{count} {verdict}" for verdict, count in counts.items())
        return f"{self.release} ({self.variant}): {found}."

    def to_json(self) -> bytes:
        """For programs: everything, and `ok`."""
        data = msgspec.json.encode({"ok": self.ok} | msgspec.structs.asdict(self))
        return msgspec.json.format(data, indent=2) + b"\n"
