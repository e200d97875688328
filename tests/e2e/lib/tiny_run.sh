# A small model and data set for end-to-end tests (sourced): make_tiny_data, then tiny_pretrain FLAGS...
# Sizes are odd on purpose: 3 layers, dense and MoE, grouped-query attention, dropout on.

# Documents of numbers, which NullTokenizer takes for tokens: each counts on from a start by a step of its own, so that
# there is something to learn. Writes ./tiny_text_document.bin and .idx.
make_tiny_data() {
    awk 'BEGIN {
        for (document = 0; document < 300; document++) {
            line = "";
            for (i = 0; i < 40 + document % 60; i++)
                line = line " " (document * 7 + i * (1 + document % 3)) % 126;
            printf "{\"text\": \"%s\"}\n", substr(line, 2);
        }
    }' >tiny.jsonl
    "$CADRE" preprocess --input tiny.jsonl --output-prefix tiny --tokenizer-type NullTokenizer --vocab-size 128 \
        --append-eod --workers 2 >preprocess.log
}

tiny_model=(
    --num-layers 3 --hidden-size 32 --ffn-hidden-size 48 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --seq-length 24 --max-position-embeddings 24 --normalization RMSNorm
    --position-embedding-type rope --swiglu --disable-bias-linear --untie-embeddings-and-output-weights
    --num-experts 4 --moe-router-topk 2 --moe-aux-loss-coeff 1e-2 --moe-z-loss-coeff 1e-3
    --attention-dropout 0.1 --hidden-dropout 0.1
)
tiny_data=(
    --tokenizer-type NullTokenizer --vocab-size 128 --data-path tiny_text_document --split 90,5,5
)
tiny_training=(
    --micro-batch-size 2 --global-batch-size 4 --lr 3e-3 --min-lr 1e-4 --lr-decay-style cosine --lr-decay-iters 20
    --lr-warmup-iters 2 --clip-grad 1.0 --log-interval 1 --eval-interval 100 --eval-iters 1 --save-interval 1000
)

# What it prints is also in ./pretrain.log. Flags given here win over those above.
tiny_pretrain() {
    "$CADRE" pretrain "${tiny_model[@]}" "${tiny_data[@]}" "${tiny_training[@]}" "$@" 2>&1 | tee pretrain.log
}

# The hashes of every weight and optimizer tensor of a checkpoint.
checkpoint_hashes() {
    "$CADRE" inspect "$1" --hash | grep -E ' [0-9a-f]{32}$'
}

# "lm loss" of the iteration lines in a log, one a line.
logged_losses() {
    sed -n 's/.* lm loss: \([^ ]*\) .*/\1/p' "$1"
}
