/* op_cost.h - what an op has to do at the least, whatever runs it: floating-point operations of its
 * products, and bytes of memory, each operand read or written once. Over the rates of a machine
 * they give the shortest time that the op can take there. */
#ifndef CADRE_OPS_OP_COST_H
#define CADRE_OPS_OP_COST_H

#include <stdio.h>

#include "ops/ops.h"

struct op_cost {
    double flops, bytes; /* both 0: not known */
};

/* What a machine reaches. */
struct op_roof {
    double flops_per_second, bytes_per_second; /* 0: not measured */
};

/* Seconds that the cost takes at the roof; 0 where one of them is not known. */
double op_cost_seconds(const struct op_cost *cost, const struct op_roof *roof);
/* " 281.20 TFLOP/s" (unit "FLOP"), or in units of 10^9 where it is little. */
void op_rate_print(FILE *file, double rate, const char *unit);

struct op_cost op_cost_matmul(const struct matmul *args);
struct op_cost op_cost_norm_forward(const struct norm_forward *args);
struct op_cost op_cost_norm_backward(const struct norm_backward *args);
struct op_cost op_cost_qkv_split(const struct qkv_split *args);
/* Causal: half of the pairs of a query and a key. The ends of documents are not counted. */
struct op_cost op_cost_attention(const struct attention *args);
struct op_cost op_cost_attention_backward(const struct attention_backward *args);
struct op_cost op_cost_activation(const struct activation *args);
struct op_cost op_cost_dropout(const struct dropout *args);
struct op_cost op_cost_embedding(const struct embedding *args);
struct op_cost op_cost_embedding_backward(const struct embedding_backward *args);
struct op_cost op_cost_cross_entropy(const struct cross_entropy *args);
struct op_cost op_cost_cross_entropy_backward(const struct cross_entropy_backward *args);
struct op_cost op_cost_linear_combination(const struct linear_combination *args);
struct op_cost op_cost_add(const struct add *args);
struct op_cost op_cost_row_gather(const struct row_gather *args);
struct op_cost op_cost_row_sum(const struct row_sum *args);
struct op_cost op_cost_router_linear_backward(const struct router_linear_backward *args);
/* All rows that there is room for. */
struct op_cost op_cost_experts_forward(const struct experts_forward *args);
struct op_cost op_cost_experts_backward(const struct experts_backward *args);
struct op_cost op_cost_adam_step(const struct adam_step *args);
struct op_cost op_cost_sgd_step(const struct sgd_step *args);
struct op_cost op_cost_square_sum(const struct square_sum *args);
struct op_cost op_cost_zero_count(const struct zero_count *args);
struct op_cost op_cost_fill_zero(const struct tensor *x);
struct op_cost op_cost_unknown(const void *args);

/* Of an op's argument struct. */
#define OP_COST(args)                                                                              \
    _Generic((args),                                                                               \
        const struct matmul *: op_cost_matmul,                                                     \
        const struct norm_forward *: op_cost_norm_forward,                                         \
        const struct norm_backward *: op_cost_norm_backward,                                       \
        const struct qkv_split *: op_cost_qkv_split,                                               \
        const struct attention *: op_cost_attention,                                               \
        const struct attention_backward *: op_cost_attention_backward,                             \
        const struct activation *: op_cost_activation,                                             \
        const struct dropout *: op_cost_dropout,                                                   \
        const struct embedding *: op_cost_embedding,                                               \
        const struct embedding_backward *: op_cost_embedding_backward,                             \
        const struct cross_entropy *: op_cost_cross_entropy,                                       \
        const struct cross_entropy_backward *: op_cost_cross_entropy_backward,                     \
        const struct linear_combination *: op_cost_linear_combination,                             \
        const struct add *: op_cost_add,                                                           \
        const struct row_gather *: op_cost_row_gather,                                             \
        const struct row_sum *: op_cost_row_sum,                                                   \
        const struct router_linear_backward *: op_cost_router_linear_backward,                     \
        const struct experts_forward *: op_cost_experts_forward,                                   \
        const struct experts_backward *: op_cost_experts_backward,                                 \
        const struct adam_step *: op_cost_adam_step,                                               \
        const struct sgd_step *: op_cost_sgd_step,                                                 \
        const struct square_sum *: op_cost_square_sum,                                             \
        const struct zero_count *: op_cost_zero_count,                                             \
        default: op_cost_unknown)(args)

#endif
