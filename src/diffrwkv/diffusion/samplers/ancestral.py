"""Ancestral sampling: the reverse process of masked diffusion on a grid of times.

For a masked position the step from t to s < t is (MDLM, arXiv 2406.07524), with m = 1 - alpha,

    q(z_s = token) = p(token | z_t) (m_t - m_s) / m_t        q(z_s = mask) = m_s / m_t

and a position that shows a token keeps it. `posterior` is this definition, and the tests hold the
sampler to it.

What the loop does instead follows from two facts. *When* a position is revealed does not depend on
what is shown, so all those steps can be drawn before the network ever runs: a position is still
masked after step i with probability m(t_i) / m(t_0), and one uniform number per position says at
which step that ends. And a position is revealed once, so it needs noise for one draw only. Hence
  - a step at which a sequence reveals nothing needs no network pass. MDLM's cache saves such passes
    when its network does not look at t; here the pass that remains is at the very t of its step, so
    a network that looks at t is served exactly too;
  - each sequence of a batch can jump to its own next eventful step, so that a batch costs the
    passes of its busiest sequence rather than the union of all steps at which any sequence changes;
  - nothing of size [B, L, V] lives from one pass to the next, and noise, temperature and top-p
    touch the few positions that are revealed.
"""

import dataclasses
import numbers
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffrwkv.diffusion.noise import categorical, uniform
from diffrwkv.diffusion.samplers.keys import check_keys
from diffrwkv.diffusion.schedules import LogLinear, Schedule


class Samples(NamedTuple):
    """What a sampler returns.

    Attributes:
      tokens: int32 [B, L].
      passes: int32 [B], network passes that each sequence needed, whatever batch it rode in.
      trace: int32 [num_steps + 1, B, L] or None: the canvas, then the sequence after each step. The
        last entry equals `tokens`.
    """

    tokens: jax.Array
    passes: jax.Array
    trace: jax.Array | None = None


def posterior(p_x0, masked_t, masked_s, mask_id):
    """q(z_s | z_t) for a masked position, unnormalised: its sum is masked_t.

    Args:
      p_x0: float [B, L, V], p(x | z_t), with probability 0 for the mask.
      masked_t: float [B], mask probability at t. MDLM's cached sampler takes t itself, its plain
        one (1 - eps) t; the normalised result is the same.
      masked_s: float [B], mask probability at s.
      mask_id: the mask's token.

    Returns:
      float [B, L, V].
    """
    shown = p_x0 * (masked_t - masked_s)[:, None, None]
    return shown.at[:, :, mask_id].set(masked_s[:, None])


def truncate(logits, temperature, top_p):
    """Logits after temperature and nucleus truncation (Holtzman et al., arXiv 1904.09751).

    The nucleus is the smallest set of the most probable tokens, after temperature, whose
    probability reaches top_p; tokens as probable as its last one belong to it. Both act on
    p(x | z_t), never on the probability to stay masked.

    Args:
      logits: float32 [..., V].
      temperature: above 0; a Python float.
      top_p: in (0, 1]; a Python float. 1 leaves every token.

    Returns:
      float32 [..., V], -inf outside the nucleus.
    """
    logits = (logits - logits.max(axis=-1, keepdims=True)) / temperature
    if top_p == 1:
        return logits
    descending = -jnp.sort(-logits, axis=-1)
    probabilities = jax.nn.softmax(descending, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    last = jnp.where(before < top_p, descending, jnp.inf).min(axis=-1, keepdims=True)
    return jnp.where(logits >= last, logits, -jnp.inf)


def check_truncation(temperature, top_p):
    """Raises ValueError for a temperature or a top_p that `truncate` (or argmax, for temperature 0) cannot take."""
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be finite and at least 0, got {temperature}.")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must be in (0, 1], got {top_p}.")


