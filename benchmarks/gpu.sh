#!/usr/bin/env bash
# What waits for a GPU, in parts of less than nine minutes each. Run it again and it goes on: a part whose result
# file stands is left out. `train` needs tiny Shakespeare: from the network, or in $DIFFRWKV_DATA.
# Usage: benchmarks/gpu.sh OUT [PART ...]    parts: wkv7 denoiser train
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: benchmarks/gpu.sh OUT [PART ...]}
mkdir -p "$out"
parts=("${@:2}")
python=${PYTHON:-python}
failed=0

# part NAME FILE COMMAND...: runs COMMAND, which writes OUT/FILE.tmp, and keeps it when that went well.
part() {
  local name=$1 file=$2
  shift 2
  [[ ${#parts[@]} == 0 || " ${parts[*]} " == *" $name "* ]] || return 0
  [[ ! -e $out/$file ]] || { echo "$name: $out/$file stands"; return 0; }
  echo "== $name =="
  if timeout 540 "$@" && mv "$out/$file.tmp" "$out/$file"; then
    echo "$name: $out/$file"
  else
    echo "$name: failed" >&2
    failed=1
  fi
}

"$python" - <<'PY' || exit 1
import jax

assert jax.default_backend() != "cpu", "no accelerator: pip install -e '.[cuda]' on a machine that has one"
print(jax.__version__, jax.devices())
PY

part wkv7 wkv7_gpu.jsonl "$python" -m benchmarks.wkv7 --out="$out/wkv7_gpu.jsonl.tmp"
for name in birwkv dit bimamba birwkv_hybrid bimamba_hybrid; do # a file each, so that each has its nine minutes
  part denoiser "denoiser_gpu_$name.jsonl" "$python" -m benchmarks.denoiser --names "$name" \
    --out="$out/denoiser_gpu_$name.jsonl.tmp"
done

train() {
  local workdir=$out/peer_birwkv # train goes on from its newest checkpoint
  "$python" -m diffrwkv.train --config=experiments/peer_shakespeare.py:birwkv --workdir="$workdir" &&
    "$python" -m diffrwkv.evaluate --workdir="$workdir" &&
    cp "$workdir/eval.json" "$out/peer_gpu.json.tmp"
}
export -f train
export out python
part train peer_gpu.json bash -c train
exit $failed
