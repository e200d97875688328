# Training that saves in every iteration is killed again and again; each time the next run goes on from a complete
# checkpoint. Damage and a full disk are errors that name the file, and lose nothing.
. "$SOURCE/tests/e2e/lib/expect.sh"
. "$SOURCE/tests/e2e/lib/tiny_run.sh"
make_tiny_data

many=(--train-iters 1000000 --lr-decay-iters 1000000 --save-interval 1 --save model)

saved_iteration() {
    cat "$1/latest_checkpointed_iteration.txt"
}

tiny_pretrain --train-iters 1 --lr-decay-iters 1000000 --save model >/dev/null
previous=$(saved_iteration model)
for round in 1 2 3 4 5 6 7 8; do
    "$CADRE" pretrain "${tiny_model[@]}" "${tiny_data[@]}" "${tiny_training[@]}" "${many[@]}" --load model \
        >killed.log 2>&1 &
    process=$!
    for _ in $(seq 200); do
        [ "$(saved_iteration model)" -lt $((previous + 2)) ] || break
        sleep 0.05
    done
    sleep 0.0$((round * 7 % 10))
    kill -KILL $process
    ! { wait $process; } 2>/dev/null || fail "the killed run ended well: $(tail -n 3 killed.log)"
    "$CADRE" inspect model >inspect.log || fail "after kill $round no checkpoint loads"
    now=$(saved_iteration model)
    [ "$now" -ge $((previous + 2)) ] || fail "iteration $now after $previous: $(tail -n 3 killed.log)"
    previous=$now
    # Disk space: only the newest two are needed from here on.
    ls -d model/iter_???????  | head -n -2 | xargs rm -rf
done

# A clean run clears what the killed ones left.
tiny_pretrain --lr-decay-iters 1000000 --train-iters $((previous + 1)) --load model --save model >/dev/null
[ -z "$(ls model | grep tmp)" ] || fail "left over: $(ls model)"

# One flipped byte: named, and the previous checkpoint offered.
newest=model/iter_$(printf %07d $((previous + 1)))
shard=shard-00001-model-00001-of-00001.safetensors
printf 'X' | dd of="$newest/$shard" bs=1 seek=5000 conv=notrunc status=none
expect_error "$shard" tiny_pretrain --lr-decay-iters 1000000 --train-iters $((previous + 2)) --load model
expect_text "is damaged" error.out
expect_text "--ckpt-step" error.out

# A full disk, where this user may mount a small one.
mkdir disk
if mount -t tmpfs -o size=2m none disk 2>/dev/null; then
    trap 'umount disk' EXIT
    tiny_pretrain --train-iters 1 --save disk/model >/dev/null
    head -c 8m /dev/zero >disk/filler 2>/dev/null || true
    expect_error "No space left on device" tiny_pretrain --train-iters 2 --load disk/model --save disk/model
    rm disk/filler
    "$CADRE" inspect disk/model >inspect.log || fail "the full disk lost the checkpoint"
    expect_text "iteration 1" inspect.log
fi
