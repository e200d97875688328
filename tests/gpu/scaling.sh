#!/bin/bash
# Training speed over several GPUs of this machine: tests/gpu/scaling.sh BUILD [MPIEXEC] [NUM_GPUS]
#
# Layers of Mixtral 8x7B (S 4096, bf16, mock data) on one GPU without communication, then on NUM_GPUS under each kind of
# mapping: the median of iterations 3, 4 and 6, and what --profile says of iteration 5 on rank 0 (the time that a
# transfer waits for another rank is in it). Each GPU has the optimizer's state of as many layers as one
# alone, or a share of it. Last the MoE layer by itself. SCALING_ROWS="DP TP" runs these rows only (keys below); logs and
# traces stay in SCALING_LOGS, if set.
set -euo pipefail

BUILD=$(cd "$1" && pwd)
mpiexec=${2:-mpirun}
num_gpus=${3:-$(nvidia-smi -L | wc -l)}
SOURCE=$(cd "$(dirname "$0")/../.." && pwd)
CADRE=$BUILD/cadre
. "$SOURCE/tests/e2e/lib/expect.sh"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_hwloc_base_binding_policy=none \
    OMPI_MCA_btl_vader_single_copy_mechanism=none OMP_NUM_THREADS=4
export NCCL_NVLS_ENABLE=0
logs=${SCALING_LOGS:-$(mktemp -d)}
[ -n "${SCALING_LOGS:-}" ] || trap 'rm -rf "$logs"' EXIT
mkdir -p "$logs"

layer=(
    --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 --group-query-attention --num-query-groups 8
    --seq-length 4096 --max-position-embeddings 4096 --normalization RMSNorm --position-embedding-type rope --swiglu
    --disable-bias-linear --untie-embeddings-and-output-weights --num-experts 8 --moe-router-topk 2 --moe-grouped-gemm
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 --moe-token-dispatcher-type alltoall
    --attention-dropout 0 --hidden-dropout 0 --vocab-size 32000 --bf16 --device cuda
)
training=(
    --mock-data --tokenizer-type NullTokenizer --lr 1e-4 --lr-decay-style constant --train-iters 6 --eval-iters 0
    --log-interval 1 --log-throughput --profile --profile-step-start 4 --profile-step-end 5
    --distributed-timeout-minutes 0.5
)
shared_out=(--use-distributed-optimizer)
overlapped=(--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)
balanced=(--moe-router-force-load-balancing)

launch() { # NUM_RANKS COMMAND...
    local launcher=()
    [ "$1" = 1 ] || launcher=("$mpiexec" -n "$1")
    shift
    "${launcher[@]}" "$@"
}

# One line of the table from a log; the reference is the first line's TFLOP/s.
print_row() { # NAME LOG
    awk -v name="$1" -v reference="${reference:-}" '
        /elapsed time per iteration/ {
            i++
            match($0, /\(ms\): *[0-9.]+/); ms[i] = substr($0, RSTART + 5, RLENGTH - 5) + 0
            match($0, /GPU\): *[0-9.]+/); rate[i] = substr($0, RSTART + 5, RLENGTH - 5) + 0
        }
        /max allocated/ { match($0, /max allocated: *[0-9.]+/); memory = substr($0, RSTART + 14, RLENGTH - 14) / 1e3 }
        /^communication / { moving = $2; match($0, /\([0-9.]+ %\)/); hidden = substr($0, RSTART + 1, RLENGTH - 4); exposed = $(NF - 1) }
        function middle(x) { return x[3] + x[4] + x[6] - low(x) - high(x) }
        function low(x) { return x[3] < x[4] ? (x[3] < x[6] ? x[3] : x[6]) : (x[4] < x[6] ? x[4] : x[6]) }
        function high(x) { return x[3] > x[4] ? (x[3] > x[6] ? x[3] : x[6]) : (x[4] > x[6] ? x[4] : x[6]) }
        END {
            speed = middle(rate)
            if (reference == "") reference = speed
            printf "%-44s %8.1f %8.1f %6.1f %%", name, middle(ms), speed, 100 * speed / reference
            if (moving != "") printf " %8.1f %7.1f %% %8.1f", moving, hidden, exposed
            else printf " %8s %9s %8s", "-", "-", "-"
            printf " %7.1f\n", memory
        }' "$2"
}

