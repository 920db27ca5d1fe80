"""The grid: every objective trains in every layout, with every mixer, and is sampled by every sampler that fits.

The tables are walked: a new entry is in the grid by itself, and works with each of the others or is refused. Compiling
is what it costs. So an ordinary run takes each objective in each layout with one mixer, in turn, and every other of the
samplers, those that are left out being the other layout's; all of the product is marked slow.
"""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffrwkv import config, generation, sharding, train_step
from diffrwkv import run as runs
from diffrwkv.config import UserError
from diffrwkv.data import tokenizers
from diffrwkv.diffusion.layouts import LAYOUTS, Whole
from diffrwkv.diffusion.objectives import OBJECTIVES
from diffrwkv.diffusion.samplers import SAMPLERS
from diffrwkv.mixers import MIXERS
from tests import tiny
from tests.random_parameters import random_parameters
from tests.thin import slow, thin

CHAR = tokenizers.Char("abcdefgh ")
LENGTH, STEPS = 12, 3


def grid():
    """[(objective, layout, mixer, the first of every other sampler or None for all)]; most are slow."""
    cases = []
    for (i, objective), (j, layout) in itertools.product(enumerate(OBJECTIVES), enumerate(LAYOUTS)):
        causal = OBJECTIVES[objective].process.causal
        if causal and LAYOUTS[layout] is not Whole:
            continue
        mixers = [name for name, mixer in MIXERS.items() if mixer.causal == causal]
        turn = mixers if causal else [mixers[(i + j) % len(mixers)]]
        ordinary = [(objective, layout, mixer, (i + j) % 2) for mixer in turn]
        cases += thin(ordinary) if causal or (i // 2 + j) % 2 == 0 else map(slow, ordinary)
        cases += [slow((objective, layout, mixer, None)) for mixer in mixers]
    return cases


def configured(objective, layout, mixer):
    """A tiny config; RWKV mixers stand in RWKV's block, the others in that of MDLM's Transformer."""
    c = config.base()
    c.data.length = LENGTH
    c.model.dim, c.model.num_layers, c.model.pattern, c.model.condition_dim = 32, 1, mixer, 8
    for name, value in tiny.MIXERS[mixer].items():
        c.model.mixers[mixer][name] = value
    if "rwkv" in mixer:
        c.model.channel_mixers.rwkv7.shift = "previous" if MIXERS[mixer].causal else "both"
    else:
        c.model.channel_mixer, c.model.block = "mlp", "dit"
    c.model.time_conditioning = OBJECTIVES[objective].process.needs_time
    c.diffusion.name, c.diffusion.layout, c.layouts.blocks.sizes = objective, layout, (4,)
    c.sampler.name = "unheard_of"  # each is named
    return c


def trained(model, objective):
    """(The state after STEPS steps on one batch, the losses of one draw before and after a step along its gradient)."""
    params = random_parameters(model, jnp.zeros((1, LENGTH), jnp.int32), jnp.zeros(1))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.03))
    state = {"params": params, "ema": params, "opt_state": tx.init(params), "step": jnp.int32(0)}
    state |= {"objective": own} if (own := objective.init_state()) else {}
    step = jax.jit(train_step.make_train_step(model, objective, tx, jax.random.key(0), ema_decay=0.5))
    tokens = jnp.asarray(np.tile(CHAR.encode("abc abc abc "), (4, 1)), jnp.int32)
    batch = {"tokens": tokens, "valid": jnp.ones(tokens.shape, bool)}
    losses = []
    for number in range(STEPS):
        state, measured = step(state, batch, jnp.int32(number))
        losses.append(float(measured["train/loss"]))
    assert int(state["step"]) == STEPS, f"the loss or its gradient is not finite: {losses}"

    def once_more(state):
        state, measured = step(state | {"step": jnp.int32(0)}, batch, jnp.int32(0))
        return state, float(measured["train/loss"])

    after, first = once_more(state)
    return state, first, once_more(after)[1]


