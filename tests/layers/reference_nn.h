/* reference_nn.h - the layers of src/nn as plain loops in double precision. Results are in the
 * arena. */
#ifndef CADRE_TESTS_LAYERS_REFERENCE_NN_H
#define CADRE_TESTS_LAYERS_REFERENCE_NN_H

#include "nn/attention.h"
#include "nn/embedding.h"
#include "nn/lm_loss.h"
#include "nn/mlp.h"
#include "nn/norm.h"
#include "nn/rope.h"
#include "reference.h"

/* y[T,N] = x[T,M] W[N,M]^T + bias[N] (or NULL). */
static inline double *reference_product(const double *x, const double *weight, const double *bias,
                                        int64_t t, int64_t m, int64_t n)
{
    double *y = new_doubles(t * n);

    for (int64_t i = 0; i < t; i++) {
        for (int64_t j = 0; j < n; j++) {
            y[i * n + j] = dot(x + i * m, weight + j * m, m) + (bias != NULL ? bias[j] : 0.0);
        }
    }
    return y;
}

static inline double *reference_linear(const struct linear *linear, const double *x, int64_t t)
{
    return reference_product(x, values_of(linear->weight),
                             linear->bias != NULL ? values_of(linear->bias) : NULL, t,
                             linear->in_features, linear->out_features);
}

static inline double *reference_norm(const struct norm *norm, const double *x, int64_t t, int64_t h)
{
    const double *weight = values_of(norm->weight);
    double *y = new_doubles(t * h);

    for (int64_t i = 0; i < t; i++) {
        const double *row = x + i * h;
        double mean = 0.0, square = 0.0;

        for (int64_t j = 0; j < h && norm->kind == NORM_LAYERNORM; j++) {
            mean += row[j] / (double)h;
        }
        for (int64_t j = 0; j < h; j++) {
            square += (row[j] - mean) * (row[j] - mean) / (double)h;
        }
        for (int64_t j = 0; j < h; j++) {
            const double w = norm->one_plus ? 1.0 + weight[j] : weight[j];

            y[i * h + j] = (row[j] - mean) / sqrt(square + (double)norm->eps) * w;
            if (norm->kind == NORM_LAYERNORM) {
                y[i * h + j] += values_of(norm->bias)[j];
            }
        }
    }
    return y;
}

static inline double reference_gelu(double x)
{
    return 0.5 * x * (1.0 + tanh(sqrt(2.0 / 3.14159265358979323846) * (x + 0.044715 * x * x * x)));
}

/* Element i of act(h), h[F1]. */
static inline double reference_activation(enum activation_kind kind, const double *h, int64_t f,
                                          int64_t i)
{
    switch (kind) {
    case ACTIVATION_SWIGLU:
        return h[i] / (1.0 + exp(-h[i])) * h[f + i];
    case ACTIVATION_GELU:
        return reference_gelu(h[i]);
    case ACTIVATION_SQUARED_RELU:
        return h[i] > 0.0 ? h[i] * h[i] : 0.0;
    }
    fail_msg("activation %d", (int)kind);
    return 0.0;
}

static inline double *reference_mlp(const struct mlp *mlp, const double *x, int64_t t)
{
    const int64_t f = mlp->ffn_hidden_size, f1 = mlp->fc1.out_features;
    const double *h = reference_linear(&mlp->fc1, x, t);
    double *a = new_doubles(t * f);

    for (int64_t i = 0; i < t * f; i++) {
        a[i] = reference_activation(mlp->activation, h + i / f * f1, f, i % f);
    }
    return reference_linear(&mlp->fc2, a, t);
}

/* Rotates the head x[D] of a token at a position. config->num_positions = 0: no rotation. */
static inline void reference_rotate(const struct rope_config *config, bool interleaved, double *x,
                                    double position)
{
    const int64_t num_pairs = config->num_positions > 0 ? rope_rotary_dim(config) / 2 : 0;

    for (int64_t i = 0; i < num_pairs; i++) {
        const double angle = position / config->interpolation_factor *
                             pow(config->base, -(double)i / (double)num_pairs);
        double *first = interleaved ? x + 2 * i : x + i;
        double *second = interleaved ? x + 2 * i + 1 : x + i + num_pairs;
        const double u = *first, v = *second;

        *first = u * cos(angle) - v * sin(angle);
        *second = v * cos(angle) + u * sin(angle);
    }
}

/* Query, key or value `part` (0 .. A/G+1) of group g of token t in the qkv projection. */
static inline double *qkv_part(const struct attention_layer *attention, double *qkv, int64_t t,
                               int64_t group, int64_t part)
{
    const struct attention_config *config = &attention->config;
    const int64_t per_group = config->num_heads / config->num_groups;

    return qkv + ((t * config->num_groups + group) * (per_group + 2) + part) * config->head_dim;
}

