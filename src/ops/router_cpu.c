/* The top-k router: which experts a token goes to, and with what probability. One token at a time;
 * top-k by repeated search of the best, as k is small. */
#include "ops/ops_cpu.h"
#include "ops/router_score_cpu.h"

/* Megatron's guard against a sum of sigmoid scores that is zero. */
static const float sum_epsilon = 1e-20f;

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

/* Whether the probabilities are a softmax over the chosen logits only. */
static bool is_softmax_of_chosen(const struct router_rule *rule)
{
    return rule->score == ROUTER_SOFTMAX && (!rule->pre_softmax || rule->renormalize);
}

/* probs = softmax of the chosen logits. Their maximum need not be the first: the selection may be
 * another than the logits. */
static void softmax_of_chosen(float *probs, const float *logits, const int32_t *indices, int topk)
{
    float max = logits[indices[0]], sum = 0.0f;

    for (int k = 1; k < topk; k++) {
        max = fmaxf(max, logits[indices[k]]);
    }
    for (int k = 0; k < topk; k++) {
        probs[k] = fast_exp(logits[indices[k]] - max);
        sum += probs[k];
    }
    for (int k = 0; k < topk; k++) {
        probs[k] /= sum;
    }
}

/* The sum by which sigmoid scores are divided; 1 for top-1, which is not normalised. */
static float sigmoid_divisor(const float *scores, const int32_t *indices, int topk)
{
    float sum = 0.0f;

    if (topk == 1) {
        return 1.0f;
    }
    for (int k = 0; k < topk; k++) {
        sum += scores[indices[k]];
    }
    return sum + sum_epsilon;
}

static void token_probs(const struct router_rule *rule, float *probs, const int32_t *indices,
                        const float *logits, const float *scores)
{
    if (is_softmax_of_chosen(rule)) {
        softmax_of_chosen(probs, logits, indices, rule->topk);
    } else {
        const float divisor =
            rule->score == ROUTER_SIGMOID ? sigmoid_divisor(scores, indices, rule->topk) : 1.0f;

        for (int k = 0; k < rule->topk; k++) {
            probs[k] = scores[indices[k]] / divisor;
        }
    }
    for (int k = 0; k < rule->topk; k++) {
        probs[k] *= rule->scaling_factor;
    }
}

static void token_scores(const struct router_rule *rule, float *scores, const float *logits,
                         int64_t num_experts)
{
    if (rule->score == ROUTER_SIGMOID) {
        router_sigmoid(scores, logits, num_experts);
    } else {
        router_softmax(scores, logits, num_experts);
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

    token_scores(rule, scores, logits, num_experts);
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

/* p = softmax of the chosen: d_l[k] += p_k (d_k - sum_j p_j d_j). */
static void chosen_softmax_backward(const struct router_rule *rule, float *d_logits,
                                    const float *d_probs, const float *logits,
                                    const int32_t *indices, float *probs)
{
    float mean = 0.0f;

    softmax_of_chosen(probs, logits, indices, rule->topk);
    for (int k = 0; k < rule->topk; k++) {
        mean += probs[k] * d_probs[k];
    }
    for (int k = 0; k < rule->topk; k++) {
        d_logits[indices[k]] += rule->scaling_factor * probs[k] * (d_probs[k] - mean);
    }
}

/* p_k = s_k / D, D = sum_j s_j + epsilon (1 for k = 1): d_s[k] = (d_k - sum_j p_j d_j) / D, d_l =
 * d_s s (1-s). */
static void sigmoid_backward(const struct router_rule *rule, float *d_logits, const float *d_probs,
                             const int32_t *indices, const float *scores)
{
    const float divisor = sigmoid_divisor(scores, indices, rule->topk);
    float mean = 0.0f;

    for (int k = 0; rule->topk > 1 && k < rule->topk; k++) {
        mean += scores[indices[k]] / divisor * d_probs[k];
    }
    for (int k = 0; k < rule->topk; k++) {
        const float s = scores[indices[k]];

        d_logits[indices[k]] +=
            rule->scaling_factor * (d_probs[k] - mean) / divisor * s * (1.0f - s);
    }
}

/* work: 2 * num_experts floats. */
static void route_token_backward(const struct router_topk_backward *op, int64_t token, float *work)
{
    const struct router_rule *rule = &op->rule;
    const int64_t num_experts = op->logits->dim[1];
    const float *logits = (const float *)op->logits->data + token * num_experts;
    const float *d_probs = (const float *)op->d_probs->data + token * rule->topk;
    const int32_t *indices = (const int32_t *)op->indices->data + token * rule->topk;
    float *d_logits = (float *)op->d_logits->data + token * num_experts;
    float *scores = work, *d_scores = work + num_experts;

    if (is_softmax_of_chosen(rule)) {
        chosen_softmax_backward(rule, d_logits, d_probs, logits, indices, work);
        return;
    }
    token_scores(rule, scores, logits, num_experts);
    if (rule->score == ROUTER_SIGMOID) {
        sigmoid_backward(rule, d_logits, d_probs, indices, scores);
        return;
    }
    memset(d_scores, 0, (size_t)num_experts * sizeof *d_scores);
    for (int k = 0; k < rule->topk; k++) {
        d_scores[indices[k]] = rule->scaling_factor * d_probs[k];
    }
    router_softmax_backward(d_logits, d_scores, scores, num_experts);
}

void router_topk_backward_cpu(struct stream *stream, const struct router_topk_backward *op)
{
    const int64_t num_tokens = op->logits->dim[0], num_experts = op->logits->dim[1];
    const struct thread_floats work = thread_floats_new(stream, 2 * num_experts);

#pragma omp parallel for schedule(static) if (num_tokens * num_experts > OPS_PARALLEL_MIN / 8)
    for (int64_t t = 0; t < num_tokens; t++) {
        route_token_backward(op, t, thread_floats_mine(&work));
    }
}
