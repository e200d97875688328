/* Routing that acts on each rank's own tokens: capacity (M2) and sinkhorn (M1.9). The layer under
 * every split of the ranks, with every dispatcher, against one process that takes the ranks' slices
 * of the tokens one after another, each routed apart, and adds the gradients up; the routing also
 * against plain loops. ranks: 2 4 */
#include "dist_test.h"

#include <string.h>

#include "moe/moe_layer.h"

enum { NUM_EXPERTS = 8, HIDDEN = 12, FFN = 8, TOPK_MAX = 3, FAVOURITE = 5 };

enum tokens {
    TOKENS_RANDOM,
    TOKENS_EMPTY_EXPERTS, /* half of the experts are chosen by nobody */
    TOKENS_ONE_EXPERT,    /* FAVOURITE is everybody's first choice */
    TOKENS_TIED           /* the same on every rank: zeros and copies, for experts that are pairs */
};

struct rule_case {
    const char *name;
    int64_t num_tokens; /* of a rank */
    int topk;
    double capacity_factor; /* 0: dropless */
    bool pad;
    bool drops; /* somebody somewhere */
    enum drop_policy policy;
    bool sinkhorn;
    enum tokens tokens;
    bool losses, jitter, shared_expert, recompute;
};

static const struct rule_case rules[] = {
    {"by probs", 13, 2, 1.0, .drops = true, .losses = true},
    {"by probs, padded", 13, 2, 0.6, .pad = true, .drops = true},
    {"by position", 11, 3, 0.5, .drops = true, .policy = DROP_BY_POSITION},
    {"by position, padded", 7, 2, 0.7, .pad = true, .drops = true, .policy = DROP_BY_POSITION,
     .losses = true, .jitter = true},
    {"shared experts, recompute", 11, 3, 0.5, .drops = true, .policy = DROP_BY_POSITION,
     .shared_expert = true, .recompute = true},
    {"room for more than all tokens, padded", 5, 2, 9.0, .pad = true},
    {"empty experts", 13, 2, 1.0, .drops = true, .tokens = TOKENS_EMPTY_EXPERTS},
    {"empty experts, padded", 13, 2, 1.0, .pad = true, .drops = true,
     .tokens = TOKENS_EMPTY_EXPERTS},
    {"one expert", 7, 1, 1.5, .drops = true, .tokens = TOKENS_ONE_EXPERT},
    {"one expert, padded", 11, 1, 1.0, .pad = true, .drops = true, .policy = DROP_BY_POSITION,
     .tokens = TOKENS_ONE_EXPERT},
    {"one expert, dropless", 7, 1, 0.0, .tokens = TOKENS_ONE_EXPERT},
    {"one token", 1, 2, 0.1, .pad = false},
    {"one token, padded", 1, 3, 1.0, .pad = true},
    {"ties", 13, 2, 0.8, .drops = true, .tokens = TOKENS_TIED},
    {"ties, padded", 13, 3, 0.8, .pad = true, .drops = true, .tokens = TOKENS_TIED},
    {"sinkhorn", 13, 2, 0.0, .sinkhorn = true, .shared_expert = true},
    {"sinkhorn, one choice", 7, 1, 0.0, .sinkhorn = true, .tokens = TOKENS_ONE_EXPERT},
    {"sinkhorn, recompute", 11, 3, 0.0, .sinkhorn = true, .recompute = true},
    {"sinkhorn, one token", 1, 2, 0.0, .sinkhorn = true},
};

/* A layer with its memory, and what it made of tokens. */
struct layer {
    const struct groups *groups;
    struct param_list params;
    struct moe_layer moe;
    struct arena *run, *saved, *scratch;
};

struct result {
    struct tensor y, d_x; /* [T,H] */
    struct moe_saved saved;
};

static struct router_rule router_rule_of(const struct rule_case *rule)
{
    return (struct router_rule){.score = rule->sinkhorn && rule->topk == 1 ? ROUTER_SIGMOID
                                                                           : ROUTER_SOFTMAX,
                                .pre_softmax = rule->sinkhorn || rule->topk == 1,
                                .topk = rule->topk,
                                .scaling_factor = 1.0f};
}

