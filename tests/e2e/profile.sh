# --profile times the ops of the steps asked for and changes nothing else.
. "$SOURCE/tests/e2e/lib/expect.sh"
. "$SOURCE/tests/e2e/lib/tiny_run.sh"
make_tiny_data

tiny_pretrain --train-iters 4 >/dev/null
logged_losses pretrain.log >plain.losses
tiny_pretrain --train-iters 4 --profile --profile-step-start 1 --profile-step-end 3 >/dev/null
logged_losses pretrain.log >profiled.losses
expect_same plain.losses profiled.losses "losses with and without --profile"
expect_text "attention_backward" pretrain.log
expect_text "in no op" pretrain.log
expect_text '"name":"adam_step"' profile-steps-2-3.json

# A run that ends before the last step writes what it has.
tiny_pretrain --train-iters 2 --profile --profile-step-start 1 --profile-step-end 30 >/dev/null
expect_text '"name":"matmul"' profile-steps-2-2.json

expect_error "--profile-step-end 3 must be above --profile-step-start 3" \
    "$CADRE" pretrain "${tiny_model[@]}" "${tiny_data[@]}" "${tiny_training[@]}" --train-iters 4 \
    --profile --profile-step-start 3 --profile-step-end 3
