#!/usr/bin/env bash
# What waits for a GPU, in parts of less than nine minutes each. Run it again and it goes on: what stands in OUT is left
# out, what failed or ran into its limit is tried again (its rows so far are in OUT/FILE.tmp). OUT/gpu.log has all output.
# A part that fails stops no other; the exit status is 1 if one did. The tables of what there is are printed last.
#
# Usage: benchmarks/gpu.sh OUT [PART ...]
# Parts: tests wkv7_peers wkv7_both wkv7_grid wkv7_long denoiser train_step train
#
# Nothing need be installed but the dependencies. For the peers: pip install jax-linear-attention fla-core (with torch,
# triton, einops), or they are left out. train_step and train need tiny Shakespeare: from the network, or in
# $DIFFRWKV_DATA. In a copy without git, $DIFFRWKV_COMMIT is the commit that rows name. $DIFFRWKV_RUNS (runs/) takes
# checkpoints and compiled programs. To keep results, copy OUT/{wkv7,denoiser}_gpu*.jsonl to benchmarks/results/.
# DIFFRWKV_GPU_SH=cpu does the same parts on a CPU, at sizes of no interest: a test of this file. $DIFFRWKV_CONFIG is
# then the experiment of train_step and train.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?usage: benchmarks/gpu.sh OUT [PART ...]}")
mkdir -p "$out"
parts=("${@:2}")
python=${PYTHON:-python}
runs=$(realpath -m "${DIFFRWKV_RUNS:-runs}")
mode=${DIFFRWKV_GPU_SH:-gpu}
config=${DIFFRWKV_CONFIG:-experiments/peer_shakespeare.py:birwkv}
export PYTHONPATH=$PWD/src:$PWD${PYTHONPATH:+:$PYTHONPATH}
export JAX_COMPILATION_CACHE_DIR=$runs/compiled # what ran into its limit need not compile again
failed=0

case $mode in
  gpu)
    export JAX_PLATFORMS=cuda,cpu XLA_PYTHON_CLIENT_MEM_FRACTION=0.9
    tests=()
    wkv7=(--dtype bfloat16 --rounds 3 --repeats 3)
    shape=8x4096x12x64
    kinds=(masked random)
    grid=(1x1024x12x64 8x1024x12x64 2x4096x32x64 2x16384x12x64 4x4096x6x128)
    lengths=(32768 65536 131072)
    long=(--heads 12)
    names=(birwkv dit bimamba birwkv_hybrid bimamba_hybrid)
    denoiser=(--size small --dtype bfloat16 --lengths 1024 2048 4096 8192 16384 32768 65536 131072)
    flash=(attention=cudnn)
    ;;
  cpu)
    export JAX_PLATFORMS=cpu
    tests=(-k "test_bad_input or test_no_tokens")
    wkv7=(--dtype bfloat16 --rounds 1 --repeats 1 --implementations chunked --peers)
    shape=1x32x1x8
    kinds=(masked)
    grid=(2x16x1x8)
    lengths=(64)
    long=(--heads 1 --definition_until 16)
    names=(birwkv dit)
    denoiser=(--size peer --layers 1 --dtype bfloat16 --lengths 16 32 --repeats 1)
    flash=(attention=xla)
    ;;
  *)
    echo "DIFFRWKV_GPU_SH is gpu or cpu, not $mode" >&2
    exit 2
    ;;
esac

# part NAME FILE COMMAND...: runs COMMAND, which writes OUT/FILE.tmp, and keeps that file when it went well.
part() {
  local name=$1 file=$2
  shift 2
  [[ ${#parts[@]} == 0 || " ${parts[*]} " == *" $name "* ]] || return 0
  [[ ! -e $out/$file ]] || { echo "$name: $out/$file stands"; return 0; }
  echo "== $name: $file =="
  local start=$SECONDS
  if timeout -k 10 540 "$@" 2>&1 | tee -a "$out/gpu.log" && mv "$out/$file.tmp" "$out/$file"; then
    echo "$name: $out/$file, $((SECONDS - start)) s"
  else
    echo "$name: $file FAILED after $((SECONDS - start)) s" >&2
    failed=1
  fi
}

for name in "${parts[@]}"; do
  [[ " tests wkv7_peers wkv7_both wkv7_grid wkv7_long denoiser train_step train " == *" $name "* ]] ||
    { echo "there is no part $name: see the head of this file" >&2; exit 2; }
done

"$python" - "$mode" <<'PY' || exit 1
import sys

import jax

if jax.default_backend() != sys.argv[1]:
    sys.exit("JAX finds no GPU: pip install -e '.[cuda]' on a machine that has one")
print(jax.__version__, jax.devices())
PY

# Other versions of the dependencies may warn of other things: -W default.
mapfile -t files < <(ls tests/pallas_kernels/test_wkv7{,_gpu}.py 2> /dev/null)
part tests wkv7_tests.xml \
  "$python" -m pytest -q -W default "${tests[@]}" --junitxml="$out/wkv7_tests.xml.tmp" "${files[@]}"

# The numbers that are aimed at first. Torch and JAX share the card, so neither may take all of it at its start.
for kind in "${kinds[@]}"; do
  part wkv7_peers "wkv7_${mode}_peers_$kind.jsonl" env XLA_PYTHON_CLIENT_PREALLOCATE=false \
    "$python" -m benchmarks.wkv7 --shapes "$shape" --lengths --sides 1 --kind "$kind" "${wkv7[@]}" \
    --out="$out/wkv7_${mode}_peers_$kind.jsonl.tmp"
done
part wkv7_both "wkv7_${mode}_both.jsonl" \
  "$python" -m benchmarks.wkv7 --shapes "$shape" --lengths --sides 2 "${wkv7[@]}" \
  --out="$out/wkv7_${mode}_both.jsonl.tmp"
for at in "${grid[@]}"; do # a file each, so that each has its nine minutes
  part wkv7_grid "wkv7_${mode}_$at.jsonl" env XLA_PYTHON_CLIENT_PREALLOCATE=false \
    "$python" -m benchmarks.wkv7 --shapes "$at" --lengths "${wkv7[@]}" \
    --out="$out/wkv7_${mode}_$at.jsonl.tmp"
done
for length in "${lengths[@]}"; do
  part wkv7_long "wkv7_${mode}_1x${length}.jsonl" env XLA_PYTHON_CLIENT_PREALLOCATE=false \
    "$python" -m benchmarks.wkv7 --shapes --lengths "$length" --sides 1 "${long[@]}" "${wkv7[@]}" \
    --out="$out/wkv7_${mode}_1x${length}.jsonl.tmp"
done
for name in "${names[@]}"; do
  part denoiser "denoiser_${mode}_$name.jsonl" \
    "$python" -m benchmarks.denoiser --names "$name" "${denoiser[@]}" --use "${flash[@]}" \
    --out="$out/denoiser_${mode}_$name.jsonl.tmp"
done
part train_step "train_step_$mode.jsonl" \
  "$python" -m benchmarks.train_step --config="$config" --devices 1 --repeats 3 \
  --out="$out/train_step_$mode.jsonl.tmp"

train() {
  local workdir=$runs/$mode # train goes on from its newest checkpoint
  "$python" -m diffrwkv.train --config="$config" --workdir="$workdir" &&
    "$python" -m diffrwkv.evaluate --workdir="$workdir" &&
    cp "$workdir/eval.json" "$out/train_$mode.json.tmp"
}
export -f train
export out python runs mode config
part train "train_$mode.json" bash -c train

[[ $mode == cpu ]] || "$python" -m benchmarks.report --show "$out" wkv7 length
exit $failed