@dataclasses.dataclass(frozen=True)
class Ancestral:
    """MDLM's ancestral sampler, with prompts and infilling; how it runs is told above.

        sampler = Ancestral(num_steps=64)

        @jax.jit
        def generate(params, keys, canvas):
            return sampler(lambda z, t: model.apply(params, z, t), keys, canvas, mask_id=mask_id)

        canvas = jnp.full((4, 256), mask_id).at[:, :len(prompt)].set(prompt)
        samples = generate(params, sequence_keys(seed, 4), canvas)

    A sampler is hashable and holds no arrays, so it may also be a static argument. The call is one
    `lax.while_loop`: put it inside `jax.jit`, as above, or it compiles anew each time.

    Attributes:
      num_steps: steps T of the time grid 1 = t_0 > ... > t_T = eps, evenly spaced. What is still
        masked after them takes its most probable token ("noise removal"), in one more pass.
      cache: skip the passes of steps at which a sequence reveals nothing, for at most min(T + 1,
        blanks) passes. False runs the network at every step until nothing is masked, as the peers'
        plain sampler does. The samples are the same, token for token.
      temperature: divides the logits; 0 takes the most probable token.
      top_p: nucleus of p(x | z_t), in (0, 1]; see `truncate`.
      eps: the last time.
      schedule: gives the mask probabilities; the one of the objective.
    """

    causal: ClassVar[bool] = False

    num_steps: int = 128
    cache: bool = True
    temperature: float = 1.0
    top_p: float = 1.0
    eps: float = 1e-5
    schedule: Schedule = LogLinear()

    def __post_init__(self):
        if not isinstance(self.num_steps, numbers.Integral) or self.num_steps < 1:
            raise ValueError(f"num_steps must be an integer of at least 1, got {self.num_steps!r}.")
        check_truncation(self.temperature, self.top_p)
        if not 0 < self.eps < 1:
            raise ValueError(f"eps must be in (0, 1), got {self.eps}.")
        if not isinstance(self.schedule, Schedule):
            raise TypeError(f"The sampler's schedule must be a Schedule, got {type(self.schedule).__name__}.")

    def __call__(self, denoise_fn, keys, canvas, *, mask_id, valid=None, return_trace=False) -> Samples:
        """Fills in the masks of `canvas`.

        Args:
          denoise_fn: (z_t int32 [B, L], t float32 [B]) -> logits float [B, L, V], V > mask_id.
          keys: key array [B], one per sequence, from `sequence_keys`. A sequence's sample depends
            on its key, its canvas and its logits alone: not on the batch, and not on padding to its
            right.
          canvas: int32 [B, L]; mask_id where to generate, a token where one is given, at any
            positions. Given tokens never change. A canvas without masks comes back after 0 passes.
          mask_id: the mask's token, a Python int. It is never drawn.
          valid: bool [B, L] or None. Where False nothing is generated. `denoise_fn` must know of it
            by itself.
          return_trace: also return the sequence after every step.

        Returns:
          `Samples`.
        """
        check_call(keys, canvas, mask_id, valid)
        batch, length = canvas.shape
        times = jnp.asarray(np.linspace(1, self.eps, self.num_steps + 1), jnp.float32)
        blank = canvas == mask_id
        if valid is not None:
            blank &= valid
        # Two keys per position, by its index alone: a longer canvas does not change them.
        position_keys = jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(
            keys, jnp.arange(2 * length, dtype=jnp.uint32)
        )
        reveal_step = jnp.where(blank, self._reveal_steps(position_keys[:, ::2], times), 0)
        token_keys = position_keys[:, 1::2]

        def some_left(carry):
            return carry[2].any()

        def next_step(carry):
            step, z, left, passes = carry
            if self.cache:
                step = jnp.where(left, reveal_step, self.num_steps + 1).min(axis=1)
            else:
                step = step + 1
            logits = denoise_fn(z, times[step - 1])
            if logits.shape[:2] != z.shape or logits.ndim != 3 or logits.shape[2] <= mask_id:
                raise ValueError(
                    f"The denoiser must return logits of shape {(*z.shape, 'V')} with "
                    f"V > mask_id = {mask_id}, got {logits.shape}."
                )
            due = left & (reveal_step == step[:, None])
            z = self._reveal(logits, token_keys, z, due, step > self.num_steps, mask_id)
            return step, z, left & ~due, passes + left.any(axis=1).astype(jnp.int32)

        zeros = jnp.zeros((batch,), jnp.int32)
        _, tokens, _, passes = jax.lax.while_loop(some_left, next_step, (zeros, canvas, blank, zeros))
        trace = None
        if return_trace:
            # A token never changes once it shows, so the trace needs no memory in the loop. The
            # last step and the noise removal after it are one entry.
            steps = jnp.arange(self.num_steps + 1, dtype=jnp.int32)[:, None, None]
            shown = jnp.minimum(reveal_step, self.num_steps)[None] <= steps
            trace = jnp.where(shown, tokens[None], canvas[None])
        return Samples(tokens, passes, trace)

    def _reveal_steps(self, keys, times):
        """The step, 1 to num_steps + 1, at which each position of keys [B, L] is revealed."""
        masked = self.schedule.mask_probability(times)
        still_masked = masked[1:] / masked[0]
        u = jax.vmap(uniform)(keys.reshape(-1)).reshape(keys.shape)
        steps_before = self.num_steps - jnp.searchsorted(still_masked[::-1], u, side="right")
        return steps_before.astype(jnp.int32) + 1

    def _reveal(self, logits, keys, z, due, most_probable, mask_id):
        """z [B, L] with the positions `due` replaced by tokens drawn from logits [B, L, V].

        Draws for `width` positions of each sequence at a time, since few are due in a step and a
        draw costs a random number for each token of the vocabulary.
        """
        batch, length = z.shape
        width = min(length, 4 + 2 * -(-length // self.num_steps))
        rows = jnp.arange(batch)[:, None]

        def draw(key, logits, most_probable):
            logits = jnp.where(jnp.arange(logits.shape[-1]) == mask_id, -jnp.inf, logits.astype(jnp.float32))
            best = jnp.argmax(logits, axis=-1).astype(z.dtype)
            if self.temperature == 0:
                return best
            drawn = categorical(key, truncate(logits, self.temperature, self.top_p)).astype(z.dtype)
            return jnp.where(most_probable, best, drawn)

        def some_due(carry):
            return carry[1].any()

        def next_positions(carry):
            z, due = carry
            positions = jnp.argsort(~due, axis=1)[:, :width]  # stable: those due first
            tokens = jax.vmap(draw)(
                keys[rows, positions].reshape(-1),
                logits[rows, positions].reshape(batch * width, -1),
                jnp.repeat(most_probable, width),
            ).reshape(batch, width)
            tokens = jnp.where(due[rows, positions], tokens, z[rows, positions])
            return z.at[rows, positions].set(tokens), due.at[rows, positions].set(False)

        return jax.lax.while_loop(some_due, next_positions, (z, due))[0]


def check_call(keys, canvas, mask_id, valid):
    """Raises ValueError or TypeError for arguments that no sampler can take."""
    if canvas.ndim != 2 or 0 in canvas.shape:
        raise ValueError(f"The canvas must have shape [B, L] with B, L >= 1, got {canvas.shape}: nothing to generate.")
    if canvas.dtype != jnp.int32:
        raise TypeError(f"The canvas must be int32, got {canvas.dtype}.")
    if not isinstance(mask_id, numbers.Integral) or mask_id < 0:
        raise ValueError(f"mask_id must be a token id, got {mask_id!r}.")
    if valid is not None and (valid.shape != canvas.shape or valid.dtype != jnp.bool_):
        raise ValueError(f"valid must be bool {canvas.shape}, got {valid.dtype} {valid.shape}.")
    check_keys(keys, canvas.shape[0])
