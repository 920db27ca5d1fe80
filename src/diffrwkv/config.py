"""The configuration: every key once, with a comment, and how a command line becomes one.

A section is exactly one constructor's keyword arguments: `Denoiser(**config.model)`, `load(**config.data)`.
An experiment file (`experiments/x.py`) has `get_config(arg=None)` that takes `base()` and changes it; `--config=x:arg`
names one of ours, `--config=FILE.py:arg` any; `--config.a.b=value` overrides one key. Only this module and the programs
know ConfigDict; everything below them takes plain values.
"""

import argparse
import ast
import decimal
import difflib
import importlib.util
import inspect
import itertools
import json
import math
import numbers
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags

from diffrwkv import checks, files
from diffrwkv.checks import Range


class UserError(Exception):
    """A mistake of the user's, told in one sentence that says what to do. Programs print it and exit 2."""


def base() -> config_dict.ConfigDict:
    """Every key there is. Sizes suit a laptop; experiments/ holds the ones with a name."""
    c = config_dict.ConfigDict()
    c.seed = 0  # parameters, order of the data, times, masks, dropout: all derive from it

    # diffrwkv.data.load(**config.data)
    c.data = config_dict.ConfigDict()
    c.data.name = "python_reference"  # a name in data.datasets.DATASETS, or a path to text
    c.data.root = config_dict.placeholder(str)  # where data lie; None: $DIFFRWKV_DATA, then the cache
    c.data.tokenizer = "char"  # "char" | "byte" | "gpt2" | "bpe:4096" | "world" | "neox" | "x/tokenizer.json"
    c.data.length = 256  # tokens in a training sequence
    c.data.wrap = False  # MDLM's wrapping: each sequence is [BOS] ... [EOS], documents joined by EOS
    c.data.validation = config_dict.placeholder(str)  # text to validate on instead: a name or a path
    c.data.validation_fraction = 0.1  # the last part of a data set that has no split of its own
    c.data.packing = "concat"  # "concat": one long row, cut | "document": a padded row for each
    c.data.train_offsets = "chunks"  # sequences begin at multiples of length, or anywhere: "random"
    c.data.text_key = "text"  # the field of JSON, csv or parquet that holds the text
    c.data.prompt_key = config_dict.placeholder(str)  # that of a prompt: the text is its answer, and alone counts
    c.data.on_error = "stop"  # at a bad record (broken, or without text), or "skip" and count it
    c.data.max_document_bytes = 1 << 26  # a longer record is refused; a text file may be of any length

    # diffrwkv.denoiser.Denoiser(vocab_size=tokenizer.vocab_size, **config.model)
    c.model = config_dict.ConfigDict()
    c.model.dim = 256  # width
    c.model.num_layers = 6  # blocks of (mixer, channel mix)
    c.model.pattern = "birwkv7"  # mixers of mixers.MIXERS layer by layer, repeated: "attention,birwkv7*4"
    c.model.mixers = config_dict.ConfigDict()  # keyword arguments of each mixer
    m = c.model.mixers.birwkv7 = config_dict.ConfigDict()  # RWKV-7 in both directions
    m.head_dim = 64  # divides dim
    m.merge = "gate"  # of the two directions: "gate" (learned) | "add"
    m.share = "projections"  # between them: "none" | "projections" | "all" (tied)
    m.lora_ranks = config_dict.ConfigDict()  # {"w": ...}, of w a v g; {}: RWKV-7's rule
    m.a_scale = 1.0  # bound of the in-context learning rate
    m.implementation = config_dict.placeholder(str)  # of wkv7; None: by platform
    m.time_mix = config_dict.placeholder(str)  # of what stands around it: pallas_kernels.time_mix; None: by platform
    m = c.model.mixers.rwkv7 = config_dict.ConfigDict()  # causal RWKV-7
    m.head_dim = 64
    m.lora_ranks = config_dict.ConfigDict()
    m.a_scale = 1.0
    m.implementation = config_dict.placeholder(str)
    m.time_mix = config_dict.placeholder(str)
    for name in ("attention", "causal_attention"):  # softmax attention, to all positions or to the earlier ones
        m = c.model.mixers[name] = config_dict.ConfigDict()
        m.head_dim = 64  # even, divides dim
        m.rotary_base = 10_000.0
        m.implementation = config_dict.placeholder(str)  # "xla" | "blocked" | "cudnn" | "splash"; None: by platform
    for name in ("bimamba2", "mamba2"):  # Mamba-2 in both directions, or causal
        m = c.model.mixers[name] = config_dict.ConfigDict()
        m.state_size = 128  # rows of a head's state
        m.head_dim = 64  # its columns; divides expand * dim
        m.expand = 2  # inner width / dim
        m.num_groups = 1  # heads of a group share B and C
        m.conv_width = 4  # positions that the short convolution sees
        m.implementation = config_dict.placeholder(str)  # of ssd; None: by platform
    c.model.channel_mixer = "rwkv7"  # a name in mixers.CHANNEL_MIXERS
    c.model.channel_mixers = config_dict.ConfigDict()  # keyword arguments of each
    m = c.model.channel_mixers.rwkv7 = config_dict.ConfigDict()
    m.expansion = 4.0  # hidden width / dim
    m.shift = "both"  # neighbours it sees: "both" | "none" | "previous"
    c.model.channel_mixers.mlp = config_dict.create(expansion=4.0)  # the Transformer's
    c.model.block = "rwkv7"  # norms, adaLN, initial embedding and head: "rwkv7" | "dit" | "transformer" (no adaLN)
    c.model.time_conditioning = False  # adaLN on t; off in MDLM, and the cached sampler needs it off
    c.model.condition_dim = 128  # width of the embedding of t that adaLN reads
    c.model.tie_embeddings = False  # output matrix = embedding
    c.model.predict_next = False  # a token is predicted at the one before it, as from left to right: for such weights
    c.model.reading = "once"  # how rwkv7 or mamba2 sees both sides: "once" (not at all) | "twice" | "future_seed"
    c.model.dropout = 0.0  # on both residual branches
    c.model.remat = False  # recompute blocks in the backward pass: less memory, about 1/3 more time
    c.model.scan_layers = False  # one compiled block for all layers: compiles faster when deep
    c.model.dtype = "float32"  # of activations ("bfloat16" on accelerators); parameters stay float32

    # diffrwkv.diffusion.objectives.from_config(vocabulary, **config.diffusion, sections=config)
    c.diffusion = config_dict.ConfigDict()
    c.diffusion.name = "mdlm"  # a name in objectives.OBJECTIVES
    c.diffusion.schedule = config_dict.placeholder(str)  # a name in schedules.SCHEDULES; None: the objective's own
    c.diffusion.layout = "whole"  # a name in layouts.LAYOUTS
    c.objectives = config_dict.ConfigDict()  # options of each; those of diffusion.name count
    for name in ("mdlm", "sedd_absorb", "sedd_uniform", "udlm", "duo", "gidd"):  # the NELBO
        o = c.objectives[name] = config_dict.ConfigDict()
        o.time_eps = 1e-3  # t is drawn from [time_eps, 1]
        o.low_discrepancy = True  # one t per 1/n-th of [0, 1], over the global batch and the blocks of its texts
        o.mask_rates = (0.0, 1.0)  # training draws the share of noised tokens from here
        o.search_mask_rates = False  # choose it at each validation, for the least variance
    for name in ("mdlm", "udlm", "duo"):
        c.objectives[name].clock = "t"  # what a network with time conditioning is told: "t" | "sigma", as MDLM's own
    o = c.objectives.duo  # udlm, which begins with soft tokens
    o.curriculum_steps = 250  # for so many steps; the authors take half of all
    o.tau_start = 0.1  # temperature of the soft tokens at the first of them
    o.tau_end = 0.01  # and at the last
    o.gamma_min = -3.5  # -log signal / noise of what they are made from, at t = 0
    o.gamma_max = -1.75  # and at t = 1
    o = c.objectives.gidd  # masks and uniform noise at once
    o.time_eps = 1e-4
    o.uniform_share = 0.1  # share of uniform noise where it is largest
    o.gamma = 1.0  # it is ~ (alpha (1 - alpha)) ** (gamma / 2)
    o = c.objectives.flm = config_dict.ConfigDict()  # a flow from noise to one-hot vectors: no bound
    o.time_eps = 1e-6  # its samples begin at t = 0
    o.low_discrepancy = True
    o = c.objectives.genmd4 = config_dict.ConfigDict()  # masks, with a schedule of its own for each token: learned
    o.eps = 1e-4  # alpha at t = 1; of token v it is 1 - (1 - eps) t ** power_v
    o.time_eps = 1e-3
    o.low_discrepancy = True
    o.power = 1.0  # of all tokens, before they are learned
    o.power_rate = 3e-4  # their learning rate
    c.objectives.autoregressive = config_dict.ConfigDict()  # the likelihood itself: without options
    c.schedules = config_dict.ConfigDict()  # options of each; those of the one that is taken count
    for name in ("loglinear", "cosine", "cosine_squared"):
        c.schedules[name] = config_dict.create(eps=1e-3)  # alpha at t = 1
    for name in ("linear", "maskgit"):
        c.schedules[name] = config_dict.ConfigDict()
    c.schedules.polynomial = config_dict.create(power=2.0)  # alpha = 1 - t ** power
    c.schedules.geometric = config_dict.create(sigma_min=1e-3, sigma_max=20.0)  # total noise at t = 0 and t = 1
    c.layouts = config_dict.ConfigDict()  # options of each; those of diffusion.layout count
    c.layouts.whole = config_dict.ConfigDict()  # a text is one part, noised at one time: without options
    o = c.layouts.blocks = config_dict.ConfigDict()  # block diffusion
    o.sizes = (16,)  # tokens in a block, 0: the whole text; several: each step takes one
    o.begins = ()  # the step after which each of them is taken, (400, 200, 0): a schedule; (): one at random
    o.causal_context = True  # a clean token sees those before it; False: the rest of its block too, as BD3-LM
    o.keep_first = False  # the first token is given (BOS)

    # diffrwkv.diffusion.samplers.from_config(config.sampler.name, **config.samplers[config.sampler.name])
    c.sampler = config_dict.ConfigDict()
    c.sampler.name = "ancestral"  # a name in samplers.SAMPLERS that samples from the objective's process
    c.samplers = config_dict.ConfigDict()  # options of each; `sample --sampler=NAME` takes them from here too
    s = c.samplers.ancestral = config_dict.ConfigDict()
    s.num_steps = 128  # steps from t = 1 to eps
    s.cache = True  # masks: call the network only when something changed
    s.eps = 1e-5  # the last t
    c.samplers.autoregressive = config_dict.ConfigDict()  # token after token
    s = c.samplers.confidence = config_dict.ConfigDict()  # the surest predictions first
    s.num_steps = config_dict.placeholder(int)  # rule "steps": passes (None: 128)
    s.block = config_dict.placeholder(int)  # positions that are filled before the next; None: all
    s.score = "probability"  # how sure a prediction is: "probability" | "margin" | "entropy" | "random"
    s.rule = "steps"  # how many to keep in a pass: "steps" | "threshold" | "factor"
    s.threshold = config_dict.placeholder(float)  # rule "threshold" (None: 0.9)
    s.factor = config_dict.placeholder(float)  # rule "factor" (None: 1)
    c.samplers.first_hitting = config_dict.ConfigDict()  # one token at a time, at its exact time
    for name in ("ice", "prophet"):  # "confidence" by steps, left early
        s = c.samplers[name] = config_dict.ConfigDict()
        s.num_steps = 128
        s.block = config_dict.placeholder(int)
        s.score = "probability"
    c.samplers.ice.answer_length = 8  # the last so many blanks are the answer
    c.samplers.ice.threshold = 0.9  # mean confidence in it at which it is written
    c.samplers.prophet.answer_length = config_dict.placeholder(int)  # None: all blanks
    c.samplers.prophet.gaps = (7.5, 5.0, 2.5)  # mean gap of the two largest logits to stop at, by thirds of the passes
    s = c.samplers.remdm = config_dict.ConfigDict()  # "ancestral", which masks tokens again
    s.num_steps = 128
    s.strategy = "cap"  # "cap" | "rescale" | "conf" | "loop"
    s.eta = config_dict.placeholder(float)  # how much, but for "conf" (None: 0.02)
    s.t_on = config_dict.placeholder(float)  # "loop": it begins at this time (None: 0.55)
    s.t_off = config_dict.placeholder(float)  # and ends at this one (None: 0.05)
    s.alpha_on = config_dict.placeholder(float)  # the share of tokens that show meanwhile (None: 0.9)
    s.eps = 1e-5
    s = c.samplers.psi = config_dict.ConfigDict()  # "ancestral", part of each step of which noises a prediction anew
    s.num_steps = 128
    s.strategy = "constant"  # how large a part: "constant" | "cap" | "rescale" | "loop"
    s.kappa = config_dict.placeholder(float)  # "constant": the part that does not (None: 0.95)
    s.eta = config_dict.placeholder(float)  # else how much, as in "remdm" (None: 0.02)
    s.t_on = config_dict.placeholder(float)  # it begins at this time (None: 1; "loop": 0.55)
    s.t_off = config_dict.placeholder(float)  # and ends at this one (None: 0; "loop": 0.05)
    s.alpha_on = config_dict.placeholder(float)  # "loop": the share of tokens that are kept meanwhile (None: 0.9)
    s.greedy_tail = False  # the last pass takes the most probable token
    s.eps = 1e-5
    s = c.samplers.entropy_bound = config_dict.ConfigDict()  # keeps what is all but independent, noises the rest anew
    s.num_steps = 128
    s.bound = 0.1  # nats that the predictions before one may sum to, the surest first
    s.stop = 0.005  # mean nats at which a text that no longer changes is done
    s.eps = 1e-5
    s = c.samplers.pipelined = config_dict.ConfigDict()  # block diffusion, several blocks at once
    s.window = 4  # most blocks at once
    s.add_at = 0.1  # share that the last block shows before another is added
    s.activate_at = 0.95  # share that its predecessor shows before a block always keeps a prediction
    s.threshold = 0.9  # probability above which a prediction is kept
    greedy = ("confidence", "ice", "prophet", "pipelined")
    for name, s in c.samplers.items():  # of the predicted tokens, in each of those above
        s.temperature = 0.0 if name in greedy else 1.0
        s.top_p = 1.0  # keep the smallest set of tokens with this much probability
        s.top_k = 0  # keep so many most probable tokens; 0: all
    for name in ("euler", "analytic"):
        c.samplers[name] = config_dict.create(num_steps=128, eps=1e-5)  # steps of a score
    c.samplers.flow_euler = config_dict.create(num_steps=128)  # "flm": steps from t = 0 to 1, nothing drawn in them

    # diffrwkv.optim.make_optimizer(params, num_steps, **config.optim)
    c.optim = config_dict.ConfigDict()
    c.optim.learning_rate = 1e-3  # peak
    c.optim.schedule = "constant"  # "constant" | "cosine" | "wsd", each after the warm-up
    c.optim.warmup_steps = 100  # step s < warmup has learning_rate * s / warmup
    c.optim.decay_fraction = 0.2  # wsd: the last part of num_steps, over which the rate falls linearly
    c.optim.final_fraction = 0.1  # cosine, wsd: the last rate / learning_rate
    c.optim.b1 = 0.9  # decay of the mean of the gradient
    c.optim.b2 = 0.999  # and of its square
    c.optim.eps = 1e-8  # added to its root
    c.optim.weight_decay = 0.0  # decoupled (AdamW)
    c.optim.decay_group = "rwkv7"  # what decays: "rwkv7" | "rwkv7_no_embedding" | "matrices" | "all"
    c.optim.rate_group = "none"  # learning rate per group: "none" | "rwkv7" (w0 twice)
    c.optim.clip_norm = 1.0  # global norm of the gradient; 0: no clipping

    # diffrwkv.train.run: the loop itself
    c.train = config_dict.ConfigDict()
    c.train.init_from = config_dict.placeholder(str)  # weights to start from: a workdir, file, "hf:OWNER/NAME"
    c.train.init_raw = False  # of a workdir: the weights themselves, not their moving average
    c.train.num_steps = 1000  # optimiser steps
    c.train.batch_size = 16  # sequences in a step, over all devices and microbatches
    c.train.accumulate = 1  # microbatches in a step; each has its own noise
    c.train.ema_decay = 0.999  # of the averaged weights; min(ema_decay, (1 + n) / (10 + n)) at step n
    c.train.log_every = 10  # steps between lines of metrics.jsonl
    c.train.checkpoint_every = 250  # a multiple of eval_every lets the best be known and kept
    c.train.keep = 2  # newest checkpoints that stay; the best by val/nelbo stays as well
    c.train.eval_every = 250  # and at the end; 0: only at the end
    c.train.eval_draws = 1  # draws of (t, mask) per validation sequence
    c.train.eval_batch_size = 32  # sequences at a time
    c.train.eval_limit = 0  # validation sequences used while training; 0: all
    c.train.sample_every = 250  # and at the end; 0: never
    c.train.num_samples = 2  # printed each time
    c.train.mesh = config_dict.create(data=-1, fsdp=1)  # devices per axis; -1: the rest
    c.train.cpu_devices = 0  # virtual devices on a CPU; 0: as many cores as divide the batches
    c.train.data_workers = 0  # processes that read; 0: threads of this one
    c.train.multihost = False  # several processes, each started with the same command (TPU pods, several hosts)
    h = c.train.hosts = config_dict.ConfigDict()  # who they are, where no launcher that JAX knows says it
    h.coordinator = config_dict.placeholder(str)  # "HOST:PORT" of process 0, as all reach it
    h.num_processes = config_dict.placeholder(int)
    h.process_id = config_dict.placeholder(int)  # of this one, from 0
    c.train.tensorboard = True  # event files beside metrics.jsonl
    c.train.wandb_project = config_dict.placeholder(str)  # needs the extra: pip install diffrwkv[wandb]
    c.train.compilation_cache = config_dict.placeholder(str)  # folder; None: compile anew each time
    c.lock()  # a misspelt key fails in an experiment file as on the command line
    return c


