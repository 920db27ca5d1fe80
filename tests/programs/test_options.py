"""Every option of every constructor and of the config: taken exactly, or refused in one sentence that names it."""

import ast
import dataclasses
import functools
import math
import random
import re
import resource
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from diffrwkv import checks, config, data, generation, optim, presets, sharding, train
from diffrwkv.checks import Range
from diffrwkv.cli import sample as sample_flags
from diffrwkv.cli.suites import likelihood
from diffrwkv.config import UserError
from diffrwkv.denoiser import Denoiser, count_parameters
from diffrwkv.diffusion import objectives, samplers, schedules
from diffrwkv.diffusion.layouts import LAYOUTS
from diffrwkv.diffusion.processes import Masked, Vocabulary
from diffrwkv.mixers import CHANNEL_MIXERS, MIXERS, Place
from diffrwkv.run import abstract_params, build

NAN, INF = float("nan"), float("inf")
BASE = config.base()
LEAVES = config.flatten(BASE)
NUMBERS = {k: v for k, v in LEAVES.items() if isinstance(v, int | float) and not isinstance(v, bool)}


def kind_of(key):
    """ "int", "float", ...: the type of a key, also of one that is None by default."""
    *sections, leaf = key.split(".")
    section = BASE
    for name in sections:
        section = section[name]
    return section.get_type(leaf).__name__


OR_NONE = {k for k, v in LEAVES.items() if v is None and kind_of(k) in ("int", "float")}  # numbers too
NO_NUMBERS = (NAN, INF, -INF, 1e300, 10**39, "3", "", True, None, [1], (), {}, 1j)


# --- The table ------------------------------------------------------------------------------------------------------


def test_every_number_of_the_config_has_a_range():
    lora_ranks = {k for k, v in LEAVES.items() if v == {} and k.startswith("model.")}  # sections of numbers, by name
    assert set(config.RANGES) == set(NUMBERS) | OR_NONE | lora_ranks
    for key in set(NUMBERS) | OR_NONE:
        assert config.RANGES[key].integer == (kind_of(key) == "int"), key
    for key, value in NUMBERS.items():
        config.RANGES[key].check(key, value)


@pytest.mark.parametrize(
    "range_, right, wrong",
    [
        (Range(0, 1), [0, 1, 0.5, 1e-30], [-1e-9, 1.0001, 1e-300, NAN, INF, True, "0", None]),
        (Range(0, 1, open="low"), [1, 1e-30], [0, 0.0, 1e-46, 1e-39]),
        (Range(0, 1, open="high"), [0, 0.999], [1, 1 - 1e-12]),
        (Range(0, 1, open="both"), [0.5], [0, 1, 1 - 1e-12, 1e-46]),
        (Range(1, 5, integer=True), [1, 5], [0, 6, 1.0, 2.5, NAN, True, 10**5000]),
        (Range(1, 5, integer=True, also=-1), [-1, 1], [0, -2]),
        (Range(0, checks.FLOAT32_MOST), [0, 3.4e38], [3.5e38, 10**400, -1]),
    ],
)
def test_ranges(range_, right, wrong):
    for value in right:
        range_.check("x", value)
    for value in wrong:
        with pytest.raises(ValueError, match="^x must be .*, got ") as e:
            range_.check("x", value)
        assert len(str(e.value)) < 200


def test_what_float32_makes_of_a_number_is_told():
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 0.999999999999 \(1 in float32\)"):
        checks.BELOW_ONE.check("decay", 1 - 1e-12)


# --- Constructors ---------------------------------------------------------------------------------------------------


def build_objective(name, /, **options):
    return objectives.from_config(Vocabulary(9, 8), name=name, sections={"objectives": {name: options}})


