"""Compiles for an H200 without having one: the wkv7 kernels down to machine code, whole passes, a training step.

    pip install -e '.[cuda]' nvidia-cuda-nvdisasm
    python -m benchmarks.compile_gpu
    python -m benchmarks.compile_gpu --only passes --names birwkv --list      # each launch of a layer
    python -m benchmarks.compile_gpu --gpu t4 --sequences 16 --step experiments/wikitext2_bpe.py:birwkv

Nothing runs and nothing is timed. A row is one of these.

A kernel: whether ptxas serialised its tensor-core products, each of which then waits for the one before; registers and
what is spilled of them, in bytes; shared memory, the blocks that a multiprocessor holds by it, and how many blocks of
the launch are in flight at once; and, where nvdisasm is installed, the instructions that a warp issues for one chunk,
that is those of the loop over chunks. The compiler is the one inside jax's plugin, whatever else is installed.

A pass of a denoiser over one sequence: what one layer launches, and the bytes that its launches read and write
(benchmarks/hlo.py), as the difference between programs of LAYERS layers. XLA tunes its products on the device, so here
it takes its first choice of each. `least_ms` is the time of those bytes at the data sheet's bandwidth: a floor of what
is not bound by arithmetic. `tflop_layer` is of the layer's matrices, `mixer_tflop_layer` of what its mixer does beyond
them as its definition has it.

A piece of the time mix, or ssd, or wkv7 as other GPUs than Hopper's have it, each way: what it moves and launches in
its kernels, and in the plain form; the instructions that the kernels' warps issue for a token and 64 channels, by ptxas
and nvdisasm of NVIDIA's wheels, the most registers and what is spilled.

A training step: XLA's account of its memory, and what it launches and moves. Its program takes minutes to compile.
Other GPUs than an H200 are asked for this alone.

Rows go to benchmarks/results/compile_gpu.jsonl (of another GPU, compile_NAME.jsonl), in the place of those of the same
setting.
"""

import argparse
import collections
import contextlib
import importlib.util
import os
import pathlib
import re
import subprocess
import sys
import tempfile
import time
from unittest import mock

from benchmarks import hlo

# What the compiler must know of the device, as XLA dumps it on one; figures of NVIDIA's data sheet and programming
# guide for compute capability 9.0.
H200 = """
gpu_device_info {
  name: "NVIDIA H200" device_vendor: "NVIDIA Corporation" platform_version: "Compute Capability 9.0a"
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98 device_address_bits: 64
  threads_per_warp: 32 threads_per_block_limit: 1024 threads_per_core_limit: 2048
  thread_dim_limit_x: 1024 thread_dim_limit_y: 1024 thread_dim_limit_z: 64
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  l2_cache_size: 52428800 memory_bandwidth: 4800000000000 device_memory_size: 151397597184
  driver_version: "13.0.0" runtime_version: "13.0.0" compile_time_toolkit_version: "13.0.0" dnn_version: "9.10.0"
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 10 patch: 0 } device_description_str: "NVIDIA H200"
"""
BANDWIDTH = 4.8e12  # bytes a second
MULTIPROCESSORS, SHARED_BYTES, REGISTERS = 132, 233472, 65536  # the last two of each
SHAPE, LONG = (8, 4096, 12, 64), (1, 65536, 12, 64)  # in one piece, and with the time axis in parts
LEVELS = 5  # of the loop that merges blocks of 2, 4, ..., 32 rows of a chunk's inverse
LAYERS = 2, 3  # the first differs from the others
PARTS = "kernels", "time_mix", "walks", "passes", "step"
FORMS = {"dit": ["attention=cudnn"]}  # of a pass, as benchmarks/gpu.sh times it