# The sections that hold a section of options for each name that may be chosen. Another name than those of `base`, which
# an experiment brings along, has a section there when the experiment makes one.
OPTIONS = ("objectives", "schedules", "layouts", "samplers")


# What each number of `base` may be. A section's own constructor refuses the same, and what depends on other keys
# (head_dim must divide dim). Upper bounds are far beyond any use, and below what takes the machine's memory by itself.
RANGES: dict[str, Range] = {
    "seed": checks.SEED,
    "data.length": checks.LENGTH,
    "data.validation_fraction": checks.INSIDE,
    "data.max_document_bytes": checks.BYTES,
    "model.dim": checks.WIDTH,
    "model.num_layers": checks.NUM_LAYERS,
    "model.mixers.birwkv7.head_dim": checks.WIDTH,
    "model.mixers.birwkv7.lora_ranks": checks.WIDTH,  # each of them
    "model.mixers.birwkv7.a_scale": checks.A_SCALE,
    "model.mixers.rwkv7.head_dim": checks.WIDTH,
    "model.mixers.rwkv7.lora_ranks": checks.WIDTH,
    "model.mixers.rwkv7.a_scale": checks.A_SCALE,
    "model.mixers.attention.head_dim": checks.WIDTH,
    "model.mixers.attention.rotary_base": checks.ROTARY_BASE,
    "model.mixers.causal_attention.head_dim": checks.WIDTH,
    "model.mixers.causal_attention.rotary_base": checks.ROTARY_BASE,
    "model.mixers.bimamba2.state_size": checks.WIDTH,
    "model.mixers.bimamba2.head_dim": checks.WIDTH,
    "model.mixers.bimamba2.expand": checks.WIDTH,
    "model.mixers.bimamba2.num_groups": checks.WIDTH,
    "model.mixers.bimamba2.conv_width": checks.CONV_WIDTH,
    "model.mixers.mamba2.state_size": checks.WIDTH,
    "model.mixers.mamba2.head_dim": checks.WIDTH,
    "model.mixers.mamba2.expand": checks.WIDTH,
    "model.mixers.mamba2.num_groups": checks.WIDTH,
    "model.mixers.mamba2.conv_width": checks.CONV_WIDTH,
    "model.channel_mixers.rwkv7.expansion": checks.EXPANSION,
    "model.channel_mixers.mlp.expansion": checks.EXPANSION,
    "model.condition_dim": checks.WIDTH,
    "model.dropout": checks.DROPOUT,
    "optim.learning_rate": checks.AT_LEAST_0,  # 0: nothing moves
    "optim.warmup_steps": checks.COUNT_OR_NONE,
    "optim.decay_fraction": checks.FRACTION,
    "optim.final_fraction": checks.FRACTION,
    "optim.b1": checks.BELOW_ONE,
    "optim.b2": checks.BELOW_ONE,
    "optim.eps": Range(1e-30, 1),  # 0 would divide by the root of a gradient that is 0
    "optim.weight_decay": Range(0, 1000),
    "optim.clip_norm": Range(0, 1e30),
    "train.num_steps": checks.COUNT,
    "train.batch_size": checks.SEQUENCES,
    "train.accumulate": checks.SEQUENCES,
    "train.ema_decay": checks.BELOW_ONE,
    "train.log_every": checks.COUNT,
    "train.checkpoint_every": checks.COUNT,
    "train.keep": checks.COUNT,
    "train.eval_every": checks.COUNT_OR_NONE,
    "train.eval_draws": checks.COUNT,
    "train.eval_batch_size": checks.SEQUENCES,
    "train.eval_limit": checks.COUNT_OR_NONE,
    "train.sample_every": checks.COUNT_OR_NONE,
    "train.num_samples": Range(0, 4096, integer=True),
    "train.mesh.data": Range(1, 2**16, integer=True, also=-1),
    "train.mesh.fsdp": Range(1, 2**16, integer=True, also=-1),
    "train.cpu_devices": Range(0, 256, integer=True),
    "train.data_workers": Range(0, 1024, integer=True),
    "train.hosts.num_processes": Range(1, 2**16, integer=True),
    "train.hosts.process_id": Range(0, 2**16 - 1, integer=True),
}
# The same of the sections of OPTIONS, where a name is one thing wherever it stands.
_OPTION_RANGES = {
    "objectives": {
        "time_eps": checks.INSIDE,
        "curriculum_steps": checks.COUNT,
        "tau_start": checks.POSITIVE,
        "tau_end": checks.POSITIVE,
        "gamma_min": Range(-30, 30),
        "gamma_max": Range(-30, 30),
        "eps": checks.INSIDE,
        "power": Range(1e-2, 1e2),
        "power_rate": checks.POSITIVE,
        "uniform_share": Range(0, 0.99, open="low"),
        "gamma": Range(0, 2, open="low"),
    },
    "schedules": {
        "eps": checks.BELOW_ONE,
        "power": Range(1e-2, 1e2),
        "sigma_min": Range(1e-9, 1e4),
        "sigma_max": Range(1e-9, 1e4),
    },
    "samplers": {
        "num_steps": checks.GRID,
        "eps": checks.INSIDE,
        "temperature": checks.TEMPERATURE,
        "top_p": checks.TOP_P,
        "top_k": checks.COUNT_OR_NONE,
        "block": checks.BLOCK,
        "window": checks.BLOCK,
        "answer_length": checks.COUNT,
        "threshold": checks.POSITIVE_FRACTION,
        "add_at": checks.POSITIVE_FRACTION,
        "activate_at": checks.POSITIVE_FRACTION,
        "eta": checks.POSITIVE_FRACTION,
        "factor": checks.POSITIVE,
        "bound": checks.AT_LEAST_0,
        "stop": checks.AT_LEAST_0,
        "kappa": checks.FRACTION,
        "t_on": checks.INSIDE,
        "t_off": checks.INSIDE,
        "alpha_on": checks.INSIDE,
    },
}
RANGES |= {
    f"{section}.{name}.{key}": range_
    for section, ranges in _OPTION_RANGES.items()
    for name, options in base()[section].items()
    for key, range_ in ranges.items()
    if key in options
}


