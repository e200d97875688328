/* reference.h - what the layer tests share: a world (one rank, arenas, a pass) that a layer is
 * built in, and the check of its backward.
 *
 * Every layer has a forward of plain loops in double precision (reference_nn.h, reference_moe.h,
 * reference_model.h), which reads the doubles of the layer's parameters. The layer's forward is
 * compared with it; the layer's gradients are compared with its central differences. */
#ifndef CADRE_TESTS_LAYERS_REFERENCE_H
#define CADRE_TESTS_LAYERS_REFERENCE_H

#include "../ops/reference.h"
#include "nn/param.h"
#include "nn/pass.h"

enum { WORLD_PARAMS_MAX = 128, DIFFERENCES_MAX = 60 };

/* Gradients start at this value, so that a layer that overwrites instead of adding is caught. */
static const float grad_start = 0.5f;

struct world {
    struct arena *run, *saved, *scratch;
    struct groups groups;
    struct param_list params;
    double *values[WORLD_PARAMS_MAX]; /* the parameters in doubles */
    struct pass pass;
};
static struct world world;

/* cmocka fixtures of a test. */
static inline int world_begin(void **state)
{
    const struct memory_source *memory = &device_cpu()->memory;

    world = (struct world){.run = arena_create("run", memory),
                           .saved = arena_create("microbatch", memory),
                           .scratch = arena_create("call", memory)};
    groups_create_self(&world.groups);
    param_list_init(&world.params);
    return 0;
}

static inline int world_end(void **state)
{
    param_list_free(&world.params);
    groups_destroy(&world.groups);
    arena_destroy(world.scratch);
    arena_destroy(world.saved);
    arena_destroy(world.run);
    return reference_empty_arena(state);
}

#define layer_test(function) cmocka_unit_test_setup_teardown(function, world_begin, world_end)

/* Memory for the parameters that have been added; values are normal, near 1 where they are ones
 * initially; gradients are grad_start. */
static inline void world_fill_params(double deviation)
{
    param_list_allocate(&world.params, world.run, stream, DTYPE_F32, true);
    assert_true(world.params.num_params <= WORLD_PARAMS_MAX);
    for (int i = 0; i < world.params.num_params; i++) {
        struct param *param = world.params.params[i];
        const int64_t n = tensor_num_elements(&param->value);
        const double mean = param->init == PARAM_INIT_ONES ? 1.0 : 0.0;

        for (int64_t j = 0; j < n; j++) {
            tensor_set(&param->value, j, mean + deviation * random_normal_number());
            tensor_set(&param->grad, j, (double)grad_start);
        }
        world.values[i] = doubles_of(&param->value);
    }
}

static inline double *values_of(const struct param *param)
{
    for (int i = 0; i < world.params.num_params; i++) {
        if (world.params.params[i] == param) {
            return world.values[i];
        }
    }
    fail_msg("no parameter of this world");
    return NULL;
}

static inline void world_reset_grads(void)
{
    for (int64_t i = 0; i < world.params.num_elements; i++) {
        ((float *)world.params.grads.data)[i] = grad_start;
    }
}

static inline struct tensor copy_of(const struct tensor *x)
{
    struct tensor copy = tensor_allocate(arena, x->dtype, x->dim, x->num_dims);

    memcpy(copy.data, x->data, tensor_size_bytes(x));
    return copy;
}

/* A training pass over B sequences of S tokens, with tokens and labels below vocab_size. */
static inline void world_make_pass(int64_t s, int64_t b, int64_t vocab_size)
{
    const int64_t num_tokens = s * b;
    struct pass *pass = &world.pass;

    *pass = (struct pass){.stream = stream,
                          .groups = &world.groups,
                          .saved = world.saved,
                          .scratch = world.scratch,
                          .dtype = DTYPE_F32,
                          .training = true,
                          .seed = (uint64_t)random_below(1 << 30),
                          .num_sequences = b,
                          .token = tensor_new(arena, DTYPE_I32, num_tokens),
                          .label = tensor_new(arena, DTYPE_I32, num_tokens),
                          .position = tensor_new(arena, DTYPE_I32, num_tokens),
                          .token_id = tensor_new(arena, DTYPE_I64, num_tokens),
                          .sample_id = tensor_new(arena, DTYPE_I64, b),
                          .loss_weight = normal_tensor(1.0, DTYPE_F32, num_tokens),
                          .aux_loss_scale = 0.75f};
    for (int64_t i = 0; i < b; i++) {
        tensor_set(&pass->sample_id, i, (double)random_below(1 << 30));
    }
    for (int64_t t = 0; t < num_tokens; t++) {
        const double sample = tensor_get(&pass->sample_id, t % b);

        tensor_set(&pass->token, t, (double)random_below(vocab_size));
        tensor_set(&pass->label, t, (double)random_below(vocab_size));
        tensor_set(&pass->position, t, (double)(t / b));
        tensor_set(&pass->token_id, t, sample * (double)s + (double)(t / b));
    }
}

