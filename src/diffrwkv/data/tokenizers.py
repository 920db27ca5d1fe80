"""Tokenizers: text to integer ids and back, every one with a mask id at the end of its vocabulary.

The convention of the whole library: `mask_id == vocab_size - 1`. Ordinary text never produces a
special id, so `eos_id` in a token stream always marks the end of a document. A tokenizer is a
value: `to_json` holds all that is needed to build it again, and `fingerprint` names it, so that
a checkpoint and a data set can be compared.
"""

from __future__ import annotations

import abc
import ast
import hashlib
import importlib.util
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from diffrwkv import bars
from diffrwkv.data.download import data_root, download
from diffrwkv.data.text import END_OF_TEXT

BLANK_LINE = "\n\n"


class Tokenizer(abc.ABC):
    """Text to ids and back. Final subclasses stand in `TOKENIZERS`; build them with `make`.

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
        """The tokenizer that `to_json` described; a vocabulary that others have too is looked for in the data folder.

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

    _pieces: list[bytes]  # of the ordinary ids; one beyond them that is not special stands for nothing

    def decode(self, ids: Iterable[int], *, mask: str = "_", specials: bool = False) -> str:
        return self.decode_bytes(ids, mask=mask, specials=specials).decode(errors="replace")

    def decode_bytes(self, ids: Iterable[int], *, mask: str = "_", specials: bool = False) -> bytes:
        names = (END_OF_TEXT, END_OF_TEXT) if self.bos_id == self.eos_id else ("<bos>", "<eos>")
        special = {self.mask_id: mask.encode()}
        for i, name in zip((self.bos_id, self.eos_id), names, strict=True):
            if i is not None:
                special[i] = name.encode() if specials else b""
        return self._decoded(self._checked(ids).tolist(), special)

    def _decoded(self, ids: list[int], special: dict[int, bytes]) -> bytes:
        """The bytes of ids, given those of the special ones."""
        n = len(self._pieces)
        return b"".join(special[i] if i in special else self._pieces[i] if i < n else b"" for i in ids)


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

    50,258 ids, the vocabulary of MDLM's OpenWebText models; with `"gpt2:N"` the mask is the last of N ids, and those
    between stand for nothing. The vocabulary is read from `TIKTOKEN_CACHE_DIR`, from `gpt2_bpe/tiktoken_cache` in the
    data root, or else downloaded to there.
    """

    type = "gpt2"
    bos_id = eos_id = 50256

    def __init__(self, root: str | os.PathLike | None = None, size: int | None = None):
        """`root`: the data folder, as in `load`; `size`: the N of `gpt2:N`.

        Raises:
          RuntimeError: the vocabulary is not at hand and cannot be downloaded.
          ImportError: tiktoken is not installed.
        """
        self._size = size
        self.name, self.vocab_size, self.mask_id = _sized("gpt2", 50257, size)
        self._encoding = _gpt2_encoding(root)
        self._pieces = [self._encoding.decode_single_token_bytes(i) for i in range(50256)]

    def encode(self, text: str) -> np.ndarray:
        return _encode_with_tiktoken(self._encoding, [text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return _encode_with_tiktoken(self._encoding, texts)

    def to_json(self) -> dict[str, Any]:
        return {"type": "gpt2"} | ({} if self._size is None else {"size": self._size})

    @classmethod
    def _from_json(cls, value: dict[str, Any], root: str | os.PathLike | None) -> GPT2:
        return cls(root, _size_of(value))


def _sized(name: str, ids: int, size: int | None) -> tuple[str, int, int]:
    """(name, vocab_size, mask_id) of a vocabulary of `ids` ids without a mask, in `size` ids with it."""
    if size is None:
        return name, ids + 1, ids
    if size <= ids:
        raise ValueError(f"tokenizer '{name}:{size}': its {ids} ids and the mask need at least {name}:{ids + 1}")
    return f"{name}:{size}", size, size - 1


def _size_of(value: dict[str, Any]) -> int | None:
    size = value.get("size")
    if size is not None and type(size) is not int:
        raise TypeError(f"size {size!r}")
    return size


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


def _encode_with_library(library, texts: list[str]) -> list[np.ndarray]:
    """Ids of each text, int32."""
    for text in texts:
        _utf8(text)
    groups = [_parts(text, ENCODED_RUN) for text in texts]
    rows = library.encode_batch_fast([part for group in groups for part in group], add_special_tokens=False)
    ids = iter([np.array(row.ids, np.int32) for row in rows])
    return [np.concatenate([next(ids) for _ in group]) for group in groups]


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
        return _encode_with_library(self._library, texts)

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


def _found(
    name: str, place: str, url: str, sha256: str, root: str | os.PathLike | None, elsewhere: Path | None
) -> bytes:
    """A vocabulary file that others have too: from the data folder, from `elsewhere`, or downloaded; lines end in \\n.

    Raises:
      RuntimeError: it is nowhere, or not the one whose SHA-256 is known.
    """
    path = data_root(root) / place
    if not path.is_file() and elsewhere is not None and elsewhere.is_file():
        path = elsewhere
    if not path.is_file():
        try:
            download(url, path, sha256, name=name)
        except (OSError, ValueError) as error:
            also = ", or pip install --no-deps rwkv, which has it" if name == "world" else ""
            raise RuntimeError(
                f"the vocabulary of tokenizer {name!r} is not at {path} and could not be downloaded from {url} "
                f"({type(error).__name__}): put the file there{also}"
            ) from error
    content = path.read_bytes().replace(b"\r\n", b"\n")
    if (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise RuntimeError(
            f"{path} is not the vocabulary of tokenizer {name!r} (sha256 {found}, expected {sha256}): move it away, or "
            "name another vocabulary by its path"
        )
    return content


def _world_vocabulary(content: bytes, path: str) -> dict[int, bytes]:
    """{id: bytes} of a file of RWKV's: lines of an id, a Python literal of text or bytes, and how many bytes it has."""
    try:
        lines = content.decode().replace("\r\n", "\n").strip("\n").split("\n")
        parts = [(line.index(" "), line.rindex(" ")) for line in lines]
        literals = [line[first + 1 : last] for line, (first, last) in zip(lines, parts, strict=True)]
        values = ast.literal_eval("[" + ",".join(literals) + "]")  # all at once: one by one takes a second
        pieces = [v.encode() if isinstance(v, str) else bytes(v) for v in values]
        ids = [int(line[:first]) for line, (first, _) in zip(lines, parts, strict=True)]
        lengths = [int(line[last:]) for line, (_, last) in zip(lines, parts, strict=True)]
        if lengths != [len(piece) for piece in pieces] or len(set(ids)) < len(ids):
            raise ValueError("a piece has not the length that its line says, or an id stands there twice")
    except (ValueError, SyntaxError, TypeError) as error:
        raise ValueError(f"{path} is no vocabulary of RWKV World's format ({error})") from None
    return dict(zip(ids, pieces, strict=True))