def _described(name, capability, bandwidth, **figures):
    """(what the compiler must know of another GPU, its bandwidth), by its data sheet."""
    major, minor = capability.split(".")
    text = H200.replace("NVIDIA H200", name).replace("9.0a", capability)
    text = re.sub(r"cuda_compute_capability {.*}", f"cuda_compute_capability {{ major: {major} minor: {minor} }}", text)
    for field, figure in (figures | {"memory_bandwidth": int(bandwidth)}).items():
        text = re.sub(rf"\b{field}: \S+", f"{field}: {figure}", text)
    return text, bandwidth


GPUS = {
    "h200": (H200, BANDWIDTH),
    "a100": _described(
        "NVIDIA A100-SXM4-40GB",
        "8.0",
        1.555e12,
        core_count=108,
        fpus_per_core=64,
        clock_rate_ghz=1.41,
        shared_memory_per_core=167936,
        shared_memory_per_block_optin=166912,
        l2_cache_size=41943040,
        device_memory_size=42505076736,
    ),
    "t4": _described(
        "Tesla T4",
        "7.5",
        3.2e11,
        core_count=40,
        fpus_per_core=64,
        clock_rate_ghz=1.59,
        threads_per_core_limit=1024,
        shared_memory_per_core=65536,
        shared_memory_per_block_optin=65536,
        l2_cache_size=4194304,
        device_memory_size=15835660288,
    ),
}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gpu", choices=GPUS, default="h200")
    p.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    p.add_argument("--names", nargs="+", default=["birwkv", "dit", "bimamba"], metavar="NAME", help="of the passes")
    p.add_argument("--lengths", type=int, nargs="+", default=[65536], help="of the passes' sequence")
    p.add_argument("--size", default="small", help="of the passes")
    p.add_argument("--use", nargs="*", metavar="WHAT=FORM", help="name the form of an operator in the passes")
    p.add_argument("--list", action="store_true", help="print each launch of a layer")
    p.add_argument("--step", default="experiments/owt_small.py:birwkv", metavar="CONFIG")
    p.add_argument("--sequences", type=int, default=8, help="of the step")
    p.add_argument("--out", type=pathlib.Path)
    args = p.parse_args()
    if args.gpu != "h200":
        args.only = ("step",)

    # The plugin reads these when it compiles; a program that is found in a cache is not compiled.
    os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    folder = tempfile.TemporaryDirectory()
    if {"time_mix", "walks"} & set(args.only):  # of the functions of their benchmarks: whole passes are much to write
        dumped = "--xla_dump_emitter_re=ptx --xla_dump_hlo_module_re=jit_(mixes|inputs|ending|recurrence|backward)"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={folder.name} {dumped}"
    from jax.experimental import topologies

    from benchmarks.measure import RESULTS, origin, read, write

    try:
        described, _ = GPUS[args.gpu]
        found = topologies.get_topology_desc(args.gpu, platform="cuda", target_config=described, topology="1x1x1")
        (chip,) = found.devices
        from jax_cuda13_plugin import _versions
    except Exception as e:
        raise SystemExit(f"No compiler for a GPU: {e}\nInstall it: pip install -e '.[cuda]'") from e
    built = _versions.cuda_runtime_build_version()
    versions = {"ptxas": f"{built // 1000}.{built % 1000 // 10}"}

    out = args.out or RESULTS / f"compile_{'gpu' if args.gpu == 'h200' else args.gpu}.jsonl"
    old, rows = read(out), []
    for row in measured(chip, args, pathlib.Path(folder.name)):
        rows.append(row | origin() | versions)
        print({key: value for key, value in row.items() if value is not None}, flush=True)
        new = {setting(row) for row in rows}
        write(out, [row for row in old if setting(row) not in new] + rows)
    if any("instructions" in row and row["instructions"] is None for row in rows):
        print("Instructions are not counted: pip install nvidia-cuda-nvdisasm")


