"""One Billion Words in sequences of 128 tokens, MDLM's recipe (arXiv 2406.07524) but for the vocabulary.

    python -m diffrwkv.train --config=experiments/lm1b.py:birwkv --workdir=runs/lm1b

NAME: a backbone of `diffrwkv.presets` (`birwkv`, the default; `dit`, `bimamba`, `birwkv_hybrid`, `bimamba_hybrid`,
`ar_transformer`, `ar_rwkv`), all of one size (170 M class); NAME/SIZE takes another (`dit/240m`),
NAME@BLOCKS blocks, NAME~OBJECTIVE another objective (`diffrwkv.presets.configure`).
Data: `lm1b`, from `config.data.root` or prepared. MDLM uses BERT's uncased vocabulary there; this is GPT-2's, so
perplexities per token do not compare: compare bits per character.
Hardware and time: a node of 8 accelerators. Not run here.
Expected: not measured here.
"""

from diffrwkv import presets
from diffrwkv.config import base


def get_config(arg="birwkv"):
    c = base()

    c.data.name = "lm1b"
    c.data.tokenizer = "gpt2"
    c.data.length = 128
    c.data.wrap = True

    presets.configure(c, arg, "small")
    c.model.dropout = 0.1
    c.model.scan_layers = True
    c.model.dtype = "bfloat16"

    c.optim.learning_rate = 3e-4
    c.optim.schedule = "constant"
    c.optim.warmup_steps = 2500
    c.optim.weight_decay = 0.0

    c.train.num_steps = 1_000_000
    c.train.batch_size = 512
    c.train.ema_decay = 0.9999
    c.train.log_every = 100
    c.train.eval_every = 10_000
    c.train.eval_batch_size = 512
    c.train.checkpoint_every = 10_000
    c.train.sample_every = 50_000
    return c
