/* transformer_layer: residuals, norms and dropout around attention and the dense or MoE block. */
#include "reference_model.h"

struct layer_case {
    struct transformer_layer layer;
    struct rope_config rope;
    struct routing routing;
    double *x, *d_y;
};

static double layer_loss(const void *context)
{
    const struct layer_case *c = context;
    double losses = 0.0;
    const double *y =
        reference_layer(&c->layer, &c->rope, &c->routing, c->x, MODEL_T, MODEL_H, &losses);

    return dot(y, c->d_y, MODEL_T * MODEL_H) + (double)world.pass.aux_loss_scale * losses;
}

static void check_layer(const struct model_config *config, int number, bool in_place)
{
    struct tensor x = normal_tensor(1.0, DTYPE_F32, MODEL_T, MODEL_H), table = {0};
    struct tensor y = poisoned_tensor(DTYPE_F32, MODEL_T, MODEL_H);
    struct tensor d_y = normal_tensor(1.0, DTYPE_F32, MODEL_T, MODEL_H);
    struct tensor d_x = poisoned_tensor(DTYPE_F32, MODEL_T, MODEL_H);
    struct layer_case c = {.rope = reference_rope_of(config)};
    struct transformer_layer_saved saved;
    double losses = 0.0;

    transformer_layer_init(&c.layer, &world.params, &world.groups, config, number);
    world_fill_params(0.4);
    transformer_layer_allocate(&c.layer, stream, world.run);
    world_make_pass(MODEL_S, MODEL_B, MODEL_VOCAB);
    if (config->position == POSITION_ROPE) {
        table = rope_table(stream, world.run, &c.rope);
    }
    c.x = doubles_of(&x);
    c.d_y = doubles_of(&d_y);
    transformer_layer_forward(&c.layer, &world.pass, &table, NULL, &y, &x, &saved);
    if (c.layer.is_moe) {
        c.routing = routing_of(&c.layer.moe.router, &saved.moe.router);
    }
    assert_close(&y, reference_layer(&c.layer, &c.rope, &c.routing, c.x, MODEL_T, MODEL_H, &losses),
                 1e-5);
    if (in_place) {
        d_x = d_y;
    }
    transformer_layer_backward(&c.layer, &world.pass, &table, &d_x, &d_y, &saved);
    check_gradients(layer_loss, &c, c.x, &d_x);
    assert_scratch_is_empty();
}

static void a_dense_layer_with_dropout(void **state)
{
    const struct model_config config = gpt_config(3);

    check_layer(&config, 2, false);
}

static void a_dense_layer_with_dropout_and_gradient_in_place(void **state)
{
    const struct model_config config = gpt_config(3);

    check_layer(&config, 1, true);
}

static void a_moe_layer(void **state)
{
    const struct model_config config = mixtral_config(2);

    check_layer(&config, 1, true);
}

static void a_dense_layer_of_a_moe_model(void **state)
{
    const struct model_config config = mixtral_config(2);

    check_layer(&config, 0, false);
}

static void an_unusual_moe_layer(void **state)
{
    const struct model_config config = unusual_config(2);

    check_layer(&config, 1, false);
}

/* linear_proj and fc2 write into the residual stream: std / sqrt(2 * num_layers). */
static void what_writes_into_the_residual_starts_smaller(void **state)
{
    const struct model_config config = unusual_config(8);
    struct transformer_layer layer;

    transformer_layer_init(&layer, &world.params, &world.groups, &config, 3);
    for (int i = 0; i < world.params.num_params; i++) {
        const struct param *param = world.params.params[i];
        const bool writes = strstr(param->name, "linear_proj.weight") != NULL ||
                            strstr(param->name, "linear_fc2.weight") != NULL;

        if (param->init == PARAM_INIT_NORMAL) {
            assert_float_equal(param->init_std, writes ? 0.02f / 4.0f : 0.02f, 1e-8);
        }
        assert_int_equal(strncmp(param->name, "decoder.layers.3.", 17), 0);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        layer_test(a_dense_layer_with_dropout),
        layer_test(a_dense_layer_with_dropout_and_gradient_in_place),
        layer_test(a_moe_layer),
        layer_test(a_dense_layer_of_a_moe_model),
        layer_test(an_unusual_moe_layer),
        layer_test(what_writes_into_the_residual_starts_smaller),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
