#!/bin/bash
# A small Mixtral on made-up data, 20 iterations in seconds, under one of the mappings below:
#
#   examples/laptop.sh [MAPPING [more flags of cadre pretrain]]
#
# All mappings train the same curve. CADRE is the program (default: build/cadre).
set -euo pipefail

# name       ranks  how the model is spread
mappings=(
    "one         1"
    "dp2         2  --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather"
    "tp2         2  --tensor-model-parallel-size 2 --sequence-parallel"
    "ep2         2  --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall"
    "pp2         2  --pipeline-model-parallel-size 2"
    "pp2_vp2     2  --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
    "cp2         2  --context-parallel-size 2"
    "ep2_dp2     4  --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall --use-distributed-optimizer"
    "tp2_ep4     4  --tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 4
                    --expert-tensor-parallel-size 1 --moe-token-dispatcher-type alltoall"
    "tp2_pp2_ep2 8  --tensor-model-parallel-size 2 --sequence-parallel --pipeline-model-parallel-size 2
                    --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall --use-distributed-optimizer"
)

chosen=${1:-one}
ranks=0
for mapping in "${mappings[@]}"; do
    read -r name num_ranks flags <<<"$(tr '\n' ' ' <<<"$mapping")"
    if [ "$name" = "$chosen" ]; then
        ranks=$num_ranks
        read -ra mapping_args <<<"$flags"
    fi
done
if [ $ranks = 0 ]; then
    echo "no mapping $chosen; there are:" >&2
    printf '%s\n' "${mappings[@]}" >&2
    exit 1
fi

args=(
    --num-layers 4 --hidden-size 64 --ffn-hidden-size 96 --num-attention-heads 8 --group-query-attention
    --num-query-groups 4 --seq-length 64 --max-position-embeddings 64 --normalization RMSNorm
    --position-embedding-type rope --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --attention-dropout 0.0 --hidden-dropout 0.0 --init-method-std 0.05
    --num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
    --moe-grouped-gemm --mock-data --tokenizer-type NullTokenizer --vocab-size 255
    --make-vocab-size-divisible-by 128 --micro-batch-size 2 --global-batch-size 16 --train-iters 20 --lr 2e-3
    --min-lr 1e-4 --lr-decay-style cosine --lr-warmup-iters 2 --clip-grad 1.0 --log-interval 1 --eval-iters 0
)

# Several ranks share the cores of this machine: one thread each, and whoever waits lets the others compute.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}
export OMPI_MCA_rmaps_base_oversubscribe=true OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_mpi_yield_when_idle=1
if [ "$(id -u)" = 0 ]; then
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
fi
cadre=${CADRE:-$(dirname "$0")/../build/cadre}
launch=()
[ "$ranks" = 1 ] || launch=(mpirun -n "$ranks")
exec "${launch[@]}" "$cadre" pretrain "${args[@]}" "${mapping_args[@]}" "${@:2}"
