"""The fair comparison: the recipe under which MDLM's original PyTorch code was run on tiny Shakespeare.

    python -m diffrwkv.train --config=experiments/peer_shakespeare.py:birwkv --workdir=runs/peer --config.seed=1
    python -m diffrwkv.evaluate --workdir=runs/peer --draws=8

Recipe, the same for every NAME: characters (65 + mask), the first 90 % to train on and the last 10 % to validate on,
length 256, batch 16, AdamW (1e-3, 0.9, 0.999, 1e-8) without decay, warm-up lr·step/100 then constant, clip 1, dropout
0.1, float32, no time conditioning, log-linear schedule, low-discrepancy t in [1e-3, 1], EMA 0.999 with warm-up, 500
steps. A run ends with one draw over all 435 validation sequences; `evaluate` takes the 8 of the comparison.

NAME: `birwkv`, `dit` (MDLM's Transformer), `bimamba`, `birwkv_hybrid`, `bimamba_hybrid`; `ar_transformer`, `ar_rwkv`,
which predict the next character instead (the exact likelihood of the same characters); `birwkv_add`, `birwkv_tied` and
`birwkv_unshifted`, which change one option of `birwkv` each. All have at most 1.30 M parameters. `NAME@16` is block
diffusion with blocks of 16 characters, `NAME@4,16,64` with one of these in each step; `NAME~sedd_absorb` has another
objective of `diffrwkv.diffusion.objectives`, `NAME@16~sedd_absorb` both.
Data: `tinyshakespeare`, from `config.data.root` or downloaded.
Hardware and time: 1 CPU core, 5 to 15 minutes.
Expected: the table of docs/results.md. MDLM's own code: 2.367 / 2.442 nats per character (EMA), seeds 1 / 2.
"""

import re

from diffrwkv import presets
from diffrwkv.config import base

# Variants of the default: what they change in config.model.
VARIANTS = {
    "birwkv_add": {"mixers": {"birwkv7": {"merge": "add"}}},
    "birwkv_tied": {"mixers": {"birwkv7": {"share": "all"}}},
    "birwkv_unshifted": {"channel_mixers": {"rwkv7": {"shift": "none"}}},
}


def get_config(arg="birwkv"):
    names = [*presets.BACKBONES, *VARIANTS]
    name, rest = re.fullmatch(r"([^@~]*)(.*)", arg, re.DOTALL).groups()
    if name not in names:
        raise ValueError(f"peer_shakespeare.py:NAME takes one of {', '.join(names)}, got {arg!r}.")
    c = base()

    c.data.name = "tinyshakespeare"
    c.data.tokenizer = "char"
    c.data.length = 256
    c.data.validation_fraction = 0.1

    presets.configure(c, ("birwkv" if name in VARIANTS else name) + rest, "peer")
    c.model.update(VARIANTS.get(name, {}))
    c.model.dropout = 0.1

    c.optim.learning_rate = 1e-3
    c.optim.schedule = "constant"
    c.optim.warmup_steps = 100
    c.optim.b1, c.optim.b2, c.optim.eps = 0.9, 0.999, 1e-8
    c.optim.weight_decay = 0.0
    c.optim.clip_norm = 1.0

    c.train.num_steps = 500
    c.train.batch_size = 16
    c.train.ema_decay = 0.999
    c.train.eval_every = 100
    c.train.eval_limit = 0
    c.train.checkpoint_every = 250
    c.train.sample_every = 500
    return c
