"""Responses and the entries about them, and what lies on the disk, for tests of stores."""

from __future__ import annotations

from pathlib import Path

from core.conversation import Item
from core.frames import Arguments, Delta, ItemEnd, ItemStart, Logprobs, Text, Usage
from core.stream import EndRecord, Failure, Request, RequestRecord
from router.journal import Began, Ended, Placed, Read, Said, StoredResponse, Unfinished

SECRET_TEXT = "a sentence that belongs in no log"
CREATED_AT = 1_700_000_000
PLACED = Placed(input_tokens=5, cached_tokens=3, dropped_items=1, variant="cpu-int8", context_tokens=2048)

SCHEMA_1 = """
CREATE TABLE responses (
    tenant TEXT NOT NULL, id TEXT NOT NULL, created_at INTEGER NOT NULL, previous_id TEXT, payload BLOB NOT NULL,
    PRIMARY KEY (tenant, id)
) STRICT;
CREATE INDEX responses_by_age ON responses (created_at);
PRAGMA user_version = 1;
"""


def record(response_id: str = "resp_r_1", tenant: str = "acme", created_at: int = CREATED_AT) -> RequestRecord:
    request = Request(
        model="m",
        input=[Item("message", "user", SECRET_TEXT), Item("message", "assistant", "b", [1, 2], "m@0")],
        temperature=0.7,
        top_p=0.9,
        max_output_tokens=64,
        previous_response_id="resp_r_0",
        reasoning={"effort": "low"},
        tools=[{"type": "function", "name": "f", "parameters": {"type": "object", "required": ["x"]}}],
        metadata={"k": "v"},
    )
    return RequestRecord(
        id=response_id, tenant=tenant, created_at=created_at, seed=2**63 + 5, release="m@0", request=request
    )


def response(response_id: str = "resp_r_1", tenant: str = "acme", created_at: int = CREATED_AT) -> StoredResponse:
    deltas: list[list[Delta]] = [
        [ItemStart("message", "final_answer"), Text("héllo 你好 🙂"), Logprobs(-0.5, [(1, -0.5)])],
        [ItemEnd(), ItemStart("function_call", name="f")],
        [Arguments('{"x":1}')],
        [ItemEnd()],
    ]
    failure = Failure("node_lost", "The node was lost.", True)
    end = EndRecord(status="failed", completed_at=created_at + 1, error=failure, usage=Usage(5, 4, 3))
    return StoredResponse(record(response_id, tenant, created_at), [7, 8, 9, 10], deltas, end)


def saying(text: str, response_id: str = "resp_r_1", *, tenant: str = "acme", times: int = 1) -> StoredResponse:
    """A finished response whose answer is `text`, so many times."""
    end = EndRecord(status="completed", completed_at=CREATED_AT)
    return StoredResponse(record(response_id, tenant), [1], [[Text(text * times)]], end)


def begun(response_id: str = "resp_r_1", tenant: str = "acme", created_at: int = CREATED_AT) -> Unfinished:
    return Unfinished(record(response_id, tenant, created_at), [Item("message", "user", SECRET_TEXT)])


def began(response_id: str = "resp_r_1", tenant: str = "acme", created_at: int = CREATED_AT) -> Began:
    return Began(begun(response_id, tenant, created_at))


def read(response_id: str = "resp_r_1") -> Read:
    return Read(response_id, PLACED)


def said(seq: int, *ids: int, response_id: str = "resp_r_1", text: str = "word") -> Said:
    return Said(response_id, seq, list(ids), [[Text(f"{text} {number}")] for number in ids])


def ended(response_id: str = "resp_r_1", tenant: str = "acme", created_at: int = CREATED_AT) -> Ended:
    return Ended(response(response_id, tenant, created_at))


def on_disk(path: Path) -> bytes:
    """All that lies in the file and beside it."""
    return b"".join(file.read_bytes() for file in path.parent.iterdir() if file.name.startswith(path.name))
