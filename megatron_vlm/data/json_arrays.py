"""Find the elements of a JSON array in a file, without reading it into memory.

One streaming pass over bytes, like that over the lines of a JSONL file: quotes that no backslash escapes tell texts
from structure, and brackets outside texts tell how deep a byte is.
"""

from __future__ import annotations

import numpy as np

_WHITESPACE = np.isin(np.arange(256), [ord(each) for each in " \t\r\n"])
_OPENING, _CLOSING = (np.isin(np.arange(256), [ord(each) for each in pair]) for pair in ("[{", "]}"))


class NotAnArrayError(ValueError):
    """The file is no array of objects; the message says where that shows."""


class ArrayScanner:
    """Takes the blocks of a file one after another.

    Attributes:
        starts: offset of each element's first byte, block by block.
        ends: offset past each element's last byte, likewise.
    """

    def __init__(self) -> None:
        self.starts: list[np.ndarray] = []
        self.ends: list[np.ndarray] = []
        self._offset = self._depth = self._commas = 0
        self._in_text = self._is_escaped = self._is_closed = False

    def take(self, block: bytes) -> None:
        """Scan the next block.

        Raises:
            NotAnArrayError: it cannot be part of an array of objects.
        """
        array = np.frombuffer(block, np.uint8)
        quotes = array == ord('"')
        if ord("\\") in block or self._is_escaped:
            quotes &= ~self._escaped(array)
        # A quote belongs to its text at the start and not at the end, which matters to nothing below.
        inside = (np.cumsum(quotes) + self._in_text) % 2 == 1
        outside = ~inside & ~quotes
        opening, closing = outside & _OPENING[array], outside & _CLOSING[array]
        depth = np.cumsum(opening.astype(np.int64) - closing) + self._depth  # after each byte
        self._check(array, outside, opening, closing, depth, quotes | inside)
        self.starts.append(np.flatnonzero(opening & (depth == 2)) + self._offset)
        self.ends.append(np.flatnonzero(closing & (depth == 1)) + self._offset + 1)
        self._in_text = bool(inside[-1])
        self._depth = int(depth[-1])
        self._offset += len(block)

    def finish(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the offsets of all elements.

        Raises:
            NotAnArrayError: the array has no end, or commas are missing or too many.
        """
        if not self._is_closed:
            raise NotAnArrayError("the array has no end: the file was cut short")
        empty = [np.empty(0, np.int64)]
        starts, ends = np.concatenate(self.starts or empty), np.concatenate(self.ends or empty)
        if self._commas != max(0, len(starts) - 1):
            raise NotAnArrayError(f"the array has {len(starts)} elements and {self._commas} commas between them")
        return starts, ends

    def _check(
        self,
        array: np.ndarray,
        outside: np.ndarray,
        opening: np.ndarray,
        closing: np.ndarray,
        depth: np.ndarray,
        in_texts: np.ndarray,
    ) -> None:
        """Between elements there is nothing but blanks and commas, and only blanks around the array."""
        between = (depth == 1) & ~opening & ~closing & ~_WHITESPACE[array]
        commas = between & outside & (array == ord(","))
        self._commas += int(commas.sum())
        after = np.cumsum(closing & (depth == 0)) + self._is_closed > 0
        begun = np.cumsum(opening) + (self._depth > 0 or self._is_closed) > 0
        self._is_closed = bool(after[-1])
        wrong = between & ~commas
        wrong |= opening & (depth == 2) & (array != ord("{"))
        wrong |= (depth < 0) | (in_texts & (depth <= 0))
        wrong |= (depth == 0) & begun & ~closing & ~_WHITESPACE[array]
        wrong |= after & opening
        if wrong.any():
            where = int(wrong.argmax())
            raise NotAnArrayError(
                f"byte {self._offset + where}, {chr(array[where])!r}, is not where an element of the array may be"
            )

    def _escaped(self, array: np.ndarray) -> np.ndarray:
        """Bytes that a backslash escapes: those after an odd number of backslashes in a row."""
        is_backslash = array == ord("\\")
        edges = np.flatnonzero(np.diff(is_backslash.astype(np.int8), prepend=0, append=0))
        starts, ends = edges[::2], edges[1::2]
        lengths = ends - starts
        escaped = np.zeros(len(array), bool)
        if self._is_escaped:
            escaped[0] = True
            lengths[starts == 0] -= 1  # that backslash is text
        after = ends[lengths % 2 == 1]
        escaped[after[after < len(array)]] = True
        self._is_escaped = bool((after == len(array)).any())
        return escaped
