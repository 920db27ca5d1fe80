"""What others publish, told apart by config.json, and what we publish: names, settings, numbers, refusals."""

import json
import sys
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv import config, convert, generation, hub, initial, published, releases, sharding, weights
from diffrwkv.config import UserError
from diffrwkv.data import tokenizers
from diffrwkv.denoiser import Denoiser
from diffrwkv.diffusion.objectives import Duo, from_config
from diffrwkv.diffusion.processes import Vocabulary
from diffrwkv.weights import FORMATS
from tests.golden_arrays import golden, relative_error
from tests.random_parameters import random_parameters
from tests.test_weights import fla_state, mdlm_state, rwkv7_golden, rwkv7_state

# --- as their authors publish them: the keys of each config.json, at tiny sizes ------------------------------------

SIZES = {"hidden_dim": 8, "cond_dim": 6, "n_blocks": 2, "n_heads": 2, "vocab_size": 9, "model_length": 16}
SIZES |= {"dropout": 0.1, "return_dict": False, "torch_dtype": "float32"}
MDLM = SIZES | {"model_type": "mdlm", "architectures": ["MDLM"], "time_conditioning": False}
BD3LM = SIZES | {"model_type": "bd3lm", "architectures": ["BD3LM"], "block_size": 4, "cross_attn": True, "adaln": True}
BD3LM |= {"attn_backend": "flex", "causal": False, "time_conditioning": False, "var_min": True}
BD3LM |= {"sampling_eps_min": 0.001, "sampling_eps_max": 0.999}
SEDD = {
    "ngpus": 8,
    "tokens": 8,
    "graph": {"type": "absorb", "file": "data", "report_all": False},
    "noise": {"type": "loglinear", "sigma_min": 1e-4, "sigma_max": 20},
    "model": {"name": "small", "type": "ddit", "hidden_size": 8, "cond_dim": 6, "length": 16, "n_blocks": 2}
    | {"n_heads": 2, "scale_by_sigma": True, "dropout": 0.1},
}
SEDD_UNIFORM = SEDD | {"tokens": 9, "graph": {"type": "uniform"}, "model": SEDD["model"] | {"scale_by_sigma": False}}
SEDD_UNIFORM |= {"noise": {"type": "geometric", "sigma_min": "1e-4", "sigma_max": 20}}
DUO = SIZES | {"model_type": "duo", "architectures": ["DUO"], "causal": False, "var_min": True}
FLA = {"model_type": "rwkv7", "architectures": ["RWKV7ForCausalLM"], "hidden_size": 64, "num_hidden_layers": 2}
FLA |= {"vocab_size": 9, "attn": None, "norm_first": True, "norm_bias": True, "hidden_act": "sqrelu", "norm_eps": 1e-5}
FLA |= {"value_dim": [64, 64], "head_dim": 64, "hidden_ratio": 4.0, "tie_word_embeddings": False}
BUFFERS = {"sampling_eps_min": np.array(0.001, np.float32), "sampling_eps_max": np.array(0.999, np.float32)}


def prefixed(state):
    return {"backbone." + name: value for name, value in state.items()}


def without_frequencies(state):
    return {name: value for name, value in state.items() if not name.endswith("inv_freq")}


