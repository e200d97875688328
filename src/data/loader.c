/* A ring of slots. The producer (a thread, or loader_next itself) fills slots in order, the
 * consumer takes them in order; the slot given out last stays untouched until the next call. A
 * failure is kept in its slot and reported when its turn comes, so it does not depend on timing. */
#include "data/loader.h"

#include <pthread.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"

enum { NUM_SLOTS = 4, MESSAGE_BYTES = 2048 };

struct slot {
    struct batch batch;
    bool failed;
    char message[MESSAGE_BYTES]; /* why */
};

struct loader {
    const struct dataset *dataset;
    struct loader_config config;
    struct sampler sampler;
    int64_t *indices; /* [B] */
    int32_t *sample;  /* [S+1] */
    struct slot slots[NUM_SLOTS];

    bool has_thread;
    pthread_t thread;
    pthread_mutex_t lock; /* of the four below */
    pthread_cond_t changed;
    int64_t num_filled, num_taken; /* slots; number n is slots[n % NUM_SLOTS] */
    bool stopping;
};

static void *allocate(int64_t count, size_t item_bytes)
{
    void *items = calloc((size_t)count, item_bytes);

    CHECK(items != NULL, "out of memory for %lld items of a microbatch", (long long)count);
    return items;
}

static void batch_allocate(struct batch *batch, int64_t seq_length, int64_t num_sequences)
{
    const int64_t num_tokens = seq_length * num_sequences;

    *batch = (struct batch){
        .seq_length = seq_length,
        .num_sequences = num_sequences,
        .tokens = allocate(num_tokens, sizeof(int32_t)),
        .labels = allocate(num_tokens, sizeof(int32_t)),
        .loss_mask = allocate(num_tokens, sizeof(float)),
        .position_ids = allocate(num_tokens, sizeof(int32_t)),
        .document_start = allocate(num_tokens, sizeof(int32_t)),
        .sample_ids = allocate(num_sequences, sizeof(int64_t)),
    };
}

static void batch_free(struct batch *batch)
{
    free(batch->tokens);
    free(batch->labels);
    free(batch->loss_mask);
    free(batch->position_ids);
    free(batch->document_start);
    free(batch->sample_ids);
}

void batch_set_column(struct batch *batch, int64_t b, const int32_t *tokens,
                      const struct loader_config *config)
{
    int32_t start = 0; /* position after the last end of document */

    for (int64_t s = 0; s < batch->seq_length; s++) {
        const int64_t at = s * batch->num_sequences + b;
        const int32_t token = tokens[s], label = tokens[s + 1];
        const bool is_masked = (config->eod_mask_loss && token == config->eod) ||
                               (config->pad >= 0 && label == config->pad);

        batch->loss_mask[at] = is_masked ? 0.0f : 1.0f;
        batch->tokens[at] = config->pad >= 0 && token == config->pad ? 0 : token;
        batch->labels[at] = config->pad >= 0 && label == config->pad ? 0 : label;
        batch->position_ids[at] = (int32_t)s - (config->reset_position_ids ? start : 0);
        batch->document_start[at] = config->reset_attention_mask ? start : 0;
        if (token == config->eod) {
            start = (int32_t)s + 1;
        }
    }
}

static int fill_batch(struct loader *loader, struct batch *batch)
{
    TRY(sampler_next(&loader->sampler, loader->indices, batch->sample_ids));
    for (int64_t b = 0; b < batch->num_sequences; b++) {
        TRY(dataset_sample(loader->dataset, loader->indices[b], loader->sample));
        batch_set_column(batch, b, loader->sample, &loader->config);
    }
    return 0;
}

static void fill_slot(struct loader *loader, struct slot *slot)
{
    slot->failed = fill_batch(loader, &slot->batch) != 0;
    if (slot->failed) {
        strncpy(slot->message, error_text(), MESSAGE_BYTES - 1);
    }
}

static void *produce(void *argument)
{
    struct loader *loader = argument;

    pthread_mutex_lock(&loader->lock);
    while (!loader->stopping) {
        struct slot *slot = &loader->slots[loader->num_filled % NUM_SLOTS];

        /* one slot less than the ring: the one given out last is still read */
        if (loader->num_filled - loader->num_taken >= NUM_SLOTS - 1) {
            pthread_cond_wait(&loader->changed, &loader->lock);
            continue;
        }
        pthread_mutex_unlock(&loader->lock);
        fill_slot(loader, slot);
        pthread_mutex_lock(&loader->lock);
        loader->num_filled++;
        pthread_cond_broadcast(&loader->changed);
        if (slot->failed) {
            break;
        }
    }
    pthread_mutex_unlock(&loader->lock);
    return NULL;
}

struct loader *loader_open(const struct dataset *dataset, const struct loader_config *config)
{
    struct loader *loader = allocate(1, sizeof *loader);

    loader->dataset = dataset;
    loader->config = *config;
    if (sampler_init(&loader->sampler, config->order, dataset->num_samples,
                     config->consumed_samples, config->micro_batch_size, config->data_parallel_rank,
                     config->data_parallel_size) != 0) {
        free(loader);
        return NULL;
    }
    loader->indices = allocate(config->micro_batch_size, sizeof(int64_t));
    loader->sample = allocate(dataset->seq_length + 1, sizeof(int32_t));
    for (int i = 0; i < NUM_SLOTS; i++) {
        batch_allocate(&loader->slots[i].batch, dataset->seq_length, config->micro_batch_size);
    }
    pthread_mutex_init(&loader->lock, NULL);
    pthread_cond_init(&loader->changed, NULL);
    loader->has_thread =
        config->num_workers > 0 && pthread_create(&loader->thread, NULL, produce, loader) == 0;
    return loader;
}

int loader_next(struct loader *loader, const struct batch **batch)
{
    struct slot *slot;

    pthread_mutex_lock(&loader->lock);
    slot = &loader->slots[loader->num_taken % NUM_SLOTS];
    if (!loader->has_thread && loader->num_filled == loader->num_taken) {
        fill_slot(loader, slot);
        loader->num_filled++;
    }
    while (loader->num_filled == loader->num_taken) {
        pthread_cond_wait(&loader->changed, &loader->lock);
    }
    if (slot->failed) { /* not taken: every later call fails as well */
        pthread_mutex_unlock(&loader->lock);
        return error_set("%s", slot->message);
    }
    loader->num_taken++;
    pthread_cond_broadcast(&loader->changed);
    pthread_mutex_unlock(&loader->lock);
    *batch = &slot->batch;
    return 0;
}

void loader_close(struct loader *loader)
{
    if (loader == NULL) {
        return;
    }
    if (loader->has_thread) {
        pthread_mutex_lock(&loader->lock);
        loader->stopping = true;
        pthread_cond_broadcast(&loader->changed);
        pthread_mutex_unlock(&loader->lock);
        pthread_join(loader->thread, NULL);
    }
    pthread_mutex_destroy(&loader->lock);
    pthread_cond_destroy(&loader->changed);
    for (int i = 0; i < NUM_SLOTS; i++) {
        batch_free(&loader->slots[i].batch);
    }
    sampler_free(&loader->sampler);
    free(loader->indices);
    free(loader->sample);
    free(loader);
}
