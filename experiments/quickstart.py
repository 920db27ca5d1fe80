"""The README's main job: a character denoiser of Python's own language reference, on a laptop.

    python -m diffrwkv.train --config=experiments/quickstart.py --workdir=runs/quickstart

Data: `python_reference`, the prose that every CPython carries (`pydoc_data.topics`); nothing is downloaded.
Hardware and time: 2 CPU cores, 7 minutes with evaluation and samples (benchmarks/results/quickstart.json).
Expected: 1.95 nats per character on Python 3.11's text; samples laid out like the reference, in words of its kind.
"""

from diffrwkv.config import base


def get_config(arg=None):
    if arg is not None:
        raise ValueError(f"quickstart.py takes no argument, got {arg!r}.")
    c = base()

    c.data.name = "python_reference"
    c.data.tokenizer = "char"
    c.data.length = 256
    c.data.train_offsets = "random"  # a small text: new cuts in each epoch

    c.model.dim = 128
    c.model.num_layers = 4
    c.model.mixers.birwkv7.head_dim = 32
    c.model.mixers.birwkv7.lora_ranks = {"w": 16, "a": 16, "v": 16, "g": 32}

    c.optim.learning_rate = 2e-3
    c.optim.schedule = "wsd"
    c.optim.warmup_steps = 50
    c.optim.decay_fraction = 0.3
    c.optim.final_fraction = 0.05

    c.train.num_steps = 400
    c.train.batch_size = 16
    c.train.ema_decay = 0.98  # averages about the last 50 steps, of a run this short
    c.train.eval_every = 200
    c.train.eval_limit = 64
    c.train.checkpoint_every = 200
    c.train.sample_every = 200
    c.samplers.ancestral.num_steps = 256
    return c
