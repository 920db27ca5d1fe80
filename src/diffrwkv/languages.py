"""Regular languages with known laws: what a denoiser would have to know, counted exactly by an automaton.

A language here is a set of words of each length, and its law at a length is uniform over its words of that length. A
deterministic automaton (DFA) says which words those are, so all that one asks of a model has an exact answer: how many
words there are, whose logarithm is the entropy in nats; fair draws; whether a text is a word, or can become one; and,
in `diffrwkv.oracle`, the posterior of every symbol given any others.

How the tasks of the literature become languages of whole strings:

    answered  x_1 ... x_{L-1} y: the input, then the answer of the task, spelled by a symbol that no input has.
              Parity, even pairs, cycle navigation and modular arithmetic (Delétang et al., arXiv 2207.02098, table B.1;
              the last without brackets, as there). The answer depends on every symbol before it, and nothing else does.
    traced    x_1 q_1 x_2 q_2 ...: after each generator of a group the product so far. The word problems of S3, S5 and
              A5 (Merrill et al., arXiv 2404.08819) are spelled so, because then every prefix of a sample can be
              checked, chance passes no check (a product at the end alone it gets right 1 time in 6, 60 or 120), and
              what a model must know shows at every share of masks: the product after a stretch follows from the one
              before it and the generators between. The answer of an input shows only where a single symbol is masked.
    closed    the words of the automaton themselves: balanced brackets of bounded depth (Hewitt et al., arXiv
              2010.07515).

`tracks` of a language is the automaton whose states are to be labelled: that of the bare inputs.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

DEAD = -1  # in a table of transitions: no word goes on so


@dataclasses.dataclass(frozen=True, eq=False)
class Language:
    """A deterministic automaton, and what it says of its words. Build one with `automaton`.

    Attributes:
      name: in `LANGUAGES`.
      symbols: S characters in the order of their code points; a symbol's number is its index, as `data.tokenizers.Char`
        has it.
      table: int32 [Q, S], the state after a state and a symbol, or DEAD.
      start: the state before the first symbol.
      accepts: bool [Q], where a word may end.
      tracked: the language whose states are to be labelled; None: this one.
    """

    name: str
    symbols: str
    table: np.ndarray
    start: int
    accepts: np.ndarray
    tracked: "Language | None" = None

    @property
    def tracks(self) -> "Language":
        """The automaton of the bare inputs, whose state after each prefix is what a model may be asked to label."""
        return self if self.tracked is None else self.tracked

    @property
    def num_states(self) -> int:
        """Q."""
        return len(self.table)

    # --- counting -----------------------------------------------------------------------------------------------------

    @functools.cache  # noqa: B019 (languages live as long as the program)
    def _completions(self, length: int) -> tuple[tuple[int, ...], ...]:
        """[r][q]: how many strings of r symbols lead from the state q to one that accepts, r from 0 to `length`."""
        edges = [[int(to) for to in row if to != DEAD] for row in self.table]
        rows = [tuple(int(ends) for ends in self.accepts)]
        for _ in range(length):
            before = rows[-1]
            rows.append(tuple(sum(before[to] for to in out) for out in edges))
        return tuple(rows)

    def count(self, length: int) -> int:
        """How many words of this length there are, exactly."""
        _check_length(length)
        return self._completions(length)[length][self.start]

    def log_count(self, length: int) -> float:
        """Its logarithm: the entropy in nats of a word of this length. Raises ValueError where there is no word."""
        return math.log(self._some(length))

    def _some(self, length: int) -> int:
        if not (number := self.count(length)):
            near = [n for n in range(max(1, length - 8), length + 9) if self.count(n)]
            raise ValueError(f"{self.name} has no word of length {length}: take another length, such as {near}.")
        return number

    # --- words --------------------------------------------------------------------------------------------------------

    def sample(self, length: int, number: int, seed: int) -> np.ndarray:
        """Fair draws: int32 [number, length], each word as likely as any other.

        Symbol by symbol, each in proportion to how many words go on with it, from exact counts rounded to float64.

        Args:
          seed: of NumPy's generator; equal arguments give equal words.

        Raises ValueError where there is no word of this length.
        """
        self._some(length)
        left = self._completions(length)
        rng = np.random.default_rng(seed)
        words = np.empty((number, length), np.int32)
        state = np.full(number, self.start)
        for i in range(length):
            after = left[length - i - 1]
            share = np.zeros(self.table.shape)  # of the words that go on from a state, those with each symbol
            for q in np.unique(state):
                total = left[length - i][q]
                share[q] = [after[to] / total if to != DEAD else 0.0 for to in self.table[q]]
            below = np.cumsum(share, axis=1)[state]
            u = rng.random(number)[:, None] * below[:, -1:]
            words[:, i] = (below <= u).sum(axis=1)
            state = self.table[state, words[:, i]]
        return words

    def states(self, words: np.ndarray) -> np.ndarray:
        """The state after each prefix, int32 [N, L], of words [N, L]; DEAD from where no word goes on so.

        A number that is no symbol's, such as a mask's, is dead too.
        """
        table = np.full((self.num_states + 1, len(self.symbols) + 1), DEAD, np.int32)  # the last row is that of DEAD
        table[:-1, :-1] = self.table
        real = (words >= 0) & (words < len(self.symbols))
        ids, out = np.where(real, words, len(self.symbols)), np.empty(words.shape, np.int32)
        state = np.full(len(words), self.start, np.int32)
        for i in range(words.shape[1]):
            state = out[:, i] = table[state, ids[:, i]]
        return out

    def valid(self, words: np.ndarray) -> np.ndarray:
        """Whether each of the words [N, L] is one of the language's: bool [N]."""
        last = self.states(words)[:, -1]
        return (last != DEAD) & self.accepts[last]

    def completable(self, z: np.ndarray) -> np.ndarray:
        """Whether some word agrees with z [N, L] wherever z shows a symbol: bool [N].

        What is no symbol's number is a blank. Blanks between two given sides can be filled exactly if a state that the
        left side leads to reaches, in as many steps, one from which the right side is accepted.
        """
        reached = np.zeros((len(z), self.num_states), bool)
        reached[:, self.start] = True
        steps = np.zeros((len(self.symbols), self.num_states, self.num_states), np.float32)
        for q, s in zip(*np.nonzero(self.table != DEAD), strict=True):
            steps[s, q, self.table[q, s]] = 1
        anything = steps.max(axis=0)
        for i in range(z.shape[1]):
            blank = (z[:, i] < 0) | (z[:, i] >= len(self.symbols))
            after = np.zeros_like(reached)
            after[blank] = reached[blank].astype(np.float32) @ anything > 0
            for s in np.unique(z[~blank, i]):
                here = z[:, i] == s
                after[here] = reached[here].astype(np.float32) @ steps[s] > 0
            reached = after
        return (reached & self.accepts).any(axis=1)

    # --- text ---------------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> np.ndarray:
        """Numbers of the symbols of a text, int32 [n]. Raises ValueError for a character that is no symbol."""
        if strange := sorted(set(text) - set(self.symbols)):
            raise ValueError(f"{strange[0]!r} is no symbol of {self.name}, which has {self.symbols!r}.")
        return np.asarray([self.symbols.index(character) for character in text], np.int32)

    def decode(self, words: np.ndarray) -> list[str]:
        """The words [N, L] as texts; a number that is no symbol's, such as a mask's, as _."""
        table = np.asarray([*self.symbols, "_"])
        real = (words >= 0) & (words < len(self.symbols))
        return ["".join(row) for row in table[np.where(real, words, len(self.symbols))]]


