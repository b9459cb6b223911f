"""One line per event on stderr: time, level, who, `event key=value ...`.

Who logs sees to it that no text of a conversation and no secret is among the values.
"""

from __future__ import annotations

import logging
import sys
import time


def setup_logging(level: str) -> None:
    """Configure this process's root logger."""
    formatter = logging.Formatter("%(asctime)s.%(msecs)03dZ %(levelname)s %(name)s %(message)s", "%Y-%m-%dT%H:%M:%S")
    formatter.converter = time.gmtime
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(formatter)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Libraries that tell of every request.
    for chatty in ("websockets", "urllib3", "asyncio"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
