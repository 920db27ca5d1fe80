"""Tiny Shakespeare by characters, trained until it reads well: the size of nanoGPT's character run.

    python -m diffrwkv.train --config=experiments/shakespeare_char.py --workdir=runs/shakespeare

Data: `tinyshakespeare` (1.1 MB), from `config.data.root` or downloaded.
Hardware and time: one GPU or TPU core. Not run here; `peer_shakespeare.py` is the one for a CPU.
Expected: not measured here.
"""

from diffrwkv.config import base


def get_config(arg=None):
    if arg is not None:
        raise ValueError(f"shakespeare_char.py takes no argument, got {arg!r}.")
    c = base()

    c.data.name = "tinyshakespeare"
    c.data.tokenizer = "char"
    c.data.length = 256
    c.data.train_offsets = "random"

    c.model.dim = 384
    c.model.num_layers = 6
    c.model.dropout = 0.2

    c.optim.learning_rate = 1e-3
    c.optim.schedule = "cosine"
    c.optim.b2 = 0.99
    c.optim.weight_decay = 0.1
    c.optim.decay_group = "rwkv7_no_embedding"

    c.train.num_steps = 10_000
    c.train.batch_size = 64
    c.train.log_every = 50
    c.train.eval_every = 500
    c.train.checkpoint_every = 500
    c.train.sample_every = 1000
    return c
