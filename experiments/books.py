"""The model in the package: block diffusion on novels of before 1925, which begins as a model from left to right.

    python -m diffrwkv.train --config=experiments/books.py:ar --workdir=runs/books-ar
    python -m diffrwkv.train --config=experiments/books.py --workdir=runs/books \
        --config.train.init_from=runs/books-ar

BiRWKV of the peer size (four layers of width 128) with a byte-pair vocabulary of 2,048 learnt from the text, length
256, batch 16, AdamW with warm-up, constant, then a linear decay over the last third. RWKV-7 learns the text from left
to right first, for a step of it costs a quarter of one of block diffusion and teaches more: all tokens are predicted in
it. Its weights are the forward direction of the second run, which adds the other one. Each of its steps takes blocks of
4 tokens or the whole text, so one set of weights continues a prompt, streams, fills in blanks and writes whole texts.

Argument: `ar`, the first of the two runs; none, the second, or without init_from the same from random weights.
Data: 62 MB of English books of the public domain (165 of them), by config.data.name.
Hardware and time: 1 CPU core, 35 minutes for the first and 50 for the second (docs/models.md).
Expected: docs/models.md.
"""

from diffrwkv import presets
from diffrwkv.config import base


def get_config(arg=None):
    if arg not in (None, "ar"):
        raise ValueError(f"books.py takes the argument 'ar' or none, got {arg!r}.")
    c = base()

    c.data.name = "train/books_*.jsonl.xz"
    c.data.tokenizer = "bpe:2048"
    c.data.length = 256
    c.data.train_offsets = "random"

    presets.configure(c, "ar_rwkv" if arg else "birwkv@4", "peer")
    c.model.num_layers = 4  # of both: the first run's weights are the second's

    c.optim.schedule = "wsd"
    c.optim.warmup_steps = 100
    c.optim.decay_fraction = 0.33
    c.optim.final_fraction = 0.02
    c.optim.weight_decay = 0.0

    c.train.batch_size = 16
    c.train.ema_decay = 0.998
    c.train.log_every = 50
    c.train.eval_every = 250
    c.train.eval_limit = 256
    c.train.checkpoint_every = 250
    c.train.sample_every = 0
    if arg:
        c.optim.learning_rate = 2e-3
        c.train.num_steps = 5000
    else:
        c.model.predict_next = True  # where the first run's weights have a token's prediction
        c.layouts.blocks.sizes = (4, 0)
        c.optim.learning_rate = 1.5e-3
        c.train.num_steps = 2200
        c.sampler.name = "confidence"
        c.samplers.confidence.temperature = 0.7
    return c
