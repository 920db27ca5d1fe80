"""Sampling: what is asked for is what comes back, and every wrong question gets an answer."""

import io
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffrwkv import config, sample, sharding
from diffrwkv.config import UserError
from diffrwkv.data import tokenizers
from diffrwkv.diffusion import objectives, samplers, schedules

CHAR = tokenizers.Char("abcdefghij klmnopqrstuvwxyzTB.\n_")
BYTE = tokenizers.Byte()


def row(tokenizer=CHAR, **options):
    return sample.canvas_row(tokenizer, **({"length": None, "default_length": 10} | options))


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
        ({"prompt": ""}, "--prompt is empty"),
        ({"infill": ""}, "--infill is empty"),
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


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--workdir"),
        (["--workdir=/no/such"], "No config.json"),
        (["--workdir=x", "--num=0"], "--num"),
        (["--workdir=x", "--length=0"], "--length must be at least 1"),
        (["--workdir=x", "--num_steps=0"], "--num_steps"),
        (["--workdir=x", "--temperature=-1"], "--temperature"),
        (["--workdir=x", "--top_p=0"], "--top_p"),
        (["--workdir=x", "--top_p=1.5"], "--top_p"),
        (["--workdir=x", "--top_k=-1"], "--top_k"),
        (["--workdir=x", "--guidance=-1"], "--guidance"),
        (["--workdir=x", "--guidance=nan"], "--guidance"),
        (["--workdir=x", "--set=block"], "KEY=VALUE"),
        (["--workdir=x", "--set=name=ancestral"], "KEY=VALUE"),
        (["--workdir=x", "--length=ten"], "ten"),
        (["--workdir=x", "--prompt=a", "--infill=a_"], "exclude"),
        (["--workdir=x", "--blank=__"], "--blank"),
        (["--workdir=x", "--lenght=3"], "--lenght"),
    ],
)
def test_wrong_flags(arguments, told):
    with pytest.raises(UserError, match=told):
        sample.main(arguments)


class Alphabet:
    """Wants the letter that its parameter names, everywhere."""

    def apply(self, variables, z, t):
        return jnp.broadcast_to(10 * jax.nn.one_hot(variables["params"], CHAR.vocab_size), (*z.shape, CHAR.vocab_size))


def generator(mesh=None, watch=None):
    mesh = mesh or sharding.make_mesh(devices=jax.devices()[:1])
    return sample.Generator(Alphabet(), samplers.Ancestral(num_steps=6), CHAR, mesh, watch=watch)


def test_generator_fills_blanks_only():
    canvas = np.tile(row(infill="a_b__c"), (3, 1))
    tokens, passes = generator()(jnp.int32(CHAR.encode("x")[0]), canvas, seed=0)
    assert all(CHAR.decode(t)[i] == "abc"[j] for t in tokens for j, i in enumerate((0, 2, 5)))
    assert (tokens != CHAR.mask_id).all() and ((passes >= 1) & (passes <= 3)).all()
    assert (tokens == CHAR.encode("x")[0]).sum() >= 6


def test_a_sample_depends_on_seed_and_number_alone():
    canvas, x = np.tile(row(), (5, 1)), jnp.int32(-1)  # one_hot(-1) is zero: uniform over tokens
    whole, _ = generator()(x, canvas, seed=3)
    part, _ = generator()(x, canvas[:2], seed=3, start=2)
    every = generator(sharding.make_mesh())(x, canvas, seed=3)[0]  # over all devices, with filling rows
    np.testing.assert_array_equal(whole[2:4], part)
    np.testing.assert_array_equal(whole, every)
    assert (generator()(x, canvas, seed=4)[0] != whole).any() and (whole[0] != whole[1]).any()


def build(name=None, guidance=0.0, **changes):
    objective = objectives.from_config("mdlm", mask_id=CHAR.mask_id, schedule={"name": "linear"})
    return sample.build_sampler(config.base(), objective, name=name, guidance=guidance, **changes)


