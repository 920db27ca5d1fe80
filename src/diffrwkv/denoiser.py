"""The denoiser: embed, blocks, logits; generic over the mixer.

    x = ln0(embed(z_t));  per layer: x += mixer(ln1 x), x += channel_mix(ln2 x);  logits = head(ln_out x)

With time conditioning each branch is modulated by adaLN-zero (DiT). Without it, as in MDLM, the network never sees t.
"""

from __future__ import annotations

import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffrwkv.array_types import Logits, PyTree, Times, Tokens, Valid
from diffrwkv.layers import Dropout, LayerNorm, Modulation, TimeEmbedding, orthogonal, partitioned, symmetric_uniform
from diffrwkv.mixers import CHANNEL_MIXERS, MIXERS


class Block(nn.Module):
    """One layer: `(x, shared, condition, valid, state) -> (x, shared, state)`."""

    dim: int
    layer: Any
    num_layers: int
    first: bool
    mixer: str
    mixer_options: Any
    channel_mixer: str
    channel_mixer_options: Any
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x, shared, condition, valid, state, deterministic: bool):
        mixer = MIXERS[self.mixer](
            self.dim, self.layer, self.num_layers, self.first, self.dtype, **self.mixer_options, name="att"
        )
        channel_mixer = CHANNEL_MIXERS[self.channel_mixer](
            self.dim, self.layer, self.num_layers, self.dtype, **self.channel_mixer_options, name="ffn"
        )
        state = {"att": None, "ffn": None} if state is None else state

        def branch(x, norm, run, modulation):
            h = LayerNorm(dtype=self.dtype, name=norm)(x)
            if condition is not None:
                shift, scale, gate = Modulation(self.dim, 3, self.dtype, name=modulation)(condition)
                h = h * (1 + scale) + shift
            y, *rest = run(h)
            if condition is not None:
                y = y * (1 + gate)
            return x + Dropout(self.dropout)(y, deterministic).astype(x.dtype), rest

        x, (shared, att) = branch(x, "ln1", lambda h: mixer(h, shared, valid=valid, state=state["att"]), "modulate1")
        x, (ffn,) = branch(x, "ln2", lambda h: channel_mixer(h, valid=valid, state=state["ffn"]), "modulate2")
        return x, shared, {"att": att, "ffn": ffn}


