#!/bin/bash
# Several ranks, which share a GPU if need be: tests/gpu/ranks.sh BUILD [MPIEXEC] [mpi|nccl] [NUM_RANKS]
#
# Every mapping of 2 and 4 ranks, or of NUM_RANKS, trains the curve of one rank, in fp32: over MPI, if they share one, or
# over NCCL. All mappings, on several GPUs: tests/gpu/several.sh.
set -euo pipefail

BUILD=$(cd "$1" && pwd)
mpiexec=${2:-mpirun}
transport=${3:-mpi}
only=${4:-}
SOURCE=$(cd "$(dirname "$0")/../.." && pwd)
CADRE=$BUILD/cadre
. "$SOURCE/tests/e2e/lib/expect.sh"
. "$SOURCE/tests/e2e/lib/tiny_run.sh"
. "$SOURCE/tests/gpu/lib/nccl.sh"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=true \
    OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_btl_vader_single_copy_mechanism=none OMP_NUM_THREADS=2
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

model=(
    --num-layers 4 --hidden-size 256 --ffn-hidden-size 384 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --seq-length 128 --max-position-embeddings 128 --normalization RMSNorm
    --position-embedding-type rope --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --num-experts 8 --moe-router-topk 2 --moe-grouped-gemm --moe-aux-loss-coeff 1e-2 --moe-z-loss-coeff 1e-3
    --make-vocab-size-divisible-by 64
    --attention-dropout 0.1 --hidden-dropout 0.1
)

# train NUM_RANKS FLAGS...: ./losses
train() {
    local launcher=()
    if [ "$1" != 1 ]; then
        launcher=("$mpiexec" -n "$1")
        [ "$transport" = mpi ] || launcher=(launch_over_nccl "$mpiexec" "$1")
    fi
    shift
    "${launcher[@]}" "$CADRE" pretrain "${model[@]}" "${tiny_data[@]}" "${tiny_training[@]}" --micro-batch-size 1 \
        --global-batch-size 4 --train-iters 8 --device cuda "$@" >log 2>&1 || fail "$*: $(tail -n 3 log)"
    [ ${#launcher[@]} = 0 ] || [ "$transport" = mpi ] || expect_text "over NCCL" log
    logged_losses log >losses
}

# same_curve NUM_RANKS FLAGS...
same_curve() {
    [ -z "$only" ] || [ "$only" = "$1" ] || return 0
    train "$@"
    paste losses one_rank | awk -v what="$*" '
        { e = ($1 - $2) / $2; if (e < 0) e = -e; if (e > worst) worst = e; n++ }
        END { printf "ok   %d losses within %.1e (bar 1e-4): %s ranks\n", n, worst, what; exit !(n == 8 && worst <= 1e-4) }' ||
        fail "$* trains another curve: $(paste losses one_rank)"
}

make_tiny_data
train 1
mv losses one_rank
same_curve 2 --use-distributed-optimizer
same_curve 2 --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall
same_curve 2 --tensor-model-parallel-size 2 --sequence-parallel --tp-comm-overlap
same_curve 2 --context-parallel-size 2
same_curve 4 --pipeline-model-parallel-size 4
same_curve 4 --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --expert-model-parallel-size 2 \
    --moe-token-dispatcher-type alltoall --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather
same_curve 4 --tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 4 \
    --expert-tensor-parallel-size 1 --moe-token-dispatcher-type alltoall_seq
same_curve 4 --expert-model-parallel-size 4 --moe-token-dispatcher-type allgather
