/* The contracts of ops.h as checks: mixture of experts and optimizer. */
#include "ops/ops_check.h"

#include "base/check.h"

static void expect_rule(const struct router_rule *rule, int64_t num_experts, int64_t topk)
{
    CHECK(rule->topk == topk && topk >= 1 && topk <= num_experts,
          "top-%d of %lld experts into %lld slots", rule->topk, (long long)num_experts,
          (long long)topk);
    if (rule->num_groups > 0) {
        CHECK(num_experts % rule->num_groups == 0 && rule->group_topk >= 1 &&
                  rule->group_topk <= rule->num_groups &&
                  topk <= num_experts / rule->num_groups * rule->group_topk,
              "top-%d of %lld experts in %d of %d groups", rule->topk, (long long)num_experts,
              rule->group_topk, rule->num_groups);
    }
}

void check_router_topk_forward(const struct router_topk *a)
{
    int64_t t, e;

    EXPECT_DIMS(a->logits, 2);
    EXPECT_DIMS(a->probs, 2);
    t = a->logits->dim[0];
    e = a->logits->dim[1];
    EXPECT(a->logits, DTYPE_F32, t, e);
    EXPECT(a->probs, DTYPE_F32, t, a->probs->dim[1]);
    EXPECT(a->indices, DTYPE_I32, t, a->probs->dim[1]);
    EXPECT_OPTIONAL(a->selection, DTYPE_F32, t, e);
    EXPECT_OPTIONAL(a->expert_bias, DTYPE_F32, e);
    expect_rule(&a->rule, e, a->probs->dim[1]);
}

void check_router_sinkhorn(const struct router_sinkhorn *a)
{
    EXPECT_DIMS(a->logits, 2);
    EXPECT(a->logits, DTYPE_F32, a->logits->dim[0], a->logits->dim[1]);
    EXPECT(a->assignment, DTYPE_F32, a->logits->dim[0], a->logits->dim[1]);
    CHECK(a->max_iterations > 0, "%d iterations", a->max_iterations);
}

static void expect_columns(int64_t num_tokens, int64_t num_columns)
{
    CHECK(num_columns >= 1 && num_tokens % num_columns == 0, "%lld tokens in %lld columns",
          (long long)num_tokens, (long long)num_columns);
}

void check_router_balance(const struct router_balance *a)
{
    int64_t t, e;

    EXPECT_DIMS(a->logits, 2);
    EXPECT_DIMS(a->counts, 2);
    t = a->logits->dim[0];
    e = a->logits->dim[1];
    EXPECT(a->logits, DTYPE_F32, t, e);
    EXPECT(a->counts, DTYPE_F32, a->counts->dim[0], e);
    EXPECT(a->score_sums, DTYPE_F32, a->counts->dim[0], e);
    CHECK(a->indices != NULL && a->indices->num_dims == 2, "indices: %s",
          tensor_describe(a->indices));
    EXPECT(a->indices, DTYPE_I32, t, a->indices->dim[1]);
    expect_columns(t, a->counts->dim[0]);
}

void check_router_balance_loss(const struct router_balance_loss *a)
{
    EXPECT_DIMS(a->counts, 2);
    EXPECT(a->counts, DTYPE_F32, a->counts->dim[0], a->counts->dim[1]);
    EXPECT(a->score_sums, DTYPE_F32, a->counts->dim[0], a->counts->dim[1]);
    EXPECT(a->loss, DTYPE_F32, 1);
}

void check_router_z_loss(const struct router_z_loss *a)
{
    EXPECT_DIMS(a->logits, 2);
    EXPECT(a->logits, DTYPE_F32, a->logits->dim[0], a->logits->dim[1]);
    EXPECT(a->loss, DTYPE_F32, 1);
}

void check_router_backward(const struct router_backward *a)
{
    int64_t t, e;

    EXPECT_DIMS(a->logits, 2);
    t = a->logits->dim[0];
    e = a->logits->dim[1];
    EXPECT(a->logits, DTYPE_F32, t, e);
    EXPECT(a->d_logits, DTYPE_F32, t, e);
    if (a->d_probs != NULL) {
        EXPECT(a->d_probs, DTYPE_F32, t, a->rule.topk);
        EXPECT(a->indices, DTYPE_I32, t, a->rule.topk);
        expect_rule(&a->rule, e, a->rule.topk);
    }
    CHECK(a->num_balance_terms >= 0 && a->num_balance_terms <= ROUTER_BALANCE_TERMS_MAX,
          "%d balancing losses", a->num_balance_terms);
    for (int i = 0; i < a->num_balance_terms; i++) {
        EXPECT_DIMS(a->balance[i].counts, 2);
        EXPECT(a->balance[i].counts, DTYPE_F32, a->balance[i].counts->dim[0], e);
        expect_columns(t, a->balance[i].counts->dim[0]);
    }
}

