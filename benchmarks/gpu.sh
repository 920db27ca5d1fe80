#!/usr/bin/env bash
# What waits for a GPU. A and B fit into fifteen minutes of a card, its start included.
#
#   benchmarks/gpu.sh carry DIR      on a machine with a network: what the GPU's machine lacks, into DIR; prints the sizes
#   benchmarks/gpu.sh [A|B|C|D|E] [OUT]  on the GPU's machine; all runs if none is named
#
# A, 430 s: are the kernels right, gradients too; WKV-7 at 8 x 4096 x 12, one long sequence, whole passes of the 170 M
# models. B, 270 s: training at 170 M, DiffuMamba's pass, two backbones of size tiny trained on the same tokens.
# C, 240 s: the third of them, the peers' operators, races. D, 300 s: passes and decoding of the 170 M models, by
# diffrwkv.profile. E, 450 s: what the forms gain: a pass of 65,536 tokens, the same with the time mix left to XLA, and
# with the time axis in one piece; a training step, the same with all of the network's output made, and with the time mix
# left to XLA.
#
# Compiling is most of it: on the machine of an H100 a kernel forward and backward took half a minute and more, and the
# associative form's gradient longer than that.
#
# OUT (else $OUT, else benchmarks/results) gets {correct,wkv7,denoiser,train,profile,step}_gpu.jsonl; each row is added
# when it is measured, and gpu.log. Every part is a process of its own with a limit of its own: one that fails, or is slow,
# takes nothing from the others; the exit status is then 1. But where the first part finds the kernels wrong or broken,
# nothing else runs: their time is worth nothing. A peer that is not there is a line in the log.
#
# $DIFFRWKV_CARRY (.carry) is what `carry` made, of the text $WIKI (train/wiki_0[01].jsonl.xz) in $DIFFRWKV_DATA, and of
# GPT-2's BPE in $TIKTOKEN_CACHE_DIR or the network. In a copy without git, $DIFFRWKV_COMMIT is the commit that rows
# name. SMOKE=1 does the same on a CPU at sizes of no interest: a test of this file.
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

run=ABCDE
case ${1:-} in
  carry) prepare_carry "${2:?usage: benchmarks/gpu.sh carry DIR}"; exit ;;
  A | B | C | D | E) run=$1; shift ;;
esac
out=$(realpath -m "${1:-${OUT:-benchmarks/results}}")
carry=$(realpath -m "${DIFFRWKV_CARRY:-.carry}")
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
mkdir -p "$out"
failed=0

