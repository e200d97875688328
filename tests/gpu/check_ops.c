/* check_ops [F32|BF16] [attention|dense|moe] [aligned|shifted] [small|tiny] [shared]: every op on
 * the GPU against the same op on the CPU (whose products are sums in double here), on fresh random
 * inputs, into poisoned outputs, in packed, odd and empty sizes, with tensors that begin at aligned
 * addresses and (attention apart) an element after; and twice on the GPU, for the same bits. Prints
 * a line an op, and a table of failures last. shared: as where communication may hold
 * multiprocessors, which is when the experts' products share out their tiles as they go. */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "base/check.h"
#include "base/rng.h"
#include "device/device_cuda.h"
#include "ops/ops.h"
#include "ops/ops_cuda.h"

enum { SIDE_CPU, SIDE_GPU, SIDE_GPU_AGAIN, NUM_SIDES };
enum { GUARDS_MAX = 512, GUARD_BYTES = 64, GUARD_BYTE = 0x5a };

/* One tensor in three places. */
struct trio {
    struct tensor side[NUM_SIDES];
};

static int num_words;
static char **words; /* of the command line */
static struct stream *streams[NUM_SIDES];
static struct arena *arenas[NUM_SIDES];
static struct rng_key test_key;
static uint64_t num_drawn;
/* Memory that must keep its bytes. */
static struct guarded {
    struct stream *stream;
    const char *memory;
    size_t size_bytes;
} guards[GUARDS_MAX];
static int num_guards;
static int num_checks, num_failures;
static char failures[64][160];
static const char *current; /* what is being checked */
static enum dtype act;      /* the activations' dtype of the current pass */
static int64_t shift;       /* elements before every tensor of the current pass */

#define SIZE_OF_DIMS(...) (int)(sizeof((const int64_t[]){__VA_ARGS__}) / sizeof(int64_t))
#define NEW(dtype, ...) trio_new((dtype), (const int64_t[]){__VA_ARGS__}, SIZE_OF_DIMS(__VA_ARGS__))
#define NORMAL(dtype, scale, ...) filled_normal(NEW(dtype, __VA_ARGS__), (scale))
#define POISON(dtype, ...) poisoned(NEW(dtype, __VA_ARGS__))
#define BELOW(n, ...) filled_below(NEW(DTYPE_I32, __VA_ARGS__), (n))
/* In BOTH: the tensor of the side that runs. */
#define D(x) (&(x).side[side])
#define BOTH(name, args, ...)                                                                      \
    for (int side = 0; side < NUM_SIDES; side++)                                                   \
    op_##name(streams[side], &(struct args){__VA_ARGS__})

static bool has_word(const char *word)
{
    for (int i = 0; i < num_words; i++) {
        if (strcmp(words[i], word) == 0) {
            return true;
        }
    }
    return false;
}

/* For tools that make the GPU a hundred times slower. */
static int64_t reduced(int64_t n)
{
    const int64_t fewer = n / 4 + (n > 0);

    return !has_word("tiny") ? n : n % 8 == 0 ? (fewer + 7) / 8 * 8 : fewer;
}

/* What `reduced` makes `n`, an even number, of where a kernel is chosen by the size. */
static int64_t tiny_origin(int64_t n)
{
    return 4 * n - 4;
}

/* Whether the command line names this one, or none of the three. */
static bool is_wanted(const char *name, const char *second, const char *third)
{
    return has_word(name) || (!has_word(second) && !has_word(third));
}

/* Bytes around a tensor that no op may write. */
static void guard(struct stream *stream, char *memory, size_t size_bytes)
{
    char *host = malloc(size_bytes);

    CHECK(host != NULL && num_guards < GUARDS_MAX, "%d guards", num_guards);
    memset(host, GUARD_BYTE, size_bytes);
    stream_copy_from_host(stream, memory, host, size_bytes);
    guards[num_guards++] = (struct guarded){stream, memory, size_bytes};
    free(host);
}

/* With guards around it. */
static struct trio trio_new(enum dtype dtype, const int64_t *dims, int num_dims)
{
    struct tensor x = tensor_wrap(NULL, dtype, dims, num_dims);
    const size_t before = (size_t)(shift * dtype_size_bytes(dtype));
    const size_t size_bytes = tensor_size_bytes(&x);
    struct trio trio;

    for (int side = 0; side < NUM_SIDES; side++) {
        char *memory = arena_allocate(arenas[side], before + size_bytes + GUARD_BYTES);

        if (before > 0) {
            guard(streams[side], memory, before);
        }
        guard(streams[side], memory + before + size_bytes, GUARD_BYTES);
        x.data = memory + before;
        trio.side[side] = x;
    }
    return trio;
}

/* The CPU's values to the GPU's two. */
static struct trio spread(struct trio trio)
{
    for (int side = SIDE_GPU; side < NUM_SIDES; side++) {
        stream_copy_from_host(streams[side], trio.side[side].data, trio.side[SIDE_CPU].data,
                              tensor_size_bytes(&trio.side[SIDE_CPU]));
    }
    return trio;
}

static void put(struct tensor *x, int64_t i, double value)
{
    switch (x->dtype) {
    case DTYPE_F32:
        ((float *)x->data)[i] = (float)value;
        break;
    case DTYPE_BF16:
        ((bf16_t *)x->data)[i] = bf16_from_float((float)value);
        break;
    case DTYPE_F64:
        ((double *)x->data)[i] = value;
        break;
    case DTYPE_I32:
        ((int32_t *)x->data)[i] = (int32_t)value;
        break;
    default:
        ((int64_t *)x->data)[i] = (int64_t)value;
        break;
    }
}

static double get(const struct tensor *x, const void *data, int64_t i)
{
    switch (x->dtype) {
    case DTYPE_F32:
        return (double)((const float *)data)[i];
    case DTYPE_BF16:
        return (double)bf16_to_float(((const bf16_t *)data)[i]);
    case DTYPE_F64:
        return ((const double *)data)[i];
    case DTYPE_I32:
        return (double)((const int32_t *)data)[i];
    default:
        return (double)((const int64_t *)data)[i];
    }
}

static struct trio filled_normal(struct trio trio, double scale)
{
    const uint64_t row = num_drawn++;
    const int64_t n = tensor_num_elements(&trio.side[0]);

#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        put(&trio.side[0], i, scale * rng_normal(test_key, row, (uint64_t)i));
    }
    return spread(trio);
}

static struct trio filled_below(struct trio trio, int64_t end)
{
    const uint64_t row = num_drawn++;
    const int64_t n = tensor_num_elements(&trio.side[0]);

#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        put(&trio.side[0], i, floor((double)rng_uniform(test_key, row, (uint64_t)i) * (double)end));
    }
    return spread(trio);
}

static struct trio poisoned(struct trio trio)
{
    const int64_t n = tensor_num_elements(&trio.side[0]);
    const bool whole = trio.side[0].dtype == DTYPE_I32 || trio.side[0].dtype == DTYPE_I64;

#pragma omp parallel for schedule(static)
    for (int64_t i = 0; i < n; i++) {
        put(&trio.side[0], i, whole ? -1000000000.0 : NAN);
    }
    return spread(trio);
}

static struct trio ids(int64_t n)
{
    struct trio trio = NEW(DTYPE_I64, n);

    for (int64_t i = 0; i < n; i++) {
        put(&trio.side[0], i, (double)(i * 37 % 1000003 + 5));
    }
    return spread(trio);
}

static void failed(const char *name, const char *format, double value, double limit)
{
    if (num_failures < 64) {
        int length = snprintf(failures[num_failures], sizeof failures[0], "%s %s%s %s: ", current,
                              dtype_name(act), shift > 0 ? " shifted" : "", name);

        snprintf(failures[num_failures] + length, sizeof failures[0] - (size_t)length, format,
                 value, limit);
    }
    num_failures++;
}

/* The first n elements of the GPU's result against the CPU's, relative to the largest; and its bits
 * against those of the second run. */
