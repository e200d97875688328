/* transformer_stage: the whole model. Loss and every gradient against plain loops; recomputation,
 * the KV cache and evaluation against the plain pass; the null device against the CPU. */
#include "reference_model.h"

/* params is the list that world.params mirrors, so that the checks of reference.h see it. */
struct stage_case {
    struct param_list params;
    struct transformer_stage stage;
    struct stage_saved saved;
    struct routing *routing; /* [num_layers] */
    double *loss_weight;
};

/* The world's parameters become the stage's: same params, filled with random values. */
static void build(struct stage_case *c, const struct model_config *config)
{
    const struct stage_place place = stage_place_whole(config);

    param_list_init(&c->params);
    transformer_stage_init(&c->stage, &c->params, &world.groups, config, &place);
    param_list_allocate(&c->params, world.run, stream, config->dtype, true);
    transformer_stage_allocate(&c->stage, stream, world.run);
    world.params = c->params;
    assert_true(world.params.num_params <= WORLD_PARAMS_MAX);
    for (int i = 0; i < world.params.num_params; i++) {
        struct param *param = world.params.params[i];

        for (int64_t j = 0; j < tensor_num_elements(&param->value); j++) {
            tensor_set(&param->value, j,
                       0.4 * random_normal_number() + (param->init == PARAM_INIT_ONES ? 1.0 : 0.0));
        }
        world.values[i] = doubles_of(&param->value);
    }
    world_reset_grads();
    stage_saved_init(&c->saved, config->num_layers);
    world_make_pass(MODEL_S, MODEL_B, MODEL_VOCAB);
    c->loss_weight = doubles_of(&world.pass.loss_weight);
}

static void unbuild(struct stage_case *c)
{
    world.params = (struct param_list){0};
    stage_saved_free(&c->saved);
    transformer_stage_free(&c->stage);
    param_list_free(&c->params);
}

static double stage_loss(const void *context)
{
    const struct stage_case *c = context;
    double losses = 0.0;
    const double *loss = reference_stage(&c->stage, c->routing, MODEL_T, &losses);

    return dot(loss, c->loss_weight, MODEL_T) + (double)world.pass.aux_loss_scale * losses;
}

static void read_routing(struct stage_case *c)
{
    c->routing = arena_allocate(arena, (size_t)c->stage.place.num_layers * sizeof *c->routing);
    for (int i = 0; i < c->stage.place.num_layers; i++) {
        if (c->stage.layers[i].is_moe) {
            c->routing[i] =
                routing_of(&c->stage.layers[i].moe.router, &c->saved.layers[i].moe.router);
        }
    }
}

/* The choices of the forward pass, in memory that backward does not give back. */
static void keep_routing(struct stage_case *c)
{
    const size_t size =
        (size_t)MODEL_T * (size_t)c->stage.config.router_rule.topk * sizeof(int32_t);

    for (int i = 0; i < c->stage.place.num_layers && c->stage.config.num_experts > 0; i++) {
        if (c->stage.layers[i].is_moe) {
            int32_t *chosen = arena_allocate(arena, size), *kept = arena_allocate(arena, size);

            memcpy(chosen, c->routing[i].chosen, size);
            memcpy(kept, c->routing[i].kept, size);
            c->routing[i].chosen = chosen;
            c->routing[i].kept = kept;
        }
    }
}

static void check_stage(const struct model_config *config, int64_t document_length)
{
    struct tensor loss = poisoned_tensor(DTYPE_F32, MODEL_T);
    struct stage_case c;
    double losses = 0.0;

    build(&c, config);
    if (document_length > 0) {
        world_cut_documents(document_length);
    }
    transformer_stage_forward(&c.stage, &world.pass, NULL, NULL, &loss, &c.saved);
    read_routing(&c);
    keep_routing(&c);
    assert_close(&loss, reference_stage(&c.stage, c.routing, MODEL_T, &losses), 1e-5);
    transformer_stage_backward(&c.stage, &world.pass, NULL, NULL, &c.saved);
    check_gradients(stage_loss, &c, NULL, NULL);
    assert_int_equal(arena_used_bytes(world.saved), 0);
    assert_scratch_is_empty();
    unbuild(&c);
}

static void a_dense_model_with_dropout_and_tied_embeddings(void **state)
{
    const struct model_config config = gpt_config(2);

    check_stage(&config, 0);
}

