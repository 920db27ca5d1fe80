"""Which of several answers a model finds likeliest: `choose`, from Python; and the last words of passages.

    run = diffrwkv.load("runs/quickstart")
    [found] = diffrwkv.choose(run, [{"query": "The sky is", "choices": ["blue", "made of soup"], "gold": 0}])
    print(found.picked, found.nats, found.errors)

Every answer stands in a row behind its query, which is given. A model from left to right, and masked blocks of one
token, have -log p of an answer itself. Masked diffusion has the bound of `diffusion.answers`, in which a known number
of the answer's tokens is masked: without any noise for short answers. Others have the bound of `score`.
"""

import dataclasses
import functools
import itertools
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffrwkv import config, sharding
from diffrwkv.config import UserError, check_at_least_one
from diffrwkv.diffusion.answers import Masks, answer_nats, masks, most_exact
from diffrwkv.diffusion.deferred import at
from diffrwkv.diffusion.layouts import Blocks, Layout, Whole
from diffrwkv.diffusion.objectives import Objective
from diffrwkv.diffusion.processes import Masked
from diffrwkv.diffusion.samplers import BlockCached, Confidence, Sampler
from diffrwkv.generation import filled, load
from diffrwkv.networks import network_fn
from diffrwkv.run import Run
from diffrwkv.scoring import (
    Batch,
    Item,
    Window,
    bounding,
    check_draws,
    check_rows,
    estimate,
    in_batches,
    is_exact,
    laid_out,
    of_rows,
    on_mesh,
    total,
)

LEAST_STEPS = 128  # of filling, that most answers need no program of their own

# --- Questions --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Question:
    """Choices of which one is right.

    Attributes:
      prompts: what is given, of each choice.
      texts: what is scored, of each choice.
      sizes: bytes of each choice, by which its nats are divided for the accuracy that is normalised by length.
      gold: the number of the right one, from 0.
      name: what errors call it.
    """

    prompts: tuple[str, ...]
    texts: tuple[str, ...]
    sizes: tuple[int, ...]
    gold: int
    name: str

    def items(self) -> list[Item]:
        """The choices, to be scored."""
        pairs = enumerate(zip(self.prompts, self.texts, strict=True), 1)
        return [Item(p, t, f"{self.name}, choice {i}", f"{self.name}, query of choice {i}") for i, (p, t) in pairs]


FORMS = (
    '{"query", "choices", "gold"}, {"context_options", "continuation", "gold"} or WinoGrande\'s '
    '{"sentence", "option1", "option2", "answer"}'
)


def question(record: Mapping[str, Any], name: str, between: str = " ") -> Question:
    """The question that a record of a file is.

    Args:
      record: of one of three forms. "query" (text), "choices" (texts) and "gold" (an index, from 0): each choice is
        scored behind the query. "context_options", "continuation" and "gold": the continuation is scored behind each
        context. WinoGrande's "sentence" with one blank `_`, "option1", "option2" and "answer" (1 or 2): what follows
        the blank is scored behind the sentence up to the filled blank (partial scoring, arXiv 1806.02847).
      name: what errors call it.
      between: stands between query and choice, or context and continuation. Spaces at its end belong to what is scored,
        as GPT-2's vocabulary has them.

    Raises UserError.
    """

    def text(key: str, value: Any, *, may_be_empty: bool = False) -> str:
        if not isinstance(value, str):
            raise UserError(f"{name}: {key!r} must be text, got {type(value).__name__}.")
        if not value.strip() and not may_be_empty:
            raise UserError(f"{name}: {key!r} has an empty text: leave the question out, or complete it.")
        return value

    def several(key: str) -> list[str]:
        values = record[key]
        if not isinstance(values, list | tuple) or len(values) < 2:
            raise UserError(f"{name}: {key!r} must be a list of at least 2 texts, got {values!r}.")
        return [text(key, value) for value in values]

    def index(key: str, first: int, number: int) -> int:
        value = record[key]
        if isinstance(value, str) and re.fullmatch(r"[0-9]{1,9}", value):
            value = int(value)
        if isinstance(value, bool) or not isinstance(value, int) or not first <= value < first + number:
            raise UserError(f"{name}: {key!r} must be from {first} to {first + number - 1}, got {record[key]!r}.")
        return value - first

    if {"query", "choices", "gold"} <= record.keys():
        choices = several("choices")
        before = text("query", record["query"], may_be_empty=True)
        pairs = [_joined(before, between, choice) for choice in choices]
        sizes = [len(choice.encode(errors="surrogatepass")) for choice in choices]
        gold = index("gold", 0, len(choices))
    elif {"context_options", "continuation", "gold"} <= record.keys():
        contexts, after = several("context_options"), text("continuation", record["continuation"])
        pairs = [_joined(context, between, after) for context in contexts]
        sizes = [len(after.encode(errors="surrogatepass"))] * len(pairs)
        gold = index("gold", 0, len(pairs))
    elif {"sentence", "option1", "option2", "answer"} <= record.keys():
        sentence = text("sentence", record["sentence"])
        if sentence.count("_") != 1:
            raise UserError(f"{name}: 'sentence' must have one blank _, got {sentence.count('_')}.")
        before, after = sentence.split("_")
        if not after.strip():
            raise UserError(f"{name}: nothing follows the blank of 'sentence', which is what is scored.")
        options = [text(key, record[key]) for key in ("option1", "option2")]
        pairs = [(before + option, after) for option in options]
        sizes = [len(after.encode(errors="surrogatepass"))] * 2
        gold = index("answer", 1, 2)
    else:
        raise UserError(f"{name} is no question: it has {', '.join(map(str, record)) or 'nothing'}, not {FORMS}.")
    prompts, texts = zip(*pairs, strict=True)
    return Question(prompts, texts, tuple(sizes), gold, name)


