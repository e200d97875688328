#!/usr/bin/env python3
"""Loads a directory that `cadre convert` exported in transformers, beside the model it was imported from.

    scripts/check_hf_export.py EXPORTED ORIGINAL

Every tensor must load, be the same bits in both, and give the same logits on random tokens.
Needs torch and transformers; run by hand where they are installed.
"""
import sys

import torch
from transformers import AutoModelForCausalLM


def load(directory):
    model, info = AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    wrong = {key: names for key, names in info.items() if names}
    if wrong:
        sys.exit(f"{directory}: {wrong}")
    return model


exported, original = (load(directory) for directory in sys.argv[1:])
tensors, expected = exported.state_dict(), original.state_dict()
different = [name for name in expected if name not in tensors or not torch.equal(tensors[name], expected[name])]
if different or len(tensors) != len(expected):
    sys.exit(f"tensors differ: {different}")
tokens = torch.randint(exported.config.vocab_size, (2, 32), generator=torch.Generator().manual_seed(1))
with torch.no_grad():
    worst = (exported(tokens).logits - original(tokens).logits).abs().max().item()
print(f"{sys.argv[1]}: {len(tensors)} tensors, the same bits; worst logit difference {worst:.3g}")
sys.exit(0 if worst == 0 else 1)
