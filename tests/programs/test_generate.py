"""Generation: what is given stays, what comes back depends on what was asked alone, and is compiled once."""

import dataclasses
import subprocess
import sys
import types
import unicodedata

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffrwkv
from diffrwkv import config, generation, sharding
from diffrwkv import run as runs
from diffrwkv.canvas import blank_note, canvas_row
from diffrwkv.cli import sampler_flags
from diffrwkv.config import UserError
from diffrwkv.data import tokenizers
from diffrwkv.diffusion import objectives, samplers
from diffrwkv.diffusion.processes import Vocabulary
from tests.random_parameters import random_parameters
from tests.thin import thin

CHAR = tokenizers.Char("abcdefghij klmnopqrstuvwxyzTB.\n_")
BYTE = tokenizers.Byte()


def row(tokenizer=CHAR, **options):
    return canvas_row(tokenizer, **({"length": None, "default_length": 10} | options))


def show(tokenizer, ids):
    return tokenizer.decode(ids, mask="#", specials=True)


def test_canvas():
    assert show(CHAR, row()) == "#" * 10
    assert show(CHAR, row(prompt="abc")) == "abc" + "#" * 7
    assert show(CHAR, row(infill="To be ____ not")) == "To be #### not"
    assert show(CHAR, row(infill="_a__b_", length=8)) == "#a##b###"
    assert show(CHAR, row(infill="_?_".replace("?", "a"), length=3)) == "#a#"
    assert show(CHAR, row(infill="a_b*", blank="*")) == "a_b#"
    assert show(BYTE, row(BYTE, infill="é_", length=5, bos=True, eos=True)) == "<bos>é#<eos>"
    assert show(BYTE, row(BYTE, bos=True, eos=True)) == "<bos>" + "#" * 8 + "<eos>"
    assert show(BYTE, row(BYTE, prompt="abcdefg", bos=True, eos=True)) == "<bos>abcdefg#<eos>"
    assert row().dtype == np.int32
    assert show(CHAR, row(prompt="a_c", length=4)) == "a_c#"  # only templates have blanks


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"prompt": ""}, "prompt is empty"),
        ({"infill": ""}, "infill is empty"),
        ({"infill": "abc"}, "no blanks"),
        ({"prompt": "a" * 10}, "10 tokens, too many"),
        ({"prompt": "a" * 11}, "11 tokens, too many"),
        ({"infill": "ab_", "length": 2}, "3 tokens, too many"),
        ({"prompt": "a$"}, r"'\$'"),
        ({"length": 2, "bos": True, "eos": True}, "nothing to generate"),
        ({"prompt": "a", "length": 3, "bos": True, "eos": True}, "2 for begin and end"),
    ],
)
def test_wrong_canvas(options, told):
    with pytest.raises(UserError, match=told):
        row(BYTE if "bos" in options else CHAR, **options)


class Alphabet:
    """Wants the letter that its parameter names, everywhere."""

    def apply(self, variables, z, t, *, valid=None):
        return jnp.broadcast_to(10 * jax.nn.one_hot(variables["params"], CHAR.vocab_size), (*z.shape, CHAR.vocab_size))


def one_device():
    return sharding.make_mesh(devices=jax.devices()[:1])


def generator(mesh=None):
    objective = objectives.from_config(Vocabulary(CHAR.vocab_size, CHAR.mask_id))
    return generation.Generator(Alphabet(), objective, samplers.Ancestral(num_steps=6), CHAR, mesh or one_device())


def test_generator_fills_blanks_only():
    canvas = np.tile(row(infill="a_b__c"), (3, 1))
    tokens, passes, trace = generator()(jnp.int32(CHAR.encode("x")[0]), canvas, seed=0)
    assert trace is None
    assert all(CHAR.decode(t)[i] == "abc"[j] for t in tokens for j, i in enumerate((0, 2, 5)))
    assert (tokens != CHAR.mask_id).all() and ((passes >= 1) & (passes <= 3)).all()
    assert (tokens == CHAR.encode("x")[0]).sum() >= 6


def test_a_sample_depends_on_seed_and_number_alone():
    canvas, x = np.tile(row(), (5, 1)), jnp.int32(-1)  # one_hot(-1) is zero: uniform over tokens
    generate = generator()
    whole = generate(x, canvas, seed=3).tokens
    part = generate(x, canvas[:2], seed=3, start=2).tokens
    every = generator(sharding.make_mesh())(x, canvas, seed=3).tokens  # over all devices, with filling rows
    np.testing.assert_array_equal(whole[2:4], part)
    np.testing.assert_array_equal(whole, every)
    assert (generate(x, canvas, seed=4).tokens != whole).any() and (whole[0] != whole[1]).any()


