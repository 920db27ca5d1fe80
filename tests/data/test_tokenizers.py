import json
import os
import pathlib
import random
import subprocess
import sys
import tempfile

import numpy as np
import pytest

from diffrwkv.data import tokenizers
from diffrwkv.data.tokenizers import TOKENIZERS, Byte, Char, Tokenizer, encode_documents, make

TEXT = (
    "It was the best of times, it was the worst of times.\n\n"
    "  The café's naïve façade — 東京 — cost 12345 €…\t\U0001f600 don't, we'll\r\n"
) * 3


def gpt2():
    """GPT-2's tokenizer, or a skip: the tests never use the network."""
    folder = os.environ.get("TIKTOKEN_CACHE_DIR") or os.path.join(
        os.environ.get("DIFFRWKV_DATA") or "nowhere", "gpt2_bpe", "tiktoken_cache"
    )
    if not os.path.exists(os.path.join(folder, "6d1cbeee0f20b3d9449abfede4726ed8212e3aee")):
        pytest.skip("no GPT-2 vocabulary: set DIFFRWKV_DATA or TIKTOKEN_CACHE_DIR to run this")
    return make("gpt2")


def world_file(folder):
    """A vocabulary as RWKV's are written: bytes, and pieces that overlap, text or bytes."""
    pieces = [bytes([i]) for i in range(256)] + ["it", "t was", "it was the", "  ", "    ", "é", "東京".encode()[:4]]
    lines = []
    for i, piece in enumerate(pieces, 1):
        if isinstance(piece, bytes) and len(piece) == 1 and piece < b"\x80":
            piece = piece.decode()
        size = len(piece.encode() if isinstance(piece, str) else piece)
        lines.append(f"{i + 3 * (i > 256)} {piece!r} {size}\r\n")  # ids may be left out
    path = folder / "vocabulary.txt"
    path.write_bytes("".join(lines).encode())
    return path


def json_file(folder, special=True):
    """A tokenizer.json of a byte-level BPE as GPT-NeoX's: its special tokens first, then added blanks."""
    import tokenizers as library

    made = library.Tokenizer.from_str(json.dumps(make("bpe:300", [TEXT]).to_json()["tokenizers"]))
    made.add_special_tokens(["<|endoftext|>", "<|padding|>"] if special else [])
    made.add_tokens([library.AddedToken("        ", normalized=False)])
    made.post_processor = library.processors.ByteLevel(trim_offsets=True)
    made.enable_truncation(4)
    path = folder / "tokenizer.json"
    made.save(str(path))
    return path


def build(kind):
    if kind == "gpt2":
        return gpt2()
    if kind in ("world", "json"):
        with tempfile.TemporaryDirectory() as folder:
            path = {"world": world_file, "json": json_file}[kind](pathlib.Path(folder))
            return make(f"world:{path}" if kind == "world" else str(path))
    return make("bpe:300" if kind == "bpe" else kind, [TEXT], specials=True)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_specials_stand_at_the_end(kind):
    tokenizer = build(kind)
    assert tokenizer.mask_id == tokenizer.vocab_size - 1
    assert tokenizer.pad_id != tokenizer.mask_id
    specials = {tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id}
    assert all(0 <= i < tokenizer.vocab_size for i in specials)


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_decode_shows_the_mask_and_refuses_foreign_ids(kind):
    tokenizer = build(kind)
    ids = np.concatenate([[tokenizer.bos_id], tokenizer.encode("it"), [tokenizer.eos_id]])
    assert tokenizer.decode(ids) == "it"
    assert tokenizer.decode(ids, specials=True) not in ("it", "")
    masked = [tokenizer.mask_id, *tokenizer.encode("it").tolist(), tokenizer.mask_id]
    assert tokenizer.decode(masked) == "_it_"
    assert tokenizer.decode(masked, mask="░") == "░it░"
    for wrong in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"id {wrong} is outside the vocabulary"):
            tokenizer.decode([wrong])


