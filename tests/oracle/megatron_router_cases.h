/* megatron_router_cases.h - DIR/megatron-head-router: top-k with sigmoid scores, groups, expert
 * bias and scaling, and the balancing loss, as a later Megatron-Core computed them. */
#ifndef CADRE_TESTS_ORACLE_MEGATRON_ROUTER_CASES_H
#define CADRE_TESTS_ORACLE_MEGATRON_ROUTER_CASES_H

#include "oracle_case.h"
#include "oracle_files.h"
#include "oracle_run.h"

struct router_flags {
    int64_t num_tokens, num_experts, topk, num_groups, group_topk;
    const char *score;
    bool pre_softmax;
    double scaling;
};

static inline int router_flags_read(json_t *json, struct router_flags *flags)
{
#define FIELD(key, kind, member)                                                                   \
    {                                                                                              \
        key, kind, offsetof(struct router_flags, member)                                           \
    }
    static const struct oracle_field fields[] = {
        FIELD("T", ORACLE_INTEGER, num_tokens),
        FIELD("E", ORACLE_INTEGER, num_experts),
        FIELD("topk", ORACLE_INTEGER, topk),
        FIELD("score_function", ORACLE_TEXT, score),
        FIELD("use_pre_softmax", ORACLE_FLAG, pre_softmax),
        FIELD("num_groups", ORACLE_INTEGER, num_groups),
        FIELD("group_topk", ORACLE_INTEGER, group_topk),
        FIELD("scaling_factor", ORACLE_NUMBER, scaling),
    };
#undef FIELD

    *flags = (struct router_flags){.score = "softmax", .scaling = 1.0};
    return oracle_fields_read(json, fields, (int)(sizeof fields / sizeof fields[0]), flags);
}

static inline int router_rule_of(const struct router_flags *flags, struct router_rule *rule)
{
    TRY(oracle_check_size("T", flags->num_tokens));
    TRY(oracle_check_routing(flags->num_experts, flags->topk, flags->num_groups,
                             flags->group_topk));
    if (strcmp(flags->score, "softmax") != 0 && strcmp(flags->score, "sigmoid") != 0) {
        return error_set("score_function is \"%s\", which is not known", flags->score);
    }
    *rule = (struct router_rule){.score = strcmp(flags->score, "sigmoid") == 0 ? ROUTER_SIGMOID
                                                                               : ROUTER_SOFTMAX,
                                 .pre_softmax = flags->pre_softmax,
                                 .topk = (int)flags->topk,
                                 .num_groups = (int)flags->num_groups,
                                 .group_topk = (int)flags->group_topk,
                                 .scaling_factor = (float)flags->scaling};
    return 0;
}

struct router_case {
    struct oracle_case *golden;
    struct oracle_tensors *tensors;
    struct oracle_run run;
    struct router_rule rule;
    int64_t num_tokens, num_experts;
    struct tensor logits;
};

static inline int router_compare(struct router_case *c, const char *name, const float *got)
{
    struct tensor expected;

    TRY(oracle_get(c->tensors, name, c->run.run, &expected, DTYPE_F32, c->num_tokens,
                   c->num_experts));
    oracle_compare(c->golden, name, got, expected.data, c->num_tokens * c->num_experts);
    return 0;
}

/* The 0/1 map [T,E] of the file is where indices [T,K] point. */
static inline int router_compare_map(struct router_case *c, const char *name,
                                     const struct tensor *indices)
{
    struct tensor map;
    uint8_t *left; /* the ones that no index has found yet */

    TRY(oracle_get(c->tensors, name, c->run.run, &map, DTYPE_U8, c->num_tokens, c->num_experts));
    left = map.data;
    for (int64_t slot = 0; slot < c->num_tokens * c->rule.topk; slot++) {
        const int64_t token = slot / c->rule.topk;
        const int32_t expert = ((const int32_t *)indices->data)[slot];

        if (left[token * c->num_experts + expert] != 1) {
            return error_set("%s: token %lld does not go to expert %d", name, (long long)token,
                             expert);
        }
        left[token * c->num_experts + expert] = 0;
    }
    for (int64_t i = 0; i < c->num_tokens * c->num_experts; i++) {
        if (left[i] != 0) {
            return error_set("%s: token %lld also goes to expert %lld", name,
                             (long long)(i / c->num_experts), (long long)(i % c->num_experts));
        }
    }
    return 0;
}

static inline int router_compare_forward(struct router_case *c, const struct tensor *probs,
                                         const struct tensor *indices)
{
    struct tensor dense =
        oracle_zeros(&c->run, tensor_new(c->run.run, DTYPE_F32, c->num_tokens, c->num_experts));

    for (int64_t slot = 0; slot < c->num_tokens * c->rule.topk; slot++) {
        const int32_t expert = ((const int32_t *)indices->data)[slot];

        ((float *)dense.data)[slot / c->rule.topk * c->num_experts + expert] =
            ((const float *)probs->data)[slot];
    }
    TRY(router_compare(c, "probs", dense.data));
    return router_compare_map(c, "map", indices);
}

static inline int router_compare_backward(struct router_case *c, const struct tensor *indices)
{
    struct tensor dense, d_probs = tensor_new(c->run.run, DTYPE_F32, c->num_tokens, c->rule.topk);
    struct tensor d_logits = tensor_new(c->run.run, DTYPE_F32, c->num_tokens, c->num_experts);

    TRY(oracle_get(c->tensors, "d_probs", c->run.run, &dense, DTYPE_F32, c->num_tokens,
                   c->num_experts));
    for (int64_t slot = 0; slot < c->num_tokens * c->rule.topk; slot++) {
        const int32_t expert = ((const int32_t *)indices->data)[slot];

        ((float *)d_probs.data)[slot] =
            ((const float *)dense.data)[slot / c->rule.topk * c->num_experts + expert];
    }
    op_router_backward(c->run.stream, &(struct router_backward){.rule = c->rule,
                                                                .d_logits = &d_logits,
                                                                .d_probs = &d_probs,
                                                                .logits = &c->logits,
                                                                .indices = indices});
    return router_compare(c, "d_logits", d_logits.data);
}

