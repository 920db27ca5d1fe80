"""Tokenizers: text to integer ids and back, every one with a mask id at the end of its vocabulary.

The convention of the whole library: `mask_id == vocab_size - 1`. Ordinary text never produces a
special id, so `eos_id` in a token stream always marks the end of a document. A tokenizer is a
value: `to_json` holds all that is needed to build it again, and `fingerprint` names it, so that
a checkpoint and a data set can be compared.
"""

from __future__ import annotations

import abc
import hashlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np

from diffrwkv import bars
from diffrwkv.data.download import data_root
from diffrwkv.data.text import END_OF_TEXT

BLANK_LINE = "\n\n"


class Tokenizer(abc.ABC):
    """Text to ids and back. Final subclasses: `Char`, `Byte`, `GPT2`, `BPE`; build them with `make`.

    Attributes:
      name: the specification that `make` understands, such as `"char"` or `"bpe:4096"`.
      vocab_size: number of ids, counting every special and the mask.
      mask_id: always `vocab_size - 1`.
      bos_id, eos_id: begin and end of a document, or None where the vocabulary has neither.
      pad_id: an id that may fill rows where `valid` is False; never the mask id.
    """

    type: ClassVar[str]
    name: str
    vocab_size: int
    mask_id: int
    bos_id: int | None
    eos_id: int | None

    @property
    def pad_id(self) -> int:
        """EOS, or 0 where there is none."""
        return 0 if self.eos_id is None else self.eos_id

    @property
    def dtype(self) -> np.dtype:
        """The smallest type that token files use: uint16 where the vocabulary fits, else uint32."""
        return np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.uint32)

    def wrapping(self) -> tuple[int, int]:
        """(BOS, EOS), to stand around a text. Raises ValueError where the vocabulary has none."""
        if self.bos_id is None or self.eos_id is None:
            raise ValueError(f"{self!r} has neither BOS nor EOS: choose another tokenizer, or wrap no text in them")
        return self.bos_id, self.eos_id

    @abc.abstractmethod
    def encode(self, text: str) -> np.ndarray:
        """Ids of ordinary text, int32 [n]; no special is ever added or recognised.

        Raises:
          ValueError: the text has a character that the vocabulary lacks (it is named), or a lone
            surrogate.
        """

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        """`encode` of each text; in parallel where the library underneath can."""
        return [self.encode(text) for text in texts]

    @abc.abstractmethod
    def decode(self, ids: Iterable[int], *, mask: str = "_", specials: bool = False) -> str:
        """Text of ids [n]. The mask id is shown as `mask`; BOS and EOS are dropped, or shown if `specials`.

        Bytes that are no UTF-8 (a character cut by a mask or by the end of a chunk) become U+FFFD.

        Raises:
          ValueError: an id outside [0, vocab_size).
        """

    def decode_bytes(self, ids: Iterable[int], *, mask: str = "_", specials: bool = False) -> bytes:
        """The UTF-8 of `decode`, but where ids stand for bytes, those, be they UTF-8 or not."""
        return self.decode(ids, mask=mask, specials=specials).encode()

    @abc.abstractmethod
    def to_json(self) -> dict[str, Any]:
        """All that `Tokenizer.from_json` needs, as plain JSON types."""

    @staticmethod
    def from_json(value: dict[str, Any], root: str | os.PathLike | None = None) -> Tokenizer:
        """The tokenizer that `to_json` described; GPT-2's vocabulary is looked for in the data folder `root`.

        Raises:
          ValueError: the dict is not one that `to_json` made.
        """
        kind = value.get("type") if isinstance(value, dict) else None
        if not isinstance(kind, str) or kind not in TOKENIZERS:
            raise ValueError(f"not a tokenizer description: type {kind!r}; known types: {', '.join(TOKENIZERS)}")
        try:
            return TOKENIZERS[kind]._from_json(value, root)
        except KeyError as error:
            raise ValueError(f"the {kind} tokenizer description lacks {error}") from None
        except (ImportError, OSError, RuntimeError):  # what the tokenizer needs is not at hand
            raise
        except Exception as error:  # the tokenizers library raises Exception itself
            text = " ".join(str(error).split())[:200]
            raise ValueError(f"the {kind} tokenizer description is damaged ({text})") from None

    @classmethod
    @abc.abstractmethod
    def _from_json(cls, value: dict[str, Any], root: str | os.PathLike | None) -> Tokenizer: ...

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the canonical JSON: equal exactly when two tokenizers give equal ids."""
        text = json.dumps(self.to_json(), sort_keys=True, ensure_ascii=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Tokenizer) and self.to_json() == other.to_json()

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r}, vocab_size={self.vocab_size})"

    def _checked(self, ids: Iterable[int]) -> np.ndarray:
        array = np.asarray(ids if hasattr(ids, "__len__") else list(ids))
        if array.size == 0:
            return np.zeros(0, np.int64)
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise ValueError(f"decode takes a row of integer ids, not {array.dtype} of shape {array.shape}")
        if array.min() < 0 or array.max() >= self.vocab_size:
            wrong = array[(array < 0) | (array >= self.vocab_size)][0]
            raise ValueError(f"id {wrong} is outside the vocabulary of {self.vocab_size} of tokenizer {self.name!r}")
        return array.astype(np.int64)


class Char(Tokenizer):
    """One id per character of a sorted alphabet, then BOS and EOS if `specials`, then the mask.

    Tiny Shakespeare has 65 characters, so 66 ids without specials, as in the peers' character runs.
    """

    type = "char"
    name = "char"

    def __init__(self, alphabet: str, *, specials: bool = False):
        """`alphabet`: the characters, each once; `specials`: whether to add BOS and EOS."""
        if not alphabet:
            raise ValueError("a char tokenizer needs at least one character: the text is empty")
        if any(0xD800 <= ord(character) < 0xE000 for character in alphabet):
            raise ValueError("the text has a lone surrogate, which is no character; read it as UTF-8")
        self.alphabet = "".join(sorted(set(alphabet)))
        n = len(self.alphabet)
        self.specials = bool(specials)
        self.bos_id, self.eos_id = (n, n + 1) if specials else (None, None)
        self.vocab_size = n + (3 if specials else 1)
        self.mask_id = self.vocab_size - 1
        self._points = np.array([ord(character) for character in self.alphabet], np.uint32)

    def encode(self, text: str) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
        ids = np.minimum(np.searchsorted(self._points, points), len(self._points) - 1)
        wrong = self._points[ids] != points
        if wrong.any():
            at = int(np.flatnonzero(wrong)[0])
            raise ValueError(
                f"character {chr(points[at])!r} (U+{points[at]:04X}, position {at}) is not among "
                f"the {len(self.alphabet)} characters of this char tokenizer; leave it out or use "
                "tokenizer 'byte'"
            )
        return ids.astype(np.int32)

    def decode(self, ids: Iterable[int], *, mask: str = "_", specials: bool = False) -> str:
        table = [
            *self.alphabet,
            *(("<bos>", "<eos>") if specials else ("", "")) * self.specials,
            mask,
        ]
        return "".join(table[i] for i in self._checked(ids))

    def to_json(self) -> dict[str, Any]:
        return {"type": "char", "alphabet": self.alphabet, "specials": self.specials}

    @classmethod
    def _from_json(cls, value: dict[str, Any], root: str | os.PathLike | None) -> Char:
        alphabet, specials = value["alphabet"], value["specials"]
        if not isinstance(alphabet, str) or not isinstance(specials, bool):
            raise TypeError("the alphabet is no text, or specials neither true nor false")
        return cls(alphabet, specials=specials)


class _Bytes(Tokenizer):
    """Shared by the tokenizers whose ordinary ids each stand for a run of UTF-8 bytes."""

    _pieces: list[bytes]  # of the ordinary ids

    def decode(self, ids: Iterable[int], *, mask: str = "_", specials: bool = False) -> str:
        return self.decode_bytes(ids, mask=mask, specials=specials).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int], *, mask: str = "_", specials: bool = False) -> bytes:
        def special(i: int) -> bytes:
            if i == self.mask_id:
                return mask.encode()
            if not specials:
                return b""
            return END_OF_TEXT.encode() if self.bos_id == self.eos_id else (b"<bos>" if i == self.bos_id else b"<eos>")

        n = len(self._pieces)
        return b"".join(self._pieces[i] if i < n else special(i) for i in self._checked(ids).tolist())


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text has a lone surrogate at position {error.start}, which is no character; read it as UTF-8"
        ) from None


class Byte(_Bytes):
    """The 256 bytes of UTF-8, BOS, EOS and the mask: 259 ids for any text."""

    type = "byte"
    name = "byte"
    bos_id, eos_id, mask_id, vocab_size = 256, 257, 258, 259

    def __init__(self):
        self._pieces = [bytes([i]) for i in range(256)]

    def encode(self, text: str) -> np.ndarray:
        return np.frombuffer(_utf8(text), np.uint8).astype(np.int32)

    def to_json(self) -> dict[str, Any]:
        return {"type": "byte"}

    @classmethod
    def _from_json(cls, value: dict[str, Any], root: str | os.PathLike | None) -> Byte:
        return cls()


# tiktoken's regular expressions overflow a stack on a run of about a million blanks before a word, and training takes
# time with the square of a word. So longer runs of one kind of character are cut into runs of this length.
ENCODED_RUN = 1 << 18
TRAINED_RUN = 1 << 10
_RUN = re.compile(r"\s+|[^\W\d_]+|\d+|(?:[^\w\s]|_)+")  # blanks, letters, digits, other marks


def _parts(text: str, longest: int) -> list[str]:
    """The text in one part, or cut within its runs of more than `longest` blanks, letters, digits or marks."""
    step = longest // 2  # a longer run covers a whole step
    if len(text) <= longest or not any(_RUN.fullmatch(text, at, at + step) for at in range(0, len(text) - step, step)):
        return [text]
    cuts = [0]
    for run in _RUN.finditer(text):
        cuts.extend(range(run.start() + longest, run.end(), longest))
    return [text[start:stop] for start, stop in zip(cuts, [*cuts[1:], len(text)], strict=True)]


def _encode_with_tiktoken(encoding, texts: list[str]) -> list[np.ndarray]:
    """Ids of each text, int32; by as many threads as there are cores (more of them cost time)."""

    def encode(text: str) -> np.ndarray:
        _utf8(text)
        parts = _parts(text, ENCODED_RUN)
        try:
            rows = [encoding.encode_to_numpy(part, disallowed_special=()) for part in parts]
        except BaseException as error:  # Rust's panics are no Exceptions
            if type(error).__name__ != "PanicException":
                raise
            raise ValueError(f"tiktoken fails on this text ({error}); leave it out, or cut it") from None
        return np.concatenate(rows).astype(np.int32)

    if len(texts) == 1:
        return [encode(texts[0])]
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        return list(threads.map(encode, texts))


def _gpt2_encoding(root: str | os.PathLike | None):
    """tiktoken's GPT-2 encoding from TIKTOKEN_CACHE_DIR, from the data root, or downloaded."""
    try:
        import tiktoken
    except ImportError:
        raise ImportError("tokenizer 'gpt2' needs tiktoken: pip install tiktoken") from None

    folder = data_root(root) / "gpt2_bpe" / "tiktoken_cache"
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    if before is None:
        os.environ["TIKTOKEN_CACHE_DIR"] = str(folder)
    try:
        return tiktoken.get_encoding("gpt2")
    except Exception as error:  # tiktoken lets the network library's own exceptions through
        raise RuntimeError(
            f"the GPT-2 vocabulary is neither in {before or folder} nor could it be downloaded "
            f"({type(error).__name__}). Copy a tiktoken cache (the files "
            "6d1cbeee0f20b3d9449abfede4726ed8212e3aee and "
            "6c7ea1a7e38e3a7f062df639a5b80947f075ffe6) into that folder, or name its folder in "
            "TIKTOKEN_CACHE_DIR, or set DIFFRWKV_DATA to a folder that has "
            "gpt2_bpe/tiktoken_cache; or use tokenizer 'bpe:4096', which is trained on your text."
        ) from error
    finally:
        if before is None:
            del os.environ["TIKTOKEN_CACHE_DIR"]


