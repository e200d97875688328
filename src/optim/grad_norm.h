/* grad_norm.h - global norms of the model: each distinct element counts once, whatever ranks hold
 * copies of it. Sums are in f64 and in a fixed order.
 *
 * Communication: one all_reduce of one f64 over the world. */
#ifndef CADRE_OPTIM_GRAD_NORM_H
#define CADRE_OPTIM_GRAD_NORM_H

#include "optim/optimizer.h"
#include "parallel/groups.h"

/* norm [1] f32 = L2 norm of all gradients (before clipping); scale [1] f32 = what clipping by
 * max_norm multiplies them with, min(1, max_norm / (norm + 1e-6)); max_norm 0: 1. No host wait. */
void grad_norm_clip_scale(const struct optimizer *optimizer, const struct groups *groups,
                          struct stream *stream, struct arena *scratch, float max_norm,
                          struct tensor *norm, struct tensor *scale);
/* For the log; these wait for the device. */
double params_norm(const struct optimizer *optimizer, const struct groups *groups,
                   struct stream *stream, struct arena *scratch);
double grad_num_zeros(const struct optimizer *optimizer, const struct groups *groups,
                      struct stream *stream, struct arena *scratch);

#endif
