"""Confidence sampling: each pass predicts every blank, and keeps the predictions that the network is surest of.

LLaDA's low-confidence remasking (arXiv 2502.09992, section 2.4) with its blocks; Fast-dLLM's rules for how many to keep
at once (arXiv 2505.22618, section 3.3). It is no sampler of the model's law, even with a temperature: the order of
the positions depends on what is predicted, and tokens kept together are predicted apart.
"""

import dataclasses

import jax
import jax.numpy as jnp

from diffrwkv.checks import BLOCK, GRID, POSITIVE, POSITIVE_FRACTION, check_choice
from diffrwkv.diffusion.deferred import deferring
from diffrwkv.diffusion.noise import NO_TOKEN, likeliest, uniform
from diffrwkv.diffusion.samplers.base import Sampler, Samples, watched
from diffrwkv.diffusion.samplers.common import (
    blanks,
    check_truncation,
    draw,
    entropies,
    fold_step,
    position_keys,
    settle,
    time_of_share,
    trace_of_reveals,
)

SCORES = ("probability", "margin", "entropy", "random")
RULES = ("steps", "threshold", "factor")


@dataclasses.dataclass(frozen=True)
class Confidence(Sampler):
    """Keeps the most confident predictions, block after block.

    Blocks are counted from a sequence's first blank, so behind a prompt the first block begins where the prompt ends. A
    last block that does not fit into the canvas is padded: it has fewer blanks, and nothing is generated beyond the
    end. Each sequence is in a block of its own, and goes on to the next one when it has filled it.

    Per pass, in the block's blanks: the candidate is the most probable token, or with a temperature one drawn from
    softmax(logits / temperature) (LLaDA's Gumbel noise to the power of the temperature has that law; here it is exact
    in float32). Its confidence never sees the temperature:

      "probability": softmax(logits) at the candidate
      "margin": the largest probability less the second largest (arXiv 2502.06768)
      "entropy": exp(-entropy), which orders as the negative entropy does and lies in (0, 1]
      "random": a uniform number; LLaDA's "random" remasking

    How many are kept, the most confident first and at least one:

      "steps": a block's m blanks in `num_steps` = S passes, floor(m / S) in each and one more in the first m mod S
      "threshold": all whose confidence is at least `threshold`
      "factor": the largest n with (n + 1) (1 - c_n) < `factor`, c_n the n-th largest confidence

    With a temperature, a pass draws a random number for each position and token of a block, as LLaDA's does for each of
    the whole canvas.

    The network is told the time at which as large a share of the blanks would still be masked. The trace has L + 1
    entries, the sequence after each of its own passes.

    Attributes:
      num_steps: passes per block, for the rule "steps" alone (None: 128). A block of fewer blanks takes as many as it
        has.
      block: positions in a block; None: the whole canvas.
      score: how sure a prediction is, as above.
      rule: how many to keep, as above.
      threshold: in (0, 1], for the rule "threshold" alone (None: 0.9).
      factor: above 0, for the rule "factor" alone (None: 1).
      temperature, top_p, top_k: of the candidates; see `common.truncate`.
    """

    num_steps: int | None = None
    block: int | None = None
    score: str = "probability"
    rule: str = "steps"
    threshold: float | None = None
    factor: float | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        if self.block is not None:
            BLOCK.check("block", self.block)
        check_choice("score", self.score, SCORES)
        check_choice("rule", self.rule, RULES)
        for name, range_ in (("num_steps", GRID), ("threshold", POSITIVE_FRACTION), ("factor", POSITIVE)):
            if getattr(self, name) is not None:
                range_.check(name, getattr(self, name))
        if self.score == "random" and self.rule != "steps":
            raise ValueError(f"rule = {self.rule!r} needs a score that says how sure the network is, not 'random'.")
        settle(self, "rule", num_steps=(["steps"], 128), threshold=(["threshold"], 0.9), factor=(["factor"], 1.0))
        check_truncation(self.temperature, self.top_p, self.top_k)

    def _fill(self, process, network, keys, canvas, valid, return_trace, on_step):
        return fill(self, process, watched(network, on_step), keys, canvas, valid, return_trace)


