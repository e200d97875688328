#!/bin/bash
# faults_pretrain.sh MPIEXEC BUILD [--device cuda]: a training run is struck again and again: each rank in turn is killed,
# stopped, or can write no more. Every time the job must end within 10 seconds of the deadline with a status other than 0,
# one line must say why, no process may stay, and GPUs must have their memory back. The same command is started again and
# goes on from the newest checkpoint; in the end the weights have the same bits as those of a run that nothing happened to.
# Before that, a SIGTERM to one rank ends the job with a checkpoint. On GPUs, over NCCL, where a start takes seconds, each
# fault strikes one rank; and NCCL is kept from starting.
set -uo pipefail
source=$(cd "$(dirname "$0")/../.." && pwd)
mpiexec=$1
build=$(cd "$2" && pwd)
[ "${3:-}" = --device ] && device=$4 || device=cpu
export CADRE=$build/cadre
folder=${FAULTS_FOLDER:-$build/dist_faults_pretrain}
failed=0

. "$source/tests/e2e/lib/tiny_run.sh"
. "$source/tests/gpu/lib/nccl.sh"
rm -rf "$folder"
mkdir -p "$folder"
cd "$folder" || exit 1
make_tiny_data || exit 1

# Optimizer states, and experts, over two ranks; with four ranks two stages. In GPUs' deadline they must find each other.
num_ranks=4 num_iterations=600 save_interval=20 deadline_seconds=1.2
flags=(--expert-model-parallel-size 2 --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather)
if [ $device = cuda ]; then
    num_iterations=200 save_interval=5 deadline_seconds=3.6
    [ "$(num_gpus)" -ge 4 ] || num_ranks=2
fi
[ $num_ranks = 2 ] || flags+=(--pipeline-model-parallel-size 2)

complain() {
    echo "FAILED: $*"
    failed=1
}

# Each rank notes its process.
cat >rank.sh <<'RANK'
echo $$ >pid.${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-0}}
exec "$@"
RANK

# train FOLDER [FLAGS...]
train() {
    NCCL_NVLS_ENABLE=0 timeout -k 5 200 "$mpiexec" -n $num_ranks bash rank.sh "$CADRE" pretrain "${tiny_model[@]}" \
        "${tiny_data[@]}" "${tiny_training[@]}" --device $device --num-layers 4 --eval-iters 0 \
        --train-iters $num_iterations --lr-decay-iters $num_iterations --save-interval $save_interval \
        --save "$folder/$1" --load "$folder/$1" "${flags[@]}" \
        --distributed-timeout-minutes "$(awk "BEGIN { print $deadline_seconds / 60 }")" "${@:2}"
}

newest() {
    cat struck/latest_checkpointed_iteration.txt 2>/dev/null || echo 0
}

hashes() {
    "$CADRE" inspect "$1" --hash | grep -E " [0-9a-f]{32}$"
}

# MiB in use on all GPUs
memory_used() {
    nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits | awk '{ sum += $1 } END { print sum }'
}
[ $device = cpu ] || idle_memory=$(memory_used)

expect_free_memory() {
    local used
    for _ in $(seq 10); do
        used=$(memory_used)
        [ "$used" -gt $((idle_memory + 64)) ] || return 0
        sleep 0.2
    done
    complain "$1: $used MiB in use on the GPUs, before $idle_memory"
}

# Waits, while the job runs, for a checkpoint newer than iteration $1.
wait_for_checkpoint() {
    while [ "$(newest)" -le "$1" ] && kill -0 "$job" 2>/dev/null; do
        sleep 0.05
    done
}

