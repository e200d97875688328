#include "parallel/context_parallel.h"

#include <string.h>

#include "base/check.h"

struct context_chunks context_parallel_chunks(int cp_size, int cp_rank, int64_t seq_length)
{
    const int64_t length = seq_length / (2 * cp_size);

    CHECK(seq_length % (2 * cp_size) == 0, "a sequence of %lld in %d chunks", (long long)seq_length,
          2 * cp_size);
    return (struct context_chunks){{cp_rank * length, (2 * cp_size - 1 - cp_rank) * length},
                                   length};
}

int64_t context_parallel_position(int cp_size, int cp_rank, int64_t seq_length, int64_t s_local)
{
    struct context_chunks chunks;

    if (cp_size == 1) {
        return s_local; /* an odd sequence has no halves */
    }
    chunks = context_parallel_chunks(cp_size, cp_rank, seq_length);
    return s_local < chunks.length ? chunks.start[0] + s_local
                                   : chunks.start[1] + s_local - chunks.length;
}

void context_parallel_cut(void *local, const void *full, size_t row_bytes, int cp_size, int cp_rank,
                          int64_t seq_length)
{
    struct context_chunks chunks;

    if (cp_size == 1) {
        memcpy(local, full, (size_t)seq_length * row_bytes);
        return;
    }
    chunks = context_parallel_chunks(cp_size, cp_rank, seq_length);
    for (int i = 0; i < 2; i++) {
        memcpy((char *)local + (size_t)(i * chunks.length) * row_bytes,
               (const char *)full + (size_t)chunks.start[i] * row_bytes,
               (size_t)chunks.length * row_bytes);
    }
}

/* Of the 2*CP chunks, by_rank's chunk i: where it lies in the sequence, as an address. */
static char *chunk_of_sequence(const struct tensor *sequence, int cp_size, int i, size_t size_bytes)
{
    const int rank = i / 2, chunk = i % 2 == 0 ? rank : 2 * cp_size - 1 - rank;

    return (char *)sequence->data + (size_t)chunk * size_bytes;
}

static size_t chunk_bytes(const struct tensor *sequence, const struct tensor *by_rank, int cp_size)
{
    const size_t size_bytes = tensor_size_bytes(sequence);

    CHECK(tensor_size_bytes(by_rank) == size_bytes && size_bytes % (size_t)(2 * cp_size) == 0,
          "%s and %s in %d chunks", tensor_describe(sequence), tensor_describe(by_rank),
          2 * cp_size);
    return size_bytes / (size_t)(2 * cp_size);
}

void context_parallel_to_sequence(struct stream *stream, int cp_size, struct tensor *sequence,
                                  const struct tensor *by_rank)
{
    const size_t size_bytes = chunk_bytes(sequence, by_rank, cp_size);

    for (int i = 0; i < 2 * cp_size; i++) {
        stream_copy(stream, chunk_of_sequence(sequence, cp_size, i, size_bytes),
                    (const char *)by_rank->data + (size_t)i * size_bytes, size_bytes);
    }
}

void context_parallel_to_ranks(struct stream *stream, int cp_size, struct tensor *by_rank,
                               const struct tensor *sequence)
{
    const size_t size_bytes = chunk_bytes(sequence, by_rank, cp_size);

    for (int i = 0; i < 2 * cp_size; i++) {
        stream_copy(stream, (char *)by_rank->data + (size_t)i * size_bytes,
                    chunk_of_sequence(sequence, cp_size, i, size_bytes), size_bytes);
    }
}
