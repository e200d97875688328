/* ops_profile.h - what each op of a stream took on the device, the gaps between them, and the
 * transfers to other ranks beside them. */
#ifndef CADRE_OPS_OPS_PROFILE_H
#define CADRE_OPS_OPS_PROFILE_H

#include <stdint.h>
#include <stdio.h>

#include "ops/op_cost.h"

/* From here to ops_profile_stop the stream's ops are timed, and named as ranges to a profiler of
 * the device's maker (NVTX); one stream at a time. Costs two marks an op. */
void ops_profile_start(struct stream *stream);
bool ops_profile_is_running(void);
/* Waits for the stream. The figures stay until the next start. */
void ops_profile_stop(struct stream *stream);
/* A line for each kind of op, the longest first: calls, milliseconds, share of the whole, rates,
 * and the share of the roof where one is given; then the time in no op. The same for transfers,
 * then for how long there were any, and how much of that was beside an op. */
void ops_profile_print(FILE *file, const struct op_roof *roof);
/* The ops one after the other, and each lane of transfers, for chrome://tracing or Perfetto. */
int ops_profile_write_trace(const char *path);

/* A collective or message, on a stream of its own. */
struct transfer {
    const char *name; /* lives on */
    char lane[56];    /* its stream's: the group */
    int64_t size_bytes;
};

/* Before and after the work is put on its stream, by any thread. begin returns NULL where nothing
 * is profiled, and then there is no end; the mark is end's. */
void *ops_profile_transfer_begin(const struct device *device, void *native);
void ops_profile_transfer_end(const struct device *device, void *native, void *begin_mark,
                              const struct transfer *transfer);

#endif
