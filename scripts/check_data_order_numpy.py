#!/usr/bin/env python3
"""Checks the order of training samples against numpy's own generator.

    scripts/check_data_order_numpy.py build/tests/oracle_data_order [--documents 10000000]

Writes data sets of 1 document up to --documents, lets cadre compute document, sample and shuffle
index, computes them here with numpy.random.RandomState, and compares every entry. Needs numpy.
"""
import argparse
import glob
import os
import subprocess
import sys
import tempfile

import numpy


def write_data_set(prefix, lengths):
    """lengths: tokens of each document. The tokens themselves do not matter for the order."""
    count = len(lengths)
    pointers = numpy.zeros(count, dtype=numpy.int64)
    numpy.cumsum(2 * lengths[:-1].astype(numpy.int64), out=pointers[1:])
    with open(prefix + ".idx", "wb") as file:
        file.write(b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + bytes([8]))
        file.write(count.to_bytes(8, "little") + (count + 1).to_bytes(8, "little"))
        file.write(lengths.astype(numpy.int32).tobytes() + pointers.tobytes())
        file.write(numpy.arange(count + 1, dtype=numpy.int64).tobytes())
    with open(prefix + ".bin", "wb") as file:
        file.truncate(2 * int(lengths.sum(dtype=numpy.int64)))


def expected_order(lengths, first, end, seq_length, samples, seed):
    """Document, sample and shuffle index of the sequences [first, end)."""
    tokens = int(lengths[first:end].sum(dtype=numpy.int64))
    epochs = max(1, -(-(samples * seq_length + 1) // tokens))
    total = (epochs * tokens - 1) // seq_length
    before_last = ((epochs - 1) * tokens - 1) // seq_length
    apart = epochs > 1 and samples - before_last < int(0.80 * ((tokens - 1) // seq_length))
    random = numpy.random.RandomState(seed)

    def shuffled(items):
        random.shuffle(items)
        return items

    one_epoch = numpy.arange(first, end, dtype=numpy.int32)
    if apart:
        documents = numpy.concatenate(
            [shuffled(numpy.tile(one_epoch, epochs - 1)), shuffled(one_epoch)])
    else:
        documents = shuffled(numpy.tile(one_epoch, epochs))
    ends = numpy.cumsum(lengths[documents], dtype=numpy.int64)
    starts = numpy.arange(total + 1, dtype=numpy.int64) * seq_length
    entry = numpy.searchsorted(ends, starts, side="right")
    offset = starts - numpy.where(entry > 0, ends[entry - 1], 0)
    entry[0] = offset[0] = 0
    cut = before_last if apart else total
    shuffle = numpy.concatenate([shuffled(numpy.arange(0, cut, dtype=numpy.uint32)),
                                 shuffled(numpy.arange(cut, total, dtype=numpy.uint32))])
    return documents, numpy.stack([entry, offset], axis=1), shuffle


def check(oracle, folder, documents, seq_length, split, seed, samples):
    lengths = numpy.random.RandomState(documents % 1000).randint(0, 60, documents)
    lengths[0] = max(lengths[0], 2)
    prefix = os.path.join(folder, "set")
    cache = os.path.join(folder, f"cache-{documents}-{seed}-{samples[0]}")
    write_data_set(prefix, lengths)
    subprocess.run([oracle, prefix, cache, str(seq_length), split, str(seed)] +
                   [str(count) for count in samples], check=True)
    shares = numpy.array([float(share) for share in split.split(",")])
    bounds = numpy.concatenate([[0.0], numpy.cumsum(shares / shares.sum())])
    for which, name in enumerate(["train", "valid", "test"]):
        if samples[which] == 0 or shares[which] == 0:
            continue
        first, end = (int(round(bound * documents)) for bound in bounds[which:which + 2])
        expected = expected_order(lengths, first, end, seq_length, samples[which], seed)
        for array, values in zip(["document_index", "sample_index", "shuffle_index"], expected):
            path, = glob.glob(os.path.join(cache, f"*-{name}-{array}.npy"))
            found = numpy.load(path, mmap_mode="r")
            if not numpy.array_equal(found, values):
                sys.exit(f"FAIL {documents} documents, seed {seed}: {name} {array} differs")
    print(f"ok {documents} documents, seed {seed}, {samples} samples of {seq_length} tokens")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("oracle", help="path of oracle_data_order")
    parser.add_argument("--documents", type=int, default=10_000_000, help="largest data set")
    arguments = parser.parse_args()
    documents = 1
    while documents <= arguments.documents:
        with tempfile.TemporaryDirectory() as folder:
            check(arguments.oracle, folder, documents, 1, "1", 1234, [1, 0, 0])
            check(arguments.oracle, folder, documents, 7, "1", 5, [documents * 9 + 3, 0, 0])
            if documents >= 1000:
                check(arguments.oracle, folder, documents, 32, "969,30,1", 4294967295,
                      [documents * 2, 50, 20])
                check(arguments.oracle, folder, documents, 16, "90,0,10", 0, [documents, 5, 400])
        documents *= 10


if __name__ == "__main__":
    main()