# {name: (kind, config.json, tensors)}
MODELS = {
    "mdlm": ("mdlm", MDLM, lambda: prefixed(mdlm_state())),
    "mdlm told the time": ("mdlm", MDLM | {"time_conditioning": True}, lambda: prefixed(mdlm_state())),
    "bd3lm": ("bd3lm", BD3LM, lambda: prefixed(mdlm_state()) | BUFFERS),
    "bd3lm of one block": ("bd3lm", BD3LM | {"block_size": 16}, lambda: prefixed(mdlm_state()) | BUFFERS),
    "sedd": ("sedd", SEDD, lambda: without_frequencies(mdlm_state())),
    "sedd uniform": ("sedd", SEDD_UNIFORM, mdlm_state),
    "duo": ("duo", DUO, lambda: prefixed(mdlm_state())),
    "fla": ("fla", FLA, lambda: fla_state(dim=64, head_dim=64)),
}
SETTINGS = {
    "mdlm": {"diffusion.name": "mdlm", "model.time_conditioning": False, "data.wrap": True, "data.length": 16},
    "mdlm told the time": {"diffusion.name": "mdlm", "model.time_conditioning": True, "objectives.mdlm.clock": "sigma"},
    "bd3lm": {"diffusion.layout": "blocks", "layouts.blocks.sizes": [4], "layouts.blocks.causal_context": False}
    | {"layouts.blocks.keep_first": True, "model.time_conditioning": False},
    "bd3lm of one block": {"diffusion.layout": "whole", "diffusion.name": "mdlm"},
    "sedd": {"diffusion.name": "sedd_absorb", "diffusion.schedule": "loglinear", "model.time_conditioning": True},
    "sedd uniform": {"diffusion.name": "sedd_uniform", "schedules.geometric.sigma_min": 1e-4}
    | {"schedules.geometric.sigma_max": 20.0, "model.time_conditioning": True},
    "duo": {"diffusion.name": "duo", "objectives.duo.clock": "sigma", "model.time_conditioning": True},
    "fla": {"diffusion.name": "autoregressive", "sampler.name": "autoregressive", "model.pattern": "rwkv7"},
}


def folder_of(path, told, state, file="model.safetensors"):
    path.mkdir(parents=True, exist_ok=True)
    weights.write_state_dict(state, path / file)
    (path / "config.json").write_text(json.dumps(told))
    return path


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_told_by_its_config(name, tmp_path):
    kind, told, state = MODELS[name]
    folder = folder_of(tmp_path / "model", told, state())
    found = published.read(folder)
    cfg = published.experiment(found)
    assert found.kind == kind and found.name == str(folder)
    flat = config.flatten(cfg)
    assert {key: flat[key] for key in SETTINGS[name]} == SETTINGS[name]
    assert flat["model.dim"] == (64 if kind == "fla" else 8) and flat["model.num_layers"] == 2
    config.check_values(cfg)
    convert.refuse_other_objective(cfg, found)
    rows = found.model["vocab_size"]
    assert rows == (10 if name in ("duo", "sedd uniform") else 9)  # where all are tokens, the mask has one of its own
    shapes = weights.parameter_shapes(cfg.model.to_dict() | {"vocab_size": rows})
    stacked = published.stacked(found.params, cfg.model)
    assert {
        k: v.shape for k, v in jax.tree_util.tree_leaves_with_path(stacked)
    } and found.params.keys() == stacked.keys()
    chex.assert_trees_all_equal_shapes(
        found.params, jax.tree.map(lambda x: np.zeros(x), _nested(shapes), is_leaf=lambda x: isinstance(x, tuple))
    )
    objective = from_config(Vocabulary(rows, rows - 1), **cfg.diffusion.to_dict(), sections=cfg.to_dict())
    if flat["model.time_conditioning"]:  # all of theirs are told the total noise
        t = jnp.array([0.1, 0.9])
        np.testing.assert_allclose(objective.process.condition(t), objective.process.schedule.sigma(t), rtol=1e-6)
    # the same of a file alone, which has its config.json beside it
    chex.assert_trees_all_equal(published.read(folder / "model.safetensors").params, found.params)


def _nested(flat):
    nested = {}
    for path, value in flat.items():
        *sections, leaf = path.split("/")
        node = nested
        for name in sections:
            node = node.setdefault(name, {})
        node[leaf] = value
    return nested


