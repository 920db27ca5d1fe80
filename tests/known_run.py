"""Runs that are tiny: of a network that looks its answers up, so that all it says can be enumerated, and real ones."""

import jax
import jax.numpy as jnp
import numpy as np

from diffrwkv import config, run, sharding
from diffrwkv.data import tokenizers
from diffrwkv.denoiser import Denoiser
from diffrwkv.diffusion import objectives
from diffrwkv.diffusion.processes import Vocabulary
from tests.random_parameters import random_parameters
from tests.tiny import MIXERS

LENGTH, MASK = 4, 2


def table(seed=0):
    """What a network says at every state of LENGTH tokens, [3^L, L, 3]."""
    return np.random.default_rng(seed).normal(size=(3**LENGTH, LENGTH, 3)) * 1.5


def index(z):
    return z @ 3 ** np.arange(z.shape[-1] - 1, -1, -1)


class Table:
    """A network of LENGTH tokens that looks its answer up; each position sees what it may, masks elsewhere."""

    time_conditioning = False

    def __init__(self, causal=False):
        self.causal = causal

    def apply(self, variables, z, t, *, valid=None, clean=None, block=None, causal_context=True):
        answers, i, length = variables["params"], jnp.arange(LENGTH), z.shape[1]
        pad = lambda x: jnp.pad(x[:, :LENGTH], ((0, 0), (0, max(0, LENGTH - length))), constant_values=MASK)
        z, clean = pad(z), None if clean is None else pad(clean)
        if self.causal:
            seen = jnp.where(i <= i[:, None], z[:, None], MASK)
        elif block is None:
            seen = jnp.broadcast_to(z[:, None], (len(z), LENGTH, LENGTH))
        else:
            own, before = (i // block == (i // block)[:, None]), (i // block < (i // block)[:, None])
            seen = jnp.where(own, z[:, None], jnp.where(before, clean[:, None], MASK))
        said = answers[index(seen), i][:, :length]
        return jnp.pad(said, ((0, 0), (0, max(0, length - LENGTH)), (0, 0)))  # of padding nothing is asked


def make(name="mdlm", sizes=None, *, wrap=False, length=LENGTH, seed=0, keep_first=False):
    cfg = config.base()
    cfg.data.length, cfg.data.wrap, cfg.diffusion.name = length, wrap, name
    if sizes is not None:
        cfg.diffusion.layout, cfg.layouts.blocks.sizes = "blocks", (sizes,)
        cfg.layouts.blocks.keep_first = keep_first
    tokenizer = tokenizers.Char("ab")
    objective = objectives.from_config(Vocabulary(3, MASK), **cfg.diffusion.to_dict(), sections=cfg.to_dict())
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    model = Table(objective.causal)
    return run.Run(model, objective, tokenizer, jnp.asarray(table(seed), jnp.float32), 0, cfg, mesh)


def log_p(state, i, seed=0):
    """log p of the real tokens at position i, by the network; float64 [2]."""
    logits = table(seed)[index(np.asarray(state)), i, :2]
    return logits - np.log(np.exp(logits).sum())


def exact(x, given=0):
    """-log p of the tokens, each from those before it."""
    shifted = [MASK, *x[:-1]]
    return -sum(log_p([*shifted[: i + 1], *[MASK] * (LENGTH - i - 1)], i)[x[i]] for i in range(given, len(x)))


def ids(text):
    return ["ab".index(c) for c in text]


def real(pattern, name="mdlm", sizes=None, *, wrap=False):
    cfg = config.base()
    cfg.data.length, cfg.data.wrap, cfg.diffusion.name = 80, wrap, name
    if sizes is not None:
        cfg.diffusion.layout, cfg.layouts.blocks.sizes = "blocks", (sizes,)
    tokenizer = tokenizers.Byte()
    vocabulary = Vocabulary(tokenizer.vocab_size, tokenizer.mask_id)
    objective = objectives.from_config(vocabulary, **cfg.diffusion.to_dict(), sections=cfg.to_dict())
    names = set(pattern.split(","))
    shift = "previous" if objective.causal else "both"
    model = Denoiser(
        vocab_size=tokenizer.vocab_size,
        dim=16,
        num_layers=len(pattern.split(",")),
        pattern=pattern,
        mixers={mixer: MIXERS[mixer] | {"head_dim": 8} for mixer in names},
        channel_mixers={"rwkv7": {"shift": shift}},
    )
    params = random_parameters(model, jnp.zeros((1, 8), jnp.int32), jnp.zeros(1))
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    return run.Run(model, objective, tokenizer, params, 0, cfg, mesh)
