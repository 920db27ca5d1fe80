"""What text is here: a stream of `(text, ends)` pieces, `ends` True at the last piece of each document.

A *reader* starts such a stream afresh each time it is called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Pieces = Iterator[tuple[str, bool]]
Reader = Callable[[], Pieces]

END_OF_TEXT = "<|endoftext|>"  # ends a document: a line of a text file, and GPT-2's name of EOS
BLOCK = 1 << 20  # characters of a long text that are handed on at a time


@dataclass(frozen=True)
class Source:
    """Text to learn from.

    Attributes:
      name: the data set's name or the path that was given.
      splits: readers by split: `{"all": ...}` to be divided by `divide`, or `train`,
        `validation`, `test`.
      size: the text's bytes, about.
      files: the files that are read; their names, sizes and times key the cache of tokens.
      info: what to record with a run, such as Python's version; `ignored` names the files of a
        folder that are not read.
    """

    name: str
    splits: Mapping[str, Reader]
    size: int
    files: tuple[Path, ...] = ()
    info: Mapping[str, Any] = field(default_factory=dict)