@pytest.mark.parametrize(
    "name, changes, told",
    [
        (
            "mdlm",
            {"model_type": "llada"},
            "model_type = 'llada', and known are mdlm, bd3lm, duo, rwkv7, rwkv7_fla, and S",
        ),
        ("mdlm", {"model_type": None}, "model_type = 'None'"),
        ("mdlm", {"hidden_dim": 16, "n_heads": 4}, "hidden_dim = 16, and its weights 8"),
        ("mdlm", {"n_heads": 4}, "n_heads = 4, and its weights 2"),
        ("mdlm", {"n_blocks": 3}, "n_blocks = 3, and its weights 2"),
        ("mdlm", {"vocab_size": 10}, "vocab_size = 10, and its weights 9"),
        ("bd3lm", {"adaln": False}, "adaln = False, and only True is computed here"),
        ("bd3lm", {"time_conditioning": True}, "time_conditioning = True, and only False"),
        ("bd3lm", {"block_size": 0}, "no block_size"),
        ("bd3lm", {"block_size": "four"}, "four"),
        ("sedd", {"graph": {"type": "roulette"}}, "graph.type = 'roulette'"),
        ("sedd", {"noise": {"type": "cosine"}}, "noise.type = 'cosine'"),
        ("sedd", {"model": SEDD["model"] | {"scale_by_sigma": False}}, "scale_by_sigma = False, and only True"),
        ("duo", {"causal": True}, "causal = True, and only False"),
        ("fla", {"attn": {"layers": [1]}}, "attn = .*, and only None"),
        ("fla", {"norm_eps": 1e-6}, "norm_eps = 1e-06, and only 1e-05"),
        ("fla", {"hidden_act": "relu"}, "hidden_act = 'relu'"),
        ("fla", {"value_dim": [64, 128]}, "value_dim"),
        ("fla", {"tie_word_embeddings": True}, "tie_word_embeddings = True"),
    ],
)
def test_what_is_not_computed_here_is_refused(name, changes, told, tmp_path):
    _, original, state = MODELS[name]
    folder = folder_of(tmp_path, original | changes, state())
    with pytest.raises(ValueError, match=told):
        published.read(folder)


def test_heads_of_another_width_are_refused_of_fla(tmp_path):
    folder = folder_of(tmp_path, FLA, fla_state(dim=64, head_dim=32))
    with pytest.raises(ValueError, match="heads are 32 wide"):
        published.read(folder)


def test_weights_alone(tmp_path):
    """Names tell RWKV-7's; MDLM's, which four projects have, need a word."""
    weights.write_state_dict(prefixed(mdlm_state()), tmp_path / "dit.npz")
    with pytest.raises(ValueError, match="mdlm, bd3lm, sedd, duo name their weights alike.*--from=mdlm|bd3lm|sedd|duo"):
        published.read(tmp_path / "dit.npz")
    assert published.experiment(published.read(tmp_path / "dit.npz", kind="mdlm")).diffusion.name == "mdlm"
    assert published.experiment(published.read(tmp_path / "dit.npz", kind="duo")).diffusion.name == "duo"
    for kind in ("bd3lm", "sedd"):
        with pytest.raises(ValueError, match=f"a model of {kind} needs its config.json"):
            published.experiment(published.read(tmp_path / "dit.npz", kind=kind))
    for name, state in (("rwkv7", rwkv7_state()), ("fla", fla_state(dim=64, head_dim=64))):
        weights.write_state_dict(state, tmp_path / f"{name}.npz")
        found = published.read(tmp_path / f"{name}.npz")
        assert found.kind == name and found.tokenizer is None
        with pytest.raises(ValueError, match=f"is a model of {name}, not of mdlm: leave --from=mdlm out"):
            published.read(tmp_path / f"{name}.npz", kind="mdlm")
    (tmp_path / "config.json").write_text(json.dumps({"seed": 3}))  # of something else
    assert published.read(tmp_path / "rwkv7.npz").kind == "rwkv7"


@pytest.mark.parametrize(
    "state, rows, tokenizer",
    [
        (lambda rows: prefixed(mdlm_state(vocab=rows)), 50258, "gpt2"),
        (lambda rows: rwkv7_state(vocab=rows), 65536, "world"),
        (lambda rows: rwkv7_state(vocab=rows), 50304, "neox"),
    ],
)
def test_the_number_of_ids_names_the_tokenizer(state, rows, tokenizer, tmp_path):
    weights.write_state_dict(state(rows), tmp_path / "x.safetensors")
    found = published.read(tmp_path / "x.safetensors", kind="mdlm" if tokenizer == "gpt2" else None)
    assert found.tokenizer == tokenizer
    cfg = published.experiment(found)
    assert cfg.data.tokenizer == tokenizer
    if tokenizer == "gpt2":  # Duo's last row is a token
        assert published.read(tmp_path / "x.safetensors", kind="duo").tokenizer == "gpt2:50259"
        assert tokenizers.parse("gpt2:50259") == ("gpt2", 50259)


