/* The gradient of the router: of its logits, by which it chose and was balanced, and of its linear
 * layer. */
#include "ops/ops_cpu.h"
#include "ops/router_score_cpu.h"

/* p = softmax of the chosen: d_l[k] += p_k (d_k - sum_j p_j d_j). */
static void add_chosen_softmax(const struct router_rule *rule, float *d_logits,
                               const float *d_probs, const float *logits, const int32_t *indices,
                               float *probs)
{
    float mean = 0.0f;

    router_softmax_of_chosen(probs, logits, indices, rule->topk);
    for (int k = 0; k < rule->topk; k++) {
        mean += probs[k] * d_probs[k];
    }
    for (int k = 0; k < rule->topk; k++) {
        d_logits[indices[k]] += rule->scaling_factor * probs[k] * (d_probs[k] - mean);
    }
}

/* p_k = s_k / D, D = sum_j s_j + epsilon (1 for k = 1): d_s[k] = (d_k - sum_j p_j d_j) / D, d_l =
 * d_s s (1-s). */
static void add_chosen_sigmoid(const struct router_rule *rule, float *d_logits,
                               const float *d_probs, const int32_t *indices, const float *scores)
{
    const float divisor = router_sigmoid_divisor(scores, indices, rule->topk);
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

/* Through the probabilities. work: 2 * num_experts floats. */
static void add_probs(const struct router_backward *op, float *d_logits, const float *logits,
                      int64_t token, float *work)
{
    const struct router_rule *rule = &op->rule;
    const int64_t num_experts = op->logits->dim[1];
    const float *d_probs = (const float *)op->d_probs->data + token * rule->topk;
    const int32_t *indices = (const int32_t *)op->indices->data + token * rule->topk;
    float *scores = work, *d_scores = work + num_experts;

    if (router_is_softmax_of_chosen(rule)) {
        add_chosen_softmax(rule, d_logits, d_probs, logits, indices, work);
        return;
    }
    router_scores(rule->score, scores, logits, num_experts);
    if (rule->score == ROUTER_SIGMOID) {
        add_chosen_sigmoid(rule, d_logits, d_probs, indices, scores);
        return;
    }
    memset(d_scores, 0, (size_t)num_experts * sizeof *d_scores);
    for (int k = 0; k < rule->topk; k++) {
        d_scores[indices[k]] = rule->scaling_factor * d_probs[k];
    }
    router_softmax_backward(d_logits, d_scores, scores, num_experts);
}

/* Through the scores of the balancing losses: d_u = the sum of scale * counts. With u = s / D, D =
 * sum s + epsilon: d_s = (d_u - sum_j u_j d_u_j) / D and d_l = d_s s (1 - s), s = u D. */
static void add_balance(const struct router_backward *op, float *d_logits, const float *logits,
                        int64_t token, float *work)
{
    const int64_t num_experts = op->logits->dim[1];
    float *scores = work, *d_scores = work + num_experts, mean;
    const float divisor = router_balance_scores(op->rule.score, scores, logits, num_experts);

    memset(d_scores, 0, (size_t)num_experts * sizeof *d_scores);
    for (int i = 0; i < op->num_balance_terms; i++) {
        const struct tensor *counts = op->balance[i].counts;
        const float *mine = (const float *)counts->data + token % counts->dim[0] * num_experts;

        for (int64_t e = 0; e < num_experts; e++) {
            d_scores[e] += op->balance[i].scale * mine[e];
        }
    }
    if (op->rule.score == ROUTER_SOFTMAX) {
        router_softmax_backward(d_logits, d_scores, scores, num_experts);
        return;
    }
    mean = floats_dot(scores, d_scores, num_experts);
    for (int64_t e = 0; e < num_experts; e++) {
        d_logits[e] += (d_scores[e] - mean) * scores[e] * (1.0f - scores[e] * divisor);
    }
}

/* d logsumexp(l)^2 / d_l = 2 logsumexp(l) softmax(l). */
static void add_z(const struct router_backward *op, float *d_logits, const float *logits,
                  float *scores)
{
    const int64_t num_tokens = op->logits->dim[0], num_experts = op->logits->dim[1];
    const float z = router_softmax(scores, logits, num_experts);
    const float scale = op->z_scale * 2.0f * z / (float)num_tokens;

#pragma omp simd
    for (int64_t e = 0; e < num_experts; e++) {
        d_logits[e] += scale * scores[e];
    }
}

static void token_backward(const struct router_backward *op, int64_t token, float *work)
{
    const int64_t num_experts = op->logits->dim[1];
    const float *logits = (const float *)op->logits->data + token * num_experts;
    float *d_logits = (float *)op->d_logits->data + token * num_experts;

    memset(d_logits, 0, (size_t)num_experts * sizeof *d_logits);
    if (op->d_probs != NULL) {
        add_probs(op, d_logits, logits, token, work);
    }
    if (op->num_balance_terms > 0) {
        add_balance(op, d_logits, logits, token, work);
    }
    if (op->z_scale != 0.0f) {
        add_z(op, d_logits, logits, work);
    }
}

void router_backward_cpu(struct stream *stream, const struct router_backward *op)
{
    const int64_t num_tokens = op->logits->dim[0], num_experts = op->logits->dim[1];
    const struct thread_floats work = thread_floats_new(stream, 2 * num_experts);

#pragma omp parallel for schedule(static) if (num_tokens * num_experts > OPS_PARALLEL_MIN / 8)
    for (int64_t t = 0; t < num_tokens; t++) {
        token_backward(op, t, thread_floats_mine(&work));
    }
}

/* x in f32: itself, or a converted copy in scratch. */
static struct tensor as_f32(struct stream *stream, const struct tensor *x)
{
    struct tensor copy;

    if (x->dtype == DTYPE_F32) {
        return *x;
    }
    copy = tensor_allocate(stream->scratch, DTYPE_F32, x->dim, x->num_dims);
    linear_combination_cpu(stream, &(struct linear_combination){.y = &copy, .x = x, .a = 1.0f});
    return copy;
}

void router_linear_backward_cpu(struct stream *stream, const struct router_linear_backward *op)
{
    const struct tensor x = as_f32(stream, op->x), weight = as_f32(stream, op->weight);
    struct tensor d_x = *op->d_x;

    matmul_cpu(stream, &(struct matmul){.c = op->d_weight,
                                        .a = op->d_logits,
                                        .b = &x,
                                        .transpose_a = true,
                                        .accumulate = !op->overwrite_grads});
    if (d_x.dtype == DTYPE_F32) {
        matmul_cpu(stream, &(struct matmul){
                               .c = &d_x, .a = op->d_logits, .b = &weight, .accumulate = true});
        return;
    }
    d_x = tensor_allocate(stream->scratch, DTYPE_F32, d_x.dim, 2);
    matmul_cpu(stream, &(struct matmul){.c = &d_x, .a = op->d_logits, .b = &weight});
    linear_combination_cpu(
        stream, &(struct linear_combination){.y = op->d_x, .x = &d_x, .a = 1.0f, .b = 1.0f});
}