def test_char_matches_the_peers_count():
    tokenizer = Char("cab")
    assert (tokenizer.vocab_size, tokenizer.mask_id, tokenizer.eos_id) == (4, 3, None)
    assert tokenizer.encode("abc").tolist() == [0, 1, 2]
    assert Char("cab", specials=True).vocab_size == 6
    assert Char("ab").fingerprint != Char("ab", specials=True).fingerprint != Char("abc").fingerprint


def test_char_names_the_unknown_character():
    with pytest.raises(ValueError, match=r"'z' \(U\+007A, position 2\)"):
        Char("ab").encode("abz")
    with pytest.raises(ValueError, match="'é'"):
        Char("ab").encode("é")


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_lone_surrogate_is_one_clear_error(kind):
    with pytest.raises(ValueError, match="surrogate|not among"):
        build(kind).encode("ab\ud800")


def test_byte_ids_are_utf8():
    assert Byte().encode("é").tolist() == list("é".encode())
    assert Byte().decode([0xC3]) == "\ufffd"


def test_bpe_size_and_determinism():
    text = TEXT * 5
    first = make("bpe:320", [text])
    assert first.vocab_size <= 320 and len(first.encode(text)) < len(text.encode())
    program = "import sys; from diffrwkv.data.tokenizers import make; print(make('bpe:320', [sys.argv[1]]).fingerprint)"
    environment = {**os.environ, "PYTHONHASHSEED": "123"}
    out = subprocess.run([sys.executable, "-c", program, text], env=environment, capture_output=True, text=True)
    assert out.stdout.strip() == first.fingerprint, out.stderr


def test_bpe_of_little_text_is_smaller_than_asked():
    assert tokenizers.parse("bpe:1000") == ("bpe", 1000)
    assert make("bpe:1000", ["ab ab ab"]).vocab_size < 270


def test_gpt2_is_mdlm_vocabulary():
    tokenizer = gpt2()
    assert (tokenizer.vocab_size, tokenizer.mask_id, tokenizer.bos_id) == (50258, 50257, 50256)
    assert tokenizer.bos_id == tokenizer.eos_id
    assert tokenizer.encode("Hello world").tolist() == [15496, 995]
    assert 50256 not in tokenizer.encode("<|endoftext|>").tolist()


def test_gpt2_without_vocabulary_says_where_it_belongs(monkeypatch, tmp_path):
    tiktoken = pytest.importorskip("tiktoken")

    def offline(name):
        assert os.environ["TIKTOKEN_CACHE_DIR"] == str(tmp_path / "gpt2_bpe" / "tiktoken_cache")
        raise ConnectionError("no route")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    monkeypatch.delenv("TIKTOKEN_CACHE_DIR", raising=False)
    with pytest.raises(RuntimeError, match="neither in .*tiktoken_cache nor could it be downl"):
        make("gpt2", root=tmp_path)
    assert "TIKTOKEN_CACHE_DIR" not in os.environ


def greedy(vocabulary, data):
    """Ids of the longest pieces, by trying all of them at each byte."""
    ids = []
    while data:
        piece = max((piece for piece in vocabulary if data.startswith(piece)), key=len)
        ids.append(vocabulary[piece])
        data = data[len(piece) :]
    return ids


def test_world_takes_the_longest_piece(tmp_path):
    tokenizer = make(f"world:{world_file(tmp_path)}")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id, tokenizer.vocab_size) == (0, 0, 267, 268)
    vocabulary = {piece: i for i, piece in enumerate(tokenizer._pieces) if piece}
    assert len(vocabulary) == 263
    for text in [*random_texts(200), TEXT, "it was the", "it was th", "東京", "it was the   "]:
        ids = tokenizer.encode(text).tolist()
        assert ids == greedy(vocabulary, text.encode()) and tokenizer.decode(ids) == text
    assert tokenizer.decode([258, 0, *tokenizer.encode("it"), 267], specials=True) == "<|endoftext|>it_"


