"""`make up` as a person has it: the real services under the real supervisor."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.e2e.clients import MODEL
from tests.e2e.processes import READY_S, ROOT
from tests.e2e.up import Up, all_gone
from tests.e2e.waiting import eventually, http


@pytest.fixture
def up(smollm2_release: Path, consul_binary: Path) -> Iterator[Up]:
    """Everything that `make up` starts, on ports that were free."""
    environment = {"CONSUL": str(consul_binary), "EDGE__ENGINE__CONTEXT_TOKENS": "1024"}
    started = Up(ROOT, ["--release", str(smollm2_release)], environment).start()
    try:
        eventually(started.welcomed, READY_S, "scripts/up says that all is ready")
        yield started
    finally:
        started.close()
        for left in (ROOT / "data").glob(f"router-{started.port}.sqlite*"):
            left.unlink()


def ask(up: Up) -> str:
    """What the snippet of the README does."""
    client: Any = openai.OpenAI(base_url=f"{up.url}/v1", api_key="dev", max_retries=0, timeout=60)
    text: str = client.responses.create(model=MODEL, input="Name three rivers.", max_output_tokens=8).output_text
    return text


def test_make_up_answers_restarts_what_dies_and_ctrl_c_stops_all_of_it(up: Up) -> None:
    assert ask(up)
    for name in ("router", "eu"):
        victim = up.services()[name]
        victim.kill()
        eventually(partial(says_ready_again, up, name), READY_S, f"{name} is started again")
    eventually(lambda: len(ready_nodes(up)) == 2, READY_S, "both nodes answer again")
    assert ask(up)
    family = up.everything()
    assert len(family) >= 6  # Consul, the router, two nodes with an engine each
    for process in family:
        if process.ppid() == up.pid:  # a terminal sends Ctrl-C to everybody in the foreground
            process.send_signal(signal.SIGINT)
    up.signal(signal.SIGINT)
    assert up.wait_exit() == 0
    eventually(lambda: all_gone(family), what="no process is left behind")
    assert "Traceback" not in up.log()


def says_ready_again(up: Up, name: str) -> bool:
    return f"{name} is ready again" in up.log()


def ready_nodes(up: Up) -> list[str]:
    return [node["name"] for node in http(f"{up.url}/fleet").json()["nodes"] if node["state"] == "ready"]
