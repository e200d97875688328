/* Every dispatcher under every split of the ranks into ETP x EP, against dispatcher_local in one
 * process that has the tokens of all ranks: rows, outputs, gradients of tokens, probabilities and
 * weights. ranks: 2 4 */
#include "dist_test.h"

#include <string.h>

#include "moe/dispatcher.h"
#include "moe/experts.h"

enum { NUM_EXPERTS = 8, TOPK = 3, HIDDEN = 12, FFN = 8, RANKS_MAX = 16 };

/* What happens to the routing of a case. */
enum routing { ROUTING_EVEN, ROUTING_ONE_EXPERT, ROUTING_DROP, ROUTING_PAD, NUM_ROUTINGS };

static const char *const routing_names[NUM_ROUTINGS] = {"even", "one rank's experts", "drop",
                                                        "drop and pad"};

struct dispatch_case {
    const struct dispatcher *dispatcher;
    enum routing routing;
    enum dtype dtype;
    bool grouped;
    int64_t num_tokens; /* of a rank */
    int64_t capacity;   /* ROUTING_DROP, ROUTING_PAD: of an expert for a rank's tokens */
    double tolerance;
};

/* The experts with their inputs and results, of one rank or of all tokens in one process. */
struct world {
    const struct groups *groups;
    struct param_list params;
    struct experts experts;
    struct dispatched rows;
    struct tensor x, d_y, indices, probs; /* inputs */
    struct tensor y, d_x, d_probs;        /* results */
};

static double draw(uint64_t row, int64_t i)
{
    return rng_uniform(rng_key(99, "dist dispatcher", 0), row, (uint64_t)i);
}

/* K different experts for a global token; with one rank's experts, always those from 0 on. */
static void choose(enum routing routing, int64_t token, int32_t *experts)
{
    const int start = routing == ROUTING_ONE_EXPERT ? 0 : (int)(draw(1, token) * NUM_EXPERTS);
    const int step = routing == ROUTING_ONE_EXPERT ? 1 : draw(2, token) < 0.5 ? 1 : 3;

    for (int k = 0; k < TOPK; k++) {
        experts[k] = (start + k * step) % NUM_EXPERTS;
    }
    if (routing == ROUTING_ONE_EXPERT) {
        experts[1] = experts[2] = -1;
    }
}

/* The first `capacity` tokens of an expert among those of a rank stay. */
static void drop(struct world *w, int64_t num_tokens, int64_t capacity)
{
    int64_t num_kept[NUM_EXPERTS];

    for (int64_t slot = 0; slot < w->indices.dim[0] * TOPK; slot++) {
        int32_t *expert = (int32_t *)w->indices.data + slot;

        if (slot % (num_tokens * TOPK) == 0) {
            memset(num_kept, 0, sizeof num_kept);
        }
        if (*expert >= 0 && num_kept[*expert]++ >= capacity) {
            *expert = -1;
            ((float *)w->probs.data)[slot] = 0.0f;
        }
    }
}

/* The tokens [first, first + n) of all. */
static void make_inputs(struct world *w, const struct dispatch_case *c, int64_t first, int64_t n)
{
    w->x = tensor_new(arena, c->dtype, n, HIDDEN);
    w->d_y = tensor_new(arena, c->dtype, n, HIDDEN);
    w->indices = tensor_new(arena, DTYPE_I32, n, TOPK);
    w->probs = tensor_new(arena, DTYPE_F32, n, TOPK);
    dist_fill(&w->x, 10, first * HIDDEN);
    dist_fill(&w->d_y, 11, first * HIDDEN);
    for (int64_t t = 0; t < n; t++) {
        int32_t *experts = (int32_t *)w->indices.data + t * TOPK;

        choose(c->routing, first + t, experts);
        for (int k = 0; k < TOPK; k++) {
            ((float *)w->probs.data)[t * TOPK + k] =
                experts[k] < 0 ? 0.0f : (float)draw(3, (first + t) * TOPK + k);
        }
    }
    if (c->capacity > 0) {
        drop(w, c->num_tokens, c->capacity);
    }
}

static void make_experts(struct world *w, const struct dispatch_case *c)
{
    param_list_init(&w->params);
    experts_init(&w->experts, &w->params, w->groups,
                 &(struct experts_config){.name = "experts",
                                          .hidden_size = HIDDEN,
                                          .ffn_hidden_size = FFN,
                                          .num_experts = NUM_EXPERTS,
                                          .activation = ACTIVATION_SWIGLU,
                                          .grouped = c->grouped,
                                          .init_std = 0.4f,
                                          .output_init_std = 0.4f});
    param_list_allocate(&w->params, arena, stream, c->dtype, true);
    param_list_initialize(&w->params, stream, 7);
}

