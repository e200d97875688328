#!/bin/bash
# CUDA graphs of steps that communicate, over two GPUs of this machine: tests/gpu/graphs.sh BUILD [MPIEXEC] [bench]
#
# Under each mapping 20 steps op by op, the same by graphs, some stopped and resumed: the same bits of every tensor, and
# what a step takes. A rank that stops ends the others in time. With "bench" instead of that, steps of two layers of
# Mixtral 8x7B, op by op and by graphs. GRAPH_ROWS="tp2 cp2_a2a" takes these mappings only, GRAPH_PRECISIONS="bf16" this
# precision; logs go to GRAPH_LOGS, if set. One run at a time: kernels that wait for each other do not share a GPU well.
set -euo pipefail

BUILD=$(cd "$1" && pwd)
SOURCE=$(cd "$(dirname "$0")/../.." && pwd)
CADRE=$BUILD/cadre
mpiexec=${2:-mpirun}
. "$SOURCE/tests/e2e/lib/expect.sh"
. "$SOURCE/tests/e2e/lib/tiny_run.sh"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=true \
    OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_btl_vader_single_copy_mechanism=none OMP_NUM_THREADS=2
export NCCL_NVLS_ENABLE=0
folder=$(mktemp -d)
cd "$folder"

shape=(
    --group-query-attention --normalization RMSNorm --position-embedding-type rope --swiglu --disable-bias-linear
    --untie-embeddings-and-output-weights --num-experts 8 --moe-router-topk 2 --moe-grouped-gemm --moe-aux-loss-coeff 1e-2
    --moe-z-loss-coeff 1e-3 --device cuda --micro-batch-size 1
)
model=(
    "${shape[@]}" --num-layers 4 --hidden-size 512 --ffn-hidden-size 768 --num-attention-heads 8 --num-query-groups 4
    --seq-length 512 --max-position-embeddings 512 --make-vocab-size-divisible-by 64
)
graph=(--cuda-graph-impl full_iteration)
zero=(--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)

declare -A mappings=(
    [dp2]="--overlap-grad-reduce"
    [dp2_zero]="${zero[*]}"
    [tp2]="--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 ${zero[*]}"
    [tp2_overlap]="--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1 --tp-comm-overlap"
    [cp2_p2p]="--context-parallel-size 2 --cp-comm-type p2p ${zero[*]}"
    [cp2_gather]="--context-parallel-size 2 --cp-comm-type all_gather"
    [cp2_a2a]="--context-parallel-size 2 --cp-comm-type a2a"
    [pp2]="--pipeline-model-parallel-size 2"
    [pp2_vp2]="--pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 1"
    [ep2]="--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall --moe-expert-capacity-factor 1.5 --moe-pad-expert-input-to-capacity ${zero[*]}"
)
order=(dp2 dp2_zero tp2 tp2_overlap cp2_p2p cp2_gather cp2_a2a pp2 pp2_vp2 ep2)
resumed=" dp2_zero tp2 pp2_vp2 "

# train NAME ITERATIONS FLAGS...: NAME.hashes
train() {
    local name=$1 iterations=$2
    shift 2
    "$mpiexec" -n 2 "$CADRE" pretrain "${model[@]}" "${tiny_data[@]}" "${tiny_training[@]}" --attention-dropout 0.1 \
        --hidden-dropout 0.1 --micro-batch-size 1 --global-batch-size 8 --distributed-timeout-minutes 0.2 --train-iters 20 \
        --exit-interval "$iterations" --save "$name" "$@" >"$name.log" 2>&1 || {
        echo "FAILED: $name: $(grep -m1 'cadre: ' "$name.log" || tail -n 3 "$name.log")"
        return 1
    }
    grep -q "over NCCL" "$name.log" || { echo "FAILED: $name: not over NCCL"; return 1; }
    checkpoint_hashes "$name" >"$name.hashes"
}

train_resumed() {
    local name=$1
    shift
    train "$name" 10 "$@" && train "$name" 20 --load "$name" "$@"
}

# same_bits NAME NAME
same_bits() {
    [ -s "$1.hashes" ] && cmp -s "$1.hashes" "$2.hashes" || {
        echo "FAILED: $2 differs from $1: losses $(logged_losses "$1.log" | tail -n 1) and $(logged_losses "$2.log" | tail -n 1)," \
            "$(diff "$1.hashes" "$2.hashes" | grep -c '^<') of $(wc -l <"$1.hashes") tensors"
        return 1
    }
}