static void a_moe_model(void **state)
{
    const struct model_config config = mixtral_config(2);

    check_stage(&config, 0);
}

static void an_unusual_model_over_documents(void **state)
{
    const struct model_config config = unusual_config(2);

    check_stage(&config, 4);
}

/* ---- batches ---- */

static void fill_grads(const struct param_list *params, double value)
{
    for (int i = 0; i < params->num_params; i++) {
        for (int64_t j = 0; j < tensor_num_elements(&params->params[i]->grad); j++) {
            tensor_set(&params->params[i]->grad, j, value);
        }
    }
}

/* The expert biases, which the first batch has moved, begin anew. */
static void reset_biases(struct stage_case *c)
{
    for (int i = 0; i < c->stage.place.num_layers; i++) {
        if (c->stage.layers[i].is_moe && c->stage.config.expert_bias) {
            op_fill_zero(stream, &c->stage.layers[i].moe.router.expert_bias);
        }
    }
}

/* Gradients of a batch of two microbatches that finds `before` in every gradient. */
static struct tensor grads_of_batch(struct stage_case *c, double before, bool overwrite)
{
    struct tensor loss = poisoned_tensor(DTYPE_F32, MODEL_T);

    fill_grads(&c->params, before);
    if (overwrite) {
        param_list_clear_grads(&c->params, stream);
    }
    for (int microbatch = 0; microbatch < 2; microbatch++) {
        world.pass.overwrite_grads = overwrite && microbatch == 0;
        transformer_stage_forward(&c->stage, &world.pass, NULL, NULL, &loss, &c->saved);
        transformer_stage_backward(&c->stage, &world.pass, NULL, NULL, &c->saved);
    }
    transformer_stage_finish_batch(&c->stage, stream);
    reset_biases(c);
    return copy_of(&c->params.grads);
}

static void check_overwriting(struct model_config config)
{
    struct tensor added, overwritten;
    struct stage_case c;

    build(&c, &config);
    op_fill_zero(stream, &c.params.grads); /* paddings, as in training */
    added = grads_of_batch(&c, 0.0, false);
    overwritten = grads_of_batch(&c, NAN, true);
    assert_close(&overwritten, doubles_of(&added), 0.0);
    unbuild(&c);
}

/* The first microbatch replaces or clears all that the batch before left. */
static void a_batch_does_not_see_the_gradients_before_it(void **state)
{
    struct model_config config = mixtral_config(3);

    check_overwriting(gpt_config(2));
    check_overwriting(unusual_config(2));
    check_overwriting(config);
    config.grouped_gemm = !config.grouped_gemm;
    check_overwriting(config);
}

/* ---- recomputation ---- */

struct stage_result {
    struct tensor loss, grads, metrics[NUM_MOE_METRICS];
};

/* Two microbatches of a batch that has been built, then the end of the batch. */
static struct stage_result run_batch(struct stage_case *c)
{
    struct stage_result result = {.loss = poisoned_tensor(DTYPE_F32, MODEL_T)};
    const struct arena_mark mark = arena_mark(world.run);
    struct moe_metrics metrics;

    moe_metrics_init(&metrics, stream, world.run, c->stage.place.num_layers);
    world.pass.metrics = &metrics;
    world_reset_grads();
    for (int microbatch = 0; microbatch < 2; microbatch++) {
        transformer_stage_forward(&c->stage, &world.pass, NULL, NULL, &result.loss, &c->saved);
        transformer_stage_backward(&c->stage, &world.pass, NULL, NULL, &c->saved);
    }
    transformer_stage_finish_batch(&c->stage, stream);
    result.grads = copy_of(&c->params.grads);
    for (int metric = 0; metric < NUM_MOE_METRICS; metric++) {
        result.metrics[metric] = copy_of(&metrics.sums[metric]);
    }
    arena_release(world.run, mark);
    return result;
}

