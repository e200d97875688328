/* megatron_moe_cases.h - DIR/megatron-moe: one MoE layer, forward and backward, as Megatron-Core
 * computed it. Each case is run with sequential and with grouped experts. */
#ifndef CADRE_TESTS_ORACLE_MEGATRON_MOE_CASES_H
#define CADRE_TESTS_ORACLE_MEGATRON_MOE_CASES_H

#include "oracle_case.h"
#include "oracle_files.h"
#include "oracle_run.h"
#include "moe/metrics.h"
#include "moe/moe_layer.h"

/* The flags of a case, under Megatron's names. */
struct moe_flags {
    int64_t num_positions, num_sequences, hidden, ffn, num_experts, topk, shared_ffn;
    int64_t num_groups, group_topk;
    const char *balancing, *dispatcher, *drop_policy, *score;
    double aux_coefficient, z_coefficient, capacity_factor, jitter, scaling;
    bool pre_softmax, pad, grouped, recompute, shared_overlap;
    double tracked[NUM_MOE_METRICS]; /* NAN: not given */
};

static inline int moe_flags_read(json_t *json, struct moe_flags *flags)
{
#define FIELD(key, kind, member)                                                                   \
    {                                                                                              \
        key, kind, offsetof(struct moe_flags, member)                                              \
    }
    static const struct oracle_field fields[] = {
        FIELD("S", ORACLE_INTEGER, num_positions),
        FIELD("B", ORACLE_INTEGER, num_sequences),
        FIELD("H", ORACLE_INTEGER, hidden),
        FIELD("F", ORACLE_INTEGER, ffn),
        FIELD("E", ORACLE_INTEGER, num_experts),
        FIELD("topk", ORACLE_INTEGER, topk),
        FIELD("moe_shared_expert_intermediate_size", ORACLE_INTEGER, shared_ffn),
        FIELD("moe_shared_expert_overlap", ORACLE_FLAG, shared_overlap),
        FIELD("moe_router_num_groups", ORACLE_INTEGER, num_groups),
        FIELD("moe_router_group_topk", ORACLE_INTEGER, group_topk),
        FIELD("moe_router_score_function", ORACLE_TEXT, score),
        FIELD("moe_router_topk_scaling_factor", ORACLE_NUMBER, scaling),
        FIELD("moe_router_load_balancing_type", ORACLE_TEXT, balancing),
        FIELD("moe_router_pre_softmax", ORACLE_FLAG, pre_softmax),
        FIELD("moe_aux_loss_coeff", ORACLE_NUMBER, aux_coefficient),
        FIELD("moe_z_loss_coeff", ORACLE_NUMBER, z_coefficient),
        FIELD("moe_input_jitter_eps", ORACLE_NUMBER, jitter),
        FIELD("moe_token_dispatcher_type", ORACLE_TEXT, dispatcher),
        FIELD("moe_expert_capacity_factor", ORACLE_NUMBER, capacity_factor),
        FIELD("moe_token_drop_policy", ORACLE_TEXT, drop_policy),
        FIELD("moe_pad_expert_input_to_capacity", ORACLE_FLAG, pad),
        FIELD("moe_grouped_gemm", ORACLE_FLAG, grouped),
        FIELD("moe_layer_recompute", ORACLE_FLAG, recompute),
        FIELD("tracked_load_balancing_loss", ORACLE_NUMBER, tracked[MOE_LOAD_BALANCING_LOSS]),
        FIELD("tracked_seq_load_balancing_loss", ORACLE_NUMBER,
              tracked[MOE_SEQ_LOAD_BALANCING_LOSS]),
        FIELD("tracked_global_load_balancing_loss", ORACLE_NUMBER,
              tracked[MOE_GLOBAL_LOAD_BALANCING_LOSS]),
        FIELD("tracked_z_loss", ORACLE_NUMBER, tracked[MOE_Z_LOSS]),
    };
#undef FIELD

    *flags = (struct moe_flags){.balancing = "aux_loss",
                                .dispatcher = "alltoall",
                                .drop_policy = "probs",
                                .score = "softmax",
                                .scaling = 1.0,
                                .tracked = {NAN, NAN, NAN, NAN}};
    return oracle_fields_read(json, fields, (int)(sizeof fields / sizeof fields[0]), flags);
}

