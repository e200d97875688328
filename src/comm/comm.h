/* comm.h - collectives of a group of ranks, behind a table: self (one rank), MPI, NCCL, fake.
 *
 * A collective is issued on a stream and returns a handle; comm_wait makes the stream wait for it.
 * A collective of a group of one rank moves nothing it need not: in-place calls are free. Every
 * handle must be waited for once, and until then the tensors belong to the collective. Failures of
 * the transport stop the job. Every rank of the group must make the same calls in the same order;
 * handles may be waited for in any order. On DEVICE_NULL nothing is moved.
 *
 * Sums are in rank order, in f32 for f32 and bf16 (rounded once), in f64 for f64: the same bits on
 * every rank and in every run. NCCL has an order of its own, which depends on the machine: the same
 * bits on every rank, and in every run on the same GPUs. */
#ifndef CADRE_COMM_COMM_H
#define CADRE_COMM_COMM_H

#include <stdbool.h>
#include <stdint.h>

#include "device/device.h"
#include "tensor/tensor.h"

enum comm_reduction { COMM_SUM, COMM_MAX };

enum comm_kind {
    COMM_ALL_REDUCE,
    COMM_ALL_GATHER,
    COMM_REDUCE_SCATTER,
    COMM_ALL_TO_ALL,
    COMM_BROADCAST,
    COMM_SEND,
    COMM_RECEIVE,
    NUM_COMM_KINDS
};

struct comm;

struct comm_handle {
    struct comm *comm;
    void *request; /* NULL: complete */
};

struct comm_table {
    const char *transport;
    bool is_emulated; /* the other ranks do not exist */
    /* In place. Any of f32, bf16, f64, i32, i64. */
    struct comm_handle (*all_reduce)(struct comm *comm, struct stream *stream, struct tensor *x,
                                     enum comm_reduction reduction);
    /* out = the ranks' in, in rank order: rows[r] rows from rank r, or equal parts with NULL. */
    struct comm_handle (*all_gather)(struct comm *comm, struct stream *stream, struct tensor *out,
                                     const struct tensor *in, const int64_t *rows);
    /* out = part `rank` of the sum over ranks of in; parts as in all_gather. */
    struct comm_handle (*reduce_scatter)(struct comm *comm, struct stream *stream,
                                         struct tensor *out, const struct tensor *in,
                                         const int64_t *rows);
    /* Rows: send_rows[r] rows of in go to rank r, recv_rows[r] rows of out come from it. */
    struct comm_handle (*all_to_all)(struct comm *comm, struct stream *stream, struct tensor *out,
                                     const int64_t *recv_rows, const struct tensor *in,
                                     const int64_t *send_rows);
    struct comm_handle (*broadcast)(struct comm *comm, struct stream *stream, struct tensor *x,
                                    int root);
    struct comm_handle (*send)(struct comm *comm, struct stream *stream, const struct tensor *x,
                               int to);
    struct comm_handle (*receive)(struct comm *comm, struct stream *stream, struct tensor *x,
                                  int from);
    void (*wait)(struct comm_handle handle, struct stream *stream);
    void (*destroy)(struct comm *comm);
};

/* What this rank did in a kind of collective since comm_counters_reset. */
struct comm_counter {
    int64_t num_calls, sent_bytes; /* payload that left this rank */
};

struct comm {
    const struct comm_table *table;
    const char *name; /* "tp", "ep", ...: for messages and counters */
    int rank, size;
    struct comm_counter counters[NUM_COMM_KINDS]; /* zero in a group of one rank */
    void *state;                                  /* the transport's */
};

/* A group of one rank. */
struct comm *comm_self_create(const char *name);
void comm_destroy(struct comm *comm);

struct comm_handle comm_all_reduce(struct comm *comm, struct stream *stream, struct tensor *x,
                                   enum comm_reduction reduction);
struct comm_handle comm_all_gather(struct comm *comm, struct stream *stream, struct tensor *out,
                                   const struct tensor *in);
struct comm_handle comm_reduce_scatter(struct comm *comm, struct stream *stream, struct tensor *out,
                                       const struct tensor *in);
/* Unequal parts: rank r's is rows[r] rows. */
struct comm_handle comm_all_gather_rows(struct comm *comm, struct stream *stream,
                                        struct tensor *out, const struct tensor *in,
                                        const int64_t *rows);
struct comm_handle comm_reduce_scatter_rows(struct comm *comm, struct stream *stream,
                                            struct tensor *out, const struct tensor *in,
                                            const int64_t *rows);
struct comm_handle comm_all_to_all(struct comm *comm, struct stream *stream, struct tensor *out,
                                   const int64_t *recv_rows, const struct tensor *in,
                                   const int64_t *send_rows);
struct comm_handle comm_broadcast(struct comm *comm, struct stream *stream, struct tensor *x,
                                  int root);
/* Messages from one rank to another arrive in the order in which both issue them. */
struct comm_handle comm_send(struct comm *comm, struct stream *stream, const struct tensor *x,
                             int to);
struct comm_handle comm_receive(struct comm *comm, struct stream *stream, struct tensor *x,
                                int from);
void comm_wait(struct comm_handle handle, struct stream *stream);

/* What other ranks send is made up (comm_fake.h). */
bool comm_is_emulated(const struct comm *comm);
const char *comm_kind_name(enum comm_kind kind);
void comm_counters_reset(struct comm *comm);

#endif
