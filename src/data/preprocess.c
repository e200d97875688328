/* The calling thread reads the input in chunks of whole documents into a ring of slots and writes
 * the slots out in order; workers encode them in between. Memory is bounded by the ring. */
#include "data/preprocess.h"

#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/path.h"
#include "data/indexed_writer.h"
#include "data/preprocess_document.h"

enum { CHUNK_BYTES = 1 << 19, DOCUMENT_BYTES_MAX = 1 << 30, MESSAGE_BYTES = 2048 };

struct chunk {
    const char *path;
    bool is_text; /* one document; else lines of JSON */
    int64_t first_line;
    char *bytes;
    size_t count, capacity;

    bool done; /* encoded, or failed */
    bool failed;
    char message[MESSAGE_BYTES];
    struct encoded encoded[PREPROCESS_KEYS_MAX];
};

/* Cuts the input files into chunks. */
struct reader {
    const struct preprocess_config *config;
    int next_input;
    FILE *file; /* NULL between files */
    const char *path;
    bool is_text;
    int64_t line;
    char *rest; /* bytes read that belong to the next chunk */
    size_t num_rest;
    int64_t done_bytes;
};

struct pipeline {
    const struct preprocess_config *config;
    struct chunk *chunks;
    int num_chunks;
    pthread_mutex_t lock; /* of what follows, and of chunk.done */
    pthread_cond_t changed;
    int64_t num_read, num_started, num_written; /* chunk number n is chunks[n % num_chunks] */
    bool stopping;
};

static bool is_text_file(const struct preprocess_config *config, const char *path)
{
    const size_t length = strlen(path);

    if (config->format != PREPROCESS_BY_NAME) {
        return config->format == PREPROCESS_TEXT;
    }
    return length >= 4 && strcmp(path + length - 4, ".txt") == 0;
}

static int reader_open_next(struct reader *reader)
{
    reader->path = reader->config->inputs[reader->next_input++];
    reader->is_text = is_text_file(reader->config, reader->path);
    reader->line = 1;
    reader->file = fopen(reader->path, "rbe");
    if (reader->file == NULL) {
        return error_set("cannot open %s: %s", reader->path, strerror(errno));
    }
    return 0;
}

static void chunk_reserve(struct chunk *chunk, size_t capacity)
{
    if (capacity > chunk->capacity) {
        chunk->capacity = capacity;
        chunk->bytes = realloc(chunk->bytes, capacity);
        CHECK(chunk->bytes != NULL, "out of memory for %zu bytes of text", capacity);
    }
}

/* Keeps chunk's bytes from `from` on for the next one. */
static void reader_keep_rest(struct reader *reader, struct chunk *chunk, size_t from)
{
    reader->num_rest = chunk->count - from;
    reader->rest = realloc(reader->rest, reader->num_rest + 1);
    CHECK(reader->rest != NULL, "out of memory for %zu bytes of text", reader->num_rest);
    memcpy(reader->rest, chunk->bytes + from, reader->num_rest);
    chunk->count = from;
}

static int64_t count_lines(const char *bytes, size_t count)
{
    int64_t num_lines = 0;

    for (size_t i = 0; i < count; i++) {
        num_lines += bytes[i] == '\n';
    }
    return num_lines;
}

/* Reads on until a document ends at or after CHUNK_BYTES, or the file ends (closes it). */
static int reader_fill(struct reader *reader, struct chunk *chunk)
{
    chunk_reserve(chunk, reader->num_rest + CHUNK_BYTES);
    memcpy(chunk->bytes, reader->rest != NULL ? reader->rest : "", reader->num_rest);
    chunk->count = reader->num_rest;
    reader->num_rest = 0;
    for (;;) {
        const size_t room = chunk->capacity - chunk->count;
        const size_t got = fread(chunk->bytes + chunk->count, 1, room, reader->file);
        const char *newline;

        chunk->count += got;
        reader->done_bytes += (int64_t)got;
        if (ferror(reader->file)) {
            return error_set("cannot read %s: %s", reader->path, strerror(errno));
        }
        if (got < room) {
            fclose(reader->file);
            reader->file = NULL;
            return 0;
        }
        newline = reader->is_text ? NULL : memrchr(chunk->bytes, '\n', chunk->count);
        if (newline != NULL) {
            reader_keep_rest(reader, chunk, (size_t)(newline + 1 - chunk->bytes));
            return 0;
        }
        if (chunk->count > DOCUMENT_BYTES_MAX) {
            return error_set("%s, line %lld: a document of more than %d bytes", reader->path,
                             (long long)reader->line, DOCUMENT_BYTES_MAX);
        }
        chunk_reserve(chunk, 2 * chunk->capacity);
    }
}