# A workdir may be continued under another value of these, and of no others. None of them enters the
# arithmetic of a step that is already done: how long to go on, what to report and keep, where the data
# lie, how to draw samples, and how the same batch is laid over devices (which changes rounding only).
RESUMABLE = (
    "data.root",
    "sampler.",
    "samplers.",
    "train.num_steps",
    "train.log_every",
    "train.checkpoint_every",
    "train.keep",
    "train.eval_every",
    "train.eval_draws",
    "train.eval_batch_size",
    "train.eval_limit",
    "train.sample_every",
    "train.num_samples",
    "train.mesh.",
    "train.cpu_devices",
    "train.multihost",
    "train.hosts.",
    "train.tensorboard",
    "train.wandb_project",
    "train.compilation_cache",
)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b": leaf} of a nested dict or ConfigDict; tuples read as lists, as JSON has them."""
    if not hasattr(config, "items"):
        return {prefix: list(config) if isinstance(config, tuple) else config}
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}.{key}" if prefix else key
        if hasattr(value, "items") and not len(value):
            flat[name] = {}
        else:
            flat |= flatten(value, name)
    return flat


DEFAULTS = flatten(base())  # every key there is
_NAMED = {".".join(key.split(".")[:2]) for key in DEFAULTS}  # {"samplers.ancestral", ...}