static struct moe_layer_config config_of(const struct rule_case *rule,
                                         enum dispatcher_kind dispatcher)
{
    const struct router_rule router_rule = router_rule_of(rule);

    return (struct moe_layer_config){
        .router = {.name = "router",
                   .layer = 2,
                   .hidden_size = HIDDEN,
                   .num_experts = NUM_EXPERTS,
                   .rule = router_rule,
                   .sinkhorn = rule->sinkhorn,
                   .balance = {.coefficient = {[BALANCE_AUX_LOSS] = rule->losses ? 0.3f : 0.0f},
                               .score = router_rule.score,
                               .topk = rule->topk,
                               .num_experts = NUM_EXPERTS},
                   .z_loss_coefficient = rule->losses ? 0.1f : 0.0f,
                   .jitter_eps = rule->jitter ? 0.2f : 0.0f,
                   .capacity_factor = rule->capacity_factor,
                   .pad_to_capacity = rule->pad,
                   .drop_policy = rule->policy,
                   .init_std = 0.4f},
        .experts = {.name = "experts",
                    .hidden_size = HIDDEN,
                    .ffn_hidden_size = FFN,
                    .num_experts = NUM_EXPERTS,
                    .activation = ACTIVATION_SWIGLU,
                    .grouped = true,
                    .init_std = 0.4f,
                    .output_init_std = 0.4f},
        .shared_expert = {.name = "shared_experts",
                          .hidden_size = HIDDEN,
                          .ffn_hidden_size = rule->shared_expert ? FFN : 0,
                          .activation = ACTIVATION_SWIGLU,
                          .init_std = 0.4f,
                          .output_init_std = 0.4f},
        .dispatcher = dispatcher,
        .recompute = rule->recompute,
    };
}

/* The tokens' first feature is 1 where this matters: its weight is the expert's bias. */
static void shape_router(struct tensor *weight, enum tokens tokens)
{
    for (int e = 0; e < NUM_EXPERTS; e++) {
        for (int h = 0; h < HIDDEN; h++) {
            if (tokens == TOKENS_TIED && e % 2 == 1) {
                dist_set(weight, e * HIDDEN + h, dist_get(weight, (e - 1) * HIDDEN + h));
            }
        }
        if (tokens == TOKENS_EMPTY_EXPERTS) {
            dist_set(weight, e * HIDDEN, e % 4 == 0 || e >= 6 ? -20.0 : 0.0);
        } else if (tokens == TOKENS_ONE_EXPERT) {
            dist_set(weight, e * HIDDEN, e == FAVOURITE ? 6.0 : 0.0);
        }
    }
}

static void layer_create(struct layer *layer, const struct groups *groups,
                         const struct rule_case *rule, enum dispatcher_kind dispatcher)
{
    const struct memory_source *memory = &device_cpu()->memory;
    const struct moe_layer_config config = config_of(rule, dispatcher);

    *layer = (struct layer){.groups = groups,
                            .run = arena_create("run", memory),
                            .saved = arena_create("microbatch", memory),
                            .scratch = arena_create("call", memory)};
    param_list_init(&layer->params);
    moe_layer_init(&layer->moe, &layer->params, groups, &config);
    param_list_allocate(&layer->params, layer->run, stream, DTYPE_F32, true);
    moe_layer_allocate(&layer->moe, stream, layer->run);
    param_list_initialize(&layer->params, stream, 7);
    shape_router(&layer->moe.router.weight->value, rule->tokens);
}

static void layer_destroy(struct layer *layer)
{
    param_list_free(&layer->params);
    arena_destroy(layer->run);
    arena_destroy(layer->saved);
    arena_destroy(layer->scratch);
}

static double random_number(int64_t row, int64_t i)
{
    return rng_normal(rng_key(4321, "dist capacity", 0), (uint64_t)row, (uint64_t)i);
}

/* The tokens [first, first + n) of all ranks. */
static struct tensor make_tokens(const struct rule_case *rule, int64_t first, int64_t n)
{
    struct tensor x = tensor_new(arena, DTYPE_F32, n, HIDDEN);

