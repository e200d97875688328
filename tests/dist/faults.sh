#!/bin/bash
# faults.sh MPIEXEC FAULT_COMM: every fault on each of 3 ranks in each kind of collective. The job must end within 10
# seconds of the deadline (1 second) with a status other than 0, one line must say why, and no process may stay.
set -u
mpiexec=$1
program=$2
complaints=$(mktemp)
trap 'rm -f "$complaints"' EXIT

complain() {
    echo "FAILED: $*" | tee -a "$complaints"
}

# run_case COLLECTIVE FAULT RANK PATTERN: the line must match the pattern. cadre says why itself, but for a kill: then it
# is the launcher that names the rank and the signal.
run_case() {
    local case="$1 $2 $3" pattern=$4 output status start=$SECONDS num_lines
    output=$(timeout -s KILL 60 "$mpiexec" -n 3 "$program" "$1" "$2" "$3" 2>&1)
    status=$?
    [ $status -ne 0 ] || complain "$case: exit status 0"
    [ $((SECONDS - start)) -le 11 ] || complain "$case: took $((SECONDS - start)) s"
    num_lines=$(grep -Ec -- "$pattern" <<<"$output")
    [ "$num_lines" = 1 ] || complain "$case: $num_lines lines match '$pattern': $output"
    num_lines=$(grep -c '^cadre: ' <<<"$output")
    [ "$2" = kill ] || [ "$num_lines" = 1 ] || complain "$case: $num_lines lines of cadre: $output"
    sleep 0.2
    ! pgrep -f "$program $case" >/dev/null || complain "$case: a process is left"
}

# A stopped rank neither sends what the others wait for, nor takes what they send.
waits_for() {
    case $1 in
    send) echo "send in group world of 3 ranks .* waiting for rank $2 to receive" ;;
    *) echo "$1 in group world of 3 ranks .* waiting for rank ([0-2], )?$2(, [0-2])? to send" ;;
    esac
}

for collective in all_reduce all_gather reduce_scatter all_to_all broadcast send receive; do
    for rank in 0 1 2; do
        run_case $collective stop $rank "^cadre: rank [0-2] on host .*: $(waits_for $collective $rank)" &
        run_case $collective kill $rank "([Pp]rocess rank|RANK) $rank .*([Ss]ignal 9|SIGNAL: 9|RUNNING AT)" &
        run_case $collective error $rank "^cadre: error: rank $rank on host .*: no such file" &
        run_case $collective panic $rank "^cadre: rank $rank on host .* stopped at .*: a broken invariant" &
        wait
    done
done
[ ! -s "$complaints" ]
