"""The README's main job: block diffusion on Python's own language reference, on a laptop.

    python -m diffrwkv.train --config=experiments/quickstart.py --workdir=runs/quickstart

Data: `python_reference`, the prose that every CPython carries (`pydoc_data.topics`); nothing is downloaded.
Hardware and time: 2 CPU cores, 8 minutes with evaluation and samples (benchmarks/results/quickstart.json).
Expected: 1.8 bits per character on Python 3.11's text; samples in words and phrases of the reference, without sense.

A byte-pair vocabulary and blocks of four tokens are what makes words in so short a time: characters, noised in the
whole text at once, are at 2.8 bits per character after as many steps, and their samples have hardly a word in them.
"""

from diffrwkv.config import base


def get_config(arg=None):
    if arg is not None:
        raise ValueError(f"quickstart.py takes no argument, got {arg!r}.")
    c = base()

    c.data.name = "python_reference"
    c.data.tokenizer = "bpe:1024"
    c.data.length = 256
    c.data.train_offsets = "random"  # a small text: new cuts in each epoch

    c.model.dim = 128
    c.model.num_layers = 4
    c.model.mixers.birwkv7.head_dim = 32
    c.model.mixers.birwkv7.lora_ranks = {"w": 16, "a": 16, "v": 16, "g": 32}

    c.diffusion.layout = "blocks"
    c.layouts.blocks.sizes = (4,)

    c.optim.learning_rate = 2e-3
    c.optim.schedule = "wsd"
    c.optim.warmup_steps = 50
    c.optim.decay_fraction = 0.3
    c.optim.final_fraction = 0.05

    c.train.num_steps = 600
    c.train.batch_size = 16
    c.train.ema_decay = 0.98  # averages about the last 50 steps, of a run this short
    c.train.eval_every = 200
    c.train.eval_limit = 64
    c.train.checkpoint_every = 200
    c.train.sample_every = 300
    c.sampler.name = "confidence"
    c.samplers.confidence.temperature = 0.8
    return c
