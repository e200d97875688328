/* dispatcher.h - how tokens travel to the experts and back (reference M3).
 *
 * dispatch brings the routed rows of this rank's experts together in canonical order: by expert,
 * then by source token. combine brings the experts' outputs home and sums each token's K rows in
 * slot order, in f32. The probability travels with the row and is applied inside the expert, before
 * fc2 (M3.6), so combine is a plain sum. The four steps of a training pass are dispatch, combine
 * and the backward of each; the backward of combine gathers rows as dispatch does, the backward of
 * dispatch sums them as combine does.
 *
 * Each step is started and finished: between the two, rows are on their way and the caller may
 * compute something else. */
#ifndef CADRE_MOE_DISPATCHER_H
#define CADRE_MOE_DISPATCHER_H

#include "moe/row_limit.h"
#include "nn/pass.h"

enum { DISPATCH_RANKS_MAX = 512 }; /* of an expert-parallel group */

/* How many rows travel between this rank and each other; known to the host. */
struct dispatch_exchange {
    int64_t send_rows[DISPATCH_RANKS_MAX]; /* [EP] rows that go to each EP rank */
    int64_t recv_rows[DISPATCH_RANKS_MAX]; /* [EP] rows that come from each */
    int64_t
        etp_rows[DISPATCH_RANKS_MAX]; /* [ETP] rows that each ETP rank receives from its EP peers */
    int64_t num_sent, num_received;   /* sums of send_rows and recv_rows */
    int64_t num_rows;                 /* sum of etp_rows: R */
};

/* Rows of this rank's experts. With row_token, x holds tokens (or rows in another order) and row r
 * reads row row_token[r] of it: the gather happens inside the expert product. */
struct dispatched {
    struct tensor x;          /* [R,H], or [any,H] with row_token */
    struct tensor row_token;  /* [R] I32, or no data */
    struct tensor token_rows; /* [tokens of x,K] I32, or no data: row_token the other way round */
    struct tensor row_prob;   /* [R] f32 */
    struct tensor offsets;    /* [local experts + 1] I32 */
    struct tensor row_of; /* [T,K] I32: the row of a slot, -1 where dropped (or another rank's) */
    int64_t num_rows;     /* R: the rows' capacity */

    /* The rest is for rows that travel (alltoall, alltoall_seq). row_of then counts rows as they
     * are sent. Arrival order is by ETP rank, source EP rank, expert, token. */
    struct dispatch_exchange exchange;
    struct tensor send_token; /* [num_sent] I32: the token of a row that is sent */
    struct tensor arrival;    /* [R] I32: the place in arrival order of a row */
    struct tensor row_at;     /* [R] I32: the row at a place in arrival order */
    struct tensor
        arrival_part;          /* alltoall_seq with ETP > 1: the same for the ETP parts of a row, */
    struct tensor row_at_part; /* [R*ETP] I32 */
};

struct dispatch_input {
    const struct tensor *x;       /* [T,H] */
    const struct tensor *indices; /* [T,K] I32, -1 where dropped */
    const struct tensor *probs;   /* [T,K] f32 */
    int num_experts;
    int64_t padded_capacity;       /* 0: rows as they come */
    const struct row_limit *limit; /* may be NULL */
};

/* Rows of one width on their way. */
struct dispatch_trip {
    struct tensor to;      /* where they end */
    struct tensor between; /* alltoall with ETP > 1: this rank's share of them */
    struct comm_handle handle;
};

/* A step between its start and its finish. Start takes memory of pass->scratch, finish gives it
 * back: what the caller takes of it between the two, he has given back before finish. */
struct dispatch_flight {
    struct arena_mark mark;
    struct dispatch_trip rows, probs;
};

struct dispatcher {
    const char *name;
    /* The plan and the rows live in pass->saved; the plan is complete after the start (and with it
     * num_rows), x and row_prob after the finish. */
    void (*dispatch_start)(const struct pass *pass, const struct dispatch_input *input,
                           struct dispatched *out, struct dispatch_flight *flight);
    void (*dispatch_finish)(const struct pass *pass, struct dispatched *out,
                            struct dispatch_flight *flight);
    /* y [T,H] = sum over each token's slots of rows [R,H], + residual [T,H] unless NULL. */
    void (*combine_start)(const struct pass *pass, const struct dispatched *plan, struct tensor *y,
                          const struct tensor *rows, const struct tensor *residual,
                          struct dispatch_flight *flight);
    void (*combine_finish)(const struct pass *pass, const struct dispatched *plan, struct tensor *y,
                           const struct tensor *residual, struct dispatch_flight *flight);
    /* d_y [T,H] as the experts' backward reads it: rows in pass->scratch (they stay), or d_y itself
     * with *row_token set. */
    void (*combine_backward_start)(const struct pass *pass, const struct dispatched *plan,
                                   const struct tensor *d_y, struct tensor *d_rows,
                                   struct dispatch_flight *flight);
    void (*combine_backward_finish)(const struct pass *pass, const struct dispatched *plan,
                                    struct tensor *d_rows, const struct tensor **row_token,
                                    struct dispatch_flight *flight);
    /* d_x [T,H] from d_rows [R,H] (overwrites), d_probs [T,K] f32 from d_row_prob [R]. */
    void (*dispatch_backward_start)(const struct pass *pass, const struct dispatched *plan,
                                    struct tensor *d_x, struct tensor *d_probs,
                                    const struct tensor *d_rows, const struct tensor *d_row_prob,
                                    struct dispatch_flight *flight);
    void (*dispatch_backward_finish)(const struct pass *pass, const struct dispatched *plan,
                                     struct tensor *d_x, struct tensor *d_probs,
                                     struct dispatch_flight *flight);
};

/* All experts are on this rank: nothing travels, rows are an index. What the others come down to
 * when ETPxEP is one rank. */
extern const struct dispatcher dispatcher_local;
/* Every rank of ETPxEP gathers all tokens, runs its experts on those that chose them, and the sums
 * are scattered back: T*(ETP*EP-1) tokens arrive per rank, whatever the routing (M3.2). */
extern const struct dispatcher dispatcher_allgather;
/* A row goes to its expert's EP rank, then to all its ETP ranks (M3.3). */
extern const struct dispatcher dispatcher_alltoall;
/* The ETP ranks first exchange tokens for a part of the hidden dim of all their tokens; rows travel
 * over EP in these parts (M3.4). Needs a hidden size divisible by ETP. */
extern const struct dispatcher dispatcher_alltoall_seq;

enum dispatcher_kind { DISPATCHER_ALLGATHER, DISPATCHER_ALLTOALL, DISPATCHER_ALLTOALL_SEQ };

const struct dispatcher *dispatcher_select(enum dispatcher_kind kind, const struct groups *groups);

#endif
