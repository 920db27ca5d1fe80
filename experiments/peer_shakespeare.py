"""The fair comparison: the recipe under which MDLM's original PyTorch code was run on tiny Shakespeare.

    python -m diffrwkv.train --config=experiments/peer_shakespeare.py:birwkv --workdir=runs/peer --config.seed=1
    python -m diffrwkv.evaluate --workdir=runs/peer --draws=8

Recipe, the same for every NAME: characters (65 + mask), the first 90 % to train on and the last 10 % to validate on,
length 256, batch 16, AdamW (1e-3, 0.9, 0.999, 1e-8) without decay, warm-up lr·step/100 then constant, clip 1, dropout
0.1, float32, no time conditioning, log-linear schedule, low-discrepancy t in [1e-3, 1], EMA 0.999 with warm-up, 500
steps. A run ends with one draw over all 435 validation sequences; `evaluate` takes the 8 of the comparison.

NAME: `birwkv` (at most 1.30 M parameters; MDLM's Transformer there has 1,285,826), `birwkv_add` and `birwkv_tied`,
which change one option each.
Data: `tinyshakespeare`, from `config.data.root` or downloaded.
Hardware and time: 2 CPU cores.
Expected: 2.182 / 2.154 / 2.164 (EMA), 2.229 / 2.202 / 2.217 (raw) nats per character with seeds 1 / 2 / 3, standard
error 0.01 (benchmarks/results/peer_shakespeare.jsonl). MDLM: 2.367 / 2.442 (EMA), 2.401 / 2.458 (raw), seeds 1 / 2.
"""

from diffrwkv.config import base

# What a name changes in config.model; `birwkv` is the library's default.
NAMES = {
    "birwkv": {},
    "birwkv_add": {"mixer_options": {"merge": "add"}},
    "birwkv_tied": {"mixer_options": {"share": "all"}},
    "birwkv_unshifted": {"channel_mixer_options": {"shift": "none"}},
}


def get_config(arg="birwkv"):
    if arg not in NAMES:
        raise ValueError(f"peer_shakespeare.py:NAME takes one of {', '.join(NAMES)}, got {arg!r}.")
    c = base()

    c.data.name = "tinyshakespeare"
    c.data.tokenizer = "char"
    c.data.length = 256
    c.data.validation_fraction = 0.1

    c.model.dim = 128
    c.model.num_layers = 4
    c.model.mixer_options.head_dim = 64
    c.model.update(NAMES[arg])
    c.model.dropout = 0.1
    c.model.time_conditioning = False

    c.diffusion.schedule.name = "loglinear"
    c.diffusion.time_eps = 1e-3
    c.diffusion.low_discrepancy = True

    c.optim.learning_rate = 1e-3
    c.optim.schedule = "constant"
    c.optim.warmup_steps = 100
    c.optim.b1, c.optim.b2, c.optim.eps = 0.9, 0.999, 1e-8
    c.optim.weight_decay = 0.0
    c.optim.clip_norm = 1.0

    c.train.num_steps = 500
    c.train.batch_size = 16
    c.train.ema_decay = 0.999
    c.train.eval_every = 250
    c.train.eval_limit = 0
    c.train.checkpoint_every = 250
    c.train.sample_every = 500
    return c