def places():
    """(name, constructor of options, {field: default}) of everything that a section of the config builds."""

    def own(cls, *others):
        given = {f.name: f.default for f in dataclasses.fields(cls) if f.name not in (*others, "parent", "name")}
        return {k: v for k, v in given.items() if v is not dataclasses.MISSING}

    for name, cls in samplers.SAMPLERS.items():
        yield f"sampler {name}", cls, own(cls)
    for name, cls in schedules.SCHEDULES.items():
        yield f"schedule {name}", cls, own(cls)
    for name, cls in LAYOUTS.items():
        yield f"layout {name}", cls, own(cls)
    for name, entry in objectives.OBJECTIVES.items():
        yield f"objective {name}", functools.partial(build_objective, name), entry.options()
    yield "vocabulary", lambda **o: Vocabulary(**({"size": 9, "mask_id": 3} | o)), {"size": 9, "mask_id": 3}
    ancestral = samplers.Ancestral()
    yield "guided", lambda **o: samplers.Guided(ancestral, **o), {"scale": 1.0}
    yield (
        "block_cached",
        lambda **o: samplers.BlockCached(ancestral, **({"block": 4} | o)),
        {"block": 4, "stop_id": None},
    )
    yield "frozen_cache", lambda **o: samplers.FrozenCache(ancestral, **o), {"block": 4, "cache": "dual"}
    place = Place(64, 0, 2, True)
    for name, cls in MIXERS.items():
        yield f"mixer {name}", lambda cls=cls, **o: cls(place, **o), own(cls, "place", "implementation", "time_mix")
    for name, cls in CHANNEL_MIXERS.items():
        yield (
            f"channel mixer {name}",
            lambda cls=cls, **o: cls(place, **o),
            own(cls, "place", "implementation", "time_mix"),
        )
    yield "denoiser", lambda **o: Denoiser(**({"vocab_size": 9} | o)), own(Denoiser) | {"vocab_size": 9}
    options = config.base().optim.to_dict()
    yield "optimizer", lambda **o: optim.make_optimizer({}, 10, **(options | o)), options
    rates = {k: options[k] for k in ("warmup_steps", "decay_fraction", "final_fraction")}
    rates["num_steps"] = 9
    yield "rates", lambda **o: optim.learning_rate_schedule("wsd", 1e-3, **(rates | o)), rates


@pytest.mark.parametrize("name, build, options", [pytest.param(*place, id=place[0]) for place in places()])
def test_a_constructor_takes_its_numbers_and_no_other(name, build, options):
    build(**options)
    for field, default in options.items():
        wrong = {
            bool: (*(x for x in NO_NUMBERS if x is not True), 0, 1, "yes", "True"),
            int: (*NO_NUMBERS, -1, 1.5, 2.0),
            float: (*NO_NUMBERS, *(() if isinstance(default, float) and default < 0 else (-1, -1e-3))),
            str: (*NO_NUMBERS, "nonsense", 3),
            tuple: ((), (NAN,), ("1",), {}, "1", (-1,), (1e300,), True, None, (0.5, 0.25, -1)),
            type(None): (NAN, "3", -1, 1.5, True, (1,)),
        }[type(default)]
        for value in wrong:
            if (field == "lora_ranks" and value is None) or (
                field in ("mixers", "channel_mixers") and value in ((), {})
            ):
                continue  # RWKV-7's rule; each mixer's own defaults
            if field == "begins" and value == ():
                continue  # no schedule
            if field == "sizes" and value is True:
                value = (True,)
            with pytest.raises((ValueError, TypeError)) as e:
                build(**(options | {field: value}))
            assert field in str(e.value) and "\n" not in str(e.value), (field, value, str(e.value))


@pytest.mark.parametrize("key", sorted(config.RANGES))
def test_a_constructor_refuses_what_the_table_does(key):
    """No number passes a Python call that the command line refuses, where a section is one constructor."""
    range_, (*sections, field) = config.RANGES[key], key.split(".")
    c = config.base()
    builders = {
        "optim": lambda **o: optim.make_optimizer({}, 10, **(c.optim.to_dict() | o)),
        "model": lambda **o: Denoiser(9, **(c.model.to_dict() | o)),
    }
    for name, cls in MIXERS.items():
        builders[f"model.mixers.{name}"] = lambda cls=cls, **o: cls(Place(64, 0, 2, True), **o)
    for name, cls in CHANNEL_MIXERS.items():
        builders[f"model.channel_mixers.{name}"] = lambda cls=cls, **o: cls(Place(64, 0, 2, True), **o)
    tables = {"schedules": schedules.SCHEDULES, "samplers": samplers.SAMPLERS}
    for section, table in tables.items():
        builders |= {f"{section}.{name}": cls for name, cls in table.items()}
    for name in objectives.OBJECTIVES:
        builders[f"objectives.{name}"] = functools.partial(build_objective, name)
    build = builders.get(".".join(sections))
    if build is None:
        return  # data, train: functions whose checks these are
    step = 1 if range_.integer else max(1e-6, 1e-6 * abs(range_.high))
    for value in (range_.low - step, range_.high + step):
        given = {"w": value} if field == "lora_ranks" else value
        with pytest.raises(ValueError, match=field):
            build(**{field: given})