/* Forward and backward as moe_layer.c does them. */
static void run_case(struct world *w, const struct dispatch_case *c,
                     const struct dispatcher *dispatcher, int64_t padded_capacity)
{
    struct arena *scratch = arena_create("call", &device_cpu()->memory);
    const struct pass pass = {.stream = stream,
                              .groups = w->groups,
                              .saved = arena,
                              .scratch = scratch,
                              .dtype = c->dtype,
                              .training = true};
    const struct dispatch_input input = {.x = &w->x,
                                         .indices = &w->indices,
                                         .probs = &w->probs,
                                         .num_experts = NUM_EXPERTS,
                                         .padded_capacity = padded_capacity};
    struct tensor y_rows, d_y_rows, d_rows, d_row_prob;
    const struct tensor *row_token;
    struct dispatch_flight flight = {0};
    struct experts_saved saved;

    w->y = tensor_new(arena, c->dtype, w->x.dim[0], HIDDEN);
    w->d_x = tensor_new(arena, c->dtype, w->x.dim[0], HIDDEN);
    w->d_probs = tensor_new(arena, DTYPE_F32, w->x.dim[0], TOPK);
    dispatcher->dispatch_start(&pass, &input, &w->rows, &flight);
    dispatcher->dispatch_finish(&pass, &w->rows, &flight);
    y_rows = tensor_new(scratch, c->dtype, w->rows.num_rows, HIDDEN);
    experts_layer_forward(&w->experts, &pass, &y_rows, &w->rows, &saved);
    dispatcher->combine_start(&pass, &w->rows, &w->y, &y_rows, &w->x, &flight);
    dispatcher->combine_finish(&pass, &w->rows, &w->y, &w->x, &flight);
    d_rows = tensor_new(scratch, c->dtype, w->rows.num_rows, HIDDEN);
    d_row_prob = tensor_new(scratch, DTYPE_F32, w->rows.num_rows);
    dispatcher->combine_backward_start(&pass, &w->rows, &w->d_y, &d_y_rows, &flight);
    dispatcher->combine_backward_finish(&pass, &w->rows, &d_y_rows, &row_token, &flight);
    experts_layer_backward(&w->experts, &pass, &d_rows, &d_row_prob, &d_y_rows, row_token, &w->rows,
                           &saved);
    dispatcher->dispatch_backward_start(&pass, &w->rows, &w->d_x, &w->d_probs, &d_rows, &d_row_prob,
                                        &flight);
    dispatcher->dispatch_backward_finish(&pass, &w->rows, &w->d_x, &w->d_probs, &flight);
    arena_destroy(scratch);
}

/* The box of a whole parameter's gradient that this rank's parameter holds. */
static void compare_gradient(const char *what, const struct param *mine, const struct param *whole,
                             double tolerance)
{
    const struct box all = box_whole(whole->global_shape, whole->num_dims);
    struct tensor wanted = tensor_allocate(arena, DTYPE_F32, mine->box.size, mine->num_dims);

    box_copy(wanted.data, &mine->box, whole->grad.data, &all, &mine->box, sizeof(float));
    dist_compare(what, &mine->grad, &wanted, tolerance);
}

/* Canonical order: by expert, then by global token, whatever the number of ranks (no fillers). */
static void compare_rows(const char *what, const struct world *mine, const struct world *all)
{
    const int first = mine->groups->ep->rank * mine->experts.num_local;
    const int32_t *offsets = mine->rows.offsets.data, *wanted = all->rows.offsets.data;
    struct tensor got, want;

    for (int e = 0; e <= mine->experts.num_local; e++) {
        if (offsets[e] != wanted[first + e] - wanted[first]) {
            dist_failed("%s: rows of expert %d begin at %d, wanted %d", what, first + e, offsets[e],
                        wanted[first + e] - wanted[first]);
            return;
        }
    }
    got = tensor_rows(&mine->rows.row_prob, 0, offsets[mine->experts.num_local]);
    want = tensor_rows(&all->rows.row_prob, wanted[first], got.dim[0]);
    dist_compare(what, &got, &want, 0.0);
}

static void compare_worlds(const char *what, const struct dispatch_case *c,
                           const struct world *mine, const struct world *all)
{
    const int64_t first = launch_rank() * c->num_tokens;
    const struct tensor y = tensor_rows(&all->y, first, c->num_tokens);
    const struct tensor d_x = tensor_rows(&all->d_x, first, c->num_tokens);
    const struct tensor d_probs = tensor_rows(&all->d_probs, first, c->num_tokens);
    char text[192];

    if (c->routing != ROUTING_PAD) {
        snprintf(text, sizeof text, "%s: rows", what);
        compare_rows(text, mine, all);
    }
    snprintf(text, sizeof text, "%s: y", what);
    dist_compare(text, &mine->y, &y, c->tolerance);
    snprintf(text, sizeof text, "%s: d_x", what);
    dist_compare(text, &mine->d_x, &d_x, c->tolerance);
    snprintf(text, sizeof text, "%s: d_probs", what);
    dist_compare(text, &mine->d_probs, &d_probs, c->tolerance);
    snprintf(text, sizeof text, "%s: d_fc1", what);
    compare_gradient(text, mine->experts.fc1, all->experts.fc1, c->tolerance);
    snprintf(text, sizeof text, "%s: d_fc2", what);
    compare_gradient(text, mine->experts.fc2, all->experts.fc2, c->tolerance);
}