/* 1: a chunk was read; 0: the input is at its end; -1: error. */
static int reader_next(struct reader *reader, struct chunk *chunk)
{
    if (reader->file == NULL) {
        if (reader->next_input == reader->config->num_inputs) {
            return 0;
        }
        TRY(reader_open_next(reader));
    }
    chunk->path = reader->path;
    chunk->is_text = reader->is_text;
    chunk->first_line = reader->line;
    TRY(reader_fill(reader, chunk));
    reader->line += count_lines(chunk->bytes, chunk->count);
    chunk->done = chunk->failed = false;
    return 1;
}

static void reader_close(struct reader *reader)
{
    if (reader->file != NULL) {
        fclose(reader->file);
    }
    free(reader->rest);
}

static bool is_blank(const char *line, size_t count)
{
    for (size_t i = 0; i < count; i++) {
        if (strchr(" \t\r", line[i]) == NULL || line[i] == '\0') {
            return false;
        }
    }
    return true;
}

static int encode_lines(const struct preprocess_config *config, struct chunk *chunk)
{
    const char *at = chunk->bytes, *end = chunk->bytes + chunk->count;

    for (int64_t line = chunk->first_line; at < end; line++) {
        const char *newline = memchr(at, '\n', (size_t)(end - at));
        const char *line_end = newline != NULL ? newline : end;

        if (!is_blank(at, (size_t)(line_end - at)) &&
            encode_json_line(config, at, (size_t)(line_end - at), chunk->encoded) != 0) {
            return error_prepend("%s, line %lld", chunk->path, (long long)line);
        }
        at = line_end + 1;
    }
    return 0;
}

static int encode_chunk(const struct preprocess_config *config, struct chunk *chunk)
{
    for (int k = 0; k < config->num_keys; k++) {
        encoded_clear(&chunk->encoded[k]);
    }
    if (!chunk->is_text) {
        return encode_lines(config, chunk);
    }
    if (encode_text(config, chunk->bytes, chunk->count, &chunk->encoded[0]) != 0) {
        return error_prepend("%s", chunk->path);
    }
    return 0;
}

static void *work(void *argument)
{
    struct pipeline *pipeline = argument;

    pthread_mutex_lock(&pipeline->lock);
    while (!pipeline->stopping) {
        struct chunk *chunk;

        if (pipeline->num_started == pipeline->num_read) {
            pthread_cond_wait(&pipeline->changed, &pipeline->lock);
            continue;
        }
        chunk = &pipeline->chunks[pipeline->num_started++ % pipeline->num_chunks];
        pthread_mutex_unlock(&pipeline->lock);
        chunk->failed = encode_chunk(pipeline->config, chunk) != 0;
        if (chunk->failed) {
            snprintf(chunk->message, MESSAGE_BYTES, "%s", error_text());
        }
        pthread_mutex_lock(&pipeline->lock);
        chunk->done = true;
        pthread_cond_broadcast(&pipeline->changed);
    }
    pthread_mutex_unlock(&pipeline->lock);
    return NULL;
}

static int write_encoded(struct indexed_writer *writer, const struct encoded *encoded)
{
    const int32_t *tokens = encoded->tokens.ids;
    int64_t sequence = 0;

    for (int64_t d = 0; d < encoded->num_sequences.count; d++) {
        for (int32_t i = 0; i < encoded->num_sequences.ids[d]; i++) {
            const int32_t length = encoded->lengths.ids[sequence++];

            TRY(indexed_writer_add_sequence(writer, tokens, length));
            tokens += length;
        }
        indexed_writer_end_document(writer);
    }
    return 0;
}

/* Waits for the oldest chunk and writes it. */
static int write_next(struct pipeline *pipeline, struct indexed_writer **writers,
                      struct preprocess_progress *progress)
{
    struct chunk *chunk = &pipeline->chunks[pipeline->num_written % pipeline->num_chunks];

    pthread_mutex_lock(&pipeline->lock);
    while (!chunk->done) {
        pthread_cond_wait(&pipeline->changed, &pipeline->lock);
    }
    pthread_mutex_unlock(&pipeline->lock);
    pipeline->num_written++;
    if (chunk->failed) {
        return error_set("%s", chunk->message);
    }
    for (int k = 0; k < pipeline->config->num_keys; k++) {
        TRY(write_encoded(writers[k], &chunk->encoded[k]));
        progress->num_tokens += chunk->encoded[k].tokens.count;
    }
    progress->num_documents += chunk->encoded[0].num_sequences.count;
    return 0;
}

static int run_pipeline(struct pipeline *pipeline, struct reader *reader,
                        struct indexed_writer **writers, struct preprocess_progress *progress)
{
    int more = 1;