def fill(sampler, process, denoise, keys, canvas, valid, return_trace, *, answer=None, leave=None) -> Samples:
    """The loop of `Confidence`, and of the samplers that leave it early.

    Args:
      sampler: a `Confidence`.
      process, denoise, keys, canvas, valid, return_trace: those of a sampler's call, checked.
      answer: bool [B, L] or None: blanks that no step fills, only leaving does.
      leave: None, or (logits float32 [B, L, V] without the mask's, left bool [B, L], passes int32 [B], planned
        int32 [B]) -> bool [B]: sequences of which all blanks take their most probable token in this pass. `left` is
        what is masked before the pass, `passes` counts those before it, `planned` is how many the rule "steps" takes in
        all. It must leave a sequence that has nothing but `answer` left.
    """
    batch, length = canvas.shape
    block = length if sampler.block is None else min(sampler.block, length)
    blank = blanks(canvas, process.mask_id, valid)
    stepped = blank if answer is None else blank & ~answer
    rows = jnp.arange(batch)[:, None]
    first = jnp.argmax(stepped, axis=1).astype(jnp.int32)
    number_of_block = (jnp.arange(length, dtype=jnp.int32)[None] - first[:, None]) // block  # [B, L]; negative: given
    in_block = jnp.zeros((batch, -(-length // block)), jnp.int32)
    in_block = in_block.at[rows, jnp.maximum(number_of_block, 0)].add(stepped.astype(jnp.int32))
    network = deferring(denoise) if leave is None and block < length else denoise
    planned = None if leave is None else jnp.minimum(in_block, sampler.num_steps).sum(axis=1)

    def some_left(carry):
        return (carry[1] == 0).any()

    def next_pass(carry):
        z, revealed, passes, step, current = carry
        left = revealed == 0
        output = network(z, time_of_share(process.schedule, left, blank))
        process.vocabulary.check_output(output, z.shape)

        now = jnp.where(left & stepped, number_of_block, length).min(axis=1)  # the block that a sequence is in
        now = jnp.where(now < length, now, 0)
        step = jnp.where(now == current, step, 0)
        positions = (first + now * block)[:, None] + jnp.arange(block, dtype=jnp.int32)[None]  # [B, block]
        here = process.vocabulary.without_mask(output[rows, jnp.minimum(positions, length - 1)])
        masked = (left & stepped).at[rows, positions].get(mode="fill", fill_value=False)
        tokens, confidence = _predict(sampler, here, keys, positions, passes)
        confidence = jnp.where(tokens == NO_TOKEN, jnp.inf, confidence)  # there nothing is to be waited for
        quota = in_block[rows[:, 0], now]
        kept = masked & _surest(sampler, jnp.where(masked, confidence, -jnp.inf), quota, step)
        shown = jnp.where(kept, tokens, z.at[rows, positions].get(mode="clip"))
        z = z.at[rows, positions].set(shown, mode="drop")
        showing = jnp.zeros_like(left).at[rows, positions].set(kept, mode="drop")
        if leave is not None:
            logits = process.vocabulary.without_mask(output)
            out = left & leave(logits, left, passes, planned)[:, None]
            best = likeliest(logits)
            z, showing = jnp.where(out, best, z), showing | out
        passes = passes + left.any(axis=1).astype(jnp.int32)
        return z, jnp.where(showing, passes[:, None], revealed), passes, step + 1, now

    zeros = jnp.zeros((batch,), jnp.int32)
    # 0 where a blank is masked, then the pass that revealed it; -1 where nothing is to be generated.
    revealed = jnp.where(blank, 0, -1)
    tokens, revealed, passes, *_ = jax.lax.while_loop(some_left, next_pass, (canvas, revealed, zeros, zeros, zeros))
    trace = trace_of_reveals(canvas, tokens, jnp.maximum(revealed, 0), length) if return_trace else None
    return Samples(tokens, passes, trace)


def _predict(sampler, logits, keys, positions, passes):
    """Candidates int32 [B, N] and their confidence float32 [B, N] from logits [B, N, V] at positions [B, N]."""
    batch, number, vocabulary = logits.shape
    score_keys, token_keys = (fold_step(k, passes) for k in position_keys(keys, positions))
    flat = logits.reshape(-1, vocabulary)
    tokens, _ = draw(token_keys.reshape(-1), flat, sampler.temperature, sampler.top_p, sampler.top_k)
    if sampler.score == "random":
        return tokens.reshape(batch, number), jax.vmap(jax.vmap(uniform))(score_keys)
    log_p = jax.nn.log_softmax(flat, axis=-1)
    if sampler.score == "probability":
        confidence = jnp.exp(jnp.take_along_axis(log_p, tokens[:, None], axis=-1)[:, 0])
    elif sampler.score == "margin":
        largest, second = jnp.exp(jax.lax.top_k(log_p, 2)[0]).T
        confidence = largest - second
    else:
        confidence = jnp.exp(-entropies(log_p))
    return tokens.reshape(batch, number), confidence.reshape(batch, number)


def _surest(sampler, confidence, quota, step):
    """bool [B, N]: which to keep, by confidence [B, N] (-inf where nothing is masked; earlier positions win ties).

    Args:
      quota: int32 [B], blanks of the block at its start.
      step: int32 [B], passes in this block so far.
    """
    order = jnp.argsort(-confidence, axis=1)
    rank = jnp.argsort(order, axis=1).astype(jnp.int32)
    if sampler.rule == "steps":
        number = quota // sampler.num_steps + (step < quota % sampler.num_steps).astype(jnp.int32)
    elif sampler.rule == "threshold":
        number = (confidence >= sampler.threshold).sum(axis=1, dtype=jnp.int32)
    else:
        descending = jnp.take_along_axis(confidence, order, axis=1)
        cost = jnp.arange(2, confidence.shape[1] + 2, dtype=jnp.float32)[None] * (1 - descending)
        number = (cost < sampler.factor).sum(axis=1, dtype=jnp.int32)
    return rank < jnp.maximum(number, 1)[:, None]