/* Cuts every sequence into documents of `length` tokens: attention does not reach over a cut,
 * positions begin anew. */
static inline void world_cut_documents(int64_t length)
{
    const int64_t num_tokens = world.pass.token.dim[0];

    world.pass.document_start = tensor_new(arena, DTYPE_I32, num_tokens);
    for (int64_t t = 0; t < num_tokens; t++) {
        const int64_t position = t / world.pass.num_sequences;

        tensor_set(&world.pass.document_start, t, (double)(position / length * length));
        tensor_set(&world.pass.position, t, (double)(position % length));
    }
}

/* Scratch is given back before a layer's function returns. */
static inline void assert_scratch_is_empty(void)
{
    assert_int_equal(arena_used_bytes(world.scratch), 0);
    assert_int_equal(arena_used_bytes(stream->scratch), 0);
}

/* What a dropout of the layer multiplies element `index` of row `row` with. */
static inline double dropout_factor(struct rng_key key, float p, uint64_t row, uint64_t index)
{
    return rng_uniform(key, row, index) >= p ? 1.0 / (1.0 - (double)p) : 0.0;
}

static inline double dot(const double *x, const double *y, int64_t n)
{
    double sum = 0.0;

    for (int64_t i = 0; i < n; i++) {
        sum += x[i] * y[i];
    }
    return sum;
}

static inline double slope_at(loss_function *loss, const void *context, double *x)
{
    const double step = 1e-5, saved = *x;
    double above, below;

    *x = saved + step;
    above = loss(context);
    *x = saved - step;
    below = loss(context);
    *x = saved;
    return (above - below) / (2.0 * step);
}

/* gradient - start against central differences of loss, at up to DIFFERENCES_MAX random places. The
 * error is relative to the largest element; where all are small against the loss, summands have
 * cancelled that f32 had rounded (softmax of a nearly certain choice), so that the loss gives the
 * scale. */
static inline void check_gradient(const char *name, loss_function *loss, const void *context,
                                  double *x, const struct tensor *gradient, double start)
{
    const int64_t n = tensor_num_elements(gradient);
    const int64_t count = n < DIFFERENCES_MAX ? n : DIFFERENCES_MAX;
    double largest = 0.05 * fmax(1.0, fabs(loss(context)));

    for (int64_t i = 0; i < n; i++) {
        largest = fmax(largest, fabs(tensor_get(gradient, i) - start));
    }
    for (int64_t k = 0; k < count; k++) {
        const int64_t i = count == n ? k : random_below(n);
        const struct arena_mark mark = arena_mark(arena);
        const double slope = slope_at(loss, context, &x[i]), got = tensor_get(gradient, i) - start;

        arena_release(arena, mark);
        if (!(fabs(slope - got) <= 1e-4 * largest)) {
            fail_msg("gradient %lld of %s is %.9g, finite difference %.9g (largest %.3g)",
                     (long long)i, name, got, slope, largest);
        }
    }
}

/* Gradients of all parameters of the world, and of x where it is given. */
static inline void check_gradients(loss_function *loss, const void *context, double *x,
                                   const struct tensor *d_x)
{
    if (x != NULL) {
        check_gradient("x", loss, context, x, d_x, 0.0);
    }
    for (int i = 0; i < world.params.num_params; i++) {
        const struct param *param = world.params.params[i];

        check_gradient(param->name, loss, context, world.values[i], &param->grad,
                       (double)grad_start);
    }
}

#endif