    for (int64_t t = 0; t < n; t++) {
        const int64_t local = (first + t) % rule->num_tokens;
        const bool is_tied = rule->tokens == TOKENS_TIED;

        for (int h = 0; h < HIDDEN; h++) {
            const double number = random_number(0, (is_tied ? local / 3 : first + t) * HIDDEN + h);

            dist_set(&x, t * HIDDEN + h, is_tied && local % 3 == 0 ? 0.0 : number);
        }
        if (!is_tied) {
            dist_set(&x, t * HIDDEN, 1.0);
        }
    }
    return x;
}

static struct tensor make_output_gradient(int64_t first, int64_t n)
{
    struct tensor d_y = tensor_new(arena, DTYPE_F32, n, HIDDEN);

    for (int64_t i = 0; i < n * HIDDEN; i++) {
        dist_set(&d_y, i, random_number(1, first * HIDDEN + i));
    }
    return d_y;
}

/* Forward and backward of the tokens [first, ...) of all ranks. The saved tensors stay readable
 * until the layer's next run. */
static void run(struct layer *layer, struct result *result, const struct tensor *x,
                const struct tensor *d_y, int64_t first)
{
    struct pass pass = {.stream = stream,
                        .groups = layer->groups,
                        .saved = layer->saved,
                        .scratch = layer->scratch,
                        .dtype = DTYPE_F32,
                        .training = true,
                        .seed = 11,
                        .num_sequences = 1,
                        .token_id = tensor_new(arena, DTYPE_I64, x->dim[0]),
                        .aux_loss_scale = 1.0f};

    for (int64_t t = 0; t < x->dim[0]; t++) {
        dist_set(&pass.token_id, t, (double)(first + t));
    }
    arena_release(layer->saved, (struct arena_mark){0});
    result->y = tensor_new(arena, DTYPE_F32, x->dim[0], HIDDEN);
    result->d_x = tensor_new(arena, DTYPE_F32, x->dim[0], HIDDEN);
    moe_layer_forward(&layer->moe, &pass, &result->y, x, NULL, &result->saved);
    moe_layer_backward(&layer->moe, &pass, &result->d_x, d_y, &result->saved);
}

/* What the reduction of gradients sums (M5.7, M5.8). */
static void reduce_gradients(struct layer *layer)
{
    for (int i = 0; i < layer->params.num_params; i++) {
        struct param *param = layer->params.params[i];
        struct comm *data =
            param->scope == PARAM_EXPERT ? layer->groups->edp : layer->groups->dp_cp;

        if (param->sum_over_tp) {
            comm_wait(comm_all_reduce(layer->groups->tp, stream, &param->grad, COMM_SUM), stream);
        }
        comm_wait(comm_all_reduce(data, stream, &param->grad, COMM_SUM), stream);
    }
}

/* to += from */
static void add(struct tensor *to, const struct tensor *from)
{
    for (int64_t i = 0; i < tensor_num_elements(to); i++) {
        dist_set(to, i, dist_get(to, i) + dist_get(from, i));
    }
}

/* The balancing losses look at the tokens of all ranks that share sequences, before any drop
 * (M1.7): a layer without capacity whose output nobody asks for. */
static void emulate_losses(struct layer *all, struct result *sum, const struct rule_case *rule,
                           const struct groups *self, int tp_cp_size)
{
    const int64_t n = rule->num_tokens * tp_cp_size;
    struct rule_case dropless = *rule;
    struct tensor x, d_y, d_x;
    struct result result;
    struct layer losses;

    dropless.capacity_factor = 0.0;
    dropless.pad = false;
    layer_create(&losses, self, &dropless, DISPATCHER_ALLTOALL);
    d_y = tensor_new(arena, DTYPE_F32, n, HIDDEN);
    op_fill_zero(stream, &d_y);
    for (int64_t first = 0; first < sum->d_x.dim[0]; first += n) {
        x = make_tokens(rule, first, n);
        run(&losses, &result, &x, &d_y, first);
        d_x = tensor_rows(&sum->d_x, first, n);
        add(&d_x, &result.d_x);
    }
    add(&all->moe.router.weight->grad, &losses.moe.router.weight->grad);
    layer_destroy(&losses);
}