class GPT2(_Bytes):
    """GPT-2's byte-level BPE through tiktoken: 50,257 ids with `<|endoftext|>` as BOS and EOS, then the mask.

    50,258 ids, the vocabulary of MDLM's OpenWebText models. The vocabulary is read from
    `TIKTOKEN_CACHE_DIR`, from `gpt2_bpe/tiktoken_cache` in the data root, or else downloaded to
    there.
    """

    type = "gpt2"
    name = "gpt2"
    bos_id = eos_id = 50256
    mask_id, vocab_size = 50257, 50258

    def __init__(self, root: str | os.PathLike | None = None):
        """`root`: the data folder, as in `load`.

        Raises:
          RuntimeError: the vocabulary is not at hand and cannot be downloaded.
          ImportError: tiktoken is not installed.
        """
        self._encoding = _gpt2_encoding(root)
        self._pieces = [self._encoding.decode_single_token_bytes(i) for i in range(50256)]

    def encode(self, text: str) -> np.ndarray:
        return _encode_with_tiktoken(self._encoding, [text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return _encode_with_tiktoken(self._encoding, texts)

    def to_json(self) -> dict[str, Any]:
        return {"type": "gpt2"}

    @classmethod
    def _from_json(cls, value: dict[str, Any], root: str | os.PathLike | None) -> GPT2:
        return cls(root)


def _byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes (Radford et al. 2019): printable Latin-1 stands for itself."""
    own = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    rest = [b for b in range(256) if b not in own]
    return {chr(b): b for b in own} | {chr(256 + i): b for i, b in enumerate(rest)}


# GPT-2's way to cut a text into words (Radford et al. 2019): as tiktoken has it, and as the tokenizers library does
_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""
_PLAIN: dict[str, Any] = {
    "truncation": None,
    "padding": None,
    "added_tokens": [],
    "normalizer": None,
    "pre_tokenizer": {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": True,
    },
    "post_processor": None,
}
_PLAIN_MODEL = {
    "type": "BPE",
    "dropout": None,
    "unk_token": None,
    "continuing_subword_prefix": None,
    "end_of_word_suffix": None,
    "fuse_unk": False,
    "byte_fallback": False,
    "ignore_merges": False,
}


class BPE(_Bytes):
    """Byte-level BPE trained on the data's own training text with the `tokenizers` library.

    `"bpe:N"` has at most N ids in all: 256 bytes, the merges, `<|endoftext|>` as BOS and EOS,
    and the mask. A text with too few repeated pairs gives fewer. Training is deterministic, and
    `to_json` holds the result.
    """

    type = "bpe"

    def __init__(self, size: int, state: dict[str, Any]):
        """`size`: the N of `bpe:N`; `state`: the `tokenizers` library's own JSON."""
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise ImportError("tokenizer 'bpe:N' needs the tokenizers library: pip install tokenizers") from None
        self.name = f"bpe:{size}"
        self._size = size
        self._state = state
        self._library = Library.from_str(json.dumps(state))
        n = self._library.get_vocab_size()
        byte_of = _byte_of_character()

        def piece(i: int) -> bytes:
            token = self._library.id_to_token(i)
            if token is None:
                raise ValueError(f"of its {n} ids, {i} is missing")
            return bytes(byte_of[c] for c in token)

        self._pieces = [piece(i) for i in range(n)]
        self.bos_id = self.eos_id = n
        self.mask_id, self.vocab_size = n + 1, n + 2
        self._encoding = self._as_tiktoken()

    @classmethod
    def train(cls, size: int, texts: Iterable[str]) -> BPE:
        """A vocabulary of at most `size` ids learned from `texts`."""
        try:
            import tokenizers
        except ImportError:
            raise ImportError("tokenizer 'bpe:N' needs the tokenizers library: pip install tokenizers") from None
        library = tokenizers.Tokenizer(tokenizers.models.BPE())
        library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
        library.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size - 2,
            min_frequency=2,
            show_progress=False,
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        )
        parts = (part for text in texts for part in _parts(text, TRAINED_RUN))
        with bars.waiting(f"learning a vocabulary of {size:,} from the text"):
            library.train_from_iterator(parts, trainer=trainer)
        return cls(size, json.loads(library.to_str()))

    def _as_tiktoken(self):
        """The same vocabulary in tiktoken, which is several times faster, or None where its ids could differ.

        tiktoken merges the two neighbours whose union has the lowest id, the library those whose pair comes first in
        the list of merges. That is one and the same where every merge makes an id of its own, in the order of the
        list, and the library makes each id's bytes into that id.
        """
        import tiktoken

        model = self._state["model"]
        first = len(self._pieces) - len(model["merges"])
        expressible = (
            {key: self._state.get(key) for key in _PLAIN} == _PLAIN
            and {key: model.get(key) for key in _PLAIN_MODEL} == _PLAIN_MODEL
            and sorted(self._pieces[:first]) == [bytes([i]) for i in range(256)]
            and all(model["vocab"].get("".join(pair)) == first + i for i, pair in enumerate(model["merges"]))
            and all(
                [token.id for token in self._library.model.tokenize(text)] == [i] for text, i in model["vocab"].items()
            )
        )
        if not expressible:
            return None
        return tiktoken.Encoding(
            self.name,
            pat_str=_PATTERN,
            mergeable_ranks={piece: i for i, piece in enumerate(self._pieces)},
            special_tokens={},
            explicit_n_vocab=len(self._pieces),
        )

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        if self._encoding is not None:
            return _encode_with_tiktoken(self._encoding, texts)
        for text in texts:
            _utf8(text)
        groups = [_parts(text, ENCODED_RUN) for text in texts]
        rows = self._library.encode_batch_fast([part for group in groups for part in group], add_special_tokens=False)
        ids = iter([np.array(row.ids, np.int32) for row in rows])
        return [np.concatenate([next(ids) for _ in group]) for group in groups]

    def to_json(self) -> dict[str, Any]:
        return {"type": "bpe", "size": self._size, "tokenizers": self._state}

    @classmethod
    def _from_json(cls, value: dict[str, Any], root: str | os.PathLike | None) -> BPE:
        if type(value["size"]) is not int:
            raise TypeError(f"size {value['size']!r}")
        return cls(value["size"], value["tokenizers"])

    def __getstate__(self) -> dict[str, Any]:
        return self.to_json()

    def __setstate__(self, state: dict[str, Any]) -> None:
        BPE.__init__(self, state["size"], state["tokenizers"])


TOKENIZERS: dict[str, type[Tokenizer]] = {"char": Char, "byte": Byte, "gpt2": GPT2, "bpe": BPE}

MOST_IDS = 1 << 20  # of bpe:N
FORMS = "'char' | 'byte' | 'gpt2' | 'bpe:N' (N ids, such as 'bpe:4096', trained on the text)"


def parse(spec: str) -> tuple[str, int | None]:
    """Splits a specification into its type and, for bpe, its size.

    Raises:
      ValueError: the specification has none of the known forms (they are listed).
    """
    if spec in ("char", "byte", "gpt2"):
        return spec, None
    match = re.fullmatch(r"bpe:([1-9][0-9]*)", spec) if isinstance(spec, str) else None
    if match and len(match[1]) <= 7 and 260 <= int(match[1]) <= MOST_IDS:
        return "bpe", int(match[1])
    why = f"needs a vocabulary of 260 to {MOST_IDS}" if match else "is no tokenizer"
    raise ValueError(f"tokenizer {spec!r} {why}; use {FORMS}")


def make(
    spec: str,
    texts: Iterable[str] | None = None,
    *,
    specials: bool = False,
    root: str | os.PathLike | None = None,
) -> Tokenizer:
    """The tokenizer that a specification names.

    Args:
      spec: `"char"`, `"byte"`, `"gpt2"` or `"bpe:N"`.
      texts: the text that a char or bpe tokenizer is made from, in pieces of any size.
      specials: whether a char tokenizer gets BOS and EOS; the others always have them.
      root: the data folder in which GPT-2's vocabulary is looked for.

    Raises:
      ValueError: malformed specification, or no text where text is needed.
    """
    kind, size = parse(spec)
    if kind == "byte":
        return Byte()
    if kind == "gpt2":
        return GPT2(root)
    if texts is None:
        raise ValueError(f"tokenizer {spec!r} is made from text, and none was given")
    if size is not None:  # "bpe:N" alone has one
        return BPE.train(size, texts)
    alphabet: set[str] = set()
    for text in texts:
        alphabet.update(text)
    return Char("".join(alphabet), specials=specials)


def encode_documents(
    tokenizer: Tokenizer,
    pieces: Iterable[tuple[str, bool]],
    *,
    between: bool = False,
    done: int = 0,
    batch_characters: int = 1 << 22,
) -> Iterator[tuple[str, np.ndarray, bool]]:
    """Encodes a stream of `(text, ends)` pieces, `ends` True at the last piece of each document.

    Yields `(text, ids, ends)` in order. Each document's ids end with EOS where the tokenizer has
    one; where it has none, every document but the first begins with the ids of a blank line
    (`BLANK_LINE`), which `text` leaves out. `between`: the stream continues another whose
    last document has ended; `done`: after so many documents.

    Raises:
      ValueError: a document cannot be encoded; its number is named, from 1.
    """
    batch: list[tuple[str, str, bool]] = []
    size = 0

    def encode() -> list[np.ndarray]:
        texts = [joint + text for joint, text, _ in batch]
        try:
            return tokenizer.encode_batch(texts)
        except ValueError:
            ends = itertools.accumulate((ends for *_, ends in batch[:-1]), initial=done)
            for text, number in zip(texts, ends, strict=True):
                try:
                    tokenizer.encode(text)
                except ValueError as error:
                    raise ValueError(f"document {number + 1}: {error}") from None
            raise

    def flush() -> Iterator[tuple[str, np.ndarray, bool]]:
        rows = encode()
        for (_, text, ends), ids in zip(batch, rows, strict=True):
            if ends and tokenizer.eos_id is not None:
                ids = np.append(ids, np.int32(tokenizer.eos_id))
            yield text, ids, ends

    for text, ends in pieces:
        batch.append((BLANK_LINE if between and tokenizer.eos_id is None else "", text, ends))
        between = ends
        size += len(text)
        if size >= batch_characters:
            yield from flush()
            done += sum(ends for *_, ends in batch)
            batch, size = [], 0
    yield from flush()
