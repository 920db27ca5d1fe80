"""The configuration: every key once, with a comment, and how a command line becomes one.

A section is exactly one constructor's keyword arguments: `Denoiser(**config.model)`, `load(**config.data)`.
An experiment file (`experiments/x.py`) has `get_config(arg=None)` that takes `base()` and changes it;
`--config=experiments/x.py:arg` names it, `--config.a.b=value` overrides one key. Only this module and the
programs know ConfigDict; everything below them takes plain values.
"""

import argparse
import difflib
import importlib.util
import json
import numbers
import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import config_dict, config_flags


class UserError(Exception):
    """A mistake of the user's, told in one sentence that says what to do. Programs print it and exit 2."""


def base() -> config_dict.ConfigDict:
    """Every key there is. Sizes suit a laptop; experiments/ holds the ones with a name."""
    c = config_dict.ConfigDict()
    c.seed = 0  # parameters, order of the data, times, masks, dropout: all derive from it

    # diffrwkv.data.load(**config.data)
    c.data = config_dict.ConfigDict()
    c.data.name = "python_reference"  # a name in data.sources.DATASETS, or a path to text
    c.data.root = config_dict.placeholder(str)  # where data lie; None: $DIFFRWKV_DATA, then the cache
    c.data.tokenizer = "char"  # "char" | "byte" | "gpt2" | "bpe:4096"
    c.data.length = 256  # tokens in a training sequence
    c.data.wrap = False  # MDLM's wrapping: each sequence is [BOS] ... [EOS], documents joined by EOS
    c.data.validation = config_dict.placeholder(str)  # text to validate on instead: a name or a path
    c.data.validation_fraction = 0.1  # the last part of a data set that has no split of its own
    c.data.packing = "concat"  # "concat": one long row, cut | "document": a padded row for each
    c.data.train_offsets = "chunks"  # sequences begin at multiples of length, or anywhere: "random"
    c.data.text_key = "text"  # the field of jsonl, csv or parquet that holds the text

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
    m = c.model.mixers.rwkv7 = config_dict.ConfigDict()  # causal RWKV-7
    m.head_dim = 64
    m.lora_ranks = config_dict.ConfigDict()
    m.a_scale = 1.0
    m.implementation = config_dict.placeholder(str)
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
    c.model.dropout = 0.0  # on both residual branches
    c.model.remat = False  # recompute blocks in the backward pass: less memory, about 1/3 more time
    c.model.scan_layers = False  # one compiled block for all layers: compiles faster when deep
    c.model.dtype = "float32"  # of activations ("bfloat16" on accelerators); parameters stay float32

    # diffrwkv.diffusion.objectives.from_config(mask_id=..., **config.diffusion)
    c.diffusion = config_dict.ConfigDict()
    c.diffusion.name = "mdlm"  # a name in objectives.OBJECTIVES
    c.diffusion.schedule = config_dict.create(name="loglinear", eps=1e-3)  # of schedules.SCHEDULES
    c.diffusion.time_eps = 1e-3  # t is drawn from [time_eps, 1]
    c.diffusion.low_discrepancy = True  # one t per 1/n-th of [0, 1], over the global batch
    # "block_diffusion" has options of its own, as "autoregressive" has none: presets.diffuse_blocks sets them

    # diffrwkv.diffusion.samplers.SAMPLERS[name](schedule=..., **rest). These are the options of "ancestral": an
    # experiment with another sampler has another section here, and `sample` takes --sampler=NAME --set KEY=VALUE.
    c.sampler = config_dict.ConfigDict()
    c.sampler.name = "ancestral"  # a name in samplers.SAMPLERS
    c.sampler.num_steps = 128  # steps from t = 1 to eps
    c.sampler.cache = True  # call the network only when something changed
    c.sampler.temperature = 1.0  # of the predicted tokens
    c.sampler.top_p = 1.0  # keep the smallest set of tokens with this much probability
    c.sampler.top_k = 0  # keep so many most probable tokens; 0: all
    c.sampler.eps = 1e-5  # the last t

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
    c.optim.decay_group = "rwkv7"  # what decays: "rwkv7" | "matrices" | "all"
    c.optim.rate_group = "none"  # learning rate per group: "none" | "rwkv7" (w0 twice)
    c.optim.clip_norm = 1.0  # global norm of the gradient; 0: no clipping

    # diffrwkv.train.run: the loop itself
    c.train = config_dict.ConfigDict()
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
    c.train.multihost = False  # call jax.distributed.initialize() first (TPU pods, several hosts)
    c.train.tensorboard = True  # event files beside metrics.jsonl
    c.train.wandb_project = config_dict.placeholder(str)  # needs the extra: pip install diffrwkv[wandb]
    c.train.compilation_cache = config_dict.placeholder(str)  # folder; None: compile anew each time
    c.lock()  # a misspelt key fails in an experiment file as on the command line
    return c


