"""Compiles for a TPU without having one: kernels, and whole training steps over a slice of chips.

    pip install -e '.[tpu]'                       # libtpu, which holds the compiler
    python -m benchmarks.compile_tpu              # the kernels of wkv7 and of what stands around it, for v5e and v6e
    python -m benchmarks.compile_tpu --step experiments/owt_small.py:birwkv --topologies v5e:2x2
    python -m benchmarks.compile_tpu --notebook --topologies v5e:2x2    # what the notebook trains, on one chip

Nothing runs and nothing is timed. What is said of a kernel is XLA's memory and cost analysis and the length of the
compiler's schedule: the instruction bundles of one step of the grid, of which a core starts one a cycle when nothing
stalls. Bundles per token and head compare forms of a kernel and nothing else. Of what stands around wkv7 also what
XLA moves by itself, in the plain form, and in how many kernels. Of a step: that the program compiles
with batch and parameters split over the slice, its memory on a chip, and how many kernel launches are in it. Rows go
to benchmarks/results/compile_tpu.jsonl, in the place of those of the same setting.
"""

import argparse
import os
import pathlib
import re
import tempfile
import time

SHAPE = (8, 4096, 12, 64)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--topologies", nargs="+", default=["v5e:2x2", "v6e:2x2"])
    p.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"], help="of the kernels' inputs")
    p.add_argument("--only", nargs="+", choices=("wkv7", "time_mix"), default=("wkv7", "time_mix"))
    p.add_argument("--chunk_size", type=int, default=64)
    p.add_argument("--step", metavar="CONFIG", help="a training step instead of the kernels")
    p.add_argument("--notebook", action="store_true", help="the training steps of notebooks/colab_tpu.ipynb instead")
    p.add_argument("--microbatch", type=int, default=4, help="sequences of the step on each chip")
    p.add_argument("--out", type=pathlib.Path)
    args = p.parse_args()

    # libtpu reads these when it is loaded; a CPU runs what little has to run.
    os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    with tempfile.TemporaryDirectory() as folder:
        if not (args.step or args.notebook):  # what the compiler writes about a whole step would fill the disk
            os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true"
        from benchmarks.measure import RESULTS, origin, read, write

        rows = []
        for topology in args.topologies:
            devices = chips(topology)
            if args.step or args.notebook:
                rows += steps(devices, topology, args.step, args.microbatch)
                continue
            for dtype in args.dtypes:
                for reverse in ((False,), (False, True)) if "wkv7" in args.only else ():
                    rows += kernels(devices[0], topology, dtype, reverse, args.chunk_size, pathlib.Path(folder))
                if "time_mix" in args.only:
                    rows += around(devices[0], topology, dtype, pathlib.Path(folder))
        out = args.out or RESULTS / "compile_tpu.jsonl"
        new = {setting(row) for row in rows}
        old = [row for row in read(out) if setting(row) not in new]
        write(out, old + [row | origin() for row in rows])


def setting(row):
    """What of two rows one replaces the other for."""
    return tuple(row.get(key) for key in ("program", "topology", "dtype", "directions", "chunk_size"))


def chips(topology):
    """The devices of a slice that is not here."""
    from jax.experimental import topologies

    try:
        return topologies.get_topology_desc(topology_name=topology, platform="tpu").devices
    except Exception as e:
        raise SystemExit(f"No compiler for {topology}: {e}\nInstall libtpu: pip install -e '.[tpu]'") from e


