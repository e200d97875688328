#include "nn/linear.h"

#include <stdio.h>

#include "base/check.h"
#include "ops/ops.h"
#include "parallel/tp_region.h"

static struct param weight_facts(const struct groups *groups, const struct linear_config *config)
{
    struct param facts = {.num_dims = config->num_out_dims + 1,
                          .init = PARAM_INIT_NORMAL,
                          .init_std = config->init_std,
                          .weight_decay = true,
                          .decoupled_lr = config->decoupled_lr,
                          .grad_is_product = true};
    const int dim = config->split == LINEAR_COLUMN ? config->split_dim : config->num_out_dims;

    snprintf(facts.name, sizeof facts.name, "%s.weight", config->name);
    for (int i = 0; i < config->num_out_dims; i++) {
        facts.global_shape[i] = config->out_dims[i];
    }
    facts.global_shape[config->num_out_dims] = config->in_features;
    facts.box = box_whole(facts.global_shape, facts.num_dims);
    facts.box = box_part(&facts.box, dim, groups->tp->rank, groups->tp->size);
    return facts;
}

/* A row linear's bias is added once, outside the region: every TP rank has it. */
static struct param bias_facts(const struct groups *groups, const struct linear_config *config)
{
    struct param facts = {.num_dims = config->num_out_dims,
                          .init = PARAM_INIT_ZEROS,
                          .sum_over_tp = config->split == LINEAR_ROW && groups->sequence_parallel};

    snprintf(facts.name, sizeof facts.name, "%s.bias", config->name);
    for (int i = 0; i < config->num_out_dims; i++) {
        facts.global_shape[i] = config->out_dims[i];
    }
    facts.box = box_whole(facts.global_shape, facts.num_dims);
    if (config->split == LINEAR_COLUMN) {
        facts.box = box_part(&facts.box, config->split_dim, groups->tp->rank, groups->tp->size);
    }
    return facts;
}

void linear_init(struct linear *linear, struct param_list *params, const struct groups *groups,
                 const struct linear_config *config)
{
    const struct param weight = weight_facts(groups, config);

    linear->split = config->split;
    linear->in_features = weight.box.size[weight.num_dims - 1];
    linear->out_features = box_num_elements(&weight.box) / linear->in_features;
    linear->weight = param_add(params, &weight);
    linear->bias = NULL;
    if (config->bias) {
        const struct param bias = bias_facts(groups, config);

        linear->bias = param_add(params, &bias);
    }
}

struct tensor linear_matrix(const struct tensor *weight, int64_t out_features, int64_t in_features)
{
    return tensor_view(weight, out_features, in_features);
}

static struct tensor bias_vector(const struct linear *linear, const struct tensor *bias)
{
    return tensor_view(bias, linear->out_features);
}

/* Inside the region: y = x W^T (+ b). */
static void product(const struct linear *linear, const struct pass *pass, struct tensor *y,
                    const struct tensor *x, bool with_bias)
{
    const struct tensor weight =
        linear_matrix(&linear->weight->value, linear->out_features, linear->in_features);
    struct tensor bias = {0};

    if (with_bias) {
        bias = bias_vector(linear, &linear->bias->value);
    }
    op_matmul(
        pass->stream,
        &(struct matmul){
            .c = y, .a = x, .b = &weight, .bias = with_bias ? &bias : NULL, .transpose_b = true});
}

void linear_region_forward(const struct linear *linear, const struct pass *pass, struct tensor *y,
                           const struct tensor *x)
{
    product(linear, pass, y, x, false);
}

void linear_region_input_gradient(const struct linear *linear, const struct pass *pass,
                                  struct tensor *d_x, const struct tensor *d_y)
{
    const struct tensor weight =
        linear_matrix(&linear->weight->value, linear->out_features, linear->in_features);

    op_matmul(pass->stream, &(struct matmul){.c = d_x, .a = d_y, .b = &weight});
}

