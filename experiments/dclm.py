"""DCLM at DiffuMamba's sizes: 0.24, 0.5 and 1.3 billion parameters (arXiv 2511.15927).

    python -m diffrwkv.prepare --input dclm --tokenizer gpt2 --output $DIFFRWKV_DATA/dclm-gpt2
    python -m diffrwkv.train --config=experiments/dclm.py:birwkv --workdir=runs/dclm
    python -m diffrwkv.train --config=experiments/dclm.py:bimamba_hybrid/1300m --workdir=runs/dclm-large

Recipe: Adam (0.9, 0.95), weight decay 0.1 (on matrices: Mamba-2 wants none on A, D and dt), cosine to a tenth, clip 1,
batch 512, EMA 0.9999, low-discrepancy times, bfloat16. What the paper does not say is MDLM's.

NAME: a backbone of `diffrwkv.presets` (`birwkv`, the default; `dit`, `bimamba`, `birwkv_hybrid`, `bimamba_hybrid`,
`ar_transformer`, `ar_rwkv`) of 0.24 billion; NAME/500m and NAME/1300m are the larger ones,
NAME@BLOCKS has blocks, NAME~OBJECTIVE another objective (`diffrwkv.presets.configure`).
Data: `dclm`, prepared or from `config.data.root`; 1024 tokens, [BOS] ... [EOS], documents joined by EOS.
Hardware and time: by `python -m diffrwkv.plan --config=dclm:birwkv`. Not run here.
Expected: not measured here.
"""

from diffrwkv import presets
from diffrwkv.config import base


def get_config(arg="birwkv"):
    c = base()

    c.data.name = "dclm"
    c.data.tokenizer = "gpt2"
    c.data.length = 1024
    c.data.wrap = True

    c.samplers.ancestral.num_steps = 1000
    presets.configure(c, arg, "240m")
    c.model.scan_layers = True
    c.model.remat = True
    c.model.dtype = "bfloat16"

    c.optim.learning_rate = 3e-4
    c.optim.schedule = "cosine"
    c.optim.warmup_steps = 2500
    c.optim.b1, c.optim.b2 = 0.9, 0.95
    c.optim.weight_decay = 0.1
    c.optim.decay_group = "matrices"
    c.optim.clip_norm = 1.0

    c.train.num_steps = 200_000
    c.train.batch_size = 512
    c.train.accumulate = 1  # raise it until a microbatch fits the devices
    c.train.ema_decay = 0.9999
    c.train.log_every = 100
    c.train.eval_every = 10_000
    c.train.eval_batch_size = 512
    c.train.eval_limit = 4096
    c.train.checkpoint_every = 10_000
    c.train.keep = 3
    c.train.sample_every = 50_000
    c.train.data_workers = 4
    return c
