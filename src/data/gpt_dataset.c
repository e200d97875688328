#include "data/gpt_dataset.h"

#include "base/check.h"

int gpt_dataset_open(struct gpt_dataset *set, const struct token_source *source,
                     const struct gpt_index_config *config, int64_t vocab_size)
{
    set->source = source;
    set->seq_length = config->seq_length;
    set->vocab_size = vocab_size;
    return gpt_index_open(&set->index, source, config);
}

void gpt_dataset_close(struct gpt_dataset *set)
{
    gpt_index_close(&set->index);
}

int64_t gpt_dataset_num_samples(const struct gpt_dataset *set)
{
    return set->index.num_samples;
}

/* A token beyond the vocabulary would be a read far outside the embedding table. */
static int check_tokens(const struct gpt_dataset *set, int64_t sequence, int64_t first,
                        const int32_t *tokens, int64_t count)
{
    for (int64_t i = 0; set->vocab_size > 0 && i < count; i++) {
        if (tokens[i] >= set->vocab_size) {
            return error_set(
                "%s: sequence %lld holds token %d at position %lld, but the vocabulary "
                "has %lld tokens: was the data set made with another tokenizer?",
                set->source->name, (long long)sequence, tokens[i], (long long)(first + i),
                (long long)set->vocab_size);
        }
    }
    return 0;
}

int gpt_dataset_sample(const struct gpt_dataset *set, int64_t i, int32_t *tokens)
{
    const struct gpt_index *index = &set->index;
    const struct sample_start start = index->sample_index[index->shuffle_index[i]];
    int64_t entry = start.entry, first = start.offset;

    for (int64_t num_read = 0; num_read <= set->seq_length; entry++, first = 0) {
        const int64_t sequence = index->document_index[entry];
        const int64_t wanted = set->seq_length + 1 - num_read;
        int64_t count = set->source->length(set->source, sequence) - first;

        count = count < wanted ? count : wanted;
        TRY(set->source->read(set->source, sequence, first, count, tokens + num_read));
        TRY(check_tokens(set, sequence, first, tokens + num_read, count));
        num_read += count;
    }
    return 0;
}