class World(_Bytes):
    """RWKV's World: at each byte of the text the longest piece that stands there.

    65,536 ids: 0 ends a text (BOS and EOS), 1 to 65,529 are pieces, the last is the mask, and those before it stand for
    nothing. The vocabulary, `rwkv_vocab_v20230424.txt`, is read from `rwkv_world` in the data folder, from the Python
    package `rwkv` where that is installed, or downloaded to the former; its SHA-256 is checked. `"world:PATH"` takes
    another file of that format, and the mask is then the id after its last.
    """

    type = "world"
    bos_id = eos_id = 0
    file = "rwkv_vocab_v20230424.txt"
    url = "https://raw.githubusercontent.com/BlinkDL/ChatRWKV/main/tokenizer/rwkv_vocab_v20230424.txt"
    sha256 = "e6dee3d4e31b4d5c40ac99508ac6c701ceef4bed681bf2167ce9a908552bca89"

    def __init__(self, root: str | os.PathLike | None = None, vocabulary: dict[int, bytes] | None = None):
        """`root`: the data folder; `vocabulary`: {id: bytes} in place of the one that is told above.

        Raises:
          ValueError: the vocabulary lacks a byte, has a piece twice or an empty one, or an id below 1.
          RuntimeError: there is none.
        """
        self._given = vocabulary
        if vocabulary is None:
            package = importlib.util.find_spec("rwkv")
            places = (package.submodule_search_locations or ()) if package else ()
            elsewhere = next((Path(place) / self.file for place in places), None)
            place = f"rwkv_world/{self.file}"
            vocabulary = _world_vocabulary(_found("world", place, self.url, self.sha256, root, elsewhere), self.file)
        self._ids = {piece: i for i, piece in vocabulary.items()}
        if len(self._ids) < len(vocabulary) or b"" in self._ids or min(vocabulary, default=0) < 1:
            raise ValueError("a World vocabulary has each piece once, none empty, and ids from 1")
        if missing := [byte for byte in range(256) if bytes([byte]) not in self._ids]:
            raise ValueError(f"a World vocabulary has each byte among its pieces; this one lacks {missing[0]}")
        self.name = "world"
        self.vocab_size = 1 << 16 if self._given is None else max(vocabulary) + 2
        self.mask_id = self.vocab_size - 1
        self._pieces = [vocabulary.get(i, b"") for i in range(max(vocabulary) + 1)]
        # how long the pieces are that begin with these four bytes, the longest first, then what else may stand there
        lengths: dict[bytes, set[int]] = {}
        for piece in self._ids:
            if len(piece) > 3:
                lengths.setdefault(piece[:4], set()).add(len(piece))
        self._lengths = {start: (*sorted(found, reverse=True), 3, 2) for start, found in lengths.items()}

    def encode(self, text: str) -> np.ndarray:
        data, ids, at = _utf8(text), self._ids, 0
        row: list[int] = []
        while at < len(data):
            piece = data[at : at + 1]
            for length in self._lengths.get(data[at : at + 4], (3, 2)):
                if data[at : at + length] in ids:  # at the end of the text a shorter one, which is the longest there is
                    piece = data[at : at + length]
                    break
            row.append(ids[piece])
            at += len(piece)
        return np.array(row, np.int32)

    def to_json(self) -> dict[str, Any]:
        if self._given is None:
            return {"type": "world"}
        return {"type": "world", "vocabulary": [[i, piece.hex()] for i, piece in sorted(self._given.items())]}

    @classmethod
    def _from_json(cls, value: dict[str, Any], root: str | os.PathLike | None) -> World:
        if "vocabulary" not in value:
            return cls(root)
        return cls(root, {int(i): bytes.fromhex(piece) for i, piece in value["vocabulary"]})

    @classmethod
    def read(cls, path: str) -> World:
        """`"world:PATH"`. Raises ValueError for another kind of file, or OSError where it cannot be read."""
        return cls(None, _world_vocabulary(Path(path).expanduser().read_bytes(), path))