static void check_recompute(const struct model_config *config)
{
    static const struct {
        enum recompute_kind kind;
        int num_layers;
        bool moe;
    } variants[] = {{RECOMPUTE_FULL_UNIFORM, 1, false}, {RECOMPUTE_FULL_UNIFORM, 2, false},
                    {RECOMPUTE_FULL_UNIFORM, 3, false}, {RECOMPUTE_FULL_UNIFORM, 9, true},
                    {RECOMPUTE_FULL_BLOCK, 1, false},   {RECOMPUTE_FULL_BLOCK, 3, true},
                    {RECOMPUTE_FULL_BLOCK, 9, false},   {RECOMPUTE_NONE, 0, true}};
    struct stage_result plain;
    struct stage_case c;

    build(&c, config);
    plain = run_batch(&c);
    for (size_t i = 0; i < sizeof variants / sizeof variants[0]; i++) {
        struct stage_result result;

        c.stage.config.recompute = variants[i].kind;
        c.stage.config.recompute_num_layers = variants[i].num_layers;
        for (int layer = 0; layer < c.stage.place.num_layers; layer++) {
            c.stage.layers[layer].moe.recompute = variants[i].moe;
        }
        reset_biases(&c);
        result = run_batch(&c);
        assert_same_bits(&plain.loss, &result.loss);
        assert_same_bits(&plain.grads, &result.grads);
        for (int metric = 0; metric < NUM_MOE_METRICS; metric++) {
            assert_same_bits(&plain.metrics[metric], &result.metrics[metric]);
        }
        assert_int_equal(arena_used_bytes(world.saved), 0);
    }
    unbuild(&c);
}

static void recomputation_gives_the_same_bits(void **state)
{
    const struct model_config config = gpt_config(5);

    check_recompute(&config);
}

static void recomputation_of_experts_gives_the_same_bits(void **state)
{
    const struct model_config config = unusual_config(5);

    check_recompute(&config);
}

/* Bytes that the forward pass keeps for its backward. */
static size_t kept_bytes(struct stage_case *c, enum recompute_kind kind, int num_layers)
{
    struct tensor loss = poisoned_tensor(DTYPE_F32, MODEL_T);
    size_t kept;

    c->stage.config.recompute = kind;
    c->stage.config.recompute_num_layers = num_layers;
    transformer_stage_forward(&c->stage, &world.pass, NULL, NULL, &loss, &c->saved);
    kept = arena_used_bytes(world.saved);
    transformer_stage_backward(&c->stage, &world.pass, NULL, NULL, &c->saved);
    return kept;
}

/* Of 8 layers, groups of 1 keep 8 inputs, groups of 4 keep 2; both keep what the head needs. An
 * input fills two blocks of the arena's alignment. */
static void recomputation_keeps_the_first_input_of_a_group(void **state)
{
    const size_t input_bytes = MODEL_T * MODEL_H * sizeof(float);
    const size_t rounded =
        (input_bytes + ARENA_ALIGNMENT_BYTES - 1) / ARENA_ALIGNMENT_BYTES * ARENA_ALIGNMENT_BYTES;
    const struct model_config config = mixtral_config(8);
    struct stage_case c;
    size_t everything, of_one, of_four, of_all;

    build(&c, &config);
    everything = kept_bytes(&c, RECOMPUTE_NONE, 0);
    of_one = kept_bytes(&c, RECOMPUTE_FULL_UNIFORM, 1);
    of_four = kept_bytes(&c, RECOMPUTE_FULL_UNIFORM, 4);
    of_all = kept_bytes(&c, RECOMPUTE_FULL_UNIFORM, 8);
    assert_int_equal(of_one - of_four, 6 * rounded);
    assert_int_equal(of_four - of_all, rounded);
    assert_int_equal(kept_bytes(&c, RECOMPUTE_FULL_BLOCK, 8), of_one);
    assert_true(kept_bytes(&c, RECOMPUTE_FULL_BLOCK, 4) > of_one && everything > of_one);
    unbuild(&c);
}

/* ---- bf16 ---- */

/* A second model on the same values, in bf16. */
static void build_bf16(struct stage_case *bf16, struct stage_case *f32)
{
    struct model_config config = f32->stage.config;
    struct tensor rounded;

    config.dtype = DTYPE_BF16;
    param_list_init(&bf16->params);
    transformer_stage_init(&bf16->stage, &bf16->params, &world.groups, &config, &f32->stage.place);
    param_list_allocate(&bf16->params, world.run, stream, config.dtype, true);
    transformer_stage_allocate(&bf16->stage, stream, world.run);
    stage_saved_init(&bf16->saved, config.num_layers);
    rounded = bf16->params.values;
    op_linear_combination(
        stream, &(struct linear_combination){.y = &rounded, .x = &f32->params.values, .a = 1.0f});
    op_linear_combination(
        stream, &(struct linear_combination){.y = &f32->params.values, .x = &rounded, .a = 1.0f});
}

