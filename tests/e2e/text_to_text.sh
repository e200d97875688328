# From a text to a model that continues it: tokenizer, data set, training with a falling loss, evaluation, export, sample.
. "$SOURCE/tests/e2e/lib/expect.sh"
. "$SOURCE/tests/e2e/lib/tiny_run.sh"

awk 'BEGIN {
    split("cat dog bird fish fox", who); split("sees likes hears finds", does); split("red old small quiet", how);
    for (line = 0; line < 4000; line++)
        printf "{\"text\": \"The %s %s the %s %s.\\n\"}\n", who[line % 5 + 1], does[line % 4 + 1],
            how[int(line / 3) % 4 + 1], who[int(line / 7) % 5 + 1];
}' >pets.jsonl
sed 's/{"text": "//; s/\\n"}//' pets.jsonl >pets.txt
spm_train --input=pets.txt --model_prefix=pets --vocab_size=300 --model_type=bpe --byte_fallback=true \
    --normalization_rule_name=identity --hard_vocab_limit=false --minloglevel=1 >/dev/null
tokenizer=(--tokenizer-type Llama2Tokenizer --tokenizer-model pets.model)

"$CADRE" preprocess --input pets.jsonl --output-prefix pets "${tokenizer[@]}" --append-eod --workers 2 >/dev/null
"$CADRE" pretrain "${tiny_model[@]}" "${tiny_training[@]}" "${tokenizer[@]}" --data-path pets_text_document \
    --split 90,5,5 --attention-dropout 0 --hidden-dropout 0 --lr 1e-2 --lr-decay-iters 150 --train-iters 150 \
    --save model --tensorboard-dir tb >pretrain.log 2>&1
logged_losses pretrain.log | awk '
    NR == 1 { first = $1 } { last = $1 }
    END { if (NR != 150 || last > first / 3) { print "loss " first " to " last " in " NR " iterations"; exit 1 } }' ||
    fail "the loss does not fall"
expect_text "on validation set" pretrain.log
expect_text "on test set" pretrain.log
ls tb/events.out.tfevents.* >/dev/null

"$CADRE" convert --from model --to hf >/dev/null
for form in model hf; do
    "$CADRE" generate --load $form --prompt "The cat" --num-tokens 14 --temperature 0.5 --top-k 5 --seed 3 \
        "${tokenizer[@]}" >$form.txt
    grep -qE '^ ?The cat (sees|likes|hears|finds) the (red|old|small|quiet)' $form.txt ||
        fail "$form writes: $(cat $form.txt)"
done
expect_same model.txt hf.txt "samples of the two forms"
