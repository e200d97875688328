#!/usr/bin/env python3
"""Reads the weights of a cadre checkpoint with PyTorch's own distributed-checkpoint reader.

    scripts/check_checkpoint_pytorch.py DIR/iter_0000020

Every tensor must have the global shape and the values that its shards, put together by hand, give.
Needs torch and safetensors; run by hand where they are installed.
"""
import glob
import json
import sys

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader


def assemble(directory):
    """The whole tensors, from the shards' own metadata."""
    tensors = {}
    for path in sorted(glob.glob(f"{directory}/*.safetensors")):
        with safe_open(path, "pt") as shard:
            metadata = shard.metadata()
            offsets = json.loads(metadata["DCP_SHARDING_INFO"])
            shapes = json.loads(metadata["x_global_shape"])
            for name in shard.keys():
                part = shard.get_tensor(name)
                whole = tensors.setdefault(name, torch.full(shapes[name], float("nan"), dtype=part.dtype))
                box = tuple(slice(o, o + n) for o, n in zip(offsets[name]["saved_offsets"], part.shape))
                whole[box] = part
    return tensors


directory = sys.argv[1]
expected = assemble(directory)
reader = HuggingFaceStorageReader(path=directory)
state = {
    name: torch.zeros(entry.size, dtype=entry.properties.dtype)
    for name, entry in reader.read_metadata().state_dict_metadata.items()
}
dcp.load(state, storage_reader=HuggingFaceStorageReader(path=directory), no_dist=True)
if set(state) != set(expected):
    sys.exit(f"{directory}: PyTorch sees other names: {set(state) ^ set(expected)}")
for name, tensor in state.items():
    if tensor.shape != expected[name].shape or not torch.equal(tensor, expected[name]):
        sys.exit(f"{directory}: {name} differs")
print(f"{directory}: PyTorch reads {len(state)} tensors, the same bits")