/* |got - expected| and |expected| of a parameter's gradient; that of f32 began at grad_start. */
static void grad_distance(const struct param *got, const struct param *expected, double *difference,
                          double *norm)
{
    double difference_squares = 0.0, squares = 0.0;

    for (int64_t j = 0; j < tensor_num_elements(&expected->grad); j++) {
        const double value = tensor_get(&expected->grad, j) - (double)grad_start;

        difference_squares += pow(tensor_get(&got->grad, j) - value, 2.0);
        squares += value * value;
    }
    *difference = sqrt(difference_squares);
    *norm = sqrt(squares);
}

/* Rounding adds up through the layers of a small random model; a wrong element type or place is an
 * error of one or more. A gradient whose terms nearly cancel (a bias in front of a norm) is mostly
 * rounding: below a fiftieth of the whole gradient it is measured against that. */
static void assert_grads_are_near(const struct param_list *got, const struct param_list *expected)
{
    double difference, norm, whole = 0.0;

    for (int i = 0; i < got->num_params; i++) {
        grad_distance(got->params[i], expected->params[i], &difference, &norm);
        whole = hypot(whole, norm);
    }
    for (int i = 0; i < got->num_params; i++) {
        grad_distance(got->params[i], expected->params[i], &difference, &norm);
        if (!(difference < 0.5 * fmax(norm, whole / 50.0))) {
            fail_msg("gradient of %s: off by %.3g of %.3g", got->params[i]->name, difference, norm);
        }
    }
}

/* All experts are chosen, so that rounding does not move a token from one to another. */
static void check_bf16(struct model_config config)
{
    struct tensor loss = poisoned_tensor(DTYPE_F32, MODEL_T),
                  exact = poisoned_tensor(DTYPE_F32, MODEL_T);
    struct stage_case f32, bf16;

    config.router_rule.topk = config.num_experts;
    config.capacity_factor = 0.0;
    build(&f32, &config);
    build_bf16(&bf16, &f32);
    transformer_stage_forward(&f32.stage, &world.pass, NULL, NULL, &exact, &f32.saved);
    transformer_stage_backward(&f32.stage, &world.pass, NULL, NULL, &f32.saved);
    world.pass.dtype = DTYPE_BF16;
    transformer_stage_forward(&bf16.stage, &world.pass, NULL, NULL, &loss, &bf16.saved);
    transformer_stage_backward(&bf16.stage, &world.pass, NULL, NULL, &bf16.saved);
    assert_close(&loss, doubles_of(&exact), 0.15);
    assert_grads_are_near(&bf16.params, &f32.params);
    assert_int_equal(arena_used_bytes(world.saved), 0);
    stage_saved_free(&bf16.saved);
    transformer_stage_free(&bf16.stage);
    param_list_free(&bf16.params);
    unbuild(&f32);
}

static void a_dense_model_in_bf16_is_near_f32(void **state)
{
    check_bf16(gpt_config(2));
}

static void a_moe_model_in_bf16_is_near_f32(void **state)
{
    check_bf16(mixtral_config(2));
}

static void an_unusual_model_in_bf16_is_near_f32(void **state)
{
    check_bf16(unusual_config(2));
}

/* ---- evaluation and generation ---- */

static void evaluation_gives_the_loss_without_dropout(void **state)
{
    struct tensor loss = poisoned_tensor(DTYPE_F32, MODEL_T),
                  plain = poisoned_tensor(DTYPE_F32, MODEL_T);
    const struct model_config config = gpt_config(3);
    struct stage_case c;

    build(&c, &config);
    world.pass.training = false;
    transformer_stage_forward(&c.stage, &world.pass, NULL, NULL, &loss, &c.saved);
    assert_int_equal(arena_used_bytes(world.saved), 0);
    world.pass.training = true;
    c.stage.embedding.dropout = 0.0f;
    for (int i = 0; i < c.stage.place.num_layers; i++) {
        c.stage.layers[i].hidden_dropout = 0.0f;
        c.stage.layers[i].attention.config.dropout = 0.0f;
    }
    transformer_stage_forward(&c.stage, &world.pass, NULL, NULL, &plain, &c.saved);
    transformer_stage_backward(&c.stage, &world.pass, NULL, NULL, &c.saved);
    assert_same_bits(&loss, &plain);
    unbuild(&c);
}