def told(config: Any) -> Iterator[str]:
    """A line for each key as one would type it, with its value and what `base` says of it; a title for each section."""
    said, flat = _said(), flatten(config)
    order = {key: i for i, key in enumerate(said)}
    sections: dict[str, list[str]] = {}
    for key in sorted(flat, key=lambda key: order.get(key, len(order))):
        if flat[key] != {}:  # a section without keys, which a file may fill
            sections.setdefault(key.rpartition(".")[0], []).append(key)
    for section, keys in sections.items():
        title = said.get(section, "")
        own = all(title != said.get(key) for key in keys)
        yield f"\n  {section}: {title}".rstrip(": ") if own else f"\n  {section}"
        for key in keys:
            yield f"    {f'--config.{key}={_typed(flat[key])}':58} {said.get(key, '')}".rstrip()


def _typed(value: Any) -> str:
    if isinstance(value, list):
        value = ",".join(map(str, value)) + "," * (len(value) == 1) or "()"
    return shlex.quote(str(value))


def _said() -> dict[str, str]:
    """{"a.b": the comment of the line of `base` that sets it}, of keys and sections: `base` is watched as it runs."""
    lines, first = inspect.getsourcelines(base)
    comments, above = {}, ""
    for number, line in enumerate(lines, first):
        code, _, comment = line.strip().partition("# ") if line.strip()[:1] == "#" else line.rstrip().partition("  # ")
        comments[number] = comment or above
        above = comment if not code or code.lstrip().startswith("for ") else ""
    said: dict[str, str] = {}
    seen: dict[str, Any] = {}
    at = first

    def every_line(frame: Any, event: str, value: Any) -> Any:
        nonlocal seen, at
        if "c" in frame.f_locals:
            now = _nodes(frame.f_locals["c"])
            new = [key for key in now if key not in seen or now[key] != seen[key]]
            said.update({key: comments[at] or said.get(key, "") for key in new})
            seen, at = now, frame.f_lineno
        return every_line

    before = sys.gettrace()
    sys.settrace(lambda frame, event, value: every_line if frame.f_code is base.__code__ else None)
    try:
        base()
    finally:
        sys.settrace(before)
    return said


