/* Three steps of made-up gradients under mappings of DP, TP, CP, PP, EP and ETP: reduction in
 * buckets, norm, Adam on shards and gathering against a plain double-precision loop over the whole
 * model in one process; and the bytes sent against the formulas of grad_buckets.h. ranks: 1 2 3 4
 */
#include "dist_test.h"

#include <string.h>

#include "optim/grad_norm.h"
#include "optim/param_gather.h"

enum { NUM_LAYERS = 4, NUM_STEPS = 3, NUM_EXPERTS = 4, MAX_SPECS = 64 };

static const float lr = 0.01f, decoupled_lr = 0.003f, weight_decay = 0.1f, max_norm = 1.0f;
static const struct optimizer_config adam = {
    .kind = OPTIMIZER_ADAM, .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f};

struct mapping {
    int tp, cp, pp, ep, etp;
    enum dtype dtype;
    bool distributed, overlap_grads, overlap_params, per_token;
    int64_t bucket_size;
};

/* A parameter of the whole model and the reference's state of it. */
struct spec {
    struct param facts;
    int layer;           /* -1: the embedding */
    int tp_dim, etp_dim; /* the dim that is cut, -1: none */
    int64_t count;
    double *value, *grad, *exp_avg, *exp_avg_sq;
};

/* One rank's side. */
struct rank_state {
    struct mapping mapping;
    struct groups groups;
    struct param_list params;
    struct param_run {
        int begin, end;
    } layers[NUM_LAYERS], embedding, head;
    struct grad_buckets buckets;
    struct optimizer optimizer;
    struct tensor norm, scale;
};

static struct spec specs[MAX_SPECS];
static int num_specs;
static char what[200];

/* ---- the model ---- */

static struct spec *add_spec(int layer, const char *name, int num_dims, const int64_t *shape)
{
    struct spec *spec = &specs[num_specs++];

    *spec = (struct spec){.layer = layer, .tp_dim = -1, .etp_dim = -1, .count = 1};
    snprintf(spec->facts.name, sizeof spec->facts.name, "%s.%d", name, layer);
    spec->facts.num_dims = num_dims;
    for (int i = 0; i < num_dims; i++) {
        spec->facts.global_shape[i] = shape[i];
        spec->count *= shape[i];
    }
    spec->facts.weight_decay = num_dims > 1;
    return spec;
}

static void add_layer_specs(int layer, bool sequence_parallel)
{
    add_spec(layer, "norm", 1, (const int64_t[]){7})->facts.sum_over_tp = sequence_parallel;
    add_spec(layer, "qkv", 3, (const int64_t[]){4, 5, 3})->tp_dim = 0;
    add_spec(layer, "one", 1, (const int64_t[]){1}); /* fewer elements than ranks */
    add_spec(layer, "proj", 2, (const int64_t[]){13, 8})->tp_dim = 1;
    add_spec(layer, "router", 2, (const int64_t[]){NUM_EXPERTS, 5})->facts.sum_over_tp =
        sequence_parallel;
    add_spec(layer, "fc1", 4, (const int64_t[]){NUM_EXPERTS, 2, 8, 11})->etp_dim = 2;
    add_spec(layer, "fc2", 3, (const int64_t[]){NUM_EXPERTS, 11, 8})->etp_dim = 2;
    add_spec(layer, "fc2_bias", 2, (const int64_t[]){NUM_EXPERTS, 11});
    add_spec(layer, "replicated", 2, (const int64_t[]){17, 23});
    for (int i = 4; i >= 2; i--) {
        specs[num_specs - i].facts.scope = PARAM_EXPERT;
    }
}

static void make_specs(const struct mapping *m)
{
    struct spec *word;

    num_specs = 0;
    word = add_spec(-1, "embedding", 2, (const int64_t[]){20, 9});
    word->tp_dim = 0;
    word->facts.decoupled_lr = true;
    word->facts.shared_over_stages = m->pp > 1;
    for (int layer = 0; layer < NUM_LAYERS; layer++) {
        add_layer_specs(layer, m->tp > 1);
    }
    for (int i = 0; i < num_specs; i++) {
        struct spec *spec = &specs[i];
        const size_t size = (size_t)spec->count * sizeof(double);

        spec->value = arena_allocate(arena, size);
        spec->grad = arena_allocate(arena, size);
        spec->exp_avg = memset(arena_allocate(arena, size), 0, size);
        spec->exp_avg_sq = memset(arena_allocate(arena, size), 0, size);
    }
}