def measured(chip, args, folder):
    """Yields the rows; XLA writes Triton's kernels into the folder."""
    from pallas_kernels.wkv7 import split

    if "kernels" in args.only:
        for reverse in ((False,), (False, True)):
            yield from kernels(chip, reverse, SHAPE, 1)
            yield from kernels(chip, reverse, LONG, split.parts_of(len(reverse), LONG))
    with as_on(args.gpu):
        import jax

        from benchmarks import time_mix, walks

        there = jax.sharding.SingleDeviceSharding(chip)
        if "time_mix" in args.only:
            for row in time_mix.counted(SHAPE, "bfloat16", there):
                yield row | triton_figures(folder)
        for shape in (SHAPE, LONG) if "walks" in args.only else ():
            for row in walks.counted(shape, there):
                yield row | triton_figures(folder)
        for name in args.names if "passes" in args.only else ():
            for length in args.lengths:
                yield one_pass(chip, name, length, args)
        if "step" in args.only:
            yield step(chip, args.gpu, args.step, args.sequences)


def setting(row):
    """What of two rows one replaces the other for."""
    return tuple(str(row.get(key)) for key in ("program", "directions", "T", "size", "L", "use", "sequences"))


@contextlib.contextmanager
def as_on(gpu):
    """Forms are chosen, and Triton's kernels lowered, as in a process that has one of GPUS."""
    import jax

    from pallas_kernels import products
    from pallas_kernels.time_mix import api as time_mix
    from pallas_kernels.wkv7 import api as wkv7

    described, _ = GPUS[gpu]
    found = re.search(r'name: "([^"]*)".* core_count: (\d+)', described, re.DOTALL)
    device = jax.sharding.AbstractDevice(device_kind=found[1], num_cores=int(found[2]), platform="gpu")
    with (
        mock.patch.object(wkv7, "_is_hopper", lambda: gpu == "h200"),
        mock.patch.object(time_mix, "_is_gpu", lambda: gpu != "t4"),
        mock.patch.object(products, "has_tensor_cores", lambda: gpu != "t4"),
        jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device)),
    ):
        yield


def one_pass(chip, name, length, args):
    """A row for a pass over one sequence, bfloat16, by the difference of two depths."""
    import jax
    import jax.numpy as jnp

    from diffrwkv import metrics, profile

    there = jax.sharding.SingleDeviceSharding(chip)
    use = FORMS.get(name, []) if args.use is None else args.use
    options = {"dtype": "bfloat16", "use": dict(choice.split("=") for choice in use)}
    z = jax.ShapeDtypeStruct((1, length), jnp.int32, sharding=there)

    def compiled(layers):
        model = profile.build(name, args.size, layers=layers, **options)
        made = jax.eval_shape(lambda: profile.random_weights(model))
        params = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), made)
        flops = metrics.model_flops_per_token(profile.for_each_position(params)) / 3
        work = {"tflop": 1e-12 * length * flops, "mixer_tflop": 1e-12 * length * model.flops(length)}
        return model, work, profile.compile_pass(model, params, z)

    start = time.perf_counter()
    (_, less_work, fewer), (model, work, more) = map(compiled, LAYERS)
    launched = [hlo.kernels(program.as_text()) for program in (fewer, more)]
    if args.list:
        for kernel in layer_of(launched[1], f"block_{LAYERS[0]}"):
            size = f"{kernel.bytes / 1e6:9.1f} MB x {kernel.times:3}"
            print(f"{size}  {kernel.kind:8} {kernel.name}  {kernel.source[-100:]}")
    row = {"program": f"pass of {name}", "size": args.size, "B": 1, "L": length, "use": options["use"]}
    row |= {"dim": model.dim, "layers": ", ".join(map(str, LAYERS)), "dtype": "bfloat16"}
    row |= difference(*map(totals, launched)) | difference(less_work, work)
    row["least_ms"] = 1e12 * row["gb_layer"] / BANDWIDTH
    if name == "birwkv":
        by = list(map(by_place, launched))
        row["places"] = {place: difference(*(totals(one[place]) for one in by)) for place in PLACES}
    row["temporary_gb"] = more.memory_analysis().temp_size_in_bytes / 1e9
    return row | {"compile_seconds": time.perf_counter() - start}


