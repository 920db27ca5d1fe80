"""The denoiser: embed, blocks, logits; generic over the mixers and over what surrounds them.

    x = embed(z_t);  per layer: x += mixer(norm x), x += channel_mix(norm x);  logits = head(norm x)

`pattern` names the mixer of each layer, `block` what stands around them (BLOCKS). A branch can be modulated by adaLN:
by the time of diffusion, or by a learned constant.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from diffrwkv.array_types import Array, Hidden, Logits, PyTree, SoftTokens, Times, Tokens, Valid
from diffrwkv.blocks import Context, by_blocks, pad
from diffrwkv.checks import DROPOUT, NUM_LAYERS, VOCABULARY, WIDTH, check_choice, check_flag
from diffrwkv.layers import (
    Dropout,
    LayerNorm,
    Modulation,
    TimeEmbedding,
    orthogonal,
    partitioned,
    project,
    symmetric_uniform,
    torch_uniform,
)
from diffrwkv.mixers import CHANNEL_MIXERS, MIXERS, Place


@dataclasses.dataclass(frozen=True)
class BlockStyle:
    """What surrounds the mixers.

    Attributes:
      embedding_norm: a norm right after the embedding (RWKV's ln0).
      norm_bias: norms have a bias.
      constant_condition: without time conditioning adaLN still acts, on the embedding of t = 0, as in MDLM.
      head_bias: the output layer has a bias.
      embedding_init: (dim) -> initialiser.
      head_init: (vocab_size, dim) -> initialiser.
    """

    embedding_norm: bool
    norm_bias: bool
    constant_condition: bool
    head_bias: bool
    embedding_init: Callable[[int], Any]
    head_init: Callable[[int, int], Any]


DTYPES = ("float32", "bfloat16", "float16")  # of activations


def _rwkv7_head(vocab_size: int, dim: int) -> Any:
    return orthogonal(0.5 * math.sqrt(max(vocab_size / dim, 1.0)))


def _zero_head(vocab_size: int, dim: int) -> Any:
    return nn.initializers.zeros_init()


BLOCKS = {
    # RWKV-7's (METHODS of arXiv 2503.14456; BlinkDL/RWKV-LM, train_temp/src/model.py)
    "rwkv7": BlockStyle(True, True, False, False, lambda dim: symmetric_uniform(1e-4), _rwkv7_head),
    # MDLM's Transformer (arXiv 2406.07524, models/dit.py)
    "dit": BlockStyle(False, False, True, True, torch_uniform, _zero_head),
    # the same without adaLN, as MDLM's autoregressive baseline (models/autoregressive.py)
    "transformer": BlockStyle(False, False, False, True, torch_uniform, _zero_head),
}


def parse_pattern(pattern: str, num_layers: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The mixer of each layer, and the period that they repeat: ("a,b*2", 5) -> (a b b a b), (a b b).

    Raises ValueError for what is no pattern, for an unknown mixer, and for one that no layer has.
    """
    if not isinstance(pattern, str):
        raise ValueError(f'a pattern is text such as "attention,birwkv7*4", got {pattern!r}.')
    NUM_LAYERS.check("num_layers", num_layers)
    period: list[str] = []
    for part in pattern.split(","):
        match = re.fullmatch(r"\s*(\w+)\s*(?:\*\s*(\d{1,9})\s*)?", part)
        if not match or (match[2] and not int(match[2])):
            raise ValueError(f'pattern {pattern!r} is none: write mixers and counts, such as "attention,birwkv7*4".')
        if match[1] not in MIXERS:
            raise ValueError(f"unknown mixer {match[1]!r} in pattern {pattern!r}: choose of {', '.join(MIXERS)}.")
        period += [match[1]] * min(int(match[2] or 1), num_layers)
    layers = tuple((period * num_layers)[:num_layers])
    if missing := sorted(set(period) - set(layers)):
        raise ValueError(
            f"pattern {pattern!r} names {', '.join(missing)}, but {num_layers} layers end before it: raise num_layers."
        )
    return layers, tuple(period[:num_layers])


# How a network that reads from left to right is to see what is behind a position: by its mixers alone; or it reads
# tokens to denoise twice, the second time from the state after the first; or a layer begins with the state in which
# the layer before it ended.
READINGS = ("once", "twice", "future_seed")
SEED = "seed"  # among what is shared: the memory in which the layer before ended, [B, H, ...]


class Block(nn.Module):
    """One layer: `(x, shared, condition, valid, state, ...) -> (x, shared, state)`; `shared` by mixer.

    `keep_state` False: the mixer's state is not wanted, and None. `seeds`: the memory in which the layer ends is shared
    as SEED, but after context; a layer that finds one begins with it, times a gate for each head that is zero at first.
    """

    place: Place
    mixer: str
    mixer_options: Any
    channel_mixer: str
    channel_mixer_options: Any
    norm_bias: bool
    dropout: float
    seeds: bool = False

    @nn.compact
    def __call__(
        self, x, shared, condition, valid, state, deterministic: bool, context: Context | None, keep_state: bool
    ):
        mixer = self._mixer(name="att")
        channel_mixer = self._channel_mixer(name="ffn")
        state = {"att": None, "ffn": None} if state is None else state

        def branch(x, norm, modulation, module, *inputs, **named):
            h = LayerNorm(use_bias=self.norm_bias, dtype=self.place.dtype, name=norm)(x)
            if condition is not None:
                shift, scale, gate = Modulation(self.place.dim, 3, self.place.dtype, name=modulation)(condition)
                h = h * (1 + scale) + shift
            y, *rest = module(h, *inputs, valid=valid, context=context, **named)
            if condition is not None:  # zero at initialisation: by the gate, unless the branch is so by itself
                y = y * (1 + gate if module.zero_output else gate)
            return x + Dropout(self.dropout)(y, deterministic).astype(x.dtype), rest

        seeds = self.seeds and context is None
        before = self._seeded(state["att"], shared[SEED], x.shape) if seeds and SEED in shared else state["att"]
        carried = {"state": before, "keep_state": keep_state or seeds}
        x, (own, att) = branch(x, "ln1", "modulate1", mixer, shared.get(self.mixer), **carried)
        x, (ffn,) = branch(x, "ln2", "modulate2", channel_mixer, state=state["ffn"])
        shared = shared | {self.mixer: own}
        if seeds:
            shared |= {SEED: att[mixer.memory]}
        if context is None:
            return x, shared, {"att": att, "ffn": ffn} if keep_state else None
        return x, shared, tuple({"att": a, "ffn": f} for a, f in zip(att, ffn, strict=True))

    def _seeded(self, state, seed, shape):
        """The mixer's state to start from, with the seed in its memory."""
        mixer, _ = self.parts()
        state = mixer.empty_state(*shape[:2]) if state is None else state
        gate = self.param("seed_gate", partitioned(nn.initializers.zeros_init(), None), (seed.shape[1],))
        return state | {mixer.memory: state[mixer.memory] + gate[:, None, None] * seed}

    def _mixer(self, **owner):
        return MIXERS[self.mixer](self.place, **dict(self.mixer_options), **owner)

    def _channel_mixer(self, **owner):
        return CHANNEL_MIXERS[self.channel_mixer](self.place, **dict(self.channel_mixer_options), **owner)

    def parts(self):
        """(mixer, channel mixer) as modules of their own, to ask what they are."""
        return self._mixer(parent=None), self._channel_mixer(parent=None)


def _block(model: Denoiser, mixer: str, layer: Any, first: bool, cls: Any = Block, **owner: Any) -> Block:
    """A layer of the model. No method: what a method of one module builds is a part of that module."""
    return cls(
        Place(model.dim, layer, model.num_layers, first, jnp.dtype(model.dtype)),
        mixer,
        dict(model.mixers).get(mixer, {}),
        model.channel_mixer,
        dict(model.channel_mixers).get(model.channel_mixer, {}),
        BLOCKS[model.block].norm_bias,
        model.dropout,
        model.reading == "future_seed",
        **owner,
    )


class Stream(NamedTuple):
    """Tokens on their way through the layers.

    Attributes:
      x: [B, L, D].
      condition: what adaLN reads, [B or 1, condition_dim], or None.
      valid: bool [B, L] or None.
      context: None for tokens to denoise; else they are context, and the tokens to denoise stand behind their blocks.
      again: they are read once more, by the stream after this one, from the state after them.
      shared: what the first layer with a mixer hands to the later ones, by mixer.
    """

    x: Array
    condition: Array | None
    valid: Array | None
    context: Context | None
    again: bool
    shared: dict[str, Any]


def _layer(block: Block, streams: list[Stream], state: PyTree | None, deterministic: bool, keep_state: bool):
    """(The streams after a layer, its state after the first stream.) A context comes first, and knows no other."""
    done, result = [], None
    for i, s in enumerate(streams):
        keep = s.context is not None or s.again or (keep_state and i == 0)
        x, shared, new = block(s.x, s.shared, s.condition, s.valid, state, deterministic, s.context, keep)
        state, after = (new, new) if s.context is None else new
        result = after if i == 0 else result
        done.append(s._replace(x=x, shared=shared))
    return done, result


class Head(NamedTuple):
    """What makes logits of a position's features.

    Attributes:
      kernel: float32 [D, V].
      bias: float32 [V], or None.
    """

    kernel: Array
    bias: Array | None


def read_head(head: Head, features: Array) -> Array:
    """float32 [..., V] from features [..., D], multiplied in their dtype."""
    logits = project(features, head.kernel.astype(features.dtype)).astype(jnp.float32)
    return logits if head.bias is None else logits + head.bias


class Stretch(NamedTuple):
    """Tokens as the layers are to read them: `Stream` before it is embedded.

    Attributes:
      tokens: int32 [B, L], or float [B, L, V].
      t: float [B or 1], or None.
      valid, context, again: as of `Stream`.
    """

    tokens: Array
    t: Array | None
    valid: Array | None
    context: Context | None = None
    again: bool = False


def _in_blocks(z_t, t, clean, block, causal_context, valid, before, from_the_start, keep_state):
    """What the layers read for z_t in blocks: the context and, unless that is z_t itself, the blocks behind it.

    With `before`, the token before z_t [B, 1], the context is a token late, and each block has the one before it.
    """
    B, L = z_t.shape[:2]
    N = -(-L // block)
    if clean is not None and N == 1 and from_the_start and not keep_state:  # nothing stands before it
        return [_behind(before, Stretch(z_t, None if t is None else t.reshape(B), valid))]
    z_t, clean, valid = (pad(x, N * block) for x in (z_t, clean, valid))
    if valid is None and L < N * block:
        valid = jnp.broadcast_to(jnp.arange(N * block) < L, (B, N * block))
    unread = clean is not None and N > 1 and not keep_state  # nothing stands behind the last clean block
    read = slice(0, (N - 1) * block if unread else None)
    context = Context(block, causal_context, beyond=unread)
    known = z_t if clean is None else clean
    if before is not None:
        known = _behind(before, Stretch(known, None, None)).tokens[:, :-1]
    stretches = [Stretch(known[:, read], jnp.zeros(1), None if valid is None else valid[:, read], context)]
    if clean is not None:
        t = None if t is None else jnp.broadcast_to(t.reshape(B, -1), (B, N)).reshape(-1)
        behind = Stretch(by_blocks(z_t, block), t, None if valid is None else by_blocks(valid, block))
        stretches.append(_behind(None if before is None else by_blocks(known, block)[:, :1], behind))
    return stretches


def _behind(before: Array | None, stretch: Stretch) -> Stretch:
    """The stretch with the token [B, 1] before it as its first, which is padding where all of it is."""
    if before is None:
        return stretch
    tokens, valid = stretch.tokens, stretch.valid
    if tokens.ndim == 3:
        before = jax.nn.one_hot(before, tokens.shape[-1], dtype=tokens.dtype)
    valid = None if valid is None else jnp.concatenate([valid[:, :1], valid], axis=1)
    return stretch._replace(tokens=jnp.concatenate([before, tokens], axis=1), valid=valid)


def _embed(tokens: Array, embedding: Array) -> Array:
    """float32 [B, L, D]: the embeddings of ids [B, L], or their sum weighed by the numbers of [B, L, V]."""
    if jnp.issubdtype(tokens.dtype, jnp.integer):
        return jnp.take(embedding, tokens, axis=0)
    with jax.default_matmul_precision("highest"):  # accelerators round what they multiply, else
        return project(tokens.astype(jnp.float32), embedding)


class Denoiser(nn.Module):
    """Logits of the clean tokens, given noised ones; with causal mixers, of the next token (diffusion/processes).

    vocab_size counts the mask id. Every other field is a key of `config.model`, explained in config.py.

    With `predict_next` the logits of a position are read off the token before it, as a model from left to right has
    them (DiffuLLaMA, arXiv 2410.17891, section 3.2, shifts the whole text so). A text, and each block, is read behind
    the clean token before it; the last id, the mask, stands before the first. Blocks of one token are then what
    `diffusion.processes.NextToken` asks of a causal model, and the logits are still those of the position's own token.

    By `reading` a network whose mixers see only what is before sees both sides of what it denoises; context is read
    once all the same. "twice": the tokens to denoise are read two times, and the logits are those of the second, from
    the state after the first (with the clean text 3 tokens a token, the wiring of leonardodalinky/B3D-RWKV).
    "future_seed": each layer starts with the memory in which the layer before it ended, beside its own and times a gate
    of each head that is zero at first (sigmoid(alpha) in rwkv-diff-future-seed).
    """

    vocab_size: int
    dim: int = 256
    num_layers: int = 6
    pattern: str = "birwkv7"
    mixers: Any = ()
    channel_mixer: str = "rwkv7"
    channel_mixers: Any = ()
    block: str = "rwkv7"
    time_conditioning: bool = False
    condition_dim: int = 128
    tie_embeddings: bool = False
    predict_next: bool = False
    reading: str = "once"
    dropout: float = 0.0
    remat: bool = False
    scan_layers: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        self._check_fields()
        super().__post_init__()

    def __call__(
        self,
        z_t: Tokens | SoftTokens,
        t: Times | None = None,
        *,
        clean: Tokens | None = None,
        block: int | None = None,
        causal_context: bool = True,
        valid: Valid | None = None,
        state: PyTree | None = None,
        deterministic: bool = True,
    ) -> Logits:
        """int32 [B, L], or float [B, L, V] -> float32 [B, L, V].

        With `clean` and `block`, z_t is denoised block by block, all at once, each block given the clean blocks before
        it (block diffusion, BD3-LM, arXiv 2503.09573): the same logits as of one block after another from the state of
        the clean text before it. The clean text is read from left to right, once, at linear cost; the blocks of z_t are
        short sequences behind its states. With `block` and no `clean`, z_t is read as such context itself: see
        `with_state`.

        Args:
          z_t: noised tokens; or at each position numbers that weigh the embeddings, their sum being what is read, in
            float32. They need not be a law: `jax.nn.one_hot` of ids is read as the ids are.
          t: what time conditioning sees, float [B], or with `clean` also [B, ceil(L / block)]: diffusion times (MDLM's
            own code feeds sigma(t)). Ignored without time conditioning.
          clean: the clean tokens, int32 [B, L].
          block: tokens in a block. The last one may be shorter.
          causal_context: a clean position sees those before it alone, so that states do not depend on where blocks
            begin; else the rest of its block too, as in BD3-LM.
          valid: True at real positions; padding stands on the right and changes nothing at the others.
          state: what `with_state` returned for the stretch before this one, or `empty_state`; None at the start of a
            sequence.
          deterministic: False applies dropout, from the "dropout" rng.

        Raises:
          ValueError: for an unknown mixer, an empty sequence, a missing t, or shapes that do not agree.
        """
        given = {"clean": clean, "block": block, "causal_context": causal_context, "valid": valid, "state": state}
        features, head, _ = self._run(z_t, t, **given, deterministic=deterministic, keep_state=False)
        return read_head(head, features)

    def before_head(self, z_t: Tokens | SoftTokens, t: Times | None = None, **options: Any) -> tuple[Hidden, Head]:
        """`__call__` with its options, but for its last product: ([B, L, D] in `dtype`, what `read_head` reads it by).

        For who needs the logits of some positions only, or a few at a time.
        """
        return self._run(z_t, t, **options, keep_state=False)[:2]

    def with_state(self, z_t: Tokens | SoftTokens, t: Times | None = None, **options: Any) -> tuple[Logits, PyTree]:
        """`__call__` with its options, and the layers' states after the last valid position: (logits, state).

        With `block`, the state after the context. Ask for it by `model.apply(..., method="with_state")`.
        """
        features, head, state = self._run(z_t, t, **options, keep_state=True)
        return read_head(head, features), state

    @nn.compact
    def _run(
        self,
        z_t,
        t=None,
        *,
        keep_state,
        clean=None,
        block=None,
        causal_context=True,
        valid=None,
        state=None,
        deterministic=True,
    ):
        """(What the head reads, the head, the layers' states by name; {} unless they are kept)."""
        self._check(z_t, t, clean, block)
        if self.predict_next and keep_state and (block is None or z_t.ndim == 3):
            raise ValueError("with predict_next a state is that after clean tokens in blocks: pass them with block=16.")
        B, L = z_t.shape[:2]
        before = None
        if self.predict_next:
            before = (_first(self, B) if state is None else state["token"])[:, None]
        if block is None:
            stretches = [_behind(before, Stretch(z_t, t, valid))]
        else:
            cut = block, causal_context, valid, before, state is None, keep_state
            stretches = _in_blocks(z_t, t, clean, *cut)
        if self.reading == "twice" and stretches[-1].context is None:
            stretches.insert(-1, stretches[-1]._replace(again=True))

        style, dtype = BLOCKS[self.block], jnp.dtype(self.dtype)
        embedding = self.param(
            "embedding", partitioned(style.embedding_init(self.dim), "vocab", "embed"), (self.vocab_size, self.dim)
        )
        embedding_norm = LayerNorm(use_bias=style.norm_bias, name="ln0") if style.embedding_norm else lambda x: x
        time_embedding = None
        if self.time_conditioning or style.constant_condition:
            time_embedding = TimeEmbedding(self.condition_dim, dtype=dtype, name="time_embedding")

        def stream(tokens, t, valid, context, again):
            condition = None
            if time_embedding is not None:
                condition = time_embedding(t if self.time_conditioning else jnp.zeros(1))
            x = embedding_norm(_embed(tokens, embedding))  # the residual stream stays float32
            return Stream(x, condition, valid, context, again, {})

        streams = [stream(*stretch) for stretch in stretches]
        streams, new_state = self._blocks(streams, state, keep_state, deterministic)
        if before is not None and keep_state:
            read = jnp.concatenate([before, z_t if clean is None else clean], axis=1)
            number = L if valid is None else valid.sum(axis=1, keepdims=True)
            new_state["token"] = jnp.take_along_axis(read, jnp.broadcast_to(number, (B, 1)), axis=1)[:, 0]

        x, condition = streams[-1].x, streams[-1].condition
        x = LayerNorm(use_bias=style.norm_bias, dtype=dtype, name="ln_out")(x)
        if condition is not None:
            shift, scale = Modulation(self.dim, 2, dtype, name="modulate_out")(condition)
            x = x * (1 + scale) + shift
        if self.tie_embeddings:
            head = embedding.T
        else:
            init = style.head_init(self.vocab_size, self.dim)
            head = self.param("head", partitioned(init, "embed", "vocab"), (self.dim, self.vocab_size))
        bias = None
        if style.head_bias:
            zeros = partitioned(nn.initializers.zeros_init(), "vocab")
            bias = self.param("head_bias", zeros, (self.vocab_size,))
        if self.predict_next and streams[-1].context is None:
            x = x[:, :-1]  # of the last token there is nothing to read
        return x.astype(dtype).reshape(B, -1, self.dim)[:, :L], Head(head, bias), new_state

    def _blocks(self, streams, state, keep_state, deterministic):
        """All layers: (streams, the states after the first stream by name).

        With `scan_layers` the layers of the first period stand alone (some give what later ones share), the whole
        periods after it are one scanned body, compiled once, with stacked parameters; then what is left over.
        """
        layers, period = parse_pattern(self.pattern, self.num_layers)
        cls = nn.remat(Block, static_argnums=(6, 7, 8)) if self.remat else Block
        states = {} if state is None else state
        new_states, seen = {}, set()

        def run(layer, streams):
            name = f"block_{layer}"
            block = _block(self, layers[layer], layer, layers[layer] not in seen, cls, name=name)
            seen.add(layers[layer])
            streams, new = _layer(block, streams, states.get(name), deterministic, keep_state)
            if keep_state:
                new_states[name] = new
            return streams

        repeats = self.num_layers // len(period) - 1 if self.scan_layers else 0
        alone = len(period) if repeats else self.num_layers
        for layer in range(alone):
            streams = run(layer, streams)
        if repeats:

            def moving(streams):
                """What is another after each layer."""
                return [(s.x, {name: x for name, x in s.shared.items() if name == SEED}) for s in streams]

            class Period(nn.Module):
                @nn.compact
                def __call__(period_, xs, start_and_state):
                    start, state = start_and_state
                    inside = [s._replace(x=x, shared=s.shared | m) for s, (x, m) in zip(streams, xs, strict=True)]
                    new = {}
                    for i, mixer in enumerate(period):
                        name = f"block_{i}"
                        block = _block(self, mixer, start + i, False, cls, name=name)
                        own = None if state is None else state[name]
                        inside, new[name] = _layer(block, inside, own, deterministic, keep_state)
                    return moving(inside), new if keep_state else None

            scan = nn.scan(
                Period,
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=repeats,
                metadata_params={nn.PARTITION_NAME: "layers"},
            )
            starts = len(period) * jnp.arange(1, repeats + 1)
            xs, new = scan(name="blocks")(moving(streams), (starts, states.get("blocks")))
            streams = [s._replace(x=x, shared=s.shared | m) for s, (x, m) in zip(streams, xs, strict=True)]
            if keep_state:
                new_states["blocks"] = new
            for layer in range(len(period) * (repeats + 1), self.num_layers):
                streams = run(layer, streams)
        return streams, new_states

    # --- what the model is, without running it --------------------------------------------------------------------

    def parts(self) -> list[tuple[nn.Module, nn.Module]]:
        """(mixer, channel mixer) of each layer, as modules without parameters."""
        layers, _ = parse_pattern(self.pattern, self.num_layers)
        firsts = [name not in layers[:i] for i, name in enumerate(layers)]
        return [_block(self, layers[i], i, first, parent=None).parts() for i, first in enumerate(firsts)]

    @property
    def causal(self) -> bool:
        """Whether no position sees a later one, so that the logits at i can be those of token i + 1."""
        return self.reading == "once" and all(part.causal for parts in self.parts() for part in parts)

    def empty_state(self, batch: int, room: int) -> PyTree:
        """The states before the first position, for sequences of up to `room` positions.

        To feed a text stretch by stretch, or token by token, at the cost of each: start from this rather than from
        None, and hand on what each call returns.
        """
        room += self.predict_next  # for the token before the last block
        states = [
            {"att": mixer.empty_state(batch, room), "ffn": channel_mixer.empty_state(batch, room)}
            for mixer, channel_mixer in self.parts()
        ]
        named: dict[str, Any] = {f"block_{i}": s for i, s in enumerate(states)}
        if self.predict_next:
            named["token"] = _first(self, batch)
        _, period = parse_pattern(self.pattern, self.num_layers)
        n, repeats = len(period), self.num_layers // len(period) - 1
        if not self.scan_layers or not repeats:
            return named
        rows = [{f"block_{i}": states[n * (r + 1) + i] for i in range(n)} for r in range(repeats)]
        for i in range(n, n * (repeats + 1)):
            del named[f"block_{i}"]
        return named | {"blocks": jax.tree.map(lambda *x: jnp.stack(x), *rows)}

    def flops(self, length: int) -> float:
        """Operations of the mixers per position of a sequence, forward, beyond the matrices (6 N has those, once)."""
        return (2 if self.reading == "twice" else 1) * sum(mixer.flops(length) for mixer, _ in self.parts())

    def _check(self, z_t: Array, t: Array | None, clean: Array | None, block: int | None) -> None:
        ids = z_t.ndim == 2 and jnp.issubdtype(z_t.dtype, jnp.integer)
        soft = z_t.ndim == 3 and z_t.shape[-1] == self.vocab_size and jnp.issubdtype(z_t.dtype, jnp.floating)
        if not (ids or soft) or z_t.shape[1] == 0:
            raise ValueError(
                f"z_t must be integers [B, L], or floats [B, L, {self.vocab_size}] that weigh the embeddings, with "
                f"L ≥ 1, got {z_t.dtype} {z_t.shape}."
            )
        if self.time_conditioning and t is None and (block is None or clean is not None):
            raise ValueError("this denoiser is conditioned on time: pass t, float [B].")
        if block is not None and block < 1:
            raise ValueError(f"block must be at least 1, got {block}.")
        if clean is None:
            return
        if block is None:
            raise ValueError("clean tokens come in blocks: say how long, block=16.")
        if clean.shape != z_t.shape[:2] or not jnp.issubdtype(clean.dtype, jnp.integer):
            raise ValueError(f"clean must be integers of z_t's shape {z_t.shape[:2]}, got {clean.dtype} {clean.shape}.")
        blocks = (z_t.shape[0], -(-z_t.shape[1] // block))
        if t is not None and t.shape not in (blocks, blocks[:1]):
            raise ValueError(f"t must have a time for each sequence, [B], or each block, {blocks}; got {t.shape}.")

    def _check_fields(self) -> None:
        NUM_LAYERS.check("num_layers", self.num_layers)
        for name in ("dim", "condition_dim"):
            WIDTH.check(name, getattr(self, name))
        VOCABULARY.check("vocab_size", self.vocab_size)
        DROPOUT.check("dropout", self.dropout)
        for name in ("time_conditioning", "tie_embeddings", "predict_next", "remat", "scan_layers"):
            check_flag(name, getattr(self, name))
        check_choice("dtype", self.dtype, DTYPES)
        check_choice("reading", self.reading, READINGS)
        for name in ("mixers", "channel_mixers"):
            options = getattr(self, name)
            sections = options.values() if isinstance(options, Mapping) else options
            if not isinstance(options, Mapping | tuple) or not all(isinstance(x, Mapping) for x in sections):
                raise ValueError(f"{name} must hold a section of options for each name, got {options!r}.")
        for what, names, table in (
            ("block", [self.block], BLOCKS),
            ("channel_mixer", [self.channel_mixer], CHANNEL_MIXERS),
            ("mixer", dict(self.mixers), MIXERS),
            ("channel_mixer", dict(self.channel_mixers), CHANNEL_MIXERS),
        ):
            for name in names:
                if not isinstance(name, str) or name not in table:
                    raise ValueError(f"unknown {what} {name!r}: choose one of {', '.join(sorted(table))}.")
        layers, _ = parse_pattern(self.pattern, self.num_layers)
        if self.reading != "once" and (len(set(layers)) > 1 or not getattr(MIXERS[layers[0]], "memory", None)):
            able = ", ".join(name for name, mixer in MIXERS.items() if getattr(mixer, "memory", None))
            raise ValueError(
                f"reading = {self.reading!r} is for one mixer that reads from left to right, {able}: the pattern "
                f"{self.pattern!r} is none."
            )


def _first(model: Denoiser, batch: int) -> Array:
    """int32 [B]: what stands before a text where `predict_next` asks for it."""
    return jnp.full(batch, model.vocab_size - 1, jnp.int32)


# --- parameter groups, by name ------------------------------------------------------------------------------------


def _names(path) -> list[str]:
    """The names on a parameter's path; boxes of partitioning metadata add a trailing "value" key that is none."""
    names = [str(getattr(k, "key", getattr(k, "name", k))) for k in path]
    return names[:-1] if names[-1] == "value" and len(names) > 1 else names


def _dimensions(path, x) -> tuple[int, ...]:
    """A parameter's shape, without the axis over scanned layers."""
    return x.shape["blocks" in _names(path) :]


def weight_decay_mask(params: PyTree) -> PyTree:
    """True for the parameters that RWKV-7 decays, as upstream has it (`train_temp/src/model.py`, configure_optimizers).

    Those are what torch calls a layer's `.weight`, if two dimensions of it are above 1: projections, convolutions,
    embedding and head; not the low-rank maps and mixes, which are parameters of no layer, nor norms and biases.
    """
    weights = ("kernel", "conv_kernel", "embedding", "head")
    return jax.tree_util.tree_map_with_path(
        lambda path, x: _names(path)[-1] in weights and sum(n > 1 for n in _dimensions(path, x)) >= 2, params
    )


def projection_mask(params: PyTree) -> PyTree:
    """True for projections and the head: what `weight_decay_mask` has, without embedding and convolutions."""
    return jax.tree_util.tree_map_with_path(lambda path, _: _names(path)[-1] in ("kernel", "head"), params)


def cast_matrices(model: Denoiser, params: PyTree) -> PyTree:
    """The weights with projections and head in the model's dtype, in which it multiplies them.

    The logits stay the same, to the bit. In generation many passes share the weights: without this, each of them reads
    float32 weights and writes the cast ones, three quarters of the bytes that weights cost a pass over few tokens.
    """
    dtype = jnp.dtype(model.dtype)
    return jax.tree.map(lambda cast, x: x.astype(dtype) if cast else x, projection_mask(params), params)


def matrix_mask(params: PyTree) -> PyTree:
    """True for parameters of two dimensions or more, the one over scanned layers not counted."""
    return jax.tree_util.tree_map_with_path(lambda path, x: len(_dimensions(path, x)) >= 2, params)


def learning_rate_scale(params: PyTree) -> PyTree:
    """RWKV-7's learning-rate groups: 2 for w0, 1 elsewhere."""
    return jax.tree_util.tree_map_with_path(lambda path, _: 2.0 if _names(path)[-1] == "w0" else 1.0, params)


def count_parameters(params: PyTree) -> int:
    """The number of scalars in `params`."""
    return sum(math.prod(x.shape) for x in jax.tree.leaves(params))


__all__ = [
    "BLOCKS",
    "Block",
    "BlockStyle",
    "Denoiser",
    "Head",
    "cast_matrices",
    "count_parameters",
    "learning_rate_scale",
    "matrix_mask",
    "parse_pattern",
    "projection_mask",
    "read_head",
    "weight_decay_mask",
]