# A workdir may be continued under another value of these, and of no others. None of them enters the
# arithmetic of a step that is already done: how long to go on, what to report and keep, where the data
# lie, how to draw samples, and how the same batch is laid over devices (which changes rounding only).
RESUMABLE = (
    "data.root",
    "sampler.",
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
    "train.tensorboard",
    "train.wandb_project",
    "train.compilation_cache",
)


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"a.b": leaf} of a nested dict or ConfigDict; tuples read as lists, as JSON has them."""
    if not hasattr(config, "items"):
        return {prefix: list(config) if isinstance(config, tuple) else config}
    flat = {}
    for key, value in config.items():
        name = f"{prefix}.{key}" if prefix else key
        if hasattr(value, "items") and not len(value):
            flat[name] = {}
        else:
            flat |= flatten(value, name)
    return flat


def differences(stored: Any, given: Any) -> dict[str, tuple[Any, Any]]:
    """{"a.b": (stored value, given value)} of every leaf that is not the same; None for a missing one."""
    old, new = flatten(stored), flatten(given)
    keys = list(old) + [key for key in new if key not in old]
    return {k: (old.get(k), new.get(k)) for k in keys if old.get(k) != new.get(k)}


def resumable(key: str) -> bool:
    """Whether a run may be continued under another value of this key (see RESUMABLE)."""
    return any(key == name or (name.endswith(".") and key.startswith(name)) for name in RESUMABLE)


def save(config: config_dict.ConfigDict, path: str | os.PathLike) -> None:
    """Writes JSON, whole or not at all."""
    write_json(config.to_dict(), path)


def load(path: str | os.PathLike) -> config_dict.ConfigDict:
    """Reads what `save` wrote. Raises UserError when there is no such file or it is not JSON."""
    path = Path(path)
    try:
        return config_dict.ConfigDict(json.loads(path.read_text()))
    except FileNotFoundError:
        raise UserError(
            f"No {path.name} in {path.parent}: --workdir must name a folder written by `python -m diffrwkv.train`."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, AttributeError, TypeError) as e:
        raise UserError(f"{path} is not a configuration ({e}).") from None


def write_json(value: Any, path: str | os.PathLike) -> None:
    """Writes JSON through a temporary file, so that a kill leaves the old file or the new one."""
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(value, indent=2, allow_nan=False) + "\n")
    temporary.replace(path)


def parse(arguments: Sequence[str]) -> config_dict.ConfigDict:
    """The locked config of `--config=FILE[:arg] --config.a.b=VALUE ...` (the program's name left out).

    Raises UserError for a missing or failing file, an unknown key (naming the nearest ones) or a value of the wrong
    type.
    """
    files, overrides = [], []
    arguments = list(arguments)
    while arguments:
        argument = arguments.pop(0)
        match = re.fullmatch(r"--?(?:no)?config(\.[^=]+)?(=.*)?", argument, re.DOTALL)
        if not match:
            raise UserError(
                f"Unknown argument {argument!r}: there are --workdir=DIR, --config=FILE[:arg] and --config.KEY=VALUE."
            )
        key, value = match.groups()
        if value is None and arguments and not arguments[0].startswith("-"):
            value = "=" + arguments.pop(0)
        if key:
            overrides.append((key[1:], argument if value is None else f"--config{key}{value}"))
        else:
            files.append((value or "=")[1:])
    if len(files) != 1 or not files[0]:
        raise UserError("--config must name one experiment, e.g. --config=experiments/quickstart.py")
    config = load_experiment(files[0])
    given: dict[str, str] = {}
    for key, override in overrides:
        _require_known(key, config)
        if given.setdefault(key, override) != override:
            raise UserError(f"config.{key} is given twice, {given[key]} and {override}: give it once.")
    argv = ["diffrwkv", *(argument for _, argument in overrides)]
    values = flags.FlagValues()  # its own, so that a test or a notebook can parse again and again
    config_flags.DEFINE_config_dict("config", config, flag_values=values, lock_config=True, sys_argv=argv)
    try:
        values(argv)
    except (flags.Error, TypeError, ValueError) as e:
        raise UserError(_readable(e, config)) from None
    return values.config


def load_experiment(path: str) -> config_dict.ConfigDict:
    """`get_config(arg)` of `FILE.py:arg`, or `get_config()` of `FILE.py`. Raises UserError when that fails."""
    file, *argument = path.split(":", 1)
    spec = importlib.util.spec_from_file_location("experiment", file)
    if spec is None or not Path(file).is_file():
        raise UserError(f"No config file {file!r}: see experiments/ for those that come with diffrwkv.")
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
    near = difflib.get_close_matches(key, names, n=3, cutoff=0.6)
    last = key.rsplit(".", 1)[-1]
    near += [n for n in names if n not in near and n.rsplit(".", 1)[-1] == last]
    if not near:  # nothing alike: what its section holds
        section = key.split(".")[0]
        near = [n for n in names if n.startswith(section + ".")] or list(config.keys())
    hint = ", ".join("config." + n for n in near[:8])
    raise UserError(f"Unknown key config.{key}. Did you mean: {hint}?")


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
    return text


class ArgumentParser(argparse.ArgumentParser):
    """argparse, whose complaints are UserErrors and whose flags cannot be abbreviated, nor given two values."""

    def __init__(self, **kwargs: Any):
        super().__init__(allow_abbrev=False, **kwargs)
        self.given: dict[str, Any] = {}
        for name in (None, "store"):
            self.register("action", name, _StoreOnce)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        self.given = {}
        args = sys.argv[1:] if args is None else list(args)
        if wrong := [arg for arg in args if re.fullmatch(r"--\w+=--", arg)]:  # argparse makes an empty list of it
            raise UserError(f"{wrong[0]}: -- is no value.")
        return super().parse_known_args(args, namespace)

    def error(self, message: str):
        raise UserError(f"{message} (--help lists the flags).")


class _StoreOnce(argparse.Action):
    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        first = parser.given.setdefault(self.dest, values)
        if first != values:
            raise UserError(f"{option_string} is given twice, {first!r} and {values!r}: give it once.")
        setattr(namespace, self.dest, values)


def check_seed(name: str, seed: int) -> None:
    """Raises UserError for a seed beyond 32 bits, of which the random numbers would see the last 32 alone."""
    if not isinstance(seed, numbers.Integral) or not 0 <= seed < 2**32:
        raise UserError(f"{name} must be an integer from 0 to {2**32 - 1}, got {seed!r}.")


def use_huge_pages() -> None:
    """Starts this program anew with glibc's allocator on huge pages (Linux, once; does nothing elsewhere).

    XLA's CPU client allocates a step's buffers and gives them back, so every step touches fresh memory: with pages of
    4 KiB a training step of experiments/peer_shakespeare.py spent a third of its time in page faults
    (benchmarks/results/train_step_cpu.jsonl). glibc reads the setting at start only, hence the exec: same process id,
    same arguments. A GLIBC_TUNABLES that already speaks of hugetlb is left alone.
    """
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    if not sys.platform.startswith("linux") or "glibc.malloc.hugetlb" in tunables:
        return
    os.environ["GLIBC_TUNABLES"] = ":".join(filter(None, [tunables, "glibc.malloc.hugetlb=1"]))
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def run_program(main: Callable[[list[str] | None], None]) -> None:
    """Runs `main(None)` on huge pages; a UserError becomes one line on stderr and exit status 2."""
    use_huge_pages()
    sys.stdout.reconfigure(errors="backslashreplace")  # a terminal that has not all of Unicode
    try:
        main(None)
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