@pytest.mark.parametrize(
    "build, told",
    [
        (lambda: build_objective("nonsense"), "No objective is called 'nonsense'"),
        (lambda: build_objective("autoregressive", time_eps=0.1), "has no option time_eps; it has none"),
        (lambda: objectives.from_config(Vocabulary(9, 8), schedule={"name": "linear"}), "No schedule is called"),
        (lambda: objectives.from_config(Vocabulary(9, 8), name="autoregressive", schedule="linear"), "no schedule"),
        (lambda: objectives.from_config(Vocabulary(9, 8), name="autoregressive", layout="blocks"), "left to right"),
        (
            lambda: objectives.from_config(
                Vocabulary(9, 8), schedule="linear", sections={"schedules": {"linear": {"eps": 0.1}}}
            ),
            "no option eps",
        ),
        (lambda: Vocabulary(9, 9), "mask_id must be below"),
        (lambda: Denoiser(9, mixers={"attention": 3}), "mixers"),
        (lambda: Denoiser(9, mixers={"attention": {}}, channel_mixers={"mlpp": {}}), "unknown channel_mixer 'mlpp'"),
        (lambda: Denoiser(9, pattern="birwkv7*1000000000"), "write mixers and counts"),
        (lambda: Denoiser(9, pattern="birwkv7*00"), "write mixers and counts"),
        (lambda: Denoiser(9, num_layers=10**9), "num_layers must be at most"),
        (lambda: Denoiser(9, dtype="int8"), "dtype must be one of"),
        (lambda: MIXERS["attention"](Place(64, 0, 2, True), head_dim=5), "even head_dim"),
        (lambda: MIXERS["birwkv7"](Place(64, 0, 2, True), lora_ranks={"w": 0}), "lora_ranks.w"),
        (lambda: MIXERS["birwkv7"](Place(64, 0, 2, True), lora_ranks={"x": 3}), "lora_ranks names"),
        (lambda: MIXERS["birwkv7"](Place(64, 0, 2, True), lora_ranks=[3]), "lora_ranks must be"),
        (lambda: MIXERS["mamba2"](Place(64, 0, 2, True), num_groups=3), "num_groups 3 does not divide"),
        (lambda: CHANNEL_MIXERS["mlp"](Place(8, 0, 2, True), expansion=0.05), "leaves no hidden width"),
        (lambda: CHANNEL_MIXERS["rwkv7"](Place(8, 0, 2, True), expansion=0.05), "leaves no hidden width"),
        (lambda: optim.make_optimizer({}, 10, learning_rate=1.0, weight_decay=2.0), "beyond 0 in one step"),
        (lambda: presets.configure(config.base(), 3, "tiny"), "a backbone is named by text"),
        (lambda: presets.configure(config.base(), "dit", None), "no size is called None"),
        (lambda: presets.configure(config.base(), "dit/", "tiny"), "no size is called ''"),
        (lambda: presets.configure(config.base(), "birwkv@-4", "tiny"), "blocks are numbers"),
        (lambda: presets.configure(config.base(), "birwkv@", "tiny"), "blocks are numbers"),
        (lambda: presets.configure(config.base(), "birwkv@1e9", "tiny"), "blocks are numbers"),
        (lambda: presets.diffuse_blocks(config.base(), 16), "blocks are numbers"),
        (lambda: presets.configure(config.base(), "birwkv~", "tiny"), "no objective is called ''"),
    ],
)
def test_options_that_do_not_fit_are_named(build, told):
    with pytest.raises((ValueError, TypeError), match=re.escape(told)):
        build()


def test_an_objective_has_its_own_schedule():
    masked = objectives.from_config(Vocabulary(50, 49))
    assert masked == objectives.Diffusion(Masked(Vocabulary(50, 49), schedules.LogLinear()))
    assert samplers.from_config("confidence") == samplers.Confidence()
    c = config.base()
    assert objectives.from_config(Vocabulary(50, 49), **c.diffusion.to_dict(), sections=c.to_dict()) == masked


# --- Seeds ----------------------------------------------------------------------------------------------------------


