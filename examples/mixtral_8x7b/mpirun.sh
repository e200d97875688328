#!/bin/bash
# Mixtral 8x7B on 32 ranks, 8 a host, with mpirun:
#
#   examples/mixtral_8x7b/mpirun.sh CHECKPOINT_PATH TOKENIZER_MODEL DATA_PATH [more flags of cadre pretrain]
#
# HOSTFILE names a file of hosts (Open MPI: "node1 slots=8" a line; MPICH: "node1:8"); without it all ranks start here.
# Paths must mean the same on every host. --print-config as a further flag shows the run without starting it.
set -euo pipefail

CHECKPOINT_PATH=$1
TOKENIZER_MODEL=$2
DATA_PATH=$3
shift 3
. "$(dirname "$0")/arguments.sh"

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec mpirun -n 32 ${HOSTFILE:+--hostfile "$HOSTFILE"} \
    "${CADRE:-cadre}" pretrain "${PRETRAIN_ARGS[@]}" "$@"