def kernels(device, topology, dtype, reverse, chunk_size, folder):
    """A row for forward and one for backward."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.wkv7.pallas_tpu import wkv7_pallas_tpu

    B, _, H, K = SHAPE
    there = jax.sharding.SingleDeviceSharding(device)
    token = jax.ShapeDtypeStruct(SHAPE, dtype, sharding=there)
    log_w = jax.ShapeDtypeStruct(SHAPE, jnp.float32, sharding=there)
    state = jax.ShapeDtypeStruct((B, H, K, K), jnp.float32, sharding=there)
    ways = len(reverse)
    inputs = ((token, log_w, token, token, token, token),) * ways, (state,) * ways

    def forward(tokens, states):
        return wkv7_pallas_tpu(tokens, states, reverse, chunk_size)

    def backward(tokens, states):
        results, pull = jax.vjp(forward, tokens, states)
        return pull(results)

    rows = []
    for name, run in (("forward", forward), ("backward", backward)):
        for old in folder.iterdir():
            old.unlink()
        start = time.perf_counter()
        compiled = jax.jit(run).lower(*inputs).compile()
        seconds = time.perf_counter() - start
        length = schedule(folder, f"wkv7_{name}")
        cost, memory = compiled.cost_analysis(), compiled.memory_analysis()
        rows.append(
            {
                "program": f"wkv7 {name}",
                "topology": topology,
                "dtype": dtype,
                "directions": ways,
                **dict(zip("BTHK", SHAPE, strict=True)),
                "chunk_size": chunk_size,
                "compile_seconds": seconds,
                "bundles": length,
                "bundles_per_token_head": length / (chunk_size * ways * 2),  # two heads of 64 make a group
                "gflop": cost["flops"] / 1e9,
                "gb_accessed": cost["bytes accessed"] / 1e9,
                "temporary_mb": memory.temp_size_in_bytes / 2**20,
            }
        )
        print(rows[-1], flush=True)
    return rows


def around(device, topology, dtype, folder):
    """Rows for the pieces around wkv7, forward and backward, in one kernel and as XLA does them."""
    import jax

    from benchmarks import time_mix

    rows = []
    for row in time_mix.counted(SHAPE, dtype, jax.sharding.SingleDeviceSharding(device)):
        name = row["program"].removeprefix("time mix, ").replace(" ", "_")
        rows.append(row | {"topology": topology, "bundles": schedule(folder, f"time_mix_{name}")})
        print(rows[-1], flush=True)
        for old in folder.iterdir():
            old.unlink()
    return rows


def schedule(folder, kernel):
    """Bundles in the schedule of a kernel, from what the compiler wrote."""
    (report,) = folder.glob(f"*{kernel}*schedule-analysis_final_bundles.txt")
    return int(re.search(r"total scheduled bundles:\s*(\d+)", report.read_text())[1])


def steps(devices, topology, config_argument, microbatch):
    """A row for the training step of a config over the slice; without one, for those of the notebook on one chip."""
    from benchmarks import notebook
    from diffrwkv import config

    if config_argument is not None:
        return [step(devices, topology, config_argument, config.parse([f"--config={config_argument}"]), microbatch)]
    configs = {name: notebook.experiment(name, "tpu", chips=1) for name in notebook.parameters()["BACKBONES"]}
    return [
        step(devices[:1], topology, f"{notebook.NOTEBOOK.name}:{name}", c, c.train.batch_size)
        for name, c in configs.items()
    ]


def step(devices, topology, name, cfg, microbatch):
    """A row for a training step with the parameters split over the chips."""
    start = time.perf_counter()
    compiled = compile_step(devices, cfg, microbatch)
    memory = compiled.memory_analysis()
    row = {
        "program": f"training step of {name}",
        "topology": topology,
        "chips": len(devices),
        "sequences": microbatch * len(devices),
        "length": cfg.data.length,
        "compile_seconds": time.perf_counter() - start,
        "argument_gb": memory.argument_size_in_bytes / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "kernel_launches": compiled.as_text().count('custom_call_target="tpu_custom_call"'),
    }
    print(row, flush=True)
    return row


def compile_step(devices, cfg, microbatch):
    """A training step of a config, of so many sequences a device, compiled for devices that need not be here."""
    import jax
    import jax.numpy as jnp
    from flax import linen as nn

    from diffrwkv import checkpoint, sharding
    from diffrwkv.plan import nominal_tokenizer
    from diffrwkv.run import abstract_params, build, make_optimizer
    from diffrwkv.train_step import abstract_state, make_train_step

    mesh = sharding.make_mesh(data=1, fsdp=len(devices), devices=list(devices))
    model, objective = build(cfg, nominal_tokenizer(cfg.data.tokenizer))
    boxed = abstract_params(model, cfg.data.length)
    tx, _ = make_optimizer(cfg, nn.unbox(boxed))
    abstract = abstract_state(nn.unbox(boxed), tx)
    shardings = sharding.follow(abstract, sharding.param_shardings(boxed, mesh), mesh)
    run = make_train_step(model, objective, tx, jax.random.key(0), ema_decay=cfg.train.ema_decay, mesh=mesh)
    rows, whole = sharding.batch_sharding(mesh), sharding.replicated(mesh)
    shape = (microbatch * len(devices), cfg.data.length)
    batch = {
        "tokens": jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows),
        "valid": jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=rows),
    }
    jitted = jax.jit(run, donate_argnums=0, in_shardings=(shardings, rows, whole), out_shardings=(shardings, whole))
    state = checkpoint.abstract_like(abstract, shardings)
    return jitted.lower(state, batch, jax.ShapeDtypeStruct((), jnp.int32)).compile()


if __name__ == "__main__":
    main()