def build(name=None, guidance=0.0, **changes):
    objective = objectives.from_config(Vocabulary(CHAR.vocab_size, CHAR.mask_id), schedule="linear")
    return generation.build_sampler(config.base(), objective, name=name, guidance=guidance, **changes)


def test_the_sampler_is_the_configs_or_the_one_that_is_named():
    assert build(top_k=3) == samplers.Ancestral(top_k=3)
    assert build("ancestral", num_steps=7).num_steps == 7
    named = samplers.Confidence(block=32, rule="threshold")
    changes = dict(map(sampler_flags.parse_option, ("block=32", "rule=threshold", "threshold=0.9")))
    assert build("confidence", **changes) == named  # with its own defaults: nothing of the config's
    assert build("confidence", 1.5, **changes) == samplers.Guided(named, 1.5)
    assert build("prophet", **dict([sampler_flags.parse_option("gaps=[3, 2, 1]")])).gaps == (3, 2, 1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"name": "unheard_of"}, "choose one of analytic, ancestral, autoregressive, confidence"),
        ({"name": "confidence", "threshold": 2.0}, r"threshold must be in \(0, 1\], got 2.0"),
        ({"name": "confidence", "threshold": "high"}, "--sampler"),
        ({"name": "confidence", "eps": 0.1}, "no option eps; it has num_steps, block"),
        ({"name": "autoregressive"}, "does not sample from .* choose .*'ancestral' or "),
        ({"name": "flow_euler"}, "does not sample from .*'mdlm' in one part: choose .*'ancestral' or "),
        ({"name": "pipelined"}, "does not sample from .* in one part: choose .*'ancestral' or "),
        ({"block": 4}, "config.samplers.ancestral: The sampler 'ancestral' has no option block"),
    ],
)
def test_a_sampler_that_cannot_be(options, told):
    with pytest.raises(UserError, match=told):
        build(**options)


def test_blocks_that_do_not_divide_are_told():
    whole, prompted = row(infill="____________"), row(infill="ab__________a")
    for sampler in (build("confidence", block=4), build("prophet", 1.0, block=4)):
        assert generation.block_note(sampler, whole, CHAR.mask_id) is None
        assert "does not divide the 10 positions to fill: the last block is padded, from 2" in generation.block_note(
            sampler, prompted, CHAR.mask_id
        )
    ice = build("ice", block=3, answer_length=4)  # four blanks are no thinking
    assert "the 8 positions" in generation.block_note(ice, whole, CHAR.mask_id)
    assert generation.block_note(ice, prompted, CHAR.mask_id) is None
    assert generation.block_note(build("confidence"), whole, CHAR.mask_id) is None
    assert generation.block_note(build(), whole, CHAR.mask_id) is None


def test_what_does_nothing_is_told():
    greedy = build("confidence")
    assert "the 4 samples of each prompt are the same" in generation.same_note(greedy, 4)
    assert generation.same_note(build("confidence", 1.0), 4) and generation.same_note(greedy, 1) is None
    assert generation.same_note(samplers.Autoregressive(temperature=0.0), 2)
    assert generation.same_note(samplers.Pipelined(block=4), 2)
    assert generation.same_note(samplers.BlockCached(greedy, 4), 2)
    for varied in (build("confidence", temperature=0.5), build("confidence", score="random"), build(temperature=0.0)):
        assert generation.same_note(varied, 4) is None
    assert "in 'my_variable:' too" in blank_note(["To be ____ not", "case my_variable: x_"])
    for template in ("To be ____ not", "a_b", "_word_ _", "x___y"):
        assert blank_note([template]) is None


def test_watch_sees_each_pass_and_the_end():
    seen = []
    canvas = np.tile(row(infill="a____"), (2, 1))
    tokens, passes, _ = generator()(jnp.int32(3), canvas, seed=0, watch=lambda z: seen.append(np.array(z)))
    np.testing.assert_array_equal(seen[0], canvas)
    np.testing.assert_array_equal(seen[-1], tokens)
    masks = [(z == CHAR.mask_id).sum() for z in seen]
    assert masks == sorted(masks, reverse=True) and len(seen) == passes.max() + 1


# --- Text on its way to a reader ----------------------------------------------------------------------


