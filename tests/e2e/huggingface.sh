# Hugging Face -> cadre -> Hugging Face gives back the same tensors, and both forms compute the same logits.
. "$SOURCE/tests/e2e/lib/expect.sh"

hashes() {
    "$CADRE" inspect "$1" --hash | grep -E ' [0-9a-f]{32}$' | sort
}

for model in mixtral-tiny mixtral-tiny-sharded; do
    rm -rf hf cadre
    # golden.safetensors lies beside the model's own files in the fixture and is none of its weights.
    mkdir hf && cp "$FIXTURES/$model"/* hf/ && mv hf/golden.safetensors .
    "$CADRE" convert --from hf --to cadre
    "$CADRE" convert --from cadre --to again
    hashes hf >hf.hashes
    hashes again >again.hashes
    expect_same hf.hashes again.hashes "$model"

    "$CADRE" logits --load hf --tokens golden.safetensors --out hf.logits
    "$CADRE" logits --load cadre --tokens golden.safetensors --out cadre.logits
    expect_same hf.logits cadre.logits "$model logits"
    rm -rf again
done
