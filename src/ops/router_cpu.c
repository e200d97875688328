/* The top-k router: which experts a token goes to, and with what probability. One token at a time;
 * top-k by repeated search of the best, as k is small. */
#include "ops/ops_cpu.h"
#include "ops/router_score_cpu.h"

static bool is_chosen(const int32_t *indices, int num_chosen, int64_t expert)
{
    for (int k = 0; k < num_chosen; k++) {
        if (indices[k] == expert) {
            return true;
        }
    }
    return false;
}

/* indices = the topk largest of values[n], falling, equal ones by index. NaN compares as smaller
 * than nothing, so that the result is distinct indices whatever the values. */
static void choose_topk(int32_t *indices, int topk, const float *values, int64_t n)
{
    for (int k = 0; k < topk; k++) {
        int64_t best = -1;

        for (int64_t i = 0; i < n; i++) {
            if ((best < 0 || values[i] > values[best]) && !is_chosen(indices, k, i)) {
                best = i;
            }
        }
        indices[k] = (int32_t)best;
    }
}

/* Excludes (-infinity) the experts outside the group_topk best groups. A group's score is the sum
 * of its topk / group_topk best experts (M1.6). */
static void limit_groups(const struct router_rule *rule, float *selection, float *group_scores,
                         int32_t *chosen, int64_t num_experts)
{
    const int64_t group_size = num_experts / rule->num_groups;
    const int num_best = rule->topk / rule->group_topk;

    for (int g = 0; g < rule->num_groups; g++) {
        const float *group = selection + g * group_size;

        choose_topk(chosen, num_best, group, group_size);
        group_scores[g] = 0.0f;
        for (int i = 0; i < num_best; i++) {
            group_scores[g] += group[chosen[i]];
        }
    }
    choose_topk(chosen, rule->group_topk, group_scores, rule->num_groups);
    for (int g = 0; g < rule->num_groups; g++) {
        if (!is_chosen(chosen, rule->group_topk, g)) {
            for (int64_t e = g * group_size; e < (g + 1) * group_size; e++) {
                selection[e] = -INFINITY;
            }
        }
    }
}

static void token_probs(const struct router_rule *rule, float *probs, const int32_t *indices,
                        const float *logits, const float *scores)
{
    if (router_is_softmax_of_chosen(rule)) {
        router_softmax_of_chosen(probs, logits, indices, rule->topk);
    } else {
        const float divisor = rule->score == ROUTER_SIGMOID
                                  ? router_sigmoid_divisor(scores, indices, rule->topk)
                                  : 1.0f;

        for (int k = 0; k < rule->topk; k++) {
            probs[k] = scores[indices[k]] / divisor;
        }
    }
    for (int k = 0; k < rule->topk; k++) {
        probs[k] *= rule->scaling_factor;
    }
}

/* work: 4 * num_experts floats. */
static void route_token(const struct router_topk *op, int64_t token, float *work)
{
    const struct router_rule *rule = &op->rule;
    const int64_t num_experts = op->logits->dim[1];
    const float *logits = (const float *)op->logits->data + token * num_experts;
    int32_t *indices = (int32_t *)op->indices->data + token * rule->topk;
    float *scores = work, *selection = work + num_experts, *group_scores = work + 2 * num_experts;
    const float *chosen_by = scores;

    router_scores(rule->score, scores, logits, num_experts);
    if (op->selection != NULL) {
        chosen_by = (const float *)op->selection->data + token * num_experts;
    } else if (rule->score == ROUTER_SOFTMAX && !rule->pre_softmax) {
        chosen_by = logits;
    }
    for (int64_t e = 0; e < num_experts; e++) {
        selection[e] = chosen_by[e];
        if (op->expert_bias != NULL) {
            selection[e] += ((const float *)op->expert_bias->data)[e];
        }
    }
    if (rule->num_groups > 0) {
        limit_groups(rule, selection, group_scores, (int32_t *)(work + 3 * num_experts),
                     num_experts);
    }
    choose_topk(indices, rule->topk, selection, num_experts);
    token_probs(rule, (float *)op->probs->data + token * rule->topk, indices, logits, scores);
}

void router_topk_forward_cpu(struct stream *stream, const struct router_topk *op)
{
    const int64_t num_tokens = op->logits->dim[0], num_experts = op->logits->dim[1];
    const struct thread_floats work = thread_floats_new(stream, 4 * num_experts);

#pragma omp parallel for schedule(static) if (num_tokens * num_experts > OPS_PARALLEL_MIN / 8)
    for (int64_t t = 0; t < num_tokens; t++) {
        route_token(op, t, thread_floats_mine(&work));
    }
}
