from __future__ import annotations

from typing import Any

import msgspec
import pytest

from core.errors import ReleaseError
from edge_node.release.servable import check_servable
from tests.edge_node.fake_engine import MANIFEST


def test_a_release_for_this_device_can_be_served() -> None:
    check_servable(MANIFEST, "cpu")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "cuda"}, "laid out for cuda, this node's device is cpu; export it with a cpu recipe"),
        ({"operators": ["edgechat.MoeMxfp4"]}, "needs the operator edgechat.MoeMxfp4"),
    ],
)
def test_a_release_that_cannot_be_served_here_says_why(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ReleaseError) as refused:
        check_servable(msgspec.structs.replace(MANIFEST, **changes), "cpu")
    assert words in refused.value.message
    assert MANIFEST.release in refused.value.message