/* One process: the ranks' slices, one after another, through the same layer. */
static void emulate(struct layer *all, struct result *sum, const struct rule_case *rule,
                    const struct groups *self, int tp_cp_size)
{
    const int64_t n = rule->num_tokens;
    struct rule_case apart = *rule;

    apart.losses = false;
    layer_create(all, self, &apart, DISPATCHER_ALLTOALL);
    sum->y = tensor_new(arena, DTYPE_F32, n * launch_size(), HIDDEN);
    sum->d_x = tensor_new(arena, DTYPE_F32, n * launch_size(), HIDDEN);
    for (int64_t first = 0; first < n * launch_size(); first += n) {
        const struct tensor x = make_tokens(rule, first, n), d_y = make_output_gradient(first, n);
        struct tensor y = tensor_rows(&sum->y, first, n), d_x = tensor_rows(&sum->d_x, first, n);
        struct result slice;

        run(all, &slice, &x, &d_y, first);
        memcpy(y.data, slice.y.data, tensor_size_bytes(&y));
        memcpy(d_x.data, slice.d_x.data, tensor_size_bytes(&d_x));
    }
    if (rule->losses) {
        emulate_losses(all, sum, rule, self, tp_cp_size);
    }
}

static void compare_gradients(const char *what, const struct layer *mine, const struct layer *all)
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

/* The assignment of M1.9 in place of the logits [T,E]. */
static void sinkhorn(double *matrix, int64_t num_tokens)
{
    double of_expert[NUM_EXPERTS], of_token[16], change = 1.0;

    CHECK(num_tokens <= 16, "%lld tokens", (long long)num_tokens);
    for (int e = 0; e < NUM_EXPERTS; e++) {
        of_expert[e] = 1.0;
    }
    for (int64_t i = 0; i < num_tokens * NUM_EXPERTS; i++) {
        matrix[i] = exp(matrix[i]);
    }
    while (change > 1e-4) {
        for (int64_t t = 0; t < num_tokens; t++) {
            double sum = 1e-8;

            for (int e = 0; e < NUM_EXPERTS; e++) {
                sum += of_expert[e] * matrix[t * NUM_EXPERTS + e];
            }
            of_token[t] = 1.0 / ((double)num_tokens * sum);
        }
        change = 0.0;
        for (int e = 0; e < NUM_EXPERTS; e++) {
            double sum = 1e-8;

            for (int64_t t = 0; t < num_tokens; t++) {
                sum += of_token[t] * matrix[t * NUM_EXPERTS + e];
            }
            change += fabs(1.0 / (NUM_EXPERTS * sum) - of_expert[e]) / NUM_EXPERTS;
            of_expert[e] = 1.0 / (NUM_EXPERTS * sum);
        }
    }
    for (int64_t i = 0; i < num_tokens * NUM_EXPERTS; i++) {
        matrix[i] *= of_expert[i % NUM_EXPERTS] * of_token[i / NUM_EXPERTS];
    }
}

/* The K largest of values [E], ties to the lowest expert. */
static void choose(int32_t *chosen, const double *values, int topk)
{
    bool taken[NUM_EXPERTS] = {false};

    for (int k = 0; k < topk; k++) {
        int best = -1;

        for (int e = 0; e < NUM_EXPERTS; e++) {
            if (!taken[e] && (best < 0 || values[e] > values[best])) {
                best = e;
            }
        }
        taken[best] = true;
        chosen[k] = best;
    }
}

/* probs [K] of the chosen experts of a token with these logits [E]. */
static void probabilities(double *probs, const int32_t *chosen, const double *logits,
                          const struct router_rule *rule)
{
    double sum = 0.0;

    for (int e = 0; e < NUM_EXPERTS; e++) {
        sum += exp(logits[e]);
    }
    if (!rule->pre_softmax) {
        sum = 0.0;
        for (int k = 0; k < rule->topk; k++) {
            sum += exp(logits[chosen[k]]);
        }
    }
    for (int k = 0; k < rule->topk; k++) {
        const double odds = exp(logits[chosen[k]]);

        probs[k] = rule->score == ROUTER_SIGMOID ? odds / (1.0 + odds) : odds / sum;
    }
}

