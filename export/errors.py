"""Why an export refuses.

A branch of the tree in `core/errors.py`:

    EdgechatError
      SourceError     source_invalid      the checkpoint is damaged, unknown or cannot be carried without loss
      TargetError     target_invalid      the release cannot be written where it was asked for
"""

from __future__ import annotations

from core.errors import EdgechatError


class SourceError(EdgechatError):
    """The checkpoint cannot be exported; the sentence names the file or tensor and what to do."""

    code = "source_invalid"


class TargetError(EdgechatError):
    """The release cannot be written; what was there before is untouched."""

    code = "target_invalid"
