#!/usr/bin/env bash
# Start the trainer with DeepSpeed's launcher, on one machine or on several.
#
# One machine, as many ranks as it has GPUs (or 4 on CPUs), ZeRO stage 2 around the model:
#     launch/deepspeed.sh --wrap deepspeed --zero 2 --length 65536
#
# Several machines: name them in a file, one a line, with the ranks of each, as in "machine0 slots=8". Start on one of
# them; it reaches the others by ssh without a password, and finds this folder there under the same path.
#     HOSTFILE=hosts launch/deepspeed.sh --wrap deepspeed --length 1048576
#
# Everything after the name goes to launch/train.py; see launch/train.py --help.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
gpus="$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)"

if [ -n "${HOSTFILE:-}" ]; then
    where=(--hostfile "$HOSTFILE")
else
    where=(--num_gpus "${RANKS:-$((gpus > 0 ? gpus : 4))}") # DeepSpeed's word for ranks, on CPUs too
fi

exec "${DEEPSPEED:-deepspeed}" "${where[@]}" --no_local_rank "$here/train.py" "$@"
