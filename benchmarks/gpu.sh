#!/usr/bin/env bash
# What waits for a GPU. A and B fit into fifteen minutes of a card, its start included.
#
#   benchmarks/gpu.sh carry DIR  on a machine with a network: what the GPU's machine lacks, into DIR; prints the sizes
#   benchmarks/gpu.sh [A|B|C] [OUT]  on the GPU's machine; all runs if none is named
#
# A, 400 s: are the kernels right, gradients too; WKV-7 at 8 x 4096 x 12 and of one long sequence; a training step, the
# same with all of the network's output made, and with the time mix left to XLA; passes of the 170 M models, that of
# BiRWKV over 65,536 tokens also with the time mix left to XLA, and with the time axis in one piece.
# B, 430 s: passes of BiRWKV, the operator forward and backward and its peers, training at 170 M and of two backbones of
# size tiny on the same tokens, passes of 131,072. C, 400 s: where a pass's time goes,
# launch by launch, a third such backbone, races, the operator as other GPUs have it, decoding by diffrwkv.profile.
#
# Compiling is most of it, and in one process one kernel is compiled after another. So the parts of a run are processes
# side by side, which compile at once and are timed in turns (benchmarks/turns.py). What they try while they compile takes
# memory too: five passes of 65,536 tokens side by side, whose outputs are 12 GB each, are too much for 80 GB.
#
# OUT (else $OUT, else benchmarks/results) gets {correct,wkv7,denoiser,step,train,launches,profile}_gpu.jsonl; each row is
# added when it is measured, and gpu.log. Every part has a limit of its own: one that fails, or is slow, takes nothing from
# the others; the exit status is then 1. But where BiRWKV's kernels turn out wrong or broken, everything is stopped: their
# time is worth nothing. A peer that is not there is a line in the log.
#
# $DIFFRWKV_CARRY (.carry) is what `carry` made, of the text $WIKI (train/wiki_0[01].jsonl.xz) in $DIFFRWKV_DATA, and of
# GPT-2's BPE in $TIKTOKEN_CACHE_DIR or the network. In a copy without git, $DIFFRWKV_COMMIT is the commit that rows
# name. TIME_MIX=fused leaves what stands around wkv7 to XLA in the trainings. SMOKE=1 does the same on a CPU, one part
# after another, at sizes of no interest: a test of this file.
set -uo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
export PYTHONPATH=$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}
wheels=(grain==0.2.18 array-record==0.8.6 portpicker ml-collections tensorboardX
  jax-linear-attention==0.1.0 fla-core==0.6.0 flax==0.12.8 optax==0.2.8 orbax-checkpoint==0.12.8)

