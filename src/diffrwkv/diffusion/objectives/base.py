"""What training and evaluation ask of an objective, and those that are no more than a process and a layout."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike

from diffrwkv.array_types import (
    Array,
    Logits,
    Noised,
    OneKey,
    PartTimes,
    PerToken,
    Positions,
    PyTree,
    SoftTokens,
    Tokens,
    TokenTimes,
    Valid,
)
from diffrwkv.checks import FRACTION, INSIDE, as_tuple, check_flag
from diffrwkv.diffusion.deferred import Deferred, at, deferring
from diffrwkv.diffusion.layouts import Layout, Whole
from diffrwkv.diffusion.processes import Process, Scheduled
from diffrwkv.diffusion.times import sample_times


class Loss(NamedTuple):
    """One draw of the NELBO for each sequence. Its mean over a batch is nats.sum() / tokens.sum().

    Attributes:
      nats: float32 [B], summed over a sequence's valid tokens.
      tokens: int32 [B], the number of valid tokens, noised in this draw or not.
      token_nats: float32 [B, L]; where this draw asks nothing of the network 0, or what the bound counts of any token.
      noised: bool [B, L].
    """

    nats: Array
    tokens: Array
    token_nats: PerToken
    noised: Positions


@dataclasses.dataclass(frozen=True)
class Objective:
    """The bound that a process gives on the likelihood of a text, cut by a layout; without options where there is no
    noise, as when the next token is predicted.

    What an objective learns or searches beside the network's weights is a pytree, its *state*: one entry of the
    training state, which nothing but the objective looks into.

    Attributes:
      process: what noise is, and what the network's output means.
      layout: how a text is cut.
    """

    process: Process
    layout: Layout = Whole()

    @property
    def causal(self) -> bool:
        """It predicts the next token, from a network that sees no later position."""
        return self.process.causal

    @property
    def forms(self) -> tuple["Objective", ...]:
        """What it alternates between while training, each of its own shapes; `layout.form` tells which a step takes."""
        return tuple(dataclasses.replace(self, layout=layout) for layout in self.layout.forms)

    @property
    def validation(self) -> "Objective":
        """The objective that bounds the likelihood, where training minimises something else."""
        return self.forms[0]

    # --- the loss -----------------------------------------------------------------------------------

    def times(self, key: OneKey, n: int, length: int, state: PyTree = None) -> PartTimes:
        """Times of the parts of the n texts of a *global* batch: float32 [n], or [n, N] where a text has N parts.

        Args:
          state: of the objective, or None.
        """
        del key, length, state
        return jnp.zeros(n)

    def loss(
        self,
        denoise_fn: Callable[..., Logits],
        key: OneKey,
        x: Tokens,
        t: PartTimes,
        valid: Valid | None = None,
        *,
        state: PyTree = None,
        step: Array | None = None,
    ) -> Loss:
        """One draw of the bound, in nats.

        Args:
          denoise_fn: (z, t [B] or [B, N], **layout.network(x)) -> float [B, L, V], a network's output; one that is a
            `deferred.Network` need not make all of it.
          key: one key of `jax.random.key`, for the noise.
          x: int32 [B, L], clean tokens.
          t: float32, from `times`.
          valid: bool [B, L] or None. Where False a token is never noised and never counted.
          state: of the objective, or None.
          step: int32, of training; None in evaluation.

        Returns:
          `Loss`. To train, minimise nats.sum() / tokens.sum().
        """
        del state, step
        z, counted = self.noised(key, x, t, valid)
        output = self.output(denoise_fn, x, z, self.process.condition(t))
        return self.loss_at(output, x, z, self.layout.of_tokens(t, x.shape[1]), counted)

    def output(
        self, denoise_fn: Callable[..., Any], x: Tokens, z: Noised | SoftTokens, t: PartTimes
    ) -> Logits | Deferred:
        """The network's for z, told the time t: float [B, L, V]; a large one deferred, where the process is `apart`."""
        denoise_fn = deferring(denoise_fn) if self.process.apart else denoise_fn
        return denoise_fn(z, t, **self.layout.network(x))

    def noised(self, key: OneKey, x: Tokens, t: PartTimes, valid: Valid | None = None) -> tuple[Noised, Positions]:
        """(z ~ q(. | x) at the times t of `times`, bool [B, L]: what is counted)."""
        _check_tokens(x, valid)
        parts = jax.eval_shape(lambda: self.layout.times(jnp.zeros(len(x) * self.layout.parts(x.shape[1])), *x.shape))
        if t.shape != parts.shape:
            raise ValueError(f"The loss needs the times {parts.shape}, got {t.shape}: draw them with `times`.")
        counted = jnp.ones(x.shape, bool) if valid is None else valid
        if self.layout.keep_first:
            counted = counted.at[:, 0].set(False)
        free = counted if valid is not None or self.layout.keep_first else None
        return self.process.noise(key, x, self.layout.of_tokens(t, x.shape[1]), free), counted

    def loss_at(
        self, output: Logits | Deferred, x: Tokens, z: Noised, t: TokenTimes, counted: Positions | None = None
    ) -> Loss:
        """`loss` for a z that is already drawn, at the times t of its tokens ([B, 1] or [B, L]), and the `output`."""
        counted = jnp.ones(x.shape, bool) if counted is None else counted
        self.process.vocabulary.check_output(output, x.shape)
        noised = self.process.noised(z) & counted

        def nats(output, x, z, t, arrays):
            process: Any = self.process  # a dataclass, if not by its base
            return (dataclasses.replace(process, **arrays) if arrays else process).nats(output, x, z, t)

        arrays = {k: v for k, v in vars(self.process).items() if isinstance(v, jax.Array)}  # what is being learned
        token_nats = at(output, noised if self.process.apart else counted, nats, x, z, t, common=arrays)
        tokens = counted.sum(axis=1, dtype=jnp.int32)
        return Loss(token_nats.sum(axis=1), tokens, token_nats, noised)

    # --- its state ----------------------------------------------------------------------------------

    def init_state(self) -> dict[str, Any]:
        """The state before the first step: arrays by name; {} for none."""
        return {}

    def learned(self, state: PyTree) -> PyTree:
        """The part of the state that the loss has a gradient by."""
        return {}

    def update(self, state: PyTree, gradient: PyTree, step: Array) -> PyTree:
        """The state after a step, from the gradient by `learned(state)`."""
        del gradient, step
        return state

    def settled(self, state: PyTree) -> "Objective":
        """The objective with what was learned put into its process: for samplers, which know of no state.

        Within a transformation of JAX it may hold arrays, else it is hashable as ever.
        """
        del state
        return self

    def observed(self, loss: Loss, t: PartTimes, valid: Valid) -> PyTree:
        """What `validated` wants to know of each batch of a validation, arrays of equal first axes; None: nothing."""
        return None

    def validated(self, state: PyTree, observed: PyTree) -> tuple[PyTree, dict[str, float]]:
        """(The state after a validation, what to write of it), from all that was `observed`, NumPy arrays."""
        return state, {}


