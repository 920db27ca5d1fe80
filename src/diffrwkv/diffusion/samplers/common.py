"""What the samplers share: checks of options, blanks and their times, traces, and the drawing of tokens."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from diffrwkv.array_types import Array, Keys, Law, Logits, PerToken, Positions, TokenKeys, Tokens, Valid
from diffrwkv.checks import COUNT_OR_NONE, GRID, INSIDE, TEMPERATURE, TOP_P
from diffrwkv.diffusion.deferred import Deferred
from diffrwkv.diffusion.noise import NO_TOKEN, categorical, likeliest
from diffrwkv.diffusion.processes import Vocabulary
from diffrwkv.diffusion.schedules import Schedule

# Checks


def check_grid(num_steps: int, eps: float) -> None:
    """Raises ValueError for the options of a grid of times from 1 to `eps`."""
    GRID.check("num_steps", num_steps)
    INSIDE.check("eps", eps)


def settle(sampler: Any, choice: str, **options: tuple[Sequence[str], Any]) -> None:
    """Gives an option of a new sampler that is None its default where it counts, and refuses it where it does nothing.

    Args:
      choice: the option whose value decides.
      options: name=(the values under which the option counts, its default there).

    Raises ValueError for an option that is given and would do nothing.
    """
    chosen = getattr(sampler, choice)
    for name, (where, default) in options.items():
        given = getattr(sampler, name) is not None
        if given and chosen not in where:
            raise ValueError(
                f"{name} does nothing with {choice} = {chosen!r}: leave it out, or choose {choice} = "
                f"{' or '.join(map(repr, where))}."
            )
        if chosen in where and not given:
            object.__setattr__(sampler, name, default)


def check_truncation(temperature: float, top_p: float, top_k: int = 0) -> None:
    """Raises ValueError for options that `truncate` (or argmax, for temperature 0) cannot take."""
    TEMPERATURE.check("temperature", temperature)
    TOP_P.check("top_p", top_p)
    COUNT_OR_NONE.check("top_k", top_k)
    if temperature == 0 and (top_p < 1 or top_k):
        raise ValueError(
            f"top_p = {top_p} and top_k = {top_k} do nothing at temperature 0, which takes the most probable token: "
            "set a temperature, or top_p = 1 and top_k = 0."
        )


# Blanks


def blanks(canvas: Tokens, mask_id: int, valid: Valid | None) -> Positions:
    """bool [B, L]: where a sampler has to generate."""
    blank = canvas == mask_id
    return blank if valid is None else blank & valid


def time_of(schedule: Schedule, masked: Array) -> Array:
    """The time in [0, 1] at which tokens are masked with the probability `masked`, float32 of any shape.

    Rounding may ask for a time beyond the ends, and so may a schedule that masks something at 0 already.
    """
    return jnp.clip(schedule.time(masked), 0.0, 1.0)


def time_of_share(schedule: Schedule, left: Positions, blank: Positions) -> Array:
    """The time at which the share of blanks that are still masked is what `schedule` expects; 1 at the start.

    For samplers that follow no grid of times, so that a network that looks at t is told one.

    Args:
      left, blank: bool [B, L], still masked now and at the start.

    Returns:
      float32 [B].
    """
    share = left.sum(axis=1).astype(jnp.float32) / jnp.maximum(blank.sum(axis=1), 1).astype(jnp.float32)
    return time_of(schedule, schedule.mask_probability(jnp.ones_like(share)) * share)


def traces_of_blocks(canvas: Tokens, block: int, entries: int) -> Array:
    """[N, entries, B, b] for the traces of the N blocks of a canvas [B, N b]; so far nothing is filled in."""
    batch, length = canvas.shape
    parts = canvas.reshape(batch, length // block, block).swapaxes(0, 1)
    return jnp.repeat(parts[:, None], entries, axis=1)


def join_traces(traces: Array, canvas: Tokens, tokens: Tokens) -> Array:
    """Those of the blocks [N, S + 1, B, b], filled one after another, as one of the sequence [N S + 1, B, L].

    The blocks behind the one that is being filled are those of the canvas [B, L], those before it of the result.
    """
    number, steps, _, block = traces.shape
    length = canvas.shape[1]
    n, s = jnp.divmod(jnp.arange(number * (steps - 1)), steps - 1)
    inside = jnp.tile(traces[n, s + 1], (1, 1, number))[:, :, :length]  # [N S, B, L]
    at = (jnp.arange(length) // block)[None, None] - n[:, None, None]
    entries = jnp.where(at < 0, tokens, jnp.where(at == 0, inside, canvas))
    return jnp.concatenate([canvas[None], entries])


def trace_of_reveals(canvas: Tokens, tokens: Tokens, revealed: Array, steps: int) -> Array:
    """The trace of a sampler that never changes a shown token, from the step (1 to `steps`) that revealed each blank.

    It needs no memory in the loop. `revealed` is int32 [B, L], 0 where a token was given.
    """
    now = jnp.arange(steps + 1, dtype=jnp.int32)[:, None, None]
    return jnp.where(revealed[None] <= now, tokens[None], canvas[None])


def most_remasked(alpha_t: Array, masked_s: Array) -> Array:
    """The largest probability with which a step to s may mask a shown token again: min(1, m_s / alpha_t).

    ReMDM, arXiv 2503.00307, section 4.
    """
    return jnp.where(masked_s < alpha_t, masked_s / jnp.maximum(alpha_t, 1e-30), 1.0)


# Drawing


def position_keys(keys: Keys, positions: Array) -> tuple[TokenKeys, TokenKeys]:
    """Two keys for each position: (for *when* it is revealed, for *what* is drawn).

    They depend on the sequence's key and the position's index alone, so a longer canvas does not change them.

    Args:
      keys: key array [B].
      positions: int32 [B, N].

    Returns:
      two key arrays [B, N].
    """
    fold = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)))
    even = 2 * positions.astype(jnp.uint32)
    return fold(keys, even), fold(keys, even + 1)


def canvas_keys(keys: Keys, length: int) -> tuple[TokenKeys, TokenKeys]:
    """`position_keys` [B, L] of the positions 0 to `length` - 1."""
    positions = jnp.arange(length, dtype=jnp.int32)
    return position_keys(keys, jnp.broadcast_to(positions, (*keys.shape, length)))


def fold_step(keys: TokenKeys, step: Array) -> TokenKeys:
    """Keys [B, N] for the steps [B]: a sampler that draws more than once for a position needs a new key each time."""
    return jax.vmap(jax.vmap(jax.random.fold_in, (0, None)))(keys, step.astype(jnp.uint32))


def entropies(log_p: Law) -> PerToken:
    """Of laws [..., V], in nats: float32 [...]."""
    p = jnp.exp(log_p)
    return -jnp.where(p > 0, p * log_p, 0.0).sum(axis=-1)


def truncate(logits: Array, temperature: float, top_p: float, top_k: int = 0) -> Array:
    """Logits after temperature, then top-k, then nucleus truncation (Holtzman et al., arXiv 1904.09751).

    The nucleus is the smallest set of the most probable tokens, after temperature and top-k, whose probability reaches
    top_p. Tokens as probable as the last one that is kept are kept too. All act on p(x | z_t), never on the probability
    to stay masked.

    Args:
      logits: float32 [..., V].
      temperature: above 0; a Python float.
      top_p: in (0, 1]; a Python float. 1 leaves every token.
      top_k: how many tokens to keep; a Python int. 0 leaves every token.

    Returns:
      float32 [..., V], -inf for the tokens that are left out.
    """
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    top_k = 0 if top_k >= logits.shape[-1] else top_k
    if top_p == 1 and not top_k:
        return logits
    descending = -jnp.sort(-logits, axis=-1)
    if top_k:
        least = descending[..., top_k - 1 : top_k]
        logits, descending = (jnp.where(x >= least, x, -jnp.inf) for x in (logits, descending))
    if top_p == 1:
        return logits
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    last = jnp.where(before < top_p, descending, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= last, logits, -jnp.inf)


def truncated_law(log_p: Law, temperature: float, top_p: float, top_k: int) -> Law:
    """log p [..., V] after `truncate`, normalised; at temperature 0 all of it is on the most probable token."""
    if temperature == 0:
        best = likeliest(log_p)  # none of the tokens where there is none
        return jnp.log(jax.nn.one_hot(best, log_p.shape[-1], dtype=jnp.float32))
    return jax.nn.log_softmax(truncate(log_p, temperature, top_p, top_k), axis=-1)


def draw(keys: Array, logits: Array, temperature: float, top_p: float, top_k: int) -> tuple[Array, Array]:
    """One token for each row, and the probability that it was drawn with.

    Args:
      keys: key array [N].
      logits: float32 [N, V], without the mask's.
      temperature: 0 takes the most probable token.
      top_p, top_k: see `truncate`.

    Returns:
      (int32 [N], float32 [N]). At temperature 0 the probability is the untempered one. NO_TOKEN, of probability 1,
      where the logits are no law.
    """
    if temperature == 0:
        tokens = likeliest(logits)
    else:
        logits = truncate(logits, temperature, top_p, top_k)
        tokens = jax.vmap(categorical)(keys, logits)
    return tokens, probability_of(tokens, logits)


def probability_of(tokens: Array, logits: Array) -> Array:
    """float32 [N]: of the tokens int32 [N] under the logits [N, V]; 1 for NO_TOKEN, which nothing is to wait for."""
    chosen = jnp.take_along_axis(logits, jnp.maximum(tokens, 0)[:, None], axis=-1)[:, 0]
    return jnp.where(tokens == NO_TOKEN, 1.0, jnp.exp(chosen - jax.nn.logsumexp(logits, axis=-1)))


def draw_due(
    vocabulary: Vocabulary,
    logits: Logits | Deferred,
    keys: TokenKeys,
    z: Tokens,
    due: Positions,
    most_probable: Array,
    *,
    width: int,
    temperature: float,
    top_p: float,
    top_k: int,
) -> tuple[Tokens, PerToken]:
    """Draws tokens where `due`, for `width` positions of each sequence at a time.

    Few positions are due in a step of a fine grid, and a draw costs a random number for each token of the vocabulary.

    Args:
      vocabulary: of the tokens.
      logits: float [B, L, V], the mask's still among them; or deferred.
      keys: key array [B, L].
      z: int32 [B, L].
      due: bool [B, L].
      most_probable: bool [B]: these sequences take the most probable token instead.
      width: a Python int; how wide changes no token.

    Returns:
      (z with the tokens, float32 [B, L]: the probability that a token was drawn with, 0 where none was).
    """
    batch, length = z.shape
    width = min(length, width)
    rows = jnp.arange(batch)[:, None]

    def some_due(carry):
        return carry[1].any()

    def next_positions(carry):
        z, due, probability = carry
        positions = jnp.argsort(~due, axis=1)[:, :width]  # stable: those due first
        here = vocabulary.without_mask(logits[rows, positions].reshape(batch * width, -1))
        tokens, p = draw(keys[rows, positions].reshape(-1), here, temperature, top_p, top_k)
        best = likeliest(here)
        tokens = jnp.where(jnp.repeat(most_probable, width), best, tokens).reshape(batch, width)
        drawn = due[rows, positions]
        tokens = jnp.where(drawn, tokens, z[rows, positions])
        p = jnp.where(drawn, p.reshape(batch, width), probability[rows, positions])
        return (
            z.at[rows, positions].set(tokens),
            due.at[rows, positions].set(False),
            probability.at[rows, positions].set(p),
        )

    z, _, probability = jax.lax.while_loop(some_due, next_positions, (z, due, jnp.zeros(z.shape, jnp.float32)))
    return z, probability