def _joined(before: str, between: str, text: str) -> tuple[str, str]:
    """(What is given, what is scored)."""
    return moved(before + between if before else "", text, " ")


def moved(before: str, text: str, blanks: str | None = None) -> tuple[str, str]:
    """(before, text), the blanks at the end of the one being put before the other; None: what `str.strip` strips."""
    kept = before.rstrip(blanks)
    return kept, before[len(kept) :] + text


def last_word(passage: Any, name: str) -> Item:
    """The last word of a passage, with the blanks before it, given all that stands before them. Raises UserError."""
    if not isinstance(passage, str):
        raise UserError(f"{name}: the passage must be text, got {type(passage).__name__}.")
    match = re.fullmatch(r"(.*\S)(\s+\S+)\s*", passage, re.DOTALL)
    if not match:
        raise UserError(f"{name}: the passage must have two words at least, got {passage[:40]!r}.")
    return Item(match[1], match[2], f"the last word of {name}", f"what stands before the last word of {name}")


# --- Choices ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a model makes of a question.

    Attributes:
      nats: of each choice, the bound on -log p given its query; with `exact` this itself.
      errors: their standard errors, of the draws; 0 where nothing was drawn.
      tokens: of each choice.
      sizes, gold: as of `Question`.
      exact: the nats are no bounds.
    """

    nats: tuple[float, ...]
    errors: tuple[float, ...]
    tokens: tuple[int, ...]
    sizes: tuple[int, ...]
    gold: int
    exact: bool

    @property
    def picked(self) -> int:
        """The choice of the least nats."""
        return int(np.argmin(self.nats))

    @property
    def picked_norm(self) -> int:
        """The choice of the least nats per byte."""
        return int(np.argmin(np.array(self.nats) / self.sizes))


def choose(
    run: Run | str | os.PathLike,
    questions: Sequence[Mapping[str, Any] | Question],
    *,
    between: str = " ",
    draws: int = config.ANSWER_DRAWS,
    seed: int = 0,
    block_size: int | None = None,
    length: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> list[Choice]:
    """How likely a run finds the choices of each question; `accuracy` sums up what comes back.

    The bound that is estimated of an answer of masked diffusion is told in `diffusion.answers`: all masks of an answer
    of up to log2(draws + 1) tokens (of block diffusion, in one block) are tried, each once, of a longer one `draws`.

    Args:
      run: what `load` returns, or a workdir.
      questions: records of the forms that `question` knows.
      between: stands between a query and each of its choices.
      draws: at most so many passes for each choice, even; a model from left to right needs one.
      seed: of the masks.
      block_size: of block diffusion: tokens in a block; 0: all; None: the first of config.layouts.blocks.sizes.
      length: tokens in a row at most, BOS and EOS counted: of a query that is too long the beginning is left out. None:
        as many as the longest takes; where the network saw none so long, it is said.
      batch_size: rows at a time, of any questions, choices and draws.
      progress: show a bar on stderr.

    Raises UserError for what cannot be done, before any compute.
    """
    run = run if isinstance(run, Run) else load(run)
    asked = [
        q if isinstance(q, Question) else question(_mapping(q, f"question {i}"), f"question {i}", between)
        for i, q in enumerate(questions, 1)
    ]
    items = [item for q in asked for item in q.items()]
    options: dict[str, Any] = {"draws": draws, "seed": seed, "block_size": block_size, "length": length}
    found = iter(answers(run, items, **options, batch_size=batch_size, progress=progress))
    results = []
    for q in asked:
        own = [next(found) for _ in q.texts]
        nats, errors, tokens, exact, _ = zip(*map(dataclasses.astuple, own), strict=True)
        results.append(Choice(nats, errors, tokens, q.sizes, q.gold, all(exact)))
    return results


def _mapping(value: Any, name: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise UserError(f"{name} must be a mapping such as {FORMS}, got {type(value).__name__}.")
    return value


def accuracy(choices: Sequence[Choice]) -> dict[str, Any]:
    """{"questions", "acc", "acc_se", "acc_norm", "acc_norm_se", "chance"}.

    `acc` counts the questions of which the right choice has the least nats, `acc_norm` the least nats per byte.
    Standard errors are over questions, None where there is one only; `chance` is what guessing gets.
    """
    if not choices:
        raise ValueError("There is no accuracy of no questions.")
    acc, acc_se = share([c.picked == c.gold for c in choices])
    norm, norm_se = share([c.picked_norm == c.gold for c in choices])
    chance = sum(1 / len(c.nats) for c in choices) / len(choices)
    return {
        "questions": len(choices),
        "acc": acc,
        "acc_se": acc_se,
        "acc_norm": norm,
        "acc_norm_se": norm_se,
        "chance": chance,
    }


def share(right: Sequence[bool | float]) -> tuple[float, float | None]:
    """(The mean, its standard error over the sequence, None for one only)."""
    values = np.asarray(right, np.float64)
    number = len(values)
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(number)) if number > 1 else None


# --- Answers ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answer:
    """A text given a prompt.

    Attributes:
      nats: the bound on -log p(text | prompt); with `exact` this itself.
      error: its standard error, of the draws; 0 where nothing was drawn.
      tokens: of the text.
      exact: `nats` is no bound.
      greedy: whether the text is what the model fills in by itself, each time the token that it is surest of; None
        where that was not asked, or the noise is no mask.
    """

    nats: float
    error: float
    tokens: int
    exact: bool
    greedy: bool | None


def answers(
    run: Run,
    items: Sequence[Item],
    *,
    greedy: bool = False,
    draws: int = config.ANSWER_DRAWS,
    seed: int = 0,
    block_size: int | None = None,
    length: int | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> list[Answer]:
    """What `choose` does with each choice, of any texts given any prompts.

    Args:
      greedy: also fill in the text: as many blanks as it has tokens, the surest first, a pass for each (of block
        diffusion block after block; of a model from left to right one after another). It is one pass where nothing is
        drawn.

    Raises UserError, before any compute.
    """
    objective = bounding(run, block_size)
    check_at_least_one(draws=draws, length=length, batch_size=batch_size)
    seed, exact = config.seed(seed), is_exact(objective)
    check_draws(draws, exact)
    if not items:
        return []
    windows, _ = laid_out(run, objective, items, length)
    check_rows(run, windows, batch_size)
    hits: Sequence[bool | None] = [None] * len(windows)
    if exact:
        both = _exact(run, objective, windows, greedy, batch_size, progress)
        nats = [x[:, 0] for x in both]
        hits = [bool(x[0, 1]) for x in both] if greedy else hits
    elif type(objective.process) is Masked:
        nats = _masked(run, objective, objective.process, windows, draws, seed, batch_size, progress)
        hits = _filled(run, objective, windows, batch_size, progress) if greedy else hits
    else:
        nats = estimate(run, objective, windows, draws, seed, batch_size, progress=progress)
    results = []
    of_text = np.searchsorted([window.text for window in windows], range(len(items) + 1))
    for first, last in itertools.pairwise(of_text):
        own = slice(first, last)
        hit = None if None in hits[own] else all(hits[own])
        results.append(Answer(*total(nats[own]), sum(w.size for w in windows[own]), exact, hit))
    return results


def _exact(
    run: Run, objective: Objective, windows: Sequence[Window], greedy: bool, batch_size: int, progress: bool
) -> list[np.ndarray]:
    """[[nats, whether every token is the most probable one]] of each window; the second is 0 unless `greedy`."""

    def found(params, tokens, counted, t, valid):
        z, counted = objective.noised(jax.random.key(0), tokens, t, counted)  # nothing is drawn
        output = objective.output(network_fn(run.model, params, valid=valid), tokens, z, objective.process.condition(t))
        times = objective.layout.of_tokens(t, tokens.shape[1])
        nats = objective.loss_at(output, tokens, z, times, counted).nats
        if not greedy:
            return jnp.stack([nats, jnp.zeros_like(nats)], axis=1)

        def best(output, x, _):
            logits = objective.process.vocabulary.without_mask(output)
            return (jnp.argmax(logits, axis=-1) == x).astype(jnp.float32)

        hit = (at(output, counted, best, tokens) > 0) | ~counted
        return jnp.stack([nats, hit.all(axis=1)], axis=1)

    compiled = _kept(run, ("exact", objective, greedy), found)

    def compute(batch: Batch) -> jax.Array:
        t = np.asarray(objective.times(jax.random.key(0), *batch.tokens.shape))
        arrays = on_mesh(run, tokens=batch.tokens, counted=batch.counted, t=t, valid=batch.valid)
        return compiled(run.params, **arrays)

    return in_batches(run, windows, [1] * len(windows), batch_size, compute, progress=progress)


def _masked(
    run: Run,
    objective: Objective,
    process: Masked,
    windows: Sequence[Window],
    draws: int,
    seed: int,
    batch_size: int,
    progress: bool,
) -> list[np.ndarray]:
    """The nats of each window: float64 [draws], or [1] where all its masks were tried."""
    layout = objective.layout
    longest = max(len(window.row) for window in windows)
    parts = [_parts(layout, window) for window in windows]
    exact = [max(sizes) <= most_exact(draws) for _, sizes in parts]
    passes = [2 ** max(sizes) - 1 if all_ else draws for (_, sizes), all_ in zip(parts, exact, strict=True)]

    @functools.lru_cache(maxsize=2)  # the passes of a window are neighbours
    def drawn(n: int) -> Masks:
        return masks(parts[n][1], draws, np.random.default_rng([seed, n]))

    def found(params, tokens, masked, weights, shares, valid):
        denoise = network_fn(run.model, params, valid=valid)
        return answer_nats(process, layout, denoise, tokens, masked, weights, shares)

    compiled = _kept(run, ("masked", process, layout), found)

    def compute(batch: Batch) -> jax.Array:
        shape = batch.tokens.shape
        masked, weights = np.zeros(shape, bool), np.zeros(shape, np.float32)
        shares = np.ones((len(batch.windows), layout.parts(longest)), np.float32)
        for i, (n, d) in enumerate(zip(batch.windows.tolist(), batch.draws.tolist(), strict=True)):
            here, first = batch.counted[i], parts[n][0]
            masked[i, here], weights[i, here] = drawn(n).masked[d], drawn(n).weights[d]
            shares[i, first : first + len(parts[n][1])] = drawn(n).shares[d]
        arrays = on_mesh(
            run,
            tokens=batch.tokens,
            masked=masked,
            weights=weights,
            shares=of_rows(layout, shares, *shape),
            valid=batch.valid,
        )
        return compiled(run.params, **arrays)

    nats = in_batches(run, windows, passes, batch_size, compute, progress=progress)
    return [x.mean(keepdims=True) if all_ else x for x, all_ in zip(nats, exact, strict=True)]


def _parts(layout: Layout, window: Window) -> tuple[int, list[int]]:
    """(The first part of the row that has tokens of the window, how many each has from there on)."""
    if isinstance(layout, Whole):
        return 0, [window.size]
    if not isinstance(layout, Blocks):
        raise TypeError(f"What is masked of an answer is known of whole texts and of blocks, not of {layout}.")
    block = layout.sizes[0] or len(window.row)
    of_tokens = np.arange(window.at, window.at + window.size) // block
    return int(of_tokens[0]), np.bincount(of_tokens - of_tokens[0]).tolist()


def _filled(
    run: Run, objective: Objective, windows: Sequence[Window], batch_size: int, progress: bool
) -> Sequence[bool]:
    """Whether each window's tokens are what the model fills into as many blanks."""
    sampler: Sampler = Confidence(num_steps=max(LEAST_STEPS, *(window.size for window in windows)))
    if isinstance(objective.layout, Blocks) and objective.layout.sizes[0]:
        sampler = BlockCached(sampler, objective.layout.sizes[0])
    rows = [window.row.copy() for window in windows]
    for row, window in zip(rows, windows, strict=True):
        row[window.at : window.at + window.size] = run.tokenizer.mask_id
    found = filled(run, sampler, rows, batch_size=batch_size, stop_at_eos=False, progress=progress)
    return [np.array_equal(tokens, window.row) for tokens, window in zip(found, windows, strict=True)]


def _kept(run: Run, name: tuple[Any, ...], found: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """The compiled function, kept with the run."""
    key = ("answers", *name)
    if key not in run.generators:
        run.generators[key] = jax.jit(sharding.over(run.mesh, found), out_shardings=sharding.replicated(run.mesh))
    return run.generators[key]