@dataclasses.dataclass(frozen=True)
class Timed(Objective):
    """An objective with noise.

    Attributes:
      time_eps: the earliest time.
      low_discrepancy: spread times evenly over the global batch, and over the parts of texts.
    """

    time_eps: float = 1e-3
    low_discrepancy: bool = True

    def __post_init__(self):
        INSIDE.check("time_eps", self.time_eps)
        check_flag("low_discrepancy", self.low_discrepancy)

    def times(self, key, n, length, state=None):
        number = n * self.layout.parts(length)
        t = sample_times(key, number, low_discrepancy=self.low_discrepancy, eps=self.time_eps)
        return self.layout.times(t, n, length)

    def loss_at(self, output, x, z, t, counted=None):
        loss = super().loss_at(output, x, z, t, counted)
        before = self.process.nats_before(x, jnp.float32(self.time_eps))
        if before is None:
            return loss
        before = before if counted is None else jnp.where(counted, before, 0.0)
        return loss._replace(nats=loss.nats + before.sum(axis=1), token_nats=loss.token_nats + before)


@dataclasses.dataclass(frozen=True)
class Diffusion(Timed):
    """The NELBO of a process: of masked diffusion MDLM's (arXiv 2406.07524), and so on for the others.

    The bound covers times in [time_eps, 1]; like MDLM's authors we leave out the prior term at 1 and the reconstruction
    term before, unless the process says what it is (`Process.nats_before`). Both vanish as the schedule's eps and
    time_eps do.

    Attributes:
      time_eps, low_discrepancy: as of `Timed`.
      mask_rates: training draws the share of masks (of noised tokens) uniformly from this part of [0, 1] (BD3-LM's
        clipped schedules, arXiv 2503.09573, section 5.3): less variance, and no bound any more; `validation` has all
        of it.
      search_mask_rates: choose `mask_rates` anew at each validation, where the variance of a part's loss is least.
    """

    process: Scheduled
    mask_rates: tuple[float, float] = (0.0, 1.0)
    search_mask_rates: bool = False

    def __post_init__(self):
        super().__post_init__()
        if not isinstance(self.process, Scheduled):
            raise TypeError(f"Diffusion needs a process with a schedule, not {type(self.process).__name__}.")
        check_flag("search_mask_rates", self.search_mask_rates)
        object.__setattr__(self, "mask_rates", as_tuple("mask_rates", self.mask_rates))
        if len(self.mask_rates) != 2:
            raise ValueError(f"mask_rates must be two numbers, low and high, got {self.mask_rates}.")
        for rate in self.mask_rates:
            FRACTION.check("mask_rates must be low and high: each", rate)
        if self.mask_rates[0] >= self.mask_rates[1]:
            raise ValueError(f"mask_rates must be two numbers 0 <= low < high <= 1, got {self.mask_rates}.")

    @property
    def validation(self):
        first = dataclasses.replace(self, layout=self.layout.forms[0])
        return dataclasses.replace(first, mask_rates=(0.0, 1.0), search_mask_rates=False)

    def times(self, key, n, length, state=None):
        t = super().times(key, n, length)
        rates = (state or {}).get("mask_rates")
        if rates is None and self.mask_rates == (0.0, 1.0):
            return t
        low, high = self.mask_rates if rates is None else rates
        share = (t - self.time_eps) / (1 - self.time_eps)
        t = self.process.schedule.time(low + (high - low) * share)
        return jnp.clip(t, self.time_eps, 1)

    # --- the search -----------------------------------------------------------------------------------

    def init_state(self):
        return {"mask_rates": jnp.array(self.mask_rates, jnp.float32)} if self.search_mask_rates else {}

    def observed(self, loss, t, valid):
        """(The share of masks that each part was drawn at, NaN for the rows that fill a batch; its nats), float32."""
        if not self.search_mask_rates:
            return None
        rates = self.process.schedule.mask_probability(t).reshape(len(valid), -1)
        return jnp.where(valid.any(axis=1)[:, None], rates, jnp.nan), self.layout.sums(loss.token_nats)

    def validated(self, state, observed):
        if observed is None:
            return state, {}
        low, high = least_variance(*observed)  # NaN is in no range
        return {"mask_rates": np.array([low, high], np.float32)}, {"mask_rate/low": low, "mask_rate/high": high}