def test_a_seed_is_32_bits_everywhere():
    dataset = types.SimpleNamespace(train=[0] * 8, train_offsets="chunks")
    c = config.base()

    def of_config(seed):
        c.seed = seed
        train.check(c)

    takers = (
        checks.check_seed,
        config.seed,
        of_config,
        lambda seed: samplers.sequence_keys(seed, 2),
        lambda seed: data.train_iterator(dataset, batch_size=2, seed=seed),
        lambda seed: generation.generate("no/such/run", seed=seed),
        lambda seed: generation.stream("no/such/run", seed=seed),
        lambda seed: likelihood.parse_arguments(["--workdir=x", f"--seed={seed}"]),
        lambda seed: sample_flags.parse_arguments(["--workdir=x", f"--seed={seed}"]),
    )
    for take in takers:
        for seed in (-1, 2**32, 2**32 + 7, 2**63, 10**30):
            with pytest.raises((ValueError, UserError), match="seed must be (an integer from 0|at (least|most))"):
                take(seed)
    for seed in ("x", "1.5", "1e3", ""):
        with pytest.raises(UserError, match="seed must be an integer"):
            likelihood.parse_arguments(["--workdir=x", f"--seed={seed}"])
    assert sample_flags.parse_arguments(["--workdir=x", "--seed=4294967295"]).seed == 2**32 - 1
    seeds = (0, 1, 2**31 - 1, 2**31, 2**32 - 1)
    keys = [jax.random.key_data(samplers.sequence_keys(seed, 1)).tobytes() for seed in seeds]
    assert len(set(keys)) == len(seeds)


@pytest.mark.parametrize("start", [-1, 2**32, 2**63, 1.5])
def test_the_number_of_a_sequence_is_not_cut_off(start):
    with pytest.raises(ValueError, match="start must be"):
        samplers.sequence_keys(0, 2, start)


# --- What decays ----------------------------------------------------------------------------------------------------

# The layers that torch's `.weight`s of two dimensions or more belong to, in RWKV-LM's, MDLM's and Mamba's own code;
# of a parameter's path the part behind the block.
DECAYS = {
    "birwkv7": {
        "embedding", "head", "att/receptance/kernel", "att/key/kernel", "att/value/kernel", "att/output/kernel",
        "ffn/key/kernel", "ffn/value/kernel",
    },
    "attention": {
        "embedding", "head", "att/qkv/kernel", "att/output/kernel", "ffn/up/kernel", "ffn/down/kernel",
        "modulate1/linear/kernel", "modulate2/linear/kernel", "modulate_out/linear/kernel",
        "time_embedding/hidden/kernel", "time_embedding/out/kernel",
    },
    "mamba2": {
        "embedding", "head", "att/in_proj/kernel", "att/out_proj/kernel", "att/conv_kernel", "ffn/up/kernel",
        "ffn/down/kernel",
    },
}  # fmt: skip
STAYS = {
    "birwkv7": {"att/forward/w1", "att/forward/w2", "att/m1", "att/forward/x_r", "att/forward/r_k", "ln0/scale"},
    "attention": {"head_bias", "ffn/up/bias", "ln1/scale", "modulate1/linear/bias"},
    "mamba2": {"att/A_log", "att/D", "att/dt_bias", "att/conv_bias", "att/norm_scale", "ln1/scale"},
}


@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("pattern", DECAYS)
def test_weight_decay_is_upstreams(pattern, scan_layers):
    options = {"block": {"birwkv7": "rwkv7", "attention": "dit", "mamba2": "transformer"}[pattern]}
    if pattern != "birwkv7":
        options["channel_mixer"] = "mlp"
    if pattern == "mamba2":
        options["channel_mixers"] = {"mlp": {"expansion": 2.0}}
    model = Denoiser(9, dim=64, num_layers=3, pattern=pattern, scan_layers=scan_layers, **options)
    params = nn.unbox(jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 2), jnp.int32))["params"])

    def chosen(group):
        mask = optim.DECAY_GROUPS[group](params)
        names = {}
        for path, decays in jax.tree_util.tree_leaves_with_path(mask):
            name = re.sub(r"^(blocks/)?block_\d+/", "", "/".join(k.key for k in path))
            names.setdefault(name, set()).add(decays)
        assert all(len(x) == 1 for x in names.values()), names  # all layers alike
        return {name for name, (decays,) in names.items() if decays}, set(names)

    upstream, names = chosen("rwkv7")
    assert upstream == DECAYS[pattern] and STAYS[pattern] <= names
    assert chosen("rwkv7_no_embedding")[0] == DECAYS[pattern] - {"embedding", "att/conv_kernel"}
    assert chosen("all")[0] == names


# --- The config -----------------------------------------------------------------------------------------------------

EXPERIMENT = """
from diffrwkv.config import base
from tests import tiny


def get_config(arg=None):
    c = base()
    c.model.dim, c.model.num_layers = 64, 2
    for mixer in c.model.mixers:
        c.model.mixers[mixer].update(tiny.fast(mixer))
    return c
"""

