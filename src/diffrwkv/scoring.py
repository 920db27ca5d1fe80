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

from diffrwkv import config, sharding
from diffrwkv.canvas import check_at_least_one
from diffrwkv.config import UserError
from diffrwkv.data import Tokenizer
from diffrwkv.data.evaluation import count
from diffrwkv.diffusion.layouts import Blocks, Layout
from diffrwkv.diffusion.likelihood import metrics
from diffrwkv.diffusion.objectives import Objective, Timed
from diffrwkv.diffusion.objectives.chain_rule import ChainRule
from diffrwkv.diffusion.processes import Masked
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
    if not exact and draws % 2:
        raise UserError(f"draws must be even, got {draws}: their error is that of pairs.")
    trained = run.config.data.length
    length, draws = trained if length is None else length, 1 if exact else draws
    tokenizer = run.tokenizer
    begin, end = np.split(np.array(tokenizer.wrapping() if run.config.data.wrap else (), np.int32), [1])
    body = length - len(begin) - len(end)
    if body < 2:
        raise UserError(f"length = {length} leaves no room for a text and what stands before it: take a larger one.")
    context = body // 2 if context is None else context
    if isinstance(context, bool) or not isinstance(context, int) or not 0 <= context < body:
        raise UserError(f"context must be an integer from 0 to {body - 1}, got {context!r}.")

    windows: list[_Window] = []
    encoded = [
        (_encode(tokenizer, text, f"text {i}"), _encode(tokenizer, prompt, f"prompt {i}", may_be_empty=True))
        for i, (text, prompt) in enumerate(zip(texts, before, strict=True), 1)
    ]
    for i, (ids, given) in enumerate(encoded):
        both = np.concatenate([given, ids])
        for known, start, stop in windows_of(len(given), len(ids), body, context):
            row = np.concatenate([begin, both[len(given) + start - known : len(given) + stop], end]).astype(np.int32)
            at = len(begin) + known
            first = int(at == 0 and objective.layout.keep_first)  # it is given
            if stop - start > first:
                windows.append(_Window(i, start + first, at + first, stop - start - first, row))
        if not windows or windows[-1].text != i:
            raise UserError(f"text {i + 1} is one token, and this model is given the first: score a longer one.")
    longest = max(len(window.row) for window in windows)
    if longest > trained:
        print(f"Rows of up to {longest} tokens: the model was trained on {trained}.", file=sys.stderr)
    check_logits(run, batch_size, longest)
    nats = _estimate(run, objective, windows, draws, seed, batch_size, progress)

    results = []
    of_text = np.searchsorted([window.text for window in windows], range(len(texts) + 1))
    for i, (text, (ids, _)) in enumerate(zip(texts, encoded, strict=True)):
        own = slice(of_text[i], of_text[i + 1])
        scored = np.zeros(len(ids), bool)
        for window in windows[own]:
            scored[window.start : window.start + window.size] = True
        total, error = _total(nats[own])
        counted = count(text, ids, scored, tokenizer)
        tokens = int(scored.sum())
        number = len(windows[own])
        results.append(Score(total, error, tokens, counted.characters, counted.words, number, draws, exact))
    return results


class _Window(NamedTuple):
    """A part of a text: its tokens from `start` on, `size` of them, stand in the row from column `at` on."""

    text: int
    start: int
    at: int
    size: int
    row: np.ndarray


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


def _strata(rng: np.random.Generator, draws: int, parts: int) -> np.ndarray:
    """float64 [draws, parts] in [0, 1): each column has two numbers in each of draws / 2 equal parts of the interval.

    The rows 2 s and 2 s + 1 are drawn alike, from the same parts, which are in an order of its own in each column.
    """
    strata = draws // 2
    order = rng.permuted(np.tile(np.arange(strata), (parts, 1)), axis=1).T
    return (np.repeat(order, 2, axis=0) + rng.random((draws, parts))) / strata


