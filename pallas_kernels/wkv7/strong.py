"""Decays that are too strong for matrix products: which they are, and the definition in the products' place.

The forms by chunks, the kernels too, hold e^g and e^-g of the running sum g of log_w, so a chunk's |g| may not pass
LIMIT. RWKV-7's log_w is above -0.607 and never gets there. Whether a call's does is known only when it runs: then the
definition computes all of it, token by token, and is differentiated through.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.choices import join_time, split_time
from pallas_kernels.wkv7.reference import wkv7_reference

LIMIT = 64.0  # of |log_w|, summed over a chunk


def is_strong(log_w: jax.Array, size: int) -> jax.Array:
    """1 where some |log_w| is too large for chunks of `size` tokens, or NaN, else 0: int32 []."""

    # One answer for all that is mapped: with an answer for each, vmap would do for all what one needs.
    @jax.custom_batching.custom_vmap
    def strong(log_w):
        return jnp.any(~(jnp.abs(log_w) <= LIMIT / max(size, 16))).astype(jnp.int32)

    @strong.def_vmap
    def _(axis_size, mapped, log_w):
        return strong(log_w), False

    return strong(log_w)


def _replaced_if(strong: jax.Array, results: Any, exact: Callable[..., Any], *arrays: Any) -> Any:
    """`results`, or exact(*arrays) in their place where `strong` is 1 and not 0.

    By a loop of no or one step. Unlike a choice between the two it copies nothing and leaves the program that computes
    the results as it is.
    """

    def step(i, _):
        # What does not depend on the step would be computed before the loop, however many steps it has.
        return exact(*jax.lax.optimization_barrier((*arrays, i))[:-1])

    return jax.lax.fori_loop(0, strong, step, results)


def unless_strong(
    forward: Callable[..., Any], backward: Callable[..., Any], definition: Callable[..., Any]
) -> Callable[..., Any]:
    """(r, log_w, k, v, a, b, state, mild, size, *options) -> results, by the definition where products cannot say it.

    With `mild`, a promise that they can, nothing is looked at.

    Args:
      forward: the arrays, size, *options and `save` -> (results, what backward needs besides).
      backward: size, *options, the arrays, what forward kept and the cotangents of the results -> the cotangents of
        the arrays.
      definition: the arrays, size, *options -> the results; JAX differentiates it.
    """

    def run_forward(*arguments, save=True):
        arrays, (mild, *options) = arguments[:7], arguments[7:]
        results, kept = forward(*arrays, *options, save=save)
        if not mild:
            strong = is_strong(arrays[1], options[0])
            results = _replaced_if(strong, results, lambda *arrays: definition(*arrays, *options), *arrays)
        return results, (arrays, kept)

    def run_backward(mild, *arguments):
        *options, (arrays, kept), cotangents = arguments
        gradients = backward(*options, arrays, kept, cotangents)
        if mild:
            return gradients

        def exact(*x):
            return jax.vjp(lambda *arrays: definition(*arrays, *options), *x[:-1])[1](x[-1])

        return _replaced_if(is_strong(arrays[1], options[0]), gradients, exact, *arrays, cotangents)

    static = range(7, 1 + len(inspect.signature(definition).parameters))
    run = jax.custom_vjp(lambda *arguments: run_forward(*arguments, save=False)[0], nondiff_argnums=static)
    run.defvjp(run_forward, run_backward)
    return run


def by_tokens(r, log_w, k, v, a, b, state, size, reverse):
    """The definition: (out, final state, the states before the chunks [N, B, H, K, V]); backward keeps only those."""

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def step(state, chunk):
        out, following = wkv7_reference(*chunk, state, reverse)
        return following, (out, state)

    chunks = [split_time(x, size) for x in (r, log_w, k, v, a, b)]
    state, (out, before) = jax.lax.scan(step, state, chunks, reverse=reverse)
    return join_time(out), state, before


# The same for a kernel, of one or both directions.


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def kernel_unless_strong(kernel, reverse, size, ways, states):
    """`kernel` (ways, states) -> (out, final state) of each direction, or the definition where a decay is too strong.

    Args:
      kernel: differentiable in reverse mode; what it says of decays that are too strong is dropped.
      reverse: per direction, whether it runs from the last token to the first.
      size: tokens in the kernel's chunks.
      ways: per direction r, log_w, k, v, a, b as in wkv7.
      states: per direction [B, H, K, V] float32.
    """
    return _kernel_replaced(kernel(ways, states), reverse, size, ways, states)


def _kernel_forward(kernel, reverse, size, ways, states):
    results, pull = jax.vjp(kernel, ways, states)
    return _kernel_replaced(results, reverse, size, ways, states), (pull, ways, states)


def _kernel_backward(kernel, reverse, size, kept, cotangents):
    pull, ways, states = kept

    def exact(ways, states, cotangents):
        return jax.vjp(functools.partial(_directions, reverse, size), ways, states)[1](cotangents)

    return _replaced_if(_any_strong(ways, size), pull(cotangents), exact, ways, states, cotangents)


kernel_unless_strong.defvjp(_kernel_forward, _kernel_backward)


def _kernel_replaced(results, reverse, size, ways, states):
    exact = functools.partial(_directions, reverse, size)
    return _replaced_if(_any_strong(ways, size), results, exact, ways, states)


def _any_strong(ways, size):
    return functools.reduce(jnp.maximum, [is_strong(log_w, size) for _, log_w, *_ in ways])


def _directions(reverse, size, ways, states):
    """The definition of each direction: (out, final state)."""
    length = ways[0][0].shape[1]
    results = []
    for tokens, state, way in zip(ways, states, reverse, strict=True):
        # Zeros change no state.
        padded = [jnp.pad(x, ((0, 0), (0, -length % size), (0, 0), (0, 0))) for x in tokens]
        out, final, _ = by_tokens(*padded, state, size, way)
        results.append((out[:, :length], final))
    return tuple(results)