# row KEY NAME NUM_RANKS FLAGS...
row() {
    local key=$1 name=$2 log
    [ -z "${SCALING_ROWS:-}" ] || [ "$key" = one ] || [[ " $SCALING_ROWS " == *" $key "* ]] || return 0
    log="$logs/$(echo "$name" | tr -cs '[:alnum:]\n' _).txt"
    if ! launch "$3" "$CADRE" pretrain "${layer[@]}" "${training[@]}" --tensorboard-dir "${log%.txt}" "${@:4}" >"$log" 2>&1; then
        echo "$name: FAILED: $(grep -m1 'cadre: ' "$log" || tail -n 1 "$log")"
        failed=1
        return 0
    fi
    print_row "$name" "$log"
    reference=${reference:-$(print_row x "$log" | awk '{ print $3 }')}
}

n=$num_gpus
failed=0
nvidia-smi --query-gpu=name --format=csv,noheader | sort | uniq -c
printf "%-44s %8s %8s %8s %8s %9s %8s %7s\n" "Mixtral 8x7B layers, S 4096, bf16" ms/step TFLOP/s/GPU "of one" comm_ms hidden exposed GB
row one "one GPU, 2 layers, 4 microbatches" 1 --num-layers 2 --micro-batch-size 1 --global-batch-size 4
row DP "DP $n, 2 layers" "$n" --num-layers 2 --micro-batch-size 1 --global-batch-size $((4 * n)) "${shared_out[@]}"
row DP "DP $n, 2 layers, both overlaps" "$n" --num-layers 2 --micro-batch-size 1 --global-batch-size $((4 * n)) "${overlapped[@]}"
row EP "EP $n, 4 layers, both overlaps" "$n" --num-layers 4 --micro-batch-size 1 --global-batch-size $((4 * n)) \
    --expert-model-parallel-size "$n" "${overlapped[@]}"
row EP "EP $n, 4 layers, both overlaps, balanced" "$n" --num-layers 4 --micro-batch-size 1 --global-batch-size $((4 * n)) \
    --expert-model-parallel-size "$n" "${overlapped[@]}" "${balanced[@]}"
row TP "TP $n SP, 4 layers" "$n" --num-layers 4 --micro-batch-size 1 --global-batch-size 4 --tensor-model-parallel-size "$n" \
    --sequence-parallel
row TP "TP $n SP, 4 layers, --tp-comm-overlap" "$n" --num-layers 4 --micro-batch-size 1 --global-batch-size 4 \
    --tensor-model-parallel-size "$n" --sequence-parallel --tp-comm-overlap
row TP "TP $n SP, EP $n ETP 1, 4 layers" "$n" --num-layers 4 --micro-batch-size 1 --global-batch-size 4 \
    --tensor-model-parallel-size "$n" --sequence-parallel --expert-model-parallel-size "$n" --expert-tensor-parallel-size 1
row PP "PP $n VP 2, $((2 * n)) layers, $((4 * n)) microbatches" "$n" --num-layers $((2 * n)) --micro-batch-size 1 \
    --global-batch-size $((4 * n)) --pipeline-model-parallel-size "$n" --num-layers-per-virtual-pipeline-stage 1
row CP "CP $n, 2 layers" "$n" --num-layers 2 --micro-batch-size 1 --global-batch-size 4 --context-parallel-size "$n" \
    "${overlapped[@]}"
row CP "CP $n, 2 layers, $n sequences a microbatch" "$n" --num-layers 2 --micro-batch-size "$n" --global-batch-size $((4 * n)) \
    --context-parallel-size "$n" "${overlapped[@]}"
awk -v n="$n" 'BEGIN { printf "PP must idle for %.1f %% of its step: (PP - 1) / (microbatches * chunks + PP - 1)\n", 100 * (n - 1) / (8 * n + n - 1) }'

bench_layer() { # NUM_RANKS FLAGS...
    launch "$1" "$CADRE" bench moe-layer "${layer[@]}" --micro-batch-size 1 --num-layers 1 "${balanced[@]}" "${@:2}" \
        >"$logs/layer_$1.txt" 2>&1 || { failed=1; tail -n 3 "$logs/layer_$1.txt"; }
    grep "moe-layer, \|^communication" "$logs/layer_$1.txt" || true
}
if [ -z "${SCALING_ROWS:-}" ] || [[ " $SCALING_ROWS " == *" layer "* ]]; then
    echo "MoE layer, 4096 tokens a rank, balanced: one GPU, then EP $n (published for EP 8: 4.33 ms forward, 7.68 ms backward)"
    bench_layer 1
    bench_layer "$n" --expert-model-parallel-size "$n"
fi
exit $failed
