#!/usr/bin/env bash
# Start the trainer with torchrun, on one machine or on several.
#
# One machine, as many ranks as it has GPUs (or 4 on CPUs):
#     launch/torchrun.sh --length 65536
#
# One machine, 8 ranks:
#     RANKS=8 launch/torchrun.sh --length 131072
#
# Four machines, 8 ranks each: run the same line on every machine, with its number in NODE (0 to 3). HEAD is the
# name or address of machine 0, PORT a port that is free there and open to the others.
#     NODES=4 NODE=0 RANKS=8 HEAD=machine0 PORT=29500 launch/torchrun.sh --length 1048576
#
# Everything after the name goes to launch/train.py; see launch/train.py --help. Ranks are numbered machine by machine,
# and neighbours in the ring are neighbours in number: only 1 of RANKS links leaves a machine. Use --replicas for several
# sequences at once. The data and the run folder are read and written under the same path on every machine.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
python="${PYTHON:-python}"
gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"
nodes="${NODES:-1}"
ranks="${RANKS:-$((gpus > 0 ? gpus : 4))}"

if [ "$nodes" -gt 1 ]; then
    # All machines meet at HEAD:PORT.
    where=(--nnodes "$nodes" --node-rank "${NODE:?is the number of this machine, 0 to $((nodes - 1))}"
        --master-addr "${HEAD:?is the name of machine 0}" --master-port "${PORT:?is a free port on machine 0}")
else
    where=(--standalone) # a free port of this machine
fi

# Ranks that each take every core wait for each other's threads.
if [ -z "${OMP_NUM_THREADS:-}" ]; then
    cores="$(getconf _NPROCESSORS_ONLN)"
    export OMP_NUM_THREADS="$((cores / ranks > 0 ? cores / ranks : 1))"
fi

exec "$python" -m torch.distributed.run "${where[@]}" --nproc-per-node "$ranks" "$here/train.py" "$@"