void check_router_linear_backward(const struct router_linear_backward *a)
{
    int64_t t, e, h;

    EXPECT_DIMS(a->x, 2);
    EXPECT_DIMS(a->weight, 2);
    EXPECT_DIMS(a->d_x, 2);
    t = a->x->dim[0];
    h = a->x->dim[1];
    e = a->weight->dim[0];
    EXPECT(a->weight, a->x->dtype, e, h);
    EXPECT(a->d_logits, DTYPE_F32, t, e);
    EXPECT(a->d_weight, DTYPE_F32, e, h);
    EXPECT(a->d_x, a->d_x->dtype == DTYPE_F32 ? DTYPE_F32 : a->x->dtype, t, h);
}

void check_router_drop(const struct router_drop *a)
{
    EXPECT_DIMS(a->probs, 2);
    EXPECT(a->probs, DTYPE_F32, a->probs->dim[0], a->probs->dim[1]);
    EXPECT(a->indices, DTYPE_I32, a->probs->dim[0], a->probs->dim[1]);
    CHECK(a->num_experts > 0 && a->capacity >= 0, "%d experts of capacity %lld", a->num_experts,
          (long long)a->capacity);
}

void check_permutation(const struct permutation *a)
{
    int64_t t, k, e, r;

    EXPECT_DIMS(a->probs, 2);
    t = a->probs->dim[0];
    k = a->probs->dim[1];
    CHECK(a->offsets != NULL && a->offsets->num_dims == 1 && a->offsets->dim[0] >= 2, "offsets: %s",
          tensor_describe(a->offsets));
    e = a->offsets->dim[0] - 1;
    CHECK(a->padded_capacity >= 0, "capacity %lld", (long long)a->padded_capacity);
    r = a->padded_capacity > 0 ? e * a->padded_capacity : t * k;
    EXPECT(a->offsets, DTYPE_I32, e + 1);
    EXPECT(a->probs, DTYPE_F32, t, k);
    EXPECT(a->indices, DTYPE_I32, t, k);
    EXPECT(a->row_of, DTYPE_I32, t, k);
    EXPECT(a->row_token, DTYPE_I32, r);
    EXPECT(a->row_prob, DTYPE_F32, r);
}

void check_slot_gather(const struct slot_gather *a)
{
    EXPECT_DIMS(a->d_probs, 2);
    EXPECT_DIMS(a->d_row_prob, 1);
    EXPECT(a->d_probs, DTYPE_F32, a->d_probs->dim[0], a->d_probs->dim[1]);
    EXPECT(a->d_row_prob, DTYPE_F32, a->d_row_prob->dim[0]);
    EXPECT(a->row_of, DTYPE_I32, a->d_probs->dim[0], a->d_probs->dim[1]);
}

void check_row_gather(const struct row_gather *a)
{
    EXPECT_DIMS(a->y, 2);
    EXPECT_DIMS(a->x, 2);
    EXPECT(a->x, a->y->dtype, a->x->dim[0], a->y->dim[1]);
    EXPECT(a->index, DTYPE_I32, a->y->dim[0]);
    EXPECT_OPTIONAL(a->offsets, DTYPE_I32, a->offsets->dim[0]);
    EXPECT_OPTIONAL(a->token_rows, DTYPE_I32, a->x->dim[0], a->token_rows->dim[1]);
}

void check_row_sum(const struct row_sum *a)
{
    EXPECT_DIMS(a->y, 2);
    EXPECT_DIMS(a->rows, 2);
    EXPECT(a->rows, a->y->dtype, a->rows->dim[0], a->y->dim[1]);
    CHECK(a->row_of != NULL && a->row_of->num_dims == 2, "row_of: %s", tensor_describe(a->row_of));
    EXPECT(a->row_of, DTYPE_I32, a->y->dim[0], a->row_of->dim[1]);
    EXPECT_OPTIONAL(a->residual, a->y->dtype, a->y->dim[0], a->y->dim[1]);
}

/* The inputs of both passes; y is checked by the forward pass alone. */
static void expect_experts(const struct experts_forward *a)
{
    int64_t num_rows, e, h, f, f1;

    EXPECT_DIMS(a->x, 2);
    EXPECT_DIMS(a->pre_activation, 2);
    EXPECT_DIMS(a->fc1, 3);
    EXPECT_DIMS(a->fc2, 3);
    num_rows = a->pre_activation->dim[0];
    e = a->fc1->dim[0];
    h = a->x->dim[1];
    f = a->fc2->dim[2];
    f1 = a->activation == ACTIVATION_SWIGLU ? 2 * f : f;
    EXPECT(a->x, a->x->dtype, a->row_token != NULL ? a->x->dim[0] : num_rows, h);
    EXPECT(a->pre_activation, a->x->dtype, num_rows, f1);
    EXPECT(a->fc1, a->x->dtype, e, f1, h);
    EXPECT(a->fc2, a->x->dtype, e, h, f);
    EXPECT_OPTIONAL(a->fc1_bias, a->x->dtype, e, f1);
    EXPECT_OPTIONAL(a->fc2_bias, a->x->dtype, e, h);
    EXPECT_OPTIONAL(a->row_token, DTYPE_I32, num_rows);
    EXPECT_OPTIONAL(a->token_rows, DTYPE_I32, a->x->dim[0], a->token_rows->dim[1]);
    EXPECT_OPTIONAL(a->row_prob, DTYPE_F32, num_rows);
    EXPECT(a->offsets, DTYPE_I32, e + 1);
}