static void check_close(const char *name, const struct trio *x, int64_t n, double tolerance)
{
    const struct tensor *cpu = &x->side[SIDE_CPU];
    const size_t size_bytes = tensor_size_bytes(cpu);
    void *gpu = malloc(size_bytes + 1), *again = malloc(size_bytes + 1);
    double largest = 0.0, worst = 0.0;
    int64_t num_nan = 0;

    stream_copy_to_host(streams[SIDE_GPU], gpu, x->side[SIDE_GPU].data, size_bytes);
    stream_copy_to_host(streams[SIDE_GPU_AGAIN], again, x->side[SIDE_GPU_AGAIN].data, size_bytes);
#pragma omp parallel for schedule(static) reduction(max : largest, worst) reduction(+ : num_nan)
    for (int64_t i = 0; i < n; i++) {
        const double error = fabs(get(cpu, gpu, i) - get(cpu, cpu->data, i));

        largest = fmax(largest, fabs(get(cpu, cpu->data, i)));
        worst = fmax(worst, error); /* leaves out NaN */
        num_nan += isnan(error);
    }
    worst = num_nan > 0 ? NAN : worst / (largest > 0.0 ? largest : 1.0);
    num_checks++;
    printf("%-34s %-5s %-14s error %.1e\n", current, dtype_name(act), name, worst);
    if (!(worst <= tolerance)) {
        failed(name, "error %.3e, at most %.0e", worst, tolerance);
    }
    if (memcmp(gpu, again, (size_t)n * (size_t)dtype_size_bytes(cpu->dtype)) != 0) {
        failed(name, "other bits in the second run%.0f%.0f", 0.0, 0.0);
    }
    free(gpu);
    free(again);
}

static int64_t row_elements(const struct trio *x)
{
    int64_t count = 1;

    for (int i = 1; i < x->side[0].num_dims; i++) {
        count *= x->side[0].dim[i];
    }
    return count;
}

static double tolerance(const struct trio *x)
{
    return act == DTYPE_BF16 || x->side[0].dtype == DTYPE_BF16 ? 1e-2 : 1e-5;
}

#define CLOSE(x) check_close(#x, &(x), tensor_num_elements(&(x).side[0]), tolerance(&(x)))
#define CLOSE_ROWS(x, rows) check_close(#x, &(x), (rows)*row_elements(&(x)), tolerance(&(x)))
#define KEPT_ROWS(x, rows) check_kept(#x, &(x), (rows)*row_elements(&(x)))
#define SAME(x) check_close(#x, &(x), tensor_num_elements(&(x).side[0]), 0.0)

/* The elements from n on are still the poison that they were. */
static void check_kept(const char *name, const struct trio *x, int64_t n)
{
    const size_t size_bytes = tensor_size_bytes(&x->side[SIDE_GPU]);
    const int64_t end = tensor_num_elements(&x->side[SIDE_GPU]);
    void *gpu = malloc(size_bytes + 1);
    int num_written = 0;

    stream_copy_to_host(streams[SIDE_GPU], gpu, x->side[SIDE_GPU].data, size_bytes);
    for (int64_t i = n; i < end; i++) {
        num_written += !isnan(get(&x->side[SIDE_GPU], gpu, i));
    }
    if (num_written > 0) {
        failed(name, "%.0f elements written that are not in use, of %.0f", num_written,
               (double)(end - n));
    }
    free(gpu);
}

static void check_guards(void)
{
    char host[GUARD_BYTES];

    for (int i = 0; i < num_guards; i++) {
        int num_written = 0;

        stream_copy_to_host(guards[i].stream, host, guards[i].memory, guards[i].size_bytes);
        for (size_t b = 0; b < guards[i].size_bytes; b++) {
            num_written += host[b] != GUARD_BYTE;
        }
        if (num_written > 0) {
            failed("outside of a tensor", "%.0f bytes written, of %.0f", num_written,
                   (double)guards[i].size_bytes);
        }
    }
    num_guards = 0;
}

/* Ends the last check and starts one of this name. */
static void begin(const char *name)
{
    check_guards();
    for (int side = 0; side < NUM_SIDES; side++) {
        stream_wait(streams[side]);
        arena_release(arenas[side], (struct arena_mark){0});
    }
    current = name;
}

/* ---- blocks of the transformer ---- */

static void check_matmul(int64_t m, int64_t n, int64_t k, enum dtype out)
{
    begin("matmul");
    for (int i = 0; i < 4; i++) {
        const bool ta = i & 1, tb = i & 2;
        struct trio a = NORMAL(act, 1.0, ta ? k : m, ta ? m : k);
        struct trio b = NORMAL(act, 1.0, tb ? n : k, tb ? k : n);
        struct trio c = POISON(out, m, n), sum = NORMAL(out, 1.0, m, n), y = POISON(out, m, n);
        struct trio bias = NORMAL(act, 1.0, n);

        BOTH(matmul, matmul, .c = D(c), .a = D(a), .b = D(b), .transpose_a = ta, .transpose_b = tb);
        CLOSE(c);
        BOTH(matmul, matmul, .c = D(sum), .a = D(a), .b = D(b), .transpose_a = ta,
             .transpose_b = tb, .accumulate = true);
        CLOSE(sum);
        BOTH(matmul, matmul, .c = D(y), .a = D(a), .b = D(b), .transpose_a = ta, .transpose_b = tb,
             .bias = D(bias));
        CLOSE(y);
    }
}

static void check_bias(int64_t t, int64_t n)
{
    begin("bias");
    struct trio y = NORMAL(act, 1.0, t, n), bias = NORMAL(act, 1.0, n);
    struct trio d_bias = NORMAL(DTYPE_F32, 1.0, n);

    BOTH(bias_forward, bias_forward, .y = D(y), .bias = D(bias));
    CLOSE(y);
    BOTH(bias_backward, bias_backward, .d_bias = D(d_bias), .d_y = D(y));
    CLOSE(d_bias);
}

static void check_norm(enum norm_kind kind, bool one_plus, bool residual_too, int64_t t, int64_t h)
{
    const bool layernorm = kind == NORM_LAYERNORM;

    begin(layernorm ? "layernorm" : "rmsnorm");
    struct trio x = NORMAL(act, 1.0, t, h), residual = NORMAL(act, 1.0, t, h);
    struct trio weight = NORMAL(act, 1.0, h), bias = NORMAL(act, 1.0, h);
    struct trio y = POISON(act, t, h), sum = POISON(act, t, h), d_x = POISON(act, t, h);
    struct trio mean = POISON(DTYPE_F32, t), inv_std = POISON(DTYPE_F32, t);
    struct trio d_y = NORMAL(act, 1.0, t, h);
    struct trio d_weight = NORMAL(DTYPE_F32, 1.0, h), d_bias = NORMAL(DTYPE_F32, 1.0, h);

    BOTH(norm_forward, norm_forward, .kind = kind, .one_plus = one_plus, .eps = 1e-5f, .y = D(y),
         .inv_std = D(inv_std), .mean = layernorm ? D(mean) : NULL,
         .sum = residual_too ? D(sum) : NULL, .x = D(x),
         .residual = residual_too ? D(residual) : NULL, .weight = D(weight),
         .bias = layernorm ? D(bias) : NULL);
    CLOSE(y);
    CLOSE(inv_std);
    if (residual_too) {
        CLOSE(sum);
    }
    BOTH(norm_backward, norm_backward, .kind = kind, .one_plus = one_plus, .d_x = D(d_x),
         .d_weight = D(d_weight), .d_bias = layernorm ? D(d_bias) : NULL, .d_y = D(d_y),
         .x = residual_too ? D(sum) : D(x), .weight = D(weight), .inv_std = D(inv_std),
         .mean = layernorm ? D(mean) : NULL, .d_residual = residual_too ? D(residual) : NULL);
    CLOSE(d_x);
    CLOSE(d_weight);
    if (layernorm) {
        CLOSE(d_bias);
    }
}