static void test_case(const struct groups *groups, const struct groups *self,
                      const struct dispatch_case *c)
{
    struct world mine = {.groups = groups}, all = {.groups = self};
    char what[128];

    snprintf(what, sizeof what, "%s ep %d etp %d %s %s", c->dispatcher->name, groups->ep->size,
             groups->etp->size, routing_names[c->routing], dtype_name(c->dtype));
    make_experts(&mine, c);
    make_experts(&all, c);
    make_inputs(&mine, c, launch_rank() * c->num_tokens, c->num_tokens);
    make_inputs(&all, c, 0, launch_size() * c->num_tokens);
    run_case(&mine, c, c->dispatcher, c->routing == ROUTING_PAD ? c->capacity : 0);
    run_case(&all, c, &dispatcher_local, 0);
    compare_worlds(what, c, &mine, &all);
    param_list_free(&mine.params);
    param_list_free(&all.params);
    dist_release();
}

/* On the device that only measures memory, rows are counted as if the routing were even. */
static void even_routing_is_measured(const struct groups *groups,
                                     const struct dispatcher *dispatcher)
{
    struct stream *null = stream_create(device_null(), ops_null());
    struct arena *memory = arena_create("null", &device_null()->memory);
    const struct pass pass = {
        .stream = null, .groups = groups, .saved = memory, .scratch = memory, .dtype = DTYPE_BF16};
    const struct tensor x = tensor_new(memory, DTYPE_BF16, NUM_EXPERTS, HIDDEN);
    const struct tensor indices = tensor_new(memory, DTYPE_I32, NUM_EXPERTS, TOPK);
    const struct tensor probs = tensor_new(memory, DTYPE_F32, NUM_EXPERTS, TOPK);
    const int64_t wanted = NUM_EXPERTS * TOPK * groups->etp->size;
    struct dispatch_flight flight = {0};
    struct dispatched rows;

    dispatcher->dispatch_start(
        &pass,
        &(struct dispatch_input){
            .x = &x, .indices = &indices, .probs = &probs, .num_experts = NUM_EXPERTS},
        &rows, &flight);
    dispatcher->dispatch_finish(&pass, &rows, &flight);
    if (rows.num_rows != wanted) {
        dist_failed("%s: %lld rows on the null device, wanted %lld", dispatcher->name,
                    (long long)rows.num_rows, (long long)wanted);
    }
    arena_destroy(memory);
    stream_destroy(null);
}

static void test_grid(int etp)
{
    static const struct dispatcher *const dispatchers[] = {
        &dispatcher_allgather, &dispatcher_alltoall, &dispatcher_alltoall_seq};
    const struct rank_grid_sizes sizes = {
        .world = launch_size(), .tp = 1, .cp = 1, .pp = 1, .ep = launch_size() / etp, .etp = etp};
    struct rank_grid grid;
    struct groups groups, self;

    if (rank_grid_init(&grid, &sizes) != 0) {
        launch_fail(error_text());
    }
    groups_create(&groups, &grid, launch_rank(), false);
    groups_create_self(&self);
    for (int d = 0; d < 3; d++) {
        even_routing_is_measured(&groups, dispatchers[d]);
        for (int routing = 0; routing < NUM_ROUTINGS; routing++) {
            const bool drops = routing == ROUTING_DROP || routing == ROUTING_PAD;
            struct dispatch_case c = {.dispatcher = dispatchers[d],
                                      .routing = (enum routing)routing,
                                      .dtype = DTYPE_F32,
                                      .grouped = routing % 2 == 0,
                                      .num_tokens = 7,
                                      .capacity = drops ? 2 : 0,
                                      .tolerance = 2e-6};

            test_case(&groups, &self, &c);
            c.dtype = DTYPE_BF16;
            c.tolerance = 0.03;
            test_case(&groups, &self, &c);
        }
    }
    groups_destroy(&groups);
    groups_destroy(&self);
}

int main(int argc, char **argv)
{
    dist_begin(argc, argv);
    for (int etp = 1; etp <= launch_size(); etp *= 2) {
        test_grid(etp);
    }
    return dist_end();
}
