"""The training program: its step against a slow definition, and whole runs that are killed, stopped and continued."""

import functools
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from diffrwkv import checkpoint, cli, config, train
from diffrwkv.config import UserError
from diffrwkv.data import Tokenizer
from diffrwkv.diffusion import objectives
from diffrwkv.diffusion.processes import Vocabulary
from diffrwkv.train_step import make_train_step
from diffrwkv.workdir import read_metrics

KILL_AT_STEP = """
write = metrics.Writer.write
def and_die(self, step, values):
    write(self, step, values)
    if step == {step}:
        os.kill(os.getpid(), signal.{signal})
metrics.Writer.write = and_die
"""

KILL_IN_SAVE = """
save = checkpoint.Checkpoints.save
def and_die(self, step, *rest):
    save(self, step, *rest)
    if step == {step}:
        os.kill(os.getpid(), signal.SIGKILL)
checkpoint.Checkpoints.save = and_die
"""


def arrays_of(workdir, step):
    """{name: bytes} of every array of a checkpoint."""
    state = {}
    folders = [workdir / "checkpoints" / str(step) / item for item in checkpoint.ITEMS]
    for folder in filter(Path.is_dir, folders):
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as reader:
            tree = reader.metadata(folder).item_metadata.tree
            as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
            part = reader.restore(folder, args=ocp.args.PyTreeRestore(restore_args=as_numpy))
        state |= part if folder.name == "rest" else {folder.name: part}
    assert {"params", "ema", "opt_state", "step"} == set(state) - {"objective"}
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): np.asarray(x).tobytes() for path, x in leaves}


def losses(workdir):
    lines = read_metrics(workdir / "metrics.jsonl")
    return [(line["step"], line.get("train/loss"), line.get("val/nelbo")) for line in lines]


# --- A whole run ------------------------------------------------------------------------------------


def test_files_of_a_run(trained):
    lines = read_metrics(trained / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 13))
    for line in lines:
        assert {"train/loss", "train/grad_norm", "train/learning_rate", "tokens_per_second"} <= set(line)
        assert ("val/nelbo" in line) == (line["step"] % 4 == 0)
        assert line["tokens"] == line["step"] * 8 * 16
    assert "compile_seconds" in lines[0]
    assert lines[0]["train/learning_rate"] == 0 and np.isclose(lines[2]["train/learning_rate"], 5e-4)
    assert all(a["seconds"] <= b["seconds"] for a, b in itertools.pairwise(lines))
    stored = json.loads((trained / "config.json").read_text())
    assert stored["train"]["num_steps"] == 12 and stored["data"]["length"] == 16
    tokenizer = Tokenizer.from_json(json.loads((trained / "tokenizer.json").read_text()))
    record = json.loads((trained / "run.json").read_text())
    assert record["data"]["tokenizer_fingerprint"] == tokenizer.fingerprint
    assert record["devices"]["count"] == 2
    assert (trained / "checkpoints" / "12").is_dir()
    assert "--- sample 0 at step 12 ---" in (trained / "stdout.txt").read_text()


