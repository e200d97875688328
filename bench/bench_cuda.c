/* bench_cuda [WORD...]: what the CUDA ops reach on this GPU, against two roofs measured in the same
 * run: a device-to-device copy and large products of cuBLASLt. Data are random normal numbers.
 * Prints a line a measurement, the median of several; only those whose name contains a WORD, if
 * any. */
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/check.h"
#include "device/device_cuda.h"
#include "ops/ops.h"
#include "ops/ops_cuda.h"
#include "ops/ops_profile.h"

enum { REPEATS = 7 };

static struct stream *stream;
static struct arena *arena;
static double copy_rate, product_rate; /* bytes/s, FLOP/s */
static char **words;
static int num_words;

typedef void runner(void *context);

static double seconds_now(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

static int compare_doubles(const void *left, const void *right)
{
    const double a = *(const double *)left, b = *(const double *)right;

    return a < b ? -1 : a > b;
}

static double seconds_of(runner *run, void *context, int count)
{
    const double start = seconds_now();

    for (int i = 0; i < count; i++) {
        run(context);
    }
    stream_wait(stream);
    return (seconds_now() - start) / (double)count;
}

/* Median seconds of one run, of batches that take about 30 ms each. */
static double median_seconds(runner *run, void *context)
{
    double seconds[REPEATS], once;
    int count;

    seconds_of(run, context, 2);
    once = seconds_of(run, context, 1);
    count = once > 0.03 ? 1 : (int)(0.03 / once) + 1;
    for (int i = 0; i < REPEATS; i++) {
        seconds[i] = seconds_of(run, context, count);
    }
    qsort(seconds, REPEATS, sizeof seconds[0], compare_doubles);
    return seconds[REPEATS / 2];
}

static bool is_wanted(const char *name)
{
    for (int i = 0; i < num_words; i++) {
        if (strstr(name, words[i]) != NULL) {
            return true;
        }
    }
    return num_words == 0;
}

static void report(const char *name, runner *run, void *context, double flops, double bytes)
{
    double seconds;

    if (!is_wanted(name)) {
        return;
    }
    seconds = median_seconds(run, context);
    printf("%-44s %9.3f ms", name, seconds * 1e3);
    if (flops > 0.0) {
        printf(" %7.1f TFLOP/s %5.1f %% of cuBLAS", flops / seconds / 1e12,
               100.0 * flops / seconds / product_rate);
    }
    if (bytes > 0.0) {
        printf(" %7.2f TB/s %5.1f %% of copy", bytes / seconds / 1e12,
               100.0 * bytes / seconds / copy_rate);
    }
    printf("\n");
    fflush(stdout);
}

/* ---- inputs ---- */

static void begin(void)
{
    stream_wait(stream);
    arena_release(arena, (struct arena_mark){0});
}

static struct tensor new_tensor(enum dtype dtype, int64_t rows, int64_t columns)
{
    return tensor_new(arena, dtype, rows, columns);
}

static struct tensor new_ids(int64_t n)
{
    struct tensor ids = tensor_new(arena, DTYPE_I64, n);
    int64_t *host = malloc((size_t)n * sizeof *host);

    for (int64_t i = 0; i < n; i++) {
        host[i] = i;
    }
    stream_copy_from_host(stream, ids.data, host, (size_t)n * sizeof *host);
    free(host);
    return ids;
}

/* Drawn on the device, in slices, so that the F32 numbers need little memory. */
static void fill_normal(struct tensor *x, float scale, uint64_t purpose)
{
    const int64_t slice_rows = 1024, num_rows = x->dim[0], width = x->dim[1];
    struct arena *slices = arena_create("slices", &stream->device->memory);
    struct tensor slice = tensor_new(slices, DTYPE_F32, slice_rows, width), ids = new_ids(num_rows);

    for (int64_t row = 0; row < num_rows; row += slice_rows) {
        const int64_t n = num_rows - row < slice_rows ? num_rows - row : slice_rows;
        struct tensor to = tensor_rows(x, row, n), from = tensor_rows(&slice, 0, n);
        const struct tensor token = tensor_rows(&ids, row, n);

        op_random_normal(stream, &(struct random_normal){.x = &from,
                                                         .token_id = &token,
                                                         .key = rng_key(1, "bench", purpose)});
        op_linear_combination(stream,
                              &(struct linear_combination){.y = &to, .x = &from, .a = scale});
    }
    stream_wait(stream);
    arena_destroy(slices);
}

static struct tensor normal_tensor(enum dtype dtype, float scale, int64_t rows, int64_t columns)
{
    static uint64_t purpose;
    struct tensor x = new_tensor(dtype, rows, columns);

    fill_normal(&x, scale, purpose++);
    return x;
}

static struct tensor numbers(int64_t n, int32_t (*value)(int64_t i, const int64_t *with),
                             const int64_t *with)
{
    struct tensor x = tensor_new(arena, DTYPE_I32, n);
    int32_t *host = malloc((size_t)n * sizeof *host);

    for (int64_t i = 0; i < n; i++) {
        host[i] = value(i, with);
    }
    stream_copy_from_host(stream, x.data, host, (size_t)n * sizeof *host);
    free(host);
    return x;
}

/* ---- roofs ---- */

struct copy_work {
    struct tensor from, to;
};

static void copy_run(void *context)
{
    struct copy_work *work = context;

    stream_copy(stream, work->to.data, work->from.data, tensor_size_bytes(&work->from));
}

static void matmul_run(void *context)
{
    op_matmul(stream, context);
}

static double product_of(int64_t m, int64_t n, int64_t k)
{
    struct tensor a, b, c;
    struct matmul product;
    double rate;

    begin();
    a = normal_tensor(DTYPE_BF16, 1.0f, m, k);
    b = normal_tensor(DTYPE_BF16, 1.0f, n, k);
    c = new_tensor(DTYPE_BF16, m, n);
    product = (struct matmul){.c = &c, .a = &a, .b = &b, .transpose_b = true};
    rate = 2.0 * (double)m * (double)n * (double)k / median_seconds(matmul_run, &product);
    printf("cuBLASLt bf16 %lld x %lld x %lld: %.1f TFLOP/s\n", (long long)m, (long long)n,
           (long long)k, rate / 1e12);
    return rate;
}

static void measure_roofs(void)
{
    struct copy_work copy;

    begin();
    copy.from = normal_tensor(DTYPE_F32, 1.0f, 65536, 4096);
    copy.to = new_tensor(DTYPE_F32, 65536, 4096);
    copy_rate = 2.0 * (double)tensor_size_bytes(&copy.to) / median_seconds(copy_run, &copy);
    printf("copy: %.2f TB/s read and written\n", copy_rate / 1e12);
    product_rate = product_of(8192, 8192, 8192);
    product_of(1024, 28672, 4096);
    product_of(1024, 4096, 14336);
}

/* ---- dense products of a training step of Mixtral 8x7B ---- */

/* y = x W^T, d_x = d_y W and d_W = d_y^T x of a layer of n outputs and k inputs. */
static void bench_linear(const char *name, int64_t t, int64_t n, int64_t k)
{
    const double flops = 2.0 * (double)t * (double)n * (double)k;
    char line[64];

    begin();
    struct tensor x = normal_tensor(DTYPE_BF16, 1.0f, t, k);
    struct tensor w = normal_tensor(DTYPE_BF16, 0.02f, n, k);
    struct tensor y = normal_tensor(DTYPE_BF16, 1.0f, t, n), d_x = new_tensor(DTYPE_BF16, t, k);
    struct tensor d_w = new_tensor(DTYPE_F32, n, k);

    snprintf(line, sizeof line, "linear %s T%lld d_x", name, (long long)t);
    report(line, matmul_run, &(struct matmul){.c = &d_x, .a = &y, .b = &w}, flops, 0.0);
    snprintf(line, sizeof line, "linear %s T%lld d_w", name, (long long)t);
    report(line, matmul_run, &(struct matmul){.c = &d_w, .a = &y, .b = &x, .transpose_a = true},
           flops, 0.0);
    snprintf(line, sizeof line, "linear %s T%lld d_w +=", name, (long long)t);
    report(line, matmul_run,
           &(struct matmul){.c = &d_w, .a = &y, .b = &x, .transpose_a = true, .accumulate = true},
           flops, 0.0);
    snprintf(line, sizeof line, "linear %s T%lld forward", name, (long long)t);
    report(line, matmul_run, &(struct matmul){.c = &y, .a = &x, .b = &w, .transpose_b = true},
           flops, 0.0);
}

static void bench_linears(int64_t t)
{
    bench_linear("qkv", t, 6144, 4096);
    bench_linear("attention out", t, 4096, 4096);
    bench_linear("head", t, 32000, 4096);
}

/* ---- experts ---- */

struct experts_work {
    struct experts_forward forward;
    struct experts_backward backward;
};

static void experts_forward_run(void *context)
{
    op_experts_forward(stream, &((struct experts_work *)context)->forward);
}

static void experts_backward_run(void *context)
{
    op_experts_backward(stream, &((struct experts_work *)context)->backward);
}

struct routing {
    int64_t t, e, k;
    bool skewed; /* expert 0 takes half of all rows, the others share the rest */
};

static int32_t offset_of(int64_t e, const int64_t *with)
{
    const struct routing *r = (const void *)with;
    const int64_t rows = r->t * r->k;

    if (!r->skewed || e == 0) {
        return (int32_t)(rows * e / r->e);
    }
    return (int32_t)(rows / 2 + rows / 2 * (e - 1) / (r->e - 1));
}

static int32_t token_of(int64_t row, const int64_t *with)
{
    return (int32_t)(row * 7919 % ((const struct routing *)(const void *)with)->t);
}

static struct tensor view3(struct tensor x, int64_t e)
{
    return tensor_view(&x, e, x.dim[0] / e, x.dim[1]);
}

static void bench_experts(const char *name, struct routing r, int64_t h, int64_t f)
{
    const int64_t rows = r.t * r.k;
    const double flops = 6.0 * (double)rows * (double)h * (double)f;
    char line[80];

    if (!is_wanted(name)) {
        return;
    }
    begin();
    struct tensor x = normal_tensor(DTYPE_BF16, 1.0f, r.t, h);
    struct tensor d_y = normal_tensor(DTYPE_BF16, 1.0f, r.t, h);
    struct tensor fc1 = view3(normal_tensor(DTYPE_BF16, 0.02f, r.e * 2 * f, h), r.e);
    struct tensor fc2 = view3(normal_tensor(DTYPE_BF16, 0.02f, r.e * h, f), r.e);
    struct tensor d_fc1 = tensor_new(arena, DTYPE_F32, r.e, 2 * f, h);
    struct tensor d_fc2 = tensor_new(arena, DTYPE_F32, r.e, h, f);
    struct tensor pre = new_tensor(DTYPE_BF16, rows, 2 * f), y = new_tensor(DTYPE_BF16, rows, h);
    struct tensor d_x = new_tensor(DTYPE_BF16, rows, h),
                  prob = normal_tensor(DTYPE_F32, 1.0f, rows, 1);
    struct tensor d_prob = tensor_new(arena, DTYPE_F32, rows);
    struct tensor offsets = numbers(r.e + 1, offset_of, (const void *)&r);
    struct tensor row_token = numbers(rows, token_of, (const void *)&r);

    prob = tensor_view(&prob, rows);
    op_fill_zero(stream, &d_fc1);
    op_fill_zero(stream, &d_fc2);
    struct experts_work work = {
        .forward = {.activation = ACTIVATION_SWIGLU,
                    .y = &y,
                    .pre_activation = &pre,
                    .x = &x,
                    .row_token = &row_token,
                    .offsets = &offsets,
                    .row_prob = &prob,
                    .fc1 = &fc1,
                    .fc2 = &fc2},
    };
    work.backward = (struct experts_backward){.forward = work.forward,
                                              .d_y = &d_y,
                                              .d_y_row_token = &row_token,
                                              .d_x = &d_x,
                                              .d_row_prob = &d_prob,
                                              .d_fc1 = &d_fc1,
                                              .d_fc2 = &d_fc2};
    snprintf(line, sizeof line, "%s forward", name);
    report(line, experts_forward_run, &work, flops, 0.0);
    snprintf(line, sizeof line, "%s backward", name);
    report(line, experts_backward_run, &work, 2.0 * flops, 0.0);
}

/* ---- a whole MoE layer, op by op as src/moe runs it, with routing that is forced ---- */

enum { LAYER_WARM_UPS = 5, LAYER_REPEATS = 20 };

/* Before a burst the card idles, and before the sustained figure it is busy, for so long. */
static const double layer_pause_seconds = 2.0, layer_load_seconds = 3.0;

struct layer_work {
    bool first_microbatch; /* weight gradients replace what is there */
    struct tensor x, gate, fc1, fc2, d_y;
    struct tensor logits, probs, chosen, forced;        /* router */
    struct tensor row_of, row_token, row_prob, offsets; /* permutation */
    struct tensor pre_activation, rows, y;
    struct tensor d_rows, d_row_prob, d_probs, d_logits, d_x;
    struct tensor d_gate, d_fc1, d_fc2;
    struct router_topk route;
    struct experts_forward forward;
};

static void layer_forward_run(void *context)
{
    struct layer_work *w = context;

    op_matmul(stream,
              &(struct matmul){.c = &w->logits, .a = &w->x, .b = &w->gate, .transpose_b = true});
    op_router_topk_forward(stream, &w->route);
    op_permutation(stream, &(struct permutation){.row_of = &w->row_of,
                                                 .row_token = &w->row_token,
                                                 .row_prob = &w->row_prob,
                                                 .offsets = &w->offsets,
                                                 .indices = &w->forced,
                                                 .probs = &w->probs});
    op_experts_forward(stream, &w->forward);
    op_row_sum(stream, &(struct row_sum){.y = &w->y, .rows = &w->rows, .row_of = &w->row_of});
}

static void layer_router_backward(struct layer_work *w)
{
    op_slot_gather(stream, &(struct slot_gather){.d_probs = &w->d_probs,
                                                 .d_row_prob = &w->d_row_prob,
                                                 .row_of = &w->row_of});
    op_router_backward(stream, &(struct router_backward){.rule = w->route.rule,
                                                         .d_logits = &w->d_logits,
                                                         .logits = &w->logits,
                                                         .d_probs = &w->d_probs,
                                                         .indices = &w->chosen});
    op_router_linear_backward(
        stream, &(struct router_linear_backward){.d_x = &w->d_x,
                                                 .d_weight = &w->d_gate,
                                                 .d_logits = &w->d_logits,
                                                 .x = &w->x,
                                                 .weight = &w->gate,
                                                 .overwrite_grads = w->first_microbatch});
}

static void layer_run(void *context)
{
    struct layer_work *w = context;

    layer_forward_run(w);
    op_experts_backward(stream, &(struct experts_backward){.forward = w->forward,
                                                           .d_y = &w->d_y,
                                                           .d_y_row_token = &w->row_token,
                                                           .d_x = &w->d_rows,
                                                           .d_row_prob = &w->d_row_prob,
                                                           .d_fc1 = &w->d_fc1,
                                                           .d_fc2 = &w->d_fc2,
                                                           .overwrite_grads = w->first_microbatch});
    op_row_sum(stream, &(struct row_sum){.y = &w->d_x, .rows = &w->d_rows, .row_of = &w->row_of});
    layer_router_backward(w);
}

/* Even, or with skew all first slots to expert 0. */
static int32_t forced_expert(int64_t slot, const int64_t *with)
{
    const struct routing *r = (const void *)with;

    if (!r->skewed) {
        return (int32_t)(slot % r->e);
    }
    return (int32_t)(slot % r->k == 0 ? 0 : 1 + slot / r->k % (r->e - 1));
}

static void layer_tensors(struct layer_work *w, struct routing r, int64_t h, int64_t f)
{
    const int64_t rows = r.t * r.k;
    const struct tensor forced = numbers(rows, forced_expert, (const void *)&r);

    w->x = normal_tensor(DTYPE_BF16, 1.0f, r.t, h);
    w->d_y = normal_tensor(DTYPE_BF16, 1.0f, r.t, h);
    w->gate = normal_tensor(DTYPE_BF16, 0.02f, r.e, h);
    w->fc1 = view3(normal_tensor(DTYPE_BF16, 0.02f, r.e * 2 * f, h), r.e);
    w->fc2 = view3(normal_tensor(DTYPE_BF16, 0.02f, r.e * h, f), r.e);
    w->logits = new_tensor(DTYPE_F32, r.t, r.e);
    w->probs = new_tensor(DTYPE_F32, r.t, r.k);
    w->chosen = new_tensor(DTYPE_I32, r.t, r.k);
    w->forced = tensor_view(&forced, r.t, r.k);
    w->row_of = new_tensor(DTYPE_I32, r.t, r.k);
    w->row_token = tensor_new(arena, DTYPE_I32, rows);
    w->row_prob = tensor_new(arena, DTYPE_F32, rows);
    w->offsets = tensor_new(arena, DTYPE_I32, r.e + 1);
    w->pre_activation = new_tensor(DTYPE_BF16, rows, 2 * f);
    w->rows = new_tensor(DTYPE_BF16, rows, h);
    w->y = new_tensor(DTYPE_BF16, r.t, h);
    w->d_rows = new_tensor(DTYPE_BF16, rows, h);
    w->d_row_prob = tensor_new(arena, DTYPE_F32, rows);
    w->d_probs = new_tensor(DTYPE_F32, r.t, r.k);
    w->d_logits = new_tensor(DTYPE_F32, r.t, r.e);
    w->d_x = new_tensor(DTYPE_BF16, r.t, h);
    w->d_gate = new_tensor(DTYPE_F32, r.e, h);
    w->d_fc1 = tensor_new(arena, DTYPE_F32, r.e, 2 * f, h);
    w->d_fc2 = tensor_new(arena, DTYPE_F32, r.e, h, f);
    op_fill_zero(stream, &w->d_gate);
    op_fill_zero(stream, &w->d_fc1);
    op_fill_zero(stream, &w->d_fc2);
}

static void layer_init(struct layer_work *w, struct routing r, int64_t h, int64_t f)
{
    layer_tensors(w, r, h, f);
    w->route = (struct router_topk){.rule = {.topk = (int)r.k, .scaling_factor = 1.0f},
                                    .probs = &w->probs,
                                    .indices = &w->chosen,
                                    .logits = &w->logits};
    w->forward = (struct experts_forward){.activation = ACTIVATION_SWIGLU,
                                          .y = &w->rows,
                                          .pre_activation = &w->pre_activation,
                                          .x = &w->x,
                                          .row_token = &w->row_token,
                                          .token_rows = &w->row_of,
                                          .offsets = &w->offsets,
                                          .row_prob = &w->row_prob,
                                          .fc1 = &w->fc1,
                                          .fc2 = &w->fc2};
}

static double device_seconds(runner *run, struct layer_work *work)
{
    void *from = stream_mark(stream), *to;
    double seconds;

    run(work);
    to = stream_mark(stream);
    seconds = stream_mark_seconds(stream, from, to);
    stream_mark_free(stream, from);
    stream_mark_free(stream, to);
    return seconds;
}

enum card_state { CARD_RESTED, CARD_LOADED };

static void prepare_card(enum card_state state, runner *run, struct layer_work *work)
{
    const double start = seconds_now();

    stream_wait(stream);
    if (state == CARD_RESTED) {
        const struct timespec pause = {.tv_sec = (time_t)layer_pause_seconds};

        nanosleep(&pause, NULL);
        seconds_of(run, work, LAYER_WARM_UPS);
        return;
    }
    while (seconds_now() - start < layer_load_seconds) {
        seconds_of(run, work, LAYER_WARM_UPS);
    }
}

/* Median of single runs, each waited for: how peers/torch_moe_layer.py measures. A card at its
 * power limit is slower than a rested one. */
static double report_layer(const char *name, const char *what, enum card_state state, runner *run,
                           struct layer_work *work, double flops)
{
    double seconds[LAYER_REPEATS];

    prepare_card(state, run, work);
    for (int i = 0; i < LAYER_REPEATS; i++) {
        seconds[i] = device_seconds(run, work);
    }
    qsort(seconds, LAYER_REPEATS, sizeof seconds[0], compare_doubles);
    printf("%s, %-*s %s %9.3f ms %7.1f TFLOP/s\n", name, 48 - (int)strlen(name), what,
           state == CARD_RESTED ? "rested" : "loaded", seconds[LAYER_REPEATS / 2] * 1e3,
           flops / seconds[LAYER_REPEATS / 2] / 1e12);
    fflush(stdout);
    return seconds[LAYER_REPEATS / 2];
}

/* What forward leaves for backward, against the layer's input and the pre-activation alone. */
static void report_layer_memory(const char *name, const struct layer_work *w)
{
    const struct tensor *const kept[] = {&w->x,         &w->pre_activation, &w->logits,
                                         &w->probs,     &w->chosen,         &w->row_of,
                                         &w->row_token, &w->row_prob,       &w->offsets};
    const double least = (double)(tensor_size_bytes(&w->x) + tensor_size_bytes(&w->pre_activation));
    double bytes = 0.0;

    for (size_t i = 0; i < sizeof kept / sizeof kept[0]; i++) {
        bytes += (double)tensor_size_bytes(kept[i]);
    }
    printf("%s, kept for backward: %.1f MB, %.2f times 2*T*H + 4*T*K*F\n", name, bytes / 1e6,
           bytes / least);
}

static void report_layer_ops(struct layer_work *work)
{
    ops_profile_start(stream);
    layer_run(work);
    ops_profile_stop(stream);
    ops_profile_print(stdout, &(struct op_roof){product_rate, copy_rate});
}

static void bench_layer(const char *name, struct routing r, int64_t h, int64_t f)
{
    const double flops = 6.0 * (double)(r.t * r.k) * (double)h * (double)f;
    struct layer_work work = {.first_microbatch = true};

    if (!is_wanted(name)) {
        return;
    }
    begin();
    layer_init(&work, r, h, f);
    report_layer_memory(name, &work);
    report_layer(name, "forward", CARD_RESTED, layer_forward_run, &work, flops);
    report_layer(name, "first microbatch", CARD_RESTED, layer_run, &work, 3.0 * flops);
    report_layer(name, "first microbatch", CARD_LOADED, layer_run, &work, 3.0 * flops);
    report_layer_ops(&work);
    work.first_microbatch = false;
    report_layer(name, "accumulating", CARD_RESTED, layer_run, &work, 3.0 * flops);
}

/* The busiest expert takes half of all rows. */
static void bench_layer_skew(const char *name, struct routing r, int64_t h, int64_t f)
{
    const double flops = 18.0 * (double)(r.t * r.k) * (double)h * (double)f;
    struct layer_work work = {.first_microbatch = true};
    double seconds[2];

    if (!is_wanted(name)) {
        return;
    }
    for (int i = 0; i < 2; i++) {
        begin();
        r.skewed = i == 1;
        layer_init(&work, r, h, f);
        seconds[i] = report_layer(name, i == 0 ? "even" : "half of all rows to one expert",
                                  CARD_RESTED, layer_run, &work, flops);
    }
    printf("%s: %+.1f %%\n", name, 100.0 * (seconds[1] / seconds[0] - 1.0));
}

/* ---- what memory bounds, T 16384, H 4096 ---- */

#define RUNNER(name, args)                                                                         \
    static void name##_run(void *context)                                                          \
    {                                                                                              \
        op_##name(stream, (const struct args *)context);                                           \
    }
RUNNER(norm_forward, norm_forward)
RUNNER(norm_backward, norm_backward)
RUNNER(qkv_split_forward, qkv_split)
RUNNER(activation_forward, activation)
RUNNER(activation_backward, activation)
RUNNER(row_sum, row_sum)
RUNNER(row_gather, row_gather)
RUNNER(cross_entropy_forward, cross_entropy)
RUNNER(cross_entropy_backward, cross_entropy_backward)
RUNNER(embedding_forward, embedding)
RUNNER(embedding_backward, embedding_backward)
RUNNER(adam_step, adam_step)
RUNNER(square_sum, square_sum)
RUNNER(attention_forward, attention)
RUNNER(attention_backward, attention_backward)
RUNNER(permutation, permutation)
RUNNER(router_topk_forward, router_topk)
RUNNER(router_balance, router_balance)
RUNNER(router_backward, router_backward)
RUNNER(router_linear_backward, router_linear_backward)

static int32_t spread_index(int64_t i, const int64_t *with)
{
    return (int32_t)(i * 7919 % *with);
}

static void bench_norm(int64_t t, int64_t h)
{
    const double bytes = 2.0 * (double)t * (double)h; /* of one bf16 tensor */
    char name[64];

    begin();
    struct tensor x = normal_tensor(DTYPE_BF16, 1.0f, t, h),
                  r = normal_tensor(DTYPE_BF16, 1.0f, t, h);
    struct tensor y = new_tensor(DTYPE_BF16, t, h), sum = new_tensor(DTYPE_BF16, t, h);
    struct tensor row = normal_tensor(DTYPE_BF16, 1.0f, 1, h), weight = tensor_view(&row, h);
    struct tensor inv_std = tensor_new(arena, DTYPE_F32, t),
                  d_weight = tensor_new(arena, DTYPE_F32, h);

    snprintf(name, sizeof name, "rmsnorm + residual forward T%lld", (long long)t);
    report(name, norm_forward_run,
           &(struct norm_forward){.y = &y,
                                  .inv_std = &inv_std,
                                  .sum = &sum,
                                  .x = &x,
                                  .residual = &r,
                                  .weight = &weight,
                                  .eps = 1e-5f},
           0.0, 4.0 * bytes);
    snprintf(name, sizeof name, "rmsnorm + residual backward T%lld", (long long)t);
    report(name, norm_backward_run,
           &(struct norm_backward){.d_x = &y,
                                   .d_weight = &d_weight,
                                   .d_y = &r,
                                   .x = &sum,
                                   .weight = &weight,
                                   .inv_std = &inv_std,
                                   .d_residual = &x},
           0.0, 4.0 * bytes);
}

static void bench_rope(int64_t t, int64_t a, int64_t g, int64_t d)
{
    begin();
    struct tensor qkv = normal_tensor(DTYPE_BF16, 1.0f, t, (a + 2 * g) * d);
    struct tensor q = tensor_new(arena, DTYPE_BF16, t, a, d);
    struct tensor k = tensor_new(arena, DTYPE_BF16, t, g, d),
                  v = tensor_new(arena, DTYPE_BF16, t, g, d);
    struct tensor flat = normal_tensor(DTYPE_F32, 1.0f, 4096, d);
    struct tensor table = tensor_view(&flat, 4096, d / 2, 2);
    const int64_t positions = 4096;
    struct tensor position = numbers(t, spread_index, &positions);

    report("qkv split and rope", qkv_split_forward_run,
           &(struct qkv_split){
               .q = &q, .k = &k, .v = &v, .qkv = &qkv, .table = &table, .position = &position},
           0.0, 2.0 * (double)tensor_size_bytes(&qkv));
}

static void bench_swiglu(int64_t t, int64_t f)
{
    const double bytes = 2.0 * (double)t * (double)f;

    begin();
    struct tensor x = normal_tensor(DTYPE_BF16, 1.0f, t, 2 * f), y = new_tensor(DTYPE_BF16, t, f);
    struct tensor d_y = normal_tensor(DTYPE_BF16, 1.0f, t, f),
                  d_x = new_tensor(DTYPE_BF16, t, 2 * f);
    struct activation op = {.kind = ACTIVATION_SWIGLU, .y = &y, .x = &x, .d_y = &d_y, .d_x = &d_x};

    report("SwiGLU forward", activation_forward_run, &op, 0.0, 3.0 * bytes);
    report("SwiGLU backward", activation_backward_run, &op, 0.0, 5.0 * bytes);
}

static void bench_rows(int64_t t, int64_t k, int64_t h)
{
    const int64_t rows = t * k;
    const double bytes = 2.0 * (double)t * (double)h;

    begin();
    struct tensor x = normal_tensor(DTYPE_BF16, 1.0f, t, h), y = new_tensor(DTYPE_BF16, rows, h);
    struct tensor index = numbers(rows, spread_index, &t);
    struct tensor slots = numbers(rows, spread_index, &rows), row_of = tensor_view(&slots, t, k);

    report("row gather", row_gather_run, &(struct row_gather){.y = &y, .x = &x, .index = &index},
           0.0, 2.0 * (double)k * bytes);
    report("row gather, by tokens", row_gather_run,
           &(struct row_gather){.y = &y, .x = &x, .index = &index, .token_rows = &row_of}, 0.0,
           ((double)k + 1.0) * bytes);
    report("combine (row sum)", row_sum_run,
           &(struct row_sum){.y = &x, .rows = &y, .row_of = &row_of}, 0.0,
           ((double)k + 1.0) * bytes);
    report("combine (row sum) and residual", row_sum_run,
           &(struct row_sum){.y = &x, .rows = &y, .row_of = &row_of, .residual = &x}, 0.0,
           ((double)k + 2.0) * bytes);
}

static void bench_embedding(int64_t t, int64_t v, int64_t h)
{
    const double bytes = 2.0 * (double)t * (double)h;

    begin();
    struct tensor weight = normal_tensor(DTYPE_BF16, 1.0f, v, h), y = new_tensor(DTYPE_BF16, t, h);
    struct tensor d_y = normal_tensor(DTYPE_BF16, 1.0f, t, h),
                  d_weight = new_tensor(DTYPE_F32, v, h);
    struct tensor id = numbers(t, spread_index, &v);

    op_fill_zero(stream, &d_weight);
    report("embedding forward", embedding_forward_run,
           &(struct embedding){.y = &y, .weight = &weight, .id = &id}, 0.0, 2.0 * bytes);
    /* each id once: a row of d_y is read, one of f32 read and written */
    report("embedding backward", embedding_backward_run,
           &(struct embedding_backward){.d_weight = &d_weight, .d_y = &d_y, .id = &id}, 0.0,
           5.0 * bytes);
}

static void bench_cross_entropy(int64_t t, int64_t v)
{
    const double bytes = 2.0 * (double)t * (double)v;

    begin();
    struct tensor logits = normal_tensor(DTYPE_BF16, 1.0f, t, v);
    struct tensor max = tensor_new(arena, DTYPE_F32, t), sum = tensor_new(arena, DTYPE_F32, t);
    struct tensor target = tensor_new(arena, DTYPE_F32, t), label = numbers(t, spread_index, &v);
    struct tensor row = normal_tensor(DTYPE_F32, 1e-3f, 1, t), d_loss = tensor_view(&row, t);

    report("cross entropy forward", cross_entropy_forward_run,
           &(struct cross_entropy){
               .max = &max, .sum_exp = &sum, .target = &target, .logits = &logits, .label = &label},
           0.0, bytes);
    report("cross entropy, both passes at once", cross_entropy_forward_run,
           &(struct cross_entropy){.max = &max,
                                   .sum_exp = &sum,
                                   .target = &target,
                                   .d_logits = &logits,
                                   .logits = &logits,
                                   .label = &label,
                                   .d_loss = &d_loss},
           0.0, 2.0 * bytes);
    report("cross entropy backward", cross_entropy_backward_run,
           &(struct cross_entropy_backward){
               .logits = &logits, .max = &max, .sum_exp = &sum, .label = &label, .d_loss = &d_loss},
           0.0, 2.0 * bytes);
}

static void bench_optimizer(int64_t n)
{
    begin();
    struct tensor rows[4], flat[4], param = tensor_new(arena, DTYPE_BF16, n);
    struct tensor scale = normal_tensor(DTYPE_F32, 1.0f, 1, 1),
                  sum = tensor_new(arena, DTYPE_F64, 1);

    for (int i = 0; i < 4; i++) {
        rows[i] = normal_tensor(DTYPE_F32, 0.1f, n / 4096, 4096);
        flat[i] = tensor_view(&rows[i], n);
    }
    op_fill_zero(stream, &flat[2]);
    scale = tensor_view(&scale, 1);
    report("Adam (f32 masters and moments)", adam_step_run,
           &(struct adam_step){.param = &param,
                               .master = &flat[0],
                               .exp_avg = &flat[1],
                               .exp_avg_sq = &flat[2],
                               .grad = &flat[3],
                               .grad_scale = &scale,
                               .lr = 1e-4f,
                               .beta1 = 0.9f,
                               .beta2 = 0.95f,
                               .eps = 1e-8f,
                               .step = 5},
           0.0, 30.0 * (double)n);
    report("square sum", square_sum_run, &(struct square_sum){.sum = &sum, .x = &flat[3]}, 0.0,
           4.0 * (double)n);
}

enum attention_case { ATTENTION_PLAIN, ATTENTION_DOCUMENTS, ATTENTION_DROPOUT };

/* With documents: one a sequence, so that the work is the same. */
static void bench_attention(enum attention_case kind, int64_t s, int64_t b, int64_t a, int64_t g,
                            int64_t d)
{
    static const char *const names[] = {"", ", documents", ", dropout"};
    /* Causal: half of 4 B S^2 A D. */
    const double flops = 2.0 * (double)b * (double)(s * s) * (double)(a * d);
    char name[64];

    begin();
    struct tensor flat = normal_tensor(DTYPE_BF16, 1.0f, s, b * a * d),
                  q = tensor_view(&flat, s, b, a, d);
    struct tensor flat_k = normal_tensor(DTYPE_BF16, 1.0f, s, b * g * d),
                  k = tensor_view(&flat_k, s, b, g, d);
    struct tensor v = k, out = tensor_new(arena, DTYPE_BF16, s, b, a, d);
    struct tensor lse = tensor_new(arena, DTYPE_F32, b, a, s),
                  d_q = tensor_new(arena, DTYPE_BF16, s, b, a, d);
    struct tensor d_k = tensor_new(arena, DTYPE_BF16, s, b, g, d),
                  d_v = tensor_new(arena, DTYPE_BF16, s, b, g, d);
    struct tensor start = tensor_new(arena, DTYPE_I32, s * b), sample = new_ids(b);
    struct attention op = {.scale = 0.088f,
                           .causal = true,
                           .document_start = kind == ATTENTION_DOCUMENTS ? &start : NULL,
                           .dropout = {kind == ATTENTION_DROPOUT ? 0.1f : 0.0f, {1, 2}},
                           .sample_id = &sample,
                           .num_heads_global = a,
                           .kv_length = s,
                           .q = &q,
                           .k = &k,
                           .v = &v,
                           .out = &out,
                           .lse = &lse};

    op_fill_zero(stream, &start);
    snprintf(name, sizeof name, "attention forward B%lld S%lld%s", (long long)b, (long long)s,
             names[kind]);
    report(name, attention_forward_run, &op, flops, 0.0);
    snprintf(name, sizeof name, "attention backward B%lld S%lld%s", (long long)b, (long long)s,
             names[kind]);
    report(name, attention_backward_run,
           &(struct attention_backward){
               .forward = op, .d_out = &q, .d_q = &d_q, .d_k = &d_k, .d_v = &d_v},
           2.5 * flops, 0.0);
}

static void bench_router(int64_t t, int64_t e, int64_t k, int64_t h)
{
    const struct router_rule rule = {.topk = (int)k, .scaling_factor = 1.0f};
    const double logits_bytes = 4.0 * (double)(t * e), x_bytes = 2.0 * (double)(t * h);

    begin();
    struct tensor logits = normal_tensor(DTYPE_F32, 1.0f, t, e),
                  probs = new_tensor(DTYPE_F32, t, k);
    struct tensor indices = tensor_new(arena, DTYPE_I32, t, k);
    struct tensor row_of = tensor_new(arena, DTYPE_I32, t, k);
    struct tensor row_token = tensor_new(arena, DTYPE_I32, t * k);
    struct tensor row_prob = tensor_new(arena, DTYPE_F32, t * k);
    struct tensor offsets = tensor_new(arena, DTYPE_I32, e + 1);
    struct tensor counts = new_tensor(DTYPE_F32, 1, e), score_sums = new_tensor(DTYPE_F32, 1, e);
    struct tensor d_logits = new_tensor(DTYPE_F32, t, e), d_weight = new_tensor(DTYPE_F32, e, h);
    struct tensor x = normal_tensor(DTYPE_BF16, 1.0f, t, h),
                  d_x = normal_tensor(DTYPE_BF16, 1.0f, t, h);
    struct tensor weight = normal_tensor(DTYPE_BF16, 0.02f, e, h);

    if (is_wanted("router")) {
        printf("router of T %lld, E %lld, K %lld, H %lld:\n", (long long)t, (long long)e,
               (long long)k, (long long)h);
    }
    report("router logits", matmul_run,
           &(struct matmul){.c = &logits, .a = &x, .b = &weight, .transpose_b = true}, 0.0,
           x_bytes + logits_bytes);
    report("router top-k", router_topk_forward_run,
           &(struct router_topk){
               .rule = rule, .probs = &probs, .indices = &indices, .logits = &logits},
           0.0, logits_bytes);
    report("router permutation", permutation_run,
           &(struct permutation){.row_of = &row_of,
                                 .row_token = &row_token,
                                 .row_prob = &row_prob,
                                 .offsets = &offsets,
                                 .indices = &indices,
                                 .probs = &probs},
           0.0, 20.0 * (double)(t * k));
    report(
        "router balance", router_balance_run,
        &(struct router_balance){
            .counts = &counts, .score_sums = &score_sums, .logits = &logits, .indices = &indices},
        0.0, logits_bytes);
    report("router backward, with a balancing loss", router_backward_run,
           &(struct router_backward){.rule = rule,
                                     .d_logits = &d_logits,
                                     .logits = &logits,
                                     .d_probs = &probs,
                                     .indices = &indices,
                                     .balance = {{&counts, 0.01f}},
                                     .num_balance_terms = 1},
           0.0, 2.0 * logits_bytes);
    report("router backward of the linear layer", router_linear_backward_run,
           &(struct router_linear_backward){.d_x = &d_x,
                                            .d_weight = &d_weight,
                                            .d_logits = &d_logits,
                                            .x = &x,
                                            .weight = &weight,
                                            .overwrite_grads = true},
           0.0, 3.0 * x_bytes + logits_bytes);
}

int main(int argc, char **argv)
{
    const struct device *gpu = device_cuda(0);

    words = argv + 1;
    num_words = argc - 1;
    if (gpu == NULL) {
        fprintf(stderr, "bench_cuda: %s\n", error_text());
        return 1;
    }
    stream = stream_create(gpu, ops_cuda());
    arena = arena_create("bench", &gpu->memory);
    measure_roofs();
    bench_experts("experts Mixtral T4096", (struct routing){4096, 8, 2, false}, 4096, 14336);
    bench_experts("experts Mixtral T4096 skewed", (struct routing){4096, 8, 2, true}, 4096, 14336);
    bench_experts("experts Mixtral T16384", (struct routing){16384, 8, 2, false}, 4096, 14336);
    bench_experts("experts Qwen3-30B T32768", (struct routing){32768, 128, 8, false}, 2048, 768);
    bench_layer("layer Mixtral T4096", (struct routing){4096, 8, 2, false}, 4096, 14336);
    bench_layer("layer Mixtral T16384", (struct routing){16384, 8, 2, false}, 4096, 14336);
    bench_layer("layer Qwen3-30B T32768", (struct routing){32768, 128, 8, false}, 2048, 768);
    bench_layer_skew("layer skew, Mixtral T4096", (struct routing){4096, 8, 2, false}, 4096, 14336);
    bench_linears(4096);
    bench_linears(16384);
    bench_norm(4096, 4096);
    bench_norm(16384, 4096);
    bench_rope(16384, 32, 8, 128);
    bench_swiglu(16384, 14336);
    bench_rows(16384, 2, 4096);
    bench_embedding(16384, 32000, 4096);
    bench_cross_entropy(8192, 32768);
    bench_optimizer((int64_t)256 << 20);
    bench_router(16384, 8, 2, 4096);
    bench_router(32768, 128, 8, 2048);
    bench_attention(ATTENTION_PLAIN, 4096, 1, 32, 8, 128);
    bench_attention(ATTENTION_PLAIN, 4096, 4, 32, 8, 128);
    bench_attention(ATTENTION_DOCUMENTS, 4096, 1, 32, 8, 128);
    bench_attention(ATTENTION_DROPOUT, 4096, 1, 32, 8, 128);
    return 0;
}
