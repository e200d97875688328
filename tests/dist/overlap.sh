#!/usr/bin/env bash
# Is communication hidden behind computation? CADRE_COMM_DELAY_MS slows the groups of a mapping
# down. For each kind of overlap: the step without delay, with delay, and with delay and overlap;
# at least half of what the delay costs must be gone. Times, so not part of test.sh: run it on an
# otherwise idle machine.
#
#     tests/dist/overlap.sh BUILD/cadre [CASE...]
set -eu
cadre=$1
shift
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=true
export OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_mpi_yield_when_idle=1 OMP_NUM_THREADS=1

# name | delay | flags | flags of the overlap (those without it, if they differ, after a slash)
cases='
gradients  | dp-cp:4/MB,edp:4/MB | --use-distributed-optimizer --ddp-bucket-size 200000 | --overlap-grad-reduce
parameters | dp-cp:4/MB,edp:4/MB | --use-distributed-optimizer --overlap-grad-reduce --ddp-bucket-size 200000 | --overlap-param-gather
pipeline   | pp:15,pp-backward:15 | --pipeline-model-parallel-size 2 --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 16 | --overlap-p2p-communication / --no-overlap-p2p-communication
ring       | cp:8 | --context-parallel-size 2 | --cp-comm-type p2p / --cp-comm-type all_gather
shared     | ep:8 | --expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall --moe-shared-expert-intermediate-size 1024 | --moe-shared-expert-overlap
'

# The median step of a run, in ms.
step_ms() {
    local delay=$1
    shift
    CADRE_COMM_DELAY_MS=$delay mpirun -n 2 "$cadre" pretrain --device cpu --num-layers 4 --hidden-size 256 \
        --num-attention-heads 4 --ffn-hidden-size 512 --seq-length 256 --max-position-embeddings 256 \
        --position-embedding-type rope --normalization RMSNorm --swiglu --disable-bias-linear \
        --untie-embeddings-and-output-weights --num-experts 4 --moe-router-topk 2 --moe-grouped-gemm \
        --micro-batch-size 2 --global-batch-size 4 --train-iters 9 --lr 1e-3 --lr-decay-style constant \
        --mock-data --tokenizer-type NullTokenizer --vocab-size 1024 --log-interval 1 --eval-iters 0 \
        --attention-dropout 0 --hidden-dropout 0 "$@" </dev/null |
        sed -n 's/.*elapsed time per iteration (ms): \([0-9.]*\).*/\1/p' | tail -n +3 | sort -n |
        awk '{ t[NR] = $1 } END { print t[int((NR + 1) / 2)] }'
}

status=0
printf '%-11s %9s %9s %9s   %s\n' overlap "no delay" delay overlap "share of the delay hidden"
while IFS='|' read -r name delay flags overlap; do
    name=$(echo $name)
    if [ -z "$name" ] || { [ $# -gt 0 ] && [[ " $* " != *" $name "* ]]; }; then
        continue
    fi
    without=
    if [[ $overlap == */* ]]; then
        without=${overlap#*/}
        overlap=${overlap%%/*}
    fi
    plain=$(step_ms "" $flags $without)
    delayed=$(step_ms "$(echo $delay)" $flags $without)
    hidden=$(step_ms "$(echo $delay)" $flags $overlap)
    awk -v n="$name" -v p="$plain" -v d="$delayed" -v h="$hidden" 'BEGIN {
        share = (d - h) / (d - p)
        printf "%-11s %9.1f %9.1f %9.1f   %.0f %%%s\n", n, p, d, h, 100 * share, share < 0.5 ? "  TOO LITTLE" : ""
        exit share < 0.5
    }' || status=1
done <<<"$cases"
exit $status