def test_a_folder_needs_one_file_of_weights(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(MDLM))
    with pytest.raises(ValueError, match="it has none: name the file"):
        published.read(tmp_path)
    for name in ("a.npz", "b.npz"):
        weights.write_state_dict(prefixed(mdlm_state()), tmp_path / name)
    with pytest.raises(ValueError, match="it has a.npz, b.npz: name the file"):
        published.read(tmp_path)
    assert published.read(tmp_path / "a.npz").kind == "mdlm"
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json cannot be read"):
        published.read(tmp_path / "a.npz")


def test_weights_in_several_files(tmp_path):
    state = prefixed(mdlm_state())
    whole = published.read(folder_of(tmp_path / "whole", MDLM, state))
    names, folder = list(state), tmp_path / "parts"
    parts = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, some in parts.items():
        folder_of(folder, MDLM, {name: state[name] for name in some}, file)
    index = {"metadata": {}, "weight_map": {name: file for file, some in parts.items() for name in some}}
    (folder / weights.INDEX).write_text(json.dumps(index))
    chex.assert_trees_all_equal(published.read(folder).params, whole.params)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="index.json cannot be read"):
        published.read(folder)


# --- the numbers of their authors' code ---------------------------------------------------------------------------


def logits_of(found, *inputs):
    cfg = published.experiment(found)
    model = Denoiser(**cfg.model.to_dict() | {"vocab_size": found.model["vocab_size"]})
    return jax.jit(model.apply)({"params": published.stacked(found.params, cfg.model)}, *map(jnp.asarray, inputs))


@pytest.mark.optimised
def test_mdlms_network_gives_its_logits_as_each_project_publishes_it(tmp_path):
    arrays = golden("mdlm_dit.npz")
    state = {name[2:]: value for name, value in arrays.items() if name.startswith("w/")}
    sizes = {"hidden_dim": "hidden", "cond_dim": "cond_dim", "n_blocks": "n_blocks", "n_heads": "n_heads"}
    sizes = {key: int(arrays[name]) for key, name in sizes.items()}
    dit = sizes | {"vocab_size": len(arrays["w/vocab_embed.embedding"]), "model_length": arrays["xt"].shape[1]}
    network = {"hidden_size": sizes["hidden_dim"], "length": dit["model_length"], "scale_by_sigma": True}
    sedd = SEDD | {"model": network | {key: sizes[key] for key in ("cond_dim", "n_blocks", "n_heads")}}
    models = {
        "mdlm": (MDLM | dit, prefixed(state), "logits_raw_sigma0"),
        "bd3lm": (BD3LM | dit, prefixed(state) | BUFFERS, "logits_raw_sigma0"),
        "sedd": (sedd, without_frequencies(state), "logits_raw"),
        "duo": (DUO | dit, prefixed(state), "logits_raw"),
    }
    computed = {}  # one network told the time, one not: what is the same is not compiled again
    for name, (told, tensors, wanted) in models.items():
        found = published.read(folder_of(tmp_path / name, told, tensors))
        key = json.dumps(found.model)
        if key not in computed:
            computed[key] = found.params, logits_of(found, arrays["xt"], arrays["sigma"])
        params, logits = computed[key]
        chex.assert_trees_all_equal(found.params, params)
        assert relative_error(logits[..., : dit["vocab_size"]], arrays[wanted]) < 1e-5, name
    assert len(computed) == 3  # Duo's has a row more