static void add_params(struct rank_state *rank, int layer, bool is_copy)
{
    const struct groups *g = &rank->groups;

    for (int i = 0; i < num_specs; i++) {
        struct param facts = specs[i].facts;

        if (specs[i].layer != layer) {
            continue;
        }
        facts.is_copy = is_copy;
        facts.box = box_whole(facts.global_shape, facts.num_dims);
        if (facts.scope == PARAM_EXPERT) {
            facts.box = box_part(&facts.box, 0, g->ep->rank, g->ep->size);
        }
        if (specs[i].etp_dim >= 0) {
            facts.box = box_part(&facts.box, specs[i].etp_dim, g->etp->rank, g->etp->size);
        }
        if (specs[i].tp_dim >= 0) {
            facts.box = box_part(&facts.box, specs[i].tp_dim, g->tp->rank, g->tp->size);
        }
        param_add(&rank->params, &facts);
    }
}

/* The layers of this stage; with the embedding first and, on the last of several stages, its copy.
 */
static void register_params(struct rank_state *rank)
{
    const struct comm *pp = rank->groups.pp;
    const int per_stage = NUM_LAYERS / pp->size;
    struct param_list *params = &rank->params;

    param_list_init(params);
    if (pp->rank == 0) {
        add_params(rank, -1, false);
    }
    rank->embedding = (struct param_run){0, params->num_params};
    for (int i = 0; i < per_stage; i++) {
        rank->layers[i].begin = params->num_params;
        add_params(rank, pp->rank * per_stage + i, false);
        rank->layers[i].end = params->num_params;
    }
    rank->head.begin = params->num_params;
    if (pp->size > 1 && pp->rank == pp->size - 1) {
        add_params(rank, -1, true);
    }
    rank->head.end = params->num_params;
}

static struct spec *spec_of(const struct param *param)
{
    for (int i = 0; i < num_specs; i++) {
        if (strcmp(specs[i].facts.name, param->name) == 0) {
            return &specs[i];
        }
    }
    PANIC("%s", param->name);
}

/* The index in the global tensor of element `local` of what the rank holds. */
static int64_t global_index(const struct param *param, int64_t local)
{
    int64_t index = 0, stride = 1;

    for (int i = param->num_dims - 1; i >= 0; i--) {
        index += (param->box.offset[i] + local % param->box.size[i]) * stride;
        local /= param->box.size[i];
        stride *= param->global_shape[i];
    }
    return index;
}

/* ---- gradients ---- */

/* The gradient that contributor number `from` has of an element; some are zero. */
static float contribution(const char *name, int step, int from, int64_t index)
{
    const struct rng_key key = rng_key((uint64_t)step, name, 0);

    return index % 11 == 3 ? 0.0f : (float)rng_normal(key, (uint64_t)from, (uint64_t)index);
}

/* Which contributor a rank is, and of how many. */
static int contributor(const struct groups *g, const struct param *param)
{
    if (param->scope == PARAM_EXPERT) {
        return g->edp->rank;
    }
    if (param->sum_over_tp) {
        return g->dp_cp->rank * g->tp->size + g->tp->rank;
    }
    return param->shared_over_stages ? 2 * g->dp_cp->rank + param->is_copy : g->dp_cp->rank;
}

static int num_contributors(const struct groups *g, const struct param *param)
{
    if (param->scope == PARAM_EXPERT) {
        return g->edp->size;
    }
    return g->dp_cp->size * (param->sum_over_tp ? g->tp->size : param->shared_over_stages ? 2 : 1);
}

static void set_gradients(struct rank_state *rank, struct param_run run, int step)
{
    for (int i = run.begin; i < run.end; i++) {
        struct param *param = rank->params.params[i];
        const int from = contributor(&rank->groups, param);

        for (int64_t k = 0; k < tensor_num_elements(&param->grad); k++) {
            dist_set(&param->grad, k,
                     contribution(param->name, step, from, global_index(param, k)));
        }
    }
}

/* ---- the reference ---- */

