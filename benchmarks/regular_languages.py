"""What is lost on languages whose law is known: by the network, and by sampling in parallel alone.

    python -m benchmarks.regular_languages --backbones oracle                     # no training: every language
    python -m benchmarks.regular_languages --languages parity s3 --seeds 1 2 3    # every backbone
    python -m benchmarks.regular_languages --smoke --output /tmp/x.jsonl          # tiny, to see that it runs

Each run is experiments/regular_languages.py:LANGUAGE~BACKBONE. The backbone `oracle` is the exact posterior
(`diffrwkv.oracle`), sampled by the same samplers. A line for each (language, backbone, seed, steps) in the output:

    "entropy"     {length: log(number of words) in nats}
    "likelihood"  at each length: "gap", NELBO less entropy in nats per word, and its standard error; from left to right
                  the exact likelihood instead of the bound
    "samples"     at the training length for each order and number of passes, and beyond it with 8 symbols in a pass:
                  the share of whole samples that are words, and of different ones among all
    "infilling"   words with a hole of 1 or of a quarter in their middle, filled one symbol in a pass: the share from
                  which the right side is reached and accepted. From left to right nothing right of the hole is seen.
    "labelling"   the same backbone trained anew to label the automaton's state after each prefix of an input: accuracy
                  over all positions, and at the last. No sampling, and no masks.

Orders: `ancestral` reveals positions in a uniform order, `confidence` the surest predictions first, `left_to_right`
equal stretches; in all of them the symbols of a pass are drawn apart from each other, at temperature 1. `first_hitting`
reveals one in each pass, in a uniform order. A line that is there is not measured again.
"""

import argparse
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measure import RESULTS, ROOT, append, origin, read
from diffrwkv import cli, config, optim, sharding, train
from diffrwkv.config import UserError
from diffrwkv.denoiser import Denoiser, count_parameters
from diffrwkv.diffusion.cross_entropy import cross_entropy
from diffrwkv.diffusion.processes import Masked, Vocabulary
from diffrwkv.diffusion.samplers import Ancestral, Autoregressive, Confidence, FirstHitting, sequence_keys
from diffrwkv.languages import LANGUAGES, language
from diffrwkv.networks import face
from diffrwkv.oracle import oracle
from diffrwkv.run import load_run
from diffrwkv.scoring import score
from diffrwkv.train_step import init_state

