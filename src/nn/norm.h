/* norm.h - RMSNorm and LayerNorm over the hidden dim, with the residual sum that precedes them. */
#ifndef CADRE_NN_NORM_H
#define CADRE_NN_NORM_H

#include "nn/param.h"
#include "nn/pass.h"
#include "ops/ops.h"

struct norm_config {
    const char *name; /* ".weight" and, for LayerNorm, ".bias" are appended */
    enum norm_kind kind;
    bool one_plus; /* --apply-layernorm-1p: stored as w, applied as 1 + w */
    int64_t hidden_size;
    float eps;
};

struct norm {
    enum norm_kind kind;
    bool one_plus;
    float eps;
    struct param *weight, *bias;
};

struct norm_saved {
    struct tensor x; /* what was normalised: the caller's tensor, or the residual sum */
    struct tensor inv_std, mean;
};

void norm_init(struct norm *norm, struct param_list *params, const struct groups *groups,
               const struct norm_config *config);
/* y = norm(x), or with residual: saved->x = x + residual (new memory in pass->saved), y =
 * norm(saved->x). */
void norm_forward(const struct norm *norm, const struct pass *pass, struct tensor *y,
                  const struct tensor *x, const struct tensor *residual, struct norm_saved *saved);
/* d_x = backward(d_y) + d_residual (may be NULL, may be d_x). */
void norm_backward(const struct norm *norm, const struct pass *pass, struct tensor *d_x,
                   const struct tensor *d_y, const struct tensor *d_residual,
                   const struct norm_saved *saved);

#endif
