"""The faces of the network: a model and its weights, as the functions that the samplers with a state call."""

from typing import Any

import jax
import jax.numpy as jnp

from diffrwkv.diffusion import objectives, samplers


def block_fns(model: Any, objective: objectives.BlockDiffusion, params: Any, block: int) -> samplers.BlockFns:
    """The network as `samplers.BlockCached` wants it."""

    def denoise(z, t, state, valid):
        return model.apply({"params": params}, z, t, state=state, valid=valid)

    def context(tokens, state, valid):
        options = {"block": block, "causal_context": objective.causal_context, "return_state": True}
        return model.apply({"params": params}, tokens, state=state, valid=valid, **options)[1]

    return samplers.BlockFns(denoise, context)


def window_fns(model: Any, objective: objectives.BlockDiffusion, params: Any, block: int) -> samplers.WindowFns:
    """The network as `samplers.Pipelined` wants it: a window is read as context, masks and all, and denoised."""
    how = {"block": block, "causal_context": objective.causal_context}

    def denoise(z, t, state, valid):
        return model.apply({"params": params}, z, t, clean=z, state=state, valid=valid, **how)

    return samplers.WindowFns(denoise, block_fns(model, objective, params, block).context)


def frozen_fns(model: Any, params: Any, block: int, cache: str) -> samplers.FrozenFns:
    """The network, attention alone, as `samplers.FrozenCache` wants it."""

    def refresh(tokens, t, valid):
        return model.apply({"params": params}, tokens, t, valid=valid, return_state=True)[1]

    def attention(state, change):
        """The state with `change` of each layer's cache."""
        return jax.tree.map(change, state, is_leaf=lambda node: "key" in (node or ()))

    def denoise_prefix(tokens, n, t, state, valid):
        def behind(start):
            def run():
                before = attention(state, lambda kv: kv | {"length": jnp.full_like(kv["length"], start)})
                seen = None if valid is None else valid[:, start:]
                logits = model.apply({"params": params}, tokens[:, start:], t, state=before, valid=seen)
                return logits[:, :block]

            return run

        return jax.lax.switch(n, [behind(start) for start in range(0, tokens.shape[1], block)])

    def denoise_dual(tokens, n, t, state, valid):
        length = tokens.shape[1]
        others = jnp.arange(length - block)
        others = jnp.where(others < n * block, others, others + block)
        here = [None if x is None else jax.lax.dynamic_slice_in_dim(x, n * block, block, 1) for x in (tokens, valid)]
        number = block if valid is None else here[1].sum(axis=1, dtype=jnp.int32)

        def without_block(kv):
            return {
                "key": jnp.take(kv["key"], others, axis=-3),
                "value": jnp.take(kv["value"], others, axis=-3),
                "length": kv["length"] - number,
                "position": jnp.full_like(kv["length"], n * block),
            }

        return model.apply({"params": params}, here[0], t, state=attention(state, without_block), valid=here[1])

    return samplers.FrozenFns(refresh, {"prefix": denoise_prefix, "dual": denoise_dual}[cache])
