#!/usr/bin/env python3
"""Reads event files with TensorBoard's own loader and says what is in them.

usage: check_tensorboard.py DIR [TAG...]      (pip install tensorboard)

Prints a line a tag: kind, number of events, first and last step, last value. The checksum of every
record is verified. Exits 1 if there is no event file, a record is damaged, or a TAG is missing.
"""
import glob
import os
import sys

from tensorboard.backend.event_processing import event_file_loader
from tensorboard.compat.tensorflow_stub import pywrap_tensorflow
from tensorboard.util import tensor_util


def count_checked_records(path):
    """The number of records; raises on a wrong checksum, which the event loader would skip over."""
    reader = pywrap_tensorflow.PyRecordReader_New(path)
    count = 0
    while True:
        try:
            reader.GetNext()
        except pywrap_tensorflow.errors.OutOfRangeError:
            return count
        count += 1


def main(directory, wanted_tags):
    paths = sorted(glob.glob(os.path.join(directory, "*tfevents*")))
    series = {}
    for path in paths:
        num_records = count_checked_records(path)
        events = list(event_file_loader.EventFileLoader(path).Load())
        if not events or events[0].file_version != "brain.Event:2" or len(events) != num_records:
            sys.exit(f"{path}: {len(events)} events of {num_records} records, "
                     f"version {events[0].file_version if events else None!r}")
        for event in events:
            for value in event.summary.value:
                plugin = value.metadata.plugin_data.plugin_name
                content = tensor_util.make_ndarray(value.tensor).ravel()[0]
                series.setdefault((value.tag, plugin), []).append((event.step, content))
    for (tag, plugin), points in series.items():
        print(f"{plugin or '-':8} {tag!r}: {len(points)} events, steps {points[0][0]}.."
              f"{points[-1][0]}, last {points[-1][1]!r}")
    missing = set(wanted_tags) - {tag for tag, _ in series}
    if not paths or missing:
        sys.exit(f"{directory}: {len(paths)} event files, missing tags {sorted(missing)}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2:])
