#!/bin/bash
# checkpoints.sh BUILD [MPIEXEC] [--device D] [--hidden H] [--ranks N]: a model of Mixtral's shape is saved under N ranks
# and loaded under other mappings: the same weights, saved again from each after a step that changes none, and the same
# losses of the next steps, in which the moments show (without them they are 1e-3 to 3e-3 away). Prints the time of the
# save beside that of dd with fdatasync of the same files in the same folder. 7 GB with H 1536.
set -uo pipefail

BUILD=$(cd "$1" && pwd)
shift
mpiexec=mpirun device=cuda hidden=1536 ranks=2
if [ $# -gt 0 ] && [[ $1 != --* ]]; then
    mpiexec=$1
    shift
fi
while [ $# -gt 0 ]; do
    case $1 in
    --device) device=$2 ;;
    --hidden) hidden=$2 ;;
    --ranks) ranks=$2 ;;
    *) echo "unknown: $1" >&2 && exit 1 ;;
    esac
    shift 2
done
SOURCE=$(cd "$(dirname "$0")/../.." && pwd)
CADRE=$BUILD/cadre
. "$SOURCE/tests/e2e/lib/tiny_run.sh"
. "$SOURCE/tests/e2e/lib/expect.sh"
. "$SOURCE/tests/gpu/lib/nccl.sh"
folder=$(mktemp -d "${CHECKPOINTS_FOLDER:-${TMPDIR:-/tmp}}/checkpoints.XXXX")
trap 'rm -rf "$folder"' EXIT
cd "$folder" || exit 1

model=(
    --num-layers 2 --hidden-size "$hidden" --ffn-hidden-size $((hidden * 7 / 2)) --num-attention-heads $((hidden / 128))
    --group-query-attention --num-query-groups 4 --seq-length 128 --max-position-embeddings 128 --normalization RMSNorm
    --position-embedding-type rope --swiglu --disable-bias-linear --untie-embeddings-and-output-weights --num-experts 8
    --moe-router-topk 2 --moe-grouped-gemm --moe-aux-loss-coeff 1e-2 --attention-dropout 0 --hidden-dropout 0
    --tokenizer-type NullTokenizer --vocab-size 31999 --make-vocab-size-divisible-by 128 --mock-data --bf16 --lr 1e-4
    --lr-decay-style constant --micro-batch-size 1 --global-batch-size 4 --eval-iters 0 --log-interval 1 --save-interval 1000
    --distributed-timeout-minutes 1 --device "$device"
)
zero=(--use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)
ep=(--expert-model-parallel-size 2 --moe-token-dispatcher-type alltoall)
tp=(--tensor-model-parallel-size 2 --sequence-parallel)
pp=(--pipeline-model-parallel-size 2)

stamped() {
    local line
    while IFS= read -r line; do
        printf '%s %s\n' "$EPOCHREALTIME" "$line"
    done
}

# train NAME RANKS FLAGS...: NAME.log, each line with the time when it was read
train() {
    local name=$1 num_ranks=$2 launcher=()
    shift 2
    if [ "$num_ranks" != 1 ]; then
        launcher=("$mpiexec" -n "$num_ranks")
        [ "$device" != cuda ] || launcher=(launch_over_nccl "$mpiexec" "$num_ranks")
    fi
    "${launcher[@]}" "$CADRE" pretrain "${model[@]}" "$@" 2>&1 | stamped >"$name.log" ||
        fail "$name: $(grep 'cadre: ' "$name.log" | head -n 3)"
}

# seconds_between NAME TEXT TEXT: from the first line with the one text to the last with the other
seconds_between() {
    awk -v from="$2" -v to="$3" '
        index($0, from) && !begin { begin = $1 }
        index($0, to) { end = $1 }
        END { printf "%.2f", end - begin }' "$1.log"
}

save_seconds() {
    seconds_between "$1" "saving checkpoint at" "successfully saved"
}

report() { # WHAT SECONDS
    awk -v what="$1" -v seconds="$2" -v bytes="$num_bytes" '
        BEGIN { printf "%-44s %6.2f s %6.2f GB/s\n", what, seconds, bytes / 1e9 / seconds }'
}

# Copies of the checkpoint's files, from the page cache; "&": all at once. Prints the seconds.
copy_files() { # [&]
    local begin=$EPOCHREALTIME file number=0
    for file in saved/iter_*/*.safetensors saved/iter_*/optimizer/*.safetensors; do
        number=$((number + 1))
        dd if="$file" of="copy.$number" bs=16M conv=fdatasync status=none &
        [ "${1:-}" = "&" ] || wait $!
    done
    wait
    awk "BEGIN { print $EPOCHREALTIME - $begin }"
    rm -f copy.*
}

# The last three losses.
next_losses() {
    sed -n 's/.* iteration  *[456]\/.* lm loss: \([^ ]*\) .*/\1/p' "$1.log"
}

# Of weights and of their fp32 masters: a step of learning rate 0 changes the moments alone.
weight_hashes() {
    checkpoint_hashes "$1" | grep -v "exp_avg"
}
still=(--train-iters 4 --lr 0 --weight-decay 0 --override-opt_param-scheduler)

# load NAME RANKS FLAGS...: saves again, and trains three steps. (One after the other: GPUs shared by several jobs wait
# for each other's time slices.)
load() {
    local name=$1 num_ranks=$2
    shift 2
    train "$name.again" "$num_ranks" "$@" --load saved "${still[@]}" --save "$name.again"
    weight_hashes "$name.again" >"$name.hashes"
    rm -rf "$name.again"
    expect_same saved.hashes "$name.hashes" "tensors of $name"
    train "$name" "$num_ranks" "$@" --load saved --train-iters 6
    next_losses "$name" >"$name.losses"
    paste "$name.losses" whole.losses | awk -v what="$name ($num_ranks ranks)" -v count="$(wc -l <saved.hashes)" '
        { e = ($1 - $2) / $2; if (e < 0) e = -e; if (e > worst) worst = e; n++ }
        END { printf "ok   loaded: %s: the same %d tensors; 3 losses within %.1e (bar 5e-4)\n", what, count, worst
              exit !(n == 3 && worst <= 5e-4) }' ||
        fail "$name: other losses: $(paste "$name.losses" whole.losses)"
}

train whole "$ranks" "${ep[@]}" "${zero[@]}" --train-iters 6
next_losses whole >whole.losses
train saved "$ranks" "${ep[@]}" "${zero[@]}" --train-iters 3 --save saved
weight_hashes saved >saved.hashes
num_bytes=$(cat saved/iter_*/*.safetensors saved/iter_*/optimizer/*.safetensors | wc -c)
report "saved under $ranks ranks" "$(save_seconds saved)"
report "dd, a file after the other" "$(copy_files)"
report "dd, all files at once" "$(copy_files "&")"
load same "$ranks" "${ep[@]}" "${zero[@]}"
load one 1
load tensor 2 "${tp[@]}" "${zero[@]}"
load pipeline 2 "${pp[@]}"
load four 4 "${tp[@]}" "${ep[@]}" --expert-tensor-parallel-size 1 "${pp[@]}"
expect_same same.losses whole.losses "losses after the same mapping's load"
echo "ok   $(printf '%.1f' "$((num_bytes / 100000000))e-1") GB saved under $ranks ranks and loaded under 5 mappings"
