# SIGTERM with --exit-signal-handler: the iteration ends, a checkpoint is saved, and the next run goes on from it.
. "$SOURCE/tests/e2e/lib/expect.sh"
. "$SOURCE/tests/e2e/lib/tiny_run.sh"
make_tiny_data

"$CADRE" pretrain "${tiny_model[@]}" "${tiny_data[@]}" "${tiny_training[@]}" --lr-decay-iters 1000000 \
    --train-iters 1000000 --exit-signal-handler --save model >long.log 2>&1 &
process=$!
for _ in $(seq 300); do
    ! grep -q 'iteration        3/' long.log || break
    sleep 0.1
done
kill -TERM $process
wait $process || fail "status $? after SIGTERM: $(tail -n 3 long.log)"
expect_text "exiting program after receiving SIGTERM." long.log
iteration=$(cat model/latest_checkpointed_iteration.txt)
tiny_pretrain --lr-decay-iters 1000000 --train-iters $((iteration + 1)) --load model >/dev/null
expect_text "$(printf 'iteration %8d/' $((iteration + 1)))" pretrain.log
