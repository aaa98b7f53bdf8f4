#!/usr/bin/env bash
# A log, a training and an evaluation on two ranks of this machine, by TorchX; then what Slurm and
# Kubernetes would be given for the same training on two nodes of four ranks. From a clone's root:
#
#     examples/torchx/launch.sh [FOLDER]
set -euo pipefail
out=${1:-runs/torchx}
[ -x .venv/bin/torchx ] || { echo "error: no .venv here; make setup, then run this from the clone's root" >&2; exit 1; }
[ ! -e "$out" ] || { echo "error: $out is there already; name another folder" >&2; exit 1; }
export PATH="$PWD/.venv/bin:$PATH"  # TorchX starts torchrun by its name
export OMP_NUM_THREADS=1            # two ranks, two cores
mkdir -p "$out"

python - "$out/log" <<'PYTHON'
import sys

from ifa_torchrec.data.synthetic import SyntheticConfig, prepare

prepare(sys.argv[1], SyntheticConfig(train=2000, test=500, mean_events=200, distance=50))
PYTHON

train=(ifa.train.ddp --data "$out/log" --out "$out/run" --max_requests 16)
options=(--ifa.embedding-dim 32 --ifa.identity-features item category --ifa.identity-buckets 4096)
torchx run -s local_cwd "${train[@]}" -j 1x2 -- "${options[@]}"
torchx run -s local_cwd ifa.evaluate.ddp -j 1x2 --run "$out/run"

# --dryrun prints the request and sends nothing; without it these lines submit the job
torchx run --dryrun -s slurm -cfg partition=compute,time=1:00:00 \
    "${train[@]}" -j 2x4 --cpu 16 --memMB 64000 --max_retries 2 -- "${options[@]}" > "$out/slurm.txt"
torchx run --dryrun -s kubernetes -cfg queue=default --workspace= \
    "${train[@]}" --image REGISTRY/ifa-torchrec:VERSION --mounts type=volume,src=CLAIM,dst=/shared \
    -j 2x4 --cpu 16 --memMB 64000 --max_retries 2 -- "${options[@]}" > "$out/kubernetes.txt"
echo
echo "Wrote $out/run, $out/slurm.txt (the script for sbatch), $out/kubernetes.txt (Volcano's manifest)"
