#!/bin/bash
# Everything that can be tested on this machine: an optimised build with all its tests (unit, ops, layers, oracles on
# golden files, end to end, fuzzing corpora), then the same without the end-to-end tests under the address and
# undefined-behaviour sanitizers. Ends with one line of counts; fails if any test does.
#
#   ./test.sh            all            ./test.sh release | asan      one of the two builds
set -uo pipefail
cd "$(dirname "$0")" || exit 1

num_cores=$(nproc)
num_passed=0
num_failed=0

# The value of an attribute of ctest's JUnit summary: tests, failures, ...
junit_count() {
    grep -o "[[:space:]]$2=\"[0-9]*\"" "$1" | head -1 | tr -dc 0-9
}

# Configures, builds and tests one preset. A build that fails counts as one failed test.
run_preset() {
    local preset=$1 junit tests failures
    junit=$(mktemp)
    printf '\n== %s ==\n' "$preset"
    if ! cmake --preset "$preset" >"$junit" 2>&1; then
        cat "$junit"
        rm -f "$junit"
        num_failed=$((num_failed + 1))
        return
    fi
    if ! cmake --build --preset "$preset" -j "$num_cores" >"$junit" 2>&1; then
        tail -n 100 "$junit"
        rm -f "$junit"
        num_failed=$((num_failed + 1))
        return
    fi
    : >"$junit"
    ctest --preset "$preset" -j "$num_cores" --output-junit "$junit"
    tests=$(junit_count "$junit" tests)
    failures=$(junit_count "$junit" failures)
    rm -f "$junit"
    if [ -z "$tests" ]; then
        num_failed=$((num_failed + 1))
        return
    fi
    num_passed=$((num_passed + tests - failures))
    num_failed=$((num_failed + failures))
}

scripts/install_dependencies.sh test || exit 1
for preset in "${@:-release asan}"; do
    for one in $preset; do
        run_preset "$one"
    done
done

printf '\n%d passed, %d failed\n' "$num_passed" "$num_failed"
[ "$num_failed" = 0 ] && [ "$num_passed" -gt 0 ]
