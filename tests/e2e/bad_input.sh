# What a user can get wrong gives one clear line and a non-zero status; nothing is ignored or half done.
. "$SOURCE/tests/e2e/lib/expect.sh"
. "$SOURCE/tests/e2e/lib/tiny_run.sh"
make_tiny_data

expect_error "did you mean" "$CADRE" pretrain --num-expert 4
expect_error "unknown command pretrian" "$CADRE" pretrian
expect_error "--moe-expert-capacity-factor" "$CADRE" pretrain --moe-token-capacity-factor 1.0
expect_error "world size (1) is not divisible" tiny_pretrain --train-iters 1 --tensor-model-parallel-size 2
expect_error "--num-attention-heads" tiny_pretrain --train-iters 1 --num-attention-heads 5
expect_error "no_such_document" tiny_pretrain --train-iters 1 --data-path no_such_document
expect_error "nowhere" tiny_pretrain --train-iters 1 --load nowhere --exit-on-missing-checkpoint

# A token outside the vocabulary names the data set.
expect_error "tiny_text_document" tiny_pretrain --train-iters 1 --vocab-size 64 --make-vocab-size-divisible-by 1

# A damaged checkpoint is named and the one before it offered; the damaged one is never used.
tiny_pretrain --train-iters 4 --save-interval 2 --save model >/dev/null
shard=$(ls model/iter_0000004/*.safetensors | head -n 1)
printf 'x' | dd of="$shard" bs=1 seek=$(($(stat -c %s "$shard") / 2)) conv=notrunc status=none
expect_error "$(basename "$shard")" tiny_pretrain --train-iters 6 --load model
expect_text "iter_0000002" error.out
tiny_pretrain --train-iters 4 --load model --ckpt-step 2 >/dev/null
expect_text "iteration        3/" pretrain.log
