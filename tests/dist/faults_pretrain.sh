#!/bin/bash
# faults_pretrain.sh MPIEXEC BUILD: a training run on 4 ranks is struck again and again: each rank in turn is killed,
# stopped, or can write no more. Every time the job must end within 10 seconds of the deadline (1.2 seconds) with a status
# other than 0, one line must say why, and no process may stay. The same command is started again and goes on from the
# newest checkpoint; in the end the weights have the same bits as those of a run that nothing happened to. Before that, a
# SIGTERM to one rank ends the job with a checkpoint.
set -uo pipefail
source=$(cd "$(dirname "$0")/../.." && pwd)
mpiexec=$1
export CADRE=$2/cadre
folder=$2/dist_faults_pretrain
num_ranks=4
failed=0

. "$source/tests/e2e/lib/tiny_run.sh"
rm -rf "$folder"
mkdir -p "$folder"
cd "$folder" || exit 1
make_tiny_data || exit 1

complain() {
    echo "FAILED: $*"
    failed=1
}

# Each rank notes its process, and lives with the limit on the size of files that it is given.
cat >rank.sh <<'RANK'
rank=${OMPI_COMM_WORLD_RANK:-${PMI_RANK:-0}}
echo $$ >pid.$rank
if [ "$rank" = "$LIMITED_RANK" ]; then
    ulimit -f 1
fi
exec "$@"
RANK

# train FOLDER [FLAGS...]: two stages, experts over two ranks, optimizer states over two.
train() {
    "$mpiexec" -n $num_ranks bash rank.sh "$CADRE" pretrain "${tiny_model[@]}" "${tiny_data[@]}" "${tiny_training[@]}" \
        --num-layers 4 --eval-iters 0 --train-iters 600 --lr-decay-iters 600 --save-interval 20 --save "$folder/$1" \
        --load "$folder/$1" --pipeline-model-parallel-size 2 --expert-model-parallel-size 2 \
        --use-distributed-optimizer --overlap-grad-reduce --overlap-param-gather --distributed-timeout-minutes 0.02 \
        "${@:2}"
}

newest() {
    cat struck/latest_checkpointed_iteration.txt 2>/dev/null || echo 0
}

hashes() {
    "$CADRE" inspect "$1" --hash | grep -E " [0-9a-f]{32}$"
}

# Waits, while the job runs, for a checkpoint newer than iteration $1.
wait_for_checkpoint() {
    while [ "$(newest)" -le "$1" ] && kill -0 "$job" 2>/dev/null; do
        sleep 0.05
    done
}

# check_end WHAT PATTERN SINCE: how the job ended.
check_end() {
    local status num_lines
    wait "$job"
    status=$?
    [ $status -ne 0 ] || complain "$1: exit status 0"
    [ $((SECONDS - $3)) -le 12 ] || complain "$1: took $((SECONDS - $3)) s"
    grep -Eq -- "$2" err || complain "$1: no line matches '$2': $(tail -n 5 err)"
    num_lines=$(grep -cE '^cadre: (rank|error)' err)
    [[ $1 == *KILL* ]] || [ "$num_lines" = 1 ] || complain "$1: $num_lines lines of cadre: $(grep '^cadre: ' err)"
    sleep 0.2
    ! pgrep -f "$folder/struck" >/dev/null || complain "$1: a process is left"
}

# strike FAULT RANK PATTERN
strike() {
    local before
    before=$(newest)
    LIMITED_RANK=$([ "$1" = LIMIT ] && echo "$2") train struck >log 2>err &
    job=$!
    local since=$SECONDS
    if [ "$1" != LIMIT ]; then
        wait_for_checkpoint "$before"
        since=$SECONDS
        kill "-$1" "$(cat "pid.$2")" || complain "$1 $2: the run was over"
    fi
    check_end "$1 $2" "$3" "$since"
    [ "$before" = 0 ] || grep -q "successfully loaded checkpoint from .* at iteration $before" log ||
        complain "$1 $2: did not go on from iteration $before"
    [ "$1" != LIMIT ] || [ "$(newest)" = "$before" ] || complain "$1 $2: a checkpoint that could not be written"
    [ $failed = 0 ] || exit 1
}

# SIGTERM to a single rank: all save after the same iteration and leave, with status 0.
leave() {
    LIMITED_RANK= train struck --exit-signal-handler >log 2>err &
    job=$!
    wait_for_checkpoint 0
    kill -TERM "$(cat "pid.$1")"
    wait "$job" || complain "TERM $1: status $?: $(tail -n 5 err)"
    grep -q "exiting program after receiving SIGTERM" log || complain "TERM $1: $(tail -n 5 log)"
    grep -Eq "iteration +$(newest)/" log || complain "TERM $1: the newest checkpoint is of iteration $(newest)"
    [ $failed = 0 ] || exit 1
}

leave 2
for rank in $(seq 0 $((num_ranks - 1))); do
    strike KILL "$rank" "([Pp]rocess rank|RANK) $rank .*([Ss]ignal 9|SIGNAL: 9|RUNNING AT)"
    strike STOP "$rank" "^cadre: rank [0-3] on host .* in group .* waiting for rank .* to (send|receive)"
    strike LIMIT "$rank" "^cadre: error: rank [0-3] on host .*: .*File too large"
done
export LIMITED_RANK=
train struck >log 2>err || complain "the last part: $(tail -n 5 err)"
train whole >log 2>err || complain "the run that nothing happens to: $(tail -n 5 err)"
[ -n "$(hashes whole)" ] && [ "$(hashes whole)" = "$(hashes struck)" ] || complain "other bits than without faults"
[ $failed = 0 ]
