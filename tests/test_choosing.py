"""Choices and last words: the bound of an answer against enumeration, its masks and errors, and what is filled in."""

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrwkv
from diffrwkv import choosing, scoring
from diffrwkv.config import UserError
from diffrwkv.diffusion import answers
from tests.known_run import LENGTH, MASK, Table, exact, ids, index, log_p, make, real, table

# --- The masks --------------------------------------------------------------------------------------


class Grid:
    """Random numbers that are spread evenly over their parts, so that what they make is a measure."""

    def permuted(self, x, axis):
        return x

    def random(self, shape):
        return np.broadcast_to((np.arange(shape[1]) + 0.5) / shape[1], shape)


@pytest.mark.parametrize("draws", [8, 16, 32, 128])
def test_each_number_of_masks_is_as_likely_as_another(draws):
    v = answers.strata(Grid(), draws, 8000)
    for n in range(1, 25):
        shares = np.bincount(answers.how_many(n, v).ravel(), minlength=n + 1) / v.size
        assert shares[0] == 0 and len(shares) == n + 1
        np.testing.assert_allclose(shares[1:], 1 / n, rtol=0.01)


def test_lladas_rounding_makes_some_numbers_more_likely():
    """What its code draws, over all of its starts; that of ours is within 1 % above."""
    worst = {}
    for n, b in itertools.product(range(1, 25), [8, 16, 32, 128]):
        starts = np.arange(1, n + 1)[:, None]
        drawn = (np.round(starts + np.arange(b) * (n / b)).astype(int) - 1) % n + 1
        counts = np.bincount(drawn.ravel(), minlength=n + 1)[1:]
        worst[n, b] = counts.max() / counts.min()
    assert worst[4, 8] == worst[12, 8] == max(worst.values()) == 3
    assert all(worst[n, b] > 1.01 for n, b in worst if n % b and n > 1)  # it is right where b divides n


@pytest.mark.parametrize(("sizes", "draws"), [([5], 1000), ([3], 7), ([1, 4, 2], 15), ([1, 1], 1)])
def test_all_masks_have_their_probability(sizes, draws):
    """Each token's weight is that of the mean over all orders: 1, spread over what else is masked."""
    found = answers.masks(sizes, draws, np.random.default_rng(0))
    assert found.exact and len(found.masked) == 2 ** max(sizes) - 1
    assert not found.weights[~found.masked].any()
    np.testing.assert_allclose(found.weights.mean(axis=0), 1, rtol=1e-6)
    start = 0
    for part, n in enumerate(sizes):
        own = found.masked[:, start : start + n]
        np.testing.assert_allclose(found.shares[:, part], own.mean(axis=1), rtol=1e-6)
        assert len({tuple(row) for row in own if row.any()}) == 2**n - 1
        start += n


def test_drawn_masks_are_as_many_as_they_say():
    found = answers.masks([9, 2], 64, np.random.default_rng(0))
    assert not found.exact and found.masked.shape == (64, 11)
    for part, own in enumerate((found.masked[:, :9], found.masked[:, 9:])):
        size = own.sum(axis=1)
        assert (size >= 1).all()
        np.testing.assert_allclose(found.shares[:, part] * own.shape[1], size, rtol=1e-6)
    weights = found.weights[:, :9]
    np.testing.assert_allclose(weights.sum(axis=1), 9, rtol=1e-6)
    assert len(np.unique(found.masked[:, :9], axis=0)) > 40
    many = answers.masks([9], 20_000, np.random.default_rng(1))
    np.testing.assert_allclose(many.masked[many.masked.sum(axis=1) == 3].mean(axis=0), 1 / 3, atol=0.05)


# --- The bound --------------------------------------------------------------------------------------


def over_orders(x, given=0, block=LENGTH):
    """The mean over all orders of the chain rule, of each block given the clean ones before it."""
    total = 0.0
    for first in range(0, len(x), block):
        free = range(max(first, given), min(first + block, len(x)))
        orders = list(itertools.permutations(free))
        for order in orders:
            for done, i in enumerate(order):
                state = [MASK if j in order[done:] or j >= first + block else x[j] for j in range(len(x))]
                state += [MASK] * (LENGTH - len(x))
                total -= log_p(state, i)[x[i]] / len(orders)
    return total


CASES = [("aabb", 0, LENGTH), ("abba", 2, LENGTH), ("baab", 1, LENGTH), ("abab", 0, 3), ("bbab", 0, 2), ("babb", 1, 2)]


def answer(r, text, given=0, **options):
    item = scoring.Item(text[:given], text[given:], "the answer", "the query")
    return choosing.answers(r, [item], **options)[0]


