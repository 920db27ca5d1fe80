"""Small backbones under one recipe, to be scored on texts that they were not trained on (benchmarks/zero_shot.py).

    python -m diffrwkv.train --config=experiments/zero_shot.py:birwkv --config.data.name='~/text/*.jsonl.xz'
    python -m diffrwkv.evaluate --workdir=runs/... --data ptb wikitext103 lm1b lambada

Recipe, the same for every NAME: a byte-pair vocabulary of 2,048, length 128, batch 32, AdamW (1e-3, 0.9, 0.999) without
decay, warm-up then cosine, clip 1, float32, log-linear schedule, EMA 0.999 with warm-up, 1,500 steps of 4,096 tokens.

NAME: `birwkv`, `dit` (MDLM's Transformer), `bimamba`, `birwkv_hybrid`, `bimamba_hybrid`; `ar_transformer`, `ar_rwkv`,
which predict the next token instead; NAME@BLOCKS and NAME~OBJECTIVE as everywhere (`diffrwkv.presets.configure`).
Data: any English text, by config.data.name. The rows in benchmarks/results are of 18 MB, a third of it books of before
1925, the rest articles of Wikipedia.
Hardware and time: 1 CPU core, 10 to 20 minutes.
Expected: the table of docs/results.md.
"""

from diffrwkv import presets
from diffrwkv.config import base


def get_config(arg="birwkv"):
    c = base()

    c.data.name = "wikitext2"
    c.data.tokenizer = "bpe:2048"
    c.data.length = 128
    c.data.train_offsets = "random"

    presets.configure(c, arg, "peer")

    c.optim.learning_rate = 1e-3
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 100
    c.optim.b1, c.optim.b2 = 0.9, 0.999
    c.optim.weight_decay = 0.0

    c.train.num_steps = 1500
    c.train.batch_size = 32
    c.train.ema_decay = 0.999
    c.train.log_every = 50
    c.train.eval_every = 500
    c.train.eval_limit = 256
    c.train.checkpoint_every = 500
    c.train.sample_every = 0
    return c