def _estimate(
    run: Run,
    objective: Objective,
    windows: Sequence[_Window],
    draws: int,
    seed: int,
    batch_size: int,
    progress: bool,
) -> np.ndarray:
    """float64 [windows, draws]: the nats of each window in each draw."""
    from tqdm import tqdm

    layout, mesh = objective.layout, run.mesh
    sizes = np.array([len(window.row) for window in windows])
    longest = int(sizes.max())
    noisy = isinstance(objective, Timed)
    time_eps = objective.time_eps if isinstance(objective, Timed) else 0.0

    @functools.lru_cache(maxsize=1)  # the draws of a window are neighbours
    def drawn(n):
        return np.stack(_early(_strata(np.random.default_rng([seed, n]), draws, layout.parts(longest)), time_eps))

    rows = [(n, d) for n in np.argsort(sizes, kind="stable").tolist() for d in range(draws)]
    batch_size = min(batch_size, len(rows))
    batch_size += -batch_size % mesh.size
    scored, key = _compiled(run, objective), jax.random.key(seed)
    waiting: list[tuple[np.ndarray, np.ndarray, jax.Array]] = []
    bar = tqdm(total=len(rows), desc="score", disable=not progress)
    for first in range(0, len(rows), batch_size):
        n, d = np.array(rows[first : first + batch_size]).T
        width = int(sizes[n].max())
        width = min(width + -width % LENGTH_STEP, longest)
        tokens, counted, valid = _laid_out([windows[i] for i in n], batch_size, width, run.tokenizer.pad_id)
        if noisy:
            of_parts = np.stack([drawn(i)[:, j] for i, j in zip(n.tolist(), d.tolist(), strict=True)], axis=1)
            t, weights = (_times(layout, x, batch_size, width) for x in of_parts)
        else:
            t, weights = np.asarray(objective.times(key, batch_size, width)), None
        inputs = {"tokens": tokens, "counted": counted, "t": t, "weights": weights}
        inputs |= {"valid": None if valid.all() else valid}
        arrays = {k: None if x is None else sharding.split_rows(x, mesh) for k, x in inputs.items()}
        found = scored(run.params, jax.random.fold_in(key, first), **arrays)
        waiting.append((n, d, found))
        if progress:
            jax.block_until_ready(found)
        bar.update(len(n))
    bar.close()
    nats = np.zeros((len(windows), draws))
    for n, d, found in waiting:
        nats[n, d] = np.asarray(found)[: len(n)]
    return nats


def _laid_out(
    windows: Sequence[_Window], number: int, width: int, pad_id: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(tokens int32, what is counted, what is no padding), [number, width]; rows behind the windows' are empty."""
    tokens = np.full((number, width), pad_id, np.int32)
    counted, valid = np.zeros(tokens.shape, bool), np.ones(tokens.shape, bool)
    for i, window in enumerate(windows):
        tokens[i, : len(window.row)] = window.row
        valid[i, len(window.row) :] = False
        counted[i, window.at : window.at + window.size] = True
    return tokens, counted, valid


def _times(layout: Layout, of_parts: np.ndarray, number: int, width: int) -> np.ndarray:
    """What `layout.times` makes of the first numbers of each row's parts, [n, at least N]; 1 for the empty rows."""
    filled = np.ones((number, layout.parts(width)), np.float32)
    filled[: len(of_parts)] = of_parts[:, : filled.shape[1]]
    return np.asarray(layout.times(jnp.asarray(filled.reshape(-1)), number, width))


def _early(u: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """(times in [eps, 1], their weights), float32 of u's shape, from uniform numbers in [0, 1).

    The weighed mean is that over uniform times. The variance of a bound's integrand is about (1 - t) / t, so the mean
    varies least for a density that goes as its root; that of u^2, 1 / (2 root t), is near to it.
    """
    root = math.sqrt(eps) + (1 - math.sqrt(eps)) * u
    return np.square(root).astype(np.float32), (2 * root / (1 + math.sqrt(eps))).astype(np.float32)


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


def _total(nats: np.ndarray) -> tuple[float, float]:
    """(Sum over windows of the means over draws, its standard error), from nats [windows, draws]."""
    windows, draws = nats.shape
    if draws == 1:
        return float(nats.sum()), 0.0
    pairs = nats.reshape(windows, draws // 2, 2)
    variance = np.square(pairs[..., 0] - pairs[..., 1]).sum() / 4 / (draws // 2) ** 2
    return float(nats.mean(axis=1).sum()), math.sqrt(variance)
