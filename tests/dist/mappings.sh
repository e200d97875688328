#!/bin/bash
# mappings.sh MPIEXEC BUILD [OPTION...] [--all | NAME...]: "any mapping, same curve". Trains small models for 20 iterations
# on one rank and under the mappings of mappings.txt (those marked quick; --all; or by name), and compares every loss,
# gradient norm and final weight (compare_runs.c has the tolerances), in fp32 also the initial weights, bit for bit. Those
# marked resume are also stopped after 10 iterations and resumed: the same bits.
#   --device cuda   on GPUs over NCCL; ranks that share one give themselves out for as many hosts. Else on the CPU. As
#                   starts are most of the time there, all runs of a number of ranks are one job's (many_runs.c), and
#                   initial weights are those of the quick mappings. MAPPINGS_SECONDS: the most for a job's runs.
#   --bf16          in bf16 against one rank in bf16, instead of fp32
#   --ranks N       only the mappings of N ranks
#   --jobs N        so many mappings at a time; else one
set -uo pipefail
source=$(cd "$(dirname "$0")/../.." && pwd)
mpiexec=$1
build=$(cd "$2" && pwd)
shift 2
device=cpu precision=fp32 only_ranks='' num_jobs=1
while [ $# -gt 0 ]; do
    case $1 in
    --device) device=$2 && shift 2 ;;
    --bf16) precision=bf16 && shift ;;
    --ranks) only_ranks=$2 && shift 2 ;;
    --jobs) num_jobs=$2 && shift 2 ;;
    *) break ;;
    esac
done
selected=" ${*:-quick} "
export CADRE=$build/cadre

. "$source/tests/e2e/lib/tiny_run.sh"
. "$source/tests/gpu/lib/nccl.sh"
folder=${MAPPINGS_FOLDER:-$build/dist_mappings}
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
    --save-interval 1000 --device "$device" --distributed-timeout-minutes $([ "$device" = cuda ] && echo 0.5 || echo 2)
)
[ $precision = fp32 ] || common+=(--bf16)
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

# complain LOG: what it says of a failure
complain() {
    grep -m 3 -E '^cadre: |signal|runtime error|ERROR: AddressSanitizer' "$1" || tail -n 5 "$1"
}

# explain_missing LOG: why a run has not ended well; 2 where there was no time for it.
explain_missing() {
    if [ -e out_of_time ] && ! grep -qE '^cadre: (error|rank)' "$1" 2>/dev/null; then
        echo "no time for $(basename "$1" .log)"
        return 2
    fi
    [ -e "$1" ] && complain "$1" || echo "was not run"
    return 1
}

# train RANKS RUN FOLDER FLAGS...: saves in the folder, logs in RUN.log. One rank is a process without MPI. On GPUs the run
# is only listed, or, when all runs have been made, looked at.
listing=0
train() {
    local ranks=$1 run=$2 to=$3
    shift 3
    set -- "$@" --save "$to" --tensorboard-dir "$to/tensorboard"
    if [ $listing = 1 ]; then
        echo "$run $*" >>"runs.$ranks"
    elif [ "$device" = cuda ]; then
        [ -e "$run.ok" ] || { explain_missing "$run.log"; return; }
        [ "$ranks" = 1 ] || grep -q "over NCCL" "$run.log" || { echo "not over NCCL"; return 1; }
    elif [ "$ranks" = 1 ]; then
        "$CADRE" pretrain "$@" >"$run.log" 2>&1 || { complain "$run.log"; return 1; }
    else
        "$mpiexec" -n "$ranks" "$CADRE" pretrain "$@" >"$run.log" 2>&1 || { complain "$run.log"; return 1; }
    fi
}

# make_runs RANKS: those that are listed, whole ones first. One that ends the job is left out of the next. Two blocks of
# NCCL's are two channels for each communicator to connect, instead of 24, which takes longer than a run.
make_runs() {
    local launcher=() first=1 run status
    [ "$1" = 1 ] || launcher=(launch_over_nccl "$mpiexec" "$1")
    awk '{ print (index($1, ".") && $1 !~ /^reference/), NR, $0 }' "runs.$1" | sort -n -k 1,1 -k 2,2 | cut -d " " -f 3- \
        >"sorted.$1"
    while tail -n +"$first" "sorted.$1" >runs.left && [ -s runs.left ]; do
        NCCL_MAX_CTAS=2 LAUNCH_SECONDS=${MAPPINGS_SECONDS:-600} "${launcher[@]}" "$build/tests/many_runs" runs.left \
            >>"job.$1.log" 2>&1 </dev/null
        status=$?
        [ $status != 124 ] || touch out_of_time
        [ $status != 0 ] && [ $status != 124 ] || break
        while read -r run _ && [ -e "$run.ok" ]; do
            first=$((first + 1))
        done <runs.left
        first=$((first + 1))
    done
}