# check_end WHAT PATTERN SINCE: how the job ended, SINCE by the clock.
check_end() {
    local status num_lines took
    wait "$job"
    status=$?
    took=$(awk "BEGIN { printf \"%.1f\", $EPOCHREALTIME - $3 }")
    [ $status -ne 0 ] || complain "$1: exit status 0"
    awk "BEGIN { exit !($took <= $deadline_seconds + 10) }" || complain "$1: took $took s"
    grep -Eq -- "$2" err || complain "$1: no line matches '$2': $(tail -n 5 err)"
    num_lines=$(grep -cE '^cadre: (rank|error)' err)
    [[ $1 == KILL* ]] || [ "$num_lines" = 1 ] || complain "$1: $num_lines lines of cadre: $(grep '^cadre: ' err)"
    sleep 0.2
    ! pgrep -f "$folder/struck" >/dev/null || complain "$1: a process is left"
    [ $device = cpu ] || expect_free_memory "$1"
    [ $failed = 1 ] || echo "ok   $1: over in $took s, status $status: $(grep -m 1 -E -- "$2" err)"
}

# strike FAULT RANK PATTERN
strike() {
    local before since pid
    before=$(newest)
    train struck >log 2>err &
    job=$!
    wait_for_checkpoint "$before"
    pid=$(cat "pid.$2")
    since=$EPOCHREALTIME
    case $1 in
    LIMIT) prlimit --pid "$pid" --fsize=1024:1024 || complain "$1 $2: the run was over" ;;
    *) kill "-$1" "$pid" || complain "$1 $2: the run was over" ;;
    esac
    check_end "$1 rank $2" "$3" "$since"
    [ "$before" = 0 ] || grep -q "successfully loaded checkpoint from .* at iteration $before" log ||
        complain "$1 $2: did not go on from iteration $before"
    [ $failed = 0 ] || exit 1
}

# SIGTERM to a single rank: all save after the same iteration and leave, with status 0.
leave() {
    train struck --exit-signal-handler >log 2>err &
    job=$!
    wait_for_checkpoint 0
    kill -TERM "$(cat "pid.$1")"
    wait "$job" || complain "TERM $1: status $?: $(tail -n 5 err)"
    grep -q "exiting program after receiving SIGTERM" log || complain "TERM $1: $(tail -n 5 log)"
    grep -Eq "iteration +$(newest)/" log || complain "TERM $1: the newest checkpoint is of iteration $(newest)"
    [ $device = cpu ] || grep -q "over NCCL" log || complain "TERM $1: not over NCCL"
    [ $failed = 0 ] || exit 1
}

# no_start VARIABLE VALUE: NCCL cannot start.
no_start() {
    local since=$EPOCHREALTIME
    export "$1=$2"
    train no_start >log 2>err &
    job=$!
    unset "$1"
    check_end "$1=$2" "^cadre: .*nccl" "$since"
}

if [ $device = cuda ]; then
    no_start NCCL_SOCKET_IFNAME no_such_interface
    no_start NCCL_NET no_such_network
fi
leave 1
for rank in $(seq 0 $((num_ranks - 1))); do
    [ $device = cuda ] && [ "$rank" != 0 ] ||
        strike KILL "$rank" "([Pp]rocess rank|RANK) $rank .*([Ss]ignal 9|SIGNAL: 9|RUNNING AT)"
    [ $device = cuda ] && [ "$rank" != 1 ] ||
        strike STOP "$rank" "^cadre: rank [0-9]+ on host .* in group .* (waiting for rank .* to (send|receive)|is not complete)"
    [ $device = cuda ] && [ "$rank" != 1 ] ||
        strike LIMIT "$rank" "^cadre: error: rank [0-9]+ on host .*: .*File too large"
done
train struck >log 2>err || complain "the last part: $(tail -n 5 err)"
train whole >log.whole 2>err.whole || complain "the run that nothing happens to: $(tail -n 5 err.whole)"
[ -n "$(hashes whole)" ] && [ "$(hashes whole)" = "$(hashes struck)" ] || complain "other bits than without faults"
[ $failed = 1 ] || echo "ok   $(hashes whole | wc -l) tensors with the bits of a run that nothing happened to"
[ $failed = 0 ]
