#!/bin/bash
# faults.sh MPIEXEC FAULT_COMM: faults on each of 3 ranks and in each kind of collective. The job must
# end within 10 seconds of the deadline (1 second) with a status other than 0, exactly one line must
# say why, and no process may stay.
set -u
mpiexec=$1
program=$2
num_failed=0

complain() {
    echo "FAILED: $*"
    num_failed=$((num_failed + 1))
}

# check COLLECTIVE FAULT RANK PATTERN: the line must match the pattern.
check() {
    local case="$1 $2 $3" output status start=$SECONDS num_lines
    output=$(timeout -s KILL 60 "$mpiexec" -n 3 "$program" "$1" "$2" "$3" 2>&1)
    status=$?
    [ $status -ne 0 ] || complain "$case: exit status 0"
    [ $((SECONDS - start)) -le 11 ] || complain "$case: took $((SECONDS - start)) s"
    if [ -n "$4" ]; then
        num_lines=$(grep -c '^cadre: ' <<<"$output")
        [ "$num_lines" = 1 ] || complain "$case: $num_lines lines: $output"
        grep -q "^cadre: .*$4" <<<"$output" || complain "$case: no line matches '$4': $output"
    fi
    sleep 0.2
    ! pgrep -f "$program $case" >/dev/null || complain "$case: a process is left"
}

rank=0
for collective in all_reduce all_gather reduce_scatter all_to_all broadcast receive; do
    check $collective stop $rank \
        "on host .*: $collective in group world of 3 ranks .* waiting for rank .*$rank.* to send"
    rank=$(((rank + 1) % 3))
done
for rank in 0 1 2; do
    check all_reduce error $rank "error: .*no such file"
    check all_reduce panic $rank "rank $rank stopped .*a broken invariant"
    check all_reduce kill $rank "" # mpirun names the rank and the signal
done
[ $num_failed = 0 ]