class Denoiser(nn.Module):
    """Logits of the clean tokens, given noised ones.

    vocab_size counts the mask id. Every other field is a key of `config.model`, explained in config.py.
    """

    vocab_size: int
    dim: int = 256
    num_layers: int = 6
    mixer: str = "birwkv7"
    mixer_options: Any = ()
    channel_mixer: str = "rwkv7"
    channel_mixer_options: Any = ()
    time_conditioning: bool = False
    tie_embeddings: bool = False
    dropout: float = 0.0
    remat: bool = False
    scan_layers: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        z_t: Tokens,
        t: Times | None = None,
        *,
        valid: Valid | None = None,
        state: PyTree | None = None,
        return_state: bool = False,
        deterministic: bool = True,
    ) -> Logits | tuple[Logits, PyTree]:
        """int32 [B, L] -> float32 [B, L, V]; with `return_state` also the layers' states after the last valid position.

        Args:
          z_t: noised tokens.
          t: diffusion times [B]; needed with time conditioning, ignored without it.
          valid: True at real positions; padding stands on the right and changes nothing at the others.
          state: what an earlier call returned for the stretch before this one; None at the start of a sequence.
          deterministic: False applies dropout, from the "dropout" rng.

        Raises:
          ValueError: for an unknown mixer, an empty sequence, or a missing t.
        """
        self._check(z_t, t)
        dtype = jnp.dtype(self.dtype)
        embedding = self.param(
            "embedding", partitioned(symmetric_uniform(1e-4), "vocab", "embed"), (self.vocab_size, self.dim)
        )
        x = jnp.take(embedding, z_t, axis=0)
        x = LayerNorm(name="ln0")(x)  # the residual stream stays float32
        condition = TimeEmbedding(dtype=dtype, name="time_embedding")(t) if self.time_conditioning else None

        def block(layer, first, name, cls=Block):
            return cls(
                self.dim,
                layer,
                self.num_layers,
                first,
                self.mixer,
                dict(self.mixer_options),
                self.channel_mixer,
                dict(self.channel_mixer_options),
                self.dropout,
                dtype,
                name=name,
            )

        cls = nn.remat(Block, static_argnums=(6,)) if self.remat else Block
        states = [] if state is None else state
        x, shared, first_state = block(0, True, "block_0", cls)(
            x, None, condition, valid, states[0] if states else None, deterministic
        )
        new_states = [first_state]
        if self.scan_layers and self.num_layers > 1:
            x, scanned_state = self._scan(cls, block, x, shared, condition, valid, states, deterministic)
            new_states.append(scanned_state)
        else:
            for layer in range(1, self.num_layers):
                x, shared, layer_state = block(layer, False, f"block_{layer}", cls)(
                    x, shared, condition, valid, states[layer] if states else None, deterministic
                )
                new_states.append(layer_state)

        x = LayerNorm(dtype=dtype, name="ln_out")(x)
        if condition is not None:
            shift, scale = Modulation(self.dim, 2, dtype, name="modulate_out")(condition)
            x = x * (1 + scale) + shift
        if self.tie_embeddings:
            head = embedding.T
        else:
            gain = 0.5 * math.sqrt(max(self.vocab_size / self.dim, 1.0))
            head = self.param("head", partitioned(orthogonal(gain), "embed", "vocab"), (self.dim, self.vocab_size))
        logits = (x.astype(dtype) @ head.astype(dtype)).astype(jnp.float32)
        return (logits, new_states) if return_state else logits

    def _scan(self, cls, block, x, shared, condition, valid, states, deterministic):
        """Layers 1… as one scanned block: their parameters are stacked, and the block is compiled once."""

        class Body(nn.Module):
            @nn.compact
            def __call__(body, x, layer_and_state):
                layer, state = layer_and_state
                x, _, state = block(layer, False, "block", cls)(x, shared, condition, valid, state, deterministic)
                return x, state

        scan = nn.scan(
            Body,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.num_layers - 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )
        layers = jnp.arange(1, self.num_layers)
        return scan(name="blocks")(x, (layers, states[1] if states else None))

    def _check(self, z_t, t):
        for what, name, table in (("mixer", self.mixer, MIXERS), ("channel_mixer", self.channel_mixer, CHANNEL_MIXERS)):
            if name not in table:
                raise ValueError(f"unknown {what} {name!r}: choose one of {', '.join(sorted(table))}.")
        if z_t.ndim != 2 or z_t.shape[1] == 0 or not jnp.issubdtype(z_t.dtype, jnp.integer):
            raise ValueError(f"z_t must be integers [B, L] with L ≥ 1, got {z_t.dtype} {z_t.shape}.")
        if self.time_conditioning and t is None:
            raise ValueError("this denoiser is conditioned on time: pass t, float [B].")
        if self.num_layers < 1 or self.dim < 1:
            raise ValueError(f"num_layers and dim must be at least 1, got {self.num_layers} and {self.dim}.")


# --- parameter groups, by name ------------------------------------------------------------------------------------


def _leaf_name(path) -> str:
    """The parameter's own name; boxes of partitioning metadata add a trailing "value" key that is not it."""
    names = [str(getattr(k, "key", getattr(k, "name", k))) for k in path]
    return names[-2] if names[-1] == "value" and len(names) > 1 else names[-1]


def weight_decay_mask(params: PyTree) -> PyTree:
    """True for the parameters that RWKV-7 decays: its matrices (projections and head), not the embedding, the low-rank
    maps, mixes, norms and biases (upstream `train_temp/src/model.py`, configure_optimizers)."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _leaf_name(path) in ("kernel", "head"), params)


def learning_rate_scale(params: PyTree) -> PyTree:
    """RWKV-7's learning-rate groups: 2 for w0, 1 elsewhere."""
    return jax.tree_util.tree_map_with_path(lambda path, _: 2.0 if _leaf_name(path) == "w0" else 1.0, params)


def count_parameters(params: PyTree) -> int:
    """The number of scalars in `params`."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


__all__ = ["Block", "Denoiser", "count_parameters", "learning_rate_scale", "weight_decay_mask"]
