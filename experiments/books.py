"""A small model to play with: block diffusion on novels of before 1925, small enough to be shipped with the package.

    python -m diffrwkv.train --config=experiments/books.py --config.data.name='~/books/*.jsonl.xz' --workdir=runs/books
    python -m diffrwkv.sample --workdir=runs/books --prompt="It was a dark"

BiRWKV of the peer size (four layers of width 128) with a byte-pair vocabulary of 2,048 learnt from the text, length
256, batch 16, AdamW (2e-3, 0.9, 0.99), warm-up, constant, then a linear decay over the last third. Each step takes one
size of block, of 4 and 16 tokens and the whole text, so one set of weights continues a prompt, streams, fills in blanks
and writes whole texts.

Argument: another backbone, as `birwkv` or `ar_rwkv`; the latter predicts the next token.
Data: 62 MB of English books of the public domain (165 of them), by config.data.name.
Hardware and time: 1 CPU core, about an hour by the speed of its first steps; not run to its end yet.
Expected: not measured here.
"""

from diffrwkv import presets
from diffrwkv.config import base


def get_config(arg="birwkv"):
    c = base()

    c.data.name = "train/books_*.jsonl.xz"
    c.data.tokenizer = "bpe:2048"
    c.data.length = 256
    c.data.train_offsets = "random"

    presets.configure(c, arg if arg in presets.AUTOREGRESSIVE else f"{arg}@4", "peer")
    if arg not in presets.AUTOREGRESSIVE:
        c.layouts.blocks.sizes = (4, 16, 0)

    c.optim.learning_rate = 2e-3
    c.optim.schedule = "wsd"
    c.optim.warmup_steps = 100
    c.optim.decay_fraction = 0.33
    c.optim.final_fraction = 0.02
    c.optim.weight_decay = 0.0

    c.train.num_steps = 6000
    c.train.batch_size = 16
    c.train.ema_decay = 0.998
    c.train.log_every = 100
    c.train.eval_every = 1000
    c.train.eval_limit = 256
    c.train.checkpoint_every = 500
    c.train.sample_every = 0
    return c
