"""AdamW with RWKV-7's parameter groups, learning-rate schedules, and the moving average of the weights."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffrwkv import config, denoiser
from diffrwkv.checks import check_choice

SCHEDULES = ("constant", "cosine", "wsd")
DECAY_GROUPS = {
    "rwkv7": denoiser.weight_decay_mask,
    "rwkv7_no_embedding": denoiser.projection_mask,
    "matrices": denoiser.matrix_mask,
    "all": lambda params: jax.tree.map(lambda _: True, params),
}
RATE_GROUPS = ("none", "rwkv7")


def _check(**options: Any) -> None:
    for name, value in options.items():
        config.RANGES[f"optim.{name}"].check(name, value)


def learning_rate_schedule(
    name: str,
    peak: float,
    num_steps: int,
    *,
    warmup_steps: int = 0,
    decay_fraction: float = 0.2,
    final_fraction: float = 0.1,
) -> optax.Schedule:
    """Step (int, from 0) -> learning rate (float32 scalar).

    Every shape warms up linearly as MDLM does (its `constant_schedule_with_warmup`): step s has
    peak * min(1, s / warmup_steps), so the very first step moves nothing. Then
    "constant" stays at peak; "cosine" falls to peak * final_fraction at num_steps (arXiv 1608.03983);
    "wsd" stays, and falls linearly to it over the last decay_fraction of num_steps (arXiv 2405.18392).
    Raises ValueError for another name, or a number outside of config.RANGES.
    """
    check_choice("schedule", name, SCHEDULES)
    config.RANGES["train.num_steps"].check("num_steps", num_steps)
    _check(learning_rate=peak, warmup_steps=warmup_steps, decay_fraction=decay_fraction, final_fraction=final_fraction)

    def schedule(step: jax.Array) -> jax.Array:
        s = jnp.asarray(step, jnp.float32)
        warm = jnp.minimum(1.0, s / warmup_steps) if warmup_steps else 1.0
        if name == "constant":
            return jnp.float32(peak) * warm
        begin = warmup_steps if name == "cosine" else num_steps * (1.0 - decay_fraction)
        done = jnp.clip((s - begin) / max(num_steps - begin, 1), 0.0, 1.0)
        left = 0.5 * (1.0 + jnp.cos(jnp.pi * done)) if name == "cosine" else 1.0 - done
        return jnp.float32(peak) * warm * (final_fraction + (1.0 - final_fraction) * left)

    return schedule


def make_optimizer(
    params: Any,
    num_steps: int,
    *,
    learning_rate: float,
    schedule: str = "constant",
    warmup_steps: int = 0,
    decay_fraction: float = 0.2,
    final_fraction: float = 0.1,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decay_group: str = "rwkv7",
    rate_group: str = "none",
    clip_norm: float = 1.0,
) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """AdamW (arXiv 1711.05101) after a global-norm clip: (transformation, learning-rate schedule).

    Args:
      params: the parameter tree, or its shapes; only names and shapes are used.
      num_steps: the length of the run, for the schedules that end.
      decay_group: "rwkv7" decays what BlinkDL/RWKV-LM does: projections, convolutions, embedding and head, not the
        low-rank maps, token-shift mixes and norms; "rwkv7_no_embedding" projections and head alone; "matrices"
        everything with two or more dimensions; "all".
      rate_group: "rwkv7" gives w0 twice the rate, as upstream; "none" one rate for all.
      clip_norm: 0 leaves the gradient as it is.

    Raises ValueError for an unknown group or schedule, or a number outside of config.RANGES.
    """
    check_choice("decay_group", decay_group, DECAY_GROUPS)
    check_choice("rate_group", rate_group, RATE_GROUPS)
    _check(b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, clip_norm=clip_norm, learning_rate=learning_rate)
    if learning_rate * weight_decay > 1:
        raise ValueError(
            f"learning_rate * weight_decay = {learning_rate * weight_decay:g} takes a weight beyond 0 in one step: "
            "lower one of them, to a product of at most 1."
        )
    rate = learning_rate_schedule(
        schedule,
        learning_rate,
        num_steps,
        warmup_steps=warmup_steps,
        decay_fraction=decay_fraction,
        final_fraction=final_fraction,
    )
    steps = [optax.clip_by_global_norm(clip_norm)] if clip_norm else []
    steps.append(optax.scale_by_adam(b1=b1, b2=b2, eps=eps))
    if weight_decay:
        steps.append(optax.add_decayed_weights(weight_decay, DECAY_GROUPS[decay_group](params)))
    if rate_group == "rwkv7":
        scale = denoiser.learning_rate_scale(params)
        steps.append(optax.stateless(lambda u, p: jax.tree.map(lambda x, s: x * s, u, scale)))
    steps.append(optax.scale_by_learning_rate(rate))
    return optax.chain(*steps), rate


def ema_decay(step: jax.Array, decay: float) -> jax.Array:
    """min(decay, (1 + n) / (10 + n)) for the n-th update, n from 1 (MDLM, models/ema.py); ValueError for no decay."""
    config.RANGES["train.ema_decay"].check("ema_decay", decay)
    n = jnp.asarray(step, jnp.float32)
    return jnp.minimum(jnp.float32(decay), (1.0 + n) / (10.0 + n))


def update_ema(ema: Any, params: Any, step: jax.Array, decay: float) -> Any:
    """The float32 moving average after update number `step` (from 1): ema + (1 - d)(params - ema)."""
    d = ema_decay(step, decay)
    return jax.tree.map(lambda e, p: e + (1.0 - d) * (p.astype(jnp.float32) - e), ema, params)
