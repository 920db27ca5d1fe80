"""The perfect denoiser of a regular language: exact posteriors by forward and backward sums over its automaton.

What it loses in samples is the loss of sampling in parallel alone, whatever the network: symbols that are drawn in one
pass are drawn apart, each from its own posterior.

    sampler(Masked(Vocabulary(S + 1, S)), oracle(language("s5")), keys, canvas)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from diffrwkv.array_types import Array, Tokens
from diffrwkv.languages import DEAD, Language


def log_posterior(language: Language) -> Callable[[Tokens], Array]:
    """z int32 [B, L] -> log p(x_i | the symbols that z shows), float32 [B, L, S], for x uniform over the words.

    What is no symbol's number, such as the mask's, is a blank. A symbol that no word has there is at -inf, and so may
    be one whose probability is below 1e-38. Where no word agrees with z there is no posterior, and every symbol is said
    to be as likely as another.

    The sums are in log space and normalised at each position, so that float32 keeps about 1e-5 at any length. A call
    costs O(B L E), E transitions of the automaton, in 2 L steps one after the other.
    """
    source, symbol = np.nonzero(language.table != DEAD)
    target = language.table[source, symbol]
    states, symbols = language.num_states, len(language.symbols)
    into = _grouped(target, source, symbol, states)
    out_of = _grouped(source, target, symbol, states)
    of_symbol = np.eye(symbols, dtype=np.float32)[symbol]  # [E, S]
    start = np.full(states, -np.inf, np.float32)
    start[language.start] = 0
    end = np.where(language.accepts, 0, -np.inf).astype(np.float32)

    def pushed(edges, x, allowed):
        """log-sums over `edges` of x [Q, B] at their far ends, where their symbols are allowed, [S, B]: [Q, B]."""
        far, symbol = edges
        x = jnp.concatenate([x, jnp.full((1, x.shape[1]), -jnp.inf)])
        return _normalised(_log_sum(x[far] + allowed[symbol], axis=1))

    def posterior(z):
        batch, _ = z.shape
        numbers = jnp.arange(symbols)
        blank = (z < 0) | (z >= symbols)
        allowed = jnp.where(blank[..., None] | (z[..., None] == numbers), 0.0, -jnp.inf)  # [B, L, S]
        each = allowed.transpose(1, 2, 0)  # [L, S, B]

        def over(edges, first, reverse):
            def step(x, here):
                return pushed(edges, x, here), x

            x = jnp.broadcast_to(jnp.asarray(first)[:, None], (states, batch))
            return jax.lax.scan(step, x, each, reverse=reverse)[1]  # [L, Q, B], before each symbol as it is read

        before, after = over(into, start, False), over(out_of, end, True)
        log_edge = before[:, source] + each[:, symbol] + after[:, target]  # [L, E, B]
        most = log_edge.max(axis=1, keepdims=True)
        weight = jnp.exp(log_edge - jnp.where(jnp.isfinite(most), most, 0.0))
        total = jnp.einsum("leb,es->bls", weight, of_symbol, precision=jax.lax.Precision.HIGHEST)
        law = total / jnp.maximum(total.sum(axis=-1, keepdims=True), 1e-30)
        possible = jnp.isfinite(most).all(axis=(0, 1))[:, None, None]  # [B, 1, 1]
        return jnp.log(jnp.where(possible, law, 1 / symbols))

    return posterior


def oracle(language: Language, size: int | None = None) -> Callable[[Tokens, Array], Array]:
    """The face "denoise" of the perfect network: (z int32 [B, L], t) -> log p(x_i | z), float32 [B, L, V].

    It looks at no time: under masks the posterior is the same at all of them.

    Args:
      size: V, above S; ids from S on, the mask's among them, are never predicted. None: S + 1.

    Raises ValueError where no id is left for the mask.
    """
    posterior, symbols = log_posterior(language), len(language.symbols)
    more = 1 if size is None else size - symbols
    if more < 1:
        raise ValueError(f"{language.name} has {symbols} symbols, and a mask: take a size above that, not {size}.")

    def denoise(z, t):
        del t
        return jnp.pad(posterior(z), ((0, 0), (0, 0), (0, more)), constant_values=-jnp.inf)

    return denoise


def _grouped(near: np.ndarray, far: np.ndarray, symbol: np.ndarray, states: int) -> tuple[np.ndarray, np.ndarray]:
    """The edges of each state as tables, int32 [Q, D]: their far ends, `states` where there is none, and symbols."""
    most = np.bincount(near, minlength=states).max()
    ends, symbols = np.full((states, most), states, np.int32), np.zeros((states, most), np.int32)
    for q in range(states):
        (mine,) = np.nonzero(near == q)
        ends[q, : len(mine)], symbols[q, : len(mine)] = far[mine], symbol[mine]
    return ends, symbols


def _log_sum(x: Array, axis: int) -> Array:
    """log of the sum of exp(x); -inf of nothing but -inf, and no NaN."""
    most = x.max(axis=axis, keepdims=True)
    most = jnp.where(jnp.isfinite(most), most, 0.0)
    return jnp.log(jnp.exp(x - most).sum(axis=axis)) + jnp.squeeze(most, axis)


def _normalised(x: Array) -> Array:
    """x [Q, B] less its maximum, so that it stays near 0 however long the text is."""
    most = x.max(axis=0, keepdims=True)
    return x - jnp.where(jnp.isfinite(most), most, 0.0)