# where it lies in the data folder, its home, its SHA-256
NEOX = (
    "gpt_neox/20B_tokenizer.json",
    "https://raw.githubusercontent.com/BlinkDL/ChatRWKV/main/20B_tokenizer.json",
    "56ac4821e129d2c520fdaba60abd920fa852ada51b45c0dd52bbb6bd8c985ade",
)
# What others call the ends of a text, among the special tokens of a tokenizer.json; the first that is there counts.
_EOS = (END_OF_TEXT, "</s>", "<eos>", "<|end_of_text|>", "[SEP]", "<|im_end|>")
_BOS = ("<|startoftext|>", "<s>", "<bos>", "<|begin_of_text|>", "[CLS]")


class Json(_Bytes):
    """Any `tokenizer.json` of the `tokenizers` library, by its path; with `"PATH:N"` the mask is the last of N ids.

    `"neox"` is GPT-NeoX's in 50,304 ids, as of RWKV's models of the Pile: 50,277 tokens, then unused ids, then the
    mask. Its file `20B_tokenizer.json` is read from `gpt_neox` in the data folder, or downloaded to there; its SHA-256
    is checked.

    Special tokens are never read out of a text, and none is added. EOS is one of the special tokens by its name, and
    BOS is another, or the same.
    """

    type = "json"

    def __init__(self, state: dict[str, Any], size: int | None = None):
        """`state`: what the file holds; `size`: the N of `PATH:N`."""
        try:
            from tokenizers import Tokenizer as Library
        except ImportError:
            raise ImportError("a tokenizer.json needs the tokenizers library: pip install tokenizers") from None
        self._state = dict(state) | {"truncation": None, "padding": None}
        self._library = Library.from_str(json.dumps(self._state))
        self._library.encode_special_tokens = True  # as if they were ordinary text
        vocabulary = self._library.get_vocab(with_added_tokens=True)
        self._size = size
        ids = max(vocabulary.values(), default=-1) + 1
        self.name, self.vocab_size, self.mask_id = _sized("tokenizer.json", ids, size)
        added = {token["content"]: token["special"] for token in self._state.get("added_tokens") or ()}
        eos, bos = (next((vocabulary[token] for token in names if added.get(token)), None) for names in (_EOS, _BOS))
        self.eos_id, self.bos_id = bos if eos is None else eos, eos if bos is None else bos
        self._by_bytes = (self._state.get("decoder") or {}).get("type") == "ByteLevel"
        if self._by_bytes:
            byte_of = _byte_of_character()
            self._pieces = [b""] * (self.vocab_size - 1)
            for token, i in vocabulary.items():
                if token not in added:
                    self._pieces[i] = bytes(byte_of[c] for c in token)
                elif not added[token]:
                    self._pieces[i] = token.encode()

    def encode(self, text: str) -> np.ndarray:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[np.ndarray]:
        return _encode_with_library(self._library, texts)

    def _decoded(self, ids: list[int], special: dict[int, bytes]) -> bytes:
        if self._by_bytes:
            return super()._decoded(ids, special)
        parts = []
        for alone, group in itertools.groupby(ids, lambda i: i if i in special else None):
            run = list(group)
            parts.append(self._library.decode(run).encode() if alone is None else special[alone] * len(run))
        return b"".join(parts)

    def to_json(self) -> dict[str, Any]:
        return {"type": "json", "size": self._size, "tokenizers": self._state}

    @classmethod
    def _from_json(cls, value: dict[str, Any], root: str | os.PathLike | None) -> Json:
        return cls(value["tokenizers"], _size_of(value))

    @classmethod
    def read(cls, path: str, size: int | None = None) -> Json:
        """The tokenizer of a file. Raises ValueError for one that is none, or OSError where it cannot be read."""
        content = Path(path).expanduser().read_bytes()
        try:
            return cls(json.loads(content), size)
        except ImportError:
            raise
        except Exception as error:  # the library raises Exception itself
            text = " ".join(str(error).split())[:200]
            raise ValueError(f"{path} is no tokenizer.json that can be used ({text})") from None

    @classmethod
    def neox(cls, root: str | os.PathLike | None = None) -> Json:
        """`"neox"`. Raises RuntimeError where its file is not in the data folder `root` and cannot be downloaded."""
        return cls(json.loads(_found("neox", *NEOX, root, None)), 50304)

    def __getstate__(self) -> dict[str, Any]:
        return self.to_json()

    def __setstate__(self, state: dict[str, Any]) -> None:
        Json.__init__(self, state["tokenizers"], state["size"])


