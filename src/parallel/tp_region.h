/* tp_region.h - entering and leaving a tensor-parallel region (Shoeybi et al. 2019, Korthikanti et
 * al. 2022). Inside, every TP rank sees all tokens and holds a part of the features; outside it
 * holds all features of all tokens or, under sequence parallelism, of its part of the tokens.
 *
 *                      forward                      backward
 *   enter  (f)         SP: all-gather tokens        SP: reduce-scatter, else all-reduce
 *   leave  (g)         SP: reduce-scatter, else     SP: all-gather tokens
 *                      all-reduce
 * With TP = 1 all of it is free: the tensors are passed through. */
#ifndef CADRE_PARALLEL_TP_REGION_H
#define CADRE_PARALLEL_TP_REGION_H

#include "parallel/groups.h"

/* Of num_tokens tokens, this rank holds so many outside: all, or 1/TP under sequence parallelism.
 */
int64_t tp_region_outside(const struct groups *groups, int64_t num_tokens);
/* x [T,H] outside -> what the region sees: x itself, or the gathered tokens [T*TP,H] in arena. */
struct tensor tp_region_gather(const struct groups *groups, struct stream *stream,
                               struct arena *arena, const struct tensor *x);
/* Where to compute the partial sum that tp_region_reduce turns into y: y itself, or scratch. */
struct tensor tp_region_partial(const struct groups *groups, struct arena *arena,
                                const struct tensor *y);
void tp_region_reduce(const struct groups *groups, struct stream *stream, struct tensor *y,
                      struct tensor *partial);

#endif