prepare_carry() { # DIR
  local dir=$1 platforms=() wiki=${WIKI:-train/wiki_0[01].jsonl.xz} sum
  for p in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux1; do
    platforms+=(--platform "${p}_x86_64")
  done
  mkdir -p "$dir"/{wheels,tiktoken}
  "$python" -m pip download -q --no-deps --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" -d "$dir/wheels" "${wheels[@]}" || return 1
  [[ -z ${TIKTOKEN_CACHE_DIR:-} ]] || cp "$TIKTOKEN_CACHE_DIR"/* "$dir/tiktoken/"
  TIKTOKEN_CACHE_DIR=$dir/tiktoken "$python" -m diffrwkv.prepare --input "$wiki" --tokenizer gpt2 \
    --validation_fraction 0.01 --output "$dir/data" || return 1
  du -sh "$dir"/*
  sum=$(du -sm "$dir" | cut -f1)
  echo "$sum MiB in all; what travels, the tree with it, must be below 64"
  ((sum < 48)) || { echo "that is more than 48 MiB: leave something out" >&2; return 1; }
}

run=ABC
case ${1:-} in
  carry) prepare_carry "${2:?usage: benchmarks/gpu.sh carry DIR}"; exit ;;
  A | B | C) run=$1; shift ;;
esac
out=$(realpath -m "${1:-${OUT:-benchmarks/results}}")
carry=$(realpath -m "${DIFFRWKV_CARRY:-.carry}")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"
number=0
export DIFFRWKV_TURNS=$scratch/turns
mkdir -p "$DIFFRWKV_TURNS"

if compgen -G "$carry/wheels/*.whl" > /dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$scratch/site" "$carry"/wheels/*.whl
  export PYTHONPATH=$PYTHONPATH:$scratch/site # before what the machine has; JAX and CUDA are not among them
fi
export TIKTOKEN_CACHE_DIR=$carry/tiktoken PYTHONUNBUFFERED=1 PYTHONWARNINGS=default XLA_PYTHON_CLIENT_PREALLOCATE=false
export XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 # of a process, when others have ended
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$scratch/compiled}

# part LIMIT COMMAND...: a process beside the others; at most so many seconds, and no more than the run has left. Its
# lines begin with its number.
part() {
  local limit=$(($1 * patience)) left=$((deadline - SECONDS)) command=("${@:2}")
  limit=$((limit < left ? limit : left))
  number=$((number + 1))
  run_part 2>&1 | sed -u "s/^/[$number] /" &
  [[ -z ${SMOKE:-} ]] || wait
}
run_part() {
  local process status start=$SECONDS
  echo "== ${command[*]:1} =="
  if ((limit <= 0)); then
    echo "== no time left for it =="
    touch "$scratch/failed"
    return
  fi
  timeout -k 5 "$limit" "${command[@]}" &
  process=$!
  echo "$process" >> "$scratch/processes"
  wait "$process" && echo "== done after $((SECONDS - start)) s ==" && return
  status=$?
  echo "== FAILED: status $status after $((SECONDS - start)) of $limit s =="
  touch "$scratch/failed"
  # The others' that are wrong are told, and passes are compared with the plain form before they are timed.
  [[ ${command[*]} != *"benchmarks.correct --only wkv7"* || $status == 124 || $status == 137 ]] || kill -TERM "$script"
}
stop() {
  echo "==== STOPPED: the kernels are wrong or broken here (benchmarks.correct); nothing else is measured ===="
  xargs -r kill < "$scratch/processes" 2> /dev/null
  exit 1
}

# program LIMIT OPTION...; train LIMIT SECONDS NAME OVERRIDE...: so many seconds of steps, or what the limit leaves
program() {
  part "$2" "$python" -m "benchmarks.$1" --append --out="$out/$1_$tag.jsonl" --dtype bfloat16 "${@:3}"
}
correct() { # LIMIT SHAPE WHAT...
  part "$1" "$python" -m benchmarks.correct --only "${@:3}" --shapes "$2" --out="$out/correct_$tag.jsonl"
}
wkv7() { # LIMIT DIRECTION OPTION...
  program wkv7 "$1" --directions "$2" "${@:3}" "${timing[@]}"
}
denoiser() { program denoiser "$@" "${passes[@]}"; }
speed() { # LIMIT OPTION...: not built to take turns, so it has one from its start to its end
  part "$1" flock "$DIFFRWKV_TURNS/turn" "$python" -m diffrwkv.profile --append --output="$scratch/profile_$tag" \
    --dtype bfloat16 "${speed[@]}" "${@:2}"
}
launches() { # LIMIT OPTION...: what hides in a CUDA graph is not told
  part "$1" env XLA_FLAGS="${XLA_FLAGS:-} --xla_gpu_enable_command_buffer=" "$python" -m benchmarks.launches \
    --out="$out/launches_$tag.jsonl" --dtype bfloat16 "${each[@]}" "${@:2}"
}
step() { # LIMIT OPTION...
  part "$1" "$python" -m benchmarks.train_step --devices 1 --out="$out/step_$tag.jsonl" "${step[@]}" "${@:2}"
}
train() {
  part "$1" "$python" -m benchmarks.training --seconds "$2" --limit $((patience * $1 - 4)) \
    --out="$out/train_$tag.jsonl" --workdir="$scratch/$3" -- --config="experiments/owt_small.py:$3" \
    --config.data.name="$carry/data" "${common[@]}" "${@:4}"
}
common=(--config.train.checkpoint_every=1000000 --config.train.sample_every=0
  --config.train.data_workers=0 --config.train.tensorboard=False --config.train.log_every=10)

if [[ -z ${SMOKE:-} ]]; then
  export JAX_PLATFORMS=cuda,cpu
  tag=gpu
  patience=1
  shapes=(2x200x3x64/1 1x1200x2x64/2) # in one piece, and with the time axis split
  one=8x4096x12x64
  long=(--lengths 65536 --heads 12 --parts 1 22)
  timing=(--rounds 2 --repeats 2 --definition_until 1024)
  ours=(pallas_gpu)
  other=pallas_triton # what GPUs have that are not Hopper's
  each=(--size small --scan_layers)
  passes=("${each[@]}")
  at=(4096 65536)
  lengths=(--lengths 4096 16384 65536)
  middle=(--lengths 65536 --checked 4096)
  longest=(--lengths 131072 --checked 4096)
  flash=(--use attention=cudnn)
  speed=(--size small --scan_layers --batch 8 --lengths 1024 16384 --tokens_per_pass 8 --seconds 0.5 --most_seconds 5)
  step=(--config experiments/owt_small.py:birwkv --vocabulary 50258 --sequences 8 --repeats 12)
  small=(--config.train.batch_size=16)
  tiny=(--config.train.batch_size=64 --config.data.length=512 --config.optim.warmup_steps=100
    --config.model.remat=False --config.model.dropout=0.0 --config.train.eval_every=200 --config.train.eval_limit=256
    --config.train.eval_batch_size=64)
  attention=(--config.model.mixers.attention.implementation=cudnn)
else
  export JAX_PLATFORMS=cpu
  tag=smoke
  patience=5
  shapes=(1x20x1x8 1x130x1x8/2)
  one=1x32x1x8
  long=(--lengths 64 --heads 1 --parts 1 2)
  timing=(--rounds 1 --repeats 1 --definition_until 16)
  ours=(chunked)
  other=associative
  passes=(--size peer --layers 2 --scan_layers --repeats 1)
  each=(--size peer --scan_layers)
  at=(32)
  lengths=(--lengths 16 32 64)
  middle=(--lengths 64 --checked 32)
  longest=(--lengths 128 --checked 32)
  flash=()
  speed=(--size peer --layers 2 --scan_layers --batch 1 --lengths 32 64 --tokens_per_pass 8 --seconds 0)
  step=(--config experiments/peer_shakespeare.py:birwkv --vocabulary 1000 --sequences 1 --repeats 1)
  small=(--config.train.batch_size=2 --config.train.num_steps=20 --config.model.dim=64 --config.model.num_layers=1
    --config.data.length=16 --config.data.tokenizer=char --config.model.dtype=float32)
  tiny=("${small[@]}" --config.train.eval_every=10 --config.train.eval_limit=4 --config.train.eval_batch_size=4)
  attention=()
fi
fused=(--use birwkv7.time_mix=fused)
mix=(${TIME_MIX:+--config.model.mixers.birwkv7.time_mix="$TIME_MIX"})

run_A() {
  local own=(--implementations "${ours[@]}" --peers)
  correct 200 "${shapes[0]}" wkv7 time_mix
  correct 260 "${shapes[1]}" wkv7 time_mix
  correct 200 "${shapes[0]}" ssd triton
  correct 200 "${shapes[1]}" ssd triton
  wkv7 240 forward --shapes "$one" --lengths --sides 1 2 "${own[@]}"
  for direction in forward forward+backward; do
    wkv7 260 $direction --shapes --sides 2 "${long[@]}" "${own[@]}"
  done
  denoiser 240 --names dit "${lengths[@]}" "${flash[@]}"
  denoiser 240 --names bimamba "${lengths[@]}"
  step 260
  step 260 --whole
  wait
  denoiser 150 --names birwkv "${middle[@]}" "${fused[@]}"
  denoiser 150 --names birwkv "${middle[@]}" --parts 1
  wait
}

run_B() {
  local own=(--implementations "${ours[@]}" --peers)
  denoiser 300 --names birwkv "${lengths[@]}"
  wkv7 300 forward+backward --shapes "$one" --lengths --sides 1 "${own[@]}"
  wkv7 300 forward+backward --shapes "$one" --lengths --sides 2 "${own[@]}"
  wkv7 300 forward+backward --shapes "$one" --lengths --sides 1 --implementations --peers jla
  wkv7 300 forward+backward --shapes "$one" --lengths --sides 1 --implementations --peers fla fla_exact
  step 300 "${fused[@]}"
  train 330 20 birwkv --config.train.eval_every=0 "${small[@]}" "${mix[@]}"
  train 330 45 birwkv/tiny "${tiny[@]}" "${mix[@]}"
  train 330 45 dit/tiny "${tiny[@]}" "${attention[@]}"
  wait
  denoiser 120 --names birwkv "${longest[@]}"
  wait # a pass and its output take half of the memory
  denoiser 120 --names dit "${longest[@]}" "${flash[@]}"
  wait
}

run_C() {
  launches 200 --name birwkv --lengths "${at[@]}"
  launches 200 --name birwkv --lengths "${at[@]}" "${fused[@]}"
  train 330 45 bimamba/tiny "${tiny[@]}"
  if command -v compute-sanitizer > /dev/null; then
    part 200 compute-sanitizer --tool racecheck --error-exitcode 1 \
      "$python" -m benchmarks.correct --shapes 1x64x1x64 --out="$out/correct_$tag.jsonl"
  else
    echo "compute-sanitizer is not here: no check for races"
  fi
  wkv7 200 forward --shapes "$one" --lengths --sides 1 --implementations --peers jla fla fla_exact
  wkv7 200 forward+backward --shapes "$one" --lengths --sides 1 --implementations "$other" --peers
  speed 200 --names birwkv
  speed 200 --names dit "${flash[@]}"
  wait
  [[ ! -e $scratch/profile_$tag.jsonl ]] || cat "$scratch/profile_$tag.jsonl" >> "$out/profile_$tag.jsonl"
}

every_run() {
  local -A limits=([A]=400 [B]=430 [C]=400)
  script=$BASHPID
  trap stop TERM
  for letter in A B C; do
    [[ $run == *$letter* ]] || continue
    deadline=$((SECONDS + ${limits[$letter]} * patience))
    echo "==== run $letter, $(date -u +%T) ===="
    "run_$letter"
  done
  [[ ! -e $scratch/failed ]]
  exit
}
every_run 2>&1 | tee -a "$out/gpu.log"