static void check_qkv(int64_t t, int64_t a, int64_t g, int64_t d, int64_t p, bool interleaved)
{
    begin("qkv_split");
    struct trio qkv = NORMAL(act, 1.0, t, (a + 2 * g) * d), back = POISON(act, t, (a + 2 * g) * d);
    struct trio q = POISON(act, t, a, d), k = POISON(act, t, g, d), v = POISON(act, t, g, d);
    struct trio table = NORMAL(DTYPE_F32, 1.0, 50, p > 0 ? p : 1, 2), position = BELOW(50, t);

    BOTH(qkv_split_forward, qkv_split, .q = D(q), .k = D(k), .v = D(v), .qkv = D(qkv),
         .table = p > 0 ? D(table) : NULL, .position = p > 0 ? D(position) : NULL,
         .interleaved = interleaved);
    CLOSE(q);
    CLOSE(k);
    CLOSE(v);
    BOTH(qkv_split_backward, qkv_split, .q = D(q), .k = D(k), .v = D(v), .qkv = D(back),
         .table = p > 0 ? D(table) : NULL, .position = p > 0 ? D(position) : NULL,
         .interleaved = interleaved);
    CLOSE(back);
}

static void check_attention(int64_t s, int64_t s_kv, int64_t b, int64_t a, int64_t g, int64_t d,
                            bool causal, bool documents, float p)
{
    const int64_t per_group = a / g;

    s = reduced(s);
    s_kv = reduced(s_kv);
    if (has_word("tiny")) {
        b = (b + 1) / 2;
        g = (g + 1) / 2;
        a = g * per_group;
    }
    begin(documents ? "attention, documents" : p > 0.0f ? "attention, dropout" : "attention");
    const int64_t kv_length = s_kv - 3 > s ? s_kv - 3 : s, q_start = causal ? kv_length - s : 0;
    const int64_t rows = s_kv > kv_length ? s_kv : kv_length;
    struct trio q = NORMAL(act, 1.0, s, b, a, d), k = NORMAL(act, 1.0, rows, b, g, d);
    struct trio v = NORMAL(act, 1.0, rows, b, g, d), out = POISON(act, s, b, a, d);
    struct trio lse = POISON(DTYPE_F32, b, a, s), d_out = NORMAL(act, 1.0, s, b, a, d);
    struct trio d_q = POISON(act, s, b, a, d), d_k = POISON(act, rows, b, g, d);
    struct trio d_v = POISON(act, rows, b, g, d), sample = ids(b), start = NEW(DTYPE_I32, s * b);

    for (int64_t i = 0; i < s * b; i++) {
        put(&start.side[0], i, (double)((q_start + i / b) / 20 * 20));
    }
    start = spread(start);
#define ATTENTION                                                                                  \
    .scale = 0.2f, .causal = causal, .q_start = q_start, .kv_length = kv_length, .q = D(q),        \
    .k = D(k), .v = D(v), .out = D(out), .lse = D(lse),                                            \
    .document_start = documents ? D(start) : NULL, .dropout = {p, {11, 22}},                       \
    .sample_id = D(sample), .head_start = 2, .num_heads_global = a + 4
    BOTH(attention_forward, attention, ATTENTION);
    CLOSE(out);
    CLOSE(lse);
    BOTH(attention_backward, attention_backward, .forward = {ATTENTION}, .d_out = D(d_out),
         .d_q = D(d_q), .d_k = D(d_k), .d_v = D(d_v));
    CLOSE(d_q);
    CLOSE(d_k);
    CLOSE(d_v);
}

/* Queries [s, 2s) of a sequence against its keys in parts [0, s), all seen, and [s, 2s). */
static void check_attention_parts(int64_t s, int64_t b, int64_t a, int64_t g, int64_t d, float p)
{
    s = reduced(s);
    begin("attention in parts");
    struct trio q = NORMAL(act, 1.0, s, b, a, d), d_out = NORMAL(act, 1.0, s, b, a, d);
    struct trio out = POISON(DTYPE_F32, s, b, a, d), lse = POISON(DTYPE_F32, b, a, s);
    struct trio rounded = POISON(act, s, b, a, d), d_q = NORMAL(DTYPE_F32, 1.0, s, b, a, d);
    struct trio k[2], v[2], d_k[2], d_v[2], sample = ids(b);

#define PART(out_)                                                                                 \
    .scale = 0.2f, .causal = true, .q_start = s, .k_start = part * s, .kv_length = s, .q = D(q),   \
    .k = D(k[part]), .v = D(v[part]), .out = D(out_), .lse = D(lse), .merge = part == 0,           \
    .dropout = {p, {11, 22}}, .sample_id = D(sample), .num_heads_global = a
    for (int part = 1; part >= 0; part--) { /* the part with the diagonal first */
        k[part] = NORMAL(act, 1.0, s, b, g, d);
        v[part] = NORMAL(act, 1.0, s, b, g, d);
        d_k[part] = NORMAL(DTYPE_F32, 1.0, s, b, g, d);
        d_v[part] = NORMAL(DTYPE_F32, 1.0, s, b, g, d);
        BOTH(attention_forward, attention, PART(out));
    }
    CLOSE(out);
    CLOSE(lse);
    BOTH(linear_combination, linear_combination, .y = D(rounded), .x = D(out), .a = 1.0f);
    for (int part = 0; part < 2; part++) {
        BOTH(attention_backward, attention_backward, .forward = {PART(rounded)}, .d_out = D(d_out),
             .d_q = D(d_q), .d_k = D(d_k[part]), .d_v = D(d_v[part]), .accumulate = true);
        CLOSE(d_k[part]);
        CLOSE(d_v[part]);
    }
    CLOSE(d_q);
#undef PART
}

static void check_activation(enum activation_kind kind, int64_t t, int64_t f)
{
    const int64_t width = kind == ACTIVATION_SWIGLU ? 2 * f : f;

    begin("activation");
    struct trio x = NORMAL(act, 2.0, t, width), y = POISON(act, t, f);
    struct trio d_y = NORMAL(act, 1.0, t, f), d_x = POISON(act, t, width);

    BOTH(activation_forward, activation, .kind = kind, .y = D(y), .x = D(x));
    CLOSE(y);
    BOTH(activation_backward, activation, .kind = kind, .d_y = D(d_y), .x = D(x), .d_x = D(d_x));
    CLOSE(d_x);
}

static void check_random(int64_t t, int64_t h)
{
    begin("dropout, jitter, normal");
    struct trio x = NORMAL(act, 1.0, t, h), residual = NORMAL(act, 1.0, t, h), token = ids(t);
    struct trio y = POISON(act, t, h), jittered = POISON(act, t, h);
    struct trio normal = POISON(DTYPE_F32, t, h);
    const struct rng_key key = {3, 4};

    BOTH(dropout, dropout, .y = D(y), .x = D(x), .residual = D(residual), .token_id = D(token),
         .rule = {0.3f, key});
    CLOSE(y);
    BOTH(dropout, dropout, .y = D(y), .x = D(x), .rule = {0.0f, key});
    CLOSE(y);
    BOTH(jitter, jitter, .y = D(jittered), .x = D(x), .token_id = D(token), .eps = 0.1f,
         .key = key);
    CLOSE(jittered);
    BOTH(random_normal, random_normal, .x = D(normal), .token_id = D(token), .key = key);
    CLOSE(normal);
    BOTH(initial_normal, initial_normal, .x = D(y), .key = key, .std = 0.5f,
         .box = {.num_dims = 2, .offset = {5, 3}, .size = {t, h}}, .global_shape = {t + 7, h + 4});
    CLOSE(y);
}

