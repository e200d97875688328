/* Is what --moe-shared-expert-overlap and --tp-comm-overlap put between the start and the end of a
 * collective really hidden? Products here take a time of their own, as on an accelerator: they
 * sleep, so that other programs on this machine do not disturb. At least half of the delay that can
 * be hidden must be. ranks: 2 */
#include "dist_test.h"

#include <time.h>

#include "base/clock.h"
#include "comm/delay.h"
#include "moe/moe_layer.h"

enum { TOKENS = 8, HIDDEN = 16, FFN = 16, SHARED_FFN = 32, NUM_EXPERTS = 4, RUNS = 2 };

static const double delay_seconds = 0.025;
static const double slow_product_seconds =
    0.06; /* of 2 * TOKENS rows and the shared expert's width */

/* The shared expert's products, forward and backward, take time in proportion to their work. */
static void slow_matmul(struct stream *on, const struct matmul *args)
{
    const int64_t inner = args->transpose_a ? args->a->dim[0] : args->a->dim[1];
    const double work = (double)(args->c->dim[0] * args->c->dim[1] * inner);
    const double all = 2.0 * TOKENS * HIDDEN * SHARED_FFN / 2.0; /* fc2 of all tokens, TP = 2 */
    const bool is_router =
        args->c->dim[1] == NUM_EXPERTS || inner == NUM_EXPERTS || args->c->dim[0] == NUM_EXPERTS;

    ops_cpu()->matmul(on, args);
    if (!is_router) {
        nanosleep(&(struct timespec){.tv_nsec = (long)(1e9 * slow_product_seconds * work / all)},
                  NULL);
    }
}

struct layer {
    struct groups groups;
    struct param_list params;
    struct moe_layer moe;
    struct arena *memory, *saved, *scratch;
};

static void layer_create(struct layer *layer, bool shared_expert_overlap)
{
    layer->memory = arena_create("run", &device_cpu()->memory);
    layer->saved = arena_create("microbatch", &device_cpu()->memory);
    layer->scratch = arena_create("call", &device_cpu()->memory);
    param_list_init(&layer->params);
    moe_layer_init(
        &layer->moe, &layer->params, &layer->groups,
        &(struct moe_layer_config){
            .router = {.name = "router",
                       .hidden_size = HIDDEN,
                       .num_experts = NUM_EXPERTS,
                       .rule = {.score = ROUTER_SOFTMAX, .topk = 2, .scaling_factor = 1.0f},
                       .balance = {.topk = 2, .num_experts = NUM_EXPERTS},
                       .init_std = 1.0f},
            .experts = {.name = "experts",
                        .hidden_size = HIDDEN,
                        .ffn_hidden_size = FFN,
                        .num_experts = NUM_EXPERTS,
                        .activation = ACTIVATION_SWIGLU,
                        .grouped = true,
                        .init_std = 0.1f,
                        .output_init_std = 0.1f},
            .shared_expert = {.name = "shared",
                              .hidden_size = HIDDEN,
                              .ffn_hidden_size = SHARED_FFN,
                              .activation = ACTIVATION_GELU,
                              .init_std = 0.1f,
                              .output_init_std = 0.1f},
            .dispatcher = DISPATCHER_ALLTOALL,
            .shared_expert_overlap = shared_expert_overlap});
    param_list_allocate(&layer->params, layer->memory, stream, DTYPE_F32, true);
    moe_layer_allocate(&layer->moe, stream, layer->memory);
    param_list_initialize(&layer->params, stream, 1);
}

static void layer_destroy(struct layer *layer)
{
    param_list_free(&layer->params);
    arena_destroy(layer->memory);
    arena_destroy(layer->saved);
    arena_destroy(layer->scratch);
}

static double run_once(struct layer *layer, const struct tensor *x)
{
    const struct pass pass = {.stream = stream,
                              .groups = &layer->groups,
                              .saved = layer->saved,
                              .scratch = layer->scratch,
                              .dtype = DTYPE_F32,
                              .training = true,
                              .num_sequences = 1,
                              .aux_loss_scale = 1.0f};
    struct tensor y = tensor_allocate(arena, DTYPE_F32, x->dim, 2);
    struct tensor d_x = tensor_allocate(arena, DTYPE_F32, x->dim, 2);
    struct tensor together = tensor_new(arena, DTYPE_I32, 1);
    struct moe_saved saved;
    double start;

    dist_fill(&together, 2, 0);
    comm_wait(comm_all_reduce(layer->groups.world, stream, &together, COMM_MAX), stream);
    start = clock_seconds();
    moe_layer_forward(&layer->moe, &pass, &y, x, NULL, &saved);
    moe_layer_backward(&layer->moe, &pass, &d_x, x, &saved);
    arena_release(layer->saved, (struct arena_mark){0});
    return clock_seconds() - start;
}

/* The fastest of a few forwards and backwards: what disturbs only adds. */
static double seconds_of(const struct groups *groups, bool tp_overlap, bool shared_overlap)
{
    struct layer layer = {.groups = *groups};
    struct tensor x = tensor_new(arena, DTYPE_F32, TOKENS, HIDDEN);
    double best = INFINITY;

    layer.groups.tp_comm_overlap = tp_overlap;
    dist_fill(&x, 1, launch_rank() * TOKENS * HIDDEN);
    layer_create(&layer, shared_overlap);
    for (int i = 0; i < RUNS; i++) {
        best = fmin(best, run_once(&layer, &x));
    }
    layer_destroy(&layer);
    dist_release();
    return best;
}

static void test_overlap(const char *what, const char *delays, int tp, bool tp_overlap,
                         bool shared_overlap, int num_hidden)
{
    const struct rank_grid_sizes sizes = {
        .world = launch_size(), .tp = tp, .cp = 1, .pp = 1, .ep = launch_size(), .etp = 1};
    struct rank_grid grid;
    struct groups groups;
    double without, with;

    if (rank_grid_init(&grid, &sizes) != 0 || comm_delay_parse(delays) != 0) {
        launch_fail(error_text());
    }
    groups_create(&groups, &grid, launch_rank(), tp > 1);
    without = seconds_of(&groups, false, false);
    with = seconds_of(&groups, tp_overlap, shared_overlap);
    if (launch_rank() == 0) {
        printf("%s: %.0f ms without, %.0f ms with overlap, %.0f ms can be hidden\n", what,
               1e3 * without, 1e3 * with, 1e3 * num_hidden * delay_seconds);
    }
    if (without - with < 0.5 * num_hidden * delay_seconds) {
        dist_failed("%s: %g s without overlap, %g s with it; %d delays of %g s can be hidden", what,
                    without, with, num_hidden, delay_seconds);
    }
    groups_destroy(&groups);
}

int main(int argc, char **argv)
{
    struct ops slow = *ops_cpu();

    dist_begin(argc, argv);
    slow.matmul = slow_matmul;
    stream->ops = &slow;
    /* dispatch and combine, forward and backward */
    test_overlap("shared expert", "ep:25", 1, false, true, 4);
    /* besides, its tokens enter and leave: x and y, d_y and d_x */
    test_overlap("shared expert under TP", "ep:25,tp:25", 2, false, true, 4);
    /* x in forward and d_y in backward, each behind the product of this rank's own tokens */
    test_overlap("tensor parallelism", "tp:25", 2, true, false, 2);
    return dist_end();
}