@pytest.mark.parametrize(("text", "given", "block"), CASES)
def test_all_masks_are_all_orders(text, given, block):
    r = make(sizes=None if block == LENGTH else block)
    found = answer(r, text, given, draws=16)
    assert found.error == 0 and found.tokens == LENGTH - given and not found.exact
    assert found.nats == pytest.approx(over_orders(ids(text), given, block), rel=1e-5)


@pytest.fixture
def drawn(monkeypatch):
    """Nothing is tried whole."""
    for module in (answers, choosing):
        monkeypatch.setattr(module, "most_exact", lambda draws: 0)


@pytest.mark.optimised
@pytest.mark.parametrize(("text", "given", "block"), CASES)
def test_the_mean_of_what_is_drawn_is_the_bound(drawn, text, given, block):
    r = make(sizes=None if block == LENGTH else block)
    found = answer(r, text, given, draws=100_000, batch_size=5000)
    assert 0 < found.error < 0.02
    assert abs(found.nats - over_orders(ids(text), given, block)) < 4 * found.error


@pytest.mark.optimised
@pytest.mark.parametrize(("text", "given", "block"), CASES[:5:2])
def test_intervals_hold_as_often_as_they_say(drawn, text, given, block):
    r = make(sizes=None if block == LENGTH else block)
    items = [scoring.Item(text[:given], text[given:], "", "")] * 300
    found = choosing.answers(r, items, draws=128, batch_size=4800, seed=3)
    mean = over_orders(ids(text), given, block)
    assert 0.9 <= np.mean([abs(s.nats - mean) < 1.96 * s.error for s in found]) <= 0.99


def test_a_score_is_read_as_a_law():
    found = answer(make("sedd_absorb"), "abba", 1, draws=16)
    assert found.nats == pytest.approx(over_orders(ids("abba"), 1), rel=1e-5)


def test_a_network_that_is_told_the_time_is_told_the_share():
    class Timed(Table):
        time_conditioning = True

        def apply(self, variables, z, t, **options):
            return super().apply(variables, z, t, **options) * (0.5 + t[:, None, None])

    r = make()
    object.__setattr__(r, "model", Timed())
    x, free, expected = ids("abba"), (1, 2, 3), 0.0
    for n in (1, 2, 3):
        for hidden in itertools.combinations(free, n):
            state = [MASK if i in hidden else x[i] for i in range(LENGTH)]
            logits = table()[index(np.array(state)), :, :2] * (0.5 + n / 3)
            law = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            expected -= sum(law[i, x[i]] for i in hidden) / (n * math.comb(3, n))
    assert answer(r, "abba", 1, draws=8).nats == pytest.approx(expected, rel=1e-5)


def test_where_nothing_is_drawn_it_is_the_chain_rule():
    r, cut = make("autoregressive"), make(sizes=1)
    for text in ("abba", "bab", "b"):
        x = ids(text)
        apart = [-log_p([*x[:i], *[MASK] * (LENGTH - i)], i)[x[i]] for i in range(len(x))]
        for given in range(len(text)):
            found = answer(r, text, given, draws=3)
            assert found.exact and found.error == 0 and found.tokens == len(text) - given
            assert found.nats == pytest.approx(exact(x, given), rel=1e-5)
            found = answer(cut, text, given)
            assert found.exact and found.nats == pytest.approx(sum(apart[given:]), rel=1e-5)
    one = answer(make(), "abba", 3, draws=2)  # one token: one pass, whatever the draws
    assert one.error == 0 and one.nats == pytest.approx(-log_p([*ids("abb"), MASK], 3)[0], rel=1e-5)


def test_other_noise_has_the_bound_of_a_score():
    r = make("udlm")
    found = answer(r, "abba", 1, draws=64, greedy=True, batch_size=16)
    [s] = scoring.score(r, "bba", prompts="a", draws=64, batch_size=16)
    assert (found.nats, found.error, found.greedy) == (s.nats, s.error, None)


# --- Filling ----------------------------------------------------------------------------------------


def filled(x, given, kind):
    """What the table's network fills in behind the first `given` of x, the surest first, or from left to right."""
    z = [*x[:given], *[MASK] * (LENGTH - given)]
    while MASK in z:
        blank = [i for i in range(LENGTH) if z[i] == MASK]
        seen = {i: [MASK, *z[:i], *[MASK] * (LENGTH - i - 1)] if kind == "autoregressive" else z for i in blank}
        laws = {i: log_p(seen[i], i) for i in blank}
        i = max(blank, key=lambda i: laws[i].max()) if kind == "mdlm" else blank[0]
        z[i] = int(laws[i].argmax())
    return z


