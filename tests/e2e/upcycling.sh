# A dense checkpoint becomes a mixture of experts that computes what the dense model computes, trains on, and is not
# buried by a second upcycling.
. "$SOURCE/tests/e2e/lib/expect.sh"
. "$SOURCE/tests/e2e/lib/tiny_run.sh"
make_tiny_data

test_loss() {
    sed -n 's/.* on test set | lm loss value: \([^ ]*\) .*/\1/p' "$1"
}

# expect_near LOSS LOSS TOLERANCE WHAT
expect_near() {
    awk -v a="$1" -v b="$2" -v t="$3" 'BEGIN { d = a - b; exit !(a > 0 && b > 0 && d < t && d > -t) }' ||
        fail "$4: loss $1, of the dense model $2"
}

upcycle() {
    tiny_pretrain --train-iters 20 --load dense --save "$1" --moe-use-upcycling --skip-train "${@:2}" >/dev/null
}

tiny_pretrain --train-iters 20 --num-experts 0 --moe-aux-loss-coeff 0 --save dense >/dev/null
dense=$(test_loss pretrain.log)

# A token's probabilities sum to 1 and all experts are copies: equal but for rounding.
upcycle plain --num-experts 4
expect_near "$(test_loss pretrain.log)" "$dense" 2e-5 "plain upcycling"

# Halves of the dense block, both of them chosen for every token. Squared ReLU is homogeneous, so that the scale of the
# weights is exact (with SwiGLU it is not).
swiglu_model=("${tiny_model[@]}")
tiny_model=("${tiny_model[@]/--swiglu/--squared-relu}")
tiny_pretrain --train-iters 20 --num-experts 0 --moe-aux-loss-coeff 0 --save dense_relu >/dev/null
dense=$(test_loss pretrain.log)
tiny_pretrain --train-iters 20 --load dense_relu --save granular --moe-use-upcycling --skip-train --num-experts 8 \
    --moe-upcycling-granularity 2 --moe-ffn-hidden-size 24 >/dev/null
expect_near "$(test_loss pretrain.log)" "$dense" 2e-5 "granular upcycling"
tiny_model=("${swiglu_model[@]}")

upcycle again --num-experts 4
checkpoint_hashes plain >plain.hashes
checkpoint_hashes again >again.hashes
expect_same plain.hashes again.hashes "upcycling twice"

tiny_pretrain --train-iters 5 --load plain --save plain >/dev/null
[ "$(cat plain/latest_checkpointed_iteration.txt)" = 5 ] || fail "the upcycled model does not train on"
expect_error "--save plain holds a checkpoint already" "$CADRE" pretrain "${tiny_model[@]}" "${tiny_data[@]}" \
    "${tiny_training[@]}" --train-iters 20 --load dense --save plain --moe-use-upcycling
[ "$(cat plain/latest_checkpointed_iteration.txt)" = 5 ] || fail "the second upcycling buried the first"
expect_error "wants a dense checkpoint" "$CADRE" pretrain "${tiny_model[@]}" "${tiny_data[@]}" "${tiny_training[@]}" \
    --train-iters 20 --load plain --save other --moe-use-upcycling