static void check_embedding(int64_t t, int64_t v, int64_t h)
{
    begin("embedding");
    struct trio weight = NORMAL(act, 1.0, v, h), id = BELOW(v * 2, t), y = POISON(act, t, h);
    struct trio sum = NORMAL(act, 1.0, t, h), d_y = NORMAL(act, 1.0, t, h);
    struct trio d_weight = NORMAL(DTYPE_F32, 1.0, v, h);
    const int64_t start = v / 2; /* ids below and above belong to other ranks */

    BOTH(embedding_forward, embedding, .y = D(y), .weight = D(weight), .id = D(id),
         .vocab_start = start);
    CLOSE(y);
    BOTH(embedding_forward, embedding, .y = D(sum), .weight = D(weight), .id = D(id),
         .vocab_start = start, .accumulate = true);
    CLOSE(sum);
    BOTH(embedding_backward, embedding_backward, .d_weight = D(d_weight), .d_y = D(d_y),
         .id = D(id), .vocab_start = start);
    CLOSE(d_weight);
}

static void check_cross_entropy(int64_t t, int64_t v)
{
    begin("cross entropy");
    struct trio logits = NORMAL(act, 3.0, t, v), label = BELOW(v * 2, t),
                d_loss = NORMAL(DTYPE_F32, 1.0, t);
    struct trio max = POISON(DTYPE_F32, t), sum_exp = POISON(DTYPE_F32, t);
    struct trio target = POISON(DTYPE_F32, t), loss = POISON(DTYPE_F32, t);
    struct trio higher = NORMAL(DTYPE_F32, 1.0, t), d_logits = POISON(act, t, v);

    BOTH(cross_entropy_forward, cross_entropy, .max = D(max), .sum_exp = D(sum_exp),
         .target = D(target), .d_logits = D(d_logits), .logits = D(logits), .label = D(label),
         .d_loss = D(d_loss), .vocab_start = v / 2);
    CLOSE(max);
    CLOSE(sum_exp);
    CLOSE(target);
    CLOSE(d_logits);
    BOTH(cross_entropy_forward, cross_entropy, .max = D(max), .sum_exp = D(sum_exp),
         .target = D(target), .logits = D(logits), .label = D(label), .vocab_start = v / 2);
    CLOSE(max);
    CLOSE(sum_exp);
    CLOSE(target);
    BOTH(token_loss, token_loss, .loss = D(loss), .max = D(max), .sum_exp = D(sum_exp),
         .target = D(target));
    CLOSE(loss);
    BOTH(cross_entropy_backward, cross_entropy_backward, .logits = D(logits), .max = D(max),
         .sum_exp = D(sum_exp), .label = D(label), .d_loss = D(d_loss), .vocab_start = v / 2);
    CLOSE(logits);
    BOTH(softmax_rescale, softmax_rescale, .sum_exp = D(sum_exp), .local_max = D(max),
         .max = D(higher));
    CLOSE(sum_exp);
}

static void check_elementwise(int64_t n)
{
    begin("linear_combination, add, zero");
    for (int i = 0; i < 4; i++) {
        const enum dtype from = i & 1 ? DTYPE_BF16 : DTYPE_F32, to = i & 2 ? DTYPE_BF16 : DTYPE_F32;
        struct trio x = NORMAL(from, 1.0, n), y = POISON(to, n), z = NORMAL(to, 1.0, n);

        BOTH(linear_combination, linear_combination, .y = D(y), .x = D(x), .a = 0.5f);
        CLOSE(y);
        BOTH(linear_combination, linear_combination, .y = D(z), .x = D(x), .a = 0.5f, .b = 2.0f);
        CLOSE(z);
    }
    struct trio u = NORMAL(act, 1.0, n), v = NORMAL(act, 1.0, n), w = POISON(act, n);

    BOTH(add, add, .y = D(w), .u = D(u), .v = D(v));
    CLOSE(w);
    for (int side = 0; side < NUM_SIDES; side++) {
        op_fill_zero(streams[side], D(w));
    }
    SAME(w);
}

/* ---- mixture of experts ---- */

static void check_router(const char *name, struct router_rule rule, int64_t t, int64_t e,
                         bool selection_too, bool bias_too)
{
    t = reduced(t);
    begin(name);
    const int64_t k = rule.topk;
    struct trio logits = NORMAL(DTYPE_F32, 2.0, t, e), selection = NORMAL(DTYPE_F32, 1.0, t, e);
    struct trio bias = NORMAL(DTYPE_F32, 0.3, e), probs = POISON(DTYPE_F32, t, k);
    struct trio indices = POISON(DTYPE_I32, t, k), d_probs = NORMAL(DTYPE_F32, 1.0, t, k);
    struct trio d_logits = POISON(DTYPE_F32, t, e);

    BOTH(router_topk_forward, router_topk, .rule = rule, .probs = D(probs), .indices = D(indices),
         .logits = D(logits), .selection = selection_too ? D(selection) : NULL,
         .expert_bias = bias_too ? D(bias) : NULL);
    SAME(indices);
    CLOSE(probs);
    BOTH(router_backward, router_backward, .rule = rule, .d_logits = D(d_logits),
         .d_probs = D(d_probs), .logits = D(logits), .indices = D(indices));
    CLOSE(d_logits);
}

/* All that the logits receive, and their linear layer. With 16 bits of d_logits' fraction, d_weight
 * is within f32's bar in bf16 too. */
static void check_router_backward(enum router_score score, int64_t t, int64_t e, int64_t k,
                                  int64_t h)
{
    begin("router, backward");
    const struct router_rule rule = {.score = score, .topk = (int)k, .scaling_factor = 1.5f};
    struct trio logits = NORMAL(DTYPE_F32, 1.0, t, e), d_logits = POISON(DTYPE_F32, t, e);
    struct trio indices = POISON(DTYPE_I32, t, k), probs = POISON(DTYPE_F32, t, k);
    struct trio d_probs = NORMAL(DTYPE_F32, 1.0, t, k);
    struct trio counts = NORMAL(DTYPE_F32, 9.0, 1, e), parts = NORMAL(DTYPE_F32, 9.0, 2, e);
    struct trio x = NORMAL(act, 1.0, t, h), weight = NORMAL(act, 0.1, e, h);
    struct trio d_x = NORMAL(act, 1.0, t, h), d_x_f32 = NORMAL(DTYPE_F32, 1.0, t, h);
    struct trio d_weight = NORMAL(DTYPE_F32, 1.0, e, h), replaced = POISON(DTYPE_F32, e, h);

    BOTH(router_topk_forward, router_topk, .rule = rule, .probs = D(probs), .indices = D(indices),
         .logits = D(logits));
    BOTH(router_backward, router_backward, .rule = rule, .d_logits = D(d_logits),
         .logits = D(logits), .d_probs = D(d_probs), .indices = D(indices),
         .balance = {{D(counts), 0.02f}, {D(parts), 0.03f}}, .num_balance_terms = 2,
         .z_scale = 0.3f);
    CLOSE(d_logits);
    BOTH(router_linear_backward, router_linear_backward, .d_x = D(d_x), .d_weight = D(d_weight),
         .d_logits = D(d_logits), .x = D(x), .weight = D(weight));
    CLOSE(d_x);
    check_close("d_weight", &d_weight, e * h, 1e-5);
    BOTH(router_linear_backward, router_linear_backward, .d_x = D(d_x_f32), .d_weight = D(replaced),
         .d_logits = D(d_logits), .x = D(x), .weight = D(weight), .overwrite_grads = true);
    check_close("replaced", &replaced, e * h, 1e-5);
    check_close("d_x_f32", &d_x_f32, t * h, 1e-5);
}

static void check_ties(void)
{
    begin("router, ties");
    const int64_t t = 5, e = 70, k = 3;
    struct trio logits = NEW(DTYPE_F32, t, e), probs = POISON(DTYPE_F32, t, k);
    struct trio indices = POISON(DTYPE_I32, t, k);

    for (int64_t i = 0; i < t * e; i++) {
        put(&logits.side[0], i, i / e == 1 ? (double)(i % 2) : 1.0);
    }
    logits = spread(logits);
    BOTH(router_topk_forward, router_topk, .rule = {ROUTER_SOFTMAX, false, false, 3, 0, 0, 1.0f},
         .probs = D(probs), .indices = D(indices), .logits = D(logits));
    SAME(indices);
    CLOSE(probs);
}