/* out[D] of head a of token t = s * B + b: attention over the keys of its document up to itself. */
static inline void reference_attend(const struct attention_layer *attention, double *qkv,
                                    double *out, int64_t t, int64_t head)
{
    const struct attention_config *config = &attention->config;
    const struct pass *pass = &world.pass;
    const int64_t per_group = config->num_heads / config->num_groups, b = pass->num_sequences;
    const int64_t group = head / per_group, d = config->head_dim, s = t / b;
    const int64_t first =
        pass->document_start.data != NULL ? (int64_t)tensor_get(&pass->document_start, t) : 0;
    const double *q = qkv_part(attention, qkv, t, group, head % per_group);
    const struct rng_key key = rng_key(pass->seed, "attention_dropout", config->layer);
    const uint64_t row =
        ((uint64_t)tensor_get(&pass->sample_id, t % b) * (uint64_t)config->num_heads +
         (uint64_t)head) *
            (1u << 24) +
        (uint64_t)s;
    double *scores = new_doubles(s + 1), sum = 0.0;

    for (int64_t j = first; j <= s; j++) {
        const double *k = qkv_part(attention, qkv, j * b + t % b, group, per_group);

        scores[j] = exp(dot(q, k, d) / sqrt((double)d));
        sum += scores[j];
    }
    for (int64_t j = first; j <= s; j++) {
        const double *v = qkv_part(attention, qkv, j * b + t % b, group, per_group + 1);
        double p = scores[j] / sum;

        if (config->dropout > 0.0f && pass->training) {
            p *= dropout_factor(key, config->dropout, row, (uint64_t)j);
        }
        for (int64_t i = 0; i < d; i++) {
            out[i] += p * v[i];
        }
    }
}

static inline double *reference_attention(const struct attention_layer *attention,
                                          const struct rope_config *rope, const double *x,
                                          int64_t t)
{
    const struct attention_config *config = &attention->config;
    const int64_t per_group = config->num_heads / config->num_groups;
    double *qkv = reference_linear(&attention->qkv, x, t);
    double *out = new_doubles(t * config->num_heads * config->head_dim);

    for (int64_t i = 0; i < t * config->num_groups; i++) {
        for (int64_t part = 0; part <= per_group; part++) {
            reference_rotate(
                rope, config->rope_interleaved,
                qkv_part(attention, qkv, i / config->num_groups, i % config->num_groups, part),
                tensor_get(&world.pass.position, i / config->num_groups));
        }
    }
    for (int64_t i = 0; i < t * config->num_heads; i++) {
        reference_attend(attention, qkv, out + i * config->head_dim, i / config->num_heads,
                         i % config->num_heads);
    }
    return reference_linear(&attention->proj, out, t);
}

/* x[T,H] *= the mask of a dropout whose rows are token ids. */
static inline void reference_dropout(double *x, const char *purpose, uint64_t index, float p,
                                     int64_t t, int64_t h)
{
    const struct rng_key key = rng_key(world.pass.seed, purpose, index);

    if (p == 0.0f || !world.pass.training) {
        return;
    }
    for (int64_t i = 0; i < t * h; i++) {
        x[i] *= dropout_factor(key, p, (uint64_t)tensor_get(&world.pass.token_id, i / h),
                               (uint64_t)(i % h));
    }
}

static inline double *reference_embedding(const struct embedding_layer *embedding, int64_t t,
                                          int64_t h)
{
    double *y = new_doubles(t * h);

    for (int64_t i = 0; i < t * h; i++) {
        const int64_t token = (int64_t)tensor_get(&world.pass.token, i / h);
        const int64_t position = (int64_t)tensor_get(&world.pass.position, i / h);

        y[i] = values_of(embedding->word)[token * h + i % h];
        if (embedding->position != NULL) {
            y[i] += values_of(embedding->position)[position * h + i % h];
        }
    }
    reference_dropout(y, "embedding_dropout", 0, embedding->dropout, t, h);
    return y;
}

/* loss[T] of the pass's labels. */
static inline double *reference_lm_loss(const struct lm_loss *head, const double *x, int64_t t,
                                        int64_t h)
{
    const int64_t vocab_size = head->weight->value.dim[0];
    const double *logits = reference_product(x, values_of(head->weight), NULL, t, h, vocab_size);
    double *loss = new_doubles(t);

    for (int64_t i = 0; i < t; i++) {
        double sum = 0.0;

        for (int64_t v = 0; v < vocab_size; v++) {
            sum += exp(logits[i * vocab_size + v]);
        }
        loss[i] = log(sum) - logits[i * vocab_size + (int64_t)tensor_get(&world.pass.label, i)];
    }
    return loss;
}

#endif
