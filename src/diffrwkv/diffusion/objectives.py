"""Training objectives: bounds on the likelihood, for a network that is only a function here."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffrwkv.checks import BLOCK_OR_ALL, FRACTION, INSIDE, TOKEN, as_tuple, check_flag
from diffrwkv.diffusion import schedules
from diffrwkv.diffusion.forward import mask_tokens, sample_times
from diffrwkv.diffusion.schedules import Schedule


class Loss(NamedTuple):
    """One draw of the NELBO for each sequence. Its mean over a batch is nats.sum() / tokens.sum().

    Attributes:
      nats: float32 [B], summed over a sequence's valid tokens.
      tokens: int32 [B], the number of valid tokens, masked in this draw or not.
      token_nats: float32 [B, L], 0 where this draw did not mask.
      masked: bool [B, L].
    """

    nats: jax.Array
    tokens: jax.Array
    token_nats: jax.Array
    masked: jax.Array


class Objective:
    """What training and evaluation ask of an objective, beside `times`, `loss` and `uniform_nelbo`.

    Attributes:
      causal: it predicts the next token, from a network that sees no later position.
      forms: what it alternates between while training, each an objective of its own shapes; a step takes one of them,
        all equally often.
      validation: the objective that bounds the likelihood, where training minimises something else.
      search_mask_rates: validation chooses what training draws its masks from.
    """

    causal: ClassVar[bool] = False
    search_mask_rates: ClassVar[bool] = False

    @property
    def forms(self):
        return (self,)

    @property
    def validation(self):
        return self


def subs_log_probs(logits, z_t, mask_id):
    """log p(x | z_t) in MDLM's SUBS parameterisation (arXiv 2406.07524).

    The mask is never predicted, and a position that shows a token is certain of it. This writes all
    of the [B, L, V] log-probabilities, for tests and for looking at a model; the objective does not
    need them.

    Args:
      logits: float [B, L, V].
      z_t: int32 [B, L].
      mask_id: the mask's token.

    Returns:
      float32 [B, L, V]; -inf where the probability is 0.
    """
    predicted = jax.nn.log_softmax(_without_mask(logits, mask_id), axis=-1)
    shown = jnp.where(_tokens(logits) == z_t[..., None], 0.0, -jnp.inf)
    return jnp.where((z_t == mask_id)[..., None], predicted, shown)


def _tokens(logits):
    """The token that each of the logits [..., V] is for, int32."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def _without_mask(logits, mask_id):
    return jnp.where(_tokens(logits) == mask_id, -jnp.inf, logits.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def cross_entropy(logits, x, mask_id):
    """-log softmax(logits)[x] with the mask left out of the softmax.

    Keeps only the logits for the backward pass and writes one [..., V] array there, the gradient
    itself: at GPT-2's vocabulary the softmax that autodiff would keep is the largest array of a
    training step. Reverse mode only.

    Args:
      logits: float [..., V]; computed in float32 whatever the dtype.
      x: int32 [...], tokens. At x = mask_id the result is finite and means nothing.
      mask_id: the mask's token, a Python int.

    Returns:
      float32 [...], nats.
    """
    return _cross_entropy_forward(logits, x, mask_id)[0]


def _cross_entropy_forward(logits, x, mask_id):
    log_normaliser = jax.nn.logsumexp(_without_mask(logits, mask_id), axis=-1)
    chosen = jnp.take_along_axis(logits, x[..., None], axis=-1)[..., 0].astype(jnp.float32)
    return log_normaliser - chosen, (logits, x, log_normaliser)


def _cross_entropy_backward(mask_id, kept, cotangent):
    logits, x, log_normaliser = kept
    probabilities = jnp.exp(_without_mask(logits, mask_id) - log_normaliser[..., None])
    target = _tokens(logits) == x[..., None]
    gradient = cotangent[..., None] * (probabilities - target.astype(jnp.float32))
    return gradient.astype(logits.dtype), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


@dataclasses.dataclass(frozen=True)
class MDLM(Objective):
    """The continuous-time NELBO of masked diffusion (MDLM, arXiv 2406.07524).

    nats = weight(t) * sum over masked positions of -log p(x_i | z_t), and weight(t) = 1/t for the
    log-linear schedule. The bound covers times in [time_eps, 1]; like its authors we leave out the
    reconstruction term before and the prior term at 1, which both vanish as time_eps and the
    schedule's eps do.

    Attributes:
      schedule: of `diffrwkv.diffusion.schedules`.
      mask_id: the mask's token.
      time_eps: the earliest time.
      low_discrepancy: spread times evenly over the global batch.
    """

    schedule: Schedule
    mask_id: int
    time_eps: float = 1e-3
    low_discrepancy: bool = True

    def __post_init__(self):
        _check_options(self)

    def times(self, key, n, length):
        """Times of the n sequences of a *global* batch, float32 [n], whatever their length; see `sample_times`."""
        del length
        return sample_times(key, n, low_discrepancy=self.low_discrepancy, eps=self.time_eps)

    def loss(self, denoise_fn, key, x, t, valid=None) -> Loss:
        """One draw of the NELBO, in nats.

        Args:
          denoise_fn: (z_t int32 [B, L], t float32 [B]) -> logits float [B, L, V].
          key: one key of `jax.random.key`, for the masks.
          x: int32 [B, L], clean tokens.
          t: float32 [B], from `times`.
          valid: bool [B, L] or None. Where False a token is never masked and never counted.

        Returns:
          `Loss`. To train, minimise nats.sum() / tokens.sum().
        """
        _check(x, t, valid)
        z_t = mask_tokens(key, x, t, self.schedule, self.mask_id, maskable=valid)
        return self.loss_at(denoise_fn(z_t, t), x, z_t, t, valid)

    def loss_at(self, logits, x, z_t, t, valid=None) -> Loss:
        """`loss` for a z_t that is already drawn, and the network's logits [B, L, V] for it."""
        return _masked_loss(self, logits, x, z_t, t[:, None], jnp.ones(x.shape, bool) if valid is None else valid)

    def uniform_nelbo(self, num_tokens):
        """The NELBO in nats per token, in closed form, of a denoiser that is uniform over
        num_tokens real tokens.

        (alpha(time_eps) - alpha(1)) / (1 - time_eps) * log num_tokens: log num_tokens, but for what
        `schedule` leaves out at its ends (0.1 % at the defaults). It is what an untrained network
        should score.
        """
        return _uniform_nelbo(self, num_tokens)


@dataclasses.dataclass(frozen=True)
class BlockDiffusion(Objective):
    """The NELBO of block diffusion: a text is blocks, each diffused given the clean ones before it.

    Source: BD3-LM (arXiv 2503.09573, section 3). Every block has a time of its own, and its masked tokens count with
    weight(t), as in `MDLM`; with blocks as long as the text it is MDLM, with blocks of one token it is autoregressive.
    The network is told the clean text too, and must show a block nothing of what follows it.

    Attributes:
      schedule, mask_id, time_eps, low_discrepancy: as of `MDLM`; low-discrepancy times cover batch x blocks.
      blocks: tokens in a block; 0 for the whole text. Several: each training step takes one of them, so that one
        network can be used with each; the first is what validation and sampling take unless told otherwise.
      causal_context: whether a clean token sees those before it alone (then the state after a text does not depend on
        how it was cut), or the rest of its block as well, as in BD3-LM.
      keep_first: the first token (BOS) is given: never masked, and not counted.
      mask_rates: training draws the share of masks uniformly from this part of [0, 1] (their clipped schedules, section
        5.3): less variance, and no bound any more; `validation` has all of it.
      search_mask_rates: choose `mask_rates` anew at each validation, where the variance of a block's loss is least.
    """

    schedule: Schedule
    mask_id: int
    time_eps: float = 1e-3
    low_discrepancy: bool = True
    blocks: tuple[int, ...] = (16,)
    causal_context: bool = True
    keep_first: bool = False
    mask_rates: tuple[float, float] = (0.0, 1.0)
    search_mask_rates: bool = False

    def __post_init__(self):
        _check_options(self)
        for name in ("causal_context", "keep_first", "search_mask_rates"):
            check_flag(name, getattr(self, name))
        for name in ("blocks", "mask_rates"):
            object.__setattr__(self, name, as_tuple(name, getattr(self, name)))
        if not self.blocks:
            raise ValueError("blocks must be lengths, 0 for the whole text, got none.")
        for block in self.blocks:
            BLOCK_OR_ALL.check("blocks must be lengths, 0 for the whole text: each", block)
        if len(self.mask_rates) != 2:
            raise ValueError(f"mask_rates must be two numbers, low and high, got {self.mask_rates}.")
        for rate in self.mask_rates:
            FRACTION.check("mask_rates must be low and high: each", rate)
        if self.mask_rates[0] >= self.mask_rates[1]:
            raise ValueError(f"mask_rates must be two numbers 0 <= low < high <= 1, got {self.mask_rates}.")

    @property
    def forms(self):
        return tuple(dataclasses.replace(self, blocks=(block,)) for block in self.blocks)

    @property
    def validation(self):
        return dataclasses.replace(self, blocks=self.blocks[:1], mask_rates=(0.0, 1.0), search_mask_rates=False)

    def block(self, length):
        """Tokens in a block of a text of this length, an int: of the first of `blocks`."""
        return min(self.blocks[0] or length, length)

    def times(self, key, n, length, mask_rates=None):
        """Times of all blocks of the n texts of a *global* batch, float32 [n, ceil(length / block)].

        Args:
          mask_rates: float32 [2] in place of those of the objective; may be traced.
        """
        blocks = -(-length // self.block(length))
        t = sample_times(key, n * blocks, low_discrepancy=self.low_discrepancy, eps=self.time_eps)
        if mask_rates is None and self.mask_rates == (0.0, 1.0):
            return t.reshape(n, blocks)
        low, high = self.mask_rates if mask_rates is None else mask_rates
        share = (t - self.time_eps) / (1 - self.time_eps)
        t = self.schedule.time(low + (high - low) * share)
        return jnp.clip(t, self.time_eps, 1).reshape(n, blocks)

    def loss(self, denoise_fn, key, x, t, valid=None) -> Loss:
        """One draw of the NELBO, in nats.

        Args:
          denoise_fn: (z_t int32 [B, L], t float32 [B, N], clean=x, block=int, causal_context=bool) -> logits
            [B, L, V], those of a block given z_t there and x before it.
          key: one key of `jax.random.key`, for the masks.
          x: int32 [B, L], clean tokens.
          t: float32 [B, N], from `times`.
          valid: bool [B, L] or None. Where False a token is never masked and never counted.

        Returns:
          `Loss`. To train, minimise nats.sum() / tokens.sum().
        """
        _check_tokens(x, valid)
        block = self.block(x.shape[1])
        blocks = (x.shape[0], -(-x.shape[1] // block))
        if t.shape != blocks:
            raise ValueError(f"The loss needs one time per block, {blocks}, got {t.shape}: draw them with `times`.")
        counted = jnp.ones(x.shape, bool) if valid is None else valid
        if self.keep_first:
            counted = counted.at[:, 0].set(False)
        t_of_tokens = jnp.repeat(t, block, axis=1)[:, : x.shape[1]]
        z_t = mask_tokens(key, x, t_of_tokens, self.schedule, self.mask_id, maskable=counted)
        logits = denoise_fn(z_t, t, clean=x, block=block, causal_context=self.causal_context)
        return self.loss_at(logits, x, z_t, t_of_tokens, counted)

    def loss_at(self, logits, x, z_t, t, counted) -> Loss:
        """`loss` for a z_t that is already drawn at the times t [B, L] of its tokens, and the logits [B, L, V]."""
        return _masked_loss(self, logits, x, z_t, t, counted)

    def block_nats(self, loss):
        """The nats of each block [B, N], of a `Loss`."""
        batch, length = loss.token_nats.shape
        block = self.block(length)
        padded = jnp.pad(loss.token_nats, ((0, 0), (0, -length % block)))
        return padded.reshape(batch, -1, block).sum(axis=-1)

    def uniform_nelbo(self, num_tokens):
        """As of `MDLM`: every token's time has the same law, whatever its block."""
        return _uniform_nelbo(self, num_tokens)


def least_variance(rates, nats, *, widths=(0.5, 0.6, 0.7, 0.8, 0.9, 1.0), step=0.05):
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


@dataclasses.dataclass(frozen=True)
class Autoregressive(Objective):
    """Next-token cross-entropy: the exact likelihood, from a network that sees no later position.

    The network reads the text shifted right by one, the mask id before its first token (an autoregressive model has no
    other use for it), so that every token is scored, the first one too: the same tokens as a diffusion objective
    scores, and numbers per token that compare. There is no noise: one draw is the value.

    Attributes:
      mask_id: the mask's token, which starts a text and is never predicted.
    """

    causal: ClassVar[bool] = True

    mask_id: int

    def __post_init__(self):
        TOKEN.check("Autoregressive's mask_id", self.mask_id)

    def times(self, key, n, length):
        """float32 [n], zeros: there is no time here, and the interface of an objective has one."""
        del key, length
        return jnp.zeros(n)

    def loss(self, denoise_fn, key, x, t, valid=None) -> Loss:
        """-log p(x), in nats. Arguments as for `MDLM.loss`; `key` is not used.

        Returns:
          `Loss`, whose `masked` is where a token counts.
        """
        del key
        _check(x, t, valid)
        start = jnp.full_like(x[:, :1], self.mask_id)
        return self.loss_at(denoise_fn(jnp.concatenate([start, x[:, :-1]], axis=1), t), x, valid)

    def loss_at(self, logits, x, valid=None) -> Loss:
        """`loss` from the logits [B, L, V], those at i for token i."""
        _check_logits(logits, x, self.mask_id)
        counted = jnp.ones(x.shape, bool) if valid is None else valid
        token_nats = jnp.where(counted, cross_entropy(logits, x, self.mask_id), 0.0)
        return Loss(token_nats.sum(axis=1), counted.sum(axis=1, dtype=jnp.int32), token_nats, counted)

    def uniform_nelbo(self, num_tokens):
        """log num_tokens: what a model that is uniform over num_tokens real tokens scores."""
        return math.log(num_tokens)


def _check_options(objective):
    name = type(objective).__name__
    if not isinstance(objective.schedule, Schedule):
        raise TypeError(f"{name}'s schedule must be a Schedule, got {type(objective.schedule).__name__}.")
    TOKEN.check(f"{name}'s mask_id", objective.mask_id)
    INSIDE.check(f"{name}'s time_eps", objective.time_eps)
    check_flag(f"{name}'s low_discrepancy", objective.low_discrepancy)


def _masked_loss(objective, logits, x, z_t, t, counted):
    """weight(t) -log p of the masked tokens of z_t; t [B, 1] or [B, L], counted bool [B, L]."""
    _check_logits(logits, x, objective.mask_id)
    masked = (z_t == objective.mask_id) & counted
    nats = objective.schedule.weight(t) * cross_entropy(logits, x, objective.mask_id)
    token_nats = jnp.where(masked, nats, 0.0)
    return Loss(token_nats.sum(axis=1), counted.sum(axis=1, dtype=jnp.int32), token_nats, masked)


def _uniform_nelbo(objective, num_tokens):
    first, last = objective.schedule.alpha(jnp.asarray([objective.time_eps, 1.0]))
    return float(first - last) / (1 - objective.time_eps) * math.log(num_tokens)


def _check(x, t, valid):
    _check_tokens(x, valid)
    if t.shape != x.shape[:1]:
        raise ValueError(f"The loss needs one time per sequence, {x.shape[:1]}, got {t.shape}.")


def _check_tokens(x, valid):
    if x.ndim != 2 or 0 in x.shape:
        raise ValueError(f"The loss needs tokens of shape [B, L] with B, L >= 1, got {x.shape}.")
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise TypeError(f"The loss needs integer tokens, got {x.dtype}.")
    if valid is not None and (valid.shape != x.shape or valid.dtype != jnp.bool_):
        raise ValueError(f"valid must be bool {x.shape}, got {valid.dtype} {valid.shape}.")


def _check_logits(logits, x, mask_id):
    if logits.shape[:-1] != x.shape or logits.shape[-1] <= mask_id:
        raise ValueError(
            f"The denoiser must return logits of shape {(*x.shape, 'V')} with "
            f"V > mask_id = {mask_id}, got {logits.shape}."
        )


OBJECTIVES = {"autoregressive": Autoregressive, "block_diffusion": BlockDiffusion, "mdlm": MDLM}


def from_config(name, *, mask_id, schedule=None, **options):
    """The objective `name` of `OBJECTIVES`; `schedule` is {"name": ..., **its own options} where it has one; None: the
    log-linear one, MDLM's.

    Raises ValueError for an unknown name or option.
    """
    if name not in OBJECTIVES:
        raise ValueError(f"No objective is called {name!r}; choose one of {', '.join(sorted(OBJECTIVES))}.")
    known = [f.name for f in dataclasses.fields(OBJECTIVES[name]) if f.name != "mask_id"]
    if schedule is not None or "schedule" in known:
        options["schedule"] = schedule
    if unknown := sorted(set(options) - set(known)):
        has = ", ".join(known) or "none"
        raise ValueError(f"The objective {name!r} has no option {', '.join(unknown)}; it has {has}.")
    if "schedule" in known:
        options["schedule"] = schedules.from_config(**_section({"name": "loglinear"} if schedule is None else schedule))
    return OBJECTIVES[name](mask_id=mask_id, **options)


def _section(schedule):
    if not isinstance(schedule, Mapping) or "name" not in schedule:
        raise ValueError(f'A schedule is given as {{"name": "loglinear", ...its options}}, got {schedule!r}.')
    return schedule