# The median of the later iterations in ms.
median_ms() {
    sed -n 's/.*elapsed time per iteration (ms): *\([0-9.]*\).*/\1/p' "$1" | tail -n 9 | sort -n | sed -n 5p
}

# check MAPPING PRECISION
check() {
    local run=$1-$2 began=$SECONDS flags
    read -ra flags <<<"${mappings[$1]}"
    [ "$2" = fp32 ] || flags+=(--bf16)
    train "$run" 20 "${flags[@]}" && train "$run-graph" 20 "${flags[@]}" "${graph[@]}" || return 1
    same_bits "$run" "$run-graph" || return 1
    if [[ $resumed == *" $1 "* ]]; then
        train_resumed "$run-resumed" "${flags[@]}" "${graph[@]}" && same_bits "$run" "$run-resumed" || return 1
    fi
    printf 'ok   %-16s the same bits (%d tensors, %d s); a step %7.1f ms op by op, %7.1f by graphs\n' "$run" \
        "$(wc -l <"$run.hashes")" $((SECONDS - began)) "$(median_ms "$run.log")" "$(median_ms "$run-graph.log")"
}

# Rank 1 is stopped while graphs run: rank 0 says so when the time is up.
check_deadline() {
    local status=0 began=$SECONDS
    "$mpiexec" -n 2 bash -c 'echo $$ >"pid.${OMPI_COMM_WORLD_RANK:-$PMI_RANK}"; exec "$@"' rank "$CADRE" pretrain \
        "${model[@]}" "${tiny_data[@]}" "${tiny_training[@]}" --global-batch-size 8 --distributed-timeout-minutes 0.1 \
        --train-iters 100000 "${graph[@]}" ${mappings[tp2]} >stopped.log 2>&1 &
    local job=$!
    for _ in $(seq 100); do
        grep -q "iteration  *100/" stopped.log && break
        sleep 0.2
    done
    kill -STOP "$(cat pid.1)"
    wait $job || status=$?
    kill -KILL "$(cat pid.1)" 2>/dev/null || true
    [ $status != 0 ] && grep -q "is not complete after 6 s" stopped.log || {
        echo "FAILED: a stopped rank: status $status, $(tail -n 3 stopped.log)"
        return 1
    }
    echo "ok   a stopped rank: $(grep -m1 "not complete after" stopped.log | cut -c1-120) ($((SECONDS - began)) s)"
}

# bench MAPPING: two layers of Mixtral 8x7B
bench() {
    local how flags
    for how in plain graph; do
        read -ra flags <<<"${mappings[$1]}"
        [ $how = plain ] || flags+=("${graph[@]}")
        "$mpiexec" -n 2 "$CADRE" pretrain "${shape[@]}" --num-layers 2 --hidden-size 4096 --ffn-hidden-size 14336 \
            --num-attention-heads 32 --num-query-groups 8 --seq-length 4096 --max-position-embeddings 4096 \
            --mock-data --tokenizer-type NullTokenizer --vocab-size 32000 --attention-dropout 0 --hidden-dropout 0 --lr 1e-4 \
            --lr-decay-style constant --bf16 --eval-iters 0 --log-interval 1 --train-iters 14 --global-batch-size 8 \
            --use-distributed-optimizer --distributed-timeout-minutes 0.5 "${flags[@]}" >"bench-$1-$how.log" 2>&1 || {
            echo "FAILED: $1 $how: $(grep -m1 'cadre: ' "bench-$1-$how.log" || tail -n 2 "bench-$1-$how.log")"
            return 1
        }
    done
    printf 'two layers of Mixtral 8x7B, %-12s a step %7.1f ms op by op, %7.1f by graphs\n' "$1" \
        "$(median_ms "bench-$1-plain.log")" "$(median_ms "bench-$1-graph.log")"
}

keep_logs() {
    [ -z "${GRAPH_LOGS:-}" ] || cp -- *.log "$GRAPH_LOGS"
    rm -rf "$folder"
}
trap keep_logs EXIT

failed=0
if [ "${3:-}" = bench ]; then
    for mapping in ${GRAPH_ROWS:-dp2_zero tp2 cp2_p2p pp2}; do
        bench "$mapping" || failed=1
    done
    exit $failed
fi
make_tiny_data
for mapping in ${GRAPH_ROWS:-${order[@]}}; do
    for precision in ${GRAPH_PRECISIONS:-fp32 bf16}; do
        check "$mapping" "$precision" || failed=1
    done
done
[ -n "${GRAPH_ROWS:-}" ] || check_deadline || failed=1
exit $failed
