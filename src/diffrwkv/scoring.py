"""How likely a model finds each of some texts, alone or given a prompt: `score`, from Python.

    run = diffrwkv.load("runs/quickstart")
    for s in diffrwkv.score(run, ["The first text.", "The second one."]):
        print(s.nats, "+-", s.error, s.nelbo, s.bpc)

A diffusion model bounds -log p of a text from above, and the bound is estimated from draws of noise; a model from left
to right has -log p itself. `evaluate` scores whole data sets, by rows as they are trained on; here each text stands
alone.
"""

import dataclasses
import functools
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffrwkv import bars, config, sharding
from diffrwkv.config import UserError, check_at_least_one
from diffrwkv.data import Tokenizer
from diffrwkv.data.evaluation import count
from diffrwkv.diffusion.layouts import Blocks, Layout
from diffrwkv.diffusion.likelihood import metrics
from diffrwkv.diffusion.objectives import Objective, Timed
from diffrwkv.diffusion.objectives.chain_rule import ChainRule
from diffrwkv.diffusion.processes import Masked
from diffrwkv.diffusion.times import early_times, strata
from diffrwkv.generation import LENGTH_STEP, load
from diffrwkv.networks import network_fn
from diffrwkv.run import MOST_LOGITS, Run


@dataclasses.dataclass(frozen=True)
class Score:
    """Of one text.

    Attributes:
      nats: the bound on -log p(text | prompt), summed over its tokens; with `exact` this itself.
      error: standard error of `nats`, of the draws; 0 where `exact`.
      tokens, characters, words: of the text that were scored; a word is what `str.split` gives.
      windows: how many rows the text took; one, unless it is longer than them.
      draws: of noise, for each row.
      exact: `nats` is no bound and no estimate.
    """

    nats: float
    error: float
    tokens: int
    characters: int
    words: int
    windows: int
    draws: int
    exact: bool

    @property
    def nelbo(self) -> float:
        """Nats per token."""
        return self.nats / self.tokens

    @property
    def bpc(self) -> float:
        """Bits per character; NaN for a text whose characters begin in none of its tokens."""
        return metrics(self.nelbo, self.characters / self.tokens)["bpc"] if self.characters else math.nan

    @property
    def ppl(self) -> float:
        """Perplexity per token: exp(nelbo)."""
        return metrics(self.nelbo)["ppl"]

    @property
    def word_ppl(self) -> float:
        """Perplexity per word: exp(nats / words); NaN for a text without any."""
        return metrics(self.nats / self.words)["ppl"] if self.words else math.nan


def bounding(run: Run, block_size: int | None = None) -> Objective:
    """The run's objective that bounds the likelihood, in blocks of another size if one is given.

    It is exact (`is_exact`) from left to right, and for masked blocks of one token.

    Raises UserError where it bounds none, or has no blocks.
    """
    cfg, objective = run.config, run.objective.validation
    if not objective.process.bound:
        raise UserError(
            f"config.diffusion.name = {cfg.diffusion.name!r} bounds no likelihood: judge its samples instead "
            "(python -m diffrwkv.sample)."
        )
    if block_size is not None:
        if not isinstance(objective.layout, Blocks):
            raise UserError(f"block_size needs blocks, not config.diffusion.layout = {cfg.diffusion.layout!r}.")
        try:
            cut = dataclasses.replace(objective.layout, sizes=(block_size,))
        except ValueError:
            raise UserError(f"block_size must be an integer of at least 0 (0: all), got {block_size!r}.") from None
        objective = dataclasses.replace(objective, layout=cut)
    process, layout = objective.process, objective.layout
    if type(process) is Masked and isinstance(layout, Blocks) and layout.sizes == (1,):
        if process.output == "mean" and not run.model.time_conditioning:
            return ChainRule(process, layout)
    return objective


def is_exact(objective: Objective) -> bool:
    """Whether it draws nothing: its nats are -log p itself."""
    return objective.causal or isinstance(objective, ChainRule)


def check_logits(run: Run, batch_size: int, length: int, name: str = "batch_size") -> None:
    """Raises UserError where so many rows of so many tokens are more than `MOST_LOGITS` logits."""
    vocab_size = run.tokenizer.vocab_size
    if batch_size * length * vocab_size > MOST_LOGITS:
        raise UserError(
            f"{name} = {batch_size} is too large: rows of {length} tokens, with {vocab_size} logits for each, are more "
            f"than {MOST_LOGITS:,} logits at a time."
        )