def least_variance(
    rates: ArrayLike,
    nats: ArrayLike,
    *,
    widths: Sequence[float] = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
    step: float = 0.05,
) -> tuple[float, float]:
    """The range of mask rates within which the losses of blocks vary least (BD3-LM, section 5.3 and its search).

    Args:
      rates: float [n], the share of masks that each block was drawn at, over all of [0, 1].
      nats: float [n], the block's loss.
      widths: of the ranges that are tried, at multiples of `step`.

    Returns:
      (low, high), floats. A range with fewer than 2 losses in it is not taken.
    """
    rates, nats = np.asarray(rates, np.float64).reshape(-1), np.asarray(nats, np.float64).reshape(-1)
    best = (math.inf, (0.0, 1.0))
    for width in widths:
        for i in range(round((1 - width) / step) + 1):
            low, high = round(i * step, 6), round(i * step + width, 6)
            inside = nats[(rates >= low) & (rates <= high)]
            if len(inside) > 1:
                best = min(best, (float(inside.var(ddof=1)), (low, high)))
    return best[1]


def _check_tokens(x, valid):
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"The loss needs tokens of shape [B, L] with B, L >= 1, got {x.shape}.")
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"The loss needs integer tokens, got {x.dtype}.")
    if valid is not None and (valid.shape != x.shape or valid.dtype != jnp.bool_):
        raise ValueError(f"valid must be bool {x.shape}, got {valid.dtype} {valid.shape}.")
