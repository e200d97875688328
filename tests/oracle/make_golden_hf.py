#!/usr/bin/env python3
"""Writes a directory for oracle_hf: a random Mixtral and golden.safetensors (needs torch, transformers).

    make_golden_hf.py DIR [--set key=value ...] [--batch B] [--length S] [--steps N] [--seed I] [--bf16]

--set changes a key of the Mixtral configuration. --bf16 stores the weights in bf16 and computes with
what transformers loads from them in float32.
"""
import argparse
import ast
import json
import re

import torch
from safetensors.torch import load_file, save_file
from transformers import MixtralConfig, MixtralForCausalLM

SMALL = dict(vocab_size=131, hidden_size=48, intermediate_size=40, num_hidden_layers=2,
             num_attention_heads=4, num_key_value_heads=2, num_local_experts=4,
             num_experts_per_tok=2, max_position_embeddings=64, sliding_window=None,
             use_cache=False, attn_implementation="eager", experts_implementation="eager",
             rope_parameters={"rope_type": "default", "rope_theta": 10000.0})


def parse():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory")
    parser.add_argument("--set", nargs="*", default=[])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=12)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--bf16", action="store_true")
    return parser.parse_args()


def per_expert(name, tensor):
    """transformers 5 fuses the experts in memory; on disk there is a tensor an expert."""
    found = re.match(r"(.*)\.mlp\.experts\.(gate_up_proj|down_proj)$", name)
    if not found:
        return {name.replace(".mlp.gate.weight", ".block_sparse_moe.gate.weight"): tensor}
    parts = {}
    for e, one in enumerate(tensor):
        stem = f"{found[1]}.block_sparse_moe.experts.{e}"
        if found[2] == "down_proj":
            parts[f"{stem}.w2.weight"] = one
        else:
            parts[f"{stem}.w1.weight"], parts[f"{stem}.w3.weight"] = one.chunk(2)
    return {key: value.contiguous().clone() for key, value in parts.items()}


def on_disk(named, prefix):
    result = {}
    for name, tensor in named:
        for key, value in per_expert(name, tensor.detach()).items():
            result[f"{prefix}{key}"] = value.contiguous().clone()
    return result


def mean_loss(model, tokens):
    logits = model(input_ids=tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()), logits


def one_batch(model, tokens, golden):
    inputs = tokens[:, :-1]
    output = model(input_ids=inputs, output_router_logits=True)
    loss, _ = mean_loss(model, tokens)
    loss.backward()
    golden.update({"tokens": tokens, "logits": output.logits.detach(), "loss": loss.detach()})
    for layer, logits in enumerate(output.router_logits):
        golden[f"router_logits.{layer}"] = logits.detach()
    golden.update(on_disk(((n, p.grad) for n, p in model.named_parameters()), "grad."))


def train(model, batches, golden):
    groups = [{"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
              {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-8)
    losses, norms = [], []
    for tokens in batches:
        optimizer.zero_grad()
        loss, _ = mean_loss(model, tokens)
        loss.backward()
        norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).detach())
        losses.append(loss.detach())
        optimizer.step()
    golden.update({"train.tokens": batches, "train.loss": torch.stack(losses),
                   "train.grad_norm": torch.stack(norms)})
    golden.update(on_disk(model.named_parameters(), "final."))


def main():
    args = parse()
    torch.manual_seed(args.seed)
    settings = dict(SMALL)
    for item in args.set:
        key, value = item.split("=", 1)
        settings[key] = ast.literal_eval(value)
    model = MixtralForCausalLM(MixtralConfig(**settings)).float()
    for parameter in model.parameters(): # larger than the usual start, so that routing is decided
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.15)
    if args.bf16:
        model = model.to(torch.bfloat16)
    model.save_pretrained(args.directory)
    model = MixtralForCausalLM.from_pretrained(args.directory, dtype=torch.float32,
                                               attn_implementation="eager",
                                               experts_implementation="eager")
    vocab_size, shape = model.config.vocab_size, (args.batch, args.length + 1)
    golden = {}
    one_batch(model, torch.randint(vocab_size, shape), golden)
    train(model, torch.randint(vocab_size, (args.steps, *shape)), golden)
    save_file({k: v.contiguous() for k, v in golden.items()},
              f"{args.directory}/golden.safetensors")


if __name__ == "__main__":
    main()