TEXTS = {
    "int": ["0", "1", "2", "7", "-1", "0x10", "1_0", " 3", "1.0", "1.5", "1e3", "nan", "inf", "", "True", "two", "None",
            "[1]", "(1,)", "{}", "4294967295", "4294967296", "9223372036854775808", "1000000000", "1" + "0" * 40,
            "1" + "0" * 5000],
    "float": ["0", "1", "0.5", "-0.5", "-1", "2", "-50", "1e-3", "1e-8", "1e-46", "1e-300", "1e-400", "1e38", "1e39",
              "1e300", "1e400", "-1e400", "nan", "inf", "-inf", "", "True", "half", "None", "[1.0]", "0.9999999999999"],
    "bool": ["True", "False", "true", "false", "1", "0", "2", "-1", "", "yes", "None", "1.0"],
    "str": ["", "nonsense", "None", "3", "birwkv7", "rwkv7", "attention,birwkv7", "mdlm", "mlp", "dit", "wsd"],
    "tuple": ["(1,2)", "(4,)", "4", "4,16", "[0.1, 0.9]", "(0.5, 0.25)", "(1,2,3)", "(nan, 1)", "(1e-400, 1)",
              "((1,),)", "(1,)*3", "('a',)", "x.__class__", "(True,)", "()", "", "None"],
}  # fmt: skip


def meaning(kind, text):
    """What a person means by the text: the value exactly, or None where it is none of this kind."""
    text = text.strip() if kind != "str" else text
    try:
        if kind == "int":
            return int(text, 16) if text.startswith("0x") else int(text) if len(text) < 4000 else None
        if kind == "float":
            value = float(text)
            lost = math.isinf(value) and "inf" not in text
            lost |= value == 0 and re.search("[1-9]", text.split("e")[0]) is not None
            return None if lost else value
    except ValueError:
        return None
    if kind == "bool":
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower())
    if kind == "tuple":
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            return [text]  # which constructors refuse
        return list(value) if isinstance(value, tuple | list) else [value]
    return text


def choosing(key):
    """Flags under which an option counts."""
    section, _, rest = key.partition(".")
    name = rest.partition(".")[0]
    if section == "objectives":
        fits = next(
            s for s, cls in samplers.SAMPLERS.items() if issubclass(objectives.OBJECTIVES[name].process, cls.needs)
        )
        return [f"--config.diffusion.name={name}", f"--config.sampler.name={fits}", "--config.model.time_conditioning"]
    return {
        "schedules": [f"--config.diffusion.schedule={name}"],
        "layouts": [f"--config.diffusion.layout={name}"],
    }.get(section, [])


def draws(number, seed):
    """(key, kind, text), each key at least twice."""
    drawn = random.Random(seed)
    keys = [key for key, value in LEAVES.items() if value != {}]
    for i in range(number):
        key = keys[i % len(keys)]
        kind = kind_of(key)
        yield key, kind, drawn.choice(TEXTS[kind])


def test_options_of_the_command_line(tmp_path, capsys):
    """A few hundred draws over all keys: stored as typed or refused in one line, quickly and in little memory."""
    (tmp_path / "x.py").write_text(EXPERIMENT)
    before = resource.getrusage(resource.RUSAGE_SELF)
    taken, refused, built = 0, 0, 0
    for key, kind, text in draws(400, seed=0):
        told = f"--config.{key}={text[:50]}"
        try:
            cfg = config.parse([f"--config={tmp_path / 'x.py'}", f"--config.{key}={text}", *choosing(key)])
            stored, meant = config.flatten(cfg)[key], meaning(kind, text)
            if LEAVES[key] is None and text == "None":
                meant = None
            assert stored == meant or (stored != stored and meant != meant), told
            assert type(stored).__name__ == {"tuple": "list"}.get(kind, kind) or stored is None, told
            train.check(cfg)
            if key in NUMBERS or (key in OR_NONE and stored is not None):
                config.RANGES[key].check(key, stored)
            if key.startswith("model.") and stored != LEAVES[key] and built < 10:
                built += 1
                model, _ = build(cfg, train.NO_TOKENIZER)
                abstract_params(model.clone(num_layers=min(model.num_layers, 2)), 4)
            taken += 1
        except UserError as e:
            assert "\n" not in str(e) and len(str(e)) < 6000, told
            refused += 1
    after = resource.getrusage(resource.RUSAGE_SELF)
    assert taken > 100 and refused > 150 and built == 10
    assert after.ru_maxrss - before.ru_maxrss < 2**20  # KiB: 1 GiB


