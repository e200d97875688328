/* tp_region.h - entering and leaving a tensor-parallel region (Shoeybi et al. 2019, Korthikanti et
 * al. 2022). Inside, every TP rank sees all tokens and holds a part of the features; outside it
 * holds all features of all tokens or, under sequence parallelism, of its part of the tokens.
 *
 *                      forward                      backward
 *   enter  (f)         SP: all-gather tokens        SP: reduce-scatter, else all-reduce
 *   leave  (g)         SP: reduce-scatter, else     SP: all-gather tokens
 *                      all-reduce
 * With TP = 1 all of it is free: the tensors are passed through.
 *
 * Entering and leaving can be started and waited for apart. With groups->tp_comm_overlap the linear
 * layers go further (tp_region_overlaps): they work on what has arrived, and send what is ready. */
#ifndef CADRE_PARALLEL_TP_REGION_H
#define CADRE_PARALLEL_TP_REGION_H

#include "parallel/groups.h"

/* Of num_tokens tokens, this rank holds so many outside: all, or 1/TP under sequence parallelism.
 */
int64_t tp_region_outside(const struct groups *groups, int64_t num_tokens);
/* Tokens on their way into a region: all is complete after the wait. */
struct tp_gathering {
    struct tensor all; /* x itself, or the tokens of all ranks [T*TP,H] in arena */
    struct comm_handle handle;
};
struct tp_gathering tp_region_gather_start(const struct groups *groups, struct stream *stream,
                                           struct arena *arena, const struct tensor *x);
/* x [T,H] outside -> what the region sees. */
struct tensor tp_region_gather(const struct groups *groups, struct stream *stream,
                               struct arena *arena, const struct tensor *x);

/* Where to compute the partial sum that tp_region_reduce turns into y: y itself, or scratch. */
struct tensor tp_region_partial(const struct groups *groups, struct arena *arena,
                                const struct tensor *y);
struct comm_handle tp_region_reduce_start(const struct groups *groups, struct stream *stream,
                                          struct tensor *y, struct tensor *partial);
void tp_region_reduce(const struct groups *groups, struct stream *stream, struct tensor *y,
                      struct tensor *partial);

enum { TP_OVERLAP_RANKS_MAX = 64 };

/* --tp-comm-overlap, under sequence parallelism. */
bool tp_region_overlaps(const struct groups *groups);

/* Tokens on their way from rank to rank, each rank's apart: the same bytes as the gather. */
struct tp_arrivals {
    struct tensor all; /* [T*TP,H] in arena */
    struct comm_handle receive[TP_OVERLAP_RANKS_MAX], send[TP_OVERLAP_RANKS_MAX];
};
void tp_region_arrivals_start(struct tp_arrivals *arrivals, const struct groups *groups,
                              struct stream *stream, struct arena *arena, const struct tensor *x);
/* The i-th rank's tokens to arrive, i < TP, this rank's own first: waits for them and returns the
 * rank; they are rows [rank*T, (rank+1)*T) of all. */
int tp_region_arrival(struct tp_arrivals *arrivals, const struct groups *groups,
                      struct stream *stream, int i);
/* After the last arrival: this rank's tokens have left. */
void tp_region_arrivals_finish(struct tp_arrivals *arrivals, const struct groups *groups,
                               struct stream *stream);

#endif
