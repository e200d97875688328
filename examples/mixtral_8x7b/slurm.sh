#!/bin/bash
# Mixtral 8x7B on 32 ranks as a Slurm job:
#
#   sbatch examples/mixtral_8x7b/slurm.sh CHECKPOINT_PATH TOKENIZER_MODEL DATA_PATH [more flags of cadre pretrain]
#
# Before its time is up the job gets SIGTERM, saves and ends; when it fails on a node it is queued again. Either way the
# next start goes on from the newest checkpoint. Submit from the folder of the repository.
#SBATCH --job-name=mixtral-8x7b
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@300
#SBATCH --requeue
set -euo pipefail

CHECKPOINT_PATH=$1
TOKENIZER_MODEL=$2
DATA_PATH=$3
shift 3
# Slurm runs a copy of this file, elsewhere.
. "${SLURM_SUBMIT_DIR:-.}/examples/mixtral_8x7b/arguments.sh"

export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}
# MPICH wants --mpi=pmi2. --kill-on-bad-exit: one rank that dies ends the others at once, not at their deadline.
exec srun --mpi="${SLURM_MPI:-pmix}" --kill-on-bad-exit=1 \
    "${CADRE:-cadre}" pretrain "${PRETRAIN_ARGS[@]}" --exit-signal-handler "$@"