def chosen(sampler):
    """A config of the sampler, an objective that it samples from, and blocks for masks."""
    c = config.base()
    cls = samplers.SAMPLERS[sampler]
    fitting = [name for name, entry in objectives.OBJECTIVES.items() if issubclass(entry.process, cls.needs)]
    presets.take_objective(c, "mdlm" if "mdlm" in fitting else fitting[0])
    if "mdlm" in fitting:
        presets.diffuse_blocks(c, "4,16")
    if cls.face == "step":
        presets.configure(c, "ar_rwkv", "tiny")
    c.sampler.name = sampler
    return c


@pytest.mark.parametrize("sampler", samplers.SAMPLERS)
def test_options_of_every_sampler(sampler, monkeypatch):
    """Tuples, and None, are among these."""
    monkeypatch.setattr(config, "load_experiment", lambda path: chosen(sampler))
    cfg = config.parse(["--config=x.py"])
    sections = {f"samplers.{sampler}", f"objectives.{cfg.diffusion.name}", "layouts.blocks"}
    keys = [key for key in LEAVES if key.rpartition(".")[0] in sections]
    texts = sorted({x for kind in TEXTS.values() for x in kind})
    drawn = random.Random(sampler)
    for _ in range(60):
        key, text = drawn.choice(keys), drawn.choice(texts)
        try:
            changed = config.parse(["--config=x.py", f"--config.{key}={text}"])
            train.check(changed)
        except UserError as e:
            assert "\n" not in str(e)
        else:
            stored = config.flatten(changed)[key]
            meant = None if text == "None" and kind_of(key) != "str" else meaning(kind_of(key), text)
            assert stored == meant, (key, text)


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["objectives.mdlm.mask_rates=(1e-400, 1)"], "does not fit a float, which makes 0.0 of 1e-400"),
        (["layouts.blocks.sizes={4, 16}"], "config.layouts.blocks.sizes={4, 16} is no list: write (1, 2)"),
        (
            ["layouts.blocks.sizes=(1.5,)", "diffusion.layout=blocks"],
            "config.layouts.blocks: sizes must be the lengths of blocks",
        ),
        (["samplers.confidence.block=0"], "config.samplers.confidence.block must be at least 1"),
        (["samplers.confidence.factor=0"], "config.samplers.confidence.factor must be a finite number above 0"),
        (["samplers.confidence.factor=2"], "config.samplers.confidence: factor does nothing with rule = 'steps'"),
        (["samplers.prophet.gaps=(0, 1, 1)"], "config.samplers.prophet: each of gaps must be"),  # nor is it chosen
        (["samplers.remdm.top_k=3", "samplers.remdm.temperature=0"], "config.samplers.remdm: top_p = 1.0 and top_k"),
        (
            ["schedules.geometric.sigma_min=30", "diffusion.schedule=geometric"],
            "config.schedules.geometric: Geometric needs sigma_min < sigma_max",
        ),
        (
            ["layouts.blocks.sizes=(4,)"],
            "config.layouts.blocks.sizes does nothing, for config.diffusion.layout is 'whole'",
        ),
        (
            ["schedules.cosine.eps=0.1"],
            "config.schedules.cosine.eps does nothing, for config.diffusion.schedule is 'log",
        ),
        (["objectives.udlm.time_eps=0.1"], "does nothing, for config.diffusion.name is 'mdlm': set that to 'udlm'"),
        (["diffusion.schedule=nonsense"], "No schedule is called 'nonsense'"),
        (["diffusion.layout=nonsense"], "No layout is called 'nonsense'"),
        (["sampler.name=nonsense"], "No sampler is called 'nonsense'"),
        (["diffusion.name=udlmm"], "No objective is called 'udlmm'"),
    ],
)
def test_options_that_are_refused_in_clear_words(tmp_path, arguments, told):
    (tmp_path / "x.py").write_text(EXPERIMENT)
    with pytest.raises(UserError, match=re.escape(told)):
        train.check(config.parse([f"--config={tmp_path / 'x.py'}", *(f"--config.{a}" for a in arguments)]))


