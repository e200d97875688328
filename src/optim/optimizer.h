/* optimizer.h - Adam and SGD on ranges of the flat parameter buffers. It knows ranges and the
 * parameter list, no layer.
 *
 * State per element: the f32 master (the parameter itself when that is f32), exp_avg and exp_avg_sq
 * (Adam) or the momentum (SGD). A range is a run of the buffers whose parameters share their weight
 * decay and learning rate. */
#ifndef CADRE_OPTIM_OPTIMIZER_H
#define CADRE_OPTIM_OPTIMIZER_H

#include "nn/param.h"

enum optimizer_kind { OPTIMIZER_ADAM, OPTIMIZER_SGD };

struct optimizer_config {
    enum optimizer_kind kind;
    float beta1, beta2, eps; /* Adam */
    float momentum;          /* SGD */
};

struct optimizer_range {
    int64_t start, count;
    bool weight_decay, decoupled_lr;
};

struct optimizer {
    struct optimizer_config config;
    const struct param_list *params;
    struct optimizer_range *ranges;
    int num_ranges;
    struct tensor master;     /* [n] f32; the values' memory when they are f32 */
    struct tensor exp_avg;    /* [n] f32; SGD: the momentum buffer, no data without momentum */
    struct tensor exp_avg_sq; /* [n] f32; Adam only */
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
    struct tensor *tensor; /* [n] */
};

/* After param_list_allocate. */
void optimizer_init(struct optimizer *optimizer, const struct optimizer_config *config,
                    const struct param_list *params, struct stream *stream, struct arena *run);
void optimizer_free(struct optimizer *optimizer);
/* Masters := the parameters (after their initialisation, or a load without optimizer state). */
void optimizer_reset_masters(struct optimizer *optimizer, struct stream *stream);
/* One step with gradients * *grad_scale ([1] f32 on the device). */
void optimizer_step(struct optimizer *optimizer, struct stream *stream,
                    const struct optimizer_rates *rates, const struct tensor *grad_scale);
/* Fills states[OPTIMIZER_STATES_MAX]; returns how many there are. */
int optimizer_states(struct optimizer *optimizer, struct optimizer_state *states);
/* A parameter's part of a state, in its shape. */
struct tensor optimizer_state_of(const struct tensor *state, const struct param *param);

#endif