static struct kv_cache *new_caches(const struct model_config *config)
{
    struct kv_cache *caches = arena_allocate(arena, (size_t)config->num_layers * sizeof *caches);

    for (int i = 0; i < config->num_layers; i++) {
        caches[i] = (struct kv_cache){
            .k = poisoned_tensor(DTYPE_F32, MODEL_S, MODEL_B, config->num_groups, config->head_dim),
            .v =
                poisoned_tensor(DTYPE_F32, MODEL_S, MODEL_B, config->num_groups, config->head_dim)};
    }
    return caches;
}

/* Logits of the positions [first, first + count) through the caches. */
static void logits_of_piece(struct stage_case *c, struct kv_cache *caches, struct tensor *logits,
                            int64_t first, int64_t count)
{
    struct tensor rows = tensor_rows(logits, first * MODEL_B, count * MODEL_B);
    struct pass pass = world.pass;

    pass.token = tensor_rows(&world.pass.token, first * MODEL_B, count * MODEL_B);
    pass.position = tensor_rows(&world.pass.position, first * MODEL_B, count * MODEL_B);
    pass.token_id = tensor_rows(&world.pass.token_id, first * MODEL_B, count * MODEL_B);
    for (int i = 0; i < c->stage.place.num_layers; i++) {
        caches[i].length = first;
    }
    transformer_stage_logits(&c->stage, &pass, caches, &rows, NULL);
}

static void check_generation(struct model_config config)
{
    struct tensor whole = poisoned_tensor(DTYPE_F32, MODEL_T, MODEL_VOCAB);
    struct tensor pieces = poisoned_tensor(DTYPE_F32, MODEL_T, MODEL_VOCAB);
    struct kv_cache *caches = new_caches(&config);
    struct stage_case c;

    config.capacity_factor = 0.0; /* drops look at all tokens of a pass */
    build(&c, &config);
    world.pass.training = false;
    transformer_stage_logits(&c.stage, &world.pass, NULL, &whole, NULL);
    for (int64_t s = 0; s < MODEL_S; s++) {
        logits_of_piece(&c, caches, &pieces, s, 1);
    }
    assert_close(&pieces, doubles_of(&whole), 1e-5);
    logits_of_piece(&c, caches, &pieces, 0, 4); /* a prompt, then two tokens */
    logits_of_piece(&c, caches, &pieces, 4, 1);
    logits_of_piece(&c, caches, &pieces, 5, 1);
    assert_close(&pieces, doubles_of(&whole), 1e-5);
    assert_int_equal(arena_used_bytes(world.saved), 0);
    unbuild(&c);
}

static void token_by_token_gives_the_logits_of_one_pass(void **state)
{
    check_generation(mixtral_config(3));
}

static void token_by_token_with_learned_positions(void **state)
{
    check_generation(gpt_config(3));
}

static void token_by_token_in_an_unusual_model(void **state)
{
    check_generation(unusual_config(2));
}

static void router_logits_are_those_of_the_pass(void **state)
{
    struct tensor loss = poisoned_tensor(DTYPE_F32, MODEL_T);
    struct tensor logits = poisoned_tensor(DTYPE_F32, MODEL_T, MODEL_VOCAB), router_logits[3];
    const struct model_config config = mixtral_config(3);
    struct stage_case c;

    build(&c, &config);
    for (int i = 0; i < 3; i++) {
        router_logits[i] = poisoned_tensor(DTYPE_F32, MODEL_T, config.num_experts);
    }
    transformer_stage_forward(&c.stage, &world.pass, NULL, NULL, &loss, &c.saved);
    world.pass.training = false;
    transformer_stage_logits(&c.stage, &world.pass, NULL, &logits, router_logits);
    for (int i = 1; i < 3; i++) { /* layer 0 is dense */
        assert_same_bits(&router_logits[i], &c.saved.layers[i].moe.router.logits);
    }
    unbuild(&c);
}

/* ---- the null device ---- */

struct peaks {
    size_t run, saved, scratch;
};

