/* Matrix products by oneDNN 2.x or 3.x; this file alone knows the difference. (dnnl_memory_desc_t
 * is a struct in 2.x and a pointer in 3.x.)
 *
 * A oneDNN primitive is machine code generated for one shape, which takes 0.1 to 0.3 ms: as long as
 * a small product. So primitives are kept, by shape; there are many, since the experts' row counts
 * change with every microbatch. oneDNN has a cache of its own, but asking it costs the shape's
 * whole analysis; it is switched off so that no code is held twice. */
#ifdef CADRE_ONEDNN
#include <oneapi/dnnl/dnnl.h>
#include <pthread.h>
#include <stdlib.h>

#include "base/check.h"
#include "ops/matmul_library_cpu.h"
#include "ops/ops_cpu_internal.h"

enum { CACHE_SETS = 64, CACHE_WAYS = 8 }; /* up to 512 primitives of 50 to 100 KB */

#define DNNL_CHECK(call)                                                                           \
    do {                                                                                           \
        const dnnl_status_t status_ = (call);                                                      \
        CHECK(status_ == dnnl_success, "oneDNN status %d", (int)status_);                          \
    } while (0)

struct matmul_key {
    int64_t m, n, k;
    int64_t flags; /* transposes, accumulate, bias, dtypes, threads */
};

struct matmul_primitive {
    struct matmul_key key;
    dnnl_primitive_t primitive; /* NULL: free entry */
    dnnl_memory_desc_t a, b, c, bias, scratch;
    size_t scratch_bytes;
    int num_users;     /* running now; such an entry stays */
    uint64_t last_use; /* for eviction: the least recently used of a set */
};

static struct {
    pthread_once_t once;
    pthread_mutex_t lock;
    dnnl_engine_t engine;
    struct matmul_primitive entries[CACHE_SETS][CACHE_WAYS];
    uint64_t clock;
} cache = {.once = PTHREAD_ONCE_INIT, .lock = PTHREAD_MUTEX_INITIALIZER};

static void create_engine(void)
{
    DNNL_CHECK(dnnl_set_primitive_cache_capacity(0));
    DNNL_CHECK(dnnl_engine_create(&cache.engine, dnnl_cpu, 0));
}

static dnnl_data_type_t data_type(enum dtype dtype)
{
    return dtype == DTYPE_BF16 ? dnnl_bf16 : dnnl_f32;
}

/* rows x columns in memory of `stride` elements a row, or the transposed of columns x rows. */
static dnnl_memory_desc_t create_desc(int64_t rows, int64_t columns, bool transposed,
                                      enum dtype dtype)
{
    dnnl_dims_t dims = {rows, columns}, strides = {columns, 1};
    dnnl_memory_desc_t desc;

    if (transposed) {
        strides[0] = 1;
        strides[1] = rows;
    }
#if DNNL_VERSION_MAJOR >= 3
    DNNL_CHECK(dnnl_memory_desc_create_with_strides(&desc, 2, dims, data_type(dtype), strides));
#else
    DNNL_CHECK(dnnl_memory_desc_init_by_strides(&desc, 2, dims, data_type(dtype), strides));
#endif
    return desc;
}

static void destroy_desc(dnnl_memory_desc_t desc)
{
#if DNNL_VERSION_MAJOR >= 3
    dnnl_memory_desc_destroy(desc);
#endif
}

static dnnl_primitive_attr_t create_attr(const struct matmul *a)
{
    dnnl_primitive_attr_t attr;

    DNNL_CHECK(dnnl_primitive_attr_create(&attr));
    DNNL_CHECK(dnnl_primitive_attr_set_scratchpad_mode(attr, dnnl_scratchpad_mode_user));
    if (a->accumulate) {
        dnnl_post_ops_t post_ops;

        DNNL_CHECK(dnnl_post_ops_create(&post_ops));
#if DNNL_VERSION_MAJOR >= 3
        DNNL_CHECK(dnnl_post_ops_append_sum(post_ops, 1.0f, 0, dnnl_data_type_undef));
#else
        DNNL_CHECK(dnnl_post_ops_append_sum(post_ops, 1.0f));
#endif
        DNNL_CHECK(dnnl_primitive_attr_set_post_ops(attr, post_ops));
        DNNL_CHECK(dnnl_post_ops_destroy(post_ops));
    }
    return attr;
}

