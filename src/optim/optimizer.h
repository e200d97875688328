/* optimizer.h - Adam and SGD on ranges of the flat parameter buffers. It knows ranges and the
 * parameter list, no layer.
 *
 * State per element this rank owns (grad_buckets.h): the f32 master (the parameter itself when that
 * is f32), exp_avg and exp_avg_sq (Adam) or the momentum (SGD). The states are the owned parts of
 * all buckets one after another: 12 bytes an element of bf16 parameters, 8 of f32, divided by the
 * size of the data-parallel group (experts: EDP) with the distributed optimizer. */
#ifndef CADRE_OPTIM_OPTIMIZER_H
#define CADRE_OPTIM_OPTIMIZER_H

#include "nn/param.h"
#include "optim/grad_buckets.h"

enum optimizer_kind { OPTIMIZER_ADAM, OPTIMIZER_SGD };

struct optimizer_config {
    enum optimizer_kind kind;
    float beta1, beta2, eps; /* Adam */
    float momentum;          /* SGD */
};

/* The part of a parameter that this rank updates. */
struct optimizer_shard {
    const struct param *param;
    int64_t first, count; /* elements of what the rank holds (param->value), row-major */
    int64_t state_start;  /* where they begin in the states */
};

/* A run of the owned elements (paddings included) whose parameters share their facts. */
struct optimizer_range {
    int64_t start, count; /* in the buffers of values and gradients */
    int64_t state_start;
    bool weight_decay, decoupled_lr;
};

struct optimizer {
    struct optimizer_config config;
    const struct param_list *params;
    struct grad_buckets *buckets; /* NULL: this rank owns everything */
    struct optimizer_shard *shards;
    int num_shards;
    struct optimizer_range *ranges;
    int num_ranges;
    int64_t num_owned;        /* elements of a state */
    struct tensor master;     /* [num_owned] f32; no data when the values are f32 */
    struct tensor exp_avg;    /* [num_owned] f32; SGD: the momentum, no data without momentum */
    struct tensor exp_avg_sq; /* [num_owned] f32; Adam only */
    int64_t num_steps;        /* successful steps so far */
};

struct optimizer_rates {
    float lr, decoupled_lr, weight_decay;
};

/* States of the optimizer that a checkpoint keeps: "param" (the master), "exp_avg", "exp_avg_sq".
 */
enum { OPTIMIZER_STATES_MAX = 3 };
struct optimizer_state {
    const char *name;
    struct tensor *tensor; /* [num_owned] */
};

/* After param_list_allocate. buckets may be NULL: no reduction, one rank. */
void optimizer_init(struct optimizer *optimizer, const struct optimizer_config *config,
                    const struct param_list *params, struct grad_buckets *buckets,
                    struct stream *stream, struct arena *run);
void optimizer_free(struct optimizer *optimizer);
/* Masters := the parameters (after their initialisation, or a load without optimizer state). */
void optimizer_reset_masters(struct optimizer *optimizer, struct stream *stream);
/* One step of the owned elements with gradients * *grad_scale ([1] f32 on the device). The others'
 * come by param_gather_start. */
void optimizer_step(struct optimizer *optimizer, struct stream *stream,
                    const struct optimizer_rates *rates, const struct tensor *grad_scale);
/* Fills states[OPTIMIZER_STATES_MAX]; returns how many there are. */
int optimizer_states(struct optimizer *optimizer, struct optimizer_state *states);
/* A shard's part of a state: [shard->count]. */
struct tensor optimizer_state_of(const struct tensor *state, const struct optimizer_shard *shard);

#endif
