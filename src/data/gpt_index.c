#include "data/gpt_index.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <xxhash.h>

#include "base/check.h"
#include "base/checked.h"
#include "data/numpy_random.h"

enum { DOCUMENTS, SAMPLES, SHUFFLE, NUM_ARRAYS };

/* What follows from the lengths of the sequences and the number of samples wanted. */
struct epoch_plan {
    int64_t num_sequences, num_tokens; /* of one epoch */
    uint64_t lengths_hash;
    int64_t num_epochs, num_samples;
    bool last_epoch_apart;
    int64_t num_samples_before_last; /* of all epochs but the last */
};

static void count_tokens(struct epoch_plan *plan, const struct token_source *source,
                         const struct gpt_index_config *config)
{
    enum { CHUNK = 4096 };
    int32_t lengths[CHUNK];
    XXH3_state_t *hash = XXH3_createState();

    CHECK(hash != NULL, "out of memory");
    XXH3_64bits_reset(hash);
    plan->num_tokens = 0;
    for (int64_t i = config->first_sequence; i < config->end_sequence;) {
        int count = 0;

        for (; count < CHUNK && i < config->end_sequence; count++, i++) {
            lengths[count] = source->length(source, i);
            plan->num_tokens += lengths[count];
        }
        XXH3_64bits_update(hash, lengths, (size_t)count * sizeof lengths[0]);
    }
    plan->lengths_hash = XXH3_64bits_digest(hash);
    XXH3_freeState(hash);
    plan->num_sequences = config->end_sequence - config->first_sequence;
}

/* The smallest number of epochs e with e*tokens >= samples*S + 1. When fewer than 80 % of the last
 * one's samples are wanted, it is kept out of the shuffle of the others, so that these are all seen
 * before any is seen again. */
static int plan_epochs(struct epoch_plan *plan, const struct token_source *source,
                       const struct gpt_index_config *config)
{
    const int64_t s = config->seq_length;
    int64_t wanted_tokens, total_tokens, from_last, per_epoch;

    plan->num_epochs = 1;
    if (config->num_samples >= 0) {
        if (!checked_mul(config->num_samples, s, &wanted_tokens) ||
            wanted_tokens > INT64_MAX - plan->num_tokens) {
            return error_set("%lld samples of %lld tokens are more than can be counted",
                             (long long)config->num_samples, (long long)s);
        }
        plan->num_epochs = wanted_tokens / plan->num_tokens + 1;
    }
    if (plan->num_epochs * plan->num_sequences > UINT32_MAX ||
        !checked_mul(plan->num_epochs, plan->num_tokens, &total_tokens) ||
        (total_tokens - 1) / s >= UINT32_MAX - 1) {
        return error_set("%lld %s samples of %lld tokens take %lld epochs of %s (%lld tokens in "
                         "%lld sequences), more than an index of 32 bits counts",
                         (long long)config->num_samples, config->split_name, (long long)s,
                         (long long)plan->num_epochs, source->name, (long long)plan->num_tokens,
                         (long long)plan->num_sequences);
    }
    plan->num_samples = (total_tokens - 1) / s;
    plan->num_samples_before_last = ((plan->num_epochs - 1) * plan->num_tokens - 1) / s;
    from_last = config->num_samples - plan->num_samples_before_last;
    per_epoch = (plan->num_tokens - 1) / s;
    plan->last_epoch_apart =
        plan->num_epochs > 1 && from_last < (int64_t)(0.80 * (double)per_epoch);
    return 0;
}

static int make_plan(struct epoch_plan *plan, const struct token_source *source,
                     const struct gpt_index_config *config)
{
    count_tokens(plan, source, config);
    if (plan->num_tokens == 0) {
        return error_set("the %s split of %s holds no token (sequences %lld up to %lld of %lld); "
                         "give it a larger share with --split",
                         config->split_name, source->name, (long long)config->first_sequence,
                         (long long)config->end_sequence, (long long)source->num_sequences);
    }
    TRY(plan_epochs(plan, source, config));
    if (plan->num_samples == 0) {
        return error_set("the %s split of %s holds %lld tokens, fewer than the %lld of one sample",
                         config->split_name, source->name, (long long)plan->num_tokens,
                         (long long)config->seq_length + 1);
    }
    return 0;
}

/* One stream of random numbers serves documents first, then samples. */
static void build_document_index(uint32_t *documents, const struct epoch_plan *plan,
                                 int64_t first_sequence, struct numpy_random *random)
{
    const int64_t num_entries = plan->num_epochs * plan->num_sequences;
    const int64_t num_apart = plan->last_epoch_apart ? plan->num_sequences : 0;

    for (int64_t i = 0; i < num_entries; i++) {
        documents[i] = (uint32_t)(first_sequence + i % plan->num_sequences);
    }
    numpy_random_shuffle(random, documents, num_entries - num_apart);
    numpy_random_shuffle(random, documents + num_entries - num_apart, num_apart);
}

