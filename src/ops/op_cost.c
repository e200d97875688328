#include "ops/op_cost.h"

double op_cost_seconds(const struct op_cost *cost, const struct op_roof *roof)
{
    double products, memory;

    if (roof->flops_per_second <= 0.0 || roof->bytes_per_second <= 0.0) {
        return 0.0;
    }
    products = cost->flops / roof->flops_per_second;
    memory = cost->bytes / roof->bytes_per_second;
    return products > memory ? products : memory;
}

void op_rate_print(FILE *file, double rate, const char *unit)
{
    fprintf(file, " %8.2f %c%s/s", rate >= 1e12 ? rate / 1e12 : rate / 1e9,
            rate >= 1e12 ? 'T' : 'G', unit);
}

static double bytes(const struct tensor *x)
{
    return x != NULL ? (double)tensor_size_bytes(x) : 0.0;
}

static double elements(const struct tensor *x)
{
    return (double)tensor_num_elements(x);
}

static struct op_cost memory_only(double num_bytes)
{
    return (struct op_cost){.bytes = num_bytes};
}

struct op_cost op_cost_matmul(const struct matmul *a)
{
    const double inner = (double)a->a->dim[a->transpose_a ? 0 : 1];

    return (struct op_cost){.flops = 2.0 * elements(a->c) * inner,
                            .bytes = bytes(a->a) + bytes(a->b) + bytes(a->bias) +
                                     (a->accumulate ? 2.0 : 1.0) * bytes(a->c)};
}

struct op_cost op_cost_norm_forward(const struct norm_forward *a)
{
    return memory_only(bytes(a->x) + bytes(a->residual) + bytes(a->y) + bytes(a->sum));
}

struct op_cost op_cost_norm_backward(const struct norm_backward *a)
{
    return memory_only(bytes(a->d_y) + bytes(a->x) + bytes(a->d_residual) + bytes(a->d_x));
}

struct op_cost op_cost_qkv_split(const struct qkv_split *a)
{
    return memory_only(2.0 * bytes(a->qkv));
}

struct op_cost op_cost_attention(const struct attention *a)
{
    const double num_queries = elements(a->q) / (double)a->q->dim[3]; /* S*B*A */
    const double pairs = num_queries * (double)a->kv_length * (a->causal ? 0.5 : 1.0);

    return (struct op_cost){.flops = 4.0 * pairs * (double)a->q->dim[3],
                            .bytes = bytes(a->q) + bytes(a->k) + bytes(a->v) + bytes(a->out)};
}

/* Five products for the two of forward. */
struct op_cost op_cost_attention_backward(const struct attention_backward *a)
{
    struct op_cost cost = op_cost_attention(&a->forward);

    cost.flops *= 2.5;
    cost.bytes += bytes(a->d_out) + bytes(a->d_q) + bytes(a->d_k) + bytes(a->d_v);
    return cost;
}

struct op_cost op_cost_activation(const struct activation *a)
{
    return memory_only(bytes(a->x) + bytes(a->y) + bytes(a->d_y) + bytes(a->d_x));
}

struct op_cost op_cost_dropout(const struct dropout *a)
{
    return memory_only(bytes(a->x) + bytes(a->residual) + bytes(a->y));
}

struct op_cost op_cost_embedding(const struct embedding *a)
{
    return memory_only((a->accumulate ? 3.0 : 2.0) * bytes(a->y));
}

/* As many rows of d_weight as there are tokens, at most all of them, read and written. */
struct op_cost op_cost_embedding_backward(const struct embedding_backward *a)
{
    const double rows = elements(a->d_y) * (double)dtype_size_bytes(a->d_weight->dtype);
    const double all = bytes(a->d_weight);

    return memory_only(bytes(a->d_y) + 2.0 * (rows < all ? rows : all));
}

struct op_cost op_cost_cross_entropy(const struct cross_entropy *a)
{
    return memory_only((a->d_logits != NULL ? 2.0 : 1.0) * bytes(a->logits));
}

struct op_cost op_cost_cross_entropy_backward(const struct cross_entropy_backward *a)
{
    return memory_only(2.0 * bytes(a->logits));
}

struct op_cost op_cost_linear_combination(const struct linear_combination *a)
{
    return memory_only(bytes(a->x) + (a->b != 0.0f && a->x != a->y ? 2.0 : 1.0) * bytes(a->y));
}

struct op_cost op_cost_add(const struct add *a)
{
    return memory_only(bytes(a->u) + bytes(a->v) + bytes(a->y));
}

struct op_cost op_cost_row_gather(const struct row_gather *a)
{
    return memory_only(2.0 * bytes(a->y));
}

struct op_cost op_cost_row_sum(const struct row_sum *a)
{
    return memory_only(bytes(a->rows) + (a->residual != NULL ? 2.0 : 1.0) * bytes(a->y));
}

struct op_cost op_cost_router_linear_backward(const struct router_linear_backward *a)
{
    return (struct op_cost){.flops = 4.0 * elements(a->x) * (double)a->d_logits->dim[1],
                            .bytes = bytes(a->x) + bytes(a->d_logits) + bytes(a->weight) +
                                     2.0 * bytes(a->d_x) + bytes(a->d_weight)};
}

/* x comes row by row also where it is gathered. */
struct op_cost op_cost_experts_forward(const struct experts_forward *a)
{
    const double num_rows = (double)a->pre_activation->dim[0];
    const double weights_of_expert = (elements(a->fc1) + elements(a->fc2)) / (double)a->fc1->dim[0];
    const double row_bytes = (double)(a->fc1->dim[2] * dtype_size_bytes(a->x->dtype));

    return (struct op_cost){.flops = 2.0 * num_rows * weights_of_expert,
                            .bytes = 2.0 * num_rows * row_bytes + bytes(a->pre_activation) +
                                     bytes(a->fc1) + bytes(a->fc2)};
}

/* Reads rows of d_y too; adds to the gradients of the weights, or writes them. */
struct op_cost op_cost_experts_backward(const struct experts_backward *a)
{
    struct op_cost cost = op_cost_experts_forward(&a->forward);
    const double touches = a->overwrite_grads ? 1.0 : 2.0;

    cost.flops *= 2.0;
    cost.bytes += bytes(a->d_x) + touches * (bytes(a->d_fc1) + bytes(a->d_fc2));
    return cost;
}

static double param_bytes(const struct tensor *param, const struct tensor *master)
{
    return 2.0 * bytes(master) + (param->data != master->data ? bytes(param) : 0.0);
}

struct op_cost op_cost_adam_step(const struct adam_step *a)
{
    return memory_only(param_bytes(a->param, a->master) + 2.0 * bytes(a->exp_avg) +
                       2.0 * bytes(a->exp_avg_sq) + bytes(a->grad));
}

struct op_cost op_cost_sgd_step(const struct sgd_step *a)
{
    return memory_only(param_bytes(a->param, a->master) + 2.0 * bytes(a->momentum_buffer) +
                       bytes(a->grad));
}

struct op_cost op_cost_square_sum(const struct square_sum *a)
{
    return memory_only(bytes(a->x));
}

struct op_cost op_cost_zero_count(const struct zero_count *a)
{
    return memory_only(bytes(a->x));
}

struct op_cost op_cost_fill_zero(const struct tensor *x)
{
    return memory_only(bytes(x));
}

struct op_cost op_cost_unknown(const void *args)
{
    return (struct op_cost){0};
}
