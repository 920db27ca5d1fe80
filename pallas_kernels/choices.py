"""What the operators have in common: arguments that select a program, and stretches and blocks of tokens."""

import jax
import jax.numpy as jnp


def check_choices(operator, reverse, implementation, chunk_size, implementations, chunk_sizes):
    """Raises ValueError, naming the operator, for a direction, form or chunk size that it does not have."""
    if not isinstance(reverse, bool):
        raise ValueError(f"{operator} needs reverse to be True or False, not {reverse!r}; it selects the program.")
    if implementation is not None and implementation not in implementations:
        names = ", ".join(implementations)
        raise ValueError(f"{operator} has no implementation {implementation!r}; choose None or one of {names}.")
    if chunk_size is not None:
        if implementation == "reference":
            raise ValueError(f"{operator}'s reference has no chunks; leave chunk_size out.")
        if chunk_size not in chunk_sizes:
            raise ValueError(f"{operator} needs a chunk_size out of {chunk_sizes}, not {chunk_size!r}.")


def known_outside(x, least, most):
    """Whether some x is known to be outside of these bounds; under a trace, where x is not known, False."""
    if isinstance(x, jax.core.Tracer):
        return False
    with jax.ensure_compile_time_eval():
        return bool(jnp.any((x < least) | (x > most)))


def fit_chunk(chunk_size, length):
    """The chunk size, or the power of two that covers a shorter sequence."""
    return min(chunk_size, 1 << (length - 1).bit_length())


def segments_of(pieces, width, segment):
    """(how many segments, pieces in each) for pieces of `width` tokens in segments of at most `segment`, or of one."""
    most = max(1, segment // width)
    count = -(-pieces // most)
    return count, -(-pieces // count)


def check_block(operator, block, length):
    """Raises ValueError, naming the operator, unless `block` divides the length."""
    if not isinstance(block, int) or block < 1 or length % block:
        raise ValueError(f"{operator} needs a block that divides the {length} tokens, got {block!r}: pad them.")


def pad_blocks(tokens, block, chunk_size):
    """Pads each block of tokens, [B, T, ...] of any dtype, with zeros to whole chunks.

    Returns:
      (the padded tokens [B, T / block span, ...], the size of a chunk, span).
    """
    size = fit_chunk(chunk_size, block)
    span = -(-block // size) * size

    def pad(x):
        batch, length, *rest = x.shape
        x = x.reshape(batch, length // block, block, *rest)
        x = jnp.pad(x, ((0, 0), (0, 0), (0, span - block), *((0, 0),) * len(rest)))
        return x.reshape(batch, length // block * span, *rest)

    return tokens if span == block else [pad(x) for x in tokens], size, span


def unpad_blocks(out, block, span):
    """[B, N span, ...] -> [B, N block, ...]: without what `pad_blocks` added."""
    if span == block:
        return out
    batch, length, *rest = out.shape
    return out.reshape(batch, length // span, span, *rest)[:, :, :block].reshape(batch, -1, *rest)


def split_time(x, size):
    """[B, T, ...] -> [T / size, B, size, ...]: what a scan over stretches takes."""
    batch, length, *rest = x.shape
    return x.reshape(batch, length // size, size, *rest).swapaxes(0, 1)


def join_time(x):
    """[T / size, B, size, ...] -> [B, T, ...]."""
    count, batch, size, *rest = x.shape
    return x.swapaxes(0, 1).reshape(batch, count * size, *rest)


def block_after_block(operator, tokens, state, block):
    """The definition of an operator's form with states between blocks.

    Args:
      operator: (*tokens, state) -> (out [B, T, ...], state).
      tokens: arrays [B, T, ...].

    Returns:
      (out, the states before the blocks and after the last one [B, T / block + 1, ...]).
    """

    def step(state, tokens):
        out, after = operator(*tokens, state)
        return after, (out, state)

    final, (out, before) = jax.lax.scan(step, state, [split_time(x, block) for x in tokens])
    return join_time(out), jnp.concatenate([before, final[None]]).swapaxes(0, 1)
