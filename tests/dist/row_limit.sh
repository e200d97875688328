#!/bin/bash
# row_limit.sh MPIEXEC BUILD: --moe-expert-rank-capacity-factor under each dispatcher. A rank whose experts get more
# rows than it allows ends the job with one line that names the rank, its experts and the rows; a rank that gets what
# it allows trains.
set -uo pipefail
mpiexec=$1
cadre=$2/cadre
num_failed=0
output=$(mktemp)
trap 'rm -f "$output"' EXIT

complain() {
    echo "FAILED: $*"
    num_failed=$((num_failed + 1))
}

# pretrain FLAGS...: one step of 4 experts on 2 ranks; prints the exit status.
pretrain() {
    timeout -s KILL 60 "$mpiexec" -n 2 "$cadre" pretrain --device cpu --num-layers 1 --hidden-size 16 \
        --num-attention-heads 2 --ffn-hidden-size 16 --seq-length 31 --max-position-embeddings 31 --swiglu \
        --disable-bias-linear --num-experts 4 --moe-router-topk 2 --moe-router-load-balancing-type none \
        --micro-batch-size 1 --global-batch-size 2 --train-iters 1 --lr 1e-3 --mock-data \
        --tokenizer-type NullTokenizer --vocab-size 100 --eval-iters 0 --log-interval 1 "$@" >"$output" 2>&1
    echo $?
}

line_of_limit='^cadre: rank ([01]) on host .*: layer 0: ([0-9]+) rows .* experts ([02]) to [13] .* brings ([0-9]+) '
line_of_limit+='.*--moe-expert-rank-capacity-factor 1 allows \4: .*'

# Of 2 * 62 rows one rank gets more than 62, unless both get as many.
expect_stop() {
    local status rank rows first even
    status=$(pretrain --expert-model-parallel-size 2 --moe-expert-rank-capacity-factor 1 "$@")
    if [ "$status" = 0 ] || [ "$status" -ge 128 ]; then
        complain "$*: exit status $status"
    fi
    if [ "$(grep -c '^cadre: ' "$output")" != 1 ]; then
        complain "$*: not one line: $(cat "$output")"
    fi
    read -r rank rows first even < <(sed -nE "s/$line_of_limit/\1 \2 \3 \4/p" "$output")
    if [ "${even:-0}" != 62 ] || [ "$rows" -le 62 ]; then
        complain "$*: not the line of 62 rows: $(grep '^cadre: ' "$output")"
    elif [ "$first" != $((2 * rank)) ]; then
        complain "$*: rank $rank speaks of the experts from $first on"
    fi
}

expect_training() {
    local status
    status=$(pretrain "$@")
    if [ "$status" != 0 ] || ! grep -q 'iteration        1/' "$output"; then
        complain "$*: status $status: $(tail -n 5 "$output")"
    fi
}

for dispatcher in allgather alltoall alltoall_seq; do
    expect_stop --moe-token-dispatcher-type $dispatcher
    # Half of the experts cannot get more than all rows.
    expect_training --moe-token-dispatcher-type $dispatcher --expert-model-parallel-size 2 \
        --moe-expert-rank-capacity-factor 2
    # Ranks that hold parts of all experts get even loads.
    expect_training --moe-token-dispatcher-type $dispatcher --expert-tensor-parallel-size 2 \
        --moe-expert-rank-capacity-factor 1
done
[ $num_failed = 0 ]