void check_experts_forward(const struct experts_forward *a)
{
    expect_experts(a);
    EXPECT(a->y, a->x->dtype, a->pre_activation->dim[0], a->x->dim[1]);
}

void check_experts_backward(const struct experts_backward *a)
{
    const struct experts_forward *forward = &a->forward;
    int64_t num_rows, e, h, f, f1;

    expect_experts(forward);
    num_rows = forward->pre_activation->dim[0];
    e = forward->fc1->dim[0];
    h = forward->x->dim[1];
    f = forward->fc2->dim[2];
    f1 = forward->fc1->dim[1];
    EXPECT_DIMS(a->d_y, 2);
    EXPECT(a->d_y, forward->x->dtype, a->d_y_row_token != NULL ? a->d_y->dim[0] : num_rows, h);
    EXPECT_OPTIONAL(a->d_y_row_token, DTYPE_I32, num_rows);
    EXPECT(a->d_x, forward->x->dtype, num_rows, h);
    EXPECT(a->d_fc1, DTYPE_F32, e, f1, h);
    EXPECT(a->d_fc2, DTYPE_F32, e, h, f);
    if (forward->row_prob != NULL) {
        EXPECT(a->d_row_prob, DTYPE_F32, num_rows);
    }
    if (forward->fc1_bias != NULL) {
        EXPECT(a->d_fc1_bias, DTYPE_F32, e, f1);
    }
    if (forward->fc2_bias != NULL) {
        EXPECT(a->d_fc2_bias, DTYPE_F32, e, h);
    }
}

void check_adam_step(const struct adam_step *a)
{
    int64_t n;

    EXPECT_DIMS(a->param, 1);
    n = a->param->dim[0];
    EXPECT(a->master, DTYPE_F32, n);
    EXPECT(a->exp_avg, DTYPE_F32, n);
    EXPECT(a->exp_avg_sq, DTYPE_F32, n);
    EXPECT(a->grad, DTYPE_F32, n);
    EXPECT(a->grad_scale, DTYPE_F32, 1);
    CHECK(a->step >= 1, "step %lld", (long long)a->step);
}

void check_sgd_step(const struct sgd_step *a)
{
    int64_t n;

    EXPECT_DIMS(a->param, 1);
    n = a->param->dim[0];
    EXPECT(a->master, DTYPE_F32, n);
    EXPECT(a->grad, DTYPE_F32, n);
    EXPECT(a->grad_scale, DTYPE_F32, 1);
    if (a->momentum != 0.0f) {
        EXPECT(a->momentum_buffer, DTYPE_F32, n);
    }
}

static void expect_reduced(const char *function, const struct tensor *x)
{
    CHECK(x != NULL && (x->dtype == DTYPE_F32 || x->dtype == DTYPE_BF16),
          "%s: x is %s, expected F32 or BF16", function, tensor_describe(x));
}

void check_square_sum(const struct square_sum *a)
{
    EXPECT(a->sum, DTYPE_F64, 1);
    expect_reduced(__func__, a->x);
}

void check_zero_count(const struct zero_count *a)
{
    EXPECT(a->count, DTYPE_F64, 1);
    expect_reduced(__func__, a->x);
}

void check_clip_scale(const struct clip_scale *a)
{
    EXPECT(a->norm, DTYPE_F32, 1);
    EXPECT(a->scale, DTYPE_F32, 1);
    EXPECT(a->sum, DTYPE_F64, 1);
    CHECK(a->max_norm >= 0.0f, "max_norm is %g", (double)a->max_norm);
}

void check_expert_bias_update(const struct expert_bias_update *a)
{
    EXPECT_DIMS(a->bias, 1);
    EXPECT(a->bias, DTYPE_F32, a->bias->dim[0]);
    EXPECT(a->counts, DTYPE_F32, a->bias->dim[0]);
}

void check_random_normal(const struct random_normal *a)
{
    EXPECT_DIMS(a->x, 2);
    EXPECT(a->x, DTYPE_F32, a->x->dim[0], a->x->dim[1]);
    EXPECT(a->token_id, DTYPE_I64, a->x->dim[0]);
}

void check_initial_normal(const struct initial_normal *a)
{
    EXPECT_DIMS(a->x, a->box.num_dims);
    CHECK(box_inside(&a->box, a->global_shape), "the box is not inside its tensor");
    CHECK(tensor_num_elements(a->x) == box_num_elements(&a->box), "%lld elements for a box of %lld",
          (long long)tensor_num_elements(a->x), (long long)box_num_elements(&a->box));
}