@pytest.mark.optimised
def test_rwkv7s_network_gives_its_logits_as_each_project_publishes_it(tmp_path):
    arrays, state = rwkv7_golden()
    model = FORMATS["rwkv7"].model(state)
    as_fla = FORMATS["fla"].to_state_dict(FORMATS["rwkv7"].to_params(state), model)
    weights.write_state_dict(state, tmp_path / "theirs.safetensors")
    told = FLA | {"vocab_size": model["vocab_size"], "num_hidden_layers": model["num_layers"]}
    theirs, flas = (
        published.read(x) for x in (tmp_path / "theirs.safetensors", folder_of(tmp_path / "f", told, as_fla))
    )
    assert (theirs.kind, flas.kind) == ("rwkv7", "fla") and theirs.model == flas.model
    chex.assert_trees_all_equal(theirs.params, flas.params)
    assert relative_error(logits_of(flas, arrays["idx"]), arrays["logits"]) < 1e-5


def test_a_pth_of_bfloat16_as_blinkdl_writes_it(tmp_path):
    torch = pytest.importorskip("torch")
    state = rwkv7_state(dim=64, head_dim=64, unused=True)
    torch.save({name: torch.from_numpy(value).bfloat16() for name, value in state.items()}, tmp_path / "RWKV-x070.pth")
    found = published.read(tmp_path / "RWKV-x070.pth")
    rounded = {name: value.astype(jnp.bfloat16).astype(np.float32) for name, value in state.items()}
    chex.assert_trees_all_equal(found.params, FORMATS["rwkv7"].to_params(rounded))
    assert found.kind == "rwkv7"


# --- what we publish ----------------------------------------------------------------------------------------------

TOKENIZER = tokenizers.Char("abcdefgh")
ATTENTION = {"pattern": "attention", "mixers.attention.head_dim": 4, "channel_mixer": "mlp", "block": "dit"}
RWKV7 = {"pattern": "rwkv7", "mixers.rwkv7.head_dim": 64, "dim": 64, "channel_mixers.rwkv7.shift": "previous"}
RWKV7 |= {"mixers.rwkv7.lora_ranks": {"w": 3, "a": 5, "v": 2, "g": 7}}
OURS = {
    "birwkv7": ("diffrwkv", {"mixers.birwkv7.head_dim": 4, "num_layers": 3, "scan_layers": True}, {}),
    "mdlm": ("mdlm", ATTENTION, {}),
    "mdlm, layers stacked": ("mdlm", ATTENTION | {"num_layers": 3, "scan_layers": True}, {}),
    "bd3lm": ("bd3lm", ATTENTION, {"diffusion.layout": "blocks", "layouts.blocks.causal_context": False}),
    "blocks of ours": ("diffrwkv", ATTENTION, {"diffusion.layout": "blocks"}),
    "udlm": ("diffrwkv", ATTENTION | {"time_conditioning": True}, {"diffusion.name": "udlm"}),
    "genmd4": ("diffrwkv", ATTENTION | {"time_conditioning": True}, {"diffusion.name": "genmd4"}),
    "rwkv7": ("fla", RWKV7, {"diffusion.name": "autoregressive", "sampler.name": "autoregressive"}),
}


def ours(name):
    """(ConfigDict, parameters, state of the objective) of a model that nobody trained."""
    _, model, others = OURS[name]
    sizes = {"dim": 8, "num_layers": 2, "condition_dim": 6} | model
    cfg = config.changed({f"model.{key}": value for key, value in sizes.items()} | {"data.length": 12} | others)
    denoiser = Denoiser(**cfg.model.to_dict() | {"vocab_size": TOKENIZER.vocab_size})
    params = random_parameters(denoiser, jnp.zeros((1, 4), jnp.int32), jnp.zeros(1))
    vocabulary = Vocabulary(TOKENIZER.vocab_size, TOKENIZER.mask_id)
    objective = from_config(vocabulary, **cfg.diffusion.to_dict(), sections=cfg.to_dict())
    state = jax.tree.map(lambda x: (x + 0.25).astype(x.dtype), objective.init_state())
    return cfg, params, state


def released(folder, name):
    cfg, params, state = ours(name)
    record = {"data": {"name": "letters"}, "parameters": 3}
    kind = releases.write(
        folder, cfg=cfg, tokenizer=TOKENIZER, params=params, objective=state, step=7, record=record, scores={"x": 1.5}
    )
    return kind, cfg, params, state


