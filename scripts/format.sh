#!/bin/bash
# Formats the C and C++ sources as .clang-format says.
#
#   scripts/format.sh            all            scripts/format.sh FILES...
set -euo pipefail
cd "$(dirname "$0")/.."

scripts/install_dependencies.sh format
if [ $# = 0 ]; then
    mapfile -t files < <(git ls-files '*.c' '*.h' '*.cpp')
    set -- "${files[@]}"
fi
clang-format -i "$@"