@pytest.mark.slow
def test_kill_at_any_step_and_go_on_bit_for_bit(programs, trained):
    """Killed while a checkpoint is being written, then at a random step, then with its newest checkpoint damaged."""
    workdir = programs.folder / "killed"
    first = programs.train(workdir, patch=KILL_IN_SAVE.format(step=4))
    assert first.returncode == -9
    step = random.randint(7, 11)
    second = programs.train(workdir, patch=KILL_AT_STEP.format(step=step, signal="SIGKILL"))
    assert second.returncode == -9, second.stderr
    assert read_metrics(workdir / "metrics.jsonl")[-1]["step"] == step
    saved = [int(p.name) for p in (workdir / "checkpoints").iterdir() if p.name.isdigit()]
    (workdir / "checkpoints" / str(max(saved)) / "ema" / "_METADATA").write_text("{")
    with (workdir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "train/lo')  # a line that the kill cut off
    third = programs.train(workdir)
    assert third.returncode == 0, third.stderr
    assert f"step {max(saved)} cannot be read" in third.stderr
    assert f"Going on from step {sorted(saved)[-2]}" in third.stdout
    assert losses(workdir) == losses(trained), f"killed at step {step}"
    assert arrays_of(workdir, 12) == arrays_of(trained, 12)


def test_sigterm_saves_and_exits_0(programs, trained):
    workdir = programs.folder / "stopped"
    done = programs.train(workdir, patch=KILL_AT_STEP.format(step=6, signal="SIGTERM"))
    assert done.returncode == 0, done.stderr
    assert "saved at step 7" in done.stdout
    assert {"4", "6", "7"} == {p.name for p in (workdir / "checkpoints").iterdir()}
    done = programs.train(workdir, "--config.train.num_steps=9", "--config.train.eval_every=0")
    assert done.returncode == 0, done.stderr
    assert "Going on from step 7" in done.stdout and "config.train.num_steps = 9, which was 12" in done.stdout
    assert [x[:2] for x in losses(workdir)] == [x[:2] for x in losses(trained)][:9]


SIGNAL_LATER = """
import threading
def later(seconds, number):
    timer = threading.Timer(seconds, os.kill, (os.getpid(), number))
    timer.daemon = True
    timer.start()
"""

FROM_THE_FIRST_LINE = (
    SIGNAL_LATER
    + """
later({seconds}, signal.{signal})
"""
)

FROM_THE_FIRST_STEP = (
    SIGNAL_LATER
    + """
write = metrics.Writer.write
def and_start(self, step, values):
    if not hasattr(self, "started"):
        self.started = True
        later({seconds}, signal.{signal})
    write(self, step, values)
metrics.Writer.write = and_start
"""
)

IN_EVALUATION = """
from diffrwkv.evaluator import Evaluator
call = Evaluator.__call__
def and_signal(self, *weights, **options):
    os.kill(os.getpid(), signal.SIGTERM)
    return call(self, *weights, **options)
Evaluator.__call__ = and_signal
"""


def same_run(workdir, reference):
    return losses(workdir) == losses(reference) and arrays_of(workdir, 12) == arrays_of(reference, 12)


@pytest.mark.slow
def test_kills_at_any_moment(programs, trained):
    """From the first step on, while it trains, saves, evaluates and samples; each run goes on where the last died."""
    rng, kills, number = np.random.default_rng(), 0, 0
    while kills < 22:
        workdir, number = programs.folder / f"killed-{number}", number + 1
        while True:
            patch = FROM_THE_FIRST_STEP.format(seconds=rng.uniform(0, 1.5), signal="SIGKILL") if kills < 22 else ""
            done = programs.train(workdir, patch=patch)
            if done.returncode == 0:
                break
            assert done.returncode == -9, done.stderr
            kills += 1
        assert same_run(workdir, trained), workdir
        shutil.rmtree(workdir)


@pytest.mark.slow
def test_ten_signals_at_any_moment(programs, trained):
    """None is lost: 143 or 130 with a word before the first step, 0 and a checkpoint after it."""
    rng, signals, number, statuses = np.random.default_rng(), 0, 0, {"SIGTERM": 143, "SIGINT": 130}
    while signals < 10:
        workdir, number = programs.folder / f"signals-{number}", number + 1
        while True:
            name = ("SIGTERM", "SIGINT")[signals % 2]
            patch = FROM_THE_FIRST_LINE if signals % 3 == 0 else FROM_THE_FIRST_STEP
            patch = patch.format(seconds=rng.uniform(0, 1.0), signal=name) if signals < 10 else ""
            done = programs.train(workdir, patch=patch)
            if done.returncode == 0 and "Stopped by a signal" not in done.stdout:
                break
            signals += 1
            if done.returncode:
                assert (done.returncode, done.stderr) == (statuses[name], f"Stopped by {name}.\n"), done.stderr
        assert same_run(workdir, trained), workdir
        shutil.rmtree(workdir)


@pytest.mark.slow
def test_a_signal_during_evaluation(programs, trained):
    """It is heard before the next batch; the evaluation is made good by the next run."""
    workdir = programs.folder / "evaluating"
    done = programs.train(workdir, patch=IN_EVALUATION)
    assert done.returncode == 0 and "saved at step 4" in done.stdout, done.stderr
    assert losses(workdir)[3][2] is None
    again = programs.train(workdir, patch=IN_EVALUATION)
    assert again.returncode == 0 and "still at step 4" in again.stdout, again.stderr
    last = programs.train(workdir)
    assert last.returncode == 0 and same_run(workdir, trained), last.stderr


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_before_the_first_step_ends_with_a_word(monkeypatch, capsys, name, status):
    monkeypatch.setattr(cli, "use_huge_pages", lambda: None)  # it would start pytest anew
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(SystemExit) as e:
            cli.run_program(lambda _: os.kill(os.getpid(), getattr(signal, name)))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert e.value.code == status and capsys.readouterr().err == f"Stopped by {name}.\n"


@pytest.mark.parametrize(("name", "status"), [("SIGTERM", 143), ("SIGINT", 130)])
@pytest.mark.parametrize("program", ["train", "prepare"])
def test_a_signal_while_modules_are_imported_ends_with_a_word(tmp_path, program, name, status):
    for module in ("jax", "numpy"):
        (tmp_path / f"{module}.py").write_text(
            f"import os, signal, time\nos.kill(os.getpid(), signal.{name})\ntime.sleep(60)\n"
        )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    flags = ["--config=quickstart", f"--workdir={tmp_path / 'run'}"] if program == "train" else []
    command = [sys.executable, "-m", f"diffrwkv.{program}", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=50)
    assert (done.returncode, done.stderr) == (status, f"Stopped by {name}.\n")


def test_no_room_in_any_program_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setattr(cli, "use_huge_pages", lambda: None)
    monkeypatch.setattr(signal, "signal", lambda *_: None)

    def main(_):
        raise OSError(28, "No space left on device", "eval.json")

    with pytest.raises(SystemExit) as e:
        cli.run_program(main)
    assert e.value.code == 2 and capsys.readouterr().err == "error: No space left on device: eval.json\n"


def test_a_finished_run_does_nothing(programs, trained):
    before = (trained / "metrics.jsonl").read_text()
    done = programs.train(trained)
    assert done.returncode == 0 and "is at step 12 already" in done.stdout
    assert (trained / "metrics.jsonl").read_text() == before


def test_nan_stops_with_the_step_and_keeps_the_last_good_checkpoint(programs):
    workdir = programs.folder / "diverged"
    arguments = ["--config.optim.learning_rate=1e38", "--config.optim.warmup_steps=0", "--config.optim.clip_norm=0"]
    done = programs.train(workdir, *arguments, "--config.train.checkpoint_every=1", "--config.train.eval_every=0")
    assert done.returncode == 2
    assert done.stderr.count("error:") == 1 and "not finite at step" in done.stderr and "Traceback" not in done.stderr
    failed = int(done.stderr.split("not finite at step ")[1].split(":")[0])
    steps = sorted(int(p.name) for p in (workdir / "checkpoints").iterdir())
    assert steps[-1] == failed - 1 and f"checkpoint of step {failed - 1} is kept" in done.stderr
    assert read_metrics(workdir / "metrics.jsonl")[-1]["step"] == failed - 1


LOSE_VALIDATION = """
from diffrwkv.evaluator import Evaluator
call = Evaluator.__call__
Evaluator.__call__ = lambda *args, **options: call(*args, **options) | {"nelbo": float("nan")}
"""


def test_a_validation_of_nan_stops_with_the_step_and_keeps_the_last_good_checkpoint(programs):
    workdir = programs.folder / "lost"
    done = programs.train(workdir, patch=LOSE_VALIDATION)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "The validation NELBO was nan at step 4: training stopped, the checkpoint of step 2 is kept" in done.stderr
    assert [p.name for p in (workdir / "checkpoints").iterdir()] == ["2"]
    assert read_metrics(workdir / "metrics.jsonl")[-1]["step"] == 3


def test_a_workdir_of_another_config_is_refused(programs, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    arguments = [f"--config={programs.config}", f"--workdir={tmp_path / 'run'}"]
    with pytest.raises(UserError) as e:
        train.main([*arguments, "--config.model.dim=32", "--config.optim.b1=0.5", "--config.train.num_steps=99"])
    assert "config.model.dim: 16 there, 32 here" in str(e.value) and "config.optim.b1" in str(e.value)
    assert "num_steps" not in str(e.value)


def test_other_text_is_refused(programs, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["data"]["sha256"] = "0" * 64
    config.write_json(config.seal(record), tmp_path / "run" / "run.json")
    with pytest.raises(UserError, match="text of data set"):
        train.main([f"--config={programs.config}", f"--workdir={tmp_path / 'run'}"])


def test_what_the_config_gets_wrong_is_told_before_any_compute(programs, tmp_path):
    for override, told in [
        ("--config.data.name=/no/such/file", "/no/such/file"),
        ("--config.data.tokenizer=bpe", "bpe"),
        ("--config.model.pattern=attentoin", "attentoin"),
        ("--config.model.mixers.birwkv7.head_dim=7", "head_dim"),
        ("--config.diffusion.name=x", "objective"),
        ("--config.diffusion.schedule=x", "schedule"),
        ("--config.sampler.name=x", "sampler"),
        ("--config.sampler.top_p=2.0", "top_p"),
        ("--config.optim.schedule=x", "schedule"),
        ("--config.data.length=0", "length"),
        ("--config.train.mesh.data=1000", "mesh"),
    ]:
        with pytest.raises(UserError, match=told):
            train.main([f"--config={programs.config}", f"--workdir={tmp_path}/run", override])


# --- The step ---------------------------------------------------------------------------------------


class TinyModel:
    """Logits from a bag of words, with dropout; looks like a Linen module from outside."""

    vocab, dim = 7, 5

    def init(self, key):
        a, b = jax.random.split(key)
        return {"a": jax.random.normal(a, (self.vocab, self.dim)), "b": jax.random.normal(b, (self.dim, self.vocab))}

    def apply(self, variables, z, t, *, valid=None, deterministic=True, rngs=None):
        p = variables["params"]
        x = p["a"][z]
        x = x + x.mean(axis=1, keepdims=True)
        if not deterministic:
            x = jnp.where(jax.random.bernoulli(rngs["dropout"], 0.8, x.shape), x, 0)
        return jnp.tanh(x) @ p["b"]


def tiny_step(**options):
    model, objective = TinyModel(), objectives.from_config(Vocabulary(7, 6))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.1))
    key = jax.random.key(3)
    params = model.init(jax.random.key(0))
    state = {"params": params, "ema": params, "opt_state": tx.init(params), "step": jnp.int32(0)}
    step = make_train_step(model, objective, tx, key, ema_decay=0.9, **options)
    return step, state, (model, objective, tx, key)


def batch_of(rows, length=9, padded=False, prompts=False):
    rng = np.random.default_rng(rows)
    tokens = rng.integers(6, size=(rows, length)).astype(np.int32)
    stop = rng.integers(1, length + 1, size=(rows, 1)) if padded else length
    batch = {"tokens": tokens, "valid": np.arange(length)[None] < np.broadcast_to(stop, (rows, 1))}
    if prompts:
        batch["scored"] = batch["valid"] & (np.arange(length) >= rng.integers(length, size=(rows, 1)))
    return batch


@pytest.mark.parametrize("accumulate", [1, 4])
@pytest.mark.parametrize("padded, prompts", [(False, False), (True, False), (True, True)])
def test_step_is_the_plain_loop(accumulate, padded, prompts):
    """Microbatches in a Python loop, the mean taken over all tokens of the batch that count at the end."""
    step, state, (model, objective, tx, key) = tiny_step(accumulate=accumulate, padded=padded)
    batch = batch_of(8, padded=padded, prompts=prompts)
    counted = batch["scored" if prompts else "valid"]
    new, measured = jax.jit(step)(state, batch, 0)

    k_times, k_noise = jax.random.split(jax.random.fold_in(key, 0))
    times = objective.times(k_times, 8, 16)

    @jax.jit
    @jax.value_and_grad
    def nats(params, a):
        k_mask, k_dropout = jax.random.split(jax.random.fold_in(k_noise, a))
        rows = a + jnp.arange(0, 8, accumulate)
        denoise = functools.partial(model.apply, {"params": params}, deterministic=False, rngs={"dropout": k_dropout})
        tokens = jnp.asarray(batch["tokens"])[rows]
        return objective.loss(denoise, k_mask, tokens, times[rows], jnp.asarray(counted)[rows]).nats.sum()

    values = [nats(state["params"], a) for a in range(accumulate)]
    count = counted.sum()
    np.testing.assert_allclose(measured["train/loss"], sum(v for v, _ in values) / count, rtol=1e-5)
    grads = jax.tree.map(lambda *g: sum(g) / count, *(g for _, g in values))
    np.testing.assert_allclose(measured["train/grad_norm"], optax.tree.norm(grads), rtol=1e-5)
    updates, _ = tx.update(grads, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    ema = jax.tree.map(lambda e, p: e + (1 - 2 / 11) * (p - e), state["ema"], params)
    for found, expected in ((new["params"], params), (new["ema"], ema)):
        for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)
    assert new["step"] == 1


def test_noise_is_a_function_of_seed_and_step():
    step, state, _ = tiny_step()
    batch = batch_of(8)
    step = jax.jit(step)
    at = lambda n: step(state | {"step": jnp.int32(n)}, batch, n)[1]["train/loss"]
    assert at(5) == at(5) and at(5) != at(6)


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_a_step_that_is_not_finite_changes_nothing(poison):
    step, state, _ = tiny_step()
    bad = jnp.nan if poison == "loss" else 1e30
    state["params"]["b"] = state["params"]["b"] * bad
    step = jax.jit(step)
    new, _ = step(state, batch_of(8), 0)
    for n, o in zip(jax.tree.leaves(new), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(n, o)
    good = new | {"params": TinyModel().init(jax.random.key(1))}
    assert step(good, batch_of(8), 1)[0]["step"] == 0  # it stands still from then on
    assert step(good, batch_of(8), 0)[0]["step"] == 1

    class Kept:
        wait = staticmethod(lambda: None)
        steps = staticmethod(lambda: [3])

    with pytest.raises(UserError, match="step 1.*step 3 is kept"):
        train.refuse_divergence(new, 5, Kept)
    train.refuse_divergence(new, 0, Kept)


DEVICES = """
import sys, jax, jax.numpy as jnp, numpy as np
from flax import linen as nn
from diffrwkv import config, optim, sharding
from diffrwkv.denoiser import Denoiser
from diffrwkv.diffusion import objectives
from diffrwkv.diffusion.processes import Vocabulary
from diffrwkv.run import abstract_params
from diffrwkv.train_step import abstract_state, init_state, make_train_step
cfg = config.parse([f"--config={sys.argv[1]}"])
model = Denoiser(vocab_size=11, **cfg.model.to_dict())
objective = objectives.from_config(Vocabulary(11, 10), **cfg.diffusion.to_dict(), sections=cfg.to_dict())
tokens = np.random.default_rng(0).integers(10, size=(16, 16)).astype(np.int32)
batch = {"tokens": tokens, "valid": np.ones((16, 16), bool)}
for data, fsdp in ((1, 1), (4, 2)):
    mesh = sharding.make_mesh(data, fsdp, jax.devices()[:data * fsdp])
    boxed = abstract_params(model, 16)
    tx, _ = optim.make_optimizer(nn.unbox(boxed), 10, learning_rate=1e-2)
    init = lambda key: init_state(model, tx, 16, key)
    abstract = abstract_state(nn.unbox(boxed), tx)
    assert abstract == jax.eval_shape(init, jax.random.key(0))
    shardings = sharding.follow(abstract, sharding.param_shardings(boxed, mesh), mesh)
    state = jax.jit(init, out_shardings=shardings)(jax.random.key(0))
    step = make_train_step(model, objective, tx, jax.random.key(1), ema_decay=0.9, mesh=mesh)
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, sharding.replicated(mesh)))
    losses = []
    for n in range(3):
        state, measured = step(state, sharding.global_batch(batch, mesh), np.int32(n))
        losses.append(float(measured["train/loss"]))
    kernel = state["params"]["block_0"]["att"]["output"]["kernel"]
    mu = state["opt_state"][1].mu["block_0"]["att"]["output"]["kernel"]
    assert mu.sharding == kernel.sharding == state["ema"]["block_0"]["att"]["output"]["kernel"].sharding
    print(kernel.size // kernel.addressable_shards[0].data.size, *losses)

sys.path.insert(0, sys.argv[2])
from test_train import batch_of, tiny_step
for devices in (1, 2, 8):
    mesh = sharding.make_mesh(devices=jax.devices()[:devices])
    step, state, _ = tiny_step(accumulate=2, mesh=mesh)
    batch = sharding.global_batch(batch_of(16), mesh)
    print(0, *(float(jax.jit(step)(state | {"step": jnp.int32(n)}, batch, n)[1]["train/loss"]) for n in range(3)))
"""


@pytest.mark.slow
def test_eight_devices_give_the_loss_of_one(programs):
    done = programs.python(
        DEVICES,
        programs.config,
        Path(__file__).parent,
        environment={"JAX_NUM_CPU_DEVICES": "8"},
    )
    assert done.returncode == 0, done.stderr
    rows = np.array([[float(x) for x in line.split()] for line in done.stdout.splitlines()])
    np.testing.assert_allclose(rows[0, 1:], rows[1, 1:], rtol=1e-5)
    assert list(rows[:2, 0]) == [1, 2]  # the second mesh splits parameters in two
    np.testing.assert_allclose(rows[2:, 1:], rows[2:3, 1:].repeat(3, 0), rtol=1e-5)
    assert min(np.ptp(rows[0, 1:]), np.ptp(rows[2, 1:])) > 1e-3  # three different steps


def test_interruption_raises_a_flag_only_once():
    before = signal.getsignal(signal.SIGINT)
    with train.Interruption() as stop:
        assert not stop(None, 1)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop(None, 2)
        assert signal.getsignal(signal.SIGINT) == before  # a second one interrupts as usual
    assert signal.getsignal(signal.SIGTERM) != train.Interruption._raise