@pytest.mark.parametrize("name", OURS)
def test_what_was_released_is_loaded_to_the_last_bit(name, tmp_path):
    kind, cfg, params, state = released(tmp_path / "model", name)
    assert kind == OURS[name][0]
    assert sorted(p.name for p in (tmp_path / "model").iterdir()) == sorted(
        ["README.md", "config.json", "diffrwkv.json", "model.safetensors"]
    )
    run = generation.load(tmp_path / "model")
    chex.assert_trees_all_equal(run.params, params)
    chex.assert_trees_all_equal(run.learned, state)
    assert (run.tokenizer, run.step) == (TOKENIZER, 7)
    assert config.flatten(run.config) == config.flatten(cfg)
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: diffrwkv\n") and "| x | 1.5 |" in card and "\n---\n" in card
    with pytest.raises(ValueError, match="is not an empty folder"):
        released(tmp_path / "model", name)
    with pytest.raises(UserError, match="one set of weights"):
        generation.load(tmp_path / "model", step=3)


@pytest.mark.parametrize("name, keys", [("mdlm", MDLM), ("bd3lm", BD3LM), ("rwkv7", FLA)])
def test_what_another_class_can_hold_has_its_names(name, keys, tmp_path):
    """Names, shapes and keys are those that the class has and asks for; read as theirs, it is the same model."""
    kind, _, params, _ = released(tmp_path / "model", name)
    with_ours = {path.name: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    tensors = weights.read_state_dict(tmp_path / "model" / "model.safetensors")
    theirs = {"mdlm": mdlm_state(), "bd3lm": mdlm_state() | BUFFERS, "fla": fla_state(dim=64, head_dim=64)}[kind]
    shapes = ({name: value.shape for name, value in state.items()} for state in (tensors, theirs))
    assert next(shapes) == next(shapes)
    from safetensors import safe_open

    with safe_open(tmp_path / "model" / "model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}
        inside = {name for name in file.keys() if not name.startswith("sampling_eps_")}
        assert all(name.startswith("backbone.") for name in inside) == (kind != "fla")
    told = json.loads(with_ours["config.json"])
    free = {"model_length", "attn_backend", "sampling_eps_max", "sampling_eps_min", "dropout", "block_size", "auto_map"}
    wanted = set(keys) - {"return_dict"}
    assert wanted <= set(told) and {key: told[key] for key in wanted - free} == {
        key: keys[key] for key in wanted - free
    }
    if kind != "fla":
        assert told["auto_map"]["AutoModelForMaskedLM"].endswith(f"--modeling_{kind}.{kind.upper()}")
    (tmp_path / "model" / releases.OWN).unlink()
    found = published.read(tmp_path / "model")
    assert found.kind == kind
    chex.assert_trees_all_equal(found.params, params)


def test_a_damaged_release_is_told(tmp_path):
    released(tmp_path / "model", "mdlm")
    path = tmp_path / "model" / releases.OWN
    whole = json.loads(path.read_text())
    for change in ({"step": 8}, {"config": {}}, {"tokenizer": {"type": "x"}}, {"layout": "gpt"}):
        path.write_text(json.dumps(whole | change))
        with pytest.raises(UserError, match="is not the description of a model .*altered"):
            generation.load(tmp_path / "model")
        sealed = config.seal(whole | change)
        path.write_text(json.dumps(sealed))
        if "step" not in change:
            with pytest.raises(UserError, match="diffrwkv.json|tensors of the model"):
                generation.load(tmp_path / "model")
    other = config.seal(whole | {"tokenizer": tokenizers.Char("abc").to_json()})
    path.write_text(json.dumps(other))
    with pytest.raises(UserError, match="has not the weights of the model"):
        generation.load(tmp_path / "model")


def test_a_release_of_others_is_loaded(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "mdlm", MDLM, prefixed(mdlm_state()))
    with pytest.raises(UserError, match="9 token ids, and nothing says of which tokenizer"):
        generation.load(folder)
    monkeypatch.setattr(published, "DIT_TOKENIZERS", {})
    kinds = dict(published.KINDS)
    kinds["mdlm"] = published.Kind("mdlm", kinds["mdlm"].settings, {9: "char"})
    monkeypatch.setattr(published, "KINDS", kinds)
    monkeypatch.setattr(tokenizers, "make", lambda spec, root=None: TOKENIZER)
    run = generation.load(folder)
    assert run.model.time_conditioning is False and run.config.data.length == 16 and run.step == 0
    chex.assert_trees_all_equal(run.params, FORMATS["mdlm"].to_params(mdlm_state()))
    folder = folder_of(tmp_path / "duo", DUO, prefixed(mdlm_state()))
    kinds["duo"] = published.Kind("mdlm", kinds["duo"].settings, {10: "char"}, all_real=kinds["duo"].all_real)
    monkeypatch.setattr(tokenizers, "make", lambda spec, root=None: tokenizers.Char("abcdefghi"))
    run = generation.load(folder)
    assert isinstance(run.objective, Duo) and run.objective.process.clock == "sigma"
    assert not run.params["embedding"][9].any() and run.params["embedding"].shape == (10, 8)


# --- the hub, whose library is a fake here ------------------------------------------------------------------------


class Hub(types.ModuleType):
    """What huggingface_hub would do with a hub of one folder."""

    def __init__(self, folder=None):
        super().__init__("huggingface_hub")
        self.folder, self.uploaded = folder, []

    def snapshot_download(self, name, allow_patterns):
        if self.folder is None or name != "owner/name":
            raise ConnectionError("We couldect to the hub.\nCheck your connection.")
        assert "*.safetensors" in allow_patterns and not any(".py" in pattern for pattern in allow_patterns)
        return str(self.folder)

    def hf_hub_download(self, name, file):
        return str(self.folder / file)

    def HfApi(self):
        return self

    def create_repo(self, name, exist_ok):
        self.uploaded.append(name)

    def upload_folder(self, repo_id, folder_path):
        if self.folder is None:
            raise PermissionError("401 Client Error.")
        self.uploaded.append((repo_id, folder_path))


def test_a_model_of_the_hub(tmp_path, monkeypatch):
    released(tmp_path / "model", "mdlm")
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(tmp_path / "model"))
    run = generation.load("hf:owner/name")
    assert run.step == 7
    assert published.read("hf:owner/name/model.safetensors").name == "hf:owner/name/model.safetensors"
    for wrong in ("hf:", "hf:name", "hf:a b/c", "hf:/x"):
        with pytest.raises(UserError, match="write hf:OWNER/NAME"):
            generation.load(wrong)
    with pytest.raises(UserError, match=r"hf:other/name cannot be had from the hub \(ConnectionError: We could"):
        generation.load("hf:other/name")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match=r"needs huggingface_hub: pip install 'diffrwkv\[hub\]'"):
        generation.load("hf:owner/name")


