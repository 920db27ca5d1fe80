"""What is lost on languages whose law is known: by the network, and by sampling in parallel alone.

    python -m benchmarks.regular_languages --backbones oracle                     # no training: every language
    python -m benchmarks.regular_languages --languages parity s3 --seeds 1 2 3    # every backbone
    python -m benchmarks.regular_languages --smoke --output /tmp/x.jsonl          # tiny, to see that it runs

A network is that of experiments/regular_languages.py:LANGUAGE~BACKBONE with its optimiser. It learns more cheaply, by
one recipe for all: words are drawn anew for each step, 1,024 symbols at a time, 16 symbols long in the first half of
the steps and 64 in the second, for long words alone teach little of what depends on all of their symbols. It has 128
ids for every language, most of which no word has, so that one compilation of a backbone serves all languages and
seeds. The backbone `oracle` is the exact posterior (`diffrwkv.oracle`), sampled by the same samplers. A line for each
(language, backbone, seed, steps) in the output:

    "entropy"     {length: log(number of words) in nats}
    "likelihood"  at each length: "gap", NELBO less entropy in nats per word, and its standard error. The entropy is the
                  exact posterior's NELBO, and both are taken of the same words with the same masks, so that nearly all
                  noise cancels. From left to right the exact likelihood instead of the bound. null where a state
                  passed float32's range, as it can with a_scale 2 on words longer than those of training
    "samples"     at the training length for each order and number of passes, and twice as long one by one: the share of
                  whole samples that are words, and of different ones among all
    "infilling"   words with a hole of 1 or of a quarter in their middle, filled one symbol in a pass, and longer words
                  with a hole of 1: the share from which the right side is reached and accepted. From left to right
                  nothing right of the hole is seen.
    "labelling"   the same backbone trained anew to label the automaton's state after each prefix of an input: accuracy
                  over all positions, and at the last. No sampling, and no masks.

Orders: `ancestral` reveals positions in a uniform order, `confidence` the surest predictions first, `left_to_right`
equal stretches; in all of them the symbols of a pass are drawn apart from each other, at temperature 1. `first_hitting`
reveals one in each pass, in a uniform order. Networks are sampled in the last three with one symbol in a pass, where
the exact posterior makes nothing but words. A line that is there is not measured again.
"""

import argparse
import functools
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from benchmarks.measure import RESULTS, ROOT, append, origin, read
from diffrwkv import cli, config, optim, sharding
from diffrwkv.config import UserError
from diffrwkv.data.tokenizers import Char
from diffrwkv.denoiser import count_parameters
from diffrwkv.diffusion.cross_entropy import cross_entropy
from diffrwkv.diffusion.processes import Masked, Vocabulary
from diffrwkv.diffusion.samplers import Ancestral, Autoregressive, Confidence, FirstHitting, sequence_keys
from diffrwkv.diffusion.times import early_times
from diffrwkv.languages import LANGUAGES, language
from diffrwkv.networks import face, network_fn
from diffrwkv.oracle import oracle
from diffrwkv.run import abstract_params, build, make_optimizer
from diffrwkv.train_step import init_state, make_train_step

