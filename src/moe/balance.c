#include "moe/balance.h"

#include "moe/metrics.h"

void balance_init(struct balance *balance, const struct balance_config *config,
                  struct stream *stream, struct arena *run)
{
    balance->config = *config;
    balance->global_counts = tensor_new(run, DTYPE_F32, 1, config->num_experts);
    balance_reset(balance, stream);
}

void balance_reset(struct balance *balance, struct stream *stream)
{
    op_fill_zero(stream, &balance->global_counts);
    balance->num_microbatches = 0;
}

/* Sums this microbatch's counts into the running ones and returns their mean in saved memory. */
static struct tensor global_mean_counts(struct balance *balance, const struct pass *pass,
                                        struct tensor *counts)
{
    struct tensor mean = tensor_new(pass->saved, DTYPE_F32, 1, balance->config.num_experts);

    comm_wait(comm_all_reduce(pass->groups->dp, pass->stream, counts, COMM_SUM), pass->stream);
    if (!pass->recompute) {
        op_linear_combination(pass->stream,
                              &(struct linear_combination){
                                  .y = &balance->global_counts, .x = counts, .a = 1.0f, .b = 1.0f});
        balance->num_microbatches++;
    }
    op_linear_combination(
        pass->stream, &(struct linear_combination){.y = &mean,
                                                   .x = &balance->global_counts,
                                                   .a = 1.0f / (float)balance->num_microbatches});
    return mean;
}

/* E / (T * T_local * k) of one loss; seq_aux_loss also divides by the number of sequences. */
static float balance_factor(const struct balance *balance, const struct pass *pass,
                            enum balance_type type, int64_t num_tokens)
{
    const double experts_per_slot =
        (double)balance->config.num_experts / (double)balance->config.topk;
    const double local = (double)num_tokens * pass->groups->tp_cp->size;

    switch (type) {
    case BALANCE_SEQ_AUX_LOSS: {
        const double sequence = local / (double)pass->num_sequences;

        return (float)(experts_per_slot / (sequence * sequence * (double)pass->num_sequences));
    }
    case BALANCE_GLOBAL_AUX_LOSS:
        return (float)(experts_per_slot / (local * local * pass->groups->dp->size));
    default:
        return (float)(experts_per_slot / (local * local));
    }
}

static void one_loss_forward(struct balance *balance, const struct pass *pass,
                             enum balance_type type, const struct tensor *logits,
                             const struct tensor *indices, struct balance_saved *saved)
{
    static const enum moe_metric metric_of[NUM_BALANCE_TYPES] = {
        [BALANCE_AUX_LOSS] = MOE_LOAD_BALANCING_LOSS,
        [BALANCE_SEQ_AUX_LOSS] = MOE_SEQ_LOAD_BALANCING_LOSS,
        [BALANCE_GLOBAL_AUX_LOSS] = MOE_GLOBAL_LOAD_BALANCING_LOSS,
    };
    const int num_experts = balance->config.num_experts;
    const int64_t columns = type == BALANCE_SEQ_AUX_LOSS ? pass->num_sequences : 1;
    const struct arena_mark mark = arena_mark(pass->scratch);
    struct tensor counts = tensor_new(pass->saved, DTYPE_F32, columns, num_experts);
    struct tensor score_sums = tensor_new(pass->scratch, DTYPE_F32, columns, num_experts);
    struct tensor loss = tensor_new(pass->scratch, DTYPE_F32, 1);

    op_router_balance(pass->stream, &(struct router_balance){.score = balance->config.score,
                                                             .counts = &counts,
                                                             .score_sums = &score_sums,
                                                             .logits = logits,
                                                             .indices = indices});
    comm_wait(comm_all_reduce(pass->groups->tp_cp, pass->stream, &counts, COMM_SUM), pass->stream);
    saved->counts[type] = counts;
    if (type == BALANCE_GLOBAL_AUX_LOSS) {
        saved->counts[type] = global_mean_counts(balance, pass, &counts);
    }
    op_router_balance_loss(pass->stream,
                           &(struct router_balance_loss){
                               .loss = &loss,
                               .counts = &saved->counts[type],
                               .score_sums = &score_sums,
                               .factor = balance_factor(balance, pass, type, logits->dim[0])});
    if (!pass->recompute) {
        moe_metrics_add(pass->metrics, pass->stream, metric_of[type], balance->config.layer, &loss);
    }
    arena_release(pass->scratch, mark);
}

void balance_forward(struct balance *balance, const struct pass *pass, const struct tensor *logits,
                     const struct tensor *indices, struct balance_saved *saved)
{
    for (int type = 0; type < NUM_BALANCE_TYPES; type++) {
        if (balance->config.coefficient[type] != 0.0f) {
            one_loss_forward(balance, pass, type, logits, indices, saved);
        }
    }
}

void balance_add_terms(const struct balance *balance, const struct pass *pass, int64_t num_tokens,
                       const struct balance_saved *saved, struct router_backward *op)
{
    for (int type = 0; type < NUM_BALANCE_TYPES; type++) {
        const float coefficient = balance->config.coefficient[type];

        if (coefficient != 0.0f) {
            op->balance[op->num_balance_terms++] = (struct router_balance_term){
                .counts = &saved->counts[type],
                .scale = pass->aux_loss_scale * coefficient *
                         balance_factor(balance, pass, type, num_tokens)};
        }
    }
}