def test_a_run_starts_from_a_model_of_the_hub(tmp_path, monkeypatch):
    _, cfg, params, _ = released(tmp_path / "model", "mdlm")
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub(tmp_path / "model"))
    cfg.train.init_from = "hf:owner/name"
    cfg.data.tokenizer = TOKENIZER.name
    source = initial.read(cfg, sharding.make_mesh(devices=jax.devices()[:1]))
    chex.assert_trees_all_equal(source.params, jax.device_get(params))
    cfg.train.init_from = "hf:other/name"
    with pytest.raises(UserError, match="config.train.init_from: hf:other/name cannot be had from the hub"):
        initial.read(cfg, sharding.make_mesh(devices=jax.devices()[:1]))


def test_push(tmp_path, monkeypatch):
    fake = Hub(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake)
    assert hub.push(tmp_path, "me/mine").endswith("/me/mine")
    assert fake.uploaded == ["me/mine", ("me/mine", str(tmp_path))]
    with pytest.raises(ValueError, match="write OWNER/NAME"):
        hub.push(tmp_path, "mine")
    monkeypatch.setitem(sys.modules, "huggingface_hub", Hub())
    with pytest.raises(ValueError, match="is written, but the hub did not take it as me/mine"):
        hub.push(tmp_path, "me/mine")
