#!/bin/sh
# Builds the CUDA backend and checks every op on this machine's GPU; then the speeds.
#   tests/gpu.sh [check|sanitize|bench] [WORD...]   (nothing: check, then bench; WORDs choose ops)
# Needs nvcc, cmake, ninja and a C compiler only. Exits 77 where there is no GPU. The whole program on
# the GPU, with all that it depends on: tests/gpu/program.sh BUILD.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
build=${CADRE_GPU_BUILD:-$root/build-gpu}
what=${1:-all}
[ $# -gt 0 ] && shift
export CUDACXX="${CUDACXX:-$(command -v nvcc || echo /usr/local/cuda/bin/nvcc)}"

if ! nvidia-smi -L; then
    echo "gpu.sh: no GPU here; nothing was checked"
    exit 77
fi
cmake -S "$root/tests/gpu" -B "$build" -G Ninja -DCADRE_CUDA=ON >"$build.log" 2>&1 ||
    { cat "$build.log"; exit 1; }
cmake --build "$build" >"$build.log" 2>&1 || { tail -50 "$build.log"; exit 1; }
status=0
if [ "$what" = all ] || [ "$what" = check ]; then
    "$build/check_ops" "$@" >"$build/check.txt" || status=$?
    grep -A70 'results compared' "$build/check.txt" || tail -20 "$build/check.txt"
fi
# cuDNN's kernels are its own. WORDs are kinds of ops here; every tool runs on every kind in both dtypes, side by side: 100
# seconds on an H100. The tiny cases are there to launch every kernel of ours that the whole check launches, but for the merge
# of attention's parts by cuDNN, whose stores initcheck does not follow (the last list of kernels, taken before the cases of
# attention in parts and of wide tiles were added, had 173 of 186). `shared` chooses other forms of the experts' products.
sanitize() { # TOOL DTYPE KIND [shared]: a line of result, last
    log=$build/sanitize_$1_$2_$3${4:+_$4}
    # shellcheck disable=SC2086 # a word or none
    OMP_NUM_THREADS=1 compute-sanitizer --tool "$1" --kernel-name-exclude kernel_substring=cudnn --error-exitcode 9 \
        "$build/check_ops" "$2" "$3" ${4:-} aligned tiny >"$log.txt" 2>&1 || echo "$*" >>"$build/sanitize_failed"
    echo "$*: $(grep 'results compared' "$log.txt"); $(tail -n 1 "$log.txt")" >"$log.line"
}
if [ "$what" = sanitize ]; then
    [ $# -gt 0 ] || set -- attention dense moe
    rm -f "$build"/sanitize_*
    for tool in racecheck initcheck memcheck; do
        for kind in "$@"; do
            sanitize "$tool" F32 "$kind" &
            sanitize "$tool" BF16 "$kind" &
            [ "$kind" != moe ] || sanitize "$tool" BF16 moe shared &
        done
    done
    wait
    cat "$build"/sanitize_*.line
    [ ! -e "$build/sanitize_failed" ] || status=1
fi
if [ "$what" = all ] || [ "$what" = bench ]; then
    "$build/bench_cuda" "$@"
fi
exit $status
