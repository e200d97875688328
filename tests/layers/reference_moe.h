/* reference_moe.h - the router, its losses and the mixture of experts as plain loops in double
 * precision.
 *
 * Which experts a token goes to carries no gradient and is taken from the layer (struct routing): a
 * difference quotient must not jump from one choice to another. That the choice itself is right is
 * asserted by assert_topk_is_best. */
#ifndef CADRE_TESTS_LAYERS_REFERENCE_MOE_H
#define CADRE_TESTS_LAYERS_REFERENCE_MOE_H

#include "moe/metrics.h"
#include "moe/moe_layer.h"
#include "reference_nn.h"

/* The choices of a forward pass. */
struct routing {
    const int32_t *chosen, *kept;      /* [T,K]; kept is -1 where dropped */
    double *counts[NUM_BALANCE_TYPES]; /* [C,E] of each balancing loss that is on */
};

static inline struct routing routing_of(const struct router *router,
                                        const struct router_saved *saved)
{
    struct routing routing = {.chosen = saved->chosen.data, .kept = saved->indices.data};

    for (int type = 0; type < NUM_BALANCE_TYPES; type++) {
        if (router->config.balance.coefficient[type] != 0.0f) {
            routing.counts[type] = doubles_of(&saved->balance.counts[type]);
        }
    }
    return routing;
}

/* logits[T,E] of x[T,H]. */
static inline double *reference_router_logits(const struct router *router, const double *x,
                                              int64_t t)
{
    const struct router_config *config = &router->config;
    const int64_t h = config->hidden_size;
    const struct rng_key key = rng_key(world.pass.seed, "router_jitter", (uint64_t)config->layer);
    double *jittered = new_doubles(t * h);

    for (int64_t i = 0; i < t * h; i++) {
        const uint64_t row = (uint64_t)tensor_get(&world.pass.token_id, i / h);
        const double u = rng_uniform(key, row, (uint64_t)(i % h));

        jittered[i] =
            x[i] * (1.0 - (double)config->jitter_eps + 2.0 * (double)config->jitter_eps * u);
    }
    return reference_product(jittered, values_of(router->weight), NULL, t, h, config->num_experts);
}

/* Sigmoid, or softmax over all experts. */
static inline double *reference_scores(enum router_score kind, const double *logits, int64_t e)
{
    double *scores = new_doubles(e), sum = 0.0;

    for (int64_t i = 0; i < e; i++) {
        scores[i] = kind == ROUTER_SIGMOID ? 1.0 / (1.0 + exp(-logits[i])) : exp(logits[i]);
        sum += scores[i];
    }
    for (int64_t i = 0; i < e && kind == ROUTER_SOFTMAX; i++) {
        scores[i] /= sum;
    }
    return scores;
}

/* probs[K] of a token's chosen experts (M1.4, M1.5, M1.9). */
static inline void reference_token_probs(const struct router_rule *rule, const double *logits,
                                         int64_t e, const int32_t *chosen, double *probs)
{
    const double *scores = reference_scores(rule->score, logits, e);
    const bool divide =
        rule->score == ROUTER_SIGMOID ? rule->topk > 1 : !rule->pre_softmax || rule->renormalize;
    double sum = 0.0;

    for (int k = 0; k < rule->topk; k++) {
        sum += scores[chosen[k]];
    }
    for (int k = 0; k < rule->topk; k++) {
        probs[k] = scores[chosen[k]] / (divide ? sum : 1.0) * (double)rule->scaling_factor;
    }
}

/* probs[T,K], 0 where dropped. */
static inline double *reference_probs(const struct router *router, const struct routing *routing,
                                      const double *logits, int64_t t)
{
    const int64_t e = router->config.num_experts;
    const int topk = router->config.rule.topk;
    double *probs = new_doubles(t * topk);

    for (int64_t i = 0; i < t; i++) {
        reference_token_probs(&router->config.rule, logits + i * e, e, routing->chosen + i * topk,
                              probs + i * topk);
    }
    for (int64_t slot = 0; slot < t * topk; slot++) {
        if (routing->kept[slot] < 0) {
            probs[slot] = 0.0;
        }
    }
    return probs;
}

/* sum over the columns c of E / (T_c^2 k) sum_e counts[c,e] * sum of the column's scores, over the
 * number of columns (M1.7). */
static inline double reference_balance_loss(const struct router *router, const double *counts,
                                            int64_t num_columns, const double *logits, int64_t t)
{
    const struct router_config *config = &router->config;
    const int64_t e = config->num_experts, column_tokens = t / num_columns;
    double loss = 0.0;

    for (int64_t i = 0; i < t; i++) {
        const double *scores = reference_scores(config->rule.score, logits + i * e, e);
        double sum = 0.0;

        for (int64_t j = 0; j < e; j++) {
            sum += scores[j];
        }
        loss += dot(scores, counts + i % num_columns * e, e) / sum;
    }
    return loss * (double)e / ((double)(column_tokens * column_tokens) * config->rule.topk) /
           (double)num_columns;
}