@pytest.mark.parametrize("kind", ["mdlm", "blocks of one", "autoregressive"])
def test_greedy_is_what_the_model_fills_in(kind):
    r = make("autoregressive") if kind == "autoregressive" else make(sizes=1 if kind == "blocks of one" else None)
    texts = list(itertools.product([0, 1], repeat=LENGTH))
    givens = [1 + sum(x) % 3 for x in texts]
    own = [filled(x, given, kind) for x, given in zip(texts, givens, strict=True)]
    if kind == "mdlm":  # the surest first and left to right are not the same
        assert own != [filled(x, given, "blocks of one") for x, given in zip(texts, givens, strict=True)]
    spelt = lambda x: "".join("ab"[t] for t in x)
    items = [scoring.Item(spelt(x[:g]), spelt(x[g:]), "", "") for x, g in zip(texts, givens, strict=True)]
    found = choosing.answers(r, items, greedy=True, batch_size=6, draws=8)
    right = [list(x) == y for x, y in zip(texts, own, strict=True)]
    assert [a.greedy for a in found] == right and 0 < sum(right) < len(right)


@pytest.mark.parametrize("sizes", [None, pytest.param(4, marks=pytest.mark.slow)])
def test_rows_and_batches_change_nothing(sizes):
    """An answer alone and among longer ones, in other batches: the same masks, so the same nats."""
    r = real("attention", sizes=sizes)
    items = [
        scoring.Item("Say ", "no", "", ""),
        scoring.Item("What is said here, at length, is ", "many words", "", ""),
    ]
    both = choosing.answers(r, items, draws=8, batch_size=5, greedy=True)
    alone = choosing.answers(r, items[:1], draws=8, batch_size=3)[0]
    assert both[0].nats == pytest.approx(alone.nats, rel=1e-5) and both[1].error > 0
    x = r.tokenizer.encode("Say no").astype(np.int32)[None]

    @jax.jit
    def law(z):
        told = {} if sizes is None else {"clean": jnp.asarray(x), "block": sizes}
        logits = r.model.apply({"params": r.params}, z, jnp.zeros(1), **told)[0, :, :258]
        return jax.nn.log_softmax(logits)

    def nats(hidden):
        z = jnp.asarray(x).at[0, jnp.array(hidden)].set(258)
        return -sum(float(law(z)[i, x[0, i]]) for i in hidden)

    assert both[0].nats == pytest.approx((nats([4]) + nats([5])) / 2 + nats([4, 5]) / 2, rel=1e-4)


# --- Questions --------------------------------------------------------------------------------------


def test_the_forms_of_questions():
    form = functools.partial(choosing.question, name="it")
    q = form({"query": "The sky is", "choices": ["blue", "grün"], "gold": 1})
    assert q.prompts == ("The sky is",) * 2 and q.texts == (" blue", " grün") and (q.sizes, q.gold) == ((4, 5), 1)
    assert form({"query": "", "choices": ["a", "b"], "gold": 0}).texts == ("a", "b")
    q = choosing.question({"query": "Why?\n", "choices": ["a", "b"], "gold": 0}, "it", between="Answer: ")
    assert q.prompts[0] == "Why?\nAnswer:" and q.texts[0] == " a"
    assert form({"query": "Why?\n", "choices": ["a", "b"], "gold": 0}).prompts[0] == "Why?\n"
    q = form({"context_options": ["Ann because Ann", "Ann because Bo"], "continuation": "was late.", "gold": 0})
    assert q.prompts == ("Ann because Ann", "Ann because Bo") and q.texts == (" was late.",) * 2
    assert q.sizes == (9, 9)
    q = form({"sentence": "The trophy is big, so the _ is full.", "option1": "bag", "option2": "cup", "answer": "2"})
    assert q.prompts == ("The trophy is big, so the bag", "The trophy is big, so the cup")
    assert q.texts == (" is full.",) * 2 and q.gold == 1
    item = choosing.last_word("He came\nand saw  it \n", "it")
    assert item[:2] == ("He came\nand saw", "  it")
    assert choosing.moved("a b \n", "c") == ("a b", " \nc")