/* Builds the model on a device, runs one step and returns the arenas' peaks. */
static struct peaks peaks_on(const struct device *device, const struct ops *ops,
                             const struct model_config *config)
{
    struct stream *on = stream_create(device, ops);
    struct arena *run = arena_create("run", &device->memory);
    struct arena *saved = arena_create("microbatch", &device->memory);
    struct arena *scratch = arena_create("call", &device->memory);
    struct tensor loss = tensor_new(run, DTYPE_F32, MODEL_T);
    struct pass pass = world.pass;
    const struct stage_place place = stage_place_whole(config);
    struct transformer_stage stage;
    struct param_list params;
    struct stage_saved stage_saved;
    struct moe_metrics metrics;
    struct peaks peaks;

    param_list_init(&params);
    transformer_stage_init(&stage, &params, &world.groups, config, &place);
    param_list_allocate(&params, run, on, config->dtype, true);
    transformer_stage_allocate(&stage, on, run);
    param_list_initialize(&params, on, 1);
    moe_metrics_init(&metrics, on, run, config->num_layers);
    pass.stream = on;
    pass.dtype = config->dtype;
    pass.saved = saved;
    pass.scratch = scratch;
    pass.metrics = &metrics;
    stage_saved_init(&stage_saved, config->num_layers);
    transformer_stage_forward(&stage, &pass, NULL, NULL, &loss, &stage_saved);
    transformer_stage_backward(&stage, &pass, NULL, NULL, &stage_saved);
    transformer_stage_finish_batch(&stage, on);
    peaks =
        (struct peaks){arena_peak_bytes(run), arena_peak_bytes(saved), arena_peak_bytes(scratch)};
    stage_saved_free(&stage_saved);
    transformer_stage_free(&stage);
    param_list_free(&params);
    arena_destroy(scratch);
    arena_destroy(saved);
    arena_destroy(run);
    stream_destroy(on);
    return peaks;
}

/* The memory report's promise. */
static void check_peaks(struct model_config config)
{
    world_make_pass(MODEL_S, MODEL_B, MODEL_VOCAB);
    for (int variant = 0; variant < 5; variant++) {
        struct peaks cpu, null;

        config.recompute = variant % 3 == 1   ? RECOMPUTE_FULL_UNIFORM
                           : variant % 3 == 2 ? RECOMPUTE_FULL_BLOCK
                                              : RECOMPUTE_NONE;
        config.recompute_num_layers = 2;
        config.moe_layer_recompute = variant >= 3;
        config.grouped_gemm = variant % 2 == 0;
        config.dtype = variant == 4 ? DTYPE_BF16 : DTYPE_F32;
        config.pad_to_capacity = config.capacity_factor > 0.0 && variant % 2 == 1;
        cpu = peaks_on(device_cpu(), ops_cpu(), &config);
        null = peaks_on(device_null(), ops_null(), &config);
        assert_int_equal(cpu.run, null.run);
        assert_int_equal(cpu.saved, null.saved);
        assert_int_equal(cpu.scratch, null.scratch);
    }
}

static void the_null_device_finds_the_peaks_of_a_dense_model(void **state)
{
    check_peaks(gpt_config(5));
}

static void the_null_device_finds_the_peaks_of_a_moe_model(void **state)
{
    check_peaks(mixtral_config(3));
}

static void the_null_device_finds_the_peaks_of_an_unusual_model(void **state)
{
    check_peaks(unusual_config(3));
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        layer_test(a_dense_model_with_dropout_and_tied_embeddings),
        layer_test(a_moe_model),
        layer_test(an_unusual_model_over_documents),
        layer_test(a_batch_does_not_see_the_gradients_before_it),
        layer_test(recomputation_gives_the_same_bits),
        layer_test(recomputation_of_experts_gives_the_same_bits),
        layer_test(recomputation_keeps_the_first_input_of_a_group),
        layer_test(a_dense_model_in_bf16_is_near_f32),
        layer_test(a_moe_model_in_bf16_is_near_f32),
        layer_test(an_unusual_model_in_bf16_is_near_f32),
        layer_test(evaluation_gives_the_loss_without_dropout),
        layer_test(token_by_token_gives_the_logits_of_one_pass),
        layer_test(token_by_token_with_learned_positions),
        layer_test(token_by_token_in_an_unusual_model),
        layer_test(router_logits_are_those_of_the_pass),
        layer_test(the_null_device_finds_the_peaks_of_a_dense_model),
        layer_test(the_null_device_finds_the_peaks_of_a_moe_model),
        layer_test(the_null_device_finds_the_peaks_of_an_unusual_model),
    };

    return cmocka_run_group_tests(tests, reference_start, reference_stop);
}
