#!/bin/bash
# mappings.sh MPIEXEC BUILD [--all | NAME...]: "any mapping, same curve". Trains small models in fp32 for 20 iterations
# on one rank and under the mappings of mappings.txt (those marked quick; --all; or by name), and compares initial
# weights bit for bit, and every loss, gradient norm and final weight (compare_runs.c has the tolerances). Those marked
# resume are also stopped after 10 iterations and resumed: the same bits.
set -uo pipefail
source=$(cd "$(dirname "$0")/../.." && pwd)
mpiexec=$1
build=$2
shift 2
selected=" ${*:-quick} "
export CADRE=$build/cadre
num_failed=0
num_run=0

. "$source/tests/e2e/lib/tiny_run.sh"
folder=$build/dist_mappings
rm -rf "$folder"
mkdir -p "$folder"
cd "$folder" || exit 1
make_tiny_data || exit 1

# Padded to 136 rows under every tensor-parallel size.
padded_vocab=136
common=(
    --hidden-size 32 --num-attention-heads 8 --seq-length 32 --max-position-embeddings 32 --attention-dropout 0
    --hidden-dropout 0 --init-method-std 0.1 --tokenizer-type NullTokenizer --vocab-size 128
    --data-path tiny_text_document --split 90,5,5 --micro-batch-size 2 --global-batch-size 16 --train-iters 20
    --lr 2e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-decay-iters 20 --lr-warmup-iters 2 --log-interval 1 --eval-iters 0
    --save-interval 1000 --distributed-timeout-minutes 2
)
moe=(
    --num-layers 4 --ffn-hidden-size 40 --kv-channels 6 --group-query-attention --num-query-groups 4
    --normalization RMSNorm --position-embedding-type rope --swiglu --disable-bias-linear --num-experts 8
    --moe-router-topk 2 --moe-z-loss-coeff 1e-3
)
untied=--untie-embeddings-and-output-weights
aux=(--moe-aux-loss-coeff 1e-2)

model_flags() {
    case $1 in
    # Tied embeddings, LayerNorm, GELU, biases, learned positions. The true gradient of a bias of keys is 0: Adam must not
    # blow up its rounding errors.
    dense) echo --num-layers 4 --adam-eps 1e-5 ;;
    moe) echo "${moe[@]}" $untied "${aux[@]}" ;;
    deep) echo "${moe[@]}" $untied "${aux[@]}" --num-layers 8 --micro-batch-size 1 ;;
    tied) echo "${moe[@]}" "${aux[@]}" --moe-layer-freq "([0,1]*2)" ;;
    noise) echo "${moe[@]}" $untied "${aux[@]}" --attention-dropout 0.1 --hidden-dropout 0.1 --moe-input-jitter-eps 0.1 ;;
    shared) echo "${moe[@]}" $untied "${aux[@]}" --moe-shared-expert-intermediate-size 24 ;;
    drop) echo "${moe[@]}" $untied "${aux[@]}" --moe-token-dispatcher-type alltoall --moe-expert-capacity-factor 1.0 ;;
    drop_pad) echo "${moe[@]}" $untied "${aux[@]}" --moe-token-dispatcher-type alltoall --moe-expert-capacity-factor 1.25 \
        --moe-pad-expert-input-to-capacity --moe-token-drop-policy position ;;
    sinkhorn) echo "${moe[@]}" $untied --moe-router-load-balancing-type sinkhorn --moe-router-topk 1 ;;
    seq_aux) echo "${moe[@]}" $untied "${aux[@]}" --moe-router-load-balancing-type seq_aux_loss ;;
    global_aux) echo "${moe[@]}" $untied "${aux[@]}" --moe-router-load-balancing-type global_aux_loss ;;
    bias) echo "${moe[@]}" $untied --moe-router-score-function sigmoid --moe-router-enable-expert-bias \
        --moe-router-num-groups 4 --moe-router-group-topk 2 --moe-router-topk-scaling-factor 1.5 ;;
    per_token) echo "${moe[@]}" $untied --calculate-per-token-loss --eod-mask-loss --reset-attention-mask --reset-position-ids ;;
    esac
}