void linear_region_weight_gradient(const struct linear *linear, const struct pass *pass,
                                   const struct tensor *d_y, const struct tensor *x)
{
    struct tensor d_weight =
        linear_matrix(&linear->weight->grad, linear->out_features, linear->in_features);

    op_matmul(pass->stream, &(struct matmul){.c = &d_weight,
                                             .a = d_y,
                                             .b = x,
                                             .transpose_a = true,
                                             .accumulate = param_grad_accumulates(
                                                 linear->weight, pass->overwrite_grads)});
}

/* d_b += column sums of d_y. */
static void bias_gradient(const struct linear *linear, const struct pass *pass,
                          const struct tensor *d_y)
{
    if (linear->bias != NULL) {
        struct tensor d_bias = bias_vector(linear, &linear->bias->grad);

        op_bias_backward(pass->stream, &(struct bias_backward){.d_bias = &d_bias, .d_y = d_y});
    }
}

enum product_kind { OUTPUT_OF_INPUT, INPUT_GRADIENT };

static void region_product(const struct linear *linear, const struct pass *pass,
                           enum product_kind kind, bool with_bias, struct tensor *y,
                           const struct tensor *x)
{
    if (kind == OUTPUT_OF_INPUT) {
        product(linear, pass, y, x, with_bias);
    } else {
        linear_region_input_gradient(linear, pass, y, x);
    }
}

/* y [T*TP,.] = the product of the tokens x [T,.] of all ranks, each rank's when they are here.
 * Returns the tokens, in scratch. */
static struct tensor product_of_arrivals(const struct linear *linear, const struct pass *pass,
                                         enum product_kind kind, bool with_bias, struct tensor *y,
                                         const struct tensor *x)
{
    const int64_t num_tokens = x->dim[0];
    struct tp_arrivals arrivals;

    tp_region_arrivals_start(&arrivals, pass->groups, pass->stream, pass->scratch, x);
    for (int i = 0; i < pass->groups->tp->size; i++) {
        const int rank = tp_region_arrival(&arrivals, pass->groups, pass->stream, i);
        const struct tensor rows = tensor_rows(&arrivals.all, rank * num_tokens, num_tokens);

        if (y != NULL) {
            struct tensor y_rows = tensor_rows(y, rank * num_tokens, num_tokens);

            region_product(linear, pass, kind, with_bias, &y_rows, &rows);
        }
    }
    tp_region_arrivals_finish(&arrivals, pass->groups, pass->stream);
    return arrivals.all;
}

enum { LEAVING_CHUNKS_MAX = 4 };

/* Partial sums on their way to the ranks that hold their tokens. */
struct leaving {
    struct comm_handle handle[LEAVING_CHUNKS_MAX];
    int num_chunks;
};

/* The tokens [begin, begin + count) of every rank: their product, summed over ranks, in y's rows.
 */
static struct comm_handle leave_with_chunk(const struct linear *linear, const struct pass *pass,
                                           enum product_kind kind, struct tensor *y,
                                           const struct tensor *x, int64_t begin, int64_t count)
{
    struct comm *tp = pass->groups->tp;
    struct tensor partial = tensor_new(pass->scratch, y->dtype, tp->size * count, y->dim[1]);
    struct tensor y_rows = tensor_rows(y, begin, count);

    for (int rank = 0; rank < tp->size; rank++) {
        const struct tensor x_rows = tensor_rows(x, rank * y->dim[0] + begin, count);
        struct tensor rows = tensor_rows(&partial, rank * count, count);

        region_product(linear, pass, kind, false, &rows, &x_rows);
    }
    return comm_reduce_scatter(tp, pass->stream, &y_rows, &partial);
}

/* y [T,.] outside = the sum over TP of the product of x [T*TP,.]: whole, or in chunks that leave
 * while the next one is computed. */
static struct leaving product_and_leave(const struct linear *linear, const struct pass *pass,
                                        enum product_kind kind, bool with_bias, struct tensor *y,
                                        const struct tensor *x)
{
    const int64_t num_tokens = y->dim[0];
    struct leaving leaving = {.num_chunks = 1};
    struct tensor partial;

    if (!tp_region_overlaps(pass->groups)) {
        partial = tp_region_partial(pass->groups, pass->scratch, y);
        region_product(linear, pass, kind, with_bias, &partial, x);
        leaving.handle[0] = tp_region_reduce_start(pass->groups, pass->stream, y, &partial);
        return leaving;
    }
    leaving.num_chunks =
        num_tokens < LEAVING_CHUNKS_MAX ? (int)num_tokens : (int)LEAVING_CHUNKS_MAX;
    for (int i = 0; i < leaving.num_chunks; i++) {
        const int64_t begin = num_tokens * i / leaving.num_chunks;
        const int64_t end = num_tokens * (i + 1) / leaving.num_chunks;

        leaving.handle[i] = leave_with_chunk(linear, pass, kind, y, x, begin, end - begin);
    }
    return leaving;
}