def _check_length(length: int) -> None:
    if length < 1:
        raise ValueError(f"A word needs a length of at least 1, got {length}.")


# --- Building ---------------------------------------------------------------------------------------------------------

State = Any  # hashable
Step = Callable[[State, str], State | None]


def _reachable(symbols: Iterable[str], start: State, step: Step) -> dict[State, int]:
    """The states that some word leads to, numbered as they are found; the start is 0."""
    numbers, queue = {start: 0}, [start]
    for state in queue:
        for symbol in symbols:
            after = step(state, symbol)
            if after is not None and after not in numbers:
                numbers[after] = len(numbers)
                queue.append(after)
    return numbers


def automaton(
    name: str, symbols: Iterable[str], start: State, step: Step, ends: Callable[[State], bool], tracked=None
) -> Language:
    """The language of a step function: its states are those that can be reached.

    Args:
      step: (state, symbol) -> the state after it, or None where no word goes on so.
      ends: whether a word may end in a state.
      tracked: see `Language`.
    """
    symbols = sorted(symbols)
    numbers = _reachable(symbols, start, step)
    after = [[step(state, symbol) for symbol in symbols] for state in numbers]
    table = np.asarray([[DEAD if to is None else numbers[to] for to in row] for row in after], np.int32)
    return Language(name, "".join(symbols), table, 0, np.asarray([ends(state) for state in numbers]), tracked)


def answered(name: str, inputs: str, start: State, step: Step, answer: Callable[[State], str | None]) -> Language:
    """An input and its answer.

    Args:
      answer: the answer in a state, one character that no input has, or None where an input may not end.
    """
    tracked = automaton(f"the inputs of {name}", inputs, start, step, lambda _: True)
    answers = {spelled for state in _reachable(inputs, start, step) if (spelled := answer(state)) is not None}

    def go(state, symbol):
        kind, inner = state
        if kind == "done":
            return None
        if symbol in answers:
            return ("done", symbol) if symbol == answer(inner) else None
        after = step(inner, symbol)
        return None if after is None else ("reading", after)

    return automaton(name, {*inputs, *answers}, ("reading", start), go, lambda state: state[0] == "done", tracked)