def test_the_sampler_is_the_configs_or_the_one_that_is_named():
    assert build(top_k=3) == samplers.Ancestral(top_k=3, schedule=schedules.Linear())
    assert build("ancestral", num_steps=7).num_steps == 7
    named = samplers.Confidence(block=32, rule="threshold", schedule=schedules.Linear())
    changes = dict(map(sample.parse_option, ("block=32", "rule=threshold", "threshold=0.9")))
    assert build("confidence", **changes) == named  # with its own defaults: nothing of the config's
    assert build("confidence", 1.5, **changes) == samplers.Guided(named, 1.5)
    assert build("prophet", **dict([sample.parse_option("gaps=[3, 2, 1]")])).gaps == (3, 2, 1)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"name": "unheard_of"}, "choose one of ancestral, autoregressive, confidence, first_hitting, ice, prophet"),
        ({"name": "confidence", "threshold": 2.0}, r"threshold must be in \(0, 1\], got 2.0"),
        ({"name": "confidence", "threshold": "high"}, "--sampler"),
        ({"name": "confidence", "eps": 0.1}, "no option eps; it has num_steps, block"),
        ({"name": "autoregressive"}, "does not sample from .* choose 'ancestral' or 'confidence'"),
        ({"block": 4}, "config.sampler: The sampler 'ancestral' has no option block"),
    ],
)
def test_a_sampler_that_cannot_be(options, told):
    with pytest.raises(UserError, match=told):
        build(**options)


def test_blocks_that_do_not_divide_are_told():
    whole, prompted = row(infill="____________"), row(infill="ab__________a")
    for sampler in (build("confidence", block=4), build("prophet", 1.0, block=4)):
        assert sample.block_note(sampler, whole, CHAR.mask_id) is None
        assert "does not divide the 10 positions to fill: the last block is padded, from 2" in sample.block_note(
            sampler, prompted, CHAR.mask_id
        )
    ice = build("ice", block=3, answer_length=4)  # four blanks are no thinking
    assert "the 8 positions" in sample.block_note(ice, whole, CHAR.mask_id)
    assert sample.block_note(ice, prompted, CHAR.mask_id) is None
    assert sample.block_note(build("confidence"), whole, CHAR.mask_id) is None
    assert sample.block_note(build(), whole, CHAR.mask_id) is None


def test_watch_sees_each_pass_and_the_end():
    seen = []
    canvas = np.tile(row(infill="a____"), (2, 1))
    tokens, passes = generator(watch=lambda z: seen.append(np.array(z)))(jnp.int32(3), canvas, seed=0)
    np.testing.assert_array_equal(seen[0], canvas)
    np.testing.assert_array_equal(seen[-1], tokens)
    masks = [(z == CHAR.mask_id).sum() for z in seen]
    assert masks == sorted(masks, reverse=True) and len(seen) == passes.max() + 1


def test_screen():
    stream = io.StringIO()
    sample.Screen(CHAR, stream, seconds=0)(np.tile(row(infill="a_c"), (2, 1)))
    assert stream.getvalue().startswith("\x1b[H\x1b[2J") and "a\x1b[2m·\x1b[0mc\n\na" in stream.getvalue()


# --- The program ------------------------------------------------------------------------------------


def test_program(trained, capsys):
    sample.main([f"--workdir={trained}", "--num=3", "--infill=be ____ not", "--json", "--watch", "--batch_size=2"])
    out, err = capsys.readouterr()
    lines = [json.loads(line) for line in out.splitlines()]
    assert [line["sample"] for line in lines] == [0, 1, 2] and "needs a terminal" in err
    for line in lines:
        assert line["text"].startswith("be ") and line["text"].endswith(" not") and len(line["text"]) == 11
        assert len(line["tokens"]) == 11 and 1 <= line["passes"] <= 4 and line["step"] == 12
    sample.main([f"--workdir={trained}", "--num=1", "--infill=be ____ not", "--seed=0"])
    assert lines[0]["text"] in capsys.readouterr().out


def test_program_with_another_sampler(trained, capsys):
    options = ["--sampler=confidence", "--set=block=3", "--set=rule=factor", "--guidance=1.5"]
    sample.main([f"--workdir={trained}", "--num=2", "--infill=be ____ not", "--json", *options])
    out, err = capsys.readouterr()
    assert "does not divide the 4 positions" in err
    for line in map(json.loads, out.splitlines()):
        assert line["text"].startswith("be ") and line["text"].endswith(" not")
        assert 4 <= line["passes"] <= 8 and line["passes"] % 2 == 0  # two blocks, two passes a step


def test_program_wants_characters_that_it_knows(trained):
    with pytest.raises(UserError, match="--prompt: character 'Z'"):
        sample.main([f"--workdir={trained}", "--prompt=Z"])
    with pytest.raises(UserError, match="too many"):
        sample.main([f"--workdir={trained}", "--prompt=" + "a" * 16])