def totals(launched):
    """GB moved and launches, of some kinds."""
    found = {"gb": 1e-9 * sum(k.bytes * k.times for k in launched), "kernels": sum(k.times for k in launched)}
    for kind in ("product", "call", "fusion"):
        own = [k for k in launched if k.kind == kind]
        found |= {f"{kind}s": sum(k.times for k in own), f"{kind}_gb": 1e-9 * sum(k.bytes * k.times for k in own)}
    return found | {"small": sum(k.times for k in launched if k.bytes < hlo.SMALL)}


PLACES = (
    "wkv7",
    "around its launches",
    "time mix",
    "products",
    "norms, and the residual stream",
    "shifts by a token",
    "relu squared",
    "casts of weights and vectors, below 4 MB",
    "other",
)


def by_place(launched):
    """{of PLACES: the launches there} of a pass of BiRWKV."""
    places = {place: [] for place in PLACES}
    for kernel in launched:
        if "wkv7_pallas_gpu" in kernel.source:  # segments of the time axis: padded, cut, their states composed
            place = "wkv7" if kernel.kind == "call" else "around its launches"
        elif kernel.kind == "call":
            place = "time mix"
        elif kernel.kind == "product":
            place = "products"
        elif kernel.bytes < hlo.SMALL:
            place = "casts of weights and vectors, below 4 MB"
        else:
            place = next((place for end, place in SOURCES.items() if re.search(end, kernel.source)), "other")
        places[place].append(kernel)
    return places


# Of what XLA generates, by where in the model it comes from.
SOURCES = {
    r"/ln(\d|_out)/|/block_\d+/add$": "norms, and the residual stream",
    r"/(att|ffn)/(add|split|concatenate|convert_element_type)$": "shifts by a token",  # what becomes of them too
    r"/ffn/square$": "relu squared",
}


def difference(fewer, more):
    """What one more layer adds."""
    return {f"{key}_layer": more[key] - fewer[key] for key in more}


def layer_of(launched, block):
    """The launches that come from a layer."""
    return [kernel for kernel in launched if f"/{block}/" in kernel.source]


def step(chip, gpu, config_argument, sequences):
    """A row for the memory of a training step of a config, and what it moves; compiling it takes minutes."""
    from benchmarks.compile_tpu import compile_step
    from diffrwkv import config

    cfg = config.parse([f"--config={config_argument}"])
    start = time.perf_counter()
    compiled = compile_step([chip], cfg, sequences)
    memory, moved = compiled.memory_analysis(), totals(hlo.kernels(compiled.as_text()))
    _, bandwidth = GPUS[gpu]
    return {
        "program": f"training step of {config_argument}",
        "sequences": sequences,
        "L": cfg.data.length,
        "remat": cfg.model.remat,
        "argument_gb": memory.argument_size_in_bytes / 1e9,
        "temporary_gb": memory.temp_size_in_bytes / 1e9,
        "dtype": cfg.model.dtype,
        "gb": moved["gb"],
        "kernels": moved["kernels"],
        "least_seconds": 1e9 * moved["gb"] / bandwidth,
        "compile_seconds": time.perf_counter() - start,
    }


