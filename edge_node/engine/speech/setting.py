"""What a request says about its answer as a whole, beside the conversation itself.

Does not know the link's frames nor how a model family writes any of this.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Setting(msgspec.Struct, frozen=True):
    """tools: Responses-style definitions, functions flat. format: the Responses API's `text.format`.

    effort: "" = the model's default.
    """

    tools: list[dict[str, Any]] = []
    format: dict[str, Any] | None = None
    effort: str = ""


PLAIN = Setting()
"""No tools, plain text, the model's usual effort."""