if compgen -G "$carry/wheels/*.whl" > /dev/null; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --upgrade --target "$scratch/site" "$carry"/wheels/*.whl
  export PYTHONPATH=$PYTHONPATH:$scratch/site # before what the machine has; JAX and CUDA are not among them
fi
export TIKTOKEN_CACHE_DIR=$carry/tiktoken PYTHONUNBUFFERED=1 PYTHONWARNINGS=default XLA_PYTHON_CLIENT_PREALLOCATE=false
export JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-$scratch/compiled}

# part LIMIT COMMAND...: at most so many seconds, and no more than the run has left.
part() {
  local status limit=$1 start=$SECONDS left=$((deadline - SECONDS))
  shift
  limit=$((limit * patience))
  limit=$((limit < left ? limit : left))
  echo "== ${*:1:8} =="
  ((limit > 0)) || { echo "== no time left for it =="; failed=1; return; }
  timeout -k 5 "$limit" "$@" && return
  status=$?
  echo "== FAILED: status $status after $((SECONDS - start)) of $limit s =="
  failed=1
  return $status
}

# program LIMIT OPTION...; train LIMIT NAME OVERRIDE...: 60 s of steps, or what the limit leaves
program() {
  part "$2" "$python" -m "benchmarks.$1" --append --out="$out/$1_$tag.jsonl" --dtype bfloat16 "${@:3}"
}
wkv7() { program wkv7 "$@"; }
denoiser() { program denoiser "$@"; }
speed() { # LIMIT OPTION...
  part "$1" "$python" -m diffrwkv.profile --append --output="$out/profile_$tag" --dtype bfloat16 "${speed[@]}" "${@:2}"
}
step() { # LIMIT OPTION...
  part "$1" "$python" -m benchmarks.train_step --devices 1 --out="$out/step_$tag.jsonl" "${step[@]}" "${@:2}"
}
train() {
  part "$1" "$python" -m benchmarks.training --seconds 60 --limit $((patience * $1 - 4)) \
    --out="$out/train_$tag.jsonl" --workdir="$scratch/$2" -- --config="experiments/owt_small.py:$2" \
    --config.data.name="$carry/data" "${common[@]}" "${@:3}"
}
common=(--config.train.checkpoint_every=1000000 --config.train.sample_every=0
  --config.train.data_workers=0 --config.train.tensorboard=False --config.train.log_every=10)

if [[ -z ${SMOKE:-} ]]; then
  export JAX_PLATFORMS=cuda,cpu
  tag=gpu
  patience=1
  shapes=(2x200x3x64 1x1200x2x64/2) # the last one with the time axis split
  one=8x4096x12x64
  long=(--lengths 65536 --heads 12 --parts 1 6 --definition_until 1024)
  timing=(--rounds 2 --repeats 2 --definition_until 1024)
  ours=(pallas_gpu)
  passes=(--size small --scan_layers --lengths 4096 16384 65536 131072)
  flash=(--use attention=cudnn)
  speed=(--size small --scan_layers --batch 1 8 --lengths 1024 4096 16384 65536 --most_seconds 5)
  one_pass=(--size small --scan_layers --lengths 65536)
  step=(--config experiments/owt_small.py:birwkv --vocabulary 50258 --sequences 8 --repeats 12)
  small=(--config.train.batch_size=32)
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
  long=(--lengths 64 --heads 1 --parts 1 2 --definition_until 16)
  timing=(--rounds 1 --repeats 1)
  ours=(chunked)
  passes=(--size peer --layers 2 --scan_layers --lengths 16 32 --repeats 1)
  flash=()
  speed=(--size peer --layers 2 --scan_layers --batch 1 --lengths 32 64 --tokens_per_pass 8 --seconds 0)
  one_pass=(--size peer --layers 2 --scan_layers --lengths 32 --repeats 1)
  step=(--config experiments/peer_shakespeare.py:birwkv --vocabulary 1000 --sequences 1 --repeats 1)
  small=(--config.train.batch_size=2 --config.train.num_steps=20 --config.model.dim=64 --config.model.num_layers=1
    --config.data.length=16 --config.data.tokenizer=char --config.model.dtype=float32)
  tiny=("${small[@]}" --config.train.eval_every=10 --config.train.eval_limit=4 --config.train.eval_batch_size=4)
  attention=()
fi

# Ends everything unless the kernels are right; or merely late, with all that was seen right.
check_kernels() {
  local rows=$out/correct_$tag.jsonl before=0 status
  [[ ! -e $rows ]] || before=$(wc -l < "$rows")
  part 120 "$python" -m benchmarks.correct --shapes "${shapes[@]}" --out="$rows" && return
  status=$?
  if ((status == 124 || status == 137)) && ! tail -qn "+$((before + 1))" "$rows" 2> /dev/null | grep -q '"right": false'; then
    echo "== the kernels were not checked to the end; what was checked is right =="
    return
  fi
  echo "==== STOPPED: the kernels are wrong or broken here (benchmarks.correct); nothing else is measured ===="
  exit 1
}

run_A() {
  check_kernels
  wkv7 120 --shapes "$one" --lengths --implementations "${ours[@]}" --peers "${timing[@]}"
  wkv7 75 --shapes --sides 2 "${long[@]}" --implementations "${ours[@]}" --peers --rounds 1 --repeats 2
  denoiser 60 --names birwkv "${passes[@]}"
  denoiser 55 --names dit "${passes[@]}" "${flash[@]}"
}

run_B() {
  train 95 birwkv --config.train.eval_every=0 "${small[@]}"
  denoiser 45 --names bimamba "${passes[@]}"
  train 65 birwkv/tiny "${tiny[@]}"
  train 65 dit/tiny "${tiny[@]}" "${attention[@]}"
}

run_C() {
  train 65 bimamba/tiny "${tiny[@]}"
  wkv7 40 --shapes "$one" --lengths --sides 1 --implementations --peers jla "${timing[@]}"
  if command -v compute-sanitizer > /dev/null; then
    part 55 compute-sanitizer --tool racecheck --error-exitcode 1 \
      "$python" -m benchmarks.correct --shapes 1x64x1x64 --out="$out/correct_$tag.jsonl"
  else
    echo "compute-sanitizer is not here: no check for races"
  fi
  wkv7 80 --shapes "$one" --lengths --sides 1 --implementations --peers fla fla_exact "${timing[@]}"
}

run_D() {
  speed 80 --names birwkv
  speed 80 --names dit "${flash[@]}"
  speed 80 --names bimamba
  speed 60 --names ar_rwkv
}

run_E() {
  local fused=(--use birwkv7.time_mix=fused)
  denoiser 60 --names birwkv "${one_pass[@]}"
  denoiser 60 --names birwkv "${one_pass[@]}" "${fused[@]}"
  denoiser 60 --names birwkv "${one_pass[@]}" --parts 1
  step 90
  step 90 --whole
  step 90 "${fused[@]}"
}

every_run() {
  local -A limits=([A]=430 [B]=270 [C]=240 [D]=300 [E]=450)
  for letter in A B C D E; do
    [[ $run == *$letter* ]] || continue
    deadline=$((SECONDS + ${limits[$letter]} * patience))
    echo "==== run $letter, $(date -u +%T) ===="
    "run_$letter"
  done
  exit $failed
}
every_run 2>&1 | tee -a "$out/gpu.log"