static inline int moe_flags_check(const struct moe_flags *flags)
{
    TRY(oracle_check_size("S", flags->num_positions));
    TRY(oracle_check_size("B", flags->num_sequences));
    TRY(oracle_check_size("H", flags->hidden));
    TRY(oracle_check_size("F", flags->ffn));
    TRY(oracle_check_routing(flags->num_experts, flags->topk, flags->num_groups,
                             flags->group_topk));
    if (flags->shared_ffn != 0) {
        TRY(oracle_check_size("moe_shared_expert_intermediate_size", flags->shared_ffn));
    }
    if (flags->jitter != 0.0) {
        return error_set("moe_input_jitter_eps is %g: the random numbers are not the reference's",
                         flags->jitter);
    }
    return 0;
}

/* Which of the named values text is, or -1 with an error. */
static inline int moe_choice(const char *key, const char *text, const char *const *names,
                             int num_names)
{
    for (int i = 0; i < num_names; i++) {
        if (strcmp(text, names[i]) == 0) {
            return i;
        }
    }
    return error_set("%s is \"%s\", which is not known", key, text);
}

/* Type and coefficients of the balancing losses; sinkhorn's own scores (M1.9). */
static inline int set_balancing(const struct moe_flags *flags, struct router_config *router)
{
    static const char *const names[] = {"aux_loss", "seq_aux_loss", "global_aux_loss", "none",
                                        "sinkhorn"};
    const int type = moe_choice("moe_router_load_balancing_type", flags->balancing, names, 5);

    if (type < 0) {
        return -1;
    }
    if (type < NUM_BALANCE_TYPES) {
        router->balance.coefficient[type] = (float)flags->aux_coefficient;
    }
    router->sinkhorn = type == 4;
    if (router->sinkhorn) {
        router->rule.score = flags->topk == 1 ? ROUTER_SIGMOID : ROUTER_SOFTMAX;
        router->rule.pre_softmax = true;
    }
    return 0;
}

static inline int router_config_of(const struct moe_flags *flags, struct router_config *router)
{
    static const char *const scores[] = {"softmax", "sigmoid"}, *const policies[] = {"probs",
                                                                                     "position"};
    const int score = moe_choice("moe_router_score_function", flags->score, scores, 2);
    const int policy = moe_choice("moe_token_drop_policy", flags->drop_policy, policies, 2);

    if (score < 0 || policy < 0) {
        return -1;
    }
    *router = (struct router_config){
        .name = "router",
        .hidden_size = flags->hidden,
        .num_experts = (int)flags->num_experts,
        .rule = {.score = score == 0 ? ROUTER_SOFTMAX : ROUTER_SIGMOID,
                 .pre_softmax = flags->pre_softmax,
                 .topk = (int)flags->topk,
                 .num_groups = (int)flags->num_groups,
                 .group_topk = (int)flags->group_topk,
                 .scaling_factor = (float)flags->scaling},
        .aux_has_own_topk = flags->num_groups > 0,
        .z_loss_coefficient = (float)flags->z_coefficient,
        .capacity_factor = flags->capacity_factor,
        .pad_to_capacity = flags->pad,
        .drop_policy = policy == 0 ? DROP_BY_PROBS : DROP_BY_POSITION,
    };
    TRY(set_balancing(flags, router));
    router->balance.score = router->rule.score;
    router->balance.topk = router->rule.topk;
    router->balance.num_experts = router->num_experts;
    return 0;
}

