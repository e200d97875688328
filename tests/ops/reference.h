/* reference.h - what the op tests share: random inputs, poisoned outputs, comparison with arrays of
 * doubles that a plain loop in the test has computed, finite differences.
 *
 * The seed is CADRE_TEST_SEED or the time; it is printed, so that a failure can be repeated. */
#ifndef CADRE_TESTS_OPS_REFERENCE_H
#define CADRE_TESTS_OPS_REFERENCE_H

#include <math.h>
#include <setjmp.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <cmocka.h>

#include "ops/ops.h"

static struct stream *stream;
static struct arena *arena; /* everything a test makes; emptied after each test */
static struct rng_key test_key;
static uint64_t num_drawn;

/* cmocka group and test fixtures. */
static inline int reference_start(void **state)
{
    const char *text = getenv("CADRE_TEST_SEED");
    const uint64_t seed = text != NULL ? strtoull(text, NULL, 10) : (uint64_t)time(NULL);

    printf("CADRE_TEST_SEED=%llu\n", (unsigned long long)seed);
    test_key = rng_key(seed, "op test", 0);
    stream = stream_create(device_cpu(), ops_cpu());
    arena = arena_create("op test", &device_cpu()->memory);
    return 0;
}

static inline int reference_stop(void **state)
{
    arena_destroy(arena);
    stream_destroy(stream);
    return 0;
}

static inline int reference_empty_arena(void **state)
{
    arena_release(arena, (struct arena_mark){0});
    return 0;
}

static inline double random_normal_number(void)
{
    return rng_normal(test_key, 0, num_drawn++);
}

/* A random whole number in [0, n). */
static inline int64_t random_below(int64_t n)
{
    return (int64_t)((double)rng_uniform(test_key, 1, num_drawn++) * (double)n);
}

static inline double tensor_get(const struct tensor *x, int64_t i)
{
    switch (x->dtype) {
    case DTYPE_F32:
        return (double)((const float *)x->data)[i];
    case DTYPE_BF16:
        return (double)bf16_to_float(((const bf16_t *)x->data)[i]);
    case DTYPE_I32:
        return (double)((const int32_t *)x->data)[i];
    case DTYPE_I64:
        return (double)((const int64_t *)x->data)[i];
    case DTYPE_F64:
        return ((const double *)x->data)[i];
    default:
        fail_msg("dtype %d", (int)x->dtype);
        return 0.0;
    }
}

static inline void tensor_set(struct tensor *x, int64_t i, double value)
{
    switch (x->dtype) {
    case DTYPE_F32:
        ((float *)x->data)[i] = (float)value;
        break;
    case DTYPE_BF16:
        ((bf16_t *)x->data)[i] = bf16_from_float((float)value);
        break;
    case DTYPE_I32:
        ((int32_t *)x->data)[i] = (int32_t)value;
        break;
    case DTYPE_I64:
        ((int64_t *)x->data)[i] = (int64_t)value;
        break;
    case DTYPE_F64:
        ((double *)x->data)[i] = value;
        break;
    default:
        fail_msg("dtype %d", (int)x->dtype);
    }
}

static inline void tensor_fill_normal(struct tensor *x, double deviation)
{
    const int64_t n = tensor_num_elements(x);

    for (int64_t i = 0; i < n; i++) {
        tensor_set(x, i, deviation * random_normal_number());
    }
}

/* NaN, or an index that no tensor has. */
static inline void tensor_poison(struct tensor *x)
{
    const int64_t n = tensor_num_elements(x);

    for (int64_t i = 0; i < n; i++) {
        tensor_set(x, i, x->dtype == DTYPE_I32 || x->dtype == DTYPE_I64 ? -1000000000.0 : NAN);
    }
}

static inline struct tensor made_normal(struct tensor x, double deviation)
{
    tensor_fill_normal(&x, deviation);
    return x;
}

static inline struct tensor made_poisoned(struct tensor x)
{
    tensor_poison(&x);
    return x;
}

static inline struct tensor made_zero(struct tensor x)
{
    memset(x.data, 0, tensor_size_bytes(&x));
    return x;
}

/* normal_tensor(1.0, DTYPE_F32, T, H) and so on: new tensors in the arena. */
#define normal_tensor(deviation, ...) made_normal(tensor_new(arena, __VA_ARGS__), (deviation))
#define poisoned_tensor(...) made_poisoned(tensor_new(arena, __VA_ARGS__))
#define zero_tensor(...) made_zero(tensor_new(arena, __VA_ARGS__))

/* zero-filled array in the arena */
static inline double *new_doubles(int64_t n)
{
    double *x = arena_allocate(arena, (size_t)n * sizeof *x);

    memset(x, 0, (size_t)n * sizeof *x);
    return x;
}

/* The elements of x as doubles, in the arena. */
static inline double *doubles_of(const struct tensor *x)
{
    const int64_t n = tensor_num_elements(x);
    double *copy = new_doubles(n);

    for (int64_t i = 0; i < n; i++) {
        copy[i] = tensor_get(x, i);
    }
    return copy;
}

/* What the project promises of each op: an error relative to the tensor's largest value. */
static inline double tolerance_of(enum dtype dtype)
{
    return dtype == DTYPE_BF16 ? 1e-2 : 1e-5;
}