/* Gradients of the whole model: means over data parallelism. Returns their norm. */
static double reference_gradients(const struct rank_state *rank, int step, double *num_zeros)
{
    double squares = 0.0;

    *num_zeros = 0.0;
    for (int i = 0; i < num_specs; i++) {
        const struct spec *spec = &specs[i];
        const int count = num_contributors(&rank->groups, &spec->facts);

        for (int64_t k = 0; k < spec->count; k++) {
            double sum = 0.0;

            for (int from = 0; from < count; from++) {
                sum += (double)contribution(spec->facts.name, step, from, k);
            }
            spec->grad[k] = sum / rank->groups.dp_cp->size;
            squares += spec->grad[k] * spec->grad[k];
            *num_zeros += spec->grad[k] == 0.0;
        }
    }
    return sqrt(squares);
}

static void reference_step(int step, double scale)
{
    for (int i = 0; i < num_specs; i++) {
        const struct spec *spec = &specs[i];
        const double rate = (double)(spec->facts.decoupled_lr ? decoupled_lr : lr);
        const double decay = spec->facts.weight_decay ? (double)weight_decay : 0.0;
        const double b1 = (double)adam.beta1, b2 = (double)adam.beta2;

        for (int64_t k = 0; k < spec->count; k++) {
            const double g = spec->grad[k] * scale;
            double *m = &spec->exp_avg[k], *v = &spec->exp_avg_sq[k];

            *m = b1 * *m + (1.0 - b1) * g;
            *v = b2 * *v + (1.0 - b2) * g * g;
            spec->value[k] -= rate * (*m / (1.0 - pow(b1, step)) /
                                          (sqrt(*v / (1.0 - pow(b2, step))) + (double)adam.eps) +
                                      decay * spec->value[k]);
        }
    }
}

static double reference_params_norm(void)
{
    double squares = 0.0;

    for (int i = 0; i < num_specs; i++) {
        for (int64_t k = 0; k < specs[i].count; k++) {
            squares += specs[i].value[k] * specs[i].value[k];
        }
    }
    return sqrt(squares);
}

/* ---- comparisons ---- */

static void expect_near(const char *name, double got, double wanted, double tolerance)
{
    if (!(fabs(got - wanted) <= tolerance * (1.0 + fabs(wanted)))) {
        dist_failed("%s: %s is %.9g, wanted %.9g", what, name, got, wanted);
    }
}

/* bf16 values have 8 bits; what lies behind them is compared in the masters. */
static void compare_values(const struct rank_state *rank, struct param_run run)
{
    const double tolerance = rank->mapping.dtype == DTYPE_F32 ? 1e-6 : 1e-2;

    for (int i = run.begin; i < run.end; i++) {
        const struct param *param = rank->params.params[i];
        const struct spec *spec = spec_of(param);

        for (int64_t k = 0; k < tensor_num_elements(&param->value); k++) {
            expect_near(param->name, dist_get(&param->value, k),
                        spec->value[global_index(param, k)], tolerance);
        }
    }
}

static void compare_state(const struct optimizer_shard *shard, const struct tensor *state,
                          const double *wanted)
{
    const struct tensor part = optimizer_state_of(state, shard);

    for (int64_t k = 0; k < shard->count; k++) {
        expect_near(shard->param->name, dist_get(&part, k),
                    wanted[global_index(shard->param, shard->first + k)], 2e-6);
    }
}

static void compare_states(struct rank_state *rank)
{
    struct optimizer *optimizer = &rank->optimizer;

    for (int i = 0; i < optimizer->num_shards; i++) {
        const struct optimizer_shard *shard = &optimizer->shards[i];
        const struct spec *spec = spec_of(shard->param);

        compare_state(shard, &optimizer->exp_avg, spec->exp_avg);
        compare_state(shard, &optimizer->exp_avg_sq, spec->exp_avg_sq);
        if (rank->mapping.dtype != DTYPE_F32) {
            compare_state(shard, &optimizer->master, spec->value);
        }
    }
}

static void expect_same_bits(struct comm *comm, const struct param *param)
{
    const int64_t count = tensor_num_elements(&param->value);
    const size_t size_bytes = tensor_size_bytes(&param->value);
    struct tensor all = tensor_new(arena, param->value.dtype, comm->size, count);

    comm_wait(comm_all_gather(comm, stream, &all, &param->value), stream);
    for (int r = 0; r < comm->size; r++) {
        if (memcmp((char *)all.data + (size_t)r * size_bytes, param->value.data, size_bytes) != 0) {
            dist_failed("%s: %s has other bits on rank %d of %s", what, param->name, r, comm->name);
        }
    }
}

