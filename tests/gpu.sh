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
# cuDNN's kernels are its own. initcheck does not follow what the copy engine writes, as cuBLASLt's products leave their
# results: add_halves_kernel is the one kernel that reads one within an op.
sanitize() { # TOOL WORD...
    log=$build/sanitize_$(echo "$@" | tr ' ' _).txt
    tool=$1
    shift
    others="--kernel-name-exclude kernel_substring=cudnn"
    [ "$tool" != initcheck ] || others="$others --kernel-name-exclude kernel_substring=add_halves_kernel"
    # shellcheck disable=SC2086 # options without blanks in them
    compute-sanitizer --tool "$tool" $others --error-exitcode 9 "$build/check_ops" "$@" >"$log" 2>&1 || status=$?
    echo "$tool $*: $(grep 'results compared' "$log"); $(tail -n 1 "$log")"
}
if [ "$what" = sanitize ]; then
    for tool in memcheck racecheck initcheck; do
        sanitize "$tool" F32 tiny "$@"
        sanitize "$tool" BF16 tiny "$@"
    done
fi
if [ "$what" = all ] || [ "$what" = bench ]; then
    "$build/bench_cuda" "$@"
fi
exit $status
