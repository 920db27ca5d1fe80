"""Quality of samples against network passes and seconds, for every sampler.

    python -m benchmarks.peer_shakespeare --names birwkv dit ar_rwkv --seeds 1
    python -m benchmarks.blocks --names birwkv@16,1,4,64,0 --seeds 1
    taskset -c 1 python -m benchmarks.samplers --judge=runs/peer/ar_rwkv-1 --workdir=runs/peer/birwkv-1
    taskset -c 1 python -m benchmarks.samplers --judge=runs/peer/ar_rwkv-1 --workdir=runs/blocks/birwkv@16,1,4,64,0-1
    taskset -c 1 python -m benchmarks.samplers --judge=runs/peer/ar_rwkv-1 --workdir=runs/peer/dit-1 \\
      --samplers ancestral

The first two commands train the models that the committed results are of; any will do that have one tokenizer and one
text. Each sampler fills blank canvases of config.data.length under each of the SETTINGS that the model can be used
with, and the judge, an autoregressive model, scores what comes out. A sampler for causal models samples from the judge
itself, which then scores its own samples. The reference is validation text: as many chunks of the same length, spread
over the split.

One line of benchmarks/results/samplers.jsonl for each (model, sampler, options): the statistics of
`diffrwkv.diffusion.sample_quality`; "passes", the mean that a sample needed (over blocks, where it is made of them);
"cpu_seconds" and "wall_seconds" per sample, medians over batches. A batch takes the passes of its busiest sequence.
Compiling is left out: each program is called once before, with nothing to fill. On a machine that does other work as
well, compare CPU seconds. What is in the file is not measured again.
"""

import argparse
import itertools
import json
import pathlib

import jax
import numpy as np

from benchmarks.measure import RESULTS, origin, read
from diffrwkv import cli, config, denoiser, generation, sharding
from diffrwkv.canvas import canvases
from diffrwkv.config import UserError
from diffrwkv.diffusion.layouts import Blocks
from diffrwkv.diffusion.samplers import SAMPLERS
from diffrwkv.generation import fits
from diffrwkv.judging import RunJudge, figures, windowing
from diffrwkv.run import check_same_data, is_padded, load_data, load_run
from diffrwkv.suites.samples import draw
from diffrwkv.workdir import read_record

# {how the model is used: {sampler: its curves}}. A curve is arguments of `generation.build_sampler`; the one whose
# values are a tuple is what varies along it. A sampler of `SAMPLERS` without a line under "whole" runs with its
# defaults. At temperature 0, the default of those that go by confidence, all samples from a blank canvas are one and
# the same: one point shows it.
SETTINGS = {
    "whole": {
        "ancestral": [{"num_steps": (16, 32, 64, 128)}, {"top_p": 0.9, "num_steps": (16, 64)}],
        "confidence": [
            {"temperature": 0.0, "num_steps": (16,)},
            {"temperature": 1.0, "num_steps": (16, 64)},
            {"temperature": 1.0, "score": "random", "num_steps": (32,)},
            {"temperature": 1.0, "block": 32, "num_steps": (2, 8)},
            {"temperature": 1.0, "rule": "factor", "factor": (8.0, 4.0)},
            {"temperature": 1.0, "rule": "threshold", "threshold": (0.1,)},
        ],
        "ice": [{"temperature": 1.0, "num_steps": (32,)}],
        "prophet": [{"temperature": 1.0, "num_steps": (32,)}],
        "remdm": [
            {"strategy": "cap", "num_steps": (32, 64, 128)},
            {"strategy": "loop", "num_steps": (32, 64)},
            {"strategy": "conf", "num_steps": (32,)},
            {"strategy": "rescale", "num_steps": (32,)},
        ],
    },
    # Attention alone, with the approximate caches of Fast-dLLM; steps of a block of 32.
    "frozen": {
        "ancestral": [
            {"frozen_cache": "prefix", "block_size": 32, "num_steps": (2, 8, 16)},
            {"frozen_cache": "dual", "block_size": 32, "num_steps": (2, 8, 16)},
        ],
    },
    # Block diffusion, with its exact cache; steps of a block.
    "blocks": {
        "ancestral": [
            {"block_size": 1, "num_steps": (1,)},
            {"block_size": 4, "num_steps": (1, 2, 4, 8)},
            {"block_size": 16, "num_steps": (1, 4, 8, 16)},
            {"block_size": 64, "num_steps": (4, 16, 32)},
            {"block_size": 0, "num_steps": (16, 64)},
        ],
        "first_hitting": [{"block_size": (4, 16)}],
        "confidence": [{"block_size": 16, "temperature": 1.0, "num_steps": (4, 8)}],
        "pipelined": [{"block_size": 16, "temperature": 1.0, "threshold": (0.9, 0.5, 0.2)}],
    },
}
NAMES = tuple(SAMPLERS)
TEXT = "validation text"


