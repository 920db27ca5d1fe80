"""text8: 100 MB of Wikipedia in 27 characters, in the setting of the discrete-diffusion papers.

    python -m diffrwkv.train --config=experiments/text8.py:birwkv --workdir=runs/text8

NAME: a backbone of `diffrwkv.presets` (`birwkv`, the default; `dit`, `bimamba`, `birwkv_hybrid`, `bimamba_hybrid`,
`ar_transformer`, `ar_rwkv`), all of one size (about 95 M with 27 characters); NAME/SIZE takes another (`dit/240m`),
NAME@BLOCKS blocks, NAME~OBJECTIVE another objective (`diffrwkv.presets.configure`).
Data: `text8`, 90 / 5 / 5 million characters, from `config.data.root` or downloaded. Length 256 and batch 512 as in
D3PM (arXiv 2107.03006), SEDD (2310.16834) and MD4 (2406.04329), with whose bits per character `evaluate --split=test`
is to be compared.
Hardware and time: a node of 8 accelerators, or one with accumulate > 1. Not run here.
Expected: not measured here.
"""

from diffrwkv import presets
from diffrwkv.config import base


def get_config(arg="birwkv"):
    c = base()

    c.data.name = "text8"
    c.data.tokenizer = "char"
    c.data.length = 256
    c.data.train_offsets = "random"

    c.samplers.ancestral.num_steps = 256
    presets.configure(c, arg, "small")
    c.model.dropout = 0.05
    c.model.scan_layers = True
    c.model.dtype = "bfloat16"

    c.optim.learning_rate = 5e-4
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 2000
    c.optim.weight_decay = 0.03
    c.optim.decay_group = "rwkv7_no_embedding"

    c.train.num_steps = 1_000_000
    c.train.batch_size = 512
    c.train.ema_decay = 0.9999
    c.train.log_every = 100
    c.train.eval_every = 10_000
    c.train.eval_batch_size = 512
    c.train.checkpoint_every = 10_000
    c.train.sample_every = 50_000
    return c
