/* pass.h - one pass of a microbatch through layers: what every layer's forward and backward need.
 *
 * Convention of all layers: x_forward(layer, pass, y, x, saved) writes y, whose memory the caller
 * owns, and takes what backward will need from pass->saved; x_backward(layer, pass, d_x, d_y,
 * saved) adds weight gradients to the parameters' grads, or, with overwrite_grads, replaces those
 * that are one matrix product (param_grad_accumulates). Scratch comes from pass->scratch and is
 * given back before the function returns. x must stay valid until backward. */
#ifndef CADRE_NN_PASS_H
#define CADRE_NN_PASS_H

#include "parallel/groups.h"

struct moe_metrics;

/* Called around the layers, for communication that overlaps with them; begin and end are indices of
 * the parameter list. Either may be NULL. */
struct param_hooks {
    void (*values_needed)(void *context, int begin, int end); /* before their forward */
    void (*grads_ready)(void *context, int begin, int end);   /* after their last backward */
    void *context;
};

struct pass {
    struct stream *stream;
    const struct groups *groups;
    struct arena *saved;   /* lives until this microbatch's backward */
    struct arena *scratch; /* lives until the call returns */
    enum dtype dtype;      /* of activations and parameters */
    bool training;         /* dropout, balancing losses; false in evaluation and generation */
    bool overwrite_grads;  /* of the batch's first microbatch: see param_list_clear_grads */
    bool recompute;        /* a second forward: counters and metrics have been fed by the first */
    uint64_t seed;

    int64_t num_sequences;  /* B */
    struct tensor token;    /* [T] I32 */
    struct tensor label;    /* [T] I32, training and evaluation */
    struct tensor position; /* [T] I32 */
    struct tensor
        token_id; /* I64: sample_id * S + s; no token ever gets another's dropout mask. Of the
                   * tokens outside TP regions: [T], or [T/TP] under sequence parallelism */
    struct tensor sample_id;      /* [B] I64: global number of the sample */
    struct tensor document_start; /* [T] I32, or no data: attention reaches to the start */
    struct tensor loss_weight;    /* [T] f32: d(loss)/d(loss of the token) */

    float aux_loss_scale;            /* the gradient that balancing losses receive (M1.8) */
    struct moe_metrics *metrics;     /* where layers leave their losses and counts; may be NULL */
    const struct param_hooks *hooks; /* may be NULL */
    double measured_load; /* on DEVICE_NULL: the rows of this rank's experts, in even loads; 0: 1 */
};

#endif
