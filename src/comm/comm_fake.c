/* comm_fake.c - why the made-up data is what it is: routing must stay as even as it was, or memory
 * and time would be those of another run. Messages of zeros would send all tokens to the first
 * experts; and where parameters are gathered in place, the other ranks' parts stay as they are,
 * since a copy of this rank's might put a norm's ones into a router. */
#include "comm/comm_fake.h"

#include <stdlib.h>

#include "base/check.h"
#include "base/rng.h"
#include "comm/traffic.h"
#include "ops/ops.h"

/* A prime, so that the rows of a tensor differ. */
enum { PATTERN_ELEMENTS = 65537 };

#define PATTERN_DEVIATION 1e-2f

/* Random numbers on the device, made when first wanted. */
struct pattern {
    const struct device *device;
    void *memory;
};

struct fake {
    struct pattern f32, bf16;
};

static const struct comm_handle complete = {NULL, NULL};

static size_t pattern_bytes(enum dtype dtype)
{
    return (size_t)(PATTERN_ELEMENTS * dtype_size_bytes(dtype));
}

static void pattern_make(struct pattern *pattern, struct stream *stream, enum dtype dtype)
{
    const struct memory_source *source = &stream->device->memory;
    const struct rng_key key = rng_key(0, "fake messages", 0);
    char *host = malloc(pattern_bytes(dtype));

    pattern->device = stream->device;
    pattern->memory = source->allocate(source->context, pattern_bytes(dtype));
    CHECK(host != NULL && pattern->memory != NULL, "out of memory");
    for (int64_t i = 0; i < PATTERN_ELEMENTS; i++) {
        const float number = PATTERN_DEVIATION * (float)rng_normal(key, 0, (uint64_t)i);

        if (dtype == DTYPE_F32) {
            ((float *)host)[i] = number;
        } else {
            ((bf16_t *)host)[i] = bf16_from_float(number);
        }
    }
    stream_copy_from_host(stream, pattern->memory, host, pattern_bytes(dtype));
    free(host);
}

static void pattern_free(struct pattern *pattern, enum dtype dtype)
{
    if (pattern->memory != NULL) {
        const struct memory_source *source = &pattern->device->memory;

        source->release(source->context, pattern->memory, pattern_bytes(dtype));
    }
}

/* to becomes from again and again; the copies double in length. */
static void repeat(struct stream *stream, char *to, size_t to_bytes, const char *from,
                   size_t from_bytes)
{
    size_t done = from_bytes < to_bytes ? from_bytes : to_bytes;

    if (to_bytes == 0 || from_bytes == 0) {
        return;
    }
    stream_copy(stream, to, from, done);
    while (done < to_bytes) {
        const size_t n = done < to_bytes - done ? done : to_bytes - done;

        stream_copy(stream, to + done, to, n);
        done += n;
    }
}

/* What a rank that does not exist sent. */
static void make_up(struct comm *comm, struct stream *stream, struct tensor *x)
{
    struct fake *fake = comm->state;
    struct pattern *pattern = x->dtype == DTYPE_F32    ? &fake->f32
                              : x->dtype == DTYPE_BF16 ? &fake->bf16
                                                       : NULL;

    if (pattern == NULL) {
        op_fill_zero(stream, x);
        return;
    }
    if (pattern->device != stream->device) {
        pattern_free(pattern, x->dtype);
        pattern_make(pattern, stream, x->dtype);
    }
    repeat(stream, x->data, tensor_size_bytes(x), pattern->memory, pattern_bytes(x->dtype));
}

/* `count` rows of out from row `first`: from's, or made up where it has none. */
static void fill_rows(struct comm *comm, struct stream *stream, const struct tensor *out,
                      int64_t first, int64_t count, const struct tensor *from)
{
    struct tensor rows = tensor_rows(out, first, count);

    if (tensor_num_elements(from) > 0) {
        repeat(stream, rows.data, tensor_size_bytes(&rows), from->data, tensor_size_bytes(from));
    } else if (count > 0) {
        make_up(comm, stream, &rows);
    }
}

static struct comm_handle fake_all_reduce(struct comm *comm, struct stream *stream,
                                          struct tensor *x, enum comm_reduction reduction)
{
    traffic_count_all_reduce(comm, x);
    return complete;
}

