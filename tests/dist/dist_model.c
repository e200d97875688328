/* A small model under mappings of TP (with and without sequence parallelism), CP, EP, ETP and DP:
 * losses, logged balancing losses and gradients against one process that runs the microbatches of
 * all data-parallel ranks one after another. ranks: 2 4 */
#include "dist_test.h"

#include <string.h>

#include "model/transformer_stage.h"
#include "moe/metrics.h"
#include "parallel/context_parallel.h"
#include "parallel/tp_region.h"

enum { SEQUENCE = 8, BATCH = 2, VOCAB = 32, HIDDEN = 16 };

struct mapping {
    int tp, cp, ep, etp;
    bool moe;
    bool global_balance; /* global_aux_loss alone; else the other losses */
    bool comm_overlap;   /* of TP and of the shared expert */
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
        config.balance_coefficient[BALANCE_AUX_LOSS] = m->global_balance ? 0.0f : 0.1f;
        config.balance_coefficient[BALANCE_SEQ_AUX_LOSS] = m->global_balance ? 0.0f : 0.1f;
        config.balance_coefficient[BALANCE_GLOBAL_AUX_LOSS] = m->global_balance ? 0.1f : 0.0f;
        config.z_loss_coefficient = 0.01f;
        config.jitter_eps = 0.1f;
        config.grouped_gemm = true;
        config.dispatcher = m->dispatcher;
        config.shared_expert_overlap = m->comm_overlap;
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

/* This rank's positions of full [S, num_sequences] of items. */
static struct tensor part_of(const struct groups *groups, const struct tensor *full)
{
    const int64_t num_tokens = full->dim[0] / groups->cp->size;
    struct tensor part = tensor_new(arena, full->dtype, num_tokens);

    context_parallel_cut(part.data, full->data, tensor_size_bytes(full) / SEQUENCE,
                         groups->cp->size, groups->cp->rank, SEQUENCE);
    return part;
}

/* The samples [first, first + num_sequences) as a microbatch of one process. */
static struct pass whole_pass(struct model *model, int first, int num_sequences)
{
    const int num_tokens = SEQUENCE * num_sequences;
    struct pass pass = {.stream = stream,
                        .groups = &model->groups,
                        .saved = model->saved,
                        .scratch = model->scratch,
                        .dtype = DTYPE_F32,
                        .training = true,
                        .seed = 11,
                        .num_sequences = num_sequences,
                        .token = tensor_new(arena, DTYPE_I32, num_tokens),
                        .label = tensor_new(arena, DTYPE_I32, num_tokens),
                        .position = tensor_new(arena, DTYPE_I32, num_tokens),
                        .token_id = tensor_new(arena, DTYPE_I64, num_tokens),
                        .sample_id = tensor_new(arena, DTYPE_I64, num_sequences),
                        .loss_weight = tensor_new(arena, DTYPE_F32, num_tokens),
                        .aux_loss_scale = 1.0f,
                        .metrics = &model->metrics};

    for (int t = 0; t < num_tokens; t++) {
        const int sample = first + t % num_sequences, s = t / num_sequences;
        const struct rng_key key = rng_key(3, "tokens", (uint64_t)sample);

        dist_set(&pass.token, t, floor(VOCAB * rng_uniform(key, 0, (uint64_t)s)));
        dist_set(&pass.label, t, floor(VOCAB * rng_uniform(key, 1, (uint64_t)s)));
        dist_set(&pass.position, t, s);
        dist_set(&pass.token_id, t, sample * SEQUENCE + s);
        dist_set(&pass.sample_id, t % num_sequences, sample);
        dist_set(&pass.loss_weight, t, 1.0 / (SEQUENCE * BATCH));
    }
    return pass;
}

/* This rank's part of a microbatch; the reduction will divide by CP (M5.2, M1.8). */
static struct pass part_pass(struct model *model, int microbatch)
{
    const struct groups *groups = &model->groups;
    const int cp = groups->cp->size;
    struct pass pass = whole_pass(model, microbatch * BATCH, BATCH);
    int64_t outside;