# The words of a mapping as flags.
mapping_flags() {
    local tp=1 word
    for word in "$@"; do
        case $word in
        tp[0-9]*) tp=${word#tp} && echo --tensor-model-parallel-size "$tp" ;;
        pp[0-9]*) echo --pipeline-model-parallel-size "${word#pp}" ;;
        vp[0-9]*) echo --num-virtual-stages-per-pipeline-rank "${word#vp}" ;;
        cp[0-9]*) echo --context-parallel-size "${word#cp}" ;;
        ep[0-9]*) echo --expert-model-parallel-size "${word#ep}" ;;
        etp[0-9]*) echo --expert-tensor-parallel-size "${word#etp}" ;;
        sp) echo --sequence-parallel ;;
        zero) echo --use-distributed-optimizer ;;
        overlap) echo --overlap-grad-reduce ;;
        gather) echo --overlap-param-gather ;;
        quick | resume) ;;
        *) echo "$word" ;;
        esac
    done
    echo --make-vocab-size-divisible-by $((padded_vocab / tp))
}

# train RANKS FOLDER FLAGS...: one rank is a process without MPI.
train() {
    local ranks=$1 to=$2
    shift 2
    if [ "$ranks" = 1 ]; then
        set -- "$CADRE" pretrain "$@"
    else
        set -- "$mpiexec" -n "$ranks" "$CADRE" pretrain "$@"
    fi
    mkdir -p "$to"
    if ! "$@" --save "$to" --tensorboard-dir "$to/tensorboard" >>"$to/log" 2>&1; then
        grep -m 3 -E '^cadre: |signal|runtime error|ERROR: AddressSanitizer' "$to/log" || tail -n 5 "$to/log"
        return 1
    fi
}

hashes() {
    "$CADRE" inspect "$1" --hash | grep -E " [0-9a-f]{32}$"
}

initial_weights() {
    hashes "$1" | grep -v "^optimizer"
}

# A step of learning rate 0 changes no weight.
still=(--train-iters 1 --lr 0 --min-lr 0 --weight-decay 0)

# The runs of one rank, made once for every model.
make_reference() {
    local to=reference.$1
    [ ! -d "$to" ] || return 0
    train 1 "$to" "${common[@]}" $(model_flags "$1") $(mapping_flags) &&
        train 1 "$to.start" "${common[@]}" $(model_flags "$1") $(mapping_flags) "${still[@]}" &&
        initial_weights "$to.start" >"$to.weights" && [ -s "$to.weights" ]
}

check_start() {
    train "$2" "$1.start" "${@:4}" "${still[@]}" || return 1
    initial_weights "$1.start" | diff - "reference.$3.weights" >"$1.start/difference" ||
        { echo "other initial weights: $(grep -c '^<' "$1.start/difference") tensors"; return 1; }
}

check_resume() {
    train "$2" "$1.parts" "${@:4}" --exit-interval 10 && train "$2" "$1.parts" "${@:4}" --load "$1.parts" || return 1
    diff <(hashes "$1") <(hashes "$1.parts") >"$1.parts/difference" ||
        { echo "resumed: other bits in $(grep -c '^<' "$1.parts/difference") tensors"; return 1; }
}

# check NAME RANKS MODEL WORDS...
check() {
    local name=$1 ranks=$2 model=$3 start=$SECONDS result
    shift 3
    set -- "${common[@]}" $(model_flags "$model") $(mapping_flags "$@") $([[ " $* " != *" resume "* ]] || echo resume)
    result=$(
        resume=0
        [ "${*: -1}" != resume ] || resume=1
        set -- "${@:1:$#-resume}"
        make_reference "$model" && train "$ranks" "$name" "$@" && "$build/tests/compare_runs" "reference.$model" "$name" &&
            check_start "$name" "$ranks" "$model" "$@" &&
            if [ $resume = 1 ]; then check_resume "$name" "$ranks" "$model" "$@"; fi
    ) && status=ok || status=FAILED
    [ $status = ok ] || num_failed=$((num_failed + 1))
    num_run=$((num_run + 1))
    printf '%-6s %-20s %2d ranks %4d s %s\n' $status "$name" "$ranks" $((SECONDS - start)) "$result"
    [ $status = FAILED ] || rm -rf "$name" "$name.start" "$name.parts"
}

while read -r name ranks model words; do
    case "$name" in "" | "#"*) continue ;; esac
    if [ "$selected" = " --all " ] || [[ $selected == *" $name "* ]] ||
        { [ "$selected" = " quick " ] && [[ " $words " == *" quick "* ]]; }; then
        check "$name" "$ranks" "$model" $words </dev/null
    fi
done <"$source/tests/dist/mappings.txt"
echo "$num_run mappings, $num_failed failed"
[ $num_failed = 0 ] && [ $num_run -gt 0 ]