def test_a_number_that_may_be_none_is_either(tmp_path):
    (tmp_path / "x.py").write_text(EXPERIMENT)
    flags = [f"--config={tmp_path / 'x.py'}", "--config.samplers.confidence.rule=threshold"]
    for text, stored in (("0.5", 0.5), ("1", 1.0), ("None", None)):
        cfg = config.parse([*flags, f"--config.samplers.confidence.threshold={text}"])
        train.check(cfg)
        assert cfg.samplers.confidence.threshold == stored
    with pytest.raises(UserError, match="config.samplers.confidence.threshold=high is not of type float"):
        config.parse([*flags, "--config.samplers.confidence.threshold=high"])


def test_an_entry_from_outside_has_a_section_of_its_own(monkeypatch):
    """An experiment brings an objective and a sampler along; their constructors check the options."""

    @dataclasses.dataclass(frozen=True)
    class Mine(samplers.FirstHitting):
        width: int = 3

        def __post_init__(self):
            if self.width > 5:
                raise ValueError(f"width is at most 5, got {self.width}.")

    entry = objectives.OBJECTIVES["mdlm"]
    monkeypatch.setitem(samplers.SAMPLERS, "mine", Mine)
    monkeypatch.setitem(objectives.OBJECTIVES, "mine", entry)

    def cfg(width=3, time_eps=0.1):
        c = config.base()
        with c.unlocked():
            c.samplers.mine = {"width": width}
            c.objectives.mine = {"time_eps": time_eps}
        c.sampler.name, c.diffusion.name = "mine", "mine"
        return c

    train.check(cfg())
    _, objective = build(cfg(), train.NO_TOKENIZER)
    assert objective.time_eps == 0.1 and generation.build_sampler(cfg(), objective) == Mine(width=3)
    for wrong, told in (
        (cfg(width=7), "config.samplers.mine: width is at most 5"),
        (cfg(time_eps=2), "config.objectives.mine: time_eps must be"),
    ):
        with pytest.raises(UserError, match=told):
            train.check(wrong)
    monkeypatch.delitem(samplers.SAMPLERS, "mine")
    with pytest.raises(UserError, match="config.samplers.mine: there is none of this name, but .*ancestral, "):
        train.check(cfg())


@pytest.mark.parametrize(
    "value", [None, True, 3, -1, 0, 0.5, NAN, INF, 1e300, 2**40, "3", "", (), (1,), [1], {}, {"a": 1}], ids=repr
)
def test_options_of_an_experiment_file(value):
    """The same for values of Python, in any key or in place of a section."""
    sections = {".".join(key.split(".")[:n]) for key in LEAVES for n in range(1, key.count(".") + 1)}
    for key in (*LEAVES, *sorted(sections)):
        c = config.base()
        *path, leaf = key.split(".")
        section = c
        for name in path:
            section = section[name]
        try:
            with c.unlocked():
                section[leaf] = value
        except (TypeError, ValueError, AttributeError):  # ConfigDict refuses it: load_experiment tells the line
            continue
        try:
            train.check(c)
        except UserError as e:
            assert "\n" not in str(e)
        else:
            kinds = {list: (list, tuple)}.get(type(LEAVES.get(key)), type(LEAVES.get(key)))
            fits = isinstance(value, kinds) or LEAVES.get(key) is None or value == LEAVES[key]
            fits |= (
                isinstance(LEAVES.get(key), float) and value == config.flatten(c)[key]
            )  # 3 and True are floats there
            fits |= value in ({}, None) and LEAVES.get(key, {}) == {}  # a section without keys: the defaults
            assert fits, (key, value)
            if key in NUMBERS:
                assert type(config.flatten(c)[key]) is type(LEAVES[key]), (key, value)


def test_a_key_that_is_missing_or_unknown(tmp_path):
    for change, told in (
        (lambda c: c.train.__delattr__("keep"), "config.train.keep is missing"),
        (lambda c: c.__delattr__("optim"), "config.optim.b1 is missing"),
        (lambda c: c.sampler.__delattr__("name"), "config.sampler.name is missing"),
        (lambda c: c.train.update({"kep": 3}), "Unknown key config.train.kep"),
        (lambda c: c.model.mixers.update({"lstm": {"width": 3}}), "Unknown key config.model.mixers.lstm"),
        (lambda c: c.sampler.update({"width": 3}), "Unknown key config.sampler.width"),
        (lambda c: c.samplers.ancestral.update({"width": 3}), "Unknown key config.samplers.ancestral.width"),
        (lambda c: c.objectives.autoregressive.update({"width": 3}), "Unknown key config.objectives.autoregressive."),
        (lambda c: c.samplers.remdm.__delattr__("eta"), "config.samplers.remdm.eta is missing"),
        (lambda c: c.__delattr__("diffusion"), "config.diffusion.layout is missing"),
        (lambda c: c.__delattr__("layouts"), "config.layouts.blocks.begins is missing"),
    ):
        c = config.base()
        with c.unlocked():
            change(c)
        with pytest.raises(UserError, match=re.escape(told)):
            train.check(c)