/* M2 in place: a slot stays if fewer than `capacity` slots of its expert come before it. */
static void drop(int32_t *indices, double *probs, const struct rule_case *rule)
{
    const double share = (double)(rule->num_tokens * rule->topk) / NUM_EXPERTS;
    const int64_t capacity = (int64_t)ceil(share * rule->capacity_factor);
    const int64_t num_slots = rule->num_tokens * rule->topk;
    bool stays[16 * TOPK_MAX];

    for (int64_t i = 0; i < num_slots; i++) {
        int64_t num_before = 0;

        for (int64_t j = 0; j < num_slots; j++) {
            const bool is_better = rule->policy == DROP_BY_POSITION || probs[j] == probs[i]
                                       ? j < i
                                       : probs[j] > probs[i];

            num_before += indices[j] == indices[i] && is_better;
        }
        stays[i] = num_before < capacity;
    }
    for (int64_t i = 0; i < num_slots; i++) {
        if (!stays[i]) {
            indices[i] = -1;
            probs[i] = 0.0;
        }
    }
}

/* The rank's routing from its logits by plain loops, and the logits where the input is plain. */
static void check_routing(const char *what, const struct layer *layer, const struct result *mine,
                          const struct tensor *x, const struct rule_case *rule)
{
    const struct router_saved *router = &mine->saved.router;
    const struct router_rule router_rule = router_rule_of(rule);
    const int64_t n = rule->num_tokens;
    struct tensor wanted = tensor_new(arena, DTYPE_F64, n, NUM_EXPERTS);
    struct tensor indices = tensor_new(arena, DTYPE_I32, n, rule->topk);
    struct tensor probs = tensor_new(arena, DTYPE_F64, n, rule->topk);
    double *logits = wanted.data, selection[16 * NUM_EXPERTS];
    char text[192];

    for (int64_t i = 0; i < n * NUM_EXPERTS && !rule->jitter; i++) {
        logits[i] = 0.0;
        for (int h = 0; h < HIDDEN; h++) {
            logits[i] += dist_get(x, i / NUM_EXPERTS * HIDDEN + h) *
                         dist_get(&layer->moe.router.weight->value, i % NUM_EXPERTS * HIDDEN + h);
        }
    }
    snprintf(text, sizeof text, "%s: logits", what);
    if (!rule->jitter) {
        dist_compare(text, &router->logits, &wanted, 1e-5);
    }
    for (int64_t i = 0; i < n * NUM_EXPERTS; i++) {
        selection[i] = logits[i] = dist_get(&router->logits, i);
    }
    if (rule->sinkhorn) {
        sinkhorn(selection, n);
    }
    for (int64_t t = 0; t < n; t++) {
        int32_t *chosen = (int32_t *)indices.data + t * rule->topk;

        choose(chosen, selection + t * NUM_EXPERTS, rule->topk);
        probabilities((double *)probs.data + t * rule->topk, chosen, logits + t * NUM_EXPERTS,
                      &router_rule);
    }
    if (rule->capacity_factor > 0.0) {
        drop(indices.data, probs.data, rule);
    }
    if (rule->sinkhorn && n == 1) {
        return; /* balanced, a single token is for all experts alike: rounding decides */
    }
    snprintf(text, sizeof text, "%s: experts chosen", what);
    dist_compare(text, &router->indices, &indices, 0.0);
    snprintf(text, sizeof text, "%s: probabilities", what);
    dist_compare(text, &router->probs, &probs, 1e-6);
}

