#!/usr/bin/env bash
# Start the trainer with mpirun: that of MPICH (pip install "ringattn[mpi]" brings it), of Intel MPI or of Open MPI.
#
# One machine, 4 ranks:
#     launch/mpirun.sh --length 65536
#
# Several machines, 8 ranks each: name the machines in a file, one a line. This folder lies on all of them under the
# same path.
#     HOSTS=machines EACH=8 RANKS=32 launch/mpirun.sh --length 1048576
#
# Everything after the name goes to launch/train.py; see launch/train.py --help.
set -euo pipefail

here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
mpirun="${MPIRUN:-mpirun}"
ranks="${RANKS:-4}"
each="${EACH:-$ranks}"
cores="$(getconf _NPROCESSORS_ONLN)"
threads="${OMP_NUM_THREADS:-$((cores / each > 0 ? cores / each : 1))}"

# Rank 0 is on the first machine. mpirun does not tell the ranks, and Gloo, which wrappers talk over, needs to know.
if [ -n "${HOSTS:-}" ]; then
    MASTER_ADDR="${MASTER_ADDR:-$(sed '/^ *\(#\|$\)/d; s/[ :].*//; q' "$HOSTS")}"
    MASTER_PORT="${MASTER_PORT:-29500}"
fi

case "$("$mpirun" --version 2>&1)" in
    *"Open MPI"* | *OpenRTE*)
        how=(-x "OMP_NUM_THREADS=$threads" --bind-to none)
        [ -z "${HOSTS:-}" ] || how+=(--hostfile "$HOSTS" --map-by "ppr:$each:node"
            -x "MASTER_ADDR=$MASTER_ADDR" -x "MASTER_PORT=$MASTER_PORT")
        ;;
    *) # MPICH, Intel MPI and whatever else is made of Hydra
        how=(-genv OMP_NUM_THREADS "$threads")
        [ -z "${HOSTS:-}" ] || how+=(-f "$HOSTS" -ppn "$each"
            -genv MASTER_ADDR "$MASTER_ADDR" -genv MASTER_PORT "$MASTER_PORT")
        ;;
esac

exec "$mpirun" -n "$ranks" "${how[@]}" "${PYTHON:-python}" "$here/train.py" "$@"