static void check_balance(enum router_score score, int64_t t, int64_t e, int64_t c)
{
    t = reduced(t / c) * c;
    begin("balance");
    const int64_t k = 3;
    struct trio logits = NORMAL(DTYPE_F32, 2.0, t, e), indices = BELOW(e, t, k);
    struct trio counts = POISON(DTYPE_F32, c, e), score_sums = POISON(DTYPE_F32, c, e);
    struct trio loss = POISON(DTYPE_F32, 1), d_logits = POISON(DTYPE_F32, t, e);
    struct trio z = POISON(DTYPE_F32, 1), bias = NORMAL(DTYPE_F32, 1.0, e);

    BOTH(router_balance, router_balance, .score = score, .counts = D(counts),
         .score_sums = D(score_sums), .logits = D(logits), .indices = D(indices));
    SAME(counts);
    CLOSE(score_sums);
    BOTH(router_balance_loss, router_balance_loss, .loss = D(loss), .counts = D(counts),
         .score_sums = D(score_sums), .factor = 0.01f);
    CLOSE(loss);
    BOTH(router_backward, router_backward, .rule = {.score = score, .topk = (int)k},
         .d_logits = D(d_logits), .logits = D(logits), .balance = {{D(counts), 0.02f}},
         .num_balance_terms = 1);
    CLOSE(d_logits);
    BOTH(router_z_loss, router_z_loss, .loss = D(z), .logits = D(logits), .factor = 0.1f);
    CLOSE(z);
    if (c == 1) {
        struct trio total = counts;

        for (int side = 0; side < NUM_SIDES; side++) {
            total.side[side] = tensor_view(&counts.side[side], e);
        }
        BOTH(expert_bias_update, expert_bias_update, .bias = D(bias), .counts = D(total),
             .rate = 0.01f);
        CLOSE(bias);
    }
}

static void check_sinkhorn(int64_t t, int64_t e)
{
    t = reduced(t);
    begin("sinkhorn");
    struct trio logits = NORMAL(DTYPE_F32, 1.0, t, e), assignment = POISON(DTYPE_F32, t, e);

    BOTH(router_sinkhorn, router_sinkhorn, .assignment = D(assignment), .logits = D(logits),
         .tolerance = 1e-4f, .max_iterations = 100);
    CLOSE(assignment);
}

/* Distinct experts of each token, drawn as the router does. skew: added to the logits of expert 0.
 */
static struct trio routed(int64_t t, int64_t e, int64_t k, double skew, struct trio *probs)
{
    struct trio logits = NORMAL(DTYPE_F32, 1.0, t, e), indices = POISON(DTYPE_I32, t, k);

    for (int64_t i = 0; i < t; i++) {
        put(&logits.side[0], i * e, get(&logits.side[0], logits.side[0].data, i * e) + skew);
        put(&logits.side[0], i * e + e - 1, -1e9); /* the last expert gets no token */
    }
    logits = spread(logits);
    *probs = POISON(DTYPE_F32, t, k);
    BOTH(router_topk_forward, router_topk,
         .rule = {ROUTER_SOFTMAX, false, false, (int)k, 0, 0, 1.0f}, .probs = D(*probs),
         .indices = D(indices), .logits = D(logits));
    return indices;
}

static struct trio rows_of(const struct trio *x, int64_t count)
{
    struct trio rows;

    for (int side = 0; side < NUM_SIDES; side++) {
        rows.side[side] = tensor_rows(&x->side[side], 0, count);
    }
    return rows;
}

static void check_permutation(int64_t t, int64_t e, int64_t k, int64_t h, double skew,
                              int64_t capacity, bool pad, enum drop_policy policy)
{
    t = reduced(t);
    capacity = reduced(capacity);
    begin(capacity > 0 ? "permutation, capacity" : "permutation");
    struct trio probs, indices = routed(t, e, k, skew, &probs);
    const int64_t num_rows = pad ? e * capacity : t * k;
    struct trio row_of = POISON(DTYPE_I32, t, k), row_token = BELOW(1, num_rows);
    struct trio row_prob = NORMAL(DTYPE_F32, 0.0, num_rows), offsets = POISON(DTYPE_I32, e + 1);
    struct trio x = NORMAL(act, 1.0, t, h), rows = NORMAL(act, 0.0, num_rows, h);
    struct trio y = POISON(act, t, h), sum = NORMAL(act, 1.0, t, h);
    struct trio copies = NORMAL(act, 0.0, num_rows, h);
    struct trio d_probs = POISON(DTYPE_F32, t, k), d_row_prob = NORMAL(DTYPE_F32, 1.0, num_rows);

    if (capacity > 0) {
        BOTH(router_drop, router_drop, .probs = D(probs), .indices = D(indices),
             .num_experts = (int)e, .capacity = capacity, .policy = policy);
        SAME(indices);
        CLOSE(probs);
    }
    BOTH(permutation, permutation, .row_of = D(row_of), .row_token = D(row_token),
         .row_prob = D(row_prob), .offsets = D(offsets), .indices = D(indices), .probs = D(probs),
         .padded_capacity = pad ? capacity : 0);
    SAME(row_of);
    SAME(row_token);
    CLOSE(row_prob);
    SAME(offsets);
    BOTH(slot_gather, slot_gather, .d_probs = D(d_probs), .d_row_prob = D(d_row_prob),
         .row_of = D(row_of));
    CLOSE(d_probs);
    BOTH(row_gather, row_gather, .y = D(rows), .x = D(x), .index = D(row_token),
         .offsets = D(offsets));
    SAME(rows);
    BOTH(row_gather, row_gather, .y = D(copies), .x = D(x), .index = D(row_token),
         .offsets = D(offsets), .token_rows = pad ? NULL : D(row_of));
    SAME(copies);
    BOTH(row_sum, row_sum, .y = D(y), .rows = D(rows), .row_of = D(row_of));
    CLOSE(y);
    BOTH(row_sum, row_sum, .y = D(y), .rows = D(rows), .row_of = D(row_of), .residual = D(sum));
    CLOSE(y);
    BOTH(row_sum, row_sum, .y = D(sum), .rows = D(rows), .row_of = D(row_of), .residual = D(sum));
    CLOSE(sum);
}

struct experts_case {
    int64_t t, e, k, h, f;
    double skew;
    enum activation_kind kind;
    bool gather, biases, no_probs;
    bool all_used; /* no rows beyond offsets[E] */
};