def test_the_world_vocabulary_is_theirs(monkeypatch):
    """Where the package rwkv is installed, or the file is in the data folder."""
    monkeypatch.setattr(tokenizers, "download", lambda *a, **k: (_ for _ in ()).throw(OSError("no network in tests")))
    try:
        tokenizer = make("world")
    except RuntimeError:
        pytest.skip("no World vocabulary: pip install --no-deps rwkv, or put it into DIFFRWKV_DATA, to run this")
    assert (tokenizer.vocab_size, tokenizer.mask_id) == (65536, 65535)
    assert Tokenizer.from_json(tokenizer.to_json()) == tokenizer
    vocabulary = {piece: i for i, piece in enumerate(tokenizer._pieces) if piece}
    assert len(vocabulary) == 65529
    for text in random_texts(20):
        assert tokenizer.encode(text).tolist() == greedy(vocabulary, text[:60].encode()) or len(text) > 60


@pytest.mark.parametrize("spec, place", [("world", "rwkv_world"), ("neox", "gpt_neox")])
def test_a_vocabulary_that_is_missing_or_another_is_told(spec, place, monkeypatch, tmp_path):
    def offline(*arguments, **options):
        raise FileNotFoundError("no route")

    monkeypatch.setattr(tokenizers, "download", offline)
    monkeypatch.setitem(sys.modules, "rwkv", None)  # as if it were not installed
    monkeypatch.setattr(tokenizers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=f"tokenizer '{spec}' is not at .*{place}.* could not be downloaded"):
        make(spec, root=tmp_path)
    name = {"world": tokenizers.World.file, "neox": tokenizers.NEOX[0].split("/")[1]}[spec]
    (tmp_path / place).mkdir()
    (tmp_path / place / name).write_bytes(b"1 'a' 1\n")
    with pytest.raises(RuntimeError, match=f"is not the vocabulary of tokenizer '{spec}'"):
        make(spec, root=tmp_path)


@pytest.mark.parametrize(
    "lines, told",
    [
        ("", "no vocabulary of RWKV World's format"),
        ("1 'a' 2", "has not the length"),
        ("1 'a' 1\n1 'b' 1", "an id stands there twice"),
        ("1 __import__('os') 1", "no vocabulary"),
        ("1 3 1", "no vocabulary"),
        ("1 'a' 1", "lacks 0"),
        ("0 'a' 1", "ids from 1"),
        ("1 'a' 1\n2 'a' 1", "each piece once"),
    ],
)
def test_what_is_no_world_vocabulary_is_told(lines, told, tmp_path):
    (tmp_path / "v.txt").write_text(lines)
    with pytest.raises(ValueError, match=told):
        make(f"world:{tmp_path / 'v.txt'}")