@pytest.mark.parametrize(
    "argument, told",
    [
        ("--noconfig.train.num_steps=5", "Unknown argument"),
        ("--noconfig.train.multihost=True", "Unknown argument"),
        ("--config.optim.learning_rate=1e-400", "does not fit a float"),
        ("--config.optim.learning_rate=1e400", "does not fit a float"),
    ],
)
def test_what_would_be_stored_as_something_else_is_refused(tmp_path, argument, told):
    (tmp_path / "x.py").write_text(EXPERIMENT)
    with pytest.raises(UserError, match=told):
        config.parse([f"--config={tmp_path / 'x.py'}", argument])


def test_none_of_the_command_line_is_none(tmp_path):
    (tmp_path / "x.py").write_text(EXPERIMENT.replace("return c", "c.data.root = '/data'\n    return c"))
    flag = f"--config={tmp_path / 'x.py'}"
    assert config.parse([flag]).data.root == "/data"
    assert config.parse([flag, "--config.data.root=None"]).data.root is None
    assert config.parse([flag, "--config.train.wandb_project", "None"]).train.wandb_project is None
    assert config.parse([flag, "--config.data.name=None"]).data.name == "None"
    assert config.parse([flag, "--noconfig.train.tensorboard"]).train.tensorboard is False


def test_a_learning_rate_that_only_warms_up_is_told(capsys):
    c = config.base()
    c.train.num_steps, c.optim.warmup_steps = 9, 10
    train.check(c)
    assert "The learning rate only warms up: config.optim.warmup_steps = 10" in capsys.readouterr().out
    c.train.num_steps = 10
    train.check(c)
    assert not capsys.readouterr().out


# --- Absurd sizes ---------------------------------------------------------------------------------------------------


def test_processes_that_no_machine_runs(monkeypatch):
    monkeypatch.setattr(sharding, "cpu_cores", lambda: 2)
    c = config.base()
    c.train.data_workers = 16
    train.check(c)
    for workers in (17, 10**9):
        c.train.data_workers = workers
        with pytest.raises(UserError, match="config.train.data_workers"):
            train.check(c)


@pytest.mark.parametrize(
    "changes",
    [
        {"model.dim": 65536},
        {"model.num_layers": 1024, "model.dim": 4096},
        {"train.batch_size": 2**20},
        {"train.eval_batch_size": 2**20},
        {"data.length": 2**24},
        {"model.channel_mixers.rwkv7.expansion": 1024.0, "model.dim": 8192},
    ],
    ids=str,
)
def test_what_no_device_can_hold(changes, monkeypatch):
    monkeypatch.setattr(sharding, "device_memory", lambda mesh: 2**33)
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    c = config.base()
    c.update_from_flattened_dict(changes)
    train.check(c)
    with pytest.raises(UserError, match=r"needs at least [0-9,.]+ GiB on each device, which has 8\.0: "):
        train.check_memory(c, mesh)


def test_this_machine_has_memory_for_the_default():
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    assert sharding.device_memory(mesh) > 2**28
    train.check_memory(config.base(), mesh)


@pytest.mark.parametrize("pattern, num_layers", [("birwkv7", 5), ("attention,mamba2*2", 9), ("attention,rwkv7", 2)])
def test_the_least_number_of_parameters_is_exact_but_for_the_vocabulary(pattern, num_layers):
    c = config.base()
    c.model.update({"dim": 64, "pattern": pattern, "num_layers": num_layers, "scan_layers": True})
    model, _ = build(c, train.NO_TOKENIZER)
    assert train.least_parameters(c) == count_parameters(abstract_params(model, 4))


def test_a_validation_that_is_not_finite_is_refused():
    class Kept:
        def wait(self):
            self.waited = True

        def steps(self):
            return [4, 8]

    train.refuse_lost_validation(1.5, 9, Kept())
    for nelbo in (NAN, INF, -INF):
        kept = Kept()
        with pytest.raises(UserError, match=f"The validation NELBO was {nelbo} at step 9: .* of step 8 is kept"):
            train.refuse_lost_validation(nelbo, 9, kept)
        assert kept.waited