def score(
    run: Run | str | os.PathLike,
    texts: str | Sequence[str],
    *,
    prompts: str | Sequence[str] | None = None,
    draws: int = 32,
    seed: int = 0,
    block_size: int | None = None,
    length: int | None = None,
    context: int | None = None,
    batch_size: int = 16,
    progress: bool = False,
) -> list[Score]:
    """The bound on -log p(text), or on -log p(text | prompt), of each text.

    A text stands in a row of its own, behind its prompt, between BOS and EOS if the model was trained so
    (config.data.wrap). These and the prompt are given: never noised, never counted. One that is longer than a row is
    scored in several windows, each token once, with up to `context` tokens before the window given.

    The bound is that of `evaluate`, estimated with less noise: early times, whose few masks weigh most, are drawn more
    often and weigh less. Half of the draws of a text are spread evenly over all times, and so is the other half: that
    the two of each part differ is what the error is made of. The noise depends on the seed and on the other texts.

    Args:
      run: what `load` returns, or a workdir.
      texts: one or several, none empty.
      prompts: what stands before each text; one is for all. Text and prompt are tokenized apart, so a space between the
        two belongs to the beginning of the text, where GPT-2's vocabulary has it. None: nothing.
      draws: of noise, even; a model from left to right needs none.
      seed: of the noise.
      block_size: of block diffusion: tokens in a block; 0: all; None: the first of config.layouts.blocks.sizes.
      length: tokens in a row at most, BOS and EOS counted; None: as in training (config.data.length). Longer ones are
        scored as they are, by a network that saw none so long.
      context: tokens that are given before a window that is not the first, and of a prompt that is too long for its row
        at least; None: half a row.
      batch_size: rows at a time.
      progress: show a bar on stderr.

    Raises UserError for what cannot be done, before any compute.
    """
    run = run if isinstance(run, Run) else load(run)
    objective = bounding(run, block_size)
    texts = [texts] if isinstance(texts, str) else list(texts)
    before = [prompts or ""] * len(texts) if isinstance(prompts, str) or prompts is None else list(prompts)
    check_at_least_one(draws=draws, length=length, batch_size=batch_size)
    if len(before) != len(texts):
        raise UserError(f"There are {len(before)} prompts for {len(texts)} texts: give one for all, or one for each.")
    if not texts:
        return []
    seed, exact = config.seed(seed), is_exact(objective)
    check_draws(draws, exact)
    items = [Item(*pair, f"text {i}", f"prompt {i}") for i, pair in enumerate(zip(before, texts, strict=True), 1)]
    length = run.config.data.length if length is None else length
    windows, encoded = laid_out(run, objective, items, length, context)
    check_rows(run, windows, batch_size)
    draws = 1 if exact else draws
    nats = estimate(run, objective, windows, draws, seed, batch_size, progress=progress)

    results = []
    of_text = np.searchsorted([window.text for window in windows], range(len(texts) + 1))
    for i, (text, ids) in enumerate(zip(texts, encoded, strict=True)):
        own = slice(of_text[i], of_text[i + 1])
        scored = np.zeros(len(ids), bool)
        for window in windows[own]:
            scored[window.start : window.start + window.size] = True
        sum_, error = total(nats[own])
        counted = count(text, ids, scored, run.tokenizer)
        tokens = int(scored.sum())
        number = len(windows[own])
        results.append(Score(sum_, error, tokens, counted.characters, counted.words, number, draws, exact))
    return results


def check_draws(draws: int, exact: bool) -> None:
    """Raises UserError for an odd number, where anything is drawn."""
    if not exact and draws % 2:
        raise UserError(f"draws must be even, got {draws}: their error is that of pairs.")


# --- Rows -------------------------------------------------------------------------------------------


class Item(NamedTuple):
    """A text to be scored given a prompt, and what errors call the two."""

    prompt: str
    text: str
    name: str
    prompt_name: str


class Window(NamedTuple):
    """A part of a text: its tokens from `start` on, `size` of them, stand in the row from column `at` on."""

    text: int
    start: int
    at: int
    size: int
    row: np.ndarray