TOKENIZERS: dict[str, type[Tokenizer]] = {
    "char": Char,
    "byte": Byte,
    "gpt2": GPT2,
    "bpe": BPE,
    "world": World,
    "json": Json,
}

MOST_IDS = 1 << 20  # of a vocabulary whose size is given
FORMS = (
    "'char' | 'byte' | 'gpt2' | 'bpe:N' (N ids, such as 'bpe:4096', trained on the text) | 'world' | 'neox' | "
    "'PATH.json' (a tokenizer.json) | 'world:PATH' (a vocabulary of its format) | 'gpt2:N', 'PATH.json:N' (with "
    "unused ids, N in all)"
)


def parse(spec: str) -> tuple[str, Any]:
    """Splits a specification into its type and what stands behind it.

    Returns:
      (a name in `TOKENIZERS`, what else is said): of bpe and gpt2 the size or None, of world the path or None, of json
      (path or "neox", size or None).

    Raises:
      ValueError: the specification has none of the known forms (they are listed).
    """
    text = spec if isinstance(spec, str) else ""
    if text in ("char", "byte", "gpt2", "world"):
        return text, None
    if text == "neox":
        return "json", ("neox", None)
    if text.startswith("world:") and text != "world:":
        return "world", text.removeprefix("world:")
    if match := re.fullmatch(r"(.+\.json|bpe|gpt2):([1-9][0-9]*)", text, re.DOTALL):
        kind = match[1] if match[1] in ("bpe", "gpt2") else "json"
        least = {"bpe": 260, "gpt2": 50258, "json": 2}[kind]
        if len(match[2]) > 7 or not least <= int(match[2]) <= MOST_IDS:
            raise ValueError(f"tokenizer {spec!r} needs a vocabulary of {least} to {MOST_IDS}; use {FORMS}")
        return (kind, (match[1], int(match[2]))) if kind == "json" else (kind, int(match[2]))
    if text.endswith(".json"):
        return "json", (text, None)
    raise ValueError(f"tokenizer {spec!r} is no tokenizer; use {FORMS}")


def make(
    spec: str,
    texts: Iterable[str] | None = None,
    *,
    specials: bool = False,
    root: str | os.PathLike | None = None,
) -> Tokenizer:
    """The tokenizer that a specification names.

    Args:
      spec: one of `FORMS`.
      texts: the text that a char or bpe tokenizer is made from, in pieces of any size.
      specials: whether a char tokenizer gets BOS and EOS; the others have them by themselves, but for a tokenizer.json
        without any.
      root: the data folder in which the vocabularies of gpt2, world and neox are looked for.

    Raises:
      ValueError: malformed specification, no text where text is needed, or a file of another kind.
      OSError: a file cannot be read.
      RuntimeError: a vocabulary is not at hand and cannot be downloaded.
    """
    kind, more = parse(spec)
    if kind == "byte":
        return Byte()
    if kind == "gpt2":
        return GPT2(root, more)
    if kind == "world":
        return World(root) if more is None else World.read(more)
    if kind == "json":
        return Json.neox(root) if more == ("neox", None) else Json.read(*more)
    if texts is None:
        raise ValueError(f"tokenizer {spec!r} is made from text, and none was given")
    if kind == "bpe":
        return BPE.train(more, texts)
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