hashes() {
    "$CADRE" inspect "$1" --hash | grep -E " [0-9a-f]{32}$"
}

initial_weights() {
    hashes "$1" | grep -v "^optimizer"
}

# A step of learning rate 0 changes no weight.
still=(--train-iters 1 --lr 0 --min-lr 0 --weight-decay 0)

# train_reference MODEL: the runs of one rank
train_reference() {
    local run=reference.$1
    set -- "${common[@]}" $(model_flags "$1") $(mapping_flags)
    train 1 "$run" "$run" "$@" || return 1
    [ $precision = bf16 ] || train 1 "$run.start" "$run.start" "$@" "${still[@]}"
}

# checks_start WORDS...: whether a mapping's initial weights are compared
checks_start() {
    [ $precision = fp32 ] && { [ "$device" = cpu ] || [[ " $* " == *" quick "* ]]; }
}

# train_mapping NAME RANKS MODEL WORDS...: prints how far it is from one rank, and what is wrong.
train_mapping() {
    local name=$1 ranks=$2 model=$3 words
    shift 3
    words=" $* "
    set -- "${common[@]}" $(model_flags "$model") $(mapping_flags "$@")
    train "$ranks" "$name" "$name" "$@" || return
    [ $listing = 1 ] || "$build/tests/compare_runs" $precision "reference.$model" "$name" || return 1
    ! checks_start "$words" || train "$ranks" "$name.start" "$name.start" "$@" "${still[@]}" || return
    [[ $words != *" resume "* ]] || {
        train "$ranks" "$name.first" "$name.parts" "$@" --exit-interval 10 &&
            train "$ranks" "$name.second" "$name.parts" "$@" --load "$name.parts"
    }
}

# The same tensors in two lists of hashes, of which there are some.
same_hashes() { # WHAT LIST LIST
    local num_others
    num_others=$(diff <(echo "$2") <(echo "$3") | grep -c '^<')
    [ -n "$2" ] && [ "$num_others" = 0 ] || { echo "$1 in $num_others tensors"; return 1; }
}

# compare_bits NAME RANKS MODEL WORDS...: of initial weights, and after a stop.
compare_bits() {
    ! checks_start "${@:4}" ||
        same_hashes "other initial weights" "$(initial_weights "$1.start")" "$(initial_weights "reference.$3.start")" ||
        return 1
    [ ! -d "$1.parts" ] || same_hashes "resumed: other bits" "$(hashes "$1")" "$(hashes "$1.parts")"
}

# check NAME RANKS MODEL WORDS...: one line
check() {
    local name=$1 start=$SECONDS status=ok result
    result=$(train_mapping "$@" && compare_bits "$@")
    case $? in
    0) ;;
    2) status="-" ;;
    *) status=FAILED ;;
    esac
    printf '%-6s %s %-20s %2d ranks %4d s %s\n' $status $precision "$name" "$2" $((SECONDS - start)) "$result"
    case $status in
    ok) rm -rf "$name" "$name".* ;;
    FAILED) touch "failed.$name" ;;
    *) touch "untimed.$name" ;;
    esac
}

# The chosen lines of mappings.txt.
chosen_mappings() {
    local name ranks model words
    while read -r name ranks model words; do
        case "$name" in "" | "#"*) continue ;; esac
        [ -z "$only_ranks" ] || [ "$only_ranks" = "$ranks" ] || continue
        if [ "$selected" = " --all " ] || [[ $selected == *" $name "* ]] ||
            { [ "$selected" = " quick " ] && [[ " $words " == *" quick "* ]]; }; then
            echo "$name $ranks $model $words"
        fi
    done <"$source/tests/dist/mappings.txt"
}

# start COMMAND...: beside at most num_jobs - 1 others
start() {
    while [ "$(jobs -rp | wc -l)" -ge "$num_jobs" ]; do
        wait -n
    done
    "$@" </dev/null &
}

chosen_mappings >chosen
chosen_models=$(awk '{ print $3 }' chosen | sort -u)
if [ "$device" = cuda ]; then
    listing=1
    for model in $chosen_models; do
        train_reference "$model"
    done
    while read -r mapping; do
        train_mapping $mapping
    done <chosen
    listing=0
    for ranks in $( (echo 1; awk '{ print $2 }' chosen) | sort -nu); do
        make_runs "$ranks"
    done
fi
for model in $chosen_models; do
    start train_reference "$model"
done
wait
while read -r mapping; do
    start check $mapping
done <chosen
wait
num_run=$(wc -l <chosen)
num_failed=$(find . -maxdepth 1 -name 'failed.*' | wc -l)
num_untimed=$(find . -maxdepth 1 -name 'untimed.*' | wc -l)
echo "$num_run mappings in $precision, $num_failed failed$([ "$num_untimed" = 0 ] || echo ", $num_untimed without time")"
[ $((num_failed + num_untimed)) = 0 ] && [ "$num_run" -gt 0 ]
