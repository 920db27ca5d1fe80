"""One step of training as a pure function: loss, gradients, update, average; and the state that it changes."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from diffrwkv import optim, sharding
from diffrwkv.denoiser import Denoiser
from diffrwkv.diffusion.objectives import Objective
from diffrwkv.networks import network_fn

State = dict[str, Any]  # {"params", "ema", "opt_state", "step"}, and "objective" where that has a state


def make_train_step(
    model: Denoiser,
    objective: Objective,
    tx: optax.GradientTransformation,
    key: jax.Array,
    *,
    ema_decay: float,
    accumulate: int = 1,
    padded: bool = False,
    mesh: Mesh | None = None,
) -> Callable[[State, dict[str, jax.Array], jax.Array], tuple[State, dict[str, jax.Array]]]:
    """The training step, to be jitted: (state, batch, number) -> (state, {"train/loss", "train/grad_norm"}).

    The loss is the sum of nats over the number of tokens that count, both over the whole batch: of those that are
    "valid", or where the batch has prompts "scored", which alone are noised then. It does not depend on the cut into
    microbatches; times are drawn for the whole batch at once, masks and dropout anew for each microbatch. All noise
    derives from fold_in(key, number). A step whose loss or gradient is not finite, or whose number is not the state's
    step, changes nothing, the step included: from then on the state stands still, and
    `train.refuse_divergence` sees it.

    Args:
      ema_decay: see `optim.update_ema`.
      accumulate: microbatches; row r of the batch goes to microbatch r % accumulate, so that each of them has times
        from all over [0, 1] and its rows stay on the device that they are on.
      padded: tell the network which positions are valid.
      mesh: to split microbatches and kernels over; None for one device.
    """

    def split(x):  # [B, ...] -> [accumulate, B / accumulate, ...]
        x = jnp.swapaxes(x.reshape(x.shape[0] // accumulate, accumulate, *x.shape[1:]), 0, 1)
        if mesh is not None:
            spec = PartitionSpec(None, sharding.AXES)
            x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))
        return x

    def gradients(form, params, tokens, valid, scored, k_times, k_noise, own, step):
        """The loss and its gradients by (the weights, what the objective learns), for one of the objective's forms."""
        times = form.times(k_times, *tokens.shape, state=own)
        count = jnp.float32(tokens.size) if not padded else scored.sum().astype(jnp.float32)

        def loss_fn(learned, micro):
            (params, own_learned), (x, valid, scored, t, k) = learned, micro
            k_mask, k_dropout = jax.random.split(k)

            seen, free = (valid, scored) if padded else (None, None)
            denoise = network_fn(model, params, valid=seen, deterministic=False, rngs={"dropout": k_dropout})
            loss = form.loss(denoise, k_mask, x, t, free, state=own | own_learned, step=step)
            return loss.nats.sum() / count

        learned = params, form.learned(own)
        value_and_grad = jax.value_and_grad(loss_fn)
        if accumulate == 1:
            return value_and_grad(learned, (tokens, valid, scored, times, jax.random.fold_in(k_noise, 0)))
        keys = jax.vmap(jax.random.fold_in, (None, 0))(k_noise, jnp.arange(accumulate))

        def add(total, micro):
            return jax.tree.map(jnp.add, total, value_and_grad(learned, micro)), None

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, learned))
        total, _ = jax.lax.scan(add, zero, (*map(split, (tokens, valid, scored, times)), keys))
        return total

    def train_step(state, batch, number):
        step_key = jax.random.fold_in(key, number)
        own = state.get("objective", {})
        scored = batch.get("scored", batch["valid"])
        arrays = batch["tokens"], batch["valid"], scored
        inputs = (state["params"], *arrays, *jax.random.split(step_key), own, state["step"])
        forms = [functools.partial(gradients, form) for form in objective.forms]
        if len(forms) == 1:
            loss, (grads, own_grads) = forms[0](*inputs)
        else:
            which = objective.layout.form(jax.random.fold_in(step_key, 2), number)
            loss, (grads, own_grads) = jax.lax.switch(which, forms, *inputs)

        grad_norm = optax.tree.norm(grads)
        updates, opt_state = tx.update(grads, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        step = state["step"] + 1
        new = {
            "params": params,
            "ema": optim.update_ema(state["ema"], params, step, ema_decay),
            "opt_state": opt_state,
            "step": step,
        }
        if own:
            new["objective"] = objective.update(own, own_grads, step)
        good = jnp.isfinite(loss) & jnp.isfinite(grad_norm) & (state["step"] == number)
        new = jax.tree.map(lambda n, o: jnp.where(good, n, o), new, state)
        return new, {"train/loss": loss, "train/grad_norm": grad_norm}

    return train_step if mesh is None else sharding.over(mesh, train_step)


def init_state(
    model: Denoiser,
    tx: optax.GradientTransformation,
    length: int,
    key: jax.Array,
    *,
    objective: Objective | None = None,
) -> State:
    """The state before the first step; the average starts at the weights."""
    example = jnp.zeros((1, length), jnp.int32), jnp.zeros((1,), jnp.float32)
    params = nn.unbox(model.init(key, *example)["params"])
    ema = jax.tree.map(lambda p: jnp.array(p, jnp.float32), params)  # a copy: both are donated
    own = objective.init_state() if objective is not None else {}
    state = {"params": params, "ema": ema, "opt_state": tx.init(params), "step": jnp.int32(0)}
    return state | ({"objective": own} if own else {})


def abstract_state(params: Any, tx: optax.GradientTransformation, *, objective: Objective | None = None) -> State:
    """Shapes and dtypes of `init_state`'s result, from those of the parameters."""
    ema = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape, jnp.float32), params)
    opt_state = jax.eval_shape(tx.init, params)
    own = jax.eval_shape(objective.init_state) if objective is not None else {}
    step = jax.ShapeDtypeStruct((), jnp.int32)
    state = {"params": params, "ema": ema, "opt_state": opt_state, "step": step}
    return state | ({"objective": own} if own else {})
