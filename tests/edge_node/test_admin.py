from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from core.frames import Rates
from edge_node.admin import Facts, livez, metrics, readyz

READY = Facts(
    name="eu",
    region="europe",
    release="tiny@0123456789ab",
    variant="test",
    state="ready",
    vouched=True,
    draining=False,
    running=3,
    waiting=1,
    slots=4,
    links=2,
    steps=70,
    output_tokens=200,
    restarts=1,
    dropped_frames=5,
    rates=Rates(400.0, 90.0),
)


def but(**changes: Any) -> Facts:
    return dataclasses.replace(READY, **changes)


def test_a_living_node_says_so() -> None:
    assert livez().status == 200


def test_a_node_that_would_work_on_a_request_is_ready() -> None:
    answer = readyz(READY)
    assert answer.status == 200
    assert json.loads(answer.body) == {"ready": True, "node": "eu", "release": "tiny@0123456789ab", "reason": ""}


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        (but(state="loading", vouched=False), "loading"),
        (but(state="failed", vouched=False), "engine_lost"),
        (but(vouched=False), "not_vouched"),
        (but(draining=True), "draining"),
    ],
)
def test_a_node_that_is_not_ready_says_why(facts: Facts, reason: str) -> None:
    answer = readyz(facts)
    assert answer.status == 503
    assert json.loads(answer.body)["reason"] == reason


def test_metrics_are_in_the_prometheus_format() -> None:
    answer = metrics(READY)
    samples = {
        sample.name: sample for family in text_string_to_metric_families(answer.body) for sample in family.samples
    }
    assert samples["edgechat_node_info"].labels["region"] == "europe"
    values = {name: sample.value for name, sample in samples.items()}
    assert values == {
        "edgechat_node_info": 1,
        "edgechat_ready": 1,
        "edgechat_running": 3,
        "edgechat_waiting": 1,
        "edgechat_slots": 4,
        "edgechat_links": 2,
        "edgechat_prefill_tokens_per_second": 400,
        "edgechat_decode_tokens_per_second": 90,
        "edgechat_engine_steps_total": 70,
        "edgechat_output_tokens_total": 200,
        "edgechat_engine_restarts_total": 1,
        "edgechat_dropped_frames_total": 5,
    }
