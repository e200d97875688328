#include "optim/grad_norm.h"

#include <math.h>

#include "ops/ops.h"

/* A parameter that is replicated over TP counts on TP rank 0 only; over (E)DP it is the same
 * everywhere. */
static bool counts_here(const struct param *param, const struct groups *groups)
{
    const struct box whole = box_whole(param->global_shape, param->num_dims);

    return param->scope == PARAM_EXPERT || groups->tp->rank == 0 || !box_equal(&param->box, &whole);
}

/* Sums f(x) of every parameter over the ranks that hold distinct parts. */
static void sum_over_ranks(const struct groups *groups, struct stream *stream, struct tensor *sum)
{
    comm_wait(comm_all_reduce(groups->tp, stream, sum, COMM_SUM), stream);
    comm_wait(comm_all_reduce(groups->pp, stream, sum, COMM_SUM), stream);
}

void grad_norm_clip_scale(const struct param_list *params, const struct groups *groups,
                          struct stream *stream, struct arena *scratch, float max_norm,
                          struct tensor *norm, struct tensor *scale)
{
    const struct arena_mark mark = arena_mark(scratch);
    struct tensor sum = tensor_new(scratch, DTYPE_F64, 1);

    op_fill_zero(stream, &sum);
    for (int i = 0; i < params->num_params; i++) {
        if (counts_here(params->params[i], groups)) {
            op_square_sum(stream, &(struct square_sum){.sum = &sum, .x = &params->params[i]->grad});
        }
    }
    sum_over_ranks(groups, stream, &sum);
    op_clip_scale(stream, &(struct clip_scale){
                              .norm = norm, .scale = scale, .sum = &sum, .max_norm = max_norm});
    arena_release(scratch, mark);
}

static double read_sum(struct stream *stream, const struct tensor *sum)
{
    double value;

    stream_wait(stream);
    stream_copy_to_host(stream, &value, sum->data, sizeof value);
    return value;
}

double params_norm(const struct param_list *params, const struct groups *groups,
                   struct stream *stream, struct arena *scratch)
{
    const struct arena_mark mark = arena_mark(scratch);
    struct tensor sum = tensor_new(scratch, DTYPE_F64, 1);
    double value;

    op_fill_zero(stream, &sum);
    for (int i = 0; i < params->num_params; i++) {
        if (counts_here(params->params[i], groups)) {
            op_square_sum(stream,
                          &(struct square_sum){.sum = &sum, .x = &params->params[i]->value});
        }
    }
    sum_over_ranks(groups, stream, &sum);
    value = sqrt(read_sum(stream, &sum));
    arena_release(scratch, mark);
    return value;
}

double grad_num_zeros(const struct param_list *params, const struct groups *groups,
                      struct stream *stream, struct arena *scratch)
{
    const struct arena_mark mark = arena_mark(scratch);
    struct tensor count = tensor_new(scratch, DTYPE_F64, 1);
    double value;

    op_fill_zero(stream, &count);
    for (int i = 0; i < params->num_params; i++) {
        if (counts_here(params->params[i], groups)) {
            op_zero_count(stream,
                          &(struct zero_count){.count = &count, .x = &params->params[i]->grad});
        }
    }
    sum_over_ranks(groups, stream, &count);
    value = read_sum(stream, &count);
    arena_release(scratch, mark);
    return value;
}