    for (;;) {
        while (more > 0 && pipeline->num_read - pipeline->num_written < pipeline->num_chunks) {
            more =
                reader_next(reader, &pipeline->chunks[pipeline->num_read % pipeline->num_chunks]);
            if (more > 0) {
                pthread_mutex_lock(&pipeline->lock);
                pipeline->num_read++;
                pthread_cond_broadcast(&pipeline->changed);
                pthread_mutex_unlock(&pipeline->lock);
            }
        }
        if (more < 0) {
            return -1;
        }
        if (pipeline->num_written == pipeline->num_read) {
            return 0;
        }
        TRY(write_next(pipeline, writers, progress));
        progress->done_bytes = reader->done_bytes;
        if (pipeline->config->report != NULL) {
            pipeline->config->report(pipeline->config->context, progress);
        }
    }
}

static int run_with_workers(struct pipeline *pipeline, struct reader *reader,
                            struct indexed_writer **writers, struct preprocess_progress *progress)
{
    const int num_workers = pipeline->config->num_workers;
    pthread_t *threads = calloc((size_t)num_workers, sizeof *threads);
    int num_threads = 0, result = 0;

    CHECK(threads != NULL, "out of memory");
    while (num_threads < num_workers &&
           pthread_create(&threads[num_threads], NULL, work, pipeline) == 0) {
        num_threads++;
    }
    if (num_threads == 0) {
        result = error_set("cannot start a thread: %s", strerror(errno));
    }
    if (result == 0) {
        result = run_pipeline(pipeline, reader, writers, progress);
    }
    pthread_mutex_lock(&pipeline->lock);
    pipeline->stopping = true;
    pthread_cond_broadcast(&pipeline->changed);
    pthread_mutex_unlock(&pipeline->lock);
    for (int i = 0; i < num_threads; i++) {
        pthread_join(threads[i], NULL);
    }
    free(threads);
    return result;
}

static int run(const struct preprocess_config *config, struct indexed_writer **writers,
               struct preprocess_progress *progress)
{
    struct reader reader = {.config = config};
    struct pipeline pipeline = {.config = config, .num_chunks = 2 * config->num_workers + 1};
    int result;

    pipeline.chunks = calloc((size_t)pipeline.num_chunks, sizeof *pipeline.chunks);
    CHECK(pipeline.chunks != NULL, "out of memory");
    pthread_mutex_init(&pipeline.lock, NULL);
    pthread_cond_init(&pipeline.changed, NULL);
    result = run_with_workers(&pipeline, &reader, writers, progress);
    pthread_mutex_destroy(&pipeline.lock);
    pthread_cond_destroy(&pipeline.changed);
    for (int i = 0; i < pipeline.num_chunks; i++) {
        for (int k = 0; k < config->num_keys; k++) {
            encoded_free(&pipeline.chunks[i].encoded[k]);
        }
        free(pipeline.chunks[i].bytes);
    }
    free(pipeline.chunks);
    reader_close(&reader);
    return result;
}

int preprocess_measure(const struct preprocess_config *config, struct preprocess_progress *progress)
{
    *progress = (struct preprocess_progress){0};
    for (int i = 0; i < config->num_inputs; i++) {
        int64_t size_bytes;

        TRY(path_file_size(config->inputs[i], &size_bytes));
        progress->total_bytes += size_bytes;
        if (config->num_keys > 1 && is_text_file(config, config->inputs[i])) {
            return error_set("%s is plain text, which has no keys; --json-keys names %d",
                             config->inputs[i], config->num_keys);
        }
    }
    return 0;
}

static int open_writers(const struct preprocess_config *config, struct indexed_writer **writers)
{
    const int64_t vocab_size = tokenizer_vocab_size(config->tokenizer);

    for (int k = 0; k < config->num_keys; k++) {
        char prefix[PATH_LENGTH_MAX];

        TRY(path_format(prefix, "%s_%s_document", config->output_prefix, config->keys[k]));
        writers[k] = indexed_writer_open(prefix, token_dtype_for_vocab(vocab_size));
        if (writers[k] == NULL) {
            return -1;
        }
    }
    return 0;
}

int preprocess_run(const struct preprocess_config *config, struct preprocess_progress *progress)
{
    struct indexed_writer *writers[PREPROCESS_KEYS_MAX] = {NULL};
    int result;

    CHECK(config->num_keys > 0 && config->num_keys <= PREPROCESS_KEYS_MAX &&
              config->num_workers > 0,
          "%d keys, %d workers", config->num_keys, config->num_workers);
    TRY(preprocess_measure(config, progress));
    result = open_writers(config, writers);
    if (result == 0) {
        result = run(config, writers, progress);
    }
    for (int k = 0; k < config->num_keys; k++) {
        if (result == 0) {
            result = indexed_writer_finish(writers[k]);
        } else {
            indexed_writer_abandon(writers[k]);
        }
    }
    return result;
}