static void check_experts(const char *name, struct experts_case c)
{
    c.t = reduced(c.t);
    c.h = reduced(c.h);
    c.f = reduced(c.f);
    begin(name);
    const int64_t f1 = c.kind == ACTIVATION_SWIGLU ? 2 * c.f : c.f, num_used = c.t * c.k;
    const int64_t num_rows = num_used + (c.all_used ? 0 : 37); /* the others hold poison */
    const double scale1 = 1.0 / sqrt((double)c.h), scale2 = 1.0 / sqrt((double)c.f);
    struct trio probs, indices = routed(c.t, c.e, c.k, c.skew, &probs);
    struct trio row_of = POISON(DTYPE_I32, c.t, c.k), row_token = POISON(DTYPE_I32, num_rows);
    struct trio row_prob = POISON(DTYPE_F32, num_rows), offsets = POISON(DTYPE_I32, c.e + 1);
    struct trio tokens = NORMAL(act, 1.0, c.t, c.h), rows = POISON(act, num_rows, c.h);
    struct trio d_tokens = NORMAL(act, 1.0, c.t, c.h), d_rows = POISON(act, num_rows, c.h);
    struct trio fc1 = NORMAL(act, scale1, c.e, f1, c.h), fc2 = NORMAL(act, scale2, c.e, c.h, c.f);
    struct trio b1 = NORMAL(act, 1.0, c.e, f1), b2 = NORMAL(act, 1.0, c.e, c.h);
    struct trio y = POISON(act, num_rows, c.h), h = POISON(act, num_rows, f1);
    struct trio d_x = POISON(act, num_rows, c.h), d_row_prob = POISON(DTYPE_F32, num_rows);
    struct trio d_fc1 = NORMAL(DTYPE_F32, 1.0, c.e, f1, c.h);
    struct trio d_fc2 = NORMAL(DTYPE_F32, 1.0, c.e, c.h, c.f);
    struct trio d_b1 = NORMAL(DTYPE_F32, 1.0, c.e, f1), d_b2 = NORMAL(DTYPE_F32, 1.0, c.e, c.h);
    struct trio first_d_fc1 = POISON(DTYPE_F32, c.e, f1, c.h);
    struct trio first_d_fc2 = POISON(DTYPE_F32, c.e, c.h, c.f);

    struct trio used_token = rows_of(&row_token, num_used),
                used_prob = rows_of(&row_prob, num_used);

    BOTH(permutation, permutation, .row_of = D(row_of), .row_token = D(used_token),
         .row_prob = D(used_prob), .offsets = D(offsets), .indices = D(indices), .probs = D(probs));
    BOTH(row_gather, row_gather, .y = D(rows), .x = D(tokens), .index = D(row_token),
         .offsets = D(offsets));
    BOTH(row_gather, row_gather, .y = D(d_rows), .x = D(d_tokens), .index = D(row_token),
         .offsets = D(offsets), .token_rows = D(row_of));
#define EXPERTS                                                                                    \
    .activation = c.kind, .y = D(y), .pre_activation = D(h), .x = c.gather ? D(tokens) : D(rows),  \
    .row_token = c.gather ? D(row_token) : NULL,                                                   \
    .token_rows = c.gather && !c.biases ? D(row_of) : NULL, .offsets = D(offsets),                 \
    .row_prob = c.no_probs ? NULL : D(row_prob), .fc1 = D(fc1), .fc2 = D(fc2),                     \
    .fc1_bias = c.biases ? D(b1) : NULL, .fc2_bias = c.biases ? D(b2) : NULL
    BOTH(experts_forward, experts_forward, EXPERTS);
    CLOSE_ROWS(h, num_used);
    CLOSE_ROWS(y, num_used);
    KEPT_ROWS(h, num_used);
    KEPT_ROWS(y, num_used);
#define EXPERTS_BACKWARD                                                                           \
    .forward = {EXPERTS}, .d_y = c.gather ? D(d_tokens) : D(d_rows),                               \
    .d_y_row_token = c.gather ? D(row_token) : NULL, .d_x = D(d_x),                                \
    .d_row_prob = c.no_probs ? NULL : D(d_row_prob), .d_fc1_bias = c.biases ? D(d_b1) : NULL,      \
    .d_fc2_bias = c.biases ? D(d_b2) : NULL
    BOTH(experts_backward, experts_backward, EXPERTS_BACKWARD, .d_fc1 = D(d_fc1),
         .d_fc2 = D(d_fc2));
    BOTH(experts_backward, experts_backward, EXPERTS_BACKWARD, .d_fc1 = D(first_d_fc1),
         .d_fc2 = D(first_d_fc2), .overwrite_grads = true);
    CLOSE_ROWS(d_x, num_used);
    KEPT_ROWS(d_x, num_used);
    if (!c.no_probs) {
        CLOSE_ROWS(d_row_prob, num_used);
    }
    CLOSE(d_fc1);
    CLOSE(d_fc2);
    CLOSE(first_d_fc1);
    CLOSE(first_d_fc2);
    if (c.biases) {
        CLOSE(d_b1);
        CLOSE(d_b2);
    }
}

/* ---- optimizer ---- */

static void check_optimizer(int64_t n)
{
    begin("optimizer");
    struct trio param = POISON(act, n), master = NORMAL(DTYPE_F32, 1.0, n);
    struct trio exp_avg = NORMAL(DTYPE_F32, 0.1, n), exp_avg_sq = NEW(DTYPE_F32, n);
    struct trio grad = NORMAL(DTYPE_F32, 1.0, n), scale = NORMAL(DTYPE_F32, 1.0, 1);
    struct trio momentum = NORMAL(DTYPE_F32, 1.0, n), sum = NORMAL(DTYPE_F64, 1.0, 1);
    struct trio zeros = NEW(DTYPE_F64, 1), sparse = BELOW(3, n), values = NEW(act, n);
    struct trio norm = POISON(DTYPE_F32, 1), factor = POISON(DTYPE_F32, 1);

    for (int64_t i = 0; i < n; i++) {
        put(&exp_avg_sq.side[0], i, 0.01 + (double)(i % 7));
        put(&values.side[0], i, get(&sparse.side[0], sparse.side[0].data, i));
    }
    put(&zeros.side[0], 0, 3.0);
    put(&sum.side[0], 0, 2.0);
    exp_avg_sq = spread(exp_avg_sq);
    values = spread(values);
    zeros = spread(zeros);
    sum = spread(sum);
    BOTH(adam_step, adam_step, .param = D(param), .master = D(master), .exp_avg = D(exp_avg),
         .exp_avg_sq = D(exp_avg_sq), .grad = D(grad), .grad_scale = D(scale), .lr = 0.01f,
         .beta1 = 0.9f, .beta2 = 0.95f, .eps = 1e-8f, .weight_decay = 0.1f, .step = 3);
    CLOSE(master);
    CLOSE(param);
    CLOSE(exp_avg);
    CLOSE(exp_avg_sq);
    BOTH(sgd_step, sgd_step, .param = D(param), .master = D(master), .momentum_buffer = D(momentum),
         .grad = D(grad), .grad_scale = D(scale), .lr = 0.01f, .momentum = 0.9f,
         .weight_decay = 0.1f);
    CLOSE(master);
    CLOSE(momentum);
    BOTH(square_sum, square_sum, .sum = D(sum), .x = D(values));
    CLOSE(sum);
    BOTH(zero_count, zero_count, .count = D(zeros), .x = D(values));
    SAME(zeros);
    BOTH(clip_scale, clip_scale, .norm = D(norm), .scale = D(factor), .sum = D(sum),
         .max_norm = 1.0f);
    CLOSE(norm);
    CLOSE(factor);
}

/* f32 parameters are their own masters; SGD without momentum, and momentum's first step. */
static void check_plain_optimizer(int64_t n)
{
    begin("optimizer, f32 parameters");
    struct trio param = NORMAL(DTYPE_F32, 1.0, n), exp_avg = NORMAL(DTYPE_F32, 0.0, n);
    struct trio exp_avg_sq = NORMAL(DTYPE_F32, 0.0, n), momentum = POISON(DTYPE_F32, n);
    struct trio grad = NORMAL(DTYPE_F32, 1.0, n), scale = NORMAL(DTYPE_F32, 1.0, 1);

    BOTH(adam_step, adam_step, .param = D(param), .master = D(param), .exp_avg = D(exp_avg),
         .exp_avg_sq = D(exp_avg_sq), .grad = D(grad), .grad_scale = D(scale), .lr = 0.01f,
         .beta1 = 0.9f, .beta2 = 0.999f, .eps = 1e-8f, .weight_decay = 0.0f, .step = 1);
    CLOSE(param);
    CLOSE(exp_avg_sq);
    BOTH(sgd_step, sgd_step, .param = D(param), .master = D(param), .grad = D(grad),
         .grad_scale = D(scale), .lr = 0.01f, .weight_decay = 0.1f);
    CLOSE(param);
    BOTH(sgd_step, sgd_step, .param = D(param), .master = D(param), .momentum_buffer = D(momentum),
         .grad = D(grad), .grad_scale = D(scale), .lr = 0.01f, .momentum = 0.9f,
         .weight_decay = 0.1f, .first_step = true);
    CLOSE(param);
    CLOSE(momentum);
}

