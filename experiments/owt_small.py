"""OpenWebText at GPT-2-small scale: MDLM's recipe (arXiv 2406.07524) with a BiRWKV-7 denoiser of 174 M.

    python -m diffrwkv.prepare --input openwebtext --tokenizer gpt2 --output $DIFFRWKV_DATA/openwebtext-gpt2
    python -m diffrwkv.train --config=experiments/owt_small.py:birwkv --workdir=runs/owt

NAME: a backbone of `diffrwkv.presets` (`birwkv`, the default; `dit`, `bimamba`, `birwkv_hybrid`, `bimamba_hybrid`,
`ar_transformer`, `ar_rwkv`), all of one size (170 M class); NAME/SIZE takes another (`dit/240m`),
NAME@BLOCKS blocks, NAME~OBJECTIVE another objective (`diffrwkv.presets.configure`).
Data: `openwebtext`, prepared or from `config.data.root`; 1024 tokens, [BOS] ... [EOS], documents joined by EOS.
Hardware and time: by `python -m diffrwkv.plan --config=owt_small --compile` (shapes, and XLA's
analysis of the step compiled for a CPU; nothing was run), the state takes 2.6 GiB, a step on 8 sequences 4.6 GiB
beside it, and each sequence more 0.5 GiB with `remat`. So an accelerator of 80 GB takes microbatches of 64 with room
to spare (accumulate = 8 on one, 1 on eight), one of 16 GB takes 8. The matrices need 425 TFLOP a step: at 35 % of
peak 1.2 s on one H100 and 6.2 s on one TPU v5e, so 14 days of one H100 for the whole run; the recurrence, which this
leaves out, makes it longer.
Expected: not run here.
"""

from diffrwkv import presets
from diffrwkv.config import base


def get_config(arg="birwkv"):
    c = base()

    c.data.name = "openwebtext"
    c.data.tokenizer = "gpt2"
    c.data.length = 1024
    c.data.wrap = True

    c.samplers.ancestral.num_steps = 1000
    presets.configure(c, arg, "small")
    c.model.dropout = 0.1
    c.model.scan_layers = True
    c.model.remat = True
    c.model.dtype = "bfloat16"

    c.optim.learning_rate = 3e-4
    c.optim.schedule = "constant"
    c.optim.warmup_steps = 2500
    c.optim.b1, c.optim.b2, c.optim.eps = 0.9, 0.999, 1e-8
    c.optim.weight_decay = 0.0
    c.optim.clip_norm = 1.0

    c.train.num_steps = 1_000_000
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
