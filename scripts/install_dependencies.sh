#!/bin/bash
# Installs the Debian or Ubuntu packages cadre needs that this machine lacks. As root, or with sudo.
#
#   scripts/install_dependencies.sh [build|test|corpus|fuzz|format]...     (build, when nothing is named)
#
# build   compile and run      test   build, MPI and all tests      corpus   what quickstart.sh trains on
# fuzz    libFuzzer (clang)    format clang-format
set -euo pipefail
cd "$(dirname "$0")"

build=(gcc g++ libc6-dev cmake ninja-build pkg-config libjansson-dev libxxhash-dev
    libsentencepiece-dev libprotobuf-c-dev protobuf-c-compiler)
test=("${build[@]}" libcmocka-dev libopenmpi-dev openmpi-bin sentencepiece perl)
corpus=(sentencepiece perl)
fuzz=("${test[@]}" clang libclang-rt-dev libomp-dev)
format=(clang-format)

is_installed() {
    [ "$(dpkg-query -W -f='${db:Status-Status}' "$1" 2>/dev/null)" = installed ]
}

has_matmul_library() {
    is_installed libdnnl-dev || is_installed libopenblas-dev
}

# oneDNN where the distribution has it, else OpenBLAS (float32 only as fast, no bfloat16).
matmul_package() {
    if [[ $(apt-cache policy libdnnl-dev) == *"Candidate: "[0-9]* ]]; then
        echo libdnnl-dev
    else
        echo libopenblas-dev
    fi
}

if ! command -v apt-get >/dev/null; then
    echo "install_dependencies.sh: no apt-get here; install by hand: oneDNN or OpenBLAS, ${test[*]}" >&2
    exit 0
fi

wanted=()
matmul=no
for group in "${@:-build}"; do
    case $group in
    build) wanted+=("${build[@]}") matmul=yes ;;
    test) wanted+=("${test[@]}") matmul=yes ;;
    corpus) wanted+=("${corpus[@]}") ;;
    fuzz) wanted+=("${fuzz[@]}") matmul=yes ;;
    format) wanted+=("${format[@]}") ;;
    *)
        echo "install_dependencies.sh: no group '$group'; there are build, test, corpus, fuzz, format" >&2
        exit 1
        ;;
    esac
done
missing=()
for package in "${wanted[@]}"; do
    [[ " ${missing[*]} " == *" $package "* ]] || is_installed "$package" || missing+=("$package")
done
if [ $matmul = no ] || has_matmul_library; then
    matmul=there
fi
if [ ${#missing[@]} = 0 ] && [ $matmul = there ]; then
    exit 0
fi

./as_root.sh apt-get update -qq
[ $matmul = there ] || missing+=("$(matmul_package)")
echo "installing: ${missing[*]}"
log=$(mktemp)
if ! ./as_root.sh apt-get install -y -qq --no-install-recommends "${missing[@]}" >"$log" 2>&1; then
    cat "$log" >&2
    rm -f "$log"
    echo "install_dependencies.sh: apt-get could not install the packages (see above)" >&2
    exit 1
fi
rm -f "$log"
