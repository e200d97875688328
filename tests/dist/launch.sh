#!/bin/bash
# launch.sh MPIEXEC BUILD: what all ranks have to say is said once.
set -uo pipefail
source=$(cd "$(dirname "$0")/../.." && pwd)
mpiexec=$1
export CADRE=$2/cadre
folder=$2/dist_launch
failed=0

. "$source/tests/e2e/lib/tiny_run.sh"
rm -rf "$folder"
mkdir -p "$folder"
cd "$folder" || exit 1
make_tiny_data || exit 1

# once FAILS PATTERN FLAGS...: three ranks end, FAILS (1) or not (0), and one line matches. (mpirun passes stdout on in
# pieces that need not end with a line, so stderr is kept apart.)
once() {
    local wanted=$1 pattern=$2 status num_lines
    shift 2
    "$mpiexec" -n 3 "$CADRE" pretrain "${tiny_model[@]}" "${tiny_data[@]}" "${tiny_training[@]}" --train-iters 2 \
        --micro-batch-size 1 --global-batch-size 3 "$@" >out 2>err
    status=$?
    [ $((status != 0)) = "$wanted" ] || { echo "FAILED: $*: status $status"; failed=1; }
    num_lines=$(cat out err | grep -cE -- "$pattern")
    [ "$num_lines" = 1 ] || { echo "FAILED: $*: $num_lines lines match '$pattern': $(tail -n 20 out err)"; failed=1; }
}

once 0 "iteration +2/ +2 "
once 0 "^num_experts " --print-config
once 0 "^cadre pretrain \[flags\]" --help
once 0 "^cadre: warning: .*--cp-comm-type" --cp-comm-type a2a
once 1 "^cadre: error: .*unknown flag --tensor-parallel" --tensor-parallel 2
once 1 "^cadre: error: .*world size \(3\) is not divisible by total_model_size 2" --tensor-model-parallel-size 2
once 1 "^cadre: error: .*no_such" --data-path no_such
once 1 "^cadre: error: .*no_such" --load no_such --exit-on-missing-checkpoint
[ $failed = 0 ]
