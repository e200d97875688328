#!/bin/bash
# Fuzzes a parser with libFuzzer under the sanitizers, starting from its corpus in tests/fuzz/corpus.
#
#   scripts/fuzz.sh                      lists the targets
#   scripts/fuzz.sh TARGET [SECONDS]     (60 by default), e.g. scripts/fuzz.sh safetensors 600
#
# New inputs go to build-fuzz/corpus/TARGET; a crash leaves build-fuzz/crash-*, and is fixed together with a copy of the
# input, cut down by -minimize_crash=1, in tests/fuzz/corpus/TARGET, which ./test.sh replays ever after.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ $# = 0 ]; then
    for source in tests/fuzz/fuzz_*.c; do
        basename "$source" .c | sed 's/^fuzz_//'
    done
    exit 0
fi
target=$1
seconds=${2:-60}
if [ ! -f "tests/fuzz/fuzz_$target.c" ]; then
    echo "fuzz.sh: no target '$target' (tests/fuzz/fuzz_$target.c)" >&2
    exit 1
fi

scripts/install_dependencies.sh fuzz
cmake --preset fuzz >/dev/null
cmake --build --preset fuzz --target "fuzz_$target"
mkdir -p "build-fuzz/corpus/$target"
# The process reads hostile sizes: 2 GiB and 10 s a run are plenty for an honest error.
cd build-fuzz
exec "tests/fuzz_$target" -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=10 -max_len=65536 \
    "corpus/$target" "../tests/fuzz/corpus/$target"