static void compare_replicas(struct rank_state *rank)
{
    struct groups *g = &rank->groups;

    for (int i = 0; i < rank->params.num_params; i++) {
        const struct param *param = rank->params.params[i];
        const struct spec *spec = spec_of(param);

        expect_same_bits(param->scope == PARAM_EXPERT ? g->edp : g->dp_cp, param);
        if (param->scope == PARAM_EXPERT && spec->etp_dim < 0) {
            expect_same_bits(g->etp, param);
        } else if (param->scope == PARAM_DENSE && spec->tp_dim < 0) {
            expect_same_bits(g->tp, param);
        }
        if (param->shared_over_stages) {
            expect_same_bits(g->embedding, param);
        }
    }
}

/* ---- bytes ---- */

/* What this rank sends to reduce count f32 elements (grad_buckets.h). */
static int64_t all_reduce_bytes(const struct comm *comm, int64_t count)
{
    const int64_t n = comm->size, rank = comm->rank;
    const int64_t part = count / n + (count % n * (rank + 1) / n - count % n * rank / n);

    return n == 1 ? 0 : 4 * (count + (n - 2) * part);
}

static void expect_bytes(struct comm *comm, enum comm_kind kind, int64_t wanted)
{
    if (comm->counters[kind].sent_bytes != wanted) {
        dist_failed("%s: %s of %s sent %lld bytes, wanted %lld", what, comm_kind_name(kind),
                    comm->name, (long long)comm->counters[kind].sent_bytes, (long long)wanted);
    }
}

/* Of one step: reduction, norm, gather. The groups are distinct ones, so each counts for itself. */
static void compare_bytes(struct rank_state *rank)
{
    struct groups *g = &rank->groups;
    struct comm *data[2] = {g->dp_cp, g->edp};
    const bool distributed = rank->mapping.distributed;
    const int64_t value_bytes = dtype_size_bytes(rank->mapping.dtype);
    int64_t reduced[2] = {0}, gathered[2] = {0}, summed[2] = {0};

    for (int i = 0; i < rank->buckets.num_buckets; i++) {
        const struct grad_bucket *bucket = &rank->buckets.buckets[i];
        const int k = bucket->data == g->edp, n = bucket->data->size;
        const int64_t others = bucket->count / n * (n - 1);

        reduced[k] += distributed ? 4 * others : all_reduce_bytes(bucket->data, bucket->count);
        gathered[k] += distributed ? value_bytes * others : 0;
        if (bucket->late != NULL) {
            summed[bucket->late == g->embedding] +=
                all_reduce_bytes(bucket->late, distributed ? bucket->count / n : bucket->count);
        }
    }
    for (int k = 0; k < 2; k++) {
        expect_bytes(data[k], distributed ? COMM_REDUCE_SCATTER : COMM_ALL_REDUCE, reduced[k]);
        expect_bytes(data[k], distributed ? COMM_ALL_REDUCE : COMM_REDUCE_SCATTER, 0);
        expect_bytes(data[k], COMM_ALL_GATHER, gathered[k]);
    }
    expect_bytes(g->tp, COMM_ALL_REDUCE, summed[0]);
    expect_bytes(g->embedding, COMM_ALL_REDUCE, summed[1]);
}

/* States are 4 bytes an element of the group's share, whatever buckets add in paddings. */
static void compare_state_bytes(struct rank_state *rank)
{
    const struct groups *g = &rank->groups;
    const bool distributed = rank->mapping.distributed;
    double elements = 0.0, paddings = 0.0, owned;
    struct optimizer_state states[OPTIMIZER_STATES_MAX];
    const int num_states = optimizer_states(&rank->optimizer, states);

    for (int i = 0; i < rank->params.num_params; i++) {
        const struct param *param = rank->params.params[i];
        const int n = !distributed                   ? 1
                      : param->scope == PARAM_EXPERT ? g->edp->size
                                                     : g->dp_cp->size;

        elements += (double)box_num_elements(&param->box) / n;
        paddings += 63.0 / n;
    }
    paddings += 64.0 * rank->buckets.num_buckets;
    if (num_states != (rank->mapping.dtype == DTYPE_F32 ? 2 : 3)) {
        dist_failed("%s: %d states", what, num_states);
    }
    for (int i = 0; i < num_states; i++) {
        owned = (double)tensor_size_bytes(states[i].tensor) / 4.0;
        if (owned < elements || owned > elements + paddings) {
            dist_failed("%s: a state of %g elements, wanted %g and at most %g of paddings", what,
                        owned, elements, paddings);
        }
    }
}

