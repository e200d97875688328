/* A mixture-of-experts layer with a shared expert, under TP (with sequence parallelism), EP, ETP
 * and DP, with every dispatcher. Drops, padding and sinkhorn act on each rank's own tokens, so the
 * reference is one process that runs every rank's tokens apart, one rank after another. The ways of
 * overlapping communication change nothing. ranks: 2 4 */
#include "dist_test.h"

#include <string.h>

#include "moe/moe_layer.h"

enum { NUM_EXPERTS = 8, HIDDEN = 12, FFN = 8, SHARED_FFN = 16, RANKS_MAX = 16 };

enum rule { RULE_DROPLESS, RULE_DROP, RULE_PAD, NUM_RULES };

static const char *const rule_names[NUM_RULES] = {"dropless", "drop", "pad"};

struct moe_case {
    enum dispatcher_kind dispatcher;
    enum rule rule;
    int64_t num_tokens; /* of a rank, outside TP regions */
    bool grouped, recompute, no_shared_expert;
    bool tp_comm_overlap, shared_expert_overlap;
    double rank_capacity_factor;
};

/* A layer, its memory and results. */
struct layer {
    struct groups groups;
    struct param_list params;
    struct moe_layer moe;
    struct arena *run, *saved, *scratch;
    struct tensor y, d_x;
};

static struct moe_layer_config config_of(const struct moe_case *c)
{
    return (struct moe_layer_config){
        .router = {.name = "router",
                   .hidden_size = HIDDEN,
                   .num_experts = NUM_EXPERTS,
                   .rule = {.score = ROUTER_SOFTMAX, .topk = 2, .scaling_factor = 1.0f},
                   .balance = {.topk = 2, .num_experts = NUM_EXPERTS},
                   .z_loss_coefficient = 0.1f,
                   .jitter_eps = 0.1f,
                   .capacity_factor = c->rule == RULE_DROPLESS ? 0.0 : 0.9,
                   .pad_to_capacity = c->rule == RULE_PAD,
                   .init_std = 1.0f},
        .experts = {.name = "experts",
                    .hidden_size = HIDDEN,
                    .ffn_hidden_size = FFN,
                    .num_experts = NUM_EXPERTS,
                    .activation = ACTIVATION_SWIGLU,
                    .grouped = c->grouped,
                    .init_std = 0.3f,
                    .output_init_std = 0.3f},
        .shared_expert = {.name = "shared",
                          .hidden_size = HIDDEN,
                          .ffn_hidden_size = c->no_shared_expert ? 0 : SHARED_FFN,
                          .activation = ACTIVATION_SWIGLU,
                          .init_std = 0.3f,
                          .output_init_std = 0.3f},
        .dispatcher = c->dispatcher,
        .recompute = c->recompute,
        .shared_expert_overlap = c->shared_expert_overlap,
        .rank_capacity_factor = c->rank_capacity_factor,
    };
}

/* After groups is filled in. */
static void layer_create(struct layer *layer, const struct moe_case *c)
{
    const struct moe_layer_config config = config_of(c);

    layer->run = arena_create("run", &device_cpu()->memory);
    layer->saved = arena_create("microbatch", &device_cpu()->memory);
    layer->scratch = arena_create("call", &device_cpu()->memory);
    layer->groups.tp_comm_overlap = c->tp_comm_overlap;
    param_list_init(&layer->params);
    moe_layer_init(&layer->moe, &layer->params, &layer->groups, &config);
    param_list_allocate(&layer->params, layer->run, stream, DTYPE_F32, true);
    moe_layer_allocate(&layer->moe, stream, layer->run);
    param_list_initialize(&layer->params, stream, 5);
}

static void layer_destroy(struct layer *layer)
{
    param_list_free(&layer->params);
    arena_destroy(layer->run);
    arena_destroy(layer->saved);
    arena_destroy(layer->scratch);
}

