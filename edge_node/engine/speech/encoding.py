"""Texts to ids, remembered: history comes again with each turn, each cut that is tried and each re-reading.

Safe to call from several threads. Does not know which texts are contents and which are a template's words.
"""

from __future__ import annotations

from array import array
from functools import lru_cache

from tokenizers import Tokenizer

from core.errors import ServiceError

# Shorter texts are encoded as fast as they are found; of longer ones a few would fill the memory.
MIN_REMEMBERED_CHARACTERS = 64
MAX_REMEMBERED_CHARACTERS = 16 * 1024
# At the very most 256 * 16,384 characters of 4 bytes, each with 4 ids of 4 bytes: 84 MB. Ordinary text: 8 MB.
REMEMBERED_TEXTS = 256


class EncodingError(ServiceError):
    """The tokenizer library has failed on a text."""


class TextEncoder:
    """One tokenizer, as it takes special tokens in texts at the time of the call."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._remembered = lru_cache(REMEMBERED_TEXTS)(self._encode)

    def __call__(self, text: str) -> list[int]:
        """A text's ids, the caller's own; raises EncodingError."""
        moderate = MIN_REMEMBERED_CHARACTERS <= len(text) <= MAX_REMEMBERED_CHARACTERS
        return (self._remembered(text) if moderate else self._encode(text)).tolist()

    def _encode(self, text: str) -> array[int]:
        # Without offsets it takes less than half the time, and only batches can be had without.
        try:
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)
        except BaseException as error:  # a panic of the library is no Exception
            if type(error).__name__ != "PanicException":
                raise
            raise EncodingError("The release's tokenizer failed on this text; report this with its name.") from None
        return array("I", encoding.ids)
