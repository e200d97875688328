# What the program says about itself agrees with what is written down.
. "$SOURCE/tests/e2e/lib/expect.sh"

"$CADRE" docs markdown >flags.md
expect_same "$SOURCE/docs/flags.md" flags.md "docs/flags.md (made by: cadre docs markdown)"

for command in preprocess pretrain convert logits generate inspect bench; do
    "$CADRE" $command --help >help.txt
    expect_text "--" help.txt
    expect_text "cadre $command" "$SOURCE/README.md"
done

# Every page the README and the docs link to is there.
for page in "$SOURCE"/README.md "$SOURCE"/docs/*.md; do
    { grep -oE '\]\([^)#:]+\)' "$page" || true; } | tr -d '()]' | while read -r target; do
        [ -e "$(dirname "$page")/$target" ] || fail "$page links to $target, which is not there"
    done
done