static void check_attentions(void)
{
    check_attention(70, 70, 2, 4, 2, 64, true, false, 0.0f);
    check_attention(45, 101, 2, 3, 1, 33, true, false, 0.0f);
    check_attention(45, 101, 2, 4, 4, 128, false, false, 0.0f);
    check_attention(90, 90, 2, 4, 2, 80, true, true, 0.2f);
    check_attention(40, 40, 1, 2, 2, 200, true, false, 0.0f);
    check_attention(128, 128, 3, 8, 2, 64, true, false, 0.0f);
    check_attention(200, 200, 2, 4, 4, 128, true, false, 0.0f);
    check_attention(100, 163, 2, 4, 1, 128, true, false, 0.0f);
    check_attention(100, 133, 2, 6, 2, 80, false, false, 0.0f);
    check_attention(67, 67, 1, 2, 1, 8, true, false, 0.0f);
    check_attention(45, 101, 2, 6, 2, 64, true, false, 0.0f);
    /* A token after those in a cache; a part of a prompt, in a shape for cuDNN. */
    check_attention(1, 77, 1, 4, 2, 64, true, false, 0.0f);
    check_attention(1, 131, 3, 4, 4, 128, true, false, 0.0f);
    check_attention(64, 131, 2, 4, 2, 64, true, false, 0.0f);
    check_attention(128, 259, 1, 4, 1, 128, true, false, 0.0f);
    check_attention(128, 259, 2, 4, 4, 80, false, false, 0.0f);
    check_attention(150, 150, 2, 4, 2, 128, true, true, 0.0f);
    check_attention(130, 130, 2, 4, 1, 64, true, false, 0.3f);
    check_attention_parts(75, 2, 4, 2, 64, 0.0f);
    check_attention_parts(33, 2, 3, 1, 40, 0.0f);
    check_attention_parts(33, 2, 3, 1, 40, 0.2f); /* its second part begins at no multiple of 4 */
    check_attention_parts(33, 2, 3, 1, 33, 0.0f);
    check_attention_parts(33, 1, 2, 2, 200, 0.0f);
    check_attention_parts(128, 2, 4, 2, 64, 0.0f); /* cuDNN */
    /* More scores than cuDNN's backward pass is given at a time. */
    if (act == DTYPE_BF16 && !has_word("small") && !has_word("tiny")) {
        check_attention(2304, 2304, 3, 48, 4, 64, true, false, 0.0f);
        check_attention(2304, 2304, 2, 64, 2, 64, true, false, 0.0f);
    }
}

static void check_dense(void)
{
    check_matmul(37, 53, 29, act);
    check_matmul(128, 256, 64, act);
    check_matmul(1, 128, 96, act);
    check_matmul(64, 96, 128, DTYPE_F32);
    check_matmul(37, 53, 29, DTYPE_F32);
    check_matmul(0, 64, 32, act);
    check_matmul(24, 16, 0, DTYPE_F32);
    check_bias(300, 77);
    check_bias(300, 512);
    check_bias(0, 64);
    for (int i = 0; i < 8; i++) {
        check_norm(i & 1 ? NORM_LAYERNORM : NORM_RMSNORM, i & 2, i & 4, 600, i & 1 ? 1000 : 333);
    }
    check_norm(NORM_RMSNORM, false, true, 70, 4096);
    check_norm(NORM_RMSNORM, true, true, 700, 2048); /* more rows than blocks */
    check_norm(NORM_RMSNORM, false, false, 37, 1032);
    check_norm(NORM_RMSNORM, true, false, 700, 5000);
    check_norm(NORM_RMSNORM, false, true, 3, 12288);
    check_norm(NORM_LAYERNORM, false, true, 5, 7);
    check_norm(NORM_RMSNORM, false, true, 0, 64);
    check_qkv(33, 6, 2, 64, 32, false);
    check_qkv(33, 6, 3, 64, 16, false);
    check_qkv(33, 4, 4, 30, 15, true);
    check_qkv(33, 4, 1, 7, 0, false);
    check_qkv(0, 4, 2, 64, 32, false);
    for (int kind = 0; kind < 3; kind++) {
        check_activation((enum activation_kind)kind, 33, 77);
        check_activation((enum activation_kind)kind, 33, 128);
        check_activation((enum activation_kind)kind, 0, 128);
    }
    check_random(40, 77);
    check_random(40, 128);
    check_random(0, 128);
    check_embedding(500, 40, 77);
    check_embedding(500, 40, 128);
    check_embedding(3000, 2, 33);
    check_embedding(0, 40, 64);
    check_cross_entropy(40, 999);
    check_cross_entropy(40, 4096);
    check_cross_entropy(40, 32000);
    check_cross_entropy(3, 65536);
    check_cross_entropy(3, 50257);
    check_cross_entropy(0, 128);
    check_elementwise(4096);
    check_elementwise(4097);
    check_elementwise(1);
    check_elementwise(0);
    check_optimizer(70000);
    check_optimizer(70001);
    check_optimizer(1);
    check_plain_optimizer(70001);
}

static void check_routers(void)
{
    check_router("router, softmax", (struct router_rule){.topk = 2, .scaling_factor = 1.0f}, 100, 8,
                 false, false);
    check_router("router, pre-softmax",
                 (struct router_rule){.pre_softmax = true, .topk = 8, .scaling_factor = 2.5f}, 100,
                 130, false, true);
    check_router("router, renormalised",
                 (struct router_rule){
                     .pre_softmax = true, .renormalize = true, .topk = 4, .scaling_factor = 1.0f},
                 100, 64, false, false);
    check_router("router, sigmoid and groups",
                 (struct router_rule){.score = ROUTER_SIGMOID,
                                      .topk = 8,
                                      .num_groups = 8,
                                      .group_topk = 4,
                                      .scaling_factor = 2.5f},
                 100, 256, false, true);
    check_router("router, sigmoid top-1",
                 (struct router_rule){.score = ROUTER_SIGMOID, .topk = 1, .scaling_factor = 1.0f},
                 100, 33, false, false);
    check_router("router, more than 256 experts",
                 (struct router_rule){.topk = 40, .scaling_factor = 1.0f}, 50, 300, false, true);
    check_router("router, selection", (struct router_rule){.topk = 2, .scaling_factor = 1.0f}, 100,
                 40, true, false);
    check_ties();
    check_balance(ROUTER_SOFTMAX, 900, 40, 1);
    check_balance(ROUTER_SIGMOID, 900, 130, 3);
    check_router_backward(ROUTER_SOFTMAX, 1000, 8, 2, 264);
    check_router_backward(ROUTER_SIGMOID, 334, 130, 6, 77);
    check_router_backward(ROUTER_SOFTMAX, 62, 5, 1, 33);
    check_router_backward(ROUTER_SOFTMAX, 0, 8, 2, 64);
    check_sinkhorn(1000, 8);
    check_sinkhorn(37, 70);
    check_permutation(1000, 8, 2, 64, 0.0, 0, false, DROP_BY_PROBS);
    check_permutation(1000, 8, 1, 40, 50.0, 0, false, DROP_BY_PROBS); /* one takes all */
    check_permutation(1, 5, 4, 33, 0.0, 0, false, DROP_BY_PROBS);
    check_permutation(0, 8, 2, 64, 0.0, 0, false, DROP_BY_PROBS);
    check_permutation(333, 130, 8, 77, 3.0, 0, false, DROP_BY_PROBS);
    check_permutation(500, 8, 2, 64, 2.0, 100, false, DROP_BY_PROBS);
    check_permutation(500, 8, 2, 64, 2.0, 150, true, DROP_BY_POSITION);
}

/* More blocks of the inner dimension than a ring of them has slots; rows that are copied beside d_x
 * in two pieces. */