def test_a_tokenizer_json_is_read_as_it_is(tmp_path):
    path = json_file(tmp_path)
    tokenizer, plain = make(str(path)), make("bpe:300", [TEXT])
    first = plain.vocab_size - 2  # two special tokens stand behind the pieces, then the blanks
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) == (first, first, first + 3)
    assert tokenizer.decode([first + 1, first]) == "" and tokenizer.decode([first + 2]) == " " * 8
    assert first + 2 in tokenizer.encode("a" + " " * 8 + "b")
    for text in [*random_texts(100), TEXT]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        if " " * 8 not in text:
            assert tokenizer.encode(text).tolist() == plain.encode(text).tolist()
    padded = make(f"{path}:400")
    assert (padded.vocab_size, padded.mask_id, padded.decode([398, 399])) == (400, 399, "_")
    with pytest.raises(ValueError, match="its .* ids and the mask need at least"):
        make(f"{path}:299")
    assert make(str(json_file(tmp_path, special=False))).eos_id is None
    for content in ("{}", "[", "[]", '{"model": 3}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="is no tokenizer.json that can be used"):
            make(str(path))


def test_a_tokenizer_json_of_words(tmp_path):
    """Its decoder joins words: what stands between masks and ends is decoded by itself."""
    import tokenizers as library

    made = library.Tokenizer(library.models.WordPiece({"[UNK]": 0, "it": 1, "was": 2, "##s": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = library.pre_tokenizers.Whitespace()
    made.decoder = library.decoders.WordPiece()
    made.add_special_tokens(["[CLS]", "[SEP]"])
    made.save(str(tmp_path / "tokenizer.json"))
    tokenizer = make(str(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode("it was its")
    assert (ids.tolist(), tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id) == ([1, 2, 1, 3], 4, 5, 6)
    assert tokenizer.decode([4, *ids, 6, 6, 2, 5]) == "it was its__was"
    assert tokenizer.decode([4, 1, 5], specials=True) == "<bos>it<eos>"


def test_gpt2_with_unused_ids():
    plain, padded = gpt2(), make("gpt2:50304")
    assert (padded.vocab_size, padded.mask_id, padded.eos_id) == (50304, 50303, 50256)
    assert padded.decode([50257, 15496, 50303]) == "Hello_" and padded.fingerprint != plain.fingerprint
    assert Tokenizer.from_json(padded.to_json()) == padded
    assert plain.to_json() == {"type": "gpt2"}


@pytest.mark.parametrize(
    "spec", ["", "chars", "bpe", "bpe:", "bpe:x", "bpe:-5", "bpe:99", "BPE:300", "world:", "gpt2:50257", "x.json:1"]
)
def test_malformed_specification_lists_the_forms(spec):
    with pytest.raises(ValueError, match=r"use 'char' \| 'byte' \| 'gpt2' \| 'bpe:N'"):
        make(spec, [TEXT])


def test_description_errors():
    with pytest.raises(ValueError, match="known types: char, byte, gpt2, bpe"):
        Tokenizer.from_json({"type": "wordpiece"})
    with pytest.raises(ValueError, match="lacks 'alphabet'"):
        Tokenizer.from_json({"type": "char"})
    with pytest.raises(ValueError, match="made from text, and none was given"):
        make("char")
    with pytest.raises(ValueError, match="the text is empty"):
        make("char", [])


def random_texts(count, seed=0):
    """Texts of every kind of character, long runs of blanks among them."""
    draw = random.Random(seed)
    alphabets = [
        "abcdefgh ", " \t\n\r\u3000\xa0\x85\x1c", "0123 ½²", "don't we'll 'S 've ",
        ".,-_!?<|endoftext|>", "é東京\U0001f600\u0301ß", "".join(map(chr, range(256))), TEXT,
    ]  # fmt: skip
    for _ in range(count):
        pieces = []
        for _ in range(draw.randrange(8)):
            alphabet = draw.choice(alphabets)
            pieces.append("".join(draw.choices(alphabet, k=draw.randrange(40))))
        yield "".join(pieces)


def test_bpe_by_tiktoken_gives_the_ids_of_the_library():
    """A checkpoint's text must read as it did when the library encoded it."""
    texts = list(random_texts(400))
    for size in (260, 300, 600):
        tokenizer = make(f"bpe:{size}", [*texts[:200], TEXT])
        assert tokenizer._encoding is not None
        rows = tokenizer.encode_batch(texts)
        for text, row in zip(texts, rows, strict=True):
            library = tokenizer._library.encode(text, add_special_tokens=False).ids
            assert row.tolist() == library == tokenizer.encode(text).tolist(), repr(text)
    # every character up to the ideographs, between letters, digits, marks and blanks: the same classes in both
    for start in [*range(0, 0x3400, 0x400), 0xA000, 0xD000, 0xF800, 0x10000, 0x1E000, 0x1F400]:
        characters = [chr(c) for c in range(start, start + 0x400) if not 0xD800 <= c < 0xE000]
        text = "".join(f"a{c}a 1{c}1 -{c}- {c} {c}{c}  {c}" for c in characters)
        library = tokenizer._library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text).tolist() == library, hex(start)


@pytest.mark.parametrize("change", ["order", "double", "prefix", "unreachable"])
def test_bpe_stays_with_the_library_where_tiktoken_could_differ(change):
    state = json.loads(json.dumps(make("bpe:300", [TEXT]).to_json()["tokenizers"]))
    model = state["model"]
    if change == "order":
        model["merges"][0], model["merges"][1] = model["merges"][1], model["merges"][0]
    elif change == "double":  # two pairs that make one id
        del model["merges"][-1]
    elif change == "prefix":
        state["pre_tokenizer"]["add_prefix_space"] = True
    else:  # a merge that its own parts' merges come before
        model["vocab"]["Ġqq"] = len(model["vocab"])
        model["vocab"]["Ġq"] = len(model["vocab"])
        model["vocab"]["qq"] = len(model["vocab"])
        model["merges"] += [["Ġ", "qq"], ["Ġ", "q"], ["q", "q"]]
    tokenizer = tokenizers.BPE(300, state)
    assert tokenizer._encoding is None
    for text in [*random_texts(40), " qq"]:
        library = tokenizer._library.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text).tolist() == library


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
@pytest.mark.parametrize("run", [" ", "a", "\u3000\n", "1", "-"])
def test_a_million_of_one_character(kind, run):
    """tiktoken panics on the blanks; a word of that length must not take minutes, in training either."""
    tokenizer = build(kind)
    text = "x" + run * (1_100_000 // len(run)) + "y it was"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    if kind == "bpe":
        assert make("bpe:270", [text]).vocab_size <= 270


def test_only_runs_beyond_the_limit_are_cut():
    limit = 10
    for text in [*random_texts(300), " " * 10, "a" * 10 + "1" * 10 + "-" * 10, "x" + " " * 11 + "y"]:
        parts = tokenizers._parts(text, limit)
        assert "".join(parts) == text
        runs = [run.group() for run in tokenizers._RUN.finditer(text)]
        assert (len(parts) > 1) == any(len(run) > limit for run in runs), repr(text)
        assert len(parts) == 1 + sum((len(run) - 1) // limit for run in runs)
        for part in parts:
            assert all(len(run.group()) <= limit for run in tokenizers._RUN.finditer(part))


def test_a_document_that_cannot_be_encoded_is_named(monkeypatch):
    pieces = [("ab", True), ("b", False), ("a", True), ("a", False), ("z", True)]
    for size in (1, 3, 100):
        with pytest.raises(ValueError, match=r"^document 3: character 'z'"):
            list(encode_documents(Char("ab\n"), pieces, batch_characters=size))
        with pytest.raises(ValueError, match=r"^document 13: character 'z'"):
            list(encode_documents(Char("ab\n"), pieces, batch_characters=size, done=10))

    class PanicException(BaseException):
        """As pyo3's."""

    class Encoding:
        def encode_to_numpy(self, text, disallowed_special):
            if "z" in text:
                raise PanicException("StackOverflow")
            return np.zeros(1, np.uint32)

    tokenizer = build("bpe")
    tokenizer._encoding = Encoding()
    with pytest.raises(ValueError, match=r"^document 3: tiktoken fails .*StackOverflow"):
        list(encode_documents(tokenizer, pieces))


def test_a_damaged_description_is_one_clear_error():
    for kind in ("char", "byte", "bpe", "world", "json"):
        value = build(kind).to_json()
        places = [(value, key) for key in value]
        if kind == "bpe":
            places += [(value["tokenizers"], key) for key in ("model", "pre_tokenizer")]
            places += [(value["tokenizers"]["model"], key) for key in ("vocab", "merges", "type")]
        for owner, key in places:
            before = owner[key]
            for wrong in (None, 3, -1.5, "x", [], [[]], {}, {"a": 1}, True, ["a"]):
                if wrong == before:
                    continue
                owner[key] = wrong
                try:
                    tokenizer = Tokenizer.from_json(value)
                except ValueError as error:
                    assert len(str(error)) < 400 and "\n" not in str(error)
                else:  # a description of something else
                    assert tokenizer.to_json() == value and tokenizer.encode("").size == 0
                    same = [("alphabet", "x"), ("size", 3), ("pre_tokenizer", None), ("merges", [])]
                    assert (key, wrong) in same
            owner[key] = before
    for wrong in (None, [], "char", {"type": []}, {"type": None}):
        with pytest.raises(ValueError, match="not a tokenizer description"):
            Tokenizer.from_json(wrong)
