#!/bin/bash
# Several GPUs of this machine, over NCCL: tests/gpu/several.sh BUILD [MPIEXEC] [NUM_GPUS] [PART...]
#
# BUILD holds cadre, and dist_device, many_runs and compare_runs in tests/. Parts: collectives, mappings-fp32,
# mappings-bf16, shared (mappings of twice as many ranks as GPUs), faults, checkpoints; all, if none is named. Prints a line
# for everything that was checked, and a table last.
set -uo pipefail

BUILD=$(cd "$1" && pwd)
mpiexec=${2:-mpirun}
SOURCE=$(cd "$(dirname "$0")/../.." && pwd)
. "$SOURCE/tests/gpu/lib/nccl.sh"
num_gpus=${3:-$(num_gpus)}
parts=${*:4}
[ "$num_gpus" -ge 2 ] || { echo "several.sh: $num_gpus GPUs here; nothing was checked"; exit 77; }
CUDA_VISIBLE_DEVICES=$(seq -s , 0 $((num_gpus - 1)))
export CUDA_VISIBLE_DEVICES NCCL_NVLS_ENABLE=0 OMP_NUM_THREADS=2 OMP_WAIT_POLICY=passive
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 OMPI_MCA_rmaps_base_oversubscribe=true \
    OMPI_MCA_hwloc_base_binding_policy=none OMPI_MCA_btl_vader_single_copy_mechanism=none
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
status=0

# part NAME COMMAND...: its output, and a line of the table from the last line of it
part() {
    local name=$1 begin=$SECONDS result=ok
    shift
    [ -z "$parts" ] || [[ " $parts " == *" $name "* ]] || return 0
    echo "==== $name"
    "$@" 2>&1 | tee "$folder/log" || { result=FAILED && status=1; }
    printf '%-14s %-6s %4d s  %s\n' "$name" $result $((SECONDS - begin)) "$(tail -n 1 "$folder/log")" >>"$folder/table"
}

collectives() {
    local ranks
    for ((ranks = 2; ranks <= 2 * num_gpus; ranks++)); do
        if [ $ranks -le "$num_gpus" ] || [ $ranks = $((2 * num_gpus)) ]; then
            launch_over_nccl "$mpiexec" $ranks "$BUILD/tests/dist_device" | grep -E "ranks over NCCL" || return 1
        fi
    done
}

# mappings FLAGS NUM_RANKS...: all of these numbers of ranks
mappings() {
    local flags=$1 ranks failed=0
    shift
    for ranks in "$@"; do
        bash "$SOURCE/tests/dist/mappings.sh" "$mpiexec" "$BUILD" --device cuda $flags --ranks "$ranks" \
            --jobs 8 --all || failed=1
    done
    return $failed
}

fitting=(2)
for ranks in 3 4 8 16; do
    [ $ranks -gt "$num_gpus" ] || fitting+=($ranks)
done
part collectives collectives
part mappings-fp32 mappings "" "${fitting[@]}"
part mappings-bf16 mappings --bf16 "${fitting[@]}"
part shared mappings "" $((2 * num_gpus))
part faults bash "$SOURCE/tests/dist/faults_pretrain.sh" "$mpiexec" "$BUILD" --device cuda
part checkpoints bash "$SOURCE/tests/gpu/checkpoints.sh" "$BUILD" "$mpiexec" --ranks "$num_gpus"
echo
echo "$num_gpus GPUs: $(nvidia-smi --query-gpu=name --format=csv,noheader | head -n 1)"
cat "$folder/table"
exit $status