static void check_experts_of_long_rows(void)
{
    check_experts("experts, deep", (struct experts_case){170, 3, 2, 1288, 1096, 0.5,
                                                         ACTIVATION_SWIGLU, true, false, false});
    check_experts(
        "experts, rows of two pieces",
        (struct experts_case){60, 4, 2, 2312, 456, 0.5, ACTIVATION_SWIGLU, true, false, false});
}

/* Cases that become a gather of rows of 1024, the least there is, and wide tiles. */
static void check_experts_tiny_on_purpose(void)
{
    const int64_t t = tiny_origin(36), long_row = tiny_origin(1024), wide = tiny_origin(128);

    check_experts("experts, gather in narrow tiles",
                  (struct experts_case){t, 3, 2, long_row, tiny_origin(40), 0.5, ACTIVATION_SWIGLU,
                                        true, false, false});
    check_experts("experts, gather in wide tiles",
                  (struct experts_case){t, 70, 2, long_row, wide, 0.5, ACTIVATION_SWIGLU, true,
                                        false, false});
    check_experts("experts, wide tiles of few columns",
                  (struct experts_case){t, 70, 2, tiny_origin(64), wide, 0.5, ACTIVATION_SWIGLU,
                                        false, false, false});
}

/* Enough tiles for wide ones (grouped_tiles.h). */
static void check_experts_of_wide_tiles(void)
{
    if (has_word("tiny")) {
        check_experts_tiny_on_purpose();
    } else {
        check_experts("experts, wide tiles",
                      (struct experts_case){700, 70, 2, 1024, 768, 0.0, ACTIVATION_SWIGLU, true,
                                            false, false});
    }
    check_experts(
        "experts, wide tiles over the edge",
        (struct experts_case){700, 70, 2, 760, 760, 0.5, ACTIVATION_SWIGLU, false, false, false});
}

static void check_experts_of_sizes(void)
{
    check_experts(
        "experts, plain sizes",
        (struct experts_case){200, 5, 2, 72, 40, 0.0, ACTIVATION_SWIGLU, false, false, false});
    check_experts(
        "experts, odd sizes",
        (struct experts_case){100, 5, 2, 33, 17, 1.0, ACTIVATION_SWIGLU, true, false, false});
    check_experts(
        "experts, GELU and biases",
        (struct experts_case){100, 4, 2, 48, 64, 0.0, ACTIVATION_GELU, true, true, false});
    check_experts(
        "experts, biases of SwiGLU",
        (struct experts_case){100, 4, 2, 48, 64, 0.0, ACTIVATION_SWIGLU, true, true, false});
    check_experts(
        "experts, many tiles",
        (struct experts_case){900, 6, 2, 520, 392, 0.5, ACTIVATION_SWIGLU, true, false, false});
    check_experts(
        "experts, many tiles of rows",
        (struct experts_case){900, 6, 2, 392, 520, 0.5, ACTIVATION_SWIGLU, false, false, false});
    if (act == DTYPE_BF16 || !has_word("tiny")) {
        check_experts_of_long_rows();
    }
    if (act == DTYPE_BF16) {
        check_experts_of_wide_tiles();
    }
}

static void check_experts_of_routings(void)
{
    check_experts(
        "experts, one takes all",
        (struct experts_case){700, 4, 1, 256, 256, 50.0, ACTIVATION_SWIGLU, true, false, true});
    check_experts(
        "experts, one takes all in odd sizes",
        (struct experts_case){301, 4, 1, 129, 65, 50.0, ACTIVATION_SWIGLU, false, false, false});
    check_experts(
        "experts, most of them empty",
        (struct experts_case){5, 40, 2, 128, 136, 0.0, ACTIVATION_SWIGLU, true, false, false});
    check_experts(
        "experts, more than a launch takes",
        (struct experts_case){70, 200, 2, 72, 40, 0.0, ACTIVATION_SWIGLU, true, false, false});
    check_experts("experts, squared ReLU",
                  (struct experts_case){200, 5, 2, 128, 64, 1.0, ACTIVATION_SQUARED_RELU, false,
                                        false, false});
    check_experts("experts, all rows in use",
                  (struct experts_case){256, 4, 2, 128, 192, 0.0, ACTIVATION_SWIGLU, true, false,
                                        false, true});
    check_experts(
        "experts, no row in use",
        (struct experts_case){0, 3, 2, 64, 64, 0.0, ACTIVATION_SWIGLU, false, false, false, false});
    check_experts(
        "experts without rows",
        (struct experts_case){0, 3, 2, 64, 64, 0.0, ACTIVATION_SWIGLU, false, false, false, true});
}

static void check_moe(void)
{
    check_routers();
    check_experts_of_sizes();
    check_experts_of_routings();
}

/* Reads that are finished later have what the memory held when they were started. */
static void check_reads(void)
{
    enum { COUNT = 40000 };
    struct stream *stream = streams[SIDE_GPU];
    struct tensor x = tensor_new(arenas[SIDE_GPU], DTYPE_F32, COUNT);
    float *host = calloc(COUNT, sizeof *host);
    void *reads[5];
    int num_wrong = 0;

    for (int i = 0; i < 5; i++) {
        for (int j = 0; j < COUNT; j++) {
            host[j] = (float)(i * COUNT + j);
        }
        stream_copy_from_host(stream, x.data, host, COUNT * sizeof *host);
        reads[i] = stream_read_start(stream, x.data, COUNT * sizeof *host);
    }
    for (int i = 4; i >= 0; i--) {
        stream_read_finish(stream, reads[i], host);
        for (int j = 0; j < COUNT; j++) {
            num_wrong += host[j] != (float)(i * COUNT + j);
        }
    }
    current = "reads";
    num_checks++;
    if (num_wrong > 0) {
        failed("bytes", "%.0f wrong%.0f", num_wrong, 0.0);
    }
    free(host);
}

/* The heads of an attention begin on 16 bytes wherever they are of cadre's making. */
static void check_all(void)
{
    if (is_wanted("attention", "dense", "moe") && !has_word("shifted")) {
        check_attentions();
    }
    for (shift = has_word("shifted"); shift < (has_word("aligned") ? 1 : 2); shift++) {
        if (is_wanted("dense", "attention", "moe")) {
            check_dense();
        }
        if (is_wanted("moe", "attention", "dense")) {
            check_moe();
        }
    }
    begin("end");
    shift = 0;
}

int main(int argc, char **argv)
{
    const struct device *gpu = device_cuda(0);
    const char *text = getenv("CADRE_TEST_SEED");
    const uint64_t seed = text != NULL ? strtoull(text, NULL, 10) : (uint64_t)time(NULL);

    if (gpu == NULL || ops_cuda() == NULL) {
        fprintf(stderr, "check_ops: %s\n", error_text());
        return 77;
    }
    setvbuf(stdout, NULL, _IOLBF, 0); /* a run that is stopped has told how far it came */
    words = argv + 1;
    num_words = argc - 1;
    if (has_word("shared")) {
        device_cuda_share_multiprocessors();
    }
    printf("CADRE_TEST_SEED=%llu\n", (unsigned long long)seed);
    test_key = rng_key(seed, "gpu test", 0);
    for (int side = 0; side < NUM_SIDES; side++) {
        const struct device *device = side == SIDE_CPU ? device_cpu() : gpu;

        streams[side] = stream_create(device, side == SIDE_CPU ? ops_cpu() : ops_cuda());
        arenas[side] = arena_create("check", &device->memory);
    }
    check_reads();
    for (int pass = 0; pass < 2; pass++) {
        act = pass == 0 ? DTYPE_F32 : DTYPE_BF16;
        if (!has_word(dtype_name(pass == 0 ? DTYPE_BF16 : DTYPE_F32))) {
            check_all();
        }
    }
    printf("\n%d results compared, %d failed\n", num_checks, num_failures);
    for (int i = 0; i < num_failures && i < 64; i++) {
        printf("FAILED %s\n", failures[i]);
    }
    return num_failures > 0;
}