static dnnl_primitive_desc_t create_primitive_desc(const struct matmul_primitive *p, bool has_bias,
                                                   dnnl_primitive_attr_t attr)
{
    dnnl_primitive_desc_t desc;
#if DNNL_VERSION_MAJOR >= 3
    DNNL_CHECK(dnnl_matmul_primitive_desc_create(&desc, cache.engine, p->a, p->b,
                                                 has_bias ? p->bias : NULL, p->c, attr));
#else
    dnnl_matmul_desc_t matmul;

    DNNL_CHECK(dnnl_matmul_desc_init(&matmul, &p->a, &p->b, has_bias ? &p->bias : NULL, &p->c));
    DNNL_CHECK(dnnl_primitive_desc_create(&desc, &matmul, attr, cache.engine, NULL));
#endif
    return desc;
}

static void create_primitive(struct matmul_primitive *p, const struct matmul_key *key,
                             const struct matmul *a)
{
    const dnnl_primitive_attr_t attr = create_attr(a);
    dnnl_primitive_desc_t desc;

    p->key = *key;
    p->a = create_desc(key->m, key->k, a->transpose_a, a->a->dtype);
    p->b = create_desc(key->k, key->n, a->transpose_b, a->b->dtype);
    p->c = create_desc(key->m, key->n, false, a->c->dtype);
    p->bias = create_desc(1, key->n, false, a->a->dtype);
    desc = create_primitive_desc(p, a->bias != NULL, attr);
#if DNNL_VERSION_MAJOR >= 3
    DNNL_CHECK(dnnl_memory_desc_clone(
        &p->scratch, dnnl_primitive_desc_query_md(desc, dnnl_query_scratchpad_md, 0)));
    p->scratch_bytes = dnnl_memory_desc_get_size(p->scratch);
#else
    p->scratch = *dnnl_primitive_desc_query_md(desc, dnnl_query_scratchpad_md, 0);
    p->scratch_bytes = dnnl_memory_desc_get_size(&p->scratch);
#endif
    DNNL_CHECK(dnnl_primitive_create(&p->primitive, desc));
    DNNL_CHECK(dnnl_primitive_desc_destroy(desc));
    DNNL_CHECK(dnnl_primitive_attr_destroy(attr));
}

static void destroy_primitive(struct matmul_primitive *p)
{
    DNNL_CHECK(dnnl_primitive_destroy(p->primitive));
    destroy_desc(p->a);
    destroy_desc(p->b);
    destroy_desc(p->c);
    destroy_desc(p->bias);
    destroy_desc(p->scratch);
    *p = (struct matmul_primitive){.primitive = NULL};
}

static struct matmul_key key_of(const struct matmul *a)
{
    return (struct matmul_key){
        .m = a->c->dim[0],
        .n = a->c->dim[1],
        .k = a->a->dim[a->transpose_a ? 0 : 1],
        .flags = a->transpose_a | a->transpose_b << 1 | a->accumulate << 2 |
                 (a->bias != NULL) << 3 | (a->a->dtype == DTYPE_BF16) << 4 |
                 (a->c->dtype == DTYPE_BF16) << 5 | omp_get_max_threads() << 6,
    };
}

static bool keys_equal(const struct matmul_key *x, const struct matmul_key *y)
{
    return x->m == y->m && x->n == y->n && x->k == y->k && x->flags == y->flags;
}

/* The entry of the key, or the one of its set to be filled with it: free, or least recently used.
 */
static struct matmul_primitive *find_entry(const struct matmul_key *key)
{
    const uint64_t hash = rng_mix(
        (uint64_t)key->m +
        rng_mix((uint64_t)key->n + rng_mix((uint64_t)key->k + rng_mix((uint64_t)key->flags))));
    struct matmul_primitive *set = cache.entries[hash % CACHE_SETS], *oldest = NULL;

    for (int i = 0; i < CACHE_WAYS; i++) {
        if (set[i].primitive != NULL && keys_equal(&set[i].key, key)) {
            return &set[i];
        }
        if (set[i].num_users == 0 && (oldest == NULL || set[i].last_use < oldest->last_use)) {
            oldest = &set[i];
        }
    }
    CHECK(oldest != NULL, "%d products of one cache set at once", CACHE_WAYS);
    return oldest;
}

static struct matmul_primitive *take_primitive(const struct matmul *a)
{
    const struct matmul_key key = key_of(a);
    struct matmul_primitive *p;

