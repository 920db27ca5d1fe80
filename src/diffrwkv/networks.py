"""The faces of the network: a model and its weights, as the functions that samplers and objectives call.

A sampler names the one that it needs, `Sampler.face`. One line in `FACES` for each. Objectives call `network_fn`.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from diffrwkv.array_types import Array, PyTree
from diffrwkv.denoiser import Denoiser, cast_matrices, read_head
from diffrwkv.diffusion import samplers
from diffrwkv.diffusion.deferred import Deferred, Network
from diffrwkv.diffusion.layouts import Blocks
from diffrwkv.diffusion.objectives import Objective
from diffrwkv.diffusion.samplers import BlockCached, FrozenCache, Pipelined, Sampler


def network_fn(model: Denoiser, params: PyTree, **options: Any) -> Callable[..., Any]:
    """(z, t, ...) -> output, for `Objective.loss`; its output can be deferred where the model is a `Denoiser`.

    Args:
      options: of every call.
    """
    apply = _applied(model, params, **options)
    if not isinstance(model, Denoiser):
        return apply

    def deferred(*args, **rest):
        features, head = apply(*args, **rest, method="before_head")
        return Deferred(features, head, read_head, model.vocab_size)

    return Network(deferred)


def _applied(model: Denoiser, params: PyTree, **options: Any) -> Callable[..., Any]:
    """The model with its weights."""
    return functools.partial(model.apply, {"params": params}, **options)


def _told(network: Callable[..., Any], objective: Objective) -> Callable[..., Any]:
    """`network`, (z, t, ...) -> output; it is told of the time t what the process says."""
    if isinstance(network, Network):
        return Network(_told(network.deferred, objective))
    return lambda z, t, **options: network(z, objective.process.condition(t), **options)


def denoise_fn(
    model: Denoiser, objective: Objective, params: PyTree, sampler: Sampler, valid: Array | None
) -> Callable[[Array, Array], Array]:
    """(z, t) -> the output for the whole of z."""
    del sampler
    return _told(network_fn(model, params, valid=valid), objective)


def step_fns(
    model: Denoiser, objective: Objective, params: PyTree, sampler: Sampler, valid: Array | None
) -> samplers.StepFns:
    """One token after another, from the state of those before it."""
    del objective, sampler, valid  # padding is no blank, and nothing before it sees it

    def step(token, state):
        return _applied(model, params)(token, state=state, method="with_state")

    return samplers.StepFns(model.empty_state, step)


def block_fns(
    model: Denoiser,
    objective: Objective,
    params: PyTree,
    sampler: BlockCached | Pipelined,
    valid: Array | None = None,
) -> samplers.BlockFns:
    """One block after another, from the state of the text before it; the objective's layout is `Blocks`."""
    del valid  # comes with each block
    how, told = _cut(objective, sampler), _told(_applied(model, params), objective)

    def denoise(z, t, state, valid):
        return told(z, t, state=state, valid=valid)

    def context(tokens, state, valid):
        return _applied(model, params)(tokens, state=state, valid=valid, method="with_state", **how)[1]

    return samplers.BlockFns(model.empty_state, denoise, context)


def _cut(objective: Objective, sampler: BlockCached | Pipelined) -> dict[str, Any]:
    """How the denoiser is told of the blocks."""
    if not isinstance(objective.layout, Blocks):
        raise TypeError(f"{type(sampler).__name__} needs an objective whose layout is Blocks, not {objective.layout}.")
    return {"block": sampler.block, "causal_context": objective.layout.causal_context}


def window_fns(
    model: Denoiser, objective: Objective, params: PyTree, sampler: Pipelined, valid: Array | None
) -> samplers.WindowFns:
    """Several blocks at once: the window is read as context, masks and all, and denoised."""
    how, told = _cut(objective, sampler), _told(_applied(model, params), objective)

    def denoise(z, t, state, valid):
        return told(z, t, clean=z, state=state, valid=valid, **how)

    blocks = block_fns(model, objective, params, sampler, valid)
    return samplers.WindowFns(model.empty_state, denoise, blocks.context)


def frozen_fns(
    model: Denoiser, objective: Objective, params: PyTree, sampler: FrozenCache, valid: Array | None
) -> samplers.FrozenFns:
    """One block after another, the keys and values of the rest as they were; for attention alone."""
    del valid  # comes with each call
    block, told = sampler.block, _told(_applied(model, params), objective)

    def refresh(tokens, t, valid):
        return told(tokens, t, valid=valid, method="with_state")[1]

    def attention(state, change):
        """The state with `change` of each layer's cache."""
        return jax.tree.map(change, state, is_leaf=lambda node: "key" in (node or ()))

    def denoise_prefix(tokens, n, t, state, valid):
        def behind(start):
            def run():
                before = attention(state, lambda kv: kv | {"length": jnp.full_like(kv["length"], start)})
                seen = None if valid is None else valid[:, start:]
                return told(tokens[:, start:], t, state=before, valid=seen)[:, :block]

            return run

        return jax.lax.switch(n, [behind(start) for start in range(0, tokens.shape[1], block)])

    def denoise_dual(tokens, n, t, state, valid):
        length = tokens.shape[1]
        others = jnp.arange(length - block)
        others = jnp.where(others < n * block, others, others + block)
        here = jax.lax.dynamic_slice_in_dim(tokens, n * block, block, 1)
        real = None if valid is None else jax.lax.dynamic_slice_in_dim(valid, n * block, block, 1)
        number = block if real is None else real.sum(axis=1, dtype=jnp.int32)

        def without_block(kv):
            return {
                "key": jnp.take(kv["key"], others, axis=-3),
                "value": jnp.take(kv["value"], others, axis=-3),
                "length": kv["length"] - number,
                "position": jnp.full_like(kv["length"], n * block),
            }

        return told(here, t, state=attention(state, without_block), valid=real)

    return samplers.FrozenFns(refresh, {"prefix": denoise_prefix, "dual": denoise_dual}[sampler.cache])


FACES: dict[str, Callable[..., Any]] = {
    "block": block_fns,
    "denoise": denoise_fn,
    "frozen": frozen_fns,
    "step": step_fns,
    "window": window_fns,
}


def face(model: Denoiser, objective: Objective, params: PyTree, sampler: Sampler, valid: Array | None = None) -> Any:
    """The network as the sampler calls it, over and over: its matrices are cast before, and not in each pass.

    Args:
      valid: bool [B, L] or None, where the canvas is no padding.
    """
    if isinstance(model, Denoiser):
        params = cast_matrices(model, params)
    return FACES[sampler.face](model, objective, params, sampler, valid)