/* All ranks that hold the same tokens decide alike, bit for bit. */
static void check_same_everywhere(const char *what, const struct layer *layer,
                                  const struct result *mine)
{
    const struct router_saved *router = &mine->saved.router;
    struct tensor indices =
        tensor_new(arena, DTYPE_I32, router->indices.dim[0], router->indices.dim[1]);
    struct tensor probs = tensor_new(arena, DTYPE_F32, router->probs.dim[0], router->probs.dim[1]);

    memcpy(indices.data, router->indices.data, tensor_size_bytes(&indices));
    memcpy(probs.data, router->probs.data, tensor_size_bytes(&probs));
    comm_wait(comm_broadcast(layer->groups->world, stream, &indices, 0), stream);
    comm_wait(comm_broadcast(layer->groups->world, stream, &probs, 0), stream);
    if (memcmp(indices.data, router->indices.data, tensor_size_bytes(&indices)) != 0 ||
        memcmp(probs.data, router->probs.data, tensor_size_bytes(&probs)) != 0) {
        dist_failed("%s: not the routing of rank 0 for the same tokens", what);
    }
}

/* What arrived is what the ranks kept for this rank's experts, or their capacities. */
static void check_num_rows(const char *what, const struct layer *layer, const struct result *mine,
                           const struct rule_case *rule)
{
    struct comm *group = layer->groups->etp_ep;
    const struct tensor *indices = &mine->saved.router.indices;
    const int num_local = layer->moe.experts.num_local;
    const int first = layer->groups->ep->rank * num_local;
    struct tensor all =
        tensor_new(arena, DTYPE_I32, indices->dim[0] * group->size, indices->dim[1]);
    int64_t wanted = 0;

    comm_wait(comm_all_gather(group, stream, &all, indices), stream);
    for (int64_t i = 0; i < tensor_num_elements(&all); i++) {
        wanted += dist_get(&all, i) >= first && dist_get(&all, i) < first + num_local;
    }
    if (rule->pad) {
        wanted = router_capacity(&layer->moe.router, rule->num_tokens) * num_local * group->size;
    } else if (group->size == 1) {
        wanted = rule->num_tokens * rule->topk; /* nothing travels: room for all slots */
    }
    if (mine->saved.rows.num_rows != wanted) {
        dist_failed("%s: %lld rows, wanted %lld", what, (long long)mine->saved.rows.num_rows,
                    (long long)wanted);
    }
}

/* A case of dropping in which nobody drops would show nothing. */
static void check_drops(const char *what, const struct layer *layer, const struct result *mine,
                        const struct rule_case *rule)
{
    const struct tensor *indices = &mine->saved.router.indices;
    struct tensor num_dropped = tensor_new(arena, DTYPE_I64, 1);

    dist_set(&num_dropped, 0, 0.0);
    for (int64_t i = 0; i < tensor_num_elements(indices); i++) {
        dist_set(&num_dropped, 0, dist_get(&num_dropped, 0) + (dist_get(indices, i) < 0));
    }
    comm_wait(comm_all_reduce(layer->groups->world, stream, &num_dropped, COMM_SUM), stream);
    if ((dist_get(&num_dropped, 0) > 0) != rule->drops) {
        dist_failed("%s: %g slots were dropped", what, dist_get(&num_dropped, 0));
    }
}

static void test_case(const struct groups *groups, const struct groups *self,
                      const struct rule_case *rule, enum dispatcher_kind dispatcher)
{
    static const char *const names[] = {"allgather", "alltoall", "alltoall_seq"};
    const int64_t n = rule->num_tokens, first = launch_rank() * n;
    const struct tensor x = make_tokens(rule, first, n), d_y = make_output_gradient(first, n);
    struct result mine, sum;
    struct layer layer, all;
    char what[160], text[192];

    snprintf(what, sizeof what, "%s, %s, tp %d cp %d ep %d etp %d", rule->name, names[dispatcher],
             groups->tp->size, groups->cp->size, groups->ep->size, groups->etp->size);
    layer_create(&layer, groups, rule, dispatcher);
    run(&layer, &mine, &x, &d_y, first);
    if (!rule->recompute) { /* else nothing is kept */
        check_routing(what, &layer, &mine, &x, rule);
        check_num_rows(what, &layer, &mine, rule);
        check_drops(what, &layer, &mine, rule);
        if (rule->tokens == TOKENS_TIED) {
            check_same_everywhere(what, &layer, &mine);
        }
    }
    reduce_gradients(&layer);
    emulate(&all, &sum, rule, self, groups->tp_cp->size);
    sum.y = tensor_rows(&sum.y, first, n);
    sum.d_x = tensor_rows(&sum.d_x, first, n);
    snprintf(text, sizeof text, "%s: y", what);
    dist_compare(text, &mine.y, &sum.y, 1e-5);
    snprintf(text, sizeof text, "%s: d_x", what);
    dist_compare(text, &mine.d_x, &sum.d_x, 2e-5);
    compare_gradients(what, &layer, &all);
    layer_destroy(&layer);
    layer_destroy(&all);
    dist_release();
}