    pthread_once(&cache.once, create_engine);
    pthread_mutex_lock(&cache.lock);
    p = find_entry(&key);
    if (p->primitive == NULL || !keys_equal(&p->key, &key)) {
        if (p->primitive != NULL) {
            destroy_primitive(p);
        }
        create_primitive(p, &key, a);
    }
    p->num_users++;
    p->last_use = ++cache.clock;
    pthread_mutex_unlock(&cache.lock);
    return p;
}

static void give_primitive(struct matmul_primitive *p)
{
    pthread_mutex_lock(&cache.lock);
    p->num_users--;
    pthread_mutex_unlock(&cache.lock);
}

bool matmul_library_has_bf16(void)
{
    const int isa = (int)dnnl_get_effective_cpu_isa();

    return (isa & (int)dnnl_cpu_isa_avx512_core_bf16) == (int)dnnl_cpu_isa_avx512_core_bf16;
}

static dnnl_exec_arg_t create_argument(int kind, const dnnl_memory_desc_t *desc, const void *data)
{
    dnnl_exec_arg_t argument = {.arg = kind};

#if DNNL_VERSION_MAJOR >= 3
    DNNL_CHECK(dnnl_memory_create(&argument.memory, *desc, cache.engine, (void *)(uintptr_t)data));
#else
    DNNL_CHECK(dnnl_memory_create(&argument.memory, desc, cache.engine, (void *)(uintptr_t)data));
#endif
    return argument;
}

static void run_product(struct stream *stream, const struct matmul *a)
{
    const struct arena_mark mark = arena_mark(stream->scratch);
    struct matmul_primitive *p = take_primitive(a);
    dnnl_exec_arg_t arguments[5];
    dnnl_stream_t dnnl_stream;
    int num_arguments = 0;

    arguments[num_arguments++] = create_argument(DNNL_ARG_SRC, &p->a, a->a->data);
    arguments[num_arguments++] = create_argument(DNNL_ARG_WEIGHTS, &p->b, a->b->data);
    arguments[num_arguments++] = create_argument(DNNL_ARG_DST, &p->c, a->c->data);
    if (a->bias != NULL) {
        arguments[num_arguments++] = create_argument(DNNL_ARG_BIAS, &p->bias, a->bias->data);
    }
    if (p->scratch_bytes > 0) {
        void *scratch = arena_allocate(stream->scratch, p->scratch_bytes);

        arguments[num_arguments++] = create_argument(DNNL_ARG_SCRATCHPAD, &p->scratch, scratch);
    }
    DNNL_CHECK(dnnl_stream_create(&dnnl_stream, cache.engine, dnnl_stream_default_flags));
    DNNL_CHECK(dnnl_primitive_execute(p->primitive, dnnl_stream, num_arguments, arguments));
    DNNL_CHECK(dnnl_stream_wait(dnnl_stream));
    DNNL_CHECK(dnnl_stream_destroy(dnnl_stream));
    for (int i = 0; i < num_arguments; i++) {
        DNNL_CHECK(dnnl_memory_destroy(arguments[i].memory));
    }
    give_primitive(p);
    arena_release(stream->scratch, mark);
}

/* oneDNN 2.6 splits the sum over k between threads when a is transposed, k is large (2048, not
 * 1536) and c gives the threads too little to do; then the bits depend on the number of threads.
 * Weight gradients have that form (c = d_y^T x, summed over the tokens), so their k is cut here,
 * the same way for any number. */
enum { K_MAX = 1536, K_MULTIPLE = 64 };

static bool k_may_be_split(const struct matmul *a)
{
    return a->transpose_a && !a->transpose_b && a->c->dtype == DTYPE_F32 && a->a->dim[0] > K_MAX;
}

void matmul_library_run(struct stream *stream, const struct matmul *a)
{
    const int64_t k = a->a->dim[0], num_parts = (k + K_MAX - 1) / K_MAX;
    const int64_t even = (k + num_parts - 1) / num_parts;
    const int64_t size = (even + K_MULTIPLE - 1) / K_MULTIPLE * K_MULTIPLE;
    struct matmul part = *a;

    if (!k_may_be_split(a)) {
        run_product(stream, a);
        return;
    }
    for (int64_t first = 0; first < k; first += size) {
        const int64_t count = k - first < size ? k - first : size;
        const struct tensor part_a = tensor_rows(a->a, first, count);
        const struct tensor part_b = tensor_rows(a->b, first, count);

        part.a = &part_a;
        part.b = &part_b;
        run_product(stream, &part);
        part.accumulate = true;
        part.bias = NULL;
    }
}
#endif
