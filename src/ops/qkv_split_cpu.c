/* Splits the qkv projection into heads and rotates q and k, one token at a time: the token's row is
 * floats in the cache, its heads are rotated there and stored once. */
#include "ops/ops_cpu_internal.h"

struct rotation {
    const float *cos_sin; /* [num_pairs, 2] of this token's position, or NULL */
    int64_t num_pairs;
    bool interleaved, inverse;
};

static struct rotation rotation_of_token(const struct qkv_split *a, int64_t token, bool inverse)
{
    struct rotation rotation = {NULL, 0, a->interleaved, inverse};

    if (a->table != NULL) {
        rotation.num_pairs = a->table->dim[1];
        rotation.cos_sin = (const float *)a->table->data +
                           ((const int32_t *)a->position->data)[token] * rotation.num_pairs * 2;
    }
    return rotation;
}

/* (x0, x1) := (x0 cos - x1 sin, x1 cos + x0 sin); the inverse turns the sign of sin. */
static void rotate_head(float *restrict x, const struct rotation *rotation)
{
    const int64_t p = rotation->num_pairs;
    const int64_t stride = rotation->interleaved ? 2 : 1, distance = rotation->interleaved ? 1 : p;
    const float sign = rotation->inverse ? -1.0f : 1.0f;
    const float *restrict cos_sin = rotation->cos_sin;

#pragma omp simd
    for (int64_t i = 0; i < p; i++) {
        const float c = cos_sin[2 * i], s = sign * cos_sin[2 * i + 1];
        const float x0 = x[i * stride], x1 = x[i * stride + distance];

        x[i * stride] = x0 * c - x1 * s;
        x[i * stride + distance] = x1 * c + x0 * s;
    }
}

static void rotate_group(float *row, const struct rotation *rotation, int64_t num_rotated,
                         int64_t d)
{
    for (int64_t head = 0; head < num_rotated; head++) {
        rotate_head(row + head * d, rotation);
    }
}

/* per_group query heads, then k, then v: one group of a token between its qkv row and q, k, v. */
static void split_group(const struct qkv_split *a, int64_t token, int64_t group, int64_t per_group,
                        const float *row)
{
    const int64_t num_groups = a->k->dim[1], d = a->q->dim[2];
    const int64_t kv_first = (token * num_groups + group) * d;

    floats_put(a->q, (token * num_groups + group) * per_group * d, per_group * d, row);
    floats_put(a->k, kv_first, d, row + per_group * d);
    floats_put(a->v, kv_first, d, row + (per_group + 1) * d);
}

static void join_group(const struct qkv_split *a, int64_t token, int64_t group, int64_t per_group,
                       float *row)
{
    const int64_t num_groups = a->k->dim[1], d = a->q->dim[2];
    const int64_t kv_first = (token * num_groups + group) * d;

    floats_copy(row, a->q, (token * num_groups + group) * per_group * d, per_group * d);
    floats_copy(row + per_group * d, a->k, kv_first, d);
    floats_copy(row + (per_group + 1) * d, a->v, kv_first, d);
}

static void qkv_split_run(struct stream *stream, const struct qkv_split *a, bool backward)
{
    const int64_t num_tokens = a->q->dim[0], num_groups = a->k->dim[1], d = a->q->dim[2];
    const int64_t per_group = a->q->dim[1] / num_groups, group_size = (per_group + 2) * d;
    const struct thread_floats buffers = thread_floats_new(stream, group_size);

#pragma omp parallel for schedule(static) if (num_tokens * num_groups * group_size >=              \
                                              OPS_PARALLEL_MIN)
    for (int64_t token = 0; token < num_tokens; token++) {
        const struct rotation rotation = rotation_of_token(a, token, backward);
        float *row = thread_floats_mine(&buffers);

        for (int64_t group = 0; group < num_groups; group++) {
            const int64_t first = (token * num_groups + group) * group_size;

            if (backward) {
                join_group(a, token, group, per_group, row);
                rotate_group(row, &rotation, per_group + 1, d);
                floats_put(a->qkv, first, group_size, row);
            } else {
                floats_copy(row, a->qkv, first, group_size);
                rotate_group(row, &rotation, per_group + 1, d);
                split_group(a, token, group, per_group, row);
            }
        }
    }
}

void qkv_split_forward_cpu(struct stream *stream, const struct qkv_split *a)
{
    qkv_split_run(stream, a, false);
}

void qkv_split_backward_cpu(struct stream *stream, const struct qkv_split *a)
{
    qkv_split_run(stream, a, true);
}
