#include "nn/lm_loss.h"

#include <stdio.h>

#include "ops/ops.h"
#include "parallel/tp_region.h"

void lm_loss_init(struct lm_loss *head, struct param_list *params, const struct groups *groups,
                  const struct lm_loss_config *config)
{
    struct param facts = {.num_dims = 2,
                          .global_shape = {config->vocab_size, config->hidden_size},
                          .init = PARAM_INIT_NORMAL,
                          .init_std = config->init_std,
                          .weight_decay = true,
                          .decoupled_lr = true,
                          .grad_is_product = true,
                          .shared_over_stages = config->is_copy_of_embedding,
                          .is_copy = config->is_copy_of_embedding};

    snprintf(facts.name, sizeof facts.name, "%s",
             config->is_copy_of_embedding ? "embedding.word_embeddings.weight"
                                          : "output_layer.weight");
    facts.box = box_whole(facts.global_shape, 2);
    facts.box = box_part(&facts.box, 0, groups->tp->rank, groups->tp->size);
    head->weight = config->tied != NULL ? config->tied : param_add(params, &facts);
}

void lm_loss_logits(const struct lm_loss *head, const struct pass *pass, struct tensor *logits,
                    const struct tensor *x)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const struct tensor all = tp_region_gather(pass->groups, pass->stream, pass->scratch, x);

    op_matmul(
        pass->stream,
        &(struct matmul){.c = logits, .a = &all, .b = &head->weight->value, .transpose_b = true});
    arena_release(pass->scratch, mark);
}

/* Turns the statistics of this rank's columns into those of the whole vocabulary (Megatron's
 * vocab-parallel cross entropy): the logits themselves are never gathered. */
static void combine_over_tp(const struct pass *pass, struct lm_loss_saved *saved,
                            struct tensor *target)
{
    struct comm *tp = pass->groups->tp;
    struct tensor local_max;

    if (tp->size == 1) {
        return;
    }
    local_max = tensor_new(pass->scratch, DTYPE_F32, saved->max.dim[0]);
    op_linear_combination(
        pass->stream, &(struct linear_combination){.y = &local_max, .x = &saved->max, .a = 1.0f});
    comm_wait(comm_all_reduce(tp, pass->stream, &saved->max, COMM_MAX), pass->stream);
    op_softmax_rescale(pass->stream, &(struct softmax_rescale){.sum_exp = &saved->sum_exp,
                                                               .local_max = &local_max,
                                                               .max = &saved->max});
    comm_wait(comm_all_reduce(tp, pass->stream, &saved->sum_exp, COMM_SUM), pass->stream);
    comm_wait(comm_all_reduce(tp, pass->stream, target, COMM_SUM), pass->stream);
}

/* A backward will follow, and needs nothing of other ranks: the logits are read once for both. */
static bool gradient_comes_early(const struct pass *pass)
{
    return pass->training && pass->groups->tp->size == 1;
}

void lm_loss_forward(const struct lm_loss *head, const struct pass *pass, struct tensor *loss,
                     const struct tensor *x, struct lm_loss_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    const int64_t num_tokens = loss->dim[0]; /* all of them, also under sequence parallelism */
    const bool early = gradient_comes_early(pass);
    struct tensor target = tensor_new(pass->scratch, DTYPE_F32, num_tokens);

    saved->x = *x;
    saved->logits = tensor_new(pass->saved, pass->dtype, num_tokens, head->weight->value.dim[0]);
    saved->max = tensor_new(pass->saved, DTYPE_F32, num_tokens);
    saved->sum_exp = tensor_new(pass->saved, DTYPE_F32, num_tokens);
    lm_loss_logits(head, pass, &saved->logits, x);
    op_cross_entropy_forward(pass->stream,
                             &(struct cross_entropy){.max = &saved->max,
                                                     .sum_exp = &saved->sum_exp,
                                                     .target = &target,
                                                     .d_logits = early ? &saved->logits : NULL,
                                                     .d_loss = early ? &pass->loss_weight : NULL,
                                                     .logits = &saved->logits,
                                                     .label = &pass->label,
                                                     .vocab_start = head->weight->box.offset[0]});
    combine_over_tp(pass, saved, &target);
    op_token_loss(pass->stream, &(struct token_loss){.loss = loss,
                                                     .max = &saved->max,
                                                     .sum_exp = &saved->sum_exp,
                                                     .target = &target});
    arena_release(pass->scratch, mark);
}

void lm_loss_backward(const struct lm_loss *head, const struct pass *pass, struct tensor *d_x,
                      struct lm_loss_saved *saved)
{
    const struct arena_mark mark = arena_mark(pass->scratch);
    struct tensor all, partial;

    if (!gradient_comes_early(pass)) {
        op_cross_entropy_backward(pass->stream, &(struct cross_entropy_backward){
                                                    .logits = &saved->logits,
                                                    .max = &saved->max,
                                                    .sum_exp = &saved->sum_exp,
                                                    .label = &pass->label,
                                                    .d_loss = &pass->loss_weight,
                                                    .vocab_start = head->weight->box.offset[0]});
    }
    all = tp_region_gather(pass->groups, pass->stream, pass->scratch, &saved->x);
    partial = tp_region_partial(pass->groups, pass->scratch, d_x);
    op_matmul(pass->stream,
              &(struct matmul){.c = &partial, .a = &saved->logits, .b = &head->weight->value});
    tp_region_reduce(pass->groups, pass->stream, d_x, &partial);
    op_matmul(pass->stream, &(struct matmul){.c = &head->weight->grad,
                                             .a = &saved->logits,
                                             .b = &all,
                                             .transpose_a = true,
                                             .accumulate = param_grad_accumulates(
                                                 head->weight, pass->overwrite_grads)});
    arena_release(pass->scratch, mark);
}