/* On the device that only measures memory, a rank's rows are as many even loads as asked for, but
 * never more than there are. */
static void check_measured_rows(const struct groups *groups, enum dispatcher_kind kind, double load)
{
    enum { NUM_TOKENS = 8, TOPK = 2 };
    const struct dispatcher *dispatcher = dispatcher_select(kind, groups);
    struct stream *null = stream_create(device_null(), ops_null());
    struct arena *memory = arena_create("null", &device_null()->memory);
    const struct pass pass = {.stream = null,
                              .groups = groups,
                              .saved = memory,
                              .scratch = memory,
                              .dtype = DTYPE_BF16,
                              .measured_load = load};
    const struct tensor x = tensor_new(memory, DTYPE_BF16, NUM_TOKENS, HIDDEN);
    const struct tensor indices = tensor_new(memory, DTYPE_I32, NUM_TOKENS, TOPK);
    const struct tensor probs = tensor_new(memory, DTYPE_F32, NUM_TOKENS, TOPK);
    const int64_t even = NUM_TOKENS * TOPK * groups->etp->size;
    const int64_t wanted = (int64_t)((double)even * fmin(load, groups->ep->size));
    struct dispatch_flight flight = {0};
    struct dispatched rows;

    dispatcher->dispatch_start(
        &pass,
        &(struct dispatch_input){
            .x = &x, .indices = &indices, .probs = &probs, .num_experts = NUM_EXPERTS},
        &rows, &flight);
    dispatcher->dispatch_finish(&pass, &rows, &flight);
    if (rows.num_rows != wanted) {
        dist_failed("%s, ep %d etp %d: %lld rows for a load of %g, wanted %lld", dispatcher->name,
                    groups->ep->size, groups->etp->size, (long long)rows.num_rows, load,
                    (long long)wanted);
    }
    arena_destroy(memory);
    stream_destroy(null);
}

static void test_grid(const struct rank_grid_sizes *sizes)
{
    struct rank_grid grid;
    struct groups groups, self;

    if (rank_grid_init(&grid, sizes) != 0) {
        launch_fail(error_text());
    }
    groups_create(&groups, &grid, launch_rank(), sizes->tp > 1);
    groups_create_self(&self);
    for (int d = DISPATCHER_ALLGATHER; d <= DISPATCHER_ALLTOALL_SEQ; d++) {
        check_measured_rows(&groups, (enum dispatcher_kind)d, 1.0);
        check_measured_rows(&groups, (enum dispatcher_kind)d, 1.5);
        check_measured_rows(&groups, (enum dispatcher_kind)d, 100.0);
        for (size_t i = 0; i < sizeof rules / sizeof rules[0]; i++) {
            test_case(&groups, &self, &rules[i], (enum dispatcher_kind)d);
        }
        if (groups.etp_ep->size == 1) {
            break; /* nothing travels */
        }
    }
    groups_destroy(&groups);
    groups_destroy(&self);
}

/* Every split of the experts beside every split of the tokens. */
int main(int argc, char **argv)
{
    const int world = dist_begin(argc, argv);

    for (int tp = 1; tp <= world; tp *= 2) {
        for (int cp = 1; tp * cp <= world; cp *= 2) {
            for (int etp = 1; etp <= world; etp *= 2) {
                for (int ep = 1; etp * ep <= world; ep *= 2) {
                    test_grid(&(struct rank_grid_sizes){
                        .world = world, .tp = tp, .cp = cp, .pp = 1, .ep = ep, .etp = etp});
                }
            }
        }
    }
    return dist_end();
}
