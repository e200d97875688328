# The same command twice gives the same bits, with one thread and with two as well; another seed gives others.
. "$SOURCE/tests/e2e/lib/expect.sh"
. "$SOURCE/tests/e2e/lib/tiny_run.sh"
make_tiny_data

run() {
    rm -rf "$1"
    tiny_pretrain --train-iters 6 --save "$@" >/dev/null
    checkpoint_hashes "$1" >"$1.hashes"
}

for precision in "" --bf16; do
    run first $precision --num-threads 2
    run second $precision --num-threads 2
    run one_thread $precision --num-threads 1
    run other_seed $precision --seed 7
    expect_same first.hashes second.hashes "twice ${precision:-fp32}"
    expect_same first.hashes one_thread.hashes "two threads and one ${precision:-fp32}"
    ! cmp -s first.hashes other_seed.hashes || fail "the seed changes nothing"
done