/* ---- the run ---- */

static void initialise(struct rank_state *rank)
{
    for (int i = 0; i < num_specs; i++) {
        const struct rng_key key = rng_key(77, specs[i].facts.name, 0);

        for (int64_t k = 0; k < specs[i].count; k++) {
            const float value = (float)rng_normal(key, 0, (uint64_t)k);

            specs[i].value[k] = rank->mapping.dtype == DTYPE_F32
                                    ? (double)value
                                    : (double)bf16_to_float(bf16_from_float(value));
        }
    }
    for (int i = 0; i < rank->params.num_params; i++) {
        struct param *param = rank->params.params[i];
        const struct spec *spec = spec_of(param);

        for (int64_t k = 0; k < tensor_num_elements(&param->value); k++) {
            dist_set(&param->value, k, spec->value[global_index(param, k)]);
        }
    }
}

static void call_needed(const struct param_hooks *hooks, struct param_run run)
{
    if (hooks->values_needed != NULL) {
        hooks->values_needed(hooks->context, run.begin, run.end);
    }
}

static void call_ready(const struct param_hooks *hooks, struct param_run run)
{
    if (hooks->grads_ready != NULL) {
        hooks->grads_ready(hooks->context, run.begin, run.end);
    }
}

/* Reads every layer's values when the hooks say that they are there. */
static void forward(struct rank_state *rank)
{
    const struct param_hooks hooks = grad_buckets_hooks(&rank->buckets, false);

    call_needed(&hooks, rank->embedding);
    compare_values(rank, rank->embedding);
    for (int i = 0; i < NUM_LAYERS / rank->groups.pp->size; i++) {
        call_needed(&hooks, rank->layers[i]);
        compare_values(rank, rank->layers[i]);
    }
    call_needed(&hooks, rank->head);
    compare_values(rank, rank->head);
}

/* Gradients come layer by layer, each announced before the next is written. A first microbatch
 * leaves wrong ones: nothing may be sent before the last. */
static void backward(struct rank_state *rank, int step)
{
    for (int microbatch = 0; microbatch < 2; microbatch++) {
        const struct param_hooks hooks = grad_buckets_hooks(&rank->buckets, microbatch == 1);
        const int which = microbatch == 1 ? step : 100;

        set_gradients(rank, rank->head, which);
        call_ready(&hooks, rank->head);
        for (int i = NUM_LAYERS / rank->groups.pp->size - 1; i >= 0; i--) {
            set_gradients(rank, rank->layers[i], which);
            call_ready(&hooks, rank->layers[i]);
        }
        set_gradients(rank, rank->embedding, which);
        call_ready(&hooks, rank->embedding);
    }
}

static void run_step(struct rank_state *rank, int step)
{
    struct optimizer *optimizer = &rank->optimizer;
    double num_zeros;
    const double norm = reference_gradients(rank, step, &num_zeros);

    op_fill_zero(stream, &rank->params.grads);
    grad_buckets_begin(&rank->buckets);
    forward(rank);
    groups_reset_counters(&rank->groups); /* the gather of the step before is through */
    backward(rank, step);
    grad_buckets_finish(&rank->buckets);
    if (rank->mapping.per_token) {
        grad_buckets_scale(&rank->buckets, 1.0f / (float)rank->groups.dp_cp->size);
    }
    grad_norm_clip_scale(optimizer, &rank->groups, stream, arena, max_norm, &rank->norm,
                         &rank->scale);
    expect_near("gradient norm", dist_get(&rank->norm, 0), norm, 1e-6);
    expect_near("zeros", grad_num_zeros(optimizer, &rank->groups, stream, arena), num_zeros, 0.0);
    optimizer_step(optimizer, stream,
                   &(struct optimizer_rates){
                       .lr = lr, .decoupled_lr = decoupled_lr, .weight_decay = weight_decay},
                   &rank->scale);
    reference_step(step, (double)max_norm / (norm + 1e-6));
    param_gather_start(&rank->buckets);
    expect_near("parameter norm", params_norm(optimizer, &rank->groups, stream, arena),
                reference_params_norm(), rank->mapping.dtype == DTYPE_F32 ? 1e-6 : 1e-3);
}