def test_choices_are_those_of_the_answers():
    r = make()
    asked = [
        {"query": "ab", "choices": ["aa", "bb", "ba"], "gold": 2},
        {"query": "", "choices": ["abba", "bbbb"], "gold": 0},
    ]
    found = diffrwkv.choose(r, asked, between="", draws=16)
    for q, c in zip(asked, found, strict=True):
        nats = [over_orders(ids(q["query"] + text), len(q["query"])) for text in q["choices"]]
        np.testing.assert_allclose(c.nats, nats, rtol=1e-5)
        assert c.picked == c.picked_norm == np.argmin(nats) and c.gold == q["gold"] and not c.exact
        assert c.tokens == c.sizes == tuple(map(len, q["choices"])) and set(c.errors) == {0}
    assert diffrwkv.choose(r, []) == []
    assert diffrwkv.choose(make("autoregressive"), asked, between="", draws=1)[0].exact


def test_accuracy_and_its_errors():
    def choice(nats, sizes, gold):
        return choosing.Choice(nats, (0.0,) * len(nats), (1,) * len(nats), sizes, gold, True)

    choices = [choice((2.0, 3.0), (1, 2), 0), choice((2.0, 3.0), (1, 2), 1), choice((3.0, 1.0, 5.0), (1, 1, 1), 1)]
    found = choosing.accuracy(choices)
    assert (found["questions"], found["acc"], found["acc_norm"]) == (3, 2 / 3, 2 / 3)
    assert found["chance"] == pytest.approx((1 / 2 + 1 / 2 + 1 / 3) / 3)
    assert found["acc_se"] == pytest.approx(math.sqrt(2 / 3 * 1 / 3 / 2))
    assert choosing.accuracy(choices[:1])["acc_se"] is None


def test_bad_questions_are_refused_before_any_compute(monkeypatch, capsys):
    monkeypatch.setattr(choosing, "in_batches", lambda *a, **k: pytest.fail("computed"))
    r = make()
    good = {"query": "a", "choices": ["a", "b"], "gold": 0}
    winogrande = {"sentence": "a _ b", "option1": "a", "option2": "b", "answer": "1"}
    for record, told in [
        (good | {"gold": 2}, "question 2: 'gold' must be from 0 to 1, got 2"),
        (good | {"gold": -1}, "'gold' must be from 0 to 1, got -1"),
        (good | {"gold": True}, "'gold' must be from 0 to 1, got True"),
        (good | {"choices": ["a"]}, "'choices' must be a list of at least 2 texts"),
        (good | {"choices": "ab"}, "'choices' must be a list of at least 2 texts"),
        (good | {"choices": ["a", " "]}, "'choices' has an empty text"),
        (good | {"choices": ["a", 1]}, "'choices' must be text, got int"),
        (good | {"choices": ["a", "c"]}, "question 2, choice 2: character 'c'"),
        (good | {"query": "x"}, "question 2, query of choice 1: character 'x'"),
        ({"text": "a b"}, "question 2 is no question: it has text, not"),
        (winogrande | {"sentence": "a b"}, "must have one blank _, got 0"),
        (winogrande | {"sentence": "a _ "}, "nothing follows the blank"),
        (winogrande | {"answer": ""}, "'answer' must be from 1 to 2, got ''"),
        ("a", "question 2 must be a mapping"),
    ]:
        with pytest.raises(UserError, match=told):
            choosing.choose(r, [good, record], between="")
    for options, told in [
        ({"draws": 3}, "draws must be even, got 3"),
        ({"draws": 0}, "draws must be at least 1"),
        ({"seed": -1}, "seed"),
        ({"length": 1}, "length = 1 leaves no room"),
        ({"block_size": 2}, "block_size needs blocks"),
        ({"batch_size": 2**40}, "batch_size = .* is too large"),
    ]:
        with pytest.raises(UserError, match=told):
            choosing.choose(r, [good], between="", **options)
    with pytest.raises(UserError, match="'flm' bounds no likelihood"):
        choosing.choose(make("flm"), [good], between="")
    for passage, told in [
        ("one", "must have two words"),
        (" one ", "must have two words"),
        (3, "must be text, got int"),
    ]:
        with pytest.raises(UserError, match=told):
            choosing.last_word(passage, "line 1")


def test_a_query_beyond_training_is_evaluated_and_told(capsys):
    r = make("autoregressive", length=3)
    [found] = choosing.choose(r, [{"query": "abb", "choices": ["a", "b"], "gold": 0}], between="")
    assert "Rows of up to 4 tokens: the model was trained on 3." in capsys.readouterr().err
    assert found.nats[0] == pytest.approx(exact(ids("abba"), 3), rel=1e-5)
    [cut] = choosing.choose(r, [{"query": "abb", "choices": ["a", "b"], "gold": 0}], between="", length=3)
    assert not capsys.readouterr().err and cut.nats[0] == pytest.approx(exact(ids("bba"), 2), rel=1e-5)
