/* grad_buckets.h - the parameter and gradient buffers cut into buckets, and the reduction of
 * gradients over data parallelism, bucket by bucket, while backward still runs.
 *
 * Layout. Parameters lie in both buffers by class, and in a class in reverse order of registration,
 * the order in which their gradients become final:
 *     dense | summed over TP | shared over stages | experts
 * A bucket is a run of whole parameters of one class; it closes when it has bucket_size elements.
 * Without overlap a class is one bucket. Every parameter starts at a multiple of 64 elements; with
 * the distributed optimizer a bucket of a group of n ranks is padded to a multiple of 64 n.
 *
 * Ownership. With the distributed optimizer rank j of the group owns part j of n equal parts of
 * EVERY bucket: it gets the reduced gradients, keeps the optimizer's state and updates the values
 * of that part, and param_gather.h gives them to the others. A parameter may straddle ranks.
 * Without it every rank owns everything.
 *
 * Reduction of a bucket of N elements (paddings included), in f32:
 *   1. over dp_cp (experts: edp), n ranks: each sends 4 N (n-1)/n bytes as reduce_scatter with the
 *      distributed optimizer, else twice that as all_reduce (4 (N + (n-2) e) exactly, where e of
 *      the N elements are the rank's part when n does not divide N);
 *   2. times 1/(DP*CP), for experts too: their gradients hold the tokens of all EP peers (M5.8);
 *   3. the classes between, over tp or the embedding group, t ranks: all_reduce of the owned part:
 *      8 M (t-1)/t bytes, M = N/n with the distributed optimizer, else N.
 * A group of one rank costs nothing. Sums are in rank order: which elements lie in which bucket
 * does not change a bit of the result. */
#ifndef CADRE_OPTIM_GRAD_BUCKETS_H
#define CADRE_OPTIM_GRAD_BUCKETS_H

#include "nn/param.h"
#include "nn/pass.h"

struct grad_buckets_config {
    bool distributed_optimizer;
    bool overlap_grad_reduce;  /* a bucket is sent off when its last gradient is final */
    bool overlap_param_gather; /* see param_gather.h; needs the distributed optimizer */
    bool average;              /* step 2; false with --calculate-per-token-loss */
    int64_t bucket_size;       /* elements; 0: max(40e6, 1e6 * DP * CP) */
};

/* What this rank holds of a bucket's gradients. */
enum bucket_grads { GRADS_OWN, GRADS_REDUCING, GRADS_REDUCED };

/* The parts of a bucket's values that other ranks own. */
enum bucket_values { VALUES_GATHERED, VALUES_GATHERING, VALUES_STALE };

struct grad_bucket {
    int64_t start, count;         /* of both buffers, paddings included */
    int64_t own_start, own_count; /* this rank's part */
    struct comm *data;            /* the group of step 1 */
    struct comm *late;            /* the group of step 3; NULL: none */
    int begin, end;               /* its parameters in grad_buckets->order */
    int num_pending;              /* parameters whose gradient is not final yet */
    enum bucket_grads grads;
    struct comm_handle reduction;
    enum bucket_values values;
    struct comm_handle gather;
};

struct grad_buckets {
    struct grad_buckets_config config;
    struct param_list *params;
    struct stream *stream;
    float factor; /* of step 2 */
    struct grad_bucket *buckets;
    int num_buckets;
    int *order;        /* [num_params] registration indices, as they lie in the buffers */
    int *bucket_of;    /* [num_params], by registration index */
    int *gather_order; /* [num_buckets], as forward needs them */
    int num_gathered;  /* of gather_order: issued since the step */
};

/* After the last param_add and before param_list_allocate: decides where parameters lie. groups,
 * params and stream must outlive the buckets. */
void grad_buckets_init(struct grad_buckets *buckets, struct param_list *params,
                       const struct groups *groups, struct stream *stream,
                       const struct grad_buckets_config *config);
void grad_buckets_free(struct grad_buckets *buckets);

/* Of a pass: values_needed as param_gather.h says; grads_ready in the last microbatch's backward
 * (of each model chunk) only. Every rank of a stage must make these calls in the same order. */
struct param_hooks grad_buckets_hooks(struct grad_buckets *buckets, bool is_last_microbatch);

/* A step: begin, after param_list_clear_grads; forward and backward of all
 * microbatches; finish. Then the owned parts hold the reduced gradients, and the rest of the
 * gradient buffer nothing of meaning. Another finish does nothing. */
void grad_buckets_begin(struct grad_buckets *buckets);
void grad_buckets_finish(struct grad_buckets *buckets);
/* In the place of finish: a graph has been launched, and finish is part of it. */
void grad_buckets_finished_by_graph(struct grad_buckets *buckets);
/* Multiplies the owned gradients (--calculate-per-token-loss: 1 / tokens). After finish. */
void grad_buckets_scale(struct grad_buckets *buckets, float factor);

#endif