LENGTH = 64  # of training
SHORT = 16  # of the words that training begins with
ORDER = ("s3", "parity", "s5", "cycle_navigation", "modular_arithmetic", "dyck", "even_pairs", "a5")
BACKBONES = (
    "birwkv",
    "birwkv_a2",
    "dit",
    "bimamba",
    "birwkv_hybrid",
    "ar_rwkv",
    "ar_transformer",
    "ar_rwkv_a2",
)
ORACLE = "oracle"
IDS = Char("".join(map(chr, range(0x1000, 0x107F))))  # of every network: more than any language has, and a mask
LEAST = 32  # samples, of the longest
# What generates with so many passes at a length.
ORDERS = {
    "ancestral": lambda passes, length: Ancestral(num_steps=passes),
    "confidence": lambda passes, length: Confidence(num_steps=passes, temperature=1.0),
    "left_to_right": lambda passes, length: Confidence(num_steps=1, block=-(-length // passes), temperature=1.0),
}


def main(arguments: list[str] | None = None) -> None:
    args = parse_arguments(arguments)
    sharding.start_cpu_devices(1, 1)
    done, networks = {key_of(row) for row in read(args.output)}, {}
    for name in args.languages:
        for seed in args.seeds:
            for backbone in args.backbones:
                key = (name, backbone, *((0, 0, None) if backbone == ORACLE else (seed, args.steps, args.label_steps)))
                if key in done:
                    continue
                begun = time.process_time()
                if backbone == ORACLE:
                    row = of_oracle(name, args)
                else:
                    if backbone not in networks:
                        networks[backbone] = Network(backbone, args)
                    row = of_network(networks[backbone], name, seed, args)
                row |= {"cpu_seconds": round(time.process_time() - begun, 1)}
                append(args.output, row | origin())
                done.add(key)
                print(f"{name}~{backbone}, seed {key[2]}: {row['cpu_seconds']:.0f} CPU seconds", flush=True)


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--languages", nargs="+", default=list(ORDER), choices=LANGUAGES, metavar="NAME")
    p.add_argument("--backbones", nargs="+", default=list(BACKBONES), choices=(ORACLE, *BACKBONES), metavar="NAME")
    p.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    p.add_argument("--steps", type=int, default=600, help="of training")
    p.add_argument("--label_steps", type=int, default=600, help="of training the labels")
    p.add_argument("--batch_size", type=int, default=16, help="words of 64 symbols in a step; more short ones")
    p.add_argument("--lengths", nargs="+", type=int, default=[64, 128, 512], help="to test at")
    p.add_argument("--sample_lengths", nargs="+", type=int, default=[64, 128], help="to sample at, one by one")
    p.add_argument("--passes", nargs="+", type=int, default=[1, 4, 16, 64], help="up to the length")
    p.add_argument("--oracle_lengths", nargs="+", type=int, default=[16, 64, 128], help="of the oracle's samples")
    p.add_argument("--num", type=int, default=64, help="samples of 64 symbols; fewer longer ones, at least 32")
    p.add_argument("--words", type=int, default=1024, help="of 64 symbols to score; fewer longer ones, at least 32")
    p.add_argument("--set", nargs="+", default=[], help="config keys of the runs, as --config.a.b=VALUE without --")
    p.add_argument("--output", type=pathlib.Path, default=RESULTS / "regular_languages.jsonl")
    p.add_argument("--smoke", action="store_true", help="one tiny run")
    args = p.parse_args(arguments)
    if args.smoke:
        args.languages, args.backbones, args.seeds = ["s3"], [ORACLE, "dit", "ar_transformer"], [1]
        args.steps, args.label_steps, args.lengths, args.passes = 2, 2, [64, 72], [1, 64]
        args.sample_lengths, args.oracle_lengths, args.num, args.words = [64], [64], 8, 32
        args.batch_size, args.set = 4, [*args.set, "config.optim.warmup_steps=1"]
    return args


def key_of(row):
    return row["language"], row["backbone"], row["seed"], row["steps"], row.get("label_steps")


# --- The oracle -------------------------------------------------------------------------------------------------------


def of_oracle(name, args):
    """The row of the exact posterior: samples alone; its bound is the entropy."""
    lang = language(name)
    process = Masked(Vocabulary(len(lang.symbols) + 1, len(lang.symbols)))
    samples = []
    for length in args.oracle_lengths:
        named = [(order, make(k, length)) for order, make in ORDERS.items() for k in args.passes if k <= length]
        for order, sampler in [*named, ("first_hitting", FirstHitting())]:
            fill = jax.jit(functools.partial(sampler, process, oracle(lang)))
            samples.append(generated(lang, fill, order, sampler, length, len(lang.symbols), args))
    return {
        "language": name,
        "backbone": ORACLE,
        "seed": 0,
        "steps": 0,
        "entropy": {length: lang.log_count(length) for length in args.oracle_lengths},
        "samples": samples,
    }


@functools.cache
def exact_nats(name, objective, length, number):
    """What `in_parts` finds for the exact posterior; its mean is the entropy but for noise."""
    exact = oracle(language(name), IDS.vocab_size)
    nats = jax.jit(lambda *given: objective.loss(exact, *given).nats)
    return in_parts(nats, name, objective, length, number)


def in_parts(nats, name, objective, length, number):
    """Draws of the bound of words of a language, the same words and noise for whatever network: float64 [number].

    Args:
      nats: (key, words [B, L], t [B]) -> [B], 8,192 symbols at a time.
    """
    words, rng = language(name).sample(length, number, seed=2), np.random.default_rng(5)
    if objective.causal:
        t, weights = np.zeros(number, np.float32), np.ones(number)
    else:
        t, weights = early_times((np.arange(number) + rng.random(number)) / number, objective.time_eps)
    rows, key = min(number, 8192 // length), jax.random.key(6)
    parts = [nats(jax.random.fold_in(key, i), words[i : i + rows], t[i : i + rows]) for i in range(0, number, rows)]
    return np.concatenate(jax.device_get(parts)) * weights.astype(np.float64)


# --- A network --------------------------------------------------------------------------------------------------------


class Network:
    """A backbone, and all that is done with its weights: each thing compiled once, for every language and seed."""

    def __init__(self, backbone, args):
        cfg = config.parse(
            [
                f"--config={ROOT}/experiments/regular_languages.py:s3~{backbone}",
                f"--config.train.num_steps={args.steps}",
                f"--config.train.batch_size={args.batch_size}",
                *(f"--{key}" for key in args.set),
            ]
        )
        self.backbone, self.args = backbone, args
        self.model, self.objective = model, objective = build(cfg, IDS)
        abstract = nn.unbox(abstract_params(model, LENGTH))
        tx, _ = make_optimizer(cfg, abstract)
        label_tx, _ = optim.make_optimizer(abstract, args.label_steps, **cfg.optim.to_dict())

        def step(state, key, words, number):
            train_step = make_train_step(model, objective, tx, key, ema_decay=cfg.train.ema_decay)
            return train_step(state, {"tokens": words, "valid": jnp.ones(words.shape, bool)}, number)[0]

        def label_step(state, words, labels):
            def loss(params):
                return cross_entropy(model.apply({"params": params}, words), labels, IDS.mask_id).mean()

            params, opt_state = state
            updates, opt_state = label_tx.update(jax.grad(loss)(params), opt_state, params)
            return jax.tree.map(jnp.add, params, updates), opt_state

        def label(params, words):
            return jnp.argmax(model.apply({"params": params}, words)[..., :-1], axis=-1)

        def fill(sampler, params, keys, canvas):
            return sampler(objective.process, face(model, objective, params, sampler), keys, canvas)

        def nats(params, *given):
            return objective.loss(network_fn(model, params), *given).nats

        self._init = jax.jit(lambda key: init_state(model, tx, LENGTH, key, objective=objective))
        self._init_labels = jax.jit(label_tx.init)
        self._step = jax.jit(step, donate_argnums=0)
        self._label_step = jax.jit(label_step, donate_argnums=0)
        self._label = jax.jit(label)
        self._fill = jax.jit(fill, static_argnums=0)
        self._nats = jax.jit(nats)

    def train(self, lang, seed):
        """The moving average of the weights after training."""
        init_key, train_key = jax.random.split(jax.random.key(seed))
        state = self._init(init_key)
        for number, words in enumerate(self._batches(lang, seed, self.args.steps)):
            state = self._step(state, train_key, words, np.int32(number))
        if int(state["step"]) != self.args.steps:
            raise UserError(f"{lang.name}~{self.backbone}, seed {seed}, diverged at step {int(state['step'])}.")
        return state["ema"]

    def _batches(self, lang, seed, steps):
        """Words of each step, int32 [B, L]; in the first half of the steps short ones, and as many symbols."""
        symbols = self.args.batch_size * LENGTH
        for part, (length, number) in enumerate(((SHORT, steps // 2), (LENGTH, steps - steps // 2))):
            words = lang.sample(length, number * symbols // length, seed=100 + 2 * seed + part)
            yield from words.reshape(number, -1, length)

    def filler(self, sampler, params):
        """(keys, canvas) -> Samples."""
        return functools.partial(self._fill, sampler, params)

    def gap(self, params, name, length):
        """NELBO less entropy, in nats per word: what the model's law is away from the language's, at most."""
        number = number_at(length, self.args.words)
        nats = in_parts(functools.partial(self._nats, params), name, self.objective, length, number)
        if self.objective.causal:
            over = nats - language(name).log_count(length)
        else:
            over = nats - exact_nats(name, self.objective, length, number)
        finite = bool(np.isfinite(over).all())
        return {
            "length": length,
            "gap": float(over.mean()) if finite else None,
            "gap_se": float(over.std(ddof=1) / number**0.5) if finite else None,
            "words": number,
        }

    def labelling(self, lang, seed):
        """How well the same backbone labels the state after each prefix, at the lengths."""
        params = self._init(jax.random.key(seed))["params"]
        state = params, self._init_labels(params)
        for words in self._batches(lang, seed, self.args.label_steps):
            state = self._label_step(state, words, lang.states(words))
        rows = []
        for length in self.args.lengths:
            words = lang.sample(length, number_at(length, self.args.words), seed=2)
            rows_at = 8192 // length
            parts = [self._label(state[0], words[i : i + rows_at]) for i in range(0, len(words), rows_at)]
            right = np.concatenate(jax.device_get(parts)) == lang.states(words)
            rows.append({"length": length, "accuracy": float(right.mean()), "last": float(right[:, -1].mean())})
        return rows


def of_network(network, name, seed, args):
    """The row of a network: trained, scored, sampled; and trained anew to label states."""
    lang, causal = language(name), network.objective.causal
    params = network.train(lang, seed)
    one_by_one = Autoregressive() if causal else FirstHitting()
    settings = [("autoregressive" if causal else "first_hitting", one_by_one, length) for length in args.sample_lengths]
    if not causal:
        settings += [("ancestral", ORDERS["ancestral"](passes, LENGTH), LENGTH) for passes in args.passes]
        settings += [(order, ORDERS[order](LENGTH, LENGTH), LENGTH) for order in ("confidence", "left_to_right")]
    holes = [(LENGTH, 1), (LENGTH, LENGTH // 4), *((length, 1) for length in args.lengths if length != LENGTH)]
    return {
        "language": name,
        "backbone": network.backbone,
        "seed": seed,
        "steps": args.steps,
        "parameters": count_parameters(params),
        "symbols": args.batch_size * LENGTH,
        "entropy": {length: lang.log_count(length) for length in args.lengths},
        "likelihood": [network.gap(params, name, length) for length in args.lengths],
        "samples": [
            generated(lang, network.filler(sampler, params), order, sampler, length, IDS.mask_id, args)
            for order, sampler, length in settings
        ],
        "infilling": [infilled(lang, network.filler(one_by_one, params), *hole, args) for hole in holes],
        "labelling": network.labelling(lang.tracks, seed),
        "label_steps": args.label_steps,
    }


# --- Samples ----------------------------------------------------------------------------------------------------------


def number_at(length, number):
    """How many words of a length stand for so many of 64 symbols."""
    return max(min(number, LEAST), number * LENGTH // length)


def generated(lang, fill, order, sampler, length, mask_id, args):
    """How good whole samples are, from blank canvases."""
    canvas = np.full((number_at(length, args.num), length), mask_id, np.int32)
    tokens, passes = filled(fill, canvas)
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


def infilled(lang, fill, length, hole, args):
    """The share of words whose hole is filled so that the right side is reached and accepted."""
    canvas = lang.sample(length, number_at(length, args.num), seed=3)
    start = (length - hole) // 2
    canvas[:, start : start + hole] = IDS.mask_id
    assert lang.completable(canvas).all()
    tokens, _ = filled(fill, canvas)
    return {"length": length, "hole": hole, "num": len(canvas), "accuracy": float(lang.valid(tokens).mean())}


def filled(fill, canvas):
    """(tokens, passes) of canvases [N, L], at most 256 at a time."""
    keys = sequence_keys(0, len(canvas))
    parts = [jax.device_get(fill(keys[i : i + 256], canvas[i : i + 256])) for i in range(0, len(canvas), 256)]
    return np.concatenate([part.tokens for part in parts]), np.concatenate([part.passes for part in parts])


if __name__ == "__main__":
    cli.run_program(main)