/* What one run of a case works on. */
struct moe_case {
    struct oracle_case *golden;
    const struct moe_flags *flags;
    struct oracle_tensors *tensors;
    struct oracle_run run;
    struct param_list params;
    struct moe_layer layer;
    struct moe_metrics metrics;
    struct pass pass;
};

static inline int build_layer(struct moe_case *c, bool grouped)
{
    const struct moe_flags *flags = c->flags;
    struct moe_layer_config config = {
        .experts = {.name = "experts",
                    .hidden_size = flags->hidden,
                    .ffn_hidden_size = flags->ffn,
                    .num_experts = (int)flags->num_experts,
                    .activation = ACTIVATION_SWIGLU,
                    .grouped = grouped},
        .shared_expert = {.name = "shared_experts",
                          .hidden_size = flags->hidden,
                          .ffn_hidden_size = flags->shared_ffn,
                          .activation = ACTIVATION_SWIGLU},
        .recompute = flags->recompute,
    };

    TRY(router_config_of(flags, &config.router));
    moe_layer_init(&c->layer, &c->params, &c->run.groups, &config);
    param_list_allocate(&c->params, c->run.run, c->run.stream, DTYPE_F32, true);
    moe_layer_allocate(&c->layer, c->run.stream, c->run.run);
    moe_metrics_init(&c->metrics, c->run.stream, c->run.run, 1);
    c->pass = oracle_pass(&c->run, flags->num_positions, flags->num_sequences);
    c->pass.metrics = &c->metrics;
    return 0;
}

/* Calls one(case, file's name of a weight, memory of value and gradient, rows, columns) for every
 * weight. The file has a matrix an expert, the layer a tensor over all of them. */
typedef int moe_weight_function(struct moe_case *c, const char *name, float *value, float *grad,
                                int64_t rows, int64_t columns);

static inline int for_each_weight(struct moe_case *c, moe_weight_function *one)
{
    const int64_t hidden = c->flags->hidden, ffn = c->flags->ffn, shared = c->flags->shared_ffn;
    struct experts *experts = &c->layer.experts;

    TRY(one(c, "router.weight", c->layer.router.weight->value.data,
            c->layer.router.weight->grad.data, c->flags->num_experts, hidden));
    for (int64_t e = 0; e < c->flags->num_experts; e++) {
        const int64_t fc1_at = e * 2 * ffn * hidden, fc2_at = e * hidden * ffn;
        char name[PARAM_NAME_MAX];

        snprintf(name, sizeof name, "experts.local_experts.%lld.linear_fc1.weight", (long long)e);
        TRY(one(c, name, (float *)experts->fc1->value.data + fc1_at,
                (float *)experts->fc1->grad.data + fc1_at, 2 * ffn, hidden));
        snprintf(name, sizeof name, "experts.local_experts.%lld.linear_fc2.weight", (long long)e);
        TRY(one(c, name, (float *)experts->fc2->value.data + fc2_at,
                (float *)experts->fc2->grad.data + fc2_at, hidden, ffn));
    }
    if (shared > 0) {
        struct mlp *mlp = &c->layer.shared_expert;

        TRY(one(c, "shared_experts.linear_fc1.weight", mlp->fc1.weight->value.data,
                mlp->fc1.weight->grad.data, 2 * shared, hidden));
        TRY(one(c, "shared_experts.linear_fc2.weight", mlp->fc2.weight->value.data,
                mlp->fc2.weight->grad.data, hidden, shared));
    }
    return 0;
}

static inline int load_weight(struct moe_case *c, const char *name, float *value, float *grad,
                              int64_t rows, int64_t columns)
{
    char key[PARAM_NAME_MAX + 8];
    struct tensor loaded;

    snprintf(key, sizeof key, "w.%s", name);
    TRY(oracle_get(c->tensors, key, c->run.run, &loaded, DTYPE_F32, rows, columns));
    memcpy(value, loaded.data, tensor_size_bytes(&loaded));
    return 0;
}