static void wait_until_left(const struct pass *pass, const struct leaving *leaving)
{
    for (int i = 0; i < leaving->num_chunks; i++) {
        comm_wait(leaving->handle[i], pass->stream);
    }
}

static void column_forward(const struct linear *linear, const struct pass *pass, struct tensor *y,
                           const struct tensor *x)
{
    const bool bias = linear->bias != NULL;

    if (tp_region_overlaps(pass->groups)) {
        product_of_arrivals(linear, pass, OUTPUT_OF_INPUT, bias, y, x);
    } else {
        const struct tensor all = tp_region_gather(pass->groups, pass->stream, pass->scratch, x);

        product(linear, pass, y, &all, bias);
    }
}

/* The bias is added once, to the sum over ranks. */
static void row_forward(const struct linear *linear, const struct pass *pass, struct tensor *y,
                        const struct tensor *x)
{
    const bool whole = pass->groups->tp->size == 1, bias = linear->bias != NULL;
    const struct leaving leaving =
        product_and_leave(linear, pass, OUTPUT_OF_INPUT, bias && whole, y, x);

    wait_until_left(pass, &leaving);
    if (bias && !whole) {
        const struct tensor vector = bias_vector(linear, &linear->bias->value);

        op_bias_forward(pass->stream, &(struct bias_forward){.y = y, .bias = &vector});
    }
}

void linear_forward(const struct linear *linear, const struct pass *pass, struct tensor *y,
                    const struct tensor *x)
{
    const struct arena_mark mark = arena_mark(pass->scratch);

    if (linear->split == LINEAR_COLUMN) {
        column_forward(linear, pass, y, x);
    } else {
        row_forward(linear, pass, y, x);
    }
    arena_release(pass->scratch, mark);
}

/* x arrives while d_x is computed, which leaves while d_W is computed. */
static void column_backward(const struct linear *linear, const struct pass *pass,
                            struct tensor *d_x, const struct tensor *d_y, const struct tensor *x)
{
    const struct tp_gathering entering =
        tp_region_gather_start(pass->groups, pass->stream, pass->scratch, x);
    struct leaving leaving = {.num_chunks = 0};

    if (d_x != NULL) {
        leaving = product_and_leave(linear, pass, INPUT_GRADIENT, false, d_x, d_y);
    }
    comm_wait(entering.handle, pass->stream);
    linear_region_weight_gradient(linear, pass, d_y, &entering.all);
    wait_until_left(pass, &leaving);
}

static void row_backward(const struct linear *linear, const struct pass *pass, struct tensor *d_x,
                         const struct tensor *d_y, const struct tensor *x)
{
    struct tensor all;

    if (tp_region_overlaps(pass->groups)) {
        all = product_of_arrivals(linear, pass, INPUT_GRADIENT, false, d_x, d_y);
    } else {
        all = tp_region_gather(pass->groups, pass->stream, pass->scratch, d_y);
        if (d_x != NULL) {
            linear_region_input_gradient(linear, pass, d_x, &all);
        }
    }
    linear_region_weight_gradient(linear, pass, &all, x);
}

void linear_backward(const struct linear *linear, const struct pass *pass, struct tensor *d_x,
                     const struct tensor *d_y, const struct tensor *x)
{
    const struct arena_mark mark = arena_mark(pass->scratch);

    bias_gradient(linear, pass, d_y);
    if (linear->split == LINEAR_COLUMN) {
        column_backward(linear, pass, d_x, d_y, x);
    } else {
        row_backward(linear, pass, d_x, d_y, x);
    }
    arena_release(pass->scratch, mark);
}
