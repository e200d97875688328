#!/bin/bash
# From nothing to a trained mixture of experts that writes English, on a CPU, in under ten minutes on two cores:
# installs what is missing, builds, takes Jane Austen's novels, trains a tokenizer and an 8-expert top-2 model, evaluates
# it, saves it, exports it in Hugging Face form and lets it write.
#
#   ./quickstart.sh [FOLDER]        everything it makes goes to FOLDER (default: quickstart)
set -euo pipefail
cd "$(dirname "$0")"

source=$PWD
folder=${1:-quickstart}
cadre=$source/build/cadre
# Threads that wait sleep instead of spinning: several times as fast where something else uses the cores too.
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive}

step() {
    printf '\n== %s\n' "$*"
}

# Shows the command as one would type it, then runs it.
show() {
    local word
    printf '$'
    for word in "${@//$source\//}"; do
        [[ $word != *" "* ]] || word="\"$word\""
        printf ' %s' "$word"
    done
    printf '\n'
    "$@"
}

# The package is only unpacked here, not installed: it would bring R along.
download_austen() {
    rm -f "$folder"/r-cran-janeaustenr_*.deb
    (cd "$folder" && apt-get download -qq r-cran-janeaustenr 2>/dev/null) ||
        (scripts/as_root.sh apt-get update -qq && cd "$folder" && apt-get download -qq r-cran-janeaustenr)
    dpkg -x "$folder"/r-cran-janeaustenr_*.deb "$folder/janeaustenr"
    scripts/austen_corpus.pl "$folder/janeaustenr/usr/lib/R/site-library/janeaustenr/data/Rdata.rdb" \
        "$folder/austen.jsonl" "$folder/austen.txt"
}

step "Packages"
scripts/install_dependencies.sh build corpus

step "Build"
cmake --preset release >/dev/null
cmake --build --preset release --target cadre

mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

step "Corpus: the novels of Jane Austen"
[ -s "$folder/austen.jsonl" ] || download_austen

step "Tokenizer: 2048 pieces"
# Newlines stay (identity, no whitespace removed): they end the paragraphs.
spm_train --input="$folder/austen.txt" --model_prefix="$folder/tokenizer" --vocab_size=2048 --model_type=bpe \
    --byte_fallback=true --character_coverage=1.0 --normalization_rule_name=identity --max_sentence_length=100000 \
    --minloglevel=1 >/dev/null

step "Data set"
show "$cadre" preprocess --input "$folder/austen.jsonl" --output-prefix "$folder/austen" \
    --tokenizer-type Llama2Tokenizer --tokenizer-model "$folder/tokenizer.model" --append-eod --workers 2

step "Training"
rm -rf "$folder/checkpoint"
show "$cadre" pretrain \
    --num-layers 4 --hidden-size 192 --ffn-hidden-size 384 --num-attention-heads 6 \
    --group-query-attention --num-query-groups 2 --seq-length 256 --max-position-embeddings 256 \
    --normalization RMSNorm --position-embedding-type rope --swiglu --disable-bias-linear \
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0 --init-method-std 0.03 \
    --num-experts 8 --moe-router-topk 2 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2 \
    --moe-grouped-gemm \
    --tokenizer-type Llama2Tokenizer --tokenizer-model "$folder/tokenizer.model" \
    --data-path "$folder/austen_text_document" --split 94,3,3 \
    --micro-batch-size 8 --global-batch-size 8 --train-iters 900 \
    --lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-iters 30 --weight-decay 0.1 --clip-grad 1.0 \
    --adam-beta2 0.95 --log-interval 20 --eval-interval 300 --eval-iters 8 \
    --save "$folder/checkpoint" --save-interval 450 --tensorboard-dir "$folder/tensorboard"

step "Export in Hugging Face form"
rm -rf "$folder/huggingface"
show "$cadre" convert --from "$folder/checkpoint" --to "$folder/huggingface"

step "Sample"
show "$cadre" generate --load "$folder/checkpoint" --prompt "It is a truth universally acknowledged, that" \
    --num-tokens 150 --temperature 0.8 --top-k 50 --seed 1

cat <<EOT

== Done in $((SECONDS / 60)) min $((SECONDS % 60)) s. In $folder:
checkpoint    build/cadre inspect $folder/checkpoint
huggingface   AutoModelForCausalLM.from_pretrained("$folder/huggingface")
tensorboard   tensorboard --logdir $folder/tensorboard
EOT