def kernels(chip, reverse, shape, parts):
    """A row for each kernel of a pass forward, and of one forward and backward."""
    import jax
    import jax.numpy as jnp

    from pallas_kernels.wkv7.pallas_gpu import wkv7_pallas_gpu

    there = jax.sharding.SingleDeviceSharding(chip)
    batch, _, heads, size = shape
    token = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=there)
    log_w = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=there)
    state = jax.ShapeDtypeStruct((batch, heads, size, size), jnp.float32, sharding=there)
    inputs = ((token, log_w, token, token, token, token),) * len(reverse), (state,) * len(reverse)

    def forward(tokens, states):
        return wkv7_pallas_gpu(tokens, states, reverse, parts=parts)

    def both(tokens, states):
        results, pull = jax.vjp(forward, tokens, states)
        return pull(results)

    named = (
        (forward, {"wkv7_maps": "wkv7 maps", "wkv7_forward": "wkv7 forward"}),
        (
            both,
            {
                "wkv7_forward": "wkv7 forward, states saved",
                "wkv7_backward_maps": "wkv7 backward maps",
                "wkv7_backward": "wkv7 backward",
            },
        ),
    )
    dumps = {f"MOSAIC_GPU_DUMP_{x}": "1" for x in ("PTXAS", "SASS", "RESOURCES")}
    rows = []
    for run, names in named:
        start = time.perf_counter()
        with tempfile.TemporaryFile() as file:
            with printed_to(file), mock.patch.dict(os.environ, dumps):
                jax.jit(run).trace(*inputs).lower().compile()
            seconds = time.perf_counter() - start
            file.seek(0)
            found = figures(file.read().decode())
        for kernel, name in names.items():
            if kernel in found:
                blocks = len(reverse) * batch * heads * parts // found[kernel]["launches"]
                row = {"program": name, "directions": len(reverse), **dict(zip("BTHK", shape, strict=True))}
                row |= {"parts": parts, "blocks": blocks} | found[kernel] | {"compile_seconds": seconds}
                held = row["blocks_a_multiprocessor"]
                rows.append(row | {"blocks_in_flight": held and min(blocks, held * MULTIPROCESSORS)})
    return rows


