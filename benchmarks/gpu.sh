#!/usr/bin/env bash
# mmchat on a GPU, in two commands of at most 4 minutes each:
#   benchmarks/gpu.sh eager    whether logits agree, decoding, first token, 8 and 32 rows at once
#   benchmarks/gpu.sh graphs   the same of compiled steps, replayed as CUDA graphs
# The 11B in full depth with random weights beside transformers, in bfloat16, int8 and int4. Results
# are written to the folder OUT (or .) as they come, a file for each run; one that fails or takes
# too long leaves the others alone. With --dry-run: a toy model on the CPU.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-.} part=${1:-} failed=0 dry=
model="--shapes 11B --device cuda --dtype bfloat16 --context 64,1024 --prompt-tokens 512"
model+=" --vision 1,4 --rows 8,32 --rounds 5 --seconds 4"
if [ "${2:-}" = --dry-run ]; then
  model="--shapes tiny --device cpu --dtype float32 --context 16 --prompt-tokens 16"
  model+=" --layers 2 --vision-layers 3 --vision 1 --rows 2 --rounds 1 --threads 1"
  dry=yes
fi

# measure NAME SECONDS ARGUMENT...: one comparison, within so many seconds
measure() {
  local name=$1 seconds=$2
  shift 2
  # shellcheck disable=SC2086
  timeout "${dry:+60}$seconds" "${PYTHON:-python}" -m benchmarks.compare $model "$@" -o "$out/gpu-$name.json" ||
    { printf 'gpu.sh: %s ended early, with %s\n' "$name" $? >&2 && failed=1; }
}

case $part in
eager)
  for scheme in none int8 int4; do
    measure "$scheme" 78 --quantize $scheme --compile off --measure decode,prefill,picture,bandwidth
  done
  ;;
graphs)
  measure graphs 130 --vs compiled --compile on --measure decode,bandwidth
  measure graphs-rounded 105 --vs nothing --quantize int8,int4 --compile on --measure decode,bandwidth
  ;;
*)
  printf 'usage: %s eager|graphs [--dry-run]\n' "$0" >&2
  exit 2
  ;;
esac
exit $failed