/* Part r of whole: rows[r] rows, or an equal part. */
static struct tensor part_of(const struct comm *comm, const struct tensor *whole,
                             const int64_t *rows, int rank)
{
    const int64_t num_elements = tensor_num_elements(whole);
    struct tensor flat = tensor_view(whole, num_elements);
    int64_t first = 0;

    if (rows == NULL) {
        return tensor_rows(&flat, num_elements / comm->size * rank, num_elements / comm->size);
    }
    for (int r = 0; r < rank; r++) {
        first += rows[r];
    }
    return tensor_rows(whole, first, rows[rank]);
}

static struct comm_handle fake_all_gather(struct comm *comm, struct stream *stream,
                                          struct tensor *out, const struct tensor *in,
                                          const int64_t *rows)
{
    const bool in_place = part_of(comm, out, rows, comm->rank).data == in->data;

    traffic_count_all_gather(comm, in);
    for (int r = 0; r < comm->size && !in_place; r++) {
        const struct tensor part = part_of(comm, out, rows, r);

        fill_rows(comm, stream, &part, 0, part.dim[0], in);
    }
    return complete;
}

static struct comm_handle fake_reduce_scatter(struct comm *comm, struct stream *stream,
                                              struct tensor *out, const struct tensor *in,
                                              const int64_t *rows)
{
    const struct tensor own = part_of(comm, in, rows, comm->rank);

    traffic_count_reduce_scatter(comm, out, in);
    if (own.data != out->data) {
        stream_copy(stream, out->data, own.data, tensor_size_bytes(&own));
    }
    return complete;
}

/* From rank r come the rows that went there, as often as they are needed. */
static struct comm_handle fake_all_to_all(struct comm *comm, struct stream *stream,
                                          struct tensor *out, const int64_t *recv_rows,
                                          const struct tensor *in, const int64_t *send_rows)
{
    int64_t received = 0, sent = 0;

    traffic_count_all_to_all(comm, in, send_rows);
    for (int r = 0; r < comm->size; r++) {
        const struct tensor from = tensor_rows(in, sent, send_rows[r]);

        fill_rows(comm, stream, out, received, recv_rows[r], &from);
        received += recv_rows[r];
        sent += send_rows[r];
    }
    return complete;
}

static struct comm_handle fake_broadcast(struct comm *comm, struct stream *stream, struct tensor *x,
                                         int root)
{
    traffic_count_broadcast(comm, x, root);
    if (comm->rank != root) {
        make_up(comm, stream, x);
    }
    return complete;
}

static struct comm_handle fake_send(struct comm *comm, struct stream *stream,
                                    const struct tensor *x, int to)
{
    traffic_count_send(comm, x);
    return complete;
}

static struct comm_handle fake_receive(struct comm *comm, struct stream *stream, struct tensor *x,
                                       int from)
{
    make_up(comm, stream, x);
    return complete;
}

static void fake_wait(struct comm_handle handle, struct stream *stream)
{
}

static void fake_destroy(struct comm *comm)
{
    struct fake *fake = comm->state;

    pattern_free(&fake->f32, DTYPE_F32);
    pattern_free(&fake->bf16, DTYPE_BF16);
    free(fake);
    free(comm);
}

struct comm *comm_fake_create(const char *name, int rank, int size)
{
    static const struct comm_table table = {
        .transport = "fake",
        .is_emulated = true,
        .all_reduce = fake_all_reduce,
        .all_gather = fake_all_gather,
        .reduce_scatter = fake_reduce_scatter,
        .all_to_all = fake_all_to_all,
        .broadcast = fake_broadcast,
        .send = fake_send,
        .receive = fake_receive,
        .wait = fake_wait,
        .destroy = fake_destroy,
    };
    struct comm *comm = calloc(1, sizeof *comm);
    struct fake *fake = calloc(1, sizeof *fake);

    CHECK(comm != NULL && fake != NULL, "out of memory");
    CHECK(rank >= 0 && rank < size, "%s: rank %d of %d", name, rank, size);
    *comm = (struct comm){.table = &table, .name = name, .rank = rank, .size = size, .state = fake};
    return comm;
}