static inline int compare_weight_gradient(struct moe_case *c, const char *name, float *value,
                                          float *grad, int64_t rows, int64_t columns)
{
    char key[PARAM_NAME_MAX + 8];
    struct tensor expected;

    snprintf(key, sizeof key, "d_w.%s", name);
    TRY(oracle_get(c->tensors, key, c->run.run, &expected, DTYPE_F32, rows, columns));
    oracle_compare(c->golden, key, grad, expected.data, rows * columns);
    return 0;
}

static inline int compare_with(struct moe_case *c, const char *name, const struct tensor *got,
                               const int64_t *shape, int num_dims)
{
    struct tensor expected;

    TRY(oracle_read(c->tensors, name, c->run.run, DTYPE_F32, shape, num_dims, &expected));
    oracle_compare(c->golden, name, got->data, expected.data, tensor_num_elements(&expected));
    return 0;
}

/* Kept slots as dense probabilities [T,E], -1 where a token is not routed to an expert. */
static inline float *new_dense(struct moe_case *c)
{
    const int64_t n = c->pass.token.dim[0] * c->flags->num_experts;
    float *dense = arena_allocate(c->run.run, (size_t)n * sizeof *dense);

    for (int64_t i = 0; i < n; i++) {
        dense[i] = -1.0f;
    }
    return dense;
}

static inline int put_dense(struct moe_case *c, float *dense, int64_t token, int64_t expert,
                            float prob)
{
    if (token < 0 || token >= c->pass.token.dim[0] || expert < 0 ||
        expert >= c->flags->num_experts) {
        return error_set("slot of token %lld, expert %lld", (long long)token, (long long)expert);
    }
    dense[token * c->flags->num_experts + expert] = prob;
    return 0;
}

/* The file's slots: [T,K] with expert numbers, 2^63-1 where dropped; or, padded, [E,capacity] with
 * token numbers, where probability 0 is a filler. */
static inline int read_expected_slots(struct moe_case *c, float *dense)
{
    const int64_t num_tokens = c->pass.token.dim[0], num_experts = c->flags->num_experts;
    const int64_t capacity = router_capacity(&c->layer.router, num_tokens);
    const int64_t rows = c->flags->pad ? num_experts : num_tokens;
    const int64_t columns = c->flags->pad ? capacity : c->flags->topk;
    struct tensor probs, indices;

    TRY(oracle_get(c->tensors, "probs", c->run.run, &probs, DTYPE_F32, rows, columns));
    TRY(oracle_get(c->tensors, "indices", c->run.run, &indices, DTYPE_I64, rows, columns));
    for (int64_t i = 0; i < rows * columns; i++) {
        const int64_t index = ((const int64_t *)indices.data)[i], row = i / columns;
        const float prob = ((const float *)probs.data)[i];

        if (c->flags->pad && prob > 0.0f) {
            TRY(put_dense(c, dense, index, row, prob));
        } else if (!c->flags->pad && index != INT64_MAX) {
            TRY(put_dense(c, dense, row, index, prob));
        }
    }
    return 0;
}

static inline int compare_slots(struct moe_case *c, const struct router_saved *saved)
{
    const int64_t num_tokens = c->pass.token.dim[0], num_experts = c->flags->num_experts;
    float *got = new_dense(c), *expected = new_dense(c);
    int64_t num_different = 0;

    TRY(read_expected_slots(c, expected));
    for (int64_t slot = 0; slot < num_tokens * c->flags->topk; slot++) {
        const int32_t expert = ((const int32_t *)saved->indices.data)[slot];

        if (expert >= 0) {
            TRY(put_dense(c, got, slot / c->flags->topk, expert,
                          ((const float *)saved->probs.data)[slot]));
        }
    }
    for (int64_t i = 0; i < num_tokens * num_experts; i++) {
        num_different += (got[i] < 0.0f) != (expected[i] < 0.0f);
    }
    if (num_different > 0) {
        return error_set("%lld kept slots differ", (long long)num_different);
    }
    oracle_compare(c->golden, "probs", got, expected, num_tokens * num_experts);
    return 0;
}

