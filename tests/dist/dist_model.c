/* A small model under mappings of TP (with and without sequence parallelism), EP, ETP and DP:
 * losses and gradients against one process that runs the microbatches of all data-parallel ranks
 * one after another. ranks: 2 4 */
#include "dist_test.h"

#include <string.h>

#include "model/transformer_stage.h"
#include "moe/metrics.h"
#include "parallel/tp_region.h"

enum { SEQUENCE = 8, BATCH = 2, TOKENS = SEQUENCE * BATCH, VOCAB = 32, HIDDEN = 16 };

struct mapping {
    int tp, ep, etp;
    bool moe;
    enum dispatcher_kind dispatcher;
    bool whole_tokens;      /* TP without sequence parallelism */
    bool learned_positions; /* with LayerNorm and biases; else rotary positions and RMSNorm */
};

/* A model with its memory and the gradients of what it ran. */
struct model {
    struct groups groups;
    struct param_list params;
    struct transformer_stage stage;
    struct stage_saved stage_saved;
    struct moe_metrics metrics;
    struct arena *run, *saved, *scratch;
};

static struct model_config config_of(const struct mapping *m)
{
    struct model_config config = {
        .num_layers = 2,
        .hidden_size = HIDDEN,
        .ffn_hidden_size = 24,
        .num_heads = 4,
        .num_groups = 4,
        .head_dim = 4,
        .vocab_size = VOCAB,
        .padded_vocab_size = VOCAB,
        .max_positions = SEQUENCE,
        .seq_length = SEQUENCE,
        .norm = m->learned_positions ? NORM_LAYERNORM : NORM_RMSNORM,
        .norm_eps = 1e-5,
        .activation = ACTIVATION_SWIGLU,
        .linear_bias = m->learned_positions,
        .tied_embeddings = m->learned_positions,
        .position = m->learned_positions ? POSITION_LEARNED : POSITION_ROPE,
        .rope_base = 10000.0,
        .rope_percent = 1.0,
        .rope_interpolation = 1.0,
        .attention_dropout = 0.1,
        .hidden_dropout = 0.1,
        .init_std = 0.3,
        .dtype = DTYPE_F32,
    };

    if (m->moe) {
        config.num_experts = 4;
        config.is_moe_layer[1] = true;
        config.moe_ffn_hidden_size = 16;
        config.shared_expert_ffn_hidden_size = 8;
        config.router_rule =
            (struct router_rule){.score = ROUTER_SOFTMAX, .topk = 2, .scaling_factor = 1.0f};
        config.balance_coefficient[BALANCE_AUX_LOSS] = 0.1f;
        config.balance_coefficient[BALANCE_SEQ_AUX_LOSS] = 0.1f;
        config.z_loss_coefficient = 0.01f;
        config.jitter_eps = 0.1f;
        config.grouped_gemm = true;
        config.dispatcher = m->dispatcher;
    }
    return config;
}

/* After groups is filled in. */
static void model_create(struct model *model, const struct mapping *m)
{
    const struct memory_source *memory = &device_cpu()->memory;
    const struct model_config config = config_of(m);
    const struct stage_place place = stage_place_whole(&config);

    model->run = arena_create("run", memory);
    model->saved = arena_create("microbatch", memory);
    model->scratch = arena_create("call", memory);
    param_list_init(&model->params);
    transformer_stage_init(&model->stage, &model->params, &model->groups, &config, &place);
    stage_saved_init(&model->stage_saved, config.num_layers);
    param_list_allocate(&model->params, model->run, stream, config.dtype, true);
    transformer_stage_allocate(&model->stage, stream, model->run);
    moe_metrics_init(&model->metrics, stream, model->run, config.num_layers);
    param_list_initialize(&model->params, stream, 5);
}

static void model_destroy(struct model *model)
{
    stage_saved_free(&model->stage_saved);
    transformer_stage_free(&model->stage);
    param_list_free(&model->params);
    arena_destroy(model->run);
    arena_destroy(model->saved);
    arena_destroy(model->scratch);
    groups_destroy(&model->groups);
}

static struct pass make_pass(struct model *model, int microbatch)
{
    const struct rng_key key = rng_key(3, "tokens", (uint64_t)microbatch);
    struct pass pass = {.stream = stream,
                        .groups = &model->groups,
                        .saved = model->saved,
                        .scratch = model->scratch,
                        .dtype = DTYPE_F32,
                        .training = true,
                        .seed = 11,
                        .num_sequences = BATCH,
                        .token = tensor_new(arena, DTYPE_I32, TOKENS),
                        .label = tensor_new(arena, DTYPE_I32, TOKENS),
                        .position = tensor_new(arena, DTYPE_I32, TOKENS),
                        .token_id = tensor_new(arena, DTYPE_I64, TOKENS),
                        .sample_id = tensor_new(arena, DTYPE_I64, BATCH),
                        .loss_weight = tensor_new(arena, DTYPE_F32, TOKENS),
                        .aux_loss_scale = 1.0f,
                        .metrics = &model->metrics};
    const int64_t outside = tp_region_outside(&model->groups, TOKENS);