def streamed(monkeypatch, ids, block, given=0, stop_id=BYTE.eos_id, tokenizer=BYTE):
    """The pieces of a stream that generates `ids`, and how many bytes were generated before each of them."""
    asked = []

    def next_block(params, state, keys, number, canvas):
        asked.append(number)
        return ids[None, number * block : (number + 1) * block], state

    monkeypatch.setattr(generation, "compiled_stream", lambda run, sampler: next_block)
    model, mesh = types.SimpleNamespace(empty_state=lambda *_: None), sharding.make_mesh(devices=jax.devices()[:1])
    run = types.SimpleNamespace(model=model, tokenizer=tokenizer, params=0, mesh=mesh)
    sampler = types.SimpleNamespace(block=block)
    stream = generation._stream(run, sampler, ids[:given], range(len(ids) // block), 0, 0, stop_id)
    return [(piece, len(asked) * block) for piece in stream]


def test_a_stream_holds_back_no_more_than_an_unfinished_character(monkeypatch):
    random = np.random.default_rng(0)
    texts = ["\ufffd\ufffd and \ufffd", "zwölf 漢字 😀", "😀" * 9, "\ufffd"]
    cases = [BYTE.encode(text) for text in texts] + [random.integers(256, size=60).astype(np.int32) for _ in range(50)]
    cases += [np.full(40, byte, np.int32) for byte in (0x80, 0xC3, 0xE2, 0xF0, 0xFF)]
    for ids in (np.resize(case, 56) for case in cases):
        for block in (1, 2, 4, 7):
            pieces = streamed(monkeypatch, ids, block)
            assert "".join(piece for piece, _ in pieces) == BYTE.decode(ids) and all(piece for piece, _ in pieces)
            shown, at = "", dict.fromkeys(range(0, len(ids) + 1, block), "")
            for piece, generated in pieces:
                shown += piece
                at[generated] = shown
            for generated in range(block, len(ids) + 1, block):
                at[generated] = at[generated] or at[generated - block]  # a block may show nothing new
                held = [k for k in range(4) if BYTE.decode(ids[: max(generated - k, 0)]) == at[generated]]
                assert held, (ids, block, generated)


def test_a_stream_ends_with_its_eos(monkeypatch):
    ids = np.concatenate([BYTE.encode("abc"), [BYTE.eos_id], BYTE.encode("defghijk")])
    assert "".join(piece for piece, _ in streamed(monkeypatch, ids, 4)) == "abc"
    cut = np.concatenate([BYTE.encode("é")[:1], [BYTE.eos_id], BYTE.encode("defghijk")])
    assert "".join(piece for piece, _ in streamed(monkeypatch, cut, 5)) == "\ufffd"
    assert "".join(piece for piece, _ in streamed(monkeypatch, ids, 4, stop_id=None)) == "abcdefghijk"
    characters = streamed(monkeypatch, CHAR.encode("abc defg"), 4, tokenizer=CHAR)
    assert [piece for piece, _ in characters] == ["abc ", "defg"]


def test_nothing_that_a_terminal_obeys_is_printed():
    hostile = "a\x1b[2Jb\x1b]0;title\x07c\rd\x00e\x7ff\x9b31mg\u202eh\u2066i\tj\nk é漢😀\ufffd"
    shown = generation.printable(hostile)
    assert shown == (r"a\x1b[2Jb\x1b]0;title\x07c\x0dd\x00e\x7ff\x9b31mg\u202eh\u2066i" + "\tj\nk é漢😀\ufffd")
    every = generation.printable("".join(map(chr, range(0x3000))))
    assert {c for c in every if unicodedata.category(c) == "Cc"} == {"\t", "\n"}
    assert not {c for c in every if unicodedata.bidirectional(c) in ("LRE", "RLE", "LRO", "RLO", "LRI", "RLI", "FSI")}


# --- The call ---------------------------------------------------------------------------------------


class Script:
    """Wants the tokens that its parameters name, int32 [L], whatever it sees, and counts how often it is traced."""

    def __init__(self, tokenizer):
        self.traced, self._vocab_size = 0, tokenizer.vocab_size

    def apply(self, variables, z, t, *, valid=None):
        self.traced += 1
        assert valid is None or valid.shape == z.shape
        wanted = jnp.pad(variables["params"], (0, 64))[: z.shape[1]]
        return jnp.broadcast_to(30 * jax.nn.one_hot(wanted, self._vocab_size), (*z.shape, self._vocab_size))


def script_run(wanted="", tokenizer=CHAR, *, eos_at=None, mesh=None, **data):
    """A run whose model wants the text `wanted`, from position 0, and EOS at `eos_at`."""
    cfg = config.base()
    cfg.data.length = 12
    cfg.samplers.ancestral.num_steps = 6
    for key, value in data.items():
        cfg.data[key] = value
    ids = np.pad(tokenizer.encode(wanted), (0, 40))
    if eos_at is not None:
        ids[eos_at] = tokenizer.eos_id
    objective = objectives.from_config(Vocabulary(tokenizer.vocab_size, tokenizer.mask_id), schedule="linear")
    return runs.Run(Script(tokenizer), objective, tokenizer, jnp.asarray(ids), 7, cfg, mesh or one_device())


DENOISERS = {
    "birwkv7": {"head_dim": 8, "lora_ranks": {"w": 4, "a": 4, "v": 4, "g": 4}},
    "attention": {"head_dim": 8},
    "bimamba2": {"head_dim": 8, "state_size": 8},
    "causal_attention": {"head_dim": 8},
}


def denoiser_run(mixer, sampler="ancestral", **diffusion):
    """A run of a tiny denoiser with random weights."""
    cfg = config.base()
    cfg.data.length = 16
    cfg.model.dim, cfg.model.num_layers, cfg.model.pattern = 16, 1, mixer
    cfg.model.block, cfg.model.channel_mixer, cfg.model.condition_dim = "dit", "mlp", 8
    for key, value in DENOISERS[mixer].items():
        cfg.model.mixers[mixer][key] = type(cfg)(value) if isinstance(value, dict) else value
    if mixer.startswith("causal"):
        cfg.model.block, sampler = "transformer", "autoregressive"
        cfg.diffusion.name = "autoregressive"
    cfg.diffusion.update(diffusion)
    cfg.model.time_conditioning = cfg.diffusion.name == "flm"
    cfg.layouts.blocks.sizes = (4,)
    cfg.sampler.name = sampler
    model, objective = runs.build(cfg, CHAR)
    params = random_parameters(model, jnp.zeros((1, 4), jnp.int32), jnp.zeros(1), seed=1)
    return runs.Run(model, objective, CHAR, params, 0, cfg, one_device())


@pytest.mark.parametrize(
    ("mixer", "sampler"),
    thin([(name, "ancestral") for name in DENOISERS] + [("attention", name) for name in ("confidence", "remdm")]),
)
def test_a_prompt_among_others_gives_what_it_gives_alone(mixer, sampler):
    run = denoiser_run(mixer, sampler)
    prompts = ["abc", "the long prompt of a whole line ", "b"]
    options = {"max_new_tokens": 7, "num": 2, "seed": 5, "temperature": 1.0}
    together = diffrwkv.generate(run, prompts, batch_size=4, **options)  # a batch, and a part of one
    assert together.lengths.tolist() == [10, 10, 39, 39, 8, 8] and together.tokens.shape == (6, 39)
    for i, prompt in enumerate(prompts):
        alone = diffrwkv.generate(run, prompt, start=2 * i, **options)  # on a canvas of 32 tokens, or of 64
        same = slice(2 * i, 2 * i + 2)
        assert alone.texts == together.texts[same] and all(text.startswith(prompt) for text in alone.texts)
        np.testing.assert_array_equal(alone.tokens, together.tokens[same, : alone.tokens.shape[1]])
        np.testing.assert_array_equal(alone.passes, together.passes[same])
        assert alone.texts[0] != alone.texts[1]
        assert (together.tokens[same, alone.tokens.shape[1] :] == CHAR.pad_id).all()
    if mixer == "causal_attention":
        assert together.passes.tolist() == [10, 10, 39, 39, 8, 8]


def test_what_is_compiled_is_used_again():
    run = script_run("abcdefghijkl")
    first = diffrwkv.generate(run, ["ab", "abc"], num=3, max_new_tokens=4, batch_size=4)  # two batches
    traced = run.model.traced
    assert traced >= 1 and first.texts == 3 * ["abcdef"] + 3 * ["abcdefg"]
    diffrwkv.generate(run, ["abcd", "a"], num=3, max_new_tokens=9, batch_size=4, seed=1)
    diffrwkv.generate(run, "abc", num=4, num_steps=6)  # four on the canvas of training
    assert run.model.traced == traced and len(run.generators) == 1
    diffrwkv.generate(run, "abc", num=4, num_steps=5)
    assert run.model.traced > traced and len(run.generators) == 2


def test_length():
    run = script_run("abcdefghijklmnop")
    assert diffrwkv.generate(run).texts == ["abcdefghijkl"]  # the length of training
    assert diffrwkv.generate(run, ["x", "xyz"], length=6).texts == ["xbcdef", "xyzdef"]
    assert diffrwkv.generate(run, ["x", "xyz"], max_new_tokens=2).texts == ["xbc", "xyzde"]
    assert diffrwkv.generate(run, max_new_tokens=3).texts == ["abc"]
    assert diffrwkv.generate(run, infill=["x_z", "____q"]).texts == ["xbz", "abcdq"]
    assert diffrwkv.generate(run, infill=["x_z", "____q"], length=6).texts == ["xbzdef", "abcdqf"]
    assert diffrwkv.generate(run, infill="_*", blank="*", num=2).texts == ["_b", "_b"]


@pytest.mark.parametrize("packing", ["concat", "document"])
def test_a_text_ends_at_the_first_eos(packing):
    run = script_run("?abcdefghijklmnop", BYTE, eos_at=5, wrap=True, packing=packing)
    ended = diffrwkv.generate(run, ["ab", "abcdefg", "x"])
    # Of the second canvas position 5 is given; in the others it is EOS.
    last = "k" if packing == "document" else ""  # there the last position is EOS from the start
    assert ended.texts == ["abcd", "abcdefghij" + last, "xbcd"]
    assert ended.lengths.tolist() == [6, 12, 6] and ended.tokens[0, 0] == BYTE.bos_id
    assert (ended.tokens[0, 5:] == BYTE.eos_id).all() and BYTE.pad_id == BYTE.eos_id
    kept = diffrwkv.generate(run, ["ab"], stop_at_eos=False)
    assert kept.texts == ["abcdfghij" + last] and kept.lengths.tolist() == [12]
    template = diffrwkv.generate(run, infill="a______e__")  # an EOS before what is given ends nothing
    assert template.texts[0] == "abcdfge" + "ij"
    assert diffrwkv.generate(run, "abcdefg", max_new_tokens=1).texts == ["abcdefgh"]
    assert diffrwkv.generate(script_run("abcdefghijkl"), "ab").lengths.tolist() == [12]  # no EOS in this vocabulary


def test_a_canvas_without_masks_comes_back_in_no_pass():
    run = script_run("abcdefghijkl")
    rows = [CHAR.encode("xyz"), np.full(4, CHAR.mask_id, np.int32)]
    (done,) = generation.batches(run, samplers.Ancestral(num_steps=6), rows, return_trace=True)
    assert done.texts == ["xyz", "abcd"] and done.passes[0] == 0 < done.passes[1]
    np.testing.assert_array_equal(done.trace[:, 0, :3], np.tile(rows[0], (7, 1)))


@pytest.mark.parametrize(
    ("prompts", "options", "told"),
    [
        ("", {}, "prompt is empty"),
        (["a", ""], {}, "prompt 2 is empty"),
        ([], {}, "no prompt in the list"),
        (["a", 3], {}, "prompt 2 must be a string, got int"),
        (["a", "b" * 13], {}, "prompt 2 has 13 tokens, too many for length = 12"),
        (["a", "a$"], {}, r"prompt 2: character '\$'"),
        ("a", {"infill": "a_"}, "exclude each other"),
        ("a", {"length": 9, "max_new_tokens": 3}, "max_new_tokens excludes length"),
        (None, {"infill": "a_", "max_new_tokens": 3}, "max_new_tokens excludes length and infill"),
        (None, {"infill": ["a_", "ab"]}, "infill 2 has no blanks"),
        (None, {"infill": "a_", "blank": "__"}, "blank must be one character"),
        (None, {"num": 0}, "num must be at least 1"),
        (None, {"length": 2.5}, "length must be at least 1, and an integer, got 2.5"),
        (None, {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        (None, {"batch_size": 0}, "batch_size must be at least 1"),
        (None, {"start": -1}, "start must be an integer of at least 0"),
        (None, {"temperatur": 0.5}, "no option temperatur; it has"),
        (None, {"sampler": "unheard_of"}, "No sampler is called 'unheard_of'"),
        (None, {"guidance": -1.0}, "guidance scale must be"),
        (None, {"guidance": 1.0}, "nothing is: give a prompt"),
        (["a"], {"blank": "*"}, "blank is the character of a template"),
        (None, {"length": 10**12}, "length = 1000000000000 is too many: at most"),
        ("a", {"max_new_tokens": 10**12}, "length = 1000000000001 is too many"),
        (None, {"num": 10**12}, "num = 1000000000000 is too many"),
        (None, {"length": 2**20, "num": 512, "batch_size": 512}, "512 texts of 1048576 tokens is too large"),
        (None, {"seed": -1}, "seed must be an integer from 0"),
        (None, {"seed": 2**32}, "seed must be an integer from 0"),
        (None, {"seed": 1.5}, "seed must be an integer from 0"),
        (None, {"start": 2**32}, "start, with the number of texts, must be"),
        (None, {"temperature": 0.0, "top_k": 5}, "do nothing at temperature 0"),
        (None, {"sampler": "confidence", "threshold": 0.9}, "threshold does nothing with rule = 'steps'"),
        (None, {"sampler": "first_hitting", "num_steps": 4}, "no option num_steps"),
    ],
)
def test_a_call_that_cannot_be(prompts, options, told):
    run = script_run()
    with pytest.raises(UserError, match=told):
        diffrwkv.generate(run, prompts, **options)
    assert not run.model.traced


def test_a_call_that_needs_another_run(tmp_path):
    with pytest.raises(UserError, match="infill needs a diffusion model"):
        diffrwkv.generate(denoiser_run("causal_attention"), infill="a_")
    with pytest.raises(UserError, match="watch needs one device"):
        diffrwkv.generate(script_run(mesh=types.SimpleNamespace(size=2)), watch=print)
    with pytest.raises(UserError, match="No config.json"):
        diffrwkv.generate(tmp_path)


@pytest.mark.parametrize("name", [*samplers.SAMPLERS, "guided"])
def test_every_sampler_is_watched_and_traced(name):
    options = {"sampler": "ancestral", "guidance": 0.5} if name == "guided" else {"sampler": name}
    if name == "autoregressive":
        run = denoiser_run("causal_attention")
    else:
        other = {"flow_euler": {"name": "flm"}, "pipelined": {"layout": "blocks"}}
        run = denoiser_run("attention", options["sampler"], **other.get(name, {}))
    seen = []
    options |= {"max_new_tokens": 5, "watch": seen.append, "return_trace": True, "batch_size": 5}
    done = diffrwkv.generate(run, ["ab", "the "], **options)
    assert all([len(z) for z in batch] == [7, 9] for batch in seen)
    for i, prompt in enumerate(("ab", "the ")):
        rows = [CHAR.decode(batch[i]) for batch in seen]
        assert rows[0] == prompt + "_____" and rows[-1] == done.texts[i]
        assert all(row.startswith(prompt) for row in rows)
        if name != "pipelined":  # whose passes over the context show nothing
            assert len(rows) == done.passes.max() / (2 if name == "guided" else 1) + 1
        steps = [CHAR.decode(z[: len(rows[0])]) for z in done.trace[:, i]]
        assert steps[0] == rows[0] and steps[-1] == rows[-1]
        assert set(rows) <= set(steps) or name == "remdm"  # there a step's masks are seen before what it reveals
    assert done.trace.shape[1:] == done.tokens.shape and done.trace.dtype == np.int32
    run = dataclasses.replace(run, params=jax.tree.map(lambda x: x * jnp.nan, run.params))
    with pytest.raises(UserError, match="not finite where"):  # rather than text, or no end
        diffrwkv.generate(run, ["ab", "the "], **options)


def test_batches_have_one_trace():
    run = script_run("abcdefghijkl")
    options = {"num": 5, "seed": 2, "return_trace": True}
    whole, cut = (diffrwkv.generate(run, "a", batch_size=size, **options) for size in (5, 2))
    np.testing.assert_array_equal(whole.trace, cut.trace)
    np.testing.assert_array_equal(whole.trace[-1], whole.tokens)
    with pytest.raises(UserError, match="return_trace=True"):
        diffrwkv.generate(run).save_trace("x.html")


def test_the_package_is_light():
    code = "import sys, diffrwkv; assert not {'jax', 'numpy'} & set(sys.modules); assert 'generate' in dir(diffrwkv)"
    code += "; assert callable(diffrwkv.generate) and diffrwkv.load and diffrwkv.Generation"
    subprocess.run([sys.executable, "-c", code], check=True)
    for name in diffrwkv.__all__:
        assert getattr(diffrwkv, name) is not None and name in dir(diffrwkv)
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        diffrwkv.generat  # noqa: B018