    pass.token = part_of(groups, &pass.token);
    pass.label = part_of(groups, &pass.label);
    pass.position = part_of(groups, &pass.position);
    pass.token_id = part_of(groups, &pass.token_id);
    pass.loss_weight = part_of(groups, &pass.loss_weight);
    for (int64_t t = 0; t < pass.token.dim[0]; t++) {
        dist_set(&pass.loss_weight, t, dist_get(&pass.loss_weight, t) * cp);
    }
    pass.aux_loss_scale = (float)cp;
    outside = tp_region_outside(groups, pass.token.dim[0]);
    if (outside != pass.token.dim[0]) {
        pass.token_id = tensor_rows(&pass.token_id, groups->tp->rank * outside, outside);
    }
    return pass;
}

/* Adds the gradients of a microbatch; returns its losses. */
static struct tensor run_pass(struct model *model, const struct pass *pass)
{
    struct tensor loss = tensor_new(arena, DTYPE_F32, pass->token.dim[0]);

    transformer_stage_forward(&model->stage, pass, NULL, NULL, &loss, &model->stage_saved);
    transformer_stage_backward(&model->stage, pass, NULL, NULL, &model->stage_saved);
    return loss;
}

/* What the reduction of gradients does (M5.7, M5.8), but for the mean over DP. */
static void reduce_gradients(struct model *model)
{
    for (int i = 0; i < model->params.num_params; i++) {
        struct param *param = model->params.params[i];
        struct comm *data = param->scope == PARAM_EXPERT ? model->groups.edp : model->groups.dp_cp;

        if (param->sum_over_tp) {
            comm_wait(comm_all_reduce(model->groups.tp, stream, &param->grad, COMM_SUM), stream);
        }
        comm_wait(comm_all_reduce(data, stream, &param->grad, COMM_SUM), stream);
        op_linear_combination(
            stream, &(struct linear_combination){.y = &param->grad,
                                                 .x = &param->grad,
                                                 .a = 1.0f / (float)model->groups.cp->size});
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

/* The log of all ranks is that of one process, whose sums are over the microbatches of all
 * data-parallel ranks. */
static void compare_metrics(const char *what, struct model *mine, const struct model *all,
                            int num_microbatches)
{
    moe_metrics_reduce(&mine->metrics, stream, &mine->groups);
    for (int m = 0; m < NUM_MOE_METRICS; m++) {
        struct tensor wanted = tensor_new(arena, DTYPE_F32, all->metrics.num_layers);
        char text[256];

        for (int layer = 0; layer < all->metrics.num_layers; layer++) {
            dist_set(&wanted, layer, dist_get(&all->metrics.sums[m], layer) / num_microbatches);
        }
        snprintf(text, sizeof text, "%s: %s", what, moe_metric_name((enum moe_metric)m));
        dist_compare(text, &mine->metrics.sums[m], &wanted, 2e-6);
    }
}

/* One process: the microbatches one after another, or, since global_aux_loss counts the tokens of
 * all DP ranks at once, as one. Returns the losses of microbatch `which`. */
static struct tensor run_reference(struct model *all, const struct mapping *m, int num_microbatches,
                                   int which)
{
    struct tensor loss, wanted = {0};

    if (m->global_balance) {
        struct pass pass = whole_pass(all, 0, BATCH * num_microbatches);

        pass.aux_loss_scale = (float)num_microbatches;
        loss = run_pass(all, &pass);
        wanted = tensor_new(arena, DTYPE_F32, SEQUENCE * BATCH);
        for (int t = 0; t < SEQUENCE * BATCH; t++) {
            const int column = which * BATCH + t % BATCH;

            dist_set(&wanted, t, dist_get(&loss, t / BATCH * BATCH * num_microbatches + column));
        }
        return wanted;
    }
    for (int i = 0; i < num_microbatches; i++) {
        const struct pass pass = whole_pass(all, i * BATCH, BATCH);

        loss = run_pass(all, &pass);
        wanted = i == which ? loss : wanted;
    }
    return wanted;
}

static void describe(const struct mapping *m, int dp, char *text, size_t size_bytes)
{
    snprintf(text, size_bytes, "tp %d cp %d ep %d etp %d dp %d, dispatcher %d%s%s%s", m->tp, m->cp,
             m->ep, m->etp, dp, m->dispatcher, m->learned_positions ? ", biases" : "",
             m->global_balance ? ", global balance" : "", m->comm_overlap ? ", overlap" : "");
}

static void test_mapping(const struct mapping *m)
{
    const struct rank_grid_sizes sizes = {
        .world = launch_size(), .tp = m->tp, .cp = m->cp, .pp = 1, .ep = m->ep, .etp = m->etp};
    struct model mine = {0}, all = {0};
    struct rank_grid grid;
    struct tensor loss, wanted;
    struct pass pass;
    char what[160];
    int dp;

    if (rank_grid_init(&grid, &sizes) != 0) {
        launch_fail(error_text());
    }
    dp = rank_grid_size(&grid, RANK_DP);
    describe(m, dp, what, sizeof what);
    groups_create(&mine.groups, &grid, launch_rank(), m->tp > 1 && !m->whole_tokens);
    mine.groups.tp_comm_overlap = m->comm_overlap;
    groups_create_self(&all.groups);
    model_create(&mine, m);
    model_create(&all, m);
    pass = part_pass(&mine, mine.groups.dp->rank);
    loss = run_pass(&mine, &pass);
    reduce_gradients(&mine);
    wanted = run_reference(&all, m, dp, mine.groups.dp->rank);
    wanted = part_of(&mine.groups, &wanted);
    dist_compare(what, &loss, &wanted, 1e-5);
    compare_metrics(what, &mine, &all, m->global_balance ? 1 : dp);
    compare_gradients(what, &mine, &all);
    model_destroy(&mine);
    model_destroy(&all);
    dist_release();
}

/* All expert grids on a dense grid. */
static void test_expert_grids(int tp, int cp, enum dispatcher_kind dispatcher)
{
    const int size = launch_size();

    for (int etp = 1; etp <= tp; etp *= 2) {
        for (int ep = 1; ep * etp <= size && ep <= 4; ep *= 2) {
            test_mapping(&(struct mapping){
                .tp = tp, .cp = cp, .ep = ep, .etp = etp, .moe = true, .dispatcher = dispatcher});
        }
    }
}

int main(int argc, char **argv)
{
    const int size = dist_begin(argc, argv);
    const struct mapping tp = {.tp = size, .cp = 1, .ep = 1, .etp = 1};

    for (int i = 0; i < 3; i++) {
        struct mapping m = tp;

        m.learned_positions = i > 0;
        m.whole_tokens = i > 1;
        test_mapping(&m);
        m.comm_overlap = true;
        test_mapping(&m);
    }
    test_mapping(&(struct mapping){.tp = 1, .cp = 1, .ep = 1, .etp = 1, .learned_positions = true});
    for (int d = DISPATCHER_ALLGATHER; d <= DISPATCHER_ALLTOALL_SEQ; d++) {
        for (int ranks = 1; ranks <= size; ranks *= 2) {
            for (int cp = 1; cp <= ranks; cp *= 2) {
                test_expert_grids(ranks / cp, cp, (enum dispatcher_kind)d);
            }
        }
    }
    for (int ranks = 1; ranks <= size; ranks *= 2) {
        for (int cp = 1; cp <= ranks; cp *= 2) {
            test_mapping(&(struct mapping){.tp = ranks / cp,
                                           .cp = cp,
                                           .ep = size,
                                           .etp = 1,
                                           .moe = true,
                                           .global_balance = true,
                                           .comm_overlap = true,
                                           .dispatcher = DISPATCHER_ALLTOALL});
        }
    }
    return dist_end();
}
