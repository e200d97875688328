#!/bin/bash
# The whole program on this machine's GPU: tests/gpu/program.sh BUILD [bench]
#
# BUILD holds cadre and tests/oracle_hf. Golden files of transformers in fp32; 20 steps twice, stopped and resumed, and
# with CUDA graphs, for the same bits; losses against those of the CPU in fp32; the same text; with "bench", a step of
# two layers of Mixtral 8x7B.
set -euo pipefail

BUILD=$(cd "$1" && pwd)
SOURCE=$(cd "$(dirname "$0")/../.." && pwd)
CADRE=$BUILD/cadre
. "$SOURCE/tests/e2e/lib/expect.sh"
. "$SOURCE/tests/e2e/lib/tiny_run.sh"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

# Heads of 64 and 128 tokens: cuDNN's attention in bf16.
gpu_model=(
    --num-layers 2 --hidden-size 256 --ffn-hidden-size 384 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --seq-length 128 --max-position-embeddings 128 --normalization RMSNorm
    --position-embedding-type rope --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --num-experts 8 --moe-router-topk 2 --moe-grouped-gemm --moe-aux-loss-coeff 1e-2 --moe-z-loss-coeff 1e-3
)
plain=(--attention-dropout 0 --hidden-dropout 0)
dropout=(--attention-dropout 0.1 --hidden-dropout 0.1 --reset-attention-mask)
# At a rate of 3e-3 a change of 1e-4 of the rate itself moves the CPU's losses in fp32 by up to 2.5 % within 20 steps;
# at this one by 0.05 %, and bf16 by 0.6 %.
rate=(--lr 1e-3)
graph=(--cuda-graph-impl full_iteration)

# train NAME DEVICE ITERATIONS FLAGS...: NAME.losses and NAME.hashes
train() {
    local name=$1 device=$2 iterations=$3
    shift 3
    "$CADRE" pretrain "${gpu_model[@]}" "${tiny_data[@]}" "${tiny_training[@]}" --device "$device" \
        "${rate[@]}" --train-iters 20 --exit-interval "$iterations" --save "$name" "$@" >"$name.log" 2>&1 ||
        fail "$name: $(tail -n 3 "$name.log")"
    logged_losses "$name.log" >"$name.losses"
    checkpoint_hashes "$name" >"$name.hashes"
}

# train_resumed NAME FLAGS...: stopped after 10 iterations, started again
train_resumed() {
    local name=$1
    shift
    train "$name" cuda 10 "$@"
    train "$name" cuda 20 --load "$name" "$@"
}

# wait_for PID...: each must succeed.
wait_for() {
    local pid
    for pid in "$@"; do
        wait "$pid" || exit 1
    done
}

# expect_same_text LOAD PROMPT: the likeliest tokens, on both devices
expect_same_text() {
    local device
    for device in cpu cuda; do
        "$CADRE" generate --load "$1" --prompt "$2" --tokenizer-type NullTokenizer --num-tokens 20 --temperature 0 \
            --device $device >"text.$device" || fail "generate --load $1 --device $device"
    done
    expect_same text.cpu text.cuda "text of $1"
    echo "ok   $(basename "$1"): the same text"
}

# expect_near FILE FILE RELATIVE: numbers, line by line; prints the worst.
expect_near() {
    paste "$1" "$2" | awk -v bar="$3" -v what="$1 and $2" '
        { e = ($1 - $2) / $2; if (e < 0) e = -e; if (e > worst) worst = e; n++ }
        END { printf "ok   %-34s %d losses within %.1e (bar %s)\n", what, n, worst, bar; exit !(n > 0 && worst <= bar) }' ||
        fail "$1 and $2 differ by more than $3"
}

for fixture in mixtral-tiny mixtral-tiny-sharded; do
    "$BUILD/tests/oracle_hf" "$SOURCE/tests/fixtures/$fixture" --device cuda
done
make_tiny_data
for kind in plain dropout; do
    declare -n rates=$kind
    train "$kind-cpu" cpu 20 "${rates[@]}" &
    jobs=($!)
    for precision in fp32 bf16; do
        run=$kind-$precision
        flags=("${rates[@]}")
        [ $precision = fp32 ] || flags+=(--bf16)
        train "$run" cuda 20 "${flags[@]}" &
        jobs+=($!)
        train "$run-again" cuda 20 "${flags[@]}" &
        jobs+=($!)
        train "$run-graph" cuda 20 "${flags[@]}" "${graph[@]}" &
        jobs+=($!)
        train_resumed "$run-resumed" "${flags[@]}" &
        jobs+=($!)
    done
    wait_for "${jobs[@]}"
    for precision in fp32 bf16; do
        run=$kind-$precision
        expect_same "$run.hashes" "$run-again.hashes" "$run twice"
        expect_same "$run.hashes" "$run-resumed.hashes" "$run stopped and resumed"
        expect_same "$run.hashes" "$run-graph.hashes" "$run with CUDA graphs"
        echo "ok   $run twice, resumed, by CUDA graphs: the same bits ($(wc -l <"$run.hashes") tensors)"
        expect_near "$run.losses" "$kind-cpu.losses" "$([ $precision = fp32 ] && echo 1e-4 || echo 2e-2)"
    done
done
expect_same_text plain-fp32 "3 10 17 24"
expect_same_text "$SOURCE/tests/fixtures/mixtral-tiny" "3 4 5 6"
if [ "${2:-}" = bench ]; then
    for sequences in 1 4; do
        "$CADRE" bench train-step --device cuda --num-layers 2 --hidden-size 4096 --ffn-hidden-size 14336 \
            --num-attention-heads 32 --group-query-attention --num-query-groups 8 --seq-length 4096 \
            --max-position-embeddings 4096 --vocab-size 32000 --bf16 --moe-aux-loss-coeff 1e-2 \
            --micro-batch-size $sequences --profile >bench.txt
        echo "two layers of Mixtral 8x7B, $sequences x 4096 tokens"
        head -n 15 bench.txt
        grep "in no op" bench.txt
    done
fi
