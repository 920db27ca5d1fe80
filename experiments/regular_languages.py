"""Small networks on languages whose law is known: does a recurrence that can track states do so in a diffusion model?

    python -m diffrwkv.train --config=experiments/regular_languages.py:s3~birwkv --workdir=runs/s3
    python -m diffrwkv.sample --workdir=runs/s3 --num=4

The argument is LANGUAGE~BACKBONE. LANGUAGE is one of `diffrwkv.languages.LANGUAGES`: `parity`, `even_pairs`,
`cycle_navigation`, `modular_arithmetic`, `s3`, `s5`, `a5`, `dyck`. BACKBONE: `birwkv`, `dit`, `bimamba`,
`birwkv_hybrid` (attention, then RWKV-7), `ar_rwkv`, `ar_transformer`; `birwkv_a2` and `ar_rwkv_a2` have a_scale = 2,
with which a step of RWKV-7 can be a reflection, and so swap two entries of its state.

All have width 64 and 2 layers, and learn words of 64 symbols by one recipe: batch 32, learning rate 2e-3 that falls at
the end, no dropout. A row is a word; see `diffrwkv.languages` for how a task becomes a language.
Data: `regular:LANGUAGE:64`, drawn when it is loaded.
Hardware and time: 1 CPU core, 1 to 4 minutes for 1,500 steps.
Expected: the NELBO of a perfect model is the entropy, log(number of words) / 64 nats per symbol. How near to it these
come is in docs/results.md, by benchmarks/regular_languages.py, which trains them for fewer symbols, short words first.
"""

from diffrwkv import presets
from diffrwkv.config import base
from diffrwkv.languages import LANGUAGES

LENGTH = 64
HEADS = {"head_dim": 32}
RANKS = {"w": 16, "a": 16, "v": 16, "g": 32}
# What a backbone changes of the preset's: widths and depths are one for all.
RWKV = HEADS | {"lora_ranks": RANKS}
MAMBA = HEADS | {"state_size": 32}
MIXERS = {
    "birwkv7": RWKV,
    "rwkv7": RWKV,
    "attention": HEADS,
    "causal_attention": HEADS,
    "bimamba2": MAMBA,
}
# A backbone's preset, and what else it changes in config.model.
BACKBONES = {
    "birwkv": ("birwkv", {}),
    "birwkv_a2": ("birwkv", {"mixers": {"birwkv7": {"a_scale": 2.0}}}),
    "dit": ("dit", {}),
    "bimamba": ("bimamba", {}),
    "birwkv_hybrid": ("birwkv_hybrid", {"pattern": "attention,birwkv7"}),
    "ar_rwkv": ("ar_rwkv", {}),
    "ar_rwkv_a2": ("ar_rwkv", {"mixers": {"rwkv7": {"a_scale": 2.0}}}),
    "ar_transformer": ("ar_transformer", {}),
}


def get_config(arg="s3~birwkv"):
    language, _, backbone = arg.partition("~")
    if language not in LANGUAGES or backbone not in BACKBONES:
        raise ValueError(
            f"regular_languages.py:LANGUAGE~BACKBONE takes a language of {', '.join(LANGUAGES)} and a backbone of "
            f"{', '.join(BACKBONES)}, got {arg!r}."
        )
    c = base()

    c.data.name = f"regular:{language}:{LENGTH}"
    c.data.tokenizer = "char"
    c.data.length = LENGTH

    preset, changes = BACKBONES[backbone]
    presets.configure(c, preset, "peer")
    c.model.dim = 64
    c.model.num_layers = 2
    for mixer, options in MIXERS.items():
        for key, value in options.items():
            c.model.mixers[mixer][key] = value
    c.model.update(changes)

    c.optim.learning_rate = 2e-3
    c.optim.schedule = "wsd"
    c.optim.warmup_steps = 50
    c.optim.decay_fraction = 0.3
    c.optim.final_fraction = 0.05

    c.train.num_steps = 1500
    c.train.batch_size = 32
    c.train.ema_decay = 0.99
    c.train.eval_every = 500
    c.train.eval_limit = 256
    c.train.checkpoint_every = 500
    c.train.sample_every = 0
    c.samplers.ancestral.num_steps = 64
    return c