def main(arguments=None):
    p = config.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--workdir", type=pathlib.Path, required=True, help="a diffusion model, as train left it")
    p.add_argument("--judge", type=pathlib.Path, required=True, help="an autoregressive model of the same text")
    p.add_argument("--samplers", nargs="+", default=list(NAMES), choices=NAMES, metavar="NAME")
    p.add_argument("--num", type=int, default=32, help="samples for each line")
    p.add_argument("--batch_size", type=int, default=8)
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--data_root", help="folder of the data, if not the one of training")
    p.add_argument("--out", type=pathlib.Path, default=RESULTS / "samplers.jsonl")
    args = p.parse_args(arguments)
    if args.batch_size < 1 or args.num < 2 or args.num % args.batch_size:
        raise UserError(f"--num = {args.num} must be at least 2 and a multiple of --batch_size = {args.batch_size}.")
    sharding.start_cpu_devices(1, args.batch_size)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    run, judge = (load_run(workdir, mesh) for workdir in (args.workdir, args.judge))
    dataset = matching_data(run, judge, args)
    setup = {
        "judge": about(judge),
        "data": dataset.info["name"],
        "length": dataset.length,
        "num": args.num,
        "batch_size": args.batch_size,
        "seed": args.seed,
    }
    done = {name_of(row): row for row in read(args.out)}
    if any(row[key] != value for row in done.values() for key, value in setup.items()):
        raise UserError(f"{args.out} holds lines of another judge or other samples: name another file with --out.")

    quality = judged_by(judge, args.batch_size)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for name, curve, varied in [(TEXT, {}, {}), *settings(run, args.samplers)]:
        row = {"sampler": name, "curve": curve, "varied": varied, "model": about(run)}
        if name_of(row) in done:
            continue
        if name == TEXT:
            tokens = validation_text(dataset, args.num)
        else:
            tokens, cost = generate(judge if is_causal(name) else run, name, curve | varied, args)
            row |= cost
        row |= quality(tokens) | {"sample": run.tokenizer.decode(tokens[0])} | setup | origin()
        with open(args.out, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps({k: v for k, v in row.items() if k not in setup}), flush=True)


def judged_by(judge, batch_size):
    """(tokens int32 [N, L]) -> the statistics under the judge, an autoregressive run."""
    judge = RunJudge(judge, "the judge")

    def quality(tokens):
        texts = [judge.run.tokenizer.decode(row) for row in tokens]
        window, stride = windowing(judge, tokens.shape[1], None)
        found = figures(judge, texts, list(tokens), window=window, stride=stride, batch_size=batch_size)
        return {key: value for key, value in found.items() if key != "counted"}

    return quality


def validation_text(dataset, num):
    """So many chunks, spread over the validation split: int32 [num, L]."""
    chosen = np.linspace(0, len(dataset.validation) - 1, num).astype(int)
    return np.stack([dataset.validation[int(i)] for i in chosen])


def matching_data(run, judge, args):
    """The data set of both models. Raises UserError where they do not fit together, or too little validates."""
    if run.objective.causal:
        raise UserError(f"--workdir={args.workdir} is autoregressive: name a diffusion model, and this one as --judge.")
    if not judge.objective.causal:
        raise UserError(f"--judge={args.judge} is a diffusion model: only an autoregressive one scores a text exactly.")
    if run.tokenizer.fingerprint != judge.tokenizer.fingerprint:
        raise UserError(f"--judge={args.judge} and --workdir={args.workdir} have two tokenizers: train them with one.")
    if is_padded(run.config):
        raise UserError("The samples are compared with whole rows of text: config.data.packing must be 'concat'.")
    dataset = load_data(run.config, args.data_root, tokenizer=run.tokenizer)
    for workdir in (args.workdir, args.judge):
        check_same_data(workdir, read_record(workdir)["data"], dataset)
    if len(dataset.validation) < args.num:
        raise UserError(
            f"--num = {args.num}, but {len(dataset.validation)} chunks validate: take no more samples than those."
        )
    return dataset


def about(run):
    """What a result line says of a model."""
    in_blocks = isinstance(run.objective.layout, Blocks)
    return {
        "pattern": run.config.model.pattern,
        "parameters": denoiser.count_parameters(run.params),
        "seed": run.config.seed,
        "step": run.step,
    } | ({"blocks": list(run.objective.layout.sizes)} if in_blocks else {})


def settings(run, names):
    """[(sampler, the options that its curve keeps, {the option that varies: its value})] of what the model allows."""
    if isinstance(run.objective.layout, Blocks):
        curves = SETTINGS["blocks"]
    else:
        fitting = [name for name, cls in SAMPLERS.items() if is_causal(name) or fits(cls, run.objective.process)]
        curves = {name: SETTINGS["whole"].get(name, [{}]) for name in fitting}
        if generation.attention_alone(run.config):
            curves = {name: [*curve, *SETTINGS["frozen"].get(name, [])] for name, curve in curves.items()}
    lines = []
    for name in names:
        for curve in curves.get(name, []):
            varied = {key: values for key, values in curve.items() if isinstance(values, tuple)}
            kept = {key: value for key, value in curve.items() if key not in varied}
            for values in itertools.product(*varied.values()):
                lines.append((name, kept, dict(zip(varied, values, strict=True))))
    return lines


def is_causal(name):
    return name in SAMPLERS and SAMPLERS[name].face == "step"


def name_of(row):
    """What tells two lines of one file apart. The text and the judge's own samples are the same for every model."""
    model = None if row["sampler"] == TEXT or is_causal(row["sampler"]) else row["model"]
    return json.dumps([model, row["sampler"], row["curve"] | row["varied"]], sort_keys=True)


def generate(run, name, options, args):
    """Samples int32 [num, L], and what they cost: passes, and seconds per sample."""
    sampler = generation.build_sampler(run.config, run.objective, name=name, **options)
    rows = canvases(run.config, run.tokenizer, num=args.num)
    drawn, cost = draw(run, sampler, rows, seed=args.seed, batch_size=args.batch_size, stop_at_eos=False)
    return drawn.tokens, {
        "passes": cost["passes"],
        "cpu_seconds": cost["cpu_seconds"],
        "wall_seconds": cost["seconds"],
    }


if __name__ == "__main__":
    cli.run_program(main)
