#!/usr/bin/env bash
# What can only be checked beside a GPU, kernels first; made to take less than a quarter of an hour.
#
#     bash benchmarks/gpu_check.sh            in an environment with the package, its extra dev and a CUDA torch
#
# Results go to $OUT, runs/gpu_check by default. Every step is tried, whatever became of the one before it;
# the last line says which failed. No such run has been made yet: no card was at hand when this was written.
set -u
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python}
OUT=${OUT:-runs/gpu_check}
export PYTHONPATH=$PWD
[ -e "$OUT" ] && { echo "error: $OUT is there already; name another folder by OUT"; exit 2; }
mkdir -p "$OUT"
failed=()

step() { # NAME SECONDS COMMAND...
    local name=$1 seconds=$2 begun=$SECONDS
    shift 2
    echo "== $name"
    timeout "$seconds" "$@" > "$OUT/$name.log" 2>&1 || failed+=("$name")
    tail -n 3 "$OUT/$name.log"
    echo "   $((SECONDS - begun)) s"
}

step device 30 "$PYTHON" -c "
import torch, triton
assert torch.cuda.is_available(), 'no GPU'
print(torch.__version__, triton.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_capability())"
step backends 45 "$PYTHON" -m ifa_torchrec backends
# the kernels against the reference; no wait for the device; a CUDA graph; the same to the bit
step kernels 200 "$PYTHON" -m pytest -q tests/ops/test_triton.py -m "not slow"
# a step of the dense part, forward, loss and backward: that of the reference, without a wait for the device
step models 60 "$PYTHON" -m pytest -q tests/models/test_no_waits.py tests/models/test_on_devices.py
# writes docs/attention_gpu.md anew, with Triton, varlen_attn, match and the floor
step attention 120 "$PYTHON" benchmarks/attention_gpu.py --rounds 3
cp docs/attention_gpu.md "$OUT/"
step dense_step 90 "$PYTHON" benchmarks/dense_step.py --compiled
# TorchRec on the card: tables under DMP with NCCL, TrainPipelineSparseDist, states built, events a second told;
# needs an fbgemm_gpu built for this CUDA
step log 30 "$PYTHON" -c "
from ifa_torchrec.data.synthetic import SyntheticConfig, prepare
prepare('$OUT/log', SyntheticConfig(train=8000, test=500, mean_events=1000))"
step train 80 "$PYTHON" -m ifa_torchrec train --data "$OUT/log" --out "$OUT/run"
step train_bf16 80 "$PYTHON" -m ifa_torchrec train --data "$OUT/log" --out "$OUT/run_bf16" --precision bf16
step states 30 "$PYTHON" -m ifa_torchrec build-states --run "$OUT/run" --store "$OUT/states" --position 0
step every_backend 90 "$PYTHON" -m pytest -q tests/ops/test_ops.py tests/ops/test_ops_boundary.py -k triton

echo "failed: ${failed[*]:-none}"
[ ${#failed[@]} -eq 0 ]
