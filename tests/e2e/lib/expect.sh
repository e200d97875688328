# What end-to-end tests assert (sourced). Each says what was wrong and fails.

fail() {
    echo "FAILED: $*" >&2
    exit 1
}

# expect_error TEXT COMMAND...: the command fails by itself (not by a signal), with one line that contains TEXT.
expect_error() {
    local text=$1 status=0
    shift
    "$@" >error.out 2>&1 || status=$?
    [ $status != 0 ] || fail "succeeded, but should say '$text': $*"
    [ $status -lt 128 ] || fail "died with status $status: $*: $(cat error.out)"
    grep -qF -- "$text" error.out || fail "should say '$text', but says: $(cat error.out)"
}

# expect_same FILE FILE WHAT: byte for byte, and not empty.
expect_same() {
    [ -s "$1" ] || fail "$3: $1 is empty"
    cmp "$1" "$2" >&2 || { diff "$1" "$2" | head -n 10 >&2; fail "$3: $1 and $2 differ"; }
}

# expect_text TEXT FILE
expect_text() {
    grep -qF -- "$1" "$2" || fail "'$1' is not in $2: $(tail -n 20 "$2")"
}
