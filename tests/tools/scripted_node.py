"""`python -m tests.tools.scripted_node --config FILE`: a real node whose engine follows tests/tools/harmony_script."""

from __future__ import annotations

import sys

from edge_node.__main__ import main

if __name__ == "__main__":
    sys.exit(main("tests.tools.scripted_worker"))
