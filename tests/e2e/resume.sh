# 20 iterations, and 10, a new process, and 10 more, give the same bits in every weight and every optimizer tensor.
. "$SOURCE/tests/e2e/lib/expect.sh"
. "$SOURCE/tests/e2e/lib/tiny_run.sh"
make_tiny_data

for precision in "" --bf16; do
    rm -rf whole parts
    tiny_pretrain $precision --train-iters 20 --save whole >/dev/null
    logged_losses pretrain.log | tail -n 10 >whole.losses
    checkpoint_hashes whole >whole.hashes

    tiny_pretrain $precision --train-iters 20 --exit-interval 10 --save parts >/dev/null
    [ "$(cat parts/latest_checkpointed_iteration.txt)" = 10 ] || fail "no checkpoint of iteration 10"
    tiny_pretrain $precision --train-iters 20 --load parts --save parts >/dev/null
    logged_losses pretrain.log >parts.losses
    checkpoint_hashes parts >parts.hashes

    expect_same whole.losses parts.losses "losses ${precision:-fp32}"
    expect_same whole.hashes parts.hashes "checkpoints ${precision:-fp32}"
    grep -q exp_avg_sq whole.hashes || fail "no optimizer tensors among the hashes"
done