LENGTH = 64  # of training
BACKBONES = (
    "birwkv",
    "birwkv_a2",
    "dit",
    "bimamba",
    "birwkv_hybrid",
    "ar_rwkv",
    "ar_rwkv_a2",
    "ar_transformer",
)
ORACLE = "oracle"
LEAST = 32  # samples, of the longest
IN_A_PASS = 8  # symbols, where a model is sampled beyond the length of its training
# What generates with so many passes at a length.
ORDERS = {
    "ancestral": lambda passes, length: Ancestral(num_steps=passes),
    "confidence": lambda passes, length: Confidence(num_steps=passes, temperature=1.0),
    "left_to_right": lambda passes, length: Confidence(num_steps=1, block=-(-length // passes), temperature=1.0),
}


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    sharding.start_cpu_devices(1, 1)
    done = {key_of(row) for row in read(args.output)}
    for seed in args.seeds:
        for name in args.languages:
            for backbone in args.backbones:
                key = (name, backbone, *((0, 0, None) if backbone == ORACLE else (seed, args.steps, args.label_steps)))
                if key in done:
                    continue
                begun = time.monotonic()
                row = of_oracle(name, args) if backbone == ORACLE else of_network(name, backbone, seed, args)
                append(args.output, row | origin())
                done.add(key)
                print(f"{name}~{backbone}, seed {key[2]}: {time.monotonic() - begun:.0f} s", flush=True)
                jax.clear_caches()


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--languages", nargs="+", default=list(LANGUAGES), choices=LANGUAGES, metavar="NAME")
    p.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=(ORACLE, *BACKBONES), metavar="NAME")
    p.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    p.add_argument("--steps", type=int, default=1500, help="of training")
    p.add_argument("--label_steps", type=int, default=500, help="of training the labels")
    p.add_argument("--lengths", nargs="+", type=int, default=[64, 128, 256, 512], help="to test at")
    p.add_argument("--passes", nargs="+", type=int, default=[2**i for i in range(9)], help="up to the length")
    p.add_argument("--oracle_lengths", nargs="+", type=int, default=[16, 64, 256], help="of the oracle's samples")
    p.add_argument("--num", type=int, default=256, help="samples of 64 symbols; fewer longer ones, at least 32")
    p.add_argument("--words", type=int, default=64, help="to score, at each length")
    p.add_argument("--draws", type=int, default=16, help="of the bound")
    p.add_argument("--set", nargs="+", default=[], help="config keys of the runs, as --config.a.b=VALUE without --")
    p.add_argument("--runs", type=pathlib.Path, default=ROOT / "runs" / "regular_languages", help="of the workdirs")
    p.add_argument("--output", type=pathlib.Path, default=RESULTS / "regular_languages.jsonl")
    p.add_argument("--smoke", action="store_true", help="one tiny run")
    args = p.parse_args(arguments)
    if args.smoke:
        args.languages, args.backbones, args.seeds = ["s3"], [ORACLE, "dit", "ar_transformer"], [1]
        args.steps, args.label_steps, args.lengths, args.passes, args.oracle_lengths = 2, 2, [64, 72], [1, 64], [64]
        args.num, args.words, args.draws = 8, 2, 2
        args.set += ["config.train.batch_size=4", "config.optim.warmup_steps=1"]
    return args


def key_of(row):
    return row["language"], row["backbone"], row["seed"], row["steps"], row.get("label_steps")


def of_oracle(name, args):
    """The row of the exact posterior: samples alone; its bound is the entropy."""
    lang = language(name)
    process = Masked(Vocabulary(len(lang.symbols) + 1, len(lang.symbols)))
    samples = []
    for length in args.oracle_lengths:
        samples += [
            generated(lang, process, lambda sampler: oracle(lang), order, sampler, length, args)
            for order, sampler in samplers_at(length, args.passes)
        ]
    return {
        "language": name,
        "backbone": ORACLE,
        "seed": 0,
        "steps": 0,
        "entropy": {length: lang.log_count(length) for length in args.oracle_lengths},
        "samples": samples,
    }


def of_network(name, backbone, seed, args):
    """The row of a network: trained, scored, sampled; and trained anew to label states."""
    lang, workdir = language(name), args.runs / f"{name}~{backbone}-{seed}-{args.steps}"
    overrides = [
        f"--config.seed={seed}",
        f"--config.train.num_steps={args.steps}",
        "--config.train.cpu_devices=1",
        "--config.train.tensorboard=False",
        *(f"--{key}" for key in args.set),
    ]
    cfg = config.parse([f"--config={ROOT}/experiments/regular_languages.py:{name}~{backbone}", *overrides])
    begun = time.monotonic()
    if not train.run(cfg, workdir):
        raise UserError(f"{workdir} is no whole run: start the same command again.")
    seconds = time.monotonic() - begun
    run = load_run(workdir, sharding.make_mesh(devices=jax.devices()[:1]))
    if (run.tokenizer.alphabet, run.step) != (lang.symbols, args.steps):
        raise UserError(f"{workdir} holds another run: remove it, or name another folder with --runs.")

    def network(sampler):
        return face(run.model, run.objective, run.params, sampler)

    process = run.objective.process
    fill_in = Autoregressive() if run.objective.causal else FirstHitting()
    samples, likelihood, infilling = [], [], []
    for length in args.lengths:
        likelihood.append(scored(run, lang, length, args))
        if run.objective.causal:
            orders = [("autoregressive", Autoregressive())]
        elif length == LENGTH:
            orders = samplers_at(length, args.passes)
        else:
            orders = [("ancestral", Ancestral(num_steps=length // IN_A_PASS))]
        samples += [generated(lang, process, network, order, sampler, length, args) for order, sampler in orders]
    for hole in (1, LENGTH // 4):
        infilling.append(infilled(lang, process, network, fill_in, hole, args))
    return {
        "language": name,
        "backbone": backbone,
        "seed": seed,
        "steps": args.steps,
        "parameters": count_parameters(run.params),
        "batch_size": cfg.train.batch_size,
        "train_seconds": seconds,
        "entropy": {length: lang.log_count(length) for length in args.lengths},
        "likelihood": likelihood,
        "samples": samples,
        "infilling": infilling,
        "labelling": labelled(cfg, lang.tracks, seed, args),
        "label_steps": args.label_steps,
    }


def samplers_at(length, passes):
    """[(order, sampler)] of each order and number of passes."""
    named = [(order, make(k, length)) for order, make in ORDERS.items() for k in passes if k <= length]
    return [*named, ("first_hitting", FirstHitting())]


def number_at(length, args):
    return max(min(args.num, LEAST), args.num * LENGTH // length)


def generated(lang, process, network, order, sampler, length, args):
    """How good whole samples are, from blank canvases."""
    canvas = np.full((number_at(length, args), length), len(lang.symbols), np.int32)
    tokens, passes = filled(process, network, sampler, canvas)
    return {
        "order": order,
        "length": length,
        "steps": steps_of(sampler, length),
        "passes": float(passes.mean()),
        "num": len(tokens),
        "valid": float(lang.valid(tokens).mean()),
        "distinct": len(np.unique(tokens, axis=0)) / len(tokens),
        "sample": lang.decode(tokens[:1])[0],
    }


def steps_of(sampler, length):
    """The passes that were asked for."""
    if isinstance(sampler, Confidence) and sampler.block is not None:
        return -(-length // sampler.block)
    return getattr(sampler, "num_steps", length)


def infilled(lang, process, network, sampler, hole, args):
    """The share of words whose hole is filled so that the right side is reached and accepted."""
    canvas = lang.sample(LENGTH, args.num, seed=3)
    start = (LENGTH - hole) // 2
    canvas[:, start : start + hole] = len(lang.symbols)
    assert lang.completable(canvas).all()
    tokens, _ = filled(process, network, sampler, canvas)
    return {"length": LENGTH, "hole": hole, "num": args.num, "accuracy": float(lang.valid(tokens).mean())}


def filled(process, network, sampler, canvas):
    """(tokens, passes) of canvases [N, L], at most 256 at a time."""

    @jax.jit
    def fill(keys, canvas):
        samples = sampler(process, network(sampler), keys, canvas)
        return samples.tokens, samples.passes

    keys = sequence_keys(0, len(canvas))
    parts = [jax.device_get(fill(keys[i : i + 256], canvas[i : i + 256])) for i in range(0, len(canvas), 256)]
    tokens, passes = zip(*parts, strict=True)
    return np.concatenate(tokens), np.concatenate(passes)


def scored(run, lang, length, args):
    """NELBO less entropy, in nats per word: what the model's law is away from the language's, at most."""
    words = lang.decode(lang.sample(length, args.words, seed=2))
    scores = score(run, words, draws=args.draws, length=length, batch_size=max(1, 4096 // length))
    nats = np.asarray([s.nats for s in scores])
    gap = float(nats.mean() - lang.log_count(length))
    # over words and draws together: the draws' error is in the spread of the words' nats
    return {"length": length, "gap": gap, "gap_se": float(nats.std(ddof=1) / len(nats) ** 0.5), "words": len(nats)}


def labelled(cfg, lang, seed, args):
    """A network of the same backbone that labels the state after each prefix, at the lengths."""
    size = max(len(lang.symbols), lang.num_states) + 1
    model = Denoiser(vocab_size=size, **cfg.model.to_dict())
    boxed = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, LENGTH), jnp.int32), jnp.zeros(1))["params"]
    tx, _ = optim.make_optimizer(boxed, args.label_steps, **cfg.optim.to_dict())
    state = init_state(model, tx, LENGTH, jax.random.key(seed))
    params, opt_state = state["params"], state["opt_state"]

    @jax.jit
    def step(params, opt_state, words, labels):
        def loss(params):
            return cross_entropy(model.apply({"params": params}, words), labels, size - 1).mean()

        updates, opt_state = tx.update(jax.grad(loss)(params), opt_state, params)
        return jax.tree.map(jnp.add, params, updates), opt_state

    @jax.jit
    def predict(params, words):
        return jnp.argmax(model.apply({"params": params}, words)[..., :-1], axis=-1)

    batch = cfg.train.batch_size
    words = lang.sample(LENGTH, args.label_steps * batch, seed=100 + seed)
    labels = lang.states(words)
    for i in range(0, len(words), batch):
        params, opt_state = step(params, opt_state, words[i : i + batch], labels[i : i + batch])
    rows = []
    for length in args.lengths:
        words = lang.sample(length, args.words, seed=2)
        right = np.asarray(predict(params, words)) == lang.states(words)
        rows.append({"length": length, "accuracy": float(right.mean()), "last": float(right[:, -1].mean())})
    return rows


if __name__ == "__main__":
    cli.run_program(main)
