"""Every option of every sampler does something, or is refused where it would do nothing."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv.diffusion.processes import Flow, Masked, NextToken, Vocabulary
from diffrwkv.diffusion.samplers import (
    SAMPLERS,
    Confidence,
    Pipelined,
    ReMDM,
    StepFns,
    WindowFns,
    from_config,
    sequence_keys,
)

VOCABULARY, MASK, LENGTH = 8, 7, 24
PROCESSES = [cls(Vocabulary(VOCABULARY, MASK)) for cls in (Masked, NextToken, Flow)]

DRAWN = {"temperature": ({}, 0.2), "top_p": ({}, 0.5), "top_k": ({}, 1)}  # those that draw by default
GREEDY = {
    "temperature": ({}, 1.0),
    "top_p": ({"temperature": 1.0}, 0.3),
    "top_k": ({"temperature": 1.0}, 1),
}
STEPPED = {
    "num_steps": ({}, 5),
    "block": ({"num_steps": 2}, 4),
    "score": ({"num_steps": 5}, "random"),
    **GREEDY,
}
LOOP = {"strategy": "loop", "num_steps": 8, "eta": 0.5}
# {sampler: {option: (the others, another value of it)}}
OPTIONS = {
    "ancestral": {"num_steps": ({}, 3), "cache": ({"num_steps": 64}, False), "eps": ({"num_steps": 4}, 0.6)} | DRAWN,
    "first_hitting": DRAWN,
    "flow_euler": {"num_steps": ({}, 3)},
    "euler": {"num_steps": ({}, 3), "eps": ({"num_steps": 4}, 0.6)},
    "analytic": {"num_steps": ({}, 3), "eps": ({"num_steps": 4}, 0.6)},
    "psi": {
        "num_steps": ({}, 3),
        "strategy": ({"num_steps": 8}, "rescale"),
        "kappa": ({"num_steps": 8}, 0.3),
        "eta": ({"num_steps": 8, "strategy": "cap"}, 0.9),
        "t_on": ({"num_steps": 8, "kappa": 0.2}, 0.6),
        "t_off": ({"num_steps": 8, "kappa": 0.2}, 0.4),
        "alpha_on": (LOOP, 0.3),
        "greedy_tail": ({"num_steps": 2, "eps": 0.9}, True),
        "eps": ({"num_steps": 4}, 0.6),
    }
    | DRAWN,
    "entropy_bound": {
        "num_steps": ({}, 3),
        "bound": ({"num_steps": 8}, 3.0),
        "stop": ({"bound": 0.0}, 50.0),
        "eps": ({"num_steps": 4}, 0.6),
    }
    | DRAWN,
    "autoregressive": DRAWN,
    "confidence": STEPPED
    | {
        "rule": ({}, "factor"),
        "threshold": ({"rule": "threshold"}, 0.2),
        "factor": ({"rule": "factor"}, 3.0),
    },
    "prophet": STEPPED | {"answer_length": ({"gaps": 3 * (0.9,)}, 1), "gaps": ({}, 3 * (0.4,))},
    "ice": STEPPED | {"answer_length": ({}, 3), "threshold": ({"num_steps": 5}, 0.3)},
    "remdm": {
        "num_steps": ({}, 3),
        "strategy": ({"num_steps": 8}, "rescale"),
        "eta": ({"num_steps": 8}, 0.9),
        "t_on": (LOOP, 0.9),
        "t_off": (LOOP, 0.4),
        "alpha_on": (LOOP, 0.3),
        "eps": ({"num_steps": 4}, 0.6),
    }
    | DRAWN,
    "pipelined": {
        "block": ({}, 3),
        "window": ({"threshold": 0.2}, 1),
        "add_at": ({"threshold": 0.6}, 1.0),
        "activate_at": ({}, 0.1),
        "threshold": ({}, 0.2),
        "stop_id": ({"temperature": 1.0}, 2),
    }
    | GREEDY,
}


def logits_of(z, t):
    """A network that looks at both neighbours and the time, and is surer in some places than in others."""
    z = z if z.ndim == 2 else jnp.argmax(z, axis=-1)
    left, right = (jnp.roll(z, shift, axis=1) for shift in (1, -1))
    mixed = (3 * left + 5 * z + 7 * right + jnp.arange(z.shape[1]))[..., None] * jnp.arange(1, VOCABULARY + 1)
    return (mixed % 5 + 0.1 * jnp.arange(VOCABULARY)) * (0.4 + t[:, None, None])


def step(token, state):
    position, before = state
    mixed = (3 * token + 5 * before + position)[..., None] * jnp.arange(1, VOCABULARY + 1)
    return (mixed % 5).astype(jnp.float32) / 2, (position + 1, token)


def windowed(z, t, state, valid):
    return logits_of(z, jnp.repeat(t, z.shape[1] // t.shape[1], axis=1).mean(axis=1))


NETWORKS = {
    "denoise": logits_of,
    "step": StepFns(lambda batch, room: (jnp.int32(0), jnp.zeros((batch, 1), jnp.int32)), step),
    "window": WindowFns(lambda batch, room: jnp.zeros(batch), windowed, lambda tokens, state, valid: state),
}


@functools.partial(jax.jit, static_argnums=0)
def fill(sampler):
    canvas = jnp.full((3, LENGTH), MASK, jnp.int32).at[:, 2].set(1)
    process = next(process for process in PROCESSES if sampler.fits(process))
    return sampler(process, NETWORKS[sampler.face], sequence_keys(0, 3), canvas)


def build(name, **options):
    return SAMPLERS[name](**(({"block": 4} if name == "pipelined" else {}) | options))


@pytest.mark.slow  # about seventy programs to compile
@pytest.mark.parametrize("name", SAMPLERS)
def test_every_option_changes_what_comes_out(name):
    assert set(OPTIONS[name]) == {field.name for field in dataclasses.fields(SAMPLERS[name])}
    idle = []
    for option, (others, value) in OPTIONS[name].items():
        before, after = fill(build(name, **others)), fill(build(name, **(others | {option: value})))
        if all(np.array_equal(a, b) for a, b in zip(before[:2], after[:2], strict=True)):
            idle.append(option)
    assert not idle


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: Confidence(threshold=0.9), "threshold does nothing with rule = 'steps'.* choose rule = 'threshold'"),
        (lambda: Confidence(factor=1.0), "factor does nothing with rule = 'steps'"),
        (lambda: Confidence(rule="threshold", num_steps=128), "num_steps does nothing with rule = 'threshold'"),
        (lambda: Confidence(rule="threshold", factor=2.0), "factor does nothing"),
        (lambda: Confidence(rule="factor", threshold=0.9), "threshold does nothing with rule = 'factor'"),
        (lambda: from_config("confidence", num_steps=4, rule="factor"), "num_steps does nothing"),
        (lambda: ReMDM(t_on=0.55), "t_on does nothing with strategy = 'cap'"),
        (lambda: ReMDM(strategy="rescale", t_off=0.05), "t_off does nothing"),
        (lambda: ReMDM(strategy="conf", alpha_on=0.9), "alpha_on does nothing"),
        (lambda: ReMDM(strategy="conf", eta=0.02), "eta does nothing with strategy = 'conf'"),
        (lambda: Pipelined(4, window=1, add_at=0.5), "add_at does nothing with window = 1"),
        (lambda: Pipelined(4, window=1, activate_at=0.5), "activate_at does nothing"),
    ],
)
def test_an_option_that_does_nothing_is_refused(build, told):
    with pytest.raises(ValueError, match=told):
        build()


def test_the_pipeline_needs_to_know_the_block_when_it_runs():
    assert dataclasses.replace(from_config("pipelined", window=2), block=4) == Pipelined(4, window=2)
    with pytest.raises(ValueError, match="Pipelined needs the positions of a block"):
        fill(Pipelined())


@pytest.mark.parametrize("name", [name for name, cls in SAMPLERS.items() if hasattr(cls, "temperature")])
@pytest.mark.parametrize("option", [{"top_p": 0.9}, {"top_k": 3}])
def test_no_truncation_of_the_most_probable_token(name, option):
    with pytest.raises(ValueError, match="do nothing at temperature 0"):
        build(name, temperature=0.0, **option)
    assert build(name, temperature=0.0, top_p=1.0, top_k=0) == build(name, temperature=0.0)


def test_what_is_left_out_has_its_default_where_it_counts():
    assert Confidence().num_steps == 128 and Confidence(rule="threshold").threshold == 0.9
    assert Confidence(rule="factor").factor == 1.0 and Confidence() == Confidence(num_steps=128)
    assert ReMDM().eta == 0.02 and ReMDM(strategy="loop") == ReMDM(strategy="loop", t_on=0.55, t_off=0.05, alpha_on=0.9)
    assert dataclasses.replace(Confidence(), block=4) == Confidence(block=4)
