#!/bin/bash
# ThreadSanitizer where threads meet: the loader's worker, TensorBoard's writer, the thread that moves collectives along,
# the pipeline executor's test. OpenMP stays at one thread, since libgomp is not built for it; the order of MPI's own locks
# (detect_deadlocks) is none of ours. Fails at the first report.
#
#   scripts/tsan.sh [BUILD DIRECTORY]
set -eu
cd "$(dirname "$0")/.."
build=${1:-build-tsan}
tests='test_loader|test_tensorboard|test_pipeline_executor|test_comm_delay|dist_(comm|moe|model|optim|pipeline|trainer|overlap)_2'
cmake -S . -B "$build" -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo -DCADRE_CUDA=OFF \
    -DCMAKE_C_FLAGS='-fsanitize=thread -Wno-error=tsan' -DCMAKE_CXX_FLAGS=-fsanitize=thread >/dev/null
ctest --test-dir "$build" -N -R "$tests" | sed -n 's/.*Test *#[0-9]*: \([a-z_]*\)\(_[0-9]\)\?$/\1/p' | sort -u |
    xargs ninja -C "$build"
export OMP_NUM_THREADS=1
export TSAN_OPTIONS="halt_on_error=1 exitcode=66 detect_deadlocks=0"
ctest --test-dir "$build" -R "$tests" --output-on-failure