static void build_sample_index(struct sample_start *samples, const uint32_t *documents,
                               const struct epoch_plan *plan, const struct token_source *source,
                               int64_t seq_length)
{
    int64_t entry_start = 0; /* tokens before the entry */
    uint32_t entry = 0;

    samples[0] = (struct sample_start){0, 0}; /* even where the first sequence is empty */
    for (int64_t k = 1; k <= plan->num_samples; k++) {
        const int64_t start = k * seq_length;
        int32_t length;

        while (length = source->length(source, documents[entry]), entry_start + length <= start) {
            entry_start += length;
            entry++;
        }
        samples[k] = (struct sample_start){entry, (uint32_t)(start - entry_start)};
    }
}

static void build_shuffle_index(uint32_t *shuffle, const struct epoch_plan *plan,
                                struct numpy_random *random)
{
    const int64_t num_together =
        plan->last_epoch_apart ? plan->num_samples_before_last : plan->num_samples;

    for (int64_t i = 0; i < plan->num_samples; i++) {
        shuffle[i] = (uint32_t)i;
    }
    numpy_random_shuffle(random, shuffle, num_together);
    numpy_random_shuffle(random, shuffle + num_together, plan->num_samples - num_together);
}

static int build(struct index_array arrays[NUM_ARRAYS], const struct epoch_plan *plan,
                 const struct token_source *source, const struct gpt_index_config *config)
{
    struct numpy_random random;

    for (int i = 0; i < NUM_ARRAYS; i++) {
        TRY(index_array_allocate(&arrays[i]));
    }
    numpy_random_seed(&random, config->seed);
    build_document_index(arrays[DOCUMENTS].data, plan, config->first_sequence, &random);
    build_sample_index(arrays[SAMPLES].data, arrays[DOCUMENTS].data, plan, source,
                       config->seq_length);
    build_shuffle_index(arrays[SHUFFLE].data, plan, &random);
    return 0;
}

/* Everything the arrays depend on. Where the data set lies is not among it: a copy has the same
 * order. */
static void format_facts(char *facts, size_t facts_bytes, const struct epoch_plan *plan,
                         const struct gpt_index_config *config)
{
    snprintf(facts, facts_bytes,
             "cadre order of GPT samples, format 1\n"
             "split %s\nsequences %lld to %lld\ntokens %lld\nlengths xxh3 %016llx\n"
             "sequence length %lld\nsamples %lld\nseed %u\n",
             config->split_name, (long long)config->first_sequence, (long long)config->end_sequence,
             (long long)plan->num_tokens, (unsigned long long)plan->lengths_hash,
             (long long)config->seq_length, (long long)config->num_samples, config->seed);
}

int gpt_index_open(struct gpt_index *index, const struct token_source *source,
                   const struct gpt_index_config *config)
{
    char facts[512], name[64];
    const struct index_cache cache = {config->cache_directory, name, facts};
    struct epoch_plan plan;

    *index = (struct gpt_index){0};
    TRY(make_plan(&plan, source, config));
    index->num_epochs = plan.num_epochs;
    index->num_entries = plan.num_epochs * plan.num_sequences;
    index->num_samples = plan.num_samples;
    index->arrays[DOCUMENTS] = (struct index_array){
        .name = "document_index", .dtype = "<u4", .item_bytes = 4, .num_rows = index->num_entries};
    index->arrays[SAMPLES] = (struct index_array){.name = "sample_index",
                                                  .dtype = "<u4",
                                                  .item_bytes = 4,
                                                  .num_rows = plan.num_samples + 1,
                                                  .num_columns = 2};
    index->arrays[SHUFFLE] = (struct index_array){
        .name = "shuffle_index", .dtype = "<u4", .item_bytes = 4, .num_rows = plan.num_samples};
    snprintf(name, sizeof name, "GPTDataset-%s", config->split_name);
    format_facts(facts, sizeof facts, &plan, config);
    if (!index_cache_load(&cache, index->arrays, NUM_ARRAYS)) {
        if (build(index->arrays, &plan, source, config) != 0) {
            gpt_index_close(index);
            return -1;
        }
        index_cache_store(&cache, index->arrays, NUM_ARRAYS);
    }
    index->document_index = index->arrays[DOCUMENTS].data;
    index->sample_index = index->arrays[SAMPLES].data;
    index->shuffle_index = index->arrays[SHUFFLE].data;
    return 0;
}

void gpt_index_close(struct gpt_index *index)
{
    for (int i = 0; i < NUM_ARRAYS; i++) {
        index_array_free(&index->arrays[i]);
    }
}