def _nodes(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b": leaf, or None of a section} of a ConfigDict."""
    nodes: dict[str, Any] = {}
    for key, value in config.items():
        name = prefix + key
        section = hasattr(value, "items")
        nodes[name] = None if section else value
        nodes |= _nodes(value, name + ".") if section else {}
    return nodes


def differences(stored: Any, given: Any) -> dict[str, tuple[Any, Any]]:
    """{"a.b": (stored value, given value)} of every leaf that is not the same; None for a missing one.

    The options of an objective, a schedule or a layout that neither config chooses make no difference.
    """
    old, new = flatten(stored), flatten(given)
    choices = [chosen(flat) for flat in (old, new)]
    if all(choices) and choices[0]["schedules"] == choices[1]["schedules"]:  # by its name or as the objective's own
        new |= {"diffusion.schedule": old["diffusion.schedule"]}

    def counts(key: str) -> bool:
        section, _, rest = key.partition(".")
        return any(section not in names or names[section] == rest.partition(".")[0] for names in choices)

    keys = list(old) + [key for key in new if key not in old]
    return {k: (old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k) and counts(k)}


_CHOOSES = {"objectives": "diffusion.name", "schedules": "diffusion.schedule", "layouts": "diffusion.layout"}


def chosen(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{section of OPTIONS: the name there whose options count}; {} if the config does not say.

    Samplers are left out: `sample` may choose another one, with its options of the config.
    """
    from diffrwkv.diffusion.objectives import OBJECTIVES  # here, for it needs JAX

    try:
        choice = {section: flat[key] for section, key in _CHOOSES.items()}
    except KeyError:
        return {}
    if choice["schedules"] is None and choice["objectives"] in OBJECTIVES:
        choice["schedules"] = OBJECTIVES[choice["objectives"]].schedule
    return choice


def resumable(key: str) -> bool:
    """Whether a run may be continued under another value of this key (see RESUMABLE)."""
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in RESUMABLE)


def check_values(config: Any) -> None:
    """`check_keys`, and the options of OPTIONS by their constructors, which need JAX. Raises UserError.

    Options of names that are not chosen are checked too: what is stored is right. Those of a name that `base` does not
    have are the constructor's business alone.
    """
    check_keys(config)
    _check_options(config)


def check_keys(config: Any) -> None:
    """Raises UserError for a key that is missing or none of `base`, a value of another type, a number out of RANGES."""
    expected, given = DEFAULTS, flatten(config)
    for key, default in expected.items():
        if key not in given and not (default == {} and any(name.startswith(key + ".") for name in given)):
            raise UserError(f"config.{key} is missing: start from diffrwkv.config.base() and change its keys.")
    for key, value in given.items():
        section = key.rpartition(".")[0]
        of_any_name = section in RANGES  # a section of numbers
        if not of_any_name and not _from_outside(key):
            if key not in expected:
                raise UserError(f"Unknown key config.{key}: it is none of diffrwkv.config.base().")
            _check_type(key, value, expected[key])
        range_ = RANGES.get(key) or RANGES.get(section)
        unset = value == {} or (value is None and expected.get(key, "") is None)
        if range_ is not None and not unset:
            try:
                range_.check(f"config.{key}", value)
            except ValueError as e:
                raise UserError(str(e)) from None


def _from_outside(key: str) -> bool:
    """Whether the key is an option of a name that `base` does not have."""
    section, *names = key.split(".")
    return section in OPTIONS and len(names) > 0 and f"{section}.{names[0]}" not in _NAMED


def _check_type(key: str, value: Any, default: Any) -> None:
    """Numbers are left to RANGES, lists to the constructors."""
    if isinstance(default, bool):
        kind, fits = "True or False", isinstance(value, bool)
    elif isinstance(default, str):
        kind, fits = "text", isinstance(value, str)
    elif default is None and key not in RANGES:
        kind, fits = "text or None", value is None or isinstance(value, str)
    elif default == {}:
        kind, fits = "a section without keys", value == {} or (value is None and key in RANGES)
    else:
        return
    if not fits:
        raise UserError(f"config.{key} must be {kind}, got {value!r}.")


def _check_options(config: Any) -> None:
    """Raises UserError for a section of OPTIONS of no entry's name, and for options that its constructor refuses."""
    from diffrwkv.diffusion.layouts import LAYOUTS  # here, for they need JAX
    from diffrwkv.diffusion.objectives import OBJECTIVES, from_config
    from diffrwkv.diffusion.processes import Vocabulary
    from diffrwkv.diffusion.samplers import SAMPLERS
    from diffrwkv.diffusion.schedules import SCHEDULES

    sections = {name: config[name].to_dict() for name in OPTIONS}
    tables: dict[str, Any] = {
        "schedules": SCHEDULES,
        "layouts": LAYOUTS,
        "samplers": SAMPLERS,
        "objectives": OBJECTIVES,
    }
    for section, table in tables.items():
        for name, options in sections[section].items():
            if name not in table:
                raise UserError(f"config.{section}.{name}: there is none of this name, but {', '.join(table)}.")
            try:
                if section == "objectives":  # last: schedules and layouts are right by now
                    from_config(Vocabulary(4, 3), name=name, sections=sections)
                else:
                    hash(table[name](**options))
            except (ValueError, TypeError) as e:
                raise UserError(f"config.{section}.{name}: {e}") from None


def save(config: config_dict.ConfigDict, path: str | os.PathLike) -> None:
    """Writes JSON with its digest, whole or not at all."""
    write_json(seal(config.to_dict()), path)


def load(path: str | os.PathLike) -> config_dict.ConfigDict:
    """Reads what `save` wrote. Raises UserError when it is not there, was altered, or has other keys than `base`."""
    path = Path(path)
    try:
        if of_others(path):
            raise UserError(
                f"{path.parent} has a released model, which is no workdir: give it as --model, or make a workdir of "
                f"it by python -m diffrwkv.convert --input={path.parent} --workdir=DIR."
            )
        return restored(read_sealed(path))
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"No {path.name} in {path.parent}: --workdir must name a folder written by `python -m diffrwkv.train`."
        ) from None
    except OSError as e:
        raise UserError(f"{path} cannot be read ({e.strerror or e}).") from None
    except (ValueError, TypeError) as e:
        raise UserError(f"{path} is not a configuration ({e}).") from None


def of_others(path: str | os.PathLike) -> bool:
    """Whether a config.json is that of a published model, which no run has."""
    try:
        told = read_json(path)
    except (OSError, ValueError):
        return False
    return "digest" not in told and ("model_type" in told or "graph" in told)


def restored(stored: Mapping[str, Any]) -> config_dict.ConfigDict:
    """The ConfigDict of what `to_dict` once gave, by this version or an earlier one. Raises ValueError for another."""
    stored = translate(stored)
    _require_sections(stored)
    return config_dict.ConfigDict(stored)


# Keys of `base` that stored configs may lack, for they are younger: they get their defaults, which do as was done.
YOUNGER = (
    "data.prompt_key",
    "model.mixers.birwkv7.time_mix",
    "model.mixers.rwkv7.time_mix",
    "model.predict_next",
    "model.reading",
    "train.hosts",
    "train.init_from",
    "train.init_raw",
)


def translate(stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored config in the sections of `base`; those of OPTIONS that it does not have yet get their defaults, and so
    does what YOUNGER names.

    Before they were there, "diffusion" and "sampler" held the options of what they named, and block diffusion was an
    objective of its own. Raises ValueError for what cannot be said in the new sections.
    """
    new, wanted = dict(stored), base().to_dict()
    if not any(section in stored for section in OPTIONS):
        new |= {section: wanted[section] for section in OPTIONS}
        for section in ("diffusion", "sampler"):
            if not isinstance(stored.get(section), Mapping) or "name" not in stored[section]:
                raise ValueError(f"config.{section}.name is missing, or not a key of this version")
        new["diffusion"] = _translated_objective(new, dict(stored["diffusion"]))
        sampler = dict(stored["sampler"])
        new["sampler"] = {"name": sampler.pop("name")}
        _fill(new, "samplers", new["sampler"]["name"], sampler, "sampler")
    for section in OPTIONS:
        if isinstance(new.get(section), Mapping):
            entries = dict(new[section])
            for name, options in wanted[section].items():
                if isinstance(entries.get(name, {}), Mapping):
                    entries[name] = options | entries.get(name, {})
            new[section] = entries
    for name in YOUNGER:
        new = _completed(new, wanted, name.split("."))
    return new


def _completed(stored: Any, wanted: Mapping[str, Any], path: Sequence[str]) -> Any:
    """`stored` with what `wanted` has at the path, if the section that it belongs to is there without it."""
    key, *rest = path
    if not isinstance(stored, Mapping) or (rest and key not in stored):
        return stored
    return {**stored, key: _completed(stored[key], wanted[key], rest) if rest else stored.get(key, wanted[key])}


def _translated_objective(new: dict[str, Any], old: dict[str, Any]) -> dict[str, Any]:
    """The section "diffusion" for the options of an old one, which go into their sections in `new`."""
    name, schedule = old.pop("name"), old.pop("schedule", None)
    names = {"mdlm": ("mdlm", "whole"), "block_diffusion": ("mdlm", "blocks"), "autoregressive": (name, "whole")}
    if name not in names:
        raise ValueError(f"config.diffusion.name = {name!r} is no objective that an earlier version had")
    objective, layout = names[name]
    if layout == "blocks":
        options = {"sizes": "blocks", "causal_context": "causal_context", "keep_first": "keep_first"}
        given = {key: old.pop(was) for key, was in options.items() if was in old}
        _fill(new, "layouts", "blocks", given, "diffusion")
    if schedule is not None:
        if objective == "autoregressive" or not isinstance(schedule, Mapping) or "name" not in schedule:
            raise ValueError("config.diffusion.schedule is not a schedule of an objective")
        options = dict(schedule)
        schedule = options.pop("name")
        _fill(new, "schedules", schedule, options, "diffusion.schedule")
    _fill(new, "objectives", objective, old, "diffusion")
    own = schedule == "loglinear"  # as None says, which is what an experiment has today
    return {"name": objective, "schedule": None if own else schedule, "layout": layout}


def _fill(new: dict[str, Any], section: str, name: Any, options: Mapping[str, Any], was: str) -> None:
    """Puts the options that stood in the section `was` where they belong."""
    known = new[section].get(name) if isinstance(name, str) else None
    if known is None:
        raise ValueError(f"config.{was}.name = {name!r} is none that this version has")
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"config.{was}.{unknown[0]} is no option of {name!r} in this version")
    new[section] = new[section] | {name: known | options}


def _require_sections(stored: Mapping[str, Any]) -> None:
    """Raises ValueError unless `stored` has the sections and keys of `base`."""
    wanted = base().to_dict()
    for name in wanted | stored:
        section = wanted.get(name)
        if name not in stored or name not in wanted or isinstance(section, dict) != isinstance(stored[name], dict):
            raise ValueError(f"the section {name!r} is missing, or not one of this version")
        wrong: set[str] = set()
        if name in OPTIONS:
            for entry, options in section.items():
                if not isinstance(stored[name][entry], dict):
                    wrong.add(entry)
                elif keys := set(options) ^ set(stored[name][entry]):
                    wrong.add(f"{entry}.{min(keys)}")
        elif isinstance(section, dict):
            wrong = set(section) ^ set(stored[name])
        if wrong:
            raise ValueError(f"config.{name}.{min(wrong)} is missing, or not a key of this version")


def seal(value: Mapping[str, Any]) -> dict[str, Any]:
    """`value` with the SHA-256 of its JSON under "digest", by which `read_sealed` knows it again."""
    value = {k: v for k, v in value.items() if k != "digest"}
    return value | {"digest": files.digest(value)}


def read_sealed(path: str | os.PathLike) -> dict[str, Any]:
    """A sealed JSON file's value, without the digest. Raises OSError, or ValueError when it is not what was written."""
    value = read_json(path)
    digest = value.pop("digest", None)
    if seal(value)["digest"] != digest:
        raise ValueError("it was altered after it was written: put the original back")
    return value


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """A file that holds one JSON object. Raises OSError or ValueError."""
    try:
        value = json.loads(Path(path).read_bytes())
    except RecursionError:
        raise ValueError("its brackets are nested too deep") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds {type(value).__name__}, not an object")
    return value


def write_json(value: Any, path: str | os.PathLike) -> None:
    """Writes JSON through a temporary file, so that a kill leaves the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    temporary.replace(path)


_ARGUMENT = re.compile(r"--?(?:config(\.[^=]+)?(=.*)?|noconfig(\.[^=]+))", re.DOTALL)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(what `parse` takes of a command line, a value in one argument with its key; the other arguments)."""
    own, others, waiting = [], [], list(arguments)
    while waiting:
        argument = waiting.pop(0)
        match = _ARGUMENT.fullmatch(argument)
        if not match:
            others.append(argument)
            continue
        if match[2] is None and not match[3] and waiting and not waiting[0].startswith("-"):
            argument += "=" + waiting.pop(0)
        own.append(argument)
    return own, others


def changed(changes: Mapping[str, Any]) -> config_dict.ConfigDict:
    """`base` with other values of these keys, {"a.b": value}; a dict is a section. Locked."""
    c = base()
    for key, value in changes.items():
        *sections, leaf = key.split(".")
        node = c
        for name in sections:
            node = node[name]
        node[leaf] = config_dict.ConfigDict(value) if isinstance(value, Mapping) else value
    return c


def parse(arguments: Sequence[str], start: config_dict.ConfigDict | None = None) -> config_dict.ConfigDict:
    """The locked config of `--config=NAME[:arg] --config.a.b=VALUE ...` (the program's name left out).

    `start`: a config in place of a file's.

    Raises UserError for a missing or failing file, an unknown key (naming the nearest ones), a value of the wrong type,
    or an option of an objective, a schedule or a layout that is not chosen.
    """
    own, others = split(arguments)
    if others:
        raise UserError(f"Unknown argument {others[0]!r}: there are --config=NAME[:arg] and --config.KEY=VALUE.")
    files, overrides = [], []
    for argument in own:
        match = _ARGUMENT.fullmatch(argument)
        assert match is not None
        key, value, negated = match.groups()
        if negated:
            overrides.append((negated[1:], argument))
        elif key:
            overrides.append((key[1:], argument if value is None else f"--config{key}{value}"))
        else:
            files.append((value or "=")[1:])
    if start is None and (len(files) != 1 or not files[0]):
        raise UserError("--config must name one experiment, e.g. --config=quickstart (--list tells which there are).")
    config = load_experiment(files[0]) if start is None else start.copy_and_resolve_references()  # changed in place
    given: dict[str, str] = {}
    for key, override in overrides:
        _require_known(key, config)
        if given.setdefault(key, override) != override:
            raise UserError(f"config.{key} is given twice, {given[key]} and {override}: give it once.")
    nothing = {key: argument.endswith("=None") and _is_optional(key, config) for key, argument in overrides}
    argv = ["diffrwkv", *(argument for key, argument in overrides if not nothing[key])]
    values = flags.FlagValues()  # its own, so that a test or a notebook can parse again and again
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, lock_config=True, sys_argv=argv)
        values(argv)
    except (flags.Error, TypeError, ValueError) as e:
        raise UserError(_readable(e, config)) from None
    for key, argument in overrides:
        if nothing[key]:
            values.config.update_from_flattened_dict({key: None})
        elif isinstance(flatten(values.config).get(key), float | list):
            _require_exact(key, argument.partition("=")[2])
    flat = flatten(values.config)
    for key in given:
        section, _, rest = key.partition(".")
        entry = rest.partition(".")[0]
        choice = flat[_CHOOSES[section]] if section in _CHOOSES else entry
        choice = chosen(flat)[section] if choice is None else choice  # the objective's own schedule
        if choice != entry:
            raise UserError(
                f"config.{key} does nothing, for config.{_CHOOSES[section]} is {choice!r}: set that to {entry!r}, or "
                "leave the option out."
            )
    return values.config


def _is_optional(key: str, config: config_dict.ConfigDict) -> bool:
    """Whether the key may hold None."""
    return DEFAULTS.get(key, "") is None or flatten(config).get(key, "") is None


def _require_exact(key: str, text: str) -> None:
    """Raises UserError for a number in the text of which float() makes 0 or infinity, and which is neither; and for a
    set, which would be a list in some order.
    """
    if text.lstrip().startswith("{"):
        raise UserError(f"--config.{key}={text} is no list: write (1, 2), or (1,) for one number.")
    for number in re.findall(r"[^\s,()\[\]]+", text):
        try:
            typed, stored = decimal.Decimal(number), float(number)
        except (decimal.InvalidOperation, ValueError):
            continue
        if typed.is_finite() and (math.isinf(stored) or (stored == 0) != (typed == 0)):
            raise UserError(f"--config.{key}={text} does not fit a float, which makes {stored} of {number}.")


def at_home(path: str | os.PathLike, flag: str = "") -> Path:
    """The path, with ~ as the shell has it. Raises UserError, naming the flag, for a user who is not there."""
    try:
        return Path(path).expanduser()
    except RuntimeError as e:
        raise UserError(f"{flag}{path}: {e}") from None


def experiments() -> dict[str, Path]:
    """{name: file} of the experiments that come with diffrwkv, which `--config=NAME` takes from any folder."""
    here = Path(__file__).parent
    folder = here / "experiments"  # where it is installed
    if not folder.is_dir():
        folder = here.parents[1] / "experiments"  # in a checkout
    return {path.stem: path for path in sorted(folder.glob("*.py")) if "def get_config(" in path.read_text("utf-8")}


def summary(path: Path) -> str:
    """The first line of a file's docstring. Raises OSError."""
    text = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    return text.partition("\n")[0]


def experiment_file(name: str) -> Path:
    """The file of an experiment that comes with diffrwkv, by its name, or of a path. Raises UserError for neither."""
    ours = experiments()
    if name in ours:
        return ours[name]
    path = at_home(name, "--config=")
    if os.path.isfile(path):
        if path.suffix == ".py":
            return path
        raise UserError(f"--config={name}: an experiment is a Python file with get_config in it, such as NAME.py.")
    near = [path.stem] if path.stem in ours else difflib.get_close_matches(path.stem, ours, n=3)
    told = f"Did you mean: {', '.join(near)}?" if near else f"There are {', '.join(ours)}, or write the path of a file."
    what = (
        f"No config file {name!r}" if path.suffix == ".py" or path.name != name else f"No experiment is called {name!r}"
    )
    raise UserError(f"{what}. {told}")


def load_experiment(path: str) -> config_dict.ConfigDict:
    """`get_config(arg)` of `NAME:arg` or `FILE.py:arg`, or `get_config()` of either. Raises UserError."""
    name, *argument = path.split(":", 1)
    file = str(experiment_file(name))
    spec = importlib.util.spec_from_file_location("experiment", file)
    assert spec is not None and spec.loader is not None  # its suffix is that of Python
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config(*argument)
    except UserError:
        raise
    except Exception as e:
        line = [f.lineno for f in traceback.extract_tb(e.__traceback__) if f.filename == spec.origin]
        where = f"{file}, line {line[-1]}" if line else file
        raise UserError(f"{where}: {type(e).__name__}: {' '.join(str(e).split())}") from e


def _require_known(key: str, config: config_dict.ConfigDict) -> None:
    node = config
    for part in key.split("."):
        if not hasattr(node, "keys") or part not in node:
            break
        node = node[part]
    else:
        return
    names = list(flatten(config))
    near = near_keys(key, names)
    if not near:  # nothing alike: what its section holds
        section = key.split(".")[0]
        near = [n for n in names if n.startswith(section + ".")] or list(config.keys())
    hint = ", ".join("config." + n for n in near[:8])
    raise UserError(f"Unknown key config.{key}. Did you mean: {hint}?")


def near_keys(key: str, names: Iterable[str] = ()) -> list[str]:
    """Keys that may have been meant, likeliest first: spelt alike, of the same last part, or of its initials (lr).

    Args:
      names: the keys there are; those of `base` if none are given.
    """
    names = list(names) or list(DEFAULTS)
    last = key.rpartition(".")[2]
    leaves = {name: name.rpartition(".")[2] for name in names}
    short = [name for name, leaf in leaves.items() if last in (leaf, "".join(word[:1] for word in leaf.split("_")))]
    own = [name for name in short if name.partition(".")[0] == key.partition(".")[0]]
    return list(dict.fromkeys([*own, *difflib.get_close_matches(key, names, n=3, cutoff=0.6), *short]))


def _readable(error: BaseException, config: config_dict.ConfigDict) -> str:
    """One line of what absl raised about a value."""
    text = " ".join(str(error).split())
    if match := re.match(r"flag --config\.(\S+?)=(.*?): ", text):
        key, value = match[1], match[2]
        *sections, leaf = key.split(".")
        node = config
        for part in sections:
            node = node[part]
        if hasattr(node[leaf], "keys"):
            return f"config.{key} is a section: set its keys one by one, --config.{key}.KEY=VALUE."
        return f"--config.{key}={value} is not of type {node.get_type(leaf).__name__}."
    if match := re.match(r"Type <class 'NoneType'> of field (\S+) is not supported", text):
        return (
            f"{match[1]} is None in the experiment, which tells no type: set it there, to a value or to "
            "ml_collections.config_dict.placeholder(TYPE)."
        )
    return text


def seed(value: int | str, name: str = "seed") -> int:
    """The seed that `value` is, or spells. Raises UserError, naming it, for what is none: two seeds would be one."""
    try:
        number = int(value) if isinstance(value, str) else value
    except ValueError:
        raise UserError(f"{name} must be an integer, got {value!r}.") from None
    try:
        checks.check_seed(number, name)
    except ValueError as e:
        raise UserError(str(e)) from None
    return number


def check_at_least_one(**counts: Any) -> None:
    """Raises UserError for a count that is neither None nor an integer of at least 1."""
    for name, count in counts.items():
        if count is not None and (not isinstance(count, numbers.Integral) or count < 1):
            raise UserError(f"{name} must be at least 1, and an integer, got {count!r}.")


ANSWER_DRAWS = 128  # passes for an answer, unless another number is asked for: as LLaDA's


class ArgumentParser(argparse.ArgumentParser):
    """argparse, whose complaints are UserErrors and whose flags cannot be abbreviated, nor given two values."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)
        self.given: dict[str, Any] = {}
        for name in (None, "store"):
            self.register("action", name, _StoreOnce)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.given = {}
        args = sys.argv[1:] if args is None else list(args)
        if wrong := [arg for arg in args if re.fullmatch(r"--\w+=--", arg)]:  # argparse makes an empty list of it
            raise UserError(f"{wrong[0]}: -- is no value.")
        return super().parse_known_args(args, namespace)

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        args = sys.argv[1:] if args is None else list(args)
        for arg in itertools.takewhile(lambda arg: arg != "--", args):  # first, for argparse would miss another flag
            flag = arg.startswith("--") and " " not in arg  # as argparse has it: text with blanks is a value
            if flag and arg.partition("=")[0] not in self._option_string_actions:
                raise UserError(self._unknown(arg))
        namespace, rest = self.parse_known_args(args, namespace)
        if rest:
            raise UserError(self._unknown(rest[0]))
        return namespace

    def _unknown(self, argument: str) -> str:
        near = self.near(argument.partition("=")[0])
        hint = f"Did you mean: {', '.join(near)}?" if near else "--help lists the flags."
        return f"Unknown argument {argument!r}. {hint}"

    def near(self, flag: str) -> list[str]:
        """Flags that may have been meant."""
        name = "--" + flag.lstrip("-").replace("-", "_")
        known = [option for option in self._option_string_actions if option.startswith("--")]
        if name in known:
            return [name]
        begun = [option for option in known if len(name) > 4 and option.startswith(name)]
        return begun or difflib.get_close_matches(name, known, n=3, cutoff=0.7)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags).")


class _StoreOnce(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        first = parser.given.setdefault(self.dest, values)
        if first != values:
            raise UserError(f"{option_string} is given twice, {first!r} and {values!r}: give it once.")
        setattr(namespace, self.dest, values)