#define assert_close(got, expected, tolerance)                                                     \
    check_close(#got, (got), (expected), (tolerance), __FILE__, __LINE__)

/* assert_values(&y, 1e-6, 0.5, 0.25): assert_close with the values written down. */
#define assert_values(got, tolerance, ...)                                                         \
    check_close(#got, (got), (const double[]){__VA_ARGS__}, (tolerance), __FILE__, __LINE__)

static inline void check_close(const char *name, const struct tensor *got, const double *expected,
                               double tolerance, const char *file, int line)
{
    const int64_t n = tensor_num_elements(got);
    double largest = 0.0;

    for (int64_t i = 0; i < n; i++) {
        largest = fmax(largest, fabs(expected[i]));
    }
    for (int64_t i = 0; i < n; i++) {
        const double error = fabs(tensor_get(got, i) - expected[i]);

        if (!(error <= tolerance * largest)) {
            print_error("%s: element %lld of %s is %.9g, expected %.9g (largest %.3g)\n", name,
                        (long long)i, tensor_describe(got), tensor_get(got, i), expected[i],
                        largest);
            _fail(file, line);
        }
    }
}

/* The same with an absolute error, where what is expected may be a small difference of large
 * numbers. */
static inline void assert_near(const struct tensor *got, const double *expected, double error)
{
    const int64_t n = tensor_num_elements(got);

    for (int64_t i = 0; i < n; i++) {
        if (!(fabs(tensor_get(got, i) - expected[i]) <= error)) {
            fail_msg("element %lld of %s is %.9g, expected %.9g", (long long)i,
                     tensor_describe(got), tensor_get(got, i), expected[i]);
        }
    }
}

#define assert_same_bits(x, y) assert_memory_equal((x)->data, (y)->data, tensor_size_bytes(x))

/* WITH_THREADS(&y, &d_x) { op_...; } runs the op with 1, 2 and 3 threads, from the same contents of
 * the listed tensors, and checks that each time it leaves the same bits in them. */
#define WITH_THREADS(...)                                                                          \
    for (struct thread_check check_ = thread_check_begin(                                          \
             (struct tensor *[]){__VA_ARGS__},                                                     \
             (int)(sizeof((struct tensor *[]){__VA_ARGS__}) / sizeof(struct tensor *)));           \
         thread_check_next(&check_, __FILE__, __LINE__);)

enum { THREAD_CHECK_TENSORS_MAX = 8 };

struct thread_check {
    struct tensor *outputs[THREAD_CHECK_TENSORS_MAX];
    void *before[THREAD_CHECK_TENSORS_MAX], *after[THREAD_CHECK_TENSORS_MAX];
    int num_outputs, num_threads;
};

static inline struct thread_check thread_check_begin(struct tensor **outputs, int num_outputs)
{
    struct thread_check check = {.num_outputs = num_outputs};

    assert_true(num_outputs <= THREAD_CHECK_TENSORS_MAX);
    for (int i = 0; i < num_outputs; i++) {
        const size_t size_bytes = tensor_size_bytes(outputs[i]);

        check.outputs[i] = outputs[i];
        check.before[i] = arena_allocate(arena, size_bytes);
        check.after[i] = arena_allocate(arena, size_bytes);
        memcpy(check.before[i], outputs[i]->data, size_bytes);
    }
    return check;
}

static inline bool thread_check_next(struct thread_check *check, const char *file, int line)
{
    for (int i = 0; i < check->num_outputs; i++) {
        void *data = check->outputs[i]->data;
        const size_t size_bytes = tensor_size_bytes(check->outputs[i]);

        if (check->num_threads == 1) {
            memcpy(check->after[i], data, size_bytes);
        } else if (check->num_threads > 1 && memcmp(check->after[i], data, size_bytes) != 0) {
            print_error("output %d has other bits with %d threads\n", i, check->num_threads);
            _fail(file, line);
        }
        if (check->num_threads < 3) {
            memcpy(data, check->before[i], size_bytes);
        }
    }
    check->num_threads++;
    ops_cpu_set_num_threads(check->num_threads <= 3 ? check->num_threads : 0);
    return check->num_threads <= 3;
}

/* Central differences of loss(context) with respect to x[n], against the gradient. The step and the
 * bar suit double precision and values of order one. */
typedef double loss_function(const void *context);

static inline void assert_gradient(loss_function *loss, const void *context, double *x, int64_t n,
                                   const double *gradient)
{
    const double step = 1e-5;
    double largest = 1e-3;

    for (int64_t i = 0; i < n; i++) {
        largest = fmax(largest, fabs(gradient[i]));
    }
    for (int64_t i = 0; i < n; i++) {
        const double saved = x[i];
        double above, below, slope;

        x[i] = saved + step;
        above = loss(context);
        x[i] = saved - step;
        below = loss(context);
        x[i] = saved;
        slope = (above - below) / (2.0 * step);
        if (!(fabs(slope - gradient[i]) <= 1e-6 * largest)) {
            fail_msg("gradient %lld is %.12g, finite difference %.12g", (long long)i, gradient[i],
                     slope);
        }
    }
}

#endif
