#!/bin/bash
# Runs one end-to-end test: scripts/run_e2e.sh BUILD tests/e2e/X.sh
#
# The test is a bash script run with -eu -o pipefail in an empty folder, BUILD/e2e/X, that stays when the test fails. It
# finds the program in $CADRE, the tests' golden files in $FIXTURES, the repository in $SOURCE and the build in $BUILD.
set -euo pipefail

SOURCE=$(cd "$(dirname "$0")/.." && pwd)
BUILD=$(cd "$1" && pwd)
script=$(realpath "$2")
folder=$BUILD/e2e/$(basename "$script" .sh)
export SOURCE BUILD CADRE=$BUILD/cadre FIXTURES=$SOURCE/tests/fixtures

rm -rf "$folder"
mkdir -p "$folder"
cd "$folder"
bash -eu -o pipefail "$script"
cd "$BUILD"
rm -rf "$folder"
