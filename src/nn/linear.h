/* linear.h - y = x W^T + b over the TP region (column: the output features are cut; row: the input
 * features are cut). With --tp-comm-overlap under sequence parallelism a product runs on each
 * rank's tokens as they arrive, and its partial sums leave in chunks while the next is computed. */
#ifndef CADRE_NN_LINEAR_H
#define CADRE_NN_LINEAR_H

#include "nn/param.h"
#include "nn/pass.h"

enum { LINEAR_OUT_DIMS_MAX = 3 };

enum linear_split { LINEAR_COLUMN, LINEAR_ROW };

struct linear_config {
    const char *name; /* "decoder.layers.0.mlp.linear_fc1": .weight and .bias are appended */
    enum linear_split split;
    int num_out_dims; /* the output features may have structure: [G, A/G+2, D], [2, F] */
    int64_t out_dims[LINEAR_OUT_DIMS_MAX];
    int split_dim; /* of out_dims, for LINEAR_COLUMN */
    int64_t in_features;
    bool bias;
    float init_std;
    bool decoupled_lr;
};

struct linear {
    enum linear_split split;
    int64_t in_features, out_features; /* of this rank */
    struct param *weight, *bias;       /* bias may be NULL */
};

void linear_init(struct linear *linear, struct param_list *params, const struct groups *groups,
                 const struct linear_config *config);
/* y [T',out], x [T'',in]; column: T' = all tokens; row: T'' = all tokens (tp_region.h). */
void linear_forward(const struct linear *linear, const struct pass *pass, struct tensor *y,
                    const struct tensor *x);
/* d_x may be NULL. x is forward's input. */
void linear_backward(const struct linear *linear, const struct pass *pass, struct tensor *d_x,
                     const struct tensor *d_y, const struct tensor *x);

/* The products alone, inside the region: y = x W^T without bias, d_x = d_y W, d_W += d_y^T x
 * (pass.h). */
void linear_region_forward(const struct linear *linear, const struct pass *pass, struct tensor *y,
                           const struct tensor *x);
void linear_region_input_gradient(const struct linear *linear, const struct pass *pass,
                                  struct tensor *d_x, const struct tensor *d_y);
void linear_region_weight_gradient(const struct linear *linear, const struct pass *pass,
                                   const struct tensor *d_y, const struct tensor *x);

/* [name].weight as one matrix [out, in]. */
struct tensor linear_matrix(const struct tensor *weight, int64_t out_features, int64_t in_features);

#endif
