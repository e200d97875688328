#!/bin/bash
# emulation.sh MPIEXEC BUILD: rank 0 of a mapping under --fake-init-process-group holds and sends what rank 0 of the real
# ranks does; a mapping of 64 ranks runs; what makes no sense is refused.
set -uo pipefail
source=$(cd "$(dirname "$0")/../.." && pwd)
mpiexec=$1
cadre=$2/cadre
folder=$2/dist_emulation
failed=0

. "$source/tests/e2e/lib/expect.sh"
rm -rf "$folder"
mkdir -p "$folder"
cd "$folder" || exit 1

# A Mixtral of 32 layers, scaled down.
model=(
    --num-layers 32 --hidden-size 48 --ffn-hidden-size 80 --num-attention-heads 4 --group-query-attention
    --num-query-groups 4 --seq-length 32 --max-position-embeddings 32 --normalization RMSNorm
    --position-embedding-type rope --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --num-experts 8 --moe-router-topk 2 --moe-grouped-gemm --moe-aux-loss-coeff 1e-2
    --moe-token-dispatcher-type alltoall
)
training=(
    --mock-data --tokenizer-type NullTokenizer --vocab-size 120 --micro-batch-size 1 --lr 1e-4 --train-iters 3
    --eval-iters 0 --log-interval 1 --bf16 --use-distributed-optimizer --log-comm --device cpu
)

say() {
    echo "FAILED: $*"
    failed=1
}

# The lines that must be equal: the memory planned and held, what rank 0 sends. Of rows that follow the routing, only the
# calls are the same, and the peak of activations is near. (Calls are those of the busiest rank: in a pipeline, not 0's.)
facts() {
    sed -n -e '/^memory of a step/p' -e 's/^.*\(iterations) memory (MB) | allocated: [0-9.]*\) .*/\1/p' \
        -e 's/^\(comm ep .* all_to_all: [0-9]* calls\).*/\1/p' -e 's/^\(comm etp ([^)]*) [a-z_]*: [0-9]* calls\).*/\1/p' \
        -e '/^comm pp.* 0 bytes sent by rank 0/d' -e 's/^\(comm pp.*:\) [0-9]* calls,\(.*by rank 0\),.*/\1\2/p' \
        -e '/^comm pp/d' -e '/^comm e\(t*\)p (/d' -e 's/^\(comm .* by rank 0\),.*/\1/p' "$1" | sort
}
peak() {
    sed -n 's/.*max allocated: \([0-9.]*\).*/\1/p' "$1"
}

# same_as_real FLAGS...: of 4 ranks
same_as_real() {
    "$mpiexec" -n 4 "$cadre" pretrain "${model[@]}" "${training[@]}" --global-batch-size 16 "$@" >real 2>&1 ||
        say "$*: $(tail -n 3 real)"
    WORLD_SIZE=4 "$cadre" pretrain "${model[@]}" "${training[@]}" --global-batch-size 16 "$@" \
        --fake-init-process-group >fake 2>&1 || say "emulated $*: $(tail -n 3 fake)"
    facts real >real.facts
    facts fake >fake.facts
    [ "$(grep -c "memory" real.facts)" = 2 ] || say "$*: no memory report: $(tail -n 3 real)"
    cmp -s real.facts fake.facts || say "$*: $(diff real.facts fake.facts | head -n 8)"
    echo "$(peak real) $(peak fake)" |
        awk '{ exit !($2 > 0.8 * $1 && $2 < 1.25 * $1) }' || say "$*: peaks $(peak real) and $(peak fake) MB"
}

same_as_real --expert-model-parallel-size 4
same_as_real --pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 8
same_as_real --pipeline-model-parallel-size 2 --expert-model-parallel-size 2
same_as_real --tensor-model-parallel-size 2 --sequence-parallel --expert-model-parallel-size 2
same_as_real --context-parallel-size 2 --expert-model-parallel-size 4 --moe-token-dispatcher-type allgather

# The seed's mapping of Mixtral 8x7B, every kind of rank.
for rank in 0 37 63; do
    WORLD_SIZE=64 RANK=$rank "$cadre" pretrain "${model[@]}" "${training[@]}" --expert-model-parallel-size 8 \
        --pipeline-model-parallel-size 4 --num-virtual-stages-per-pipeline-rank 8 --global-batch-size 256 \
        --fake-init-process-group >fake 2>&1 || say "rank $rank of 64: $(tail -n 3 fake)"
    [ "$(grep -cE "iteration +[123]/ +3 .*number of nan iterations:   0" fake)" = 3 ] ||
        say "rank $rank of 64: $(tail -n 3 fake)"
    grep -q "cadre: warning: an emulation of rank $rank of 64" fake || say "rank $rank of 64 does not say that it is emulated"
done

# refused TEXT COMMAND...
refused() {
    (expect_error "$@") || failed=1
}
fake=("$cadre" pretrain "${model[@]}" "${training[@]}" --global-batch-size 16 --fake-init-process-group)
refused "Set the environment variable WORLD_SIZE" "${fake[@]}"
refused "environment variable WORLD_SIZE is \"many\"" env WORLD_SIZE=many "${fake[@]}"
refused "environment variable RANK is \"4\"; legal: 0 to 3 (WORLD_SIZE - 1)" env WORLD_SIZE=4 RANK=4 "${fake[@]}"
refused "--save out with --fake-init-process-group" env WORLD_SIZE=4 "${fake[@]}" --save out
refused "the launcher started 2" "$mpiexec" -n 2 env WORLD_SIZE=4 "${fake[@]}"
[ $failed = 0 ]