static inline double reference_z_loss(const double *logits, int64_t t, int64_t e)
{
    double loss = 0.0;

    for (int64_t i = 0; i < t; i++) {
        double sum = 0.0;

        for (int64_t j = 0; j < e; j++) {
            sum += exp(logits[i * e + j]);
        }
        loss += log(sum) * log(sum) / (double)t;
    }
    return loss;
}

/* Everything that the router adds to the loss: coefficients times losses. */
static inline double reference_router_losses(const struct router *router,
                                             const struct routing *routing, const double *logits,
                                             int64_t t)
{
    const struct router_config *config = &router->config;
    double total =
        (double)config->z_loss_coefficient * reference_z_loss(logits, t, config->num_experts);

    for (int type = 0; type < NUM_BALANCE_TYPES; type++) {
        if (config->balance.coefficient[type] != 0.0f) {
            const int64_t columns = type == BALANCE_SEQ_AUX_LOSS ? world.pass.num_sequences : 1;

            total += (double)config->balance.coefficient[type] *
                     reference_balance_loss(router, routing->counts[type], columns, logits, t);
        }
    }
    return total;
}

/* y[H] += prob * expert(x[H]). */
static inline void reference_expert(const struct experts *experts, int64_t expert, const double *x,
                                    double prob, double *y)
{
    const int64_t h = experts->config.hidden_size, f = experts->config.ffn_hidden_size;
    const int64_t f1 = experts->config.activation == ACTIVATION_SWIGLU ? 2 * f : f;
    const bool bias = experts->config.bias;
    const double *fc1 = values_of(experts->fc1) + expert * f1 * h;
    const double *fc2 = values_of(experts->fc2) + expert * h * f;
    const double *hidden = reference_product(
        x, fc1, bias ? values_of(experts->fc1_bias) + expert * f1 : NULL, 1, h, f1);
    double *a = new_doubles(f), *out;

    for (int64_t i = 0; i < f; i++) {
        a[i] = reference_activation(experts->config.activation, hidden, f, i);
    }
    out =
        reference_product(a, fc2, bias ? values_of(experts->fc2_bias) + expert * h : NULL, 1, f, h);
    for (int64_t i = 0; i < h; i++) {
        y[i] += prob * out[i];
    }
}

/* y[T,H] of the whole block; *losses += what its router adds. */
static inline double *reference_moe(const struct moe_layer *moe, const struct routing *routing,
                                    const double *x, int64_t t, double *losses)
{
    const int64_t h = moe->router.config.hidden_size;
    const int topk = moe->router.config.rule.topk;
    const double *logits = reference_router_logits(&moe->router, x, t);
    const double *probs = reference_probs(&moe->router, routing, logits, t);
    double *y =
        moe->has_shared_expert ? reference_mlp(&moe->shared_expert, x, t) : new_doubles(t * h);

    for (int64_t slot = 0; slot < t * topk; slot++) {
        if (routing->kept[slot] >= 0) {
            reference_expert(&moe->experts, routing->kept[slot], x + slot / topk * h, probs[slot],
                             y + slot / topk * h);
        }
    }
    *losses += reference_router_losses(&moe->router, routing, logits, t);
    return y;
}

/* No expert outside a token's choice has a selection[T,E] above one inside, beyond rounding; the
 * choice is in falling order and without repetition. */
static inline void assert_topk_is_best(const double *selection, const struct tensor *chosen,
                                       int64_t e)
{
    const int64_t t = chosen->dim[0], topk = chosen->dim[1];

    for (int64_t i = 0; i < t; i++) {
        const int32_t *mine = (const int32_t *)chosen->data + i * topk;
        bool *is_mine = arena_allocate(arena, (size_t)e);

        memset(is_mine, 0, (size_t)e);
        for (int64_t k = 0; k < topk; k++) {
            assert_in_range(mine[k], 0, e - 1);
            assert_false(is_mine[mine[k]]);
            is_mine[mine[k]] = true;
            assert_true(k == 0 ||
                        selection[i * e + mine[k]] <= selection[i * e + mine[k - 1]] + 1e-5);
        }
        for (int64_t j = 0; j < e; j++) {
            assert_true(is_mine[j] ||
                        selection[i * e + j] <= selection[i * e + mine[topk - 1]] + 1e-5);
        }
    }
}

#endif