static void rank_create(struct rank_state *rank, const struct mapping *m)
{
    const struct rank_grid_sizes sizes = {
        .world = launch_size(), .tp = m->tp, .cp = m->cp, .pp = m->pp, .ep = m->ep, .etp = m->etp};
    const struct grad_buckets_config config = {.distributed_optimizer = m->distributed,
                                               .overlap_grad_reduce = m->overlap_grads,
                                               .overlap_param_gather = m->overlap_params,
                                               .average = !m->per_token,
                                               .bucket_size = m->bucket_size};
    struct rank_grid grid;

    *rank = (struct rank_state){.mapping = *m};
    if (rank_grid_init(&grid, &sizes) != 0) {
        launch_fail(error_text());
    }
    groups_create(&rank->groups, &grid, launch_rank(), m->tp > 1);
    make_specs(m);
    register_params(rank);
    grad_buckets_init(&rank->buckets, &rank->params, &rank->groups, stream, &config);
    param_list_allocate(&rank->params, arena, stream, m->dtype, true);
    initialise(rank);
    optimizer_init(&rank->optimizer, &adam, &rank->params, &rank->buckets, stream, arena);
    optimizer_reset_masters(&rank->optimizer, stream);
    rank->norm = tensor_new(arena, DTYPE_F32, 1);
    rank->scale = tensor_new(arena, DTYPE_F32, 1);
}

static void test_mapping(const struct mapping *m)
{
    struct rank_state rank;

    snprintf(what, sizeof what, "tp %d cp %d pp %d ep %d etp %d%s%s%s%s %s, buckets of %lld", m->tp,
             m->cp, m->pp, m->ep, m->etp, m->distributed ? ", distributed" : "",
             m->overlap_grads ? ", overlap" : "", m->overlap_params ? " of both" : "",
             m->per_token ? ", per token" : "", dtype_name(m->dtype), (long long)m->bucket_size);
    rank_create(&rank, m);
    compare_state_bytes(&rank);
    for (int step = 1; step <= NUM_STEPS; step++) {
        run_step(&rank, step);
    }
    param_gather_finish(&rank.buckets);
    compare_bytes(&rank);
    forward(&rank);
    compare_states(&rank);
    compare_replicas(&rank);
    optimizer_free(&rank.optimizer);
    grad_buckets_free(&rank.buckets);
    param_list_free(&rank.params);
    groups_destroy(&rank.groups);
    dist_release();
}

/* Every way to run a mapping that fits the world. Buckets of 1 element hold one parameter each. */
static void test_grid(struct mapping m)
{
    const int64_t bucket_sizes[] = {0, 1, 300};
    const int size = launch_size();

    if (size % (m.tp * m.cp * m.pp) != 0 || size % (m.etp * m.ep * m.pp) != 0) {
        return;
    }
    test_mapping(&m);
    m.distributed = true;
    test_mapping(&m);
    for (int i = 0; i < 3; i++) {
        m.bucket_size = bucket_sizes[i];
        m.overlap_grads = true;
        m.overlap_params = m.distributed = false;
        test_mapping(&m);
        m.distributed = true;
        test_mapping(&m);
        m.overlap_params = true;
        test_mapping(&m);
    }
}

int main(int argc, char **argv)
{
    const struct mapping data_only = {
        .tp = 1, .cp = 1, .pp = 1, .ep = 1, .etp = 1, .dtype = DTYPE_F32};
    struct mapping m = data_only;

    dist_begin(argc, argv);
    for (m.tp = 1; m.tp <= 4; m.tp *= 2) {
        for (m.pp = 1; m.pp <= 4; m.pp *= 2) {
            for (m.etp = 1; m.etp <= 4; m.etp *= 2) {
                for (m.ep = 1; m.ep <= 4; m.ep *= 2) {
                    test_grid(m);
                }
            }
        }
    }
    m = data_only;
    m.per_token = true;
    test_grid(m);
    m = data_only;
    m.cp = m.ep = 2;
    test_grid(m);
    m.cp = 1;
    m.dtype = DTYPE_BF16;
    test_grid(m);
    return dist_end();
}