static inline int router_compare_topk(struct router_case *c)
{
    struct tensor probs = tensor_new(c->run.run, DTYPE_F32, c->num_tokens, c->rule.topk);
    struct tensor indices = tensor_new(c->run.run, DTYPE_I32, c->num_tokens, c->rule.topk);
    const bool has_bias = oracle_find(c->tensors, "expert_bias") != NULL;
    struct tensor bias;

    if (has_bias) {
        TRY(oracle_get(c->tensors, "expert_bias", c->run.run, &bias, DTYPE_F32, c->num_experts));
    }
    op_router_topk_forward(c->run.stream,
                           &(struct router_topk){.rule = c->rule,
                                                 .probs = &probs,
                                                 .indices = &indices,
                                                 .logits = &c->logits,
                                                 .expert_bias = has_bias ? &bias : NULL});
    TRY(router_compare_forward(c, &probs, &indices));
    return router_compare_backward(c, &indices);
}

/* The scores of each token: the sums over columns of one token each. */
static inline int router_compare_aux_scores(struct router_case *c, const struct tensor *indices)
{
    struct tensor counts = tensor_new(c->run.run, DTYPE_F32, c->num_tokens, c->num_experts);
    struct tensor scores = tensor_new(c->run.run, DTYPE_F32, c->num_tokens, c->num_experts);

    op_router_balance(c->run.stream, &(struct router_balance){.score = c->rule.score,
                                                              .counts = &counts,
                                                              .score_sums = &scores,
                                                              .logits = &c->logits,
                                                              .indices = indices});
    return router_compare(c, "aux_scores", scores.data);
}

static inline int router_compare_aux_loss(struct router_case *c, const struct tensor *indices)
{
    const double num_tokens = (double)c->num_tokens;
    struct tensor counts = tensor_new(c->run.run, DTYPE_F32, 1, c->num_experts);
    struct tensor score_sums = tensor_new(c->run.run, DTYPE_F32, 1, c->num_experts);
    struct tensor expected, loss = tensor_new(c->run.run, DTYPE_F32, 1);

    op_router_balance(c->run.stream, &(struct router_balance){.score = c->rule.score,
                                                              .counts = &counts,
                                                              .score_sums = &score_sums,
                                                              .logits = &c->logits,
                                                              .indices = indices});
    op_router_balance_loss(
        c->run.stream,
        &(struct router_balance_loss){
            .loss = &loss,
            .counts = &counts,
            .score_sums = &score_sums,
            .factor = (float)((double)c->num_experts / (num_tokens * num_tokens * c->rule.topk))});
    TRY(oracle_get(c->tensors, "aux_loss", c->run.run, &expected, DTYPE_F32, 1));
    oracle_compare(c->golden, "aux_loss", loss.data, expected.data, 1);
    return 0;
}

/* The balancing loss looks at a plain top-k: no bias, no groups. */
static inline int router_compare_aux(struct router_case *c)
{
    struct tensor probs = tensor_new(c->run.run, DTYPE_F32, c->num_tokens, c->rule.topk);
    struct tensor indices = tensor_new(c->run.run, DTYPE_I32, c->num_tokens, c->rule.topk);
    struct router_rule plain = c->rule;

    plain.num_groups = 0;
    op_router_topk_forward(c->run.stream, &(struct router_topk){.rule = plain,
                                                                .probs = &probs,
                                                                .indices = &indices,
                                                                .logits = &c->logits});
    TRY(router_compare_map(c, "aux_map", &indices));
    TRY(router_compare_aux_scores(c, &indices));
    return router_compare_aux_loss(c, &indices);
}

static inline int router_case_run(struct router_case *c, const char *stem_path, json_t *json)
{
    struct router_flags flags;
    char path[PATH_LENGTH_MAX];

    TRY(router_flags_read(json, &flags));
    TRY(router_rule_of(&flags, &c->rule));
    c->num_tokens = flags.num_tokens;
    c->num_experts = flags.num_experts;
    TRY(path_format(path, "%s.safetensors", stem_path));
    TRY(oracle_tensors_open(c->tensors, path));
    TRY(oracle_get(c->tensors, "logits", c->run.run, &c->logits, DTYPE_F32, c->num_tokens,
                   c->num_experts));
    TRY(router_compare_topk(c));
    TRY(router_compare_aux(c));
    return oracle_all_read(c->tensors);
}

static inline void megatron_router_case(const char *stem_path, const char *name)
{
    struct oracle_case golden;
    struct oracle_tensors tensors = {0};
    struct router_case c = {.golden = &golden, .tensors = &tensors};
    char path[PATH_LENGTH_MAX];
    json_t *json;
    int status = -1;

    snprintf(path, sizeof path, "head-router/%s", name);
    oracle_case_begin(&golden, path, 1e-6);
    oracle_run_begin(&c.run);
    if (path_format(path, "%s.json", stem_path) == 0 && (json = oracle_json(path)) != NULL) {
        status = router_case_run(&c, stem_path, json);
        json_decref(json);
    }
    oracle_tensors_close(&tensors);
    oracle_run_end(&c.run);
    oracle_case_end(&golden, status);
}

#endif