/* Forward and backward of the tokens of one rank of the world. */
static void run_tokens(struct layer *layer, const struct moe_case *c, int rank)
{
    const int64_t n = c->num_tokens;
    struct tensor x = tensor_new(arena, DTYPE_F32, n, HIDDEN);
    struct tensor d_y = tensor_new(arena, DTYPE_F32, n, HIDDEN);
    struct tensor token_id = tensor_new(arena, DTYPE_I64, n);
    const struct pass pass = {.stream = stream,
                              .groups = &layer->groups,
                              .saved = layer->saved,
                              .scratch = layer->scratch,
                              .dtype = DTYPE_F32,
                              .training = true,
                              .seed = 3,
                              .num_sequences = 1,
                              .token_id = token_id,
                              .aux_loss_scale = (float)layer->groups.tp_cp->size};
    struct moe_saved saved;

    dist_fill(&x, 10, rank * n * HIDDEN);
    dist_fill(&d_y, 11, rank * n * HIDDEN);
    for (int64_t t = 0; t < n; t++) {
        dist_set(&token_id, t, (double)(rank * n + t));
    }
    layer->y = tensor_new(arena, DTYPE_F32, n, HIDDEN);
    layer->d_x = tensor_new(arena, DTYPE_F32, n, HIDDEN);
    moe_layer_forward(&layer->moe, &pass, &layer->y, &x, NULL, &saved);
    moe_layer_backward(&layer->moe, &pass, &layer->d_x, &d_y, &saved);
    if (arena_used_bytes(layer->scratch) != 0) {
        dist_failed("%zu bytes of scratch were not given back", arena_used_bytes(layer->scratch));
    }
    arena_release(layer->saved, (struct arena_mark){0});
}

static void reduce_gradients(struct layer *layer)
{
    for (int i = 0; i < layer->params.num_params; i++) {
        struct param *param = layer->params.params[i];
        struct comm *data = param->scope == PARAM_EXPERT ? layer->groups.edp : layer->groups.dp_cp;

        if (param->sum_over_tp) {
            comm_wait(comm_all_reduce(layer->groups.tp, stream, &param->grad, COMM_SUM), stream);
        }
        comm_wait(comm_all_reduce(data, stream, &param->grad, COMM_SUM), stream);
    }
}

static void compare_gradients(const char *what, const struct layer *mine, const struct layer *all,
                              double tolerance)
{
    for (int i = 0; i < mine->params.num_params; i++) {
        const struct param *param = mine->params.params[i];
        const struct param *whole = param_find(&all->params, param->name);
        struct tensor wanted = tensor_allocate(arena, DTYPE_F32, param->box.size, param->num_dims);
        char text[256];

        box_copy(wanted.data, &param->box, whole->grad.data, &whole->box, &param->box,
                 sizeof(float));
        snprintf(text, sizeof text, "%s: gradient of %s", what, param->name);
        dist_compare(text, &param->grad, &wanted, tolerance);
    }
}

static void compare_results(const char *what, const struct layer *mine, const struct tensor *y,
                            const struct tensor *d_x, double tolerance)
{
    char text[256];

    snprintf(text, sizeof text, "%s: y", what);
    dist_compare(text, &mine->y, y, tolerance);
    snprintf(text, sizeof text, "%s: d_x", what);
    dist_compare(text, &mine->d_x, d_x, tolerance);
}

static void describe(const struct moe_case *c, const struct groups *groups, char *text, size_t size)
{
    static const char *const dispatchers[] = {"allgather", "alltoall", "alltoall_seq"};

    snprintf(text, size, "%s tp %d ep %d etp %d, %lld tokens, %s%s%s%s", dispatchers[c->dispatcher],
             groups->tp->size, groups->ep->size, groups->etp->size, (long long)c->num_tokens,
             rule_names[c->rule], c->recompute ? ", recompute" : "",
             c->tp_comm_overlap ? ", tp overlap" : "",
             c->shared_expert_overlap ? ", shared expert overlap" : "");
}

