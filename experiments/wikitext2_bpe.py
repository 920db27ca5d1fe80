"""WikiText-2 with a byte-pair vocabulary trained on it.

    python -m diffrwkv.train --config=experiments/wikitext2_bpe.py:birwkv --workdir=runs/wikitext2

NAME: a backbone of `diffrwkv.presets` (`birwkv`, the default; `dit`, `bimamba`, `birwkv_hybrid`, `bimamba_hybrid`,
`ar_transformer`, `ar_rwkv`), all of one size (10 M); NAME/SIZE takes another (`dit/240m`),
NAME@BLOCKS blocks, NAME~OBJECTIVE another objective (`diffrwkv.presets.configure`).
Data: `wikitext2` (10.8 MB of training text), from `config.data.root` or downloaded.
Hardware and time: one GPU or TPU core. Not run here.
Expected: not measured here.
"""

from diffrwkv import presets
from diffrwkv.config import base


def get_config(arg="birwkv"):
    c = base()

    c.data.name = "wikitext2"
    c.data.tokenizer = "bpe:4096"
    c.data.length = 512
    c.data.train_offsets = "random"

    c.samplers.ancestral.num_steps = 256
    presets.configure(c, arg, "tiny")
    c.model.dropout = 0.2
    c.model.scan_layers = True

    c.optim.learning_rate = 6e-4
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 500
    c.optim.b2 = 0.99
    c.optim.weight_decay = 0.1
    c.optim.decay_group = "rwkv7_no_embedding"

    c.train.num_steps = 20_000
    c.train.batch_size = 32
    c.train.log_every = 50
    c.train.eval_every = 1000
    c.train.eval_draws = 2
    c.train.checkpoint_every = 1000
    c.train.sample_every = 2000
    return c