def laid_out(
    run: Run, objective: Objective, items: Sequence[Item], length: int | None, context: int | None = None
) -> tuple[list[Window], list[np.ndarray]]:
    """(The windows of all texts in order, each text's tokens int32 [n]), between BOS and EOS if trained so.

    Args:
      length: tokens in a row at most; None: as many as the longest text and its prompt take.
      context: as of `score`.

    Raises UserError, naming the item.
    """
    tokenizer = run.tokenizer
    begin, end = np.split(np.array(tokenizer.wrapping() if run.config.data.wrap else (), np.int32), [1])
    encoded = [
        (_encode(tokenizer, item.prompt, item.prompt_name, may_be_empty=True), _encode(tokenizer, item.text, item.name))
        for item in items
    ]
    if length is None:
        body = max(2, *(len(given) + len(ids) for given, ids in encoded))
    else:
        body = length - len(begin) - len(end)
    if body < 2:
        raise UserError(f"length = {length} leaves no room for a text and what stands before it: take a larger one.")
    context = body // 2 if context is None else context
    if isinstance(context, bool) or not isinstance(context, int) or not 0 <= context < body:
        raise UserError(f"context must be an integer from 0 to {body - 1}, got {context!r}.")
    windows: list[Window] = []
    for i, (given, ids) in enumerate(encoded):
        both = np.concatenate([given, ids])
        for known, start, stop in windows_of(len(given), len(ids), body, context):
            row = np.concatenate([begin, both[len(given) + start - known : len(given) + stop], end]).astype(np.int32)
            at = len(begin) + known
            first = int(at == 0 and objective.layout.keep_first)  # it is given
            if stop - start > first:
                windows.append(Window(i, start + first, at + first, stop - start - first, row))
        if not windows or windows[-1].text != i:
            raise UserError(f"{items[i].name} is one token, and this model is given the first: score a longer one.")
    return windows, [ids for _, ids in encoded]


def check_rows(run: Run, windows: Sequence[Window], batch_size: int, name: str = "batch_size") -> None:
    """Says so on stderr where a row is longer than those of training. Raises UserError as `check_logits` does."""
    longest, trained = max(len(window.row) for window in windows), run.config.data.length
    check_logits(run, batch_size, longest, name)
    if longest > trained:
        print(f"Rows of up to {longest} tokens: the model was trained on {trained}.", file=sys.stderr)


def _encode(tokenizer: Tokenizer, text: str, what: str, *, may_be_empty: bool = False) -> np.ndarray:
    """int32 [n]. Raises UserError."""
    if not isinstance(text, str):
        raise UserError(f"{what} must be a string, got {type(text).__name__}.")
    if not text and not may_be_empty:
        raise UserError(f"{what} is empty: leave it out.")
    try:
        return tokenizer.encode(text)
    except ValueError as e:
        raise UserError(f"{what}: {e}.") from None


def windows_of(given: int, size: int, body: int, context: int) -> Iterator[tuple[int, int, int]]:
    """(tokens given before it, start, stop) of the windows of a text.

    Args:
      given: tokens of the prompt.
      size: of the text.
      body: most tokens in a row, those that are given among them.
    """
    before, start = min(given, max(body - size, context)), 0
    while start < size:
        stop = min(size, start + body - before)
        yield before, start, stop
        before, start = min(given + stop, context), stop


class Batch(NamedTuple):
    """Rows that are computed at once, arrays of the host. Those behind the windows' are empty.

    Attributes:
      number: of the first of its rows among all.
      windows, draws: int [n], which window and which of its draws a row is.
      tokens: int32 [B, L], B >= n.
      counted: bool [B, L], what is scored.
      valid: bool [B, L], what is no padding; None: there is none.
    """

    number: int
    windows: np.ndarray
    draws: np.ndarray
    tokens: np.ndarray
    counted: np.ndarray
    valid: np.ndarray | None


def in_batches(
    run: Run,
    windows: Sequence[Window],
    draws: Sequence[int],
    batch_size: int,
    compute: Callable[[Batch], jax.Array],
    *,
    progress: bool = False,
) -> list[np.ndarray]:
    """What `compute` finds, [B, ...] of a batch, for all draws of each window: float64 [its draws, ...].

    Rows of about one length are computed together, for few compilations.
    """
    sizes = np.array([len(window.row) for window in windows])
    longest, mesh = int(sizes.max()), run.mesh
    rows = [(n, d) for n in np.argsort(sizes, kind="stable").tolist() for d in range(draws[n])]
    batch_size = min(batch_size, len(rows))
    batch_size += -batch_size % mesh.size
    waiting: list[tuple[np.ndarray, np.ndarray, jax.Array]] = []
    bar = bars.bar(len(rows), "score", show=progress, compiles=True)
    for first in range(0, len(rows), batch_size):
        n, d = np.array(rows[first : first + batch_size]).T
        width = int(sizes[n].max())
        width = min(width + -width % LENGTH_STEP, longest)
        laid = _batch([windows[i] for i in n], batch_size, width, run.tokenizer.pad_id)
        found = compute(Batch(first, n, d, *laid))
        waiting.append((n, d, found))
        if progress:
            jax.block_until_ready(found)
        bar.update(len(n))
    bar.close()
    results = [np.zeros((number, *waiting[0][2].shape[1:])) for number in draws]
    for n, d, found in waiting:
        for i, j, x in zip(n.tolist(), d.tolist(), np.asarray(found, np.float64), strict=False):
            results[i][j] = x
    return results