static inline void compare_tracked(struct moe_case *c)
{
    for (int metric = 0; metric < NUM_MOE_METRICS; metric++) {
        const float expected = (float)c->flags->tracked[metric];
        float got;

        if (!isnan(expected)) {
            stream_copy_to_host(c->run.stream, &got, c->metrics.sums[metric].data, sizeof got);
            oracle_compare(c->golden, moe_metric_name(metric), &got, &expected, 1);
        }
    }
}

static inline int run_and_compare(struct moe_case *c)
{
    const int64_t shape[] = {c->flags->num_positions, c->flags->num_sequences, c->flags->hidden};
    const int64_t num_tokens = shape[0] * shape[1];
    const int64_t logits_shape[] = {num_tokens, c->flags->num_experts};
    struct tensor x, d_y, y = tensor_new(c->run.run, DTYPE_F32, num_tokens, shape[2]);
    struct tensor d_x = tensor_new(c->run.run, DTYPE_F32, num_tokens, shape[2]);
    struct moe_saved saved;

    TRY(oracle_read(c->tensors, "x", c->run.run, DTYPE_F32, shape, 3, &x));
    TRY(oracle_read(c->tensors, "dy", c->run.run, DTYPE_F32, shape, 3, &d_y));
    x = tensor_view(&x, num_tokens, shape[2]);
    d_y = tensor_view(&d_y, num_tokens, shape[2]);
    moe_layer_forward(&c->layer, &c->pass, &y, &x, NULL, &saved);
    TRY(compare_with(c, "y", &y, shape, 3));
    TRY(compare_with(c, "logits", &saved.router.logits, logits_shape, 2));
    TRY(compare_slots(c, &saved.router));
    moe_layer_backward(&c->layer, &c->pass, &d_x, &d_y, &saved);
    TRY(compare_with(c, "d_x", &d_x, shape, 3));
    TRY(for_each_weight(c, compare_weight_gradient));
    compare_tracked(c);
    return oracle_all_read(c->tensors);
}

static inline int moe_case_variant(struct oracle_case *golden, const struct moe_flags *flags,
                                   struct oracle_tensors *tensors, bool grouped)
{
    struct moe_case c = {.golden = golden, .flags = flags, .tensors = tensors};
    int status;

    oracle_run_begin(&c.run);
    param_list_init(&c.params);
    status = build_layer(&c, grouped);
    if (status == 0) {
        status = for_each_weight(&c, load_weight);
    }
    if (status == 0) {
        status = run_and_compare(&c);
    }
    param_list_free(&c.params);
    oracle_run_end(&c.run);
    return status;
}

static inline int moe_case_run(struct oracle_case *golden, const char *stem_path, json_t *json)
{
    struct oracle_tensors tensors;
    struct moe_flags flags;
    char path[PATH_LENGTH_MAX];
    int status;

    TRY(moe_flags_read(json, &flags));
    TRY(moe_flags_check(&flags));
    TRY(path_format(path, "%s.safetensors", stem_path));
    status = oracle_tensors_open(&tensors, path);
    for (int grouped = 0; grouped < 2 && status == 0; grouped++) {
        status = moe_case_variant(golden, &flags, &tensors, grouped == 1);
    }
    oracle_tensors_close(&tensors);
    return status;
}

static inline void megatron_moe_case(const char *stem_path, const char *name)
{
    struct oracle_case golden;
    char path[PATH_LENGTH_MAX];
    json_t *json;
    int status = -1;

    snprintf(path, sizeof path, "moe/%s", name);
    oracle_case_begin(&golden, path, 1e-5);
    if (path_format(path, "%s.json", stem_path) == 0 && (json = oracle_json(path)) != NULL) {
        status = moe_case_run(&golden, stem_path, json);
        json_decref(json);
    }
    oracle_case_end(&golden, status);
}

#endif