def canvas():
    """A prompt and blanks; the second row ends earlier, in padding: (canvas, valid)."""
    rows = np.full((2, LENGTH), CHAR.mask_id, np.int32)
    rows[:, :3] = CHAR.encode("bad")
    valid = np.ones(rows.shape, bool)
    valid[1, -2:] = False
    return np.where(valid, rows, CHAR.pad_id), valid


def few(sampler):
    """Options for a short canvas."""
    return {"num_steps": 3} if "num_steps" in {f.name for f in dataclasses.fields(sampler)} else {}


@pytest.mark.parametrize("objective, layout, mixer, first", grid())
def test_it_trains_and_is_sampled_by_those_that_fit(objective, layout, mixer, first):
    c = configured(objective, layout, mixer)
    model, built = runs.build(c, CHAR)
    state, before, after = trained(model, built)
    assert after < before
    settled = built.settled(state.get("objective", {}))
    block = 0 if LAYOUTS[layout] is Whole else c.layouts.blocks.sizes[0]
    fitting = [name for name, sampler in SAMPLERS.items() if generation.fits(sampler, settled.process, block)]
    assert fitting
    for name in set(SAMPLERS) - set(fitting):
        with pytest.raises(UserError, match=f"'{name}'.*'{objective}'.* choose ") as e:
            generation.build_sampler(c, settled, name=name)
        assert all(repr(other) in str(e.value) for other in fitting)
    z, valid = canvas()
    for name in fitting if first is None else fitting[first::2] or fitting:
        chosen = generation.build_sampler(c, settled, name=name, **few(SAMPLERS[name]))
        generator = generation.Generator(model, settled, chosen, CHAR, sharding.make_mesh(devices=jax.devices()[:1]))
        tokens, passes, _ = generator(state["ema"], z, valid, seed=1)
        assert tokens.dtype == np.int32 and ((tokens >= 0) & (tokens < CHAR.vocab_size)).all(), name
        assert (tokens != CHAR.mask_id).all() and (passes > 0).all(), name
        given = z != CHAR.mask_id  # the prompt, and padding
        np.testing.assert_array_equal(tokens[given], z[given], err_msg=name)


def test_a_flow_in_blocks_is_one_block_after_another():
    """The loss of all blocks at once, and a stream's text: that of each block from the state of the text before it."""
    c = configured("flm", "blocks", "attention")
    c.sampler.name = "flow_euler"
    model, objective = runs.build(c, CHAR)
    params = random_parameters(model, jnp.zeros((1, LENGTH), jnp.int32), jnp.zeros(1))
    length, block = 10, 4  # the last block is a shorter one
    x = jax.random.randint(jax.random.key(0), (2, length), 0, CHAR.mask_id)
    t = objective.times(jax.random.key(1), *x.shape)

    def network(z, t, **options):
        return model.apply({"params": params}, z, t, **options)

    @jax.jit
    def one_by_one(x, t):
        z, counted = objective.noised(jax.random.key(2), x, t)
        state, output = model.empty_state(len(x), LENGTH), []
        for n, start in enumerate(range(0, length, block)):
            part = slice(start, start + block)
            output.append(network(z[:, part], t[:, n], state=state))
            state = network(x[:, part], None, state=state, block=block, method="with_state")[1]
        return objective.loss_at(jnp.concatenate(output, 1), x, z, objective.layout.of_tokens(t, length), counted)

    at_once = jax.jit(lambda x, t: objective.loss(network, jax.random.key(2), x, t))(x, t)
    np.testing.assert_allclose(at_once.token_nats, one_by_one(x, t).token_nats, rtol=1e-5, atol=1e-5)
    run = runs.Run(model, objective, CHAR, params, 0, c, sharding.make_mesh(devices=jax.devices()[:1]))
    whole = generation.generate(run, "bad", length=length, num_steps=3)
    streamed = "".join(generation.stream(run, "bad", length=LENGTH, num_steps=3))
    assert whole.texts[0].startswith("bad") and streamed[:length] == whole.texts[0] and len(streamed) == LENGTH