    for (int t = 0; t < TOKENS; t++) {
        const int sample = microbatch * BATCH + t % BATCH;

        dist_set(&pass.token, t, floor(VOCAB * rng_uniform(key, 0, (uint64_t)t)));
        dist_set(&pass.label, t, floor(VOCAB * rng_uniform(key, 1, (uint64_t)t)));
        dist_set(&pass.position, t, t / BATCH);
        dist_set(&pass.token_id, t, sample * SEQUENCE + t / BATCH);
        dist_set(&pass.sample_id, t % BATCH, sample);
        dist_set(&pass.loss_weight, t, 1.0 / TOKENS);
    }
    if (outside != TOKENS) {
        pass.token_id = tensor_rows(&pass.token_id, model->groups.tp->rank * outside, outside);
    }
    return pass;
}

/* Adds the gradients of a microbatch; returns its losses. */
static struct tensor run_microbatch(struct model *model, int microbatch)
{
    const struct pass pass = make_pass(model, microbatch);
    struct tensor loss = tensor_new(arena, DTYPE_F32, TOKENS);

    transformer_stage_forward(&model->stage, &pass, NULL, NULL, &loss, &model->stage_saved);
    transformer_stage_backward(&model->stage, &pass, NULL, NULL, &model->stage_saved);
    return loss;
}

/* What the reduction of gradients does (M5.7, M5.8), without the mean. */
static void reduce_gradients(struct model *model)
{
    for (int i = 0; i < model->params.num_params; i++) {
        struct param *param = model->params.params[i];
        struct comm *data = param->scope == PARAM_EXPERT ? model->groups.edp : model->groups.dp_cp;

        if (param->sum_over_tp) {
            comm_wait(comm_all_reduce(model->groups.tp, stream, &param->grad, COMM_SUM), stream);
        }
        comm_wait(comm_all_reduce(data, stream, &param->grad, COMM_SUM), stream);
    }
}

static void compare_gradients(const char *what, const struct model *mine, const struct model *all)
{
    for (int i = 0; i < mine->params.num_params; i++) {
        const struct param *param = mine->params.params[i];
        const struct param *whole = param_find(&all->params, param->name);
        const struct box box = box_whole(whole->global_shape, whole->num_dims);
        struct tensor wanted = tensor_allocate(arena, DTYPE_F32, param->box.size, param->num_dims);
        char text[256];

        box_copy(wanted.data, &param->box, whole->grad.data, &box, &param->box, sizeof(float));
        snprintf(text, sizeof text, "%s: gradient of %s", what, param->name);
        dist_compare(text, &param->grad, &wanted, 2e-5);
    }
}

static void test_mapping(const struct mapping *m)
{
    const struct rank_grid_sizes sizes = {
        .world = launch_size(), .tp = m->tp, .cp = 1, .pp = 1, .ep = m->ep, .etp = m->etp};
    struct model mine = {0}, all = {0};
    struct rank_grid grid;
    struct tensor loss, wanted = {0};
    char what[160];

    if (rank_grid_init(&grid, &sizes) != 0) {
        launch_fail(error_text());
    }
    snprintf(what, sizeof what, "tp %d ep %d etp %d dp %d, dispatcher %d%s", m->tp, m->ep, m->etp,
             rank_grid_size(&grid, RANK_DP), m->dispatcher, m->learned_positions ? ", biases" : "");
    groups_create(&mine.groups, &grid, launch_rank(), m->tp > 1 && !m->whole_tokens);
    groups_create_self(&all.groups);
    model_create(&mine, m);
    model_create(&all, m);
    loss = run_microbatch(&mine, mine.groups.dp->rank);
    reduce_gradients(&mine);
    for (int i = 0; i < mine.groups.dp->size; i++) {
        const struct tensor one = run_microbatch(&all, i);

        wanted = i == mine.groups.dp->rank ? one : wanted;
    }
    dist_compare(what, &loss, &wanted, 1e-5);
    compare_gradients(what, &mine, &all);
    model_destroy(&mine);
    model_destroy(&all);
    dist_release();
}

int main(int argc, char **argv)
{
    const int size = dist_begin(argc, argv);

    test_mapping(&(struct mapping){.tp = size, .ep = 1, .etp = 1});
    test_mapping(&(struct mapping){.tp = size, .ep = 1, .etp = 1, .learned_positions = true});
    test_mapping(&(struct mapping){
        .tp = size, .ep = 1, .etp = 1, .whole_tokens = true, .learned_positions = true});
    test_mapping(&(struct mapping){.tp = 1, .ep = 1, .etp = 1, .learned_positions = true});
    for (int d = DISPATCHER_ALLGATHER; d <= DISPATCHER_ALLTOALL_SEQ; d++) {
        for (int tp = 1; tp <= size; tp *= 2) {
            for (int etp = 1; etp <= tp; etp *= 2) {
                for (int ep = 1; ep * etp <= size; ep *= 2) {
                    test_mapping(&(struct mapping){.tp = tp,
                                                   .ep = ep,
                                                   .etp = etp,
                                                   .moe = true,
                                                   .dispatcher = (enum dispatcher_kind)d});
                }
            }
        }
    }
    return dist_end();
}