def traced(name: str, inputs: str, start: State, step: Step, spell: Callable[[State], str]) -> Language:
    """Each input followed by the state after it.

    Args:
      step: total: every input is possible in every state.
      spell: a state as one character that no input has.
    """
    tracked = automaton(f"the inputs of {name}", inputs, start, step, lambda _: True)
    spelled = {spell(state) for state in _reachable(inputs, start, step)}

    def go(state, symbol):
        owed, inner = state  # owed: the state after the last input is not spelled yet
        if owed:
            return (False, inner) if symbol == spell(inner) else None
        return (True, step(inner, symbol)) if symbol in inputs else None

    return automaton(name, {*inputs, *spelled}, (False, start), go, lambda state: not state[0], tracked)


# --- The languages ----------------------------------------------------------------------------------------------------


def _parity() -> Language:
    """Bits and whether the number of b is odd."""
    return answered("parity", "ab", 0, lambda q, x: q ^ (x == "b"), str)


def _even_pairs() -> Language:
    """Bits and whether the number of ab and ba is odd, which says whether the first bit is not the last."""

    def step(state, x):
        first, _ = state
        return (first or x, x)

    return answered(
        "even_pairs", "ab", ("", ""), step, lambda state: str(int(state[0] != state[1])) if state[0] else None
    )


def _cycle_navigation() -> Language:
    """Steps forward, back or none on a cycle of 5 places, and the place at the end."""
    move = {">": 1, "<": -1, ".": 0}
    return answered("cycle_navigation", "".join(move), 0, lambda q, x: (q + move[x]) % 5, str)


def _modular_arithmetic() -> Language:
    """Sums, differences and products of digits, `*` before `+` and `-`, and the value modulo 5 as one of a to e."""

    def step(state, x):
        total, factor, digit_next = state  # the value is total + factor, where factor is the product that is being read
        if digit_next:
            return (total, factor * int(x) % 5, False) if x.isdigit() else None
        if x.isdigit():
            return None
        return (total, factor, True) if x == "*" else ((total + factor) % 5, {"+": 1, "-": 4}[x], True)

    def answer(state):
        total, factor, digit_next = state
        return None if digit_next else "abcde"[(total + factor) % 5]

    return answered("modular_arithmetic", "01234+-*", (0, 1, True), step, answer)


def _group(name: str, generators: dict[str, tuple[int, ...]]) -> Language:
    """Permutations, each followed by the product so far, spelled by letters of Latin Extended-A."""
    degree = len(next(iter(generators.values())))
    even = [p for p in itertools.permutations(range(degree)) if _sign(p) == 1]
    odd = [p for p in itertools.permutations(range(degree)) if _sign(p) == -1]
    spelled = {p: chr(0x100 + i) for i, p in enumerate(even + odd)}

    def step(q, x):
        return tuple(generators[x][i] for i in q)

    return traced(name, "".join(generators), tuple(range(degree)), step, spelled.__getitem__)


def _sign(p: tuple[int, ...]) -> int:
    return (-1) ** sum(a > b for a, b in itertools.combinations(p, 2))


def _s3() -> Language:
    """The symmetric group of degree 3, of a swap and a cycle of 3: 6 elements; solvable, not commutative."""
    return _group("s3", {"a": (1, 0, 2), "b": (1, 2, 0)})


def _s5() -> Language:
    """The symmetric group of degree 5, of a swap and a cycle of 5: 120 elements, its word problem NC1-complete."""
    return _group("s5", {"a": (1, 0, 2, 3, 4), "b": (1, 2, 3, 4, 0)})


def _a5() -> Language:
    """The alternating group of degree 5, of a cycle of 3 and one of 5: 60 elements, the least group not solvable."""
    return _group("a5", {"a": (1, 2, 0, 3, 4), "b": (1, 2, 3, 4, 0)})


DYCK_DEPTH = 4


def _dyck() -> Language:
    """Balanced brackets of two kinds, at most 4 deep."""
    closes = {")": "(", "]": "["}

    def step(stack, x):
        if x in closes:
            return stack[:-1] if stack.endswith(closes[x]) else None
        return stack + x if len(stack) < DYCK_DEPTH else None

    return automaton("dyck", "()[]", "", step, lambda stack: not stack)


LANGUAGES: dict[str, Callable[[], Language]] = {
    "parity": _parity,
    "even_pairs": _even_pairs,
    "cycle_navigation": _cycle_navigation,
    "modular_arithmetic": _modular_arithmetic,
    "s3": _s3,
    "s5": _s5,
    "a5": _a5,
    "dyck": _dyck,
}


@functools.cache
def language(name: str) -> Language:
    """The language of that name in `LANGUAGES`. Raises ValueError naming them for another name."""
    if name not in LANGUAGES:
        raise ValueError(f"no language is called {name!r}: choose one of {', '.join(LANGUAGES)}.")
    return LANGUAGES[name]()