/* Every rank's tokens apart. */
static void test_against_one_process(struct groups *groups, const struct moe_case *c)
{
    struct layer mine = {.groups = *groups}, all = {0};
    struct tensor y = {0}, d_x = {0};
    char what[160];

    describe(c, groups, what, sizeof what);
    groups_create_self(&all.groups);
    layer_create(&mine, c);
    layer_create(&all, c);
    run_tokens(&mine, c, launch_rank());
    reduce_gradients(&mine);
    for (int rank = 0; rank < launch_size(); rank++) {
        run_tokens(&all, c, rank);
        y = rank == launch_rank() ? all.y : y;
        d_x = rank == launch_rank() ? all.d_x : d_x;
    }
    compare_results(what, &mine, &y, &d_x, 5e-6);
    compare_gradients(what, &mine, &all, 1e-5);
    layer_destroy(&mine);
    layer_destroy(&all);
    groups_destroy(&all.groups);
    dist_release();
}

/* The results without the overlap of this case, or of the same case again. */
static void test_against(struct groups *groups, const struct moe_case *c,
                         const struct moe_case *other, double tolerance)
{
    struct layer with = {.groups = *groups}, without = {.groups = *groups};
    char what[160];

    describe(c, groups, what, sizeof what);
    layer_create(&with, c);
    layer_create(&without, other);
    run_tokens(&with, c, launch_rank());
    run_tokens(&without, other, launch_rank());
    compare_results(what, &with, &without.y, &without.d_x, tolerance);
    compare_gradients(what, &with, &without, tolerance);
    layer_destroy(&with);
    layer_destroy(&without);
    dist_release();
}

static void test_overlaps(struct groups *groups)
{
    const int64_t sizes[] = {1, 7};

    for (int i = 0; i < 2; i++) {
        const struct moe_case plain = {
            .dispatcher = DISPATCHER_ALLTOALL, .num_tokens = sizes[i], .grouped = true};
        struct moe_case c = plain;

        c.shared_expert_overlap = true;
        test_against(groups, &c, &plain, 0.0);
        test_against_one_process(groups, &c);
        c.recompute = true;
        test_against(groups, &c, &plain, 0.0);
        c = plain;
        c.tp_comm_overlap = true;
        test_against(groups, &c, &plain, 1e-6);
        test_against(groups, &c, &c, 0.0);
        test_against_one_process(groups, &c);
        c.shared_expert_overlap = true;
        test_against_one_process(groups, &c);
    }
}

static void test_grid(int tp, int ep, int etp)
{
    const struct rank_grid_sizes sizes = {
        .world = launch_size(), .tp = tp, .cp = 1, .pp = 1, .ep = ep, .etp = etp};
    struct rank_grid grid;
    struct groups groups;

    if (rank_grid_init(&grid, &sizes) != 0) {
        launch_fail(error_text());
    }
    groups_create(&groups, &grid, launch_rank(), tp > 1);
    for (int d = DISPATCHER_ALLGATHER; d <= DISPATCHER_ALLTOALL_SEQ; d++) {
        for (int rule = 0; rule < NUM_RULES; rule++) {
            struct moe_case c = {.dispatcher = (enum dispatcher_kind)d,
                                 .rule = (enum rule)rule,
                                 .num_tokens = rule % 2 == 0 ? 7 : 13,
                                 .grouped = rule % 2 == 0};

            c.recompute = rule == RULE_DROP;
            c.no_shared_expert = rule == RULE_PAD;
            test_against_one_process(&groups, &c);
        }
        /* as much as can come, and not less: no rank has more than all slots */
        test_against_one_process(&groups, &(struct moe_case){.dispatcher = (enum dispatcher_kind)d,
                                                             .num_tokens = 1,
                                                             .rank_capacity_factor = ep * etp});
    }
    test_overlaps(&groups);
    groups_destroy(&groups);
}

int main(int argc, char **argv)
{
    const int size = dist_begin(argc, argv);

    for (int tp = 1; tp <= size; tp *= 2) {
        for (int etp = 1; etp <= size; etp *= 2) {
            for (int ep = 1; ep * etp <= size; ep *= 2) {
                test_grid(tp, ep, etp);
            }
        }
    }
    return dist_end();
}
