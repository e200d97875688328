/* ops_profile.h - what each op of a stream took on the device, and the gaps between them. */
#ifndef CADRE_OPS_OPS_PROFILE_H
#define CADRE_OPS_OPS_PROFILE_H

#include <stdio.h>

#include "ops/op_cost.h"

/* From here to ops_profile_stop the stream's ops are timed, and named as ranges to a profiler of
 * the device's maker (NVTX); one stream at a time. Costs two marks an op. */
void ops_profile_start(struct stream *stream);
bool ops_profile_is_running(void);
/* Waits for the stream. The figures stay until the next start. */
void ops_profile_stop(struct stream *stream);
/* A line for each kind of op, the longest first: calls, milliseconds, share of the whole, rates,
 * and the share of the roof where one is given; then the time in no op. */
void ops_profile_print(FILE *file, const struct op_roof *roof);
/* The ops one after the other, for chrome://tracing or Perfetto. */
int ops_profile_write_trace(const char *path);

#endif
