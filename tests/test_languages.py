"""Regular languages and their oracle, against enumeration by definitions that know no automaton."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffrwkv.diffusion.objectives import Diffusion
from diffrwkv.diffusion.processes import Masked, Vocabulary
from diffrwkv.diffusion.samplers import Ancestral, Confidence, FirstHitting, sequence_keys
from diffrwkv.languages import DEAD, LANGUAGES, language
from diffrwkv.oracle import log_posterior, oracle

# --- The languages, defined anew --------------------------------------------------------------------------------------


def answered(inputs, answer):
    """A word is an input and its answer."""
    return lambda word: re.fullmatch(inputs, word[:-1]) is not None and word[-1] == answer(word[:-1])


def place(moves):
    return str((moves.count(">") - moves.count("<")) % 5)


def value(expression):
    return "abcde"[eval(expression) % 5]  # digits and operators alone


def changes(bits):
    return str((bits.count("ab") + len(re.findall("(?=ba)", bits))) % 2)


def matrix(images):
    """Of a permutation: row i has a 1 where i goes to."""
    return np.eye(len(images), dtype=int)[list(images)]


def products(degree, a, b, even):
    """Words of generators, each followed by the product so far, as matrices."""
    every = list(itertools.permutations(range(degree)))
    ordered = [p for sign in (1, -1) for p in every if round(np.linalg.det(matrix(p))) == sign]
    letters = {matrix(p).tobytes(): chr(0x100 + i) for i, p in enumerate(ordered[: len(ordered) // (1 + even)])}

    def is_word(word):
        product = np.eye(degree, dtype=int)
        for generator, letter in zip(word[::2], word[1::2], strict=False):
            if generator not in "ab":
                return False
            product = product @ matrix(a if generator == "a" else b)
            if letters[product.tobytes()] != letter:
                return False
        return len(word) % 2 == 0

    return is_word


def balanced(word):
    depth = most = 0
    for x in word:
        depth += 1 if x in "([" else -1
        most = max(most, depth)
    while (shorter := word.replace("()", "").replace("[]", "")) != word:
        word = shorter
    return not word and most <= 4


IS_WORD = {
    "parity": answered("[ab]*", lambda bits: str(bits.count("b") % 2)),
    "even_pairs": answered("[ab]+", changes),
    "cycle_navigation": answered("[<>.]*", place),
    "modular_arithmetic": answered(r"[0-4]([-+*][0-4])*", value),
    "s3": products(3, (1, 0, 2), (1, 2, 0), even=False),
    "s5": products(5, (1, 0, 2, 3, 4), (1, 2, 3, 4, 0), even=False),
    "a5": products(5, (1, 2, 0, 3, 4), (1, 2, 3, 4, 0), even=True),
    "dyck": balanced,
}
# At which every string of symbols can be tried; every smaller length is too.
SMALL = {"parity": 7, "even_pairs": 7, "cycle_navigation": 4, "modular_arithmetic": 4, "s3": 4, "s5": 2, "a5": 2}
SMALL |= {"dyck": 8}
NAMES = list(LANGUAGES)


@functools.cache
def words_of(name, length):
    """Every word of this length, int32 [X, L]."""
    lang = language(name)
    words = ["".join(x) for x in itertools.product(lang.symbols, repeat=length)]
    found = [lang.encode(word) for word in words if IS_WORD[name](word)]
    return np.asarray(found, np.int32).reshape(len(found), length)


@functools.cache
def posterior_of(name):
    return jax.jit(log_posterior(language(name)))


# --- Counting, drawing, deciding --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_words_are_counted_and_told(name):
    lang = language(name)
    assert lang.symbols == "".join(sorted(set(lang.symbols)))
    for length in range(1, SMALL[name] + 1):
        strings = np.asarray(list(itertools.product(range(len(lang.symbols)), repeat=length)), np.int32)
        words = words_of(name, length)
        assert lang.count(length) == len(words)
        np.testing.assert_array_equal(strings[lang.valid(strings)], words)
    assert lang.log_count(SMALL[name]) == pytest.approx(np.log(len(words)))


def test_counts_that_are_known():
    assert language("parity").count(512) == 2**511
    assert language("cycle_navigation").count(64) == 3**63
    assert language("modular_arithmetic").count(64) == 5**32 * 3**31
    assert language("s5").count(512) == 2**256
    assert language("s5").log_count(512) == pytest.approx(256 * np.log(2), rel=1e-12)
    assert [language(n).tracks.num_states for n in ("s3", "s5", "a5", "dyck")] == [6, 120, 60, 31]
    shallow = [language("dyck").count(2 * n) for n in range(1, 6)]
    assert shallow == [2 * 1, 4 * 2, 8 * 5, 16 * 14, 32 * (42 - 1)]  # Catalan's, less the one path that is 5 deep


@pytest.mark.parametrize("name", NAMES)
def test_draws_are_even(name):
    length = max(n for n in range(1, SMALL[name] + 1) if language(name).count(n))
    words = words_of(name, length)
    drawn = language(name).sample(length, 30 * len(words), seed=1)
    _, seen = np.unique(np.concatenate([words, drawn]), axis=0, return_counts=True)
    assert len(seen) == len(words)
    assert stats.chisquare(seen - 1).pvalue > 1e-3
    assert (language(name).sample(length, 5, seed=1) == language(name).sample(length, 5, seed=1)).all()
    assert (language(name).sample(length, 50, seed=1) != language(name).sample(length, 50, seed=2)).any()


@pytest.mark.parametrize("name", NAMES)
def test_what_can_become_a_word(name):
    lang, rng = language(name), np.random.default_rng(3)
    length = max(n for n in range(1, SMALL[name] + 1) if lang.count(n))
    words = words_of(name, length)
    z = rng.integers(0, len(lang.symbols), (300, length)).astype(np.int32)
    z[:150] = words[rng.integers(0, len(words), 150)]
    z[100:150, 0] = rng.integers(0, len(lang.symbols), 50)
    blank = rng.random(z.shape) < 0.6
    z = np.where(blank, len(lang.symbols), z)
    agrees = ((z[:, None] == words[None]) | blank[:, None]).all(axis=2).any(axis=1)
    assert 0 < agrees.sum() < len(z)
    np.testing.assert_array_equal(lang.completable(z), agrees)


def test_states_are_those_of_the_inputs():
    bits = np.asarray([[0, 1, 1, 0, 1]])
    tracks = language("parity").tracks
    assert len(set(tracks.states(bits)[0][[0, 2, 3]])) == 1 and len(set(tracks.states(bits)[0])) == 2
    whole = language("parity").states(language("parity").encode("ab1b")[None])[0]  # nothing follows an answer
    assert (whole[:3] != DEAD).all() and whole[3] == DEAD
    np.testing.assert_array_equal(language("parity").states(np.asarray([[4, 2]])), DEAD)  # a blank is no symbol
    lang = language("s3")
    word = lang.encode("b" + chr(0x101) + "a" + chr(0x104))  # as the definition above has it
    states = lang.tracks.states(lang.tracks.encode("ba")[None])
    assert lang.valid(word[None]).all() == IS_WORD["s3"](lang.decode(word[None])[0])
    assert states.shape == (1, 2) and states[0, 0] != states[0, 1]
    for name in ("s5", "a5"):  # labels tell as much as the letters of a traced word
        lang = language(name)
        words = lang.sample(40, 50, seed=0)
        inputs = np.asarray([[lang.tracks.symbols.index(lang.symbols[x]) for x in row[::2]] for row in words])
        pairs = set(zip(lang.tracks.states(inputs).ravel(), words[:, 1::2].ravel(), strict=True))
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"no language is called 'palindrome': choose one of parity"):
        language("palindrome")
    with pytest.raises(ValueError, match=r"no word of length 63: take another length, such as \[56, 58, "):
        language("modular_arithmetic").log_count(63)
    with pytest.raises(ValueError, match="no word of length 5"):
        language("dyck").sample(5, 1, seed=0)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        language("dyck").count(0)
    with pytest.raises(ValueError, match="'x' is no symbol of dyck"):
        language("dyck").encode("(x)")


# --- The oracle -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_posterior_is_that_of_enumeration(name):
    lang, rng = language(name), np.random.default_rng(4)
    length = max(n for n in range(1, SMALL[name] + 1) if lang.count(n))
    words = words_of(name, length)
    z = words[rng.integers(0, len(words), 64)]
    z = np.where(rng.random(z.shape) < np.linspace(0, 1, 64)[:, None], len(lang.symbols), z)
    z[-1] = 0 if name != "dyck" else 1  # no word: an answer or a closing bracket at every place
    agrees = ((z[:, None] == words[None]) | (z[:, None] == len(lang.symbols))).all(axis=2)  # [B, X]
    shown = words[..., None] == np.arange(len(lang.symbols))
    count = np.einsum("bx,xls->bls", agrees.astype(int), shown)
    possible = agrees.any(axis=1)
    assert possible[:-1].all() and (name == "s5" or not possible[-1])
    number = np.maximum(agrees.sum(axis=1), 1)[:, None, None]
    law = np.where(possible[:, None, None], count / number, 1 / len(lang.symbols))
    found = np.asarray(posterior_of(name)(jnp.asarray(z)))
    np.testing.assert_allclose(np.exp(found), law, atol=2e-6)
    assert (np.isneginf(found) == (law == 0)).all()


@pytest.mark.parametrize("name, length", [("s5", 512), ("modular_arithmetic", 512), ("dyck", 100)])
def test_posterior_of_long_texts(name, length):
    """Against sums of exact integers."""
    lang, rng = language(name), np.random.default_rng(5)
    word = lang.sample(length, 1, seed=6)
    z = np.where(rng.random((2, length)) < np.asarray([[0.7], [0.97]]), len(lang.symbols), word).astype(np.int32)
    found = np.exp(np.asarray(posterior_of(name)(jnp.asarray(z)), np.float64))
    edges = [(q, s, lang.table[q, s]) for q, s in zip(*np.nonzero(lang.table != DEAD), strict=True)]
    for row, law in zip(z, found, strict=True):
        before, after = [[int(q == lang.start) for q in range(lang.num_states)]], [list(map(int, lang.accepts))]
        for i in range(length):
            here, there = [0] * lang.num_states, [0] * lang.num_states
            for q, s, to in edges:
                here[to] += before[-1][q] * int(row[i] in (s, len(lang.symbols)))
                there[q] += after[-1][to] * int(row[-1 - i] in (s, len(lang.symbols)))
            before.append(here)
            after.append(there)
        after.reverse()
        for i in (*range(0, length, 37), length - 1):
            exact = [0] * len(lang.symbols)
            for q, s, to in edges:
                exact[s] += before[i][q] * after[i + 1][to] * int(row[i] in (s, len(lang.symbols)))
            total = sum(exact)
            np.testing.assert_allclose(law[i], [x / total for x in exact], atol=2e-5)


def vocabulary(name):
    return Vocabulary(len(language(name).symbols) + 1, len(language(name).symbols))


def drawn(name, sampler, length, number):
    canvas = jnp.full((number, length), len(language(name).symbols), jnp.int32)
    fill = jax.jit(lambda keys: sampler(Masked(vocabulary(name)), oracle(language(name)), keys, canvas))
    return np.asarray(fill(sequence_keys(0, number)).tokens)


def test_one_symbol_in_a_pass_samples_the_language():
    """Whatever the order."""
    words = words_of("even_pairs", 5)
    for sampler in (FirstHitting(), Confidence(num_steps=1, block=1, temperature=1.0)):
        tokens = drawn("even_pairs", sampler, 5, 1024)
        _, seen = np.unique(np.concatenate([words, tokens]), axis=0, return_counts=True)
        assert len(seen) == len(words)
        assert stats.chisquare(seen - 1).pvalue > 1e-3


def test_what_parallel_sampling_loses():
    """All at once the answer is drawn apart from the input, and is right by chance; then so is every symbol of dyck."""
    valid = language("parity").valid(drawn("parity", Ancestral(num_steps=1), 16, 2048)).mean()
    assert abs(valid - 0.5) < 4 * (0.25 / 2048) ** 0.5
    marginals = np.exp(np.asarray(posterior_of("dyck")(jnp.full((1, 4), 4, jnp.int32)), np.float64))[0]
    chance = sum(marginals[np.arange(4), word].prod() for word in words_of("dyck", 4))
    valid = language("dyck").valid(drawn("dyck", Ancestral(num_steps=1), 4, 2048)).mean()
    assert 0.05 < chance < 0.5 and abs(valid - chance) < 4 * (chance / 2048) ** 0.5


def test_its_bound_is_the_entropy():
    lang, length, number = language("dyck"), 8, 4096
    objective = Diffusion(Masked(vocabulary("dyck")), time_eps=1e-4)
    words = jnp.asarray(lang.sample(length, number, seed=0))
    times = objective.times(jax.random.key(0), number, length)
    loss = jax.jit(lambda *x: objective.loss(oracle(lang), *x))(jax.random.key(1), words, times)
    nats = np.asarray(loss.nats, np.float64)
    assert abs(nats.mean() - lang.log_count(length)) < 4 * nats.std() / number**0.5


def test_oracle_of_more_ids():
    """Ids that no symbol has are never predicted, and there must be one for the mask."""
    lang, z = language("parity"), jnp.full((1, 8), 6, jnp.int32)
    few, many = oracle(lang)(z, None), oracle(lang, 7)(z, None)
    np.testing.assert_array_equal(many[..., :4], few[..., :4])
    assert few.shape == (1, 8, 5) and jnp.isneginf(many[..., 4:]).all() and many.shape == (1, 8, 7)
    with pytest.raises(ValueError, match="4 symbols, and a mask"):
        oracle(lang, 4)
