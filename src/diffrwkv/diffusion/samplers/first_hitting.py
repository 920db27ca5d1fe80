"""First-hitting sampling: the reverse process of masked diffusion without a grid of times.

With n positions still masked at time t, the next one is revealed at the time t' at which a mask probability of
m(t') = m(t) u^(1/n) is reached, u uniform; it is each of the n with the same probability, and its token has the law
p(x | z_t, t') (Zheng et al., arXiv 2409.02908, section 4). That is the exact reverse process, which `Ancestral`
approaches as its steps grow in number, at one pass for each blank.

Those times are the order statistics of one uniform number u_i for each blank: position i is revealed at
m(t_i) = m(1) u_i, the largest first, and the ratios of neighbours are the u^(1/n) of the paper. So the times are drawn
before the network runs, with the noise that `Ancestral` uses: with enough steps the two give the same tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp

from diffrwkv.diffusion.deferred import deferring
from diffrwkv.diffusion.noise import uniform
from diffrwkv.diffusion.samplers.base import Sampler, Samples, watched
from diffrwkv.diffusion.samplers.common import (
    blanks,
    canvas_keys,
    check_truncation,
    draw,
    time_of,
    trace_of_reveals,
)


@dataclasses.dataclass(frozen=True)
class FirstHitting(Sampler):
    """One token for each pass, at the very time at which it is revealed; exact for any schedule.

    Each sequence of a batch has its own times, and the batch takes as many passes as its sequence with the most blanks.
    `passes` is the number of blanks, the trace has L + 1 entries.

    Attributes:
      temperature: divides the logits; 0 takes the most probable token.
      top_p, top_k: see `common.truncate`.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self):
        check_truncation(self.temperature, self.top_p, self.top_k)

    def _fill(self, process, network, keys, canvas, valid, return_trace, on_step):
        denoise, schedule = deferring(watched(network, on_step)), process.schedule
        batch, length = canvas.shape
        blank = blanks(canvas, process.mask_id, valid)
        number = blank.sum(axis=1, dtype=jnp.int32)
        reveal_keys, token_keys = canvas_keys(keys, length)
        u = jax.vmap(uniform)(reveal_keys.reshape(-1)).reshape(canvas.shape)
        order = jnp.argsort(jnp.where(blank, -u, 1.0), axis=1)  # blanks first, the earliest to be revealed first
        rows = jnp.arange(batch)
        at_start = schedule.mask_probability(jnp.ones((batch,), jnp.float32))

        def some_left(carry):
            return carry[0] < number.max()

        def next_position(carry):
            n, z = carry
            position = order[:, n]
            t = time_of(schedule, at_start * u[rows, position])
            output = denoise(z, t)
            process.vocabulary.check_output(output, z.shape)
            here = process.vocabulary.without_mask(output[rows, position])
            token, _ = draw(token_keys[rows, position], here, self.temperature, self.top_p, self.top_k)
            return n + 1, z.at[rows, position].set(jnp.where(n < number, token, z[rows, position]))

        _, tokens = jax.lax.while_loop(some_left, next_position, (jnp.int32(0), canvas))
        trace = None
        if return_trace:
            rank = jnp.argsort(order, axis=1).astype(jnp.int32)
            trace = trace_of_reveals(canvas, tokens, jnp.where(blank, rank + 1, 0), length)
        return Samples(tokens, number, trace)