@contextlib.contextmanager
def printed_to(file):
    """What this process and its libraries print goes to a file."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(1), os.dup(2)]
    try:
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, old in zip((1, 2), kept, strict=True):
            os.dup2(old, descriptor)
            os.close(old)


def figures(text):
    """{kernel: its figures} of what a compilation printed; of two launches of one name, those of the first.

    Raises:
      ValueError: no kernel in it, or one without ptxas's lines.
    """
    start = r"^ptxas info\s*: Compiling entry function '(\w+)_mosaic_gpu_kernel'"
    names = re.findall(start, text, re.MULTILINE)
    if not names:
        raise ValueError(f"The compiler told of no kernel; it printed: {text[:500]!r}")
    memory = re.findall(r"smem_scratch_bytes=(\d+)", text)
    parts = re.split(start, text, flags=re.MULTILINE)[2::2]
    found = {}
    for i, (name, part) in enumerate(zip(names, parts, strict=True)):
        spilled = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", part)
        registers = re.search(r"Used (\d+) registers", part)
        if not spilled or not registers:
            raise ValueError(f"ptxas told nothing of {name}: {part[:500]!r}")
        # (C7510, C7512) "wgmma.mma_async instructions are serialized due to ... in the function '...'"
        serialised = [line for line in text.splitlines() if "serialized" in line and f"'{name}_" in line]
        shared = int(memory[i]) if len(memory) == len(names) else None
        if name in found:  # the other direction's
            found[name]["launches"] += 1
            continue
        found[name] = {
            "launches": 1,
            "serialised": bool(serialised),
            "reason": "; ".join(line.partition("serialized due to ")[2] or line for line in serialised),
            "registers": int(registers[1]),
            "spill_stores": int(spilled[1]),
            "spill_loads": int(spilled[2]),
            "shared_bytes": shared,
            "blocks_a_multiprocessor": shared and blocks_held(shared, int(registers[1])),
            **instructions(part),
        }
    return found


def triton_figures(folder):
    """Figures of our kernels among XLA's files in a folder, which are removed: sums, and the most registers of one."""
    from pallas_kernels.ssd import pallas_gpu as ssd
    from pallas_kernels.time_mix import pallas_gpu as time_mix
    from pallas_kernels.wkv7 import pallas_triton as wkv7

    # Tokens of a step of the loop, for 64 channels.
    tiles = {"time_mix": time_mix.TILE * time_mix.LANES / 64, "ssd": ssd.SIZE, "wkv7": wkv7.SIZE}
    wheels = importlib.util.find_spec("nvidia")
    roots = wheels.submodule_search_locations or () if wheels else ()
    tools = {path.name: path for root in roots for path in pathlib.Path(root).glob("cu*/bin/*")}
    missing = {"ptxas", "nvdisasm"} - set(tools)
    found = []
    for path in folder.iterdir():
        text = path.read_text() if path.suffix == ".ptx" and not missing else ""
        for name, kind in re.findall(r"\.entry ((time_mix|ssd|wkv7)_\w+)", text):
            threads = int(re.search(rf"{name}\(.*?\.reqntid (\d+)", text, re.DOTALL)[1])
            command = [tools["ptxas"], "-v", "-arch=sm_90a", path, "-o", path.with_suffix(".cubin")]
            told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
            told = told[told.index(f"'{name}'") :]
            code = subprocess.run(
                [tools["nvdisasm"], path.with_suffix(".cubin")], check=True, capture_output=True
            ).stdout
            code = re.search(rf"\.section\s+\.text\.{name},.*?(?=\.section|\Z)", code.decode(), re.DOTALL)[0]
            _, loops = listed(code)
            longest = max(last - first for first, last in loops)
            counts = (r"Used (\d+) registers", r"(\d+) bytes spill stores")
            found.append((longest * (threads // 32) / tiles[kind], *(int(re.search(x, told)[1]) for x in counts)))
    for path in folder.iterdir():
        path.unlink()
    if not found:
        return dict.fromkeys(("instructions", "registers", "spill_stores"))
    instructions, registers, spilled = zip(*found, strict=True)
    return {"instructions": sum(instructions), "registers": max(registers), "spill_stores": sum(spilled)}


def blocks_held(shared, registers, threads=128):
    """Blocks that fit into a multiprocessor, 1 KB of whose shared memory each takes for itself."""
    per_warp = -(-registers * 32 // 256) * 256
    return min(SHARED_BYTES // (shared + 1024), REGISTERS // (per_warp * threads // 32))


def listed(text):
    """(The names of a disassembled kernel's instructions, [(where a loop of them begins, where it ends)])."""
    names, labels, loops = [], {}, []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*)(.*)", line):
            names.append(found[1])
            target = re.search(r"\.L_x_\d+", found[2]) if found[1] == "BRA" else None
            if target and target[0] in labels:
                loops.append((labels[target[0]], len(names)))
    return names, loops


# Names of machine instructions: of a warpgroup's products, conversions between types, and barriers.
KINDS = {"wgmma": {"HGMMA"}, "conversions": {"F2F", "F2FP", "F2I", "I2F", "I2FP"}, "barriers": {"BAR"}}


def instructions(text):
    """What a warp issues for a chunk in a disassembled kernel, how much of some kinds, and how many stand in its code.

    The loop over chunks is the shortest that has nine tenths of the products; a loop with products within it, that over
    the levels of the inverse, is run LEVELS times.
    """
    names, loops = listed(text)
    if not names:
        return dict.fromkeys(("instructions", "code", *KINDS))

    def products(loop):
        return sum(name in KINDS["wgmma"] for name in names[slice(*loop)])

    def length(loop):
        return loop[1] - loop[0]

    whole = 0, len(names)
    first, last = min((loop for loop in (*loops, whole) if products(loop) >= 0.9 * products(whole)), key=length)
    counts = collections.Counter(names[first:last])
    within = [loop for loop in loops if first < loop[0] and loop[1] < last and products(loop)]
    for loop in [min(within, key=length)] if within else []:
        for name, count in collections.Counter(names[slice(*loop)]).items():
            counts[name] += (LEVELS - 1) * count
    kinds = {kind: sum(counts[name] for name in those) for kind, those in KINDS.items()}
    return {"instructions": counts.total(), "code": last - first} | kinds


if __name__ == "__main__":
    main()