def _batch(
    windows: Sequence[Window], number: int, width: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """(tokens int32, what is counted, what is no padding or None), [number, width]."""
    tokens = np.full((number, width), pad_id, np.int32)
    counted, valid = np.zeros(tokens.shape, bool), np.ones(tokens.shape, bool)
    for i, window in enumerate(windows):
        tokens[i, : len(window.row)] = window.row
        valid[i, len(window.row) :] = False
        counted[i, window.at : window.at + window.size] = True
    return tokens, counted, None if valid.all() else valid


# --- The bound --------------------------------------------------------------------------------------


def estimate(
    run: Run,
    objective: Objective,
    windows: Sequence[Window],
    draws: int,
    seed: int,
    batch_size: int,
    *,
    progress: bool = False,
) -> list[np.ndarray]:
    """The nats of each window in each draw, float64 [draws]."""
    layout = objective.layout
    longest = max(len(window.row) for window in windows)
    noisy = isinstance(objective, Timed)
    time_eps = objective.time_eps if isinstance(objective, Timed) else 0.0

    @functools.lru_cache(maxsize=1)  # the draws of a window are neighbours
    def drawn(n):
        return np.stack(early_times(strata(np.random.default_rng([seed, n]), draws, layout.parts(longest)), time_eps))

    scored, key = _compiled(run, objective), jax.random.key(seed)

    def compute(batch: Batch) -> jax.Array:
        shape = batch.tokens.shape
        if noisy:
            pairs = zip(batch.windows.tolist(), batch.draws.tolist(), strict=True)
            of_parts = np.stack([drawn(n)[:, d] for n, d in pairs], axis=1)
            t, weights = (of_rows(layout, x, *shape) for x in of_parts)
        else:
            t, weights = np.asarray(objective.times(key, *shape)), None
        inputs = {"tokens": batch.tokens, "counted": batch.counted, "t": t, "weights": weights, "valid": batch.valid}
        return scored(run.params, jax.random.fold_in(key, batch.number), **on_mesh(run, **inputs))

    return in_batches(run, windows, [draws] * len(windows), batch_size, compute, progress=progress)


def on_mesh(run: Run, **arrays: np.ndarray | None) -> dict[str, jax.Array | None]:
    """The arrays, their rows split over the run's mesh."""
    return {name: None if x is None else sharding.split_rows(x, run.mesh) for name, x in arrays.items()}


def of_rows(layout: Layout, of_parts: np.ndarray, number: int, width: int) -> np.ndarray:
    """What `layout.times` makes of the first numbers of each row's parts, [n, at least N]; 1 for the empty rows."""
    filled = np.ones((number, layout.parts(width)), np.float32)
    filled[: len(of_parts)] = of_parts[:, : filled.shape[1]]
    return np.asarray(layout.times(jnp.asarray(filled.reshape(-1)), number, width))


def _compiled(run: Run, objective: Objective) -> Callable[..., jax.Array]:
    """(params, key, tokens, counted, t, weights or None, valid or None) -> nats [B], kept with the run."""

    def nats(params, key, tokens, counted, t, weights, valid):
        denoise = network_fn(run.model, params, valid=valid)
        loss = objective.loss(denoise, key, tokens, t, counted)
        if weights is None:
            return loss.nats
        return (loss.token_nats * objective.layout.of_tokens(weights, tokens.shape[1])).sum(axis=1)

    name = ("score", objective)
    if name not in run.generators:
        run.generators[name] = jax.jit(sharding.over(run.mesh, nats), out_shardings=sharding.replicated(run.mesh))
    return run.generators[name]


def total(nats: Sequence[np.ndarray]) -> tuple[float, float]:
    """(Sum over windows of the means over draws, its standard error), from the nats [draws] of each window.

    One draw alone is no draw: its number is exact. Else they are pairs of draws from the same law.
    """
    variance = 0.0
    for drawn in nats:
        if len(drawn) > 1:
            variance += np.square(drawn[::2] - drawn[1::2]).sum() / len(drawn) ** 2
    return float(sum(drawn.mean() for drawn in nats)), math.sqrt(variance)
