/* gpt_index.h - the order of GPT training samples over a range of sequences (reference M9.3).
 *
 * document_index: the sequences of all epochs, shuffled. Read one after the other they are a stream
 * of tokens; sample k is its tokens [k*S, k*S + S], S+1 of them, the last shared with sample k+1.
 * sample_index[k]: where in document_index, and at which token of that sequence, sample k starts.
 * shuffle_index[i]: which sample is the i-th of training. */
#ifndef CADRE_DATA_GPT_INDEX_H
#define CADRE_DATA_GPT_INDEX_H

#include <stdbool.h>
#include <stdint.h>

#include "data/index_cache.h"
#include "data/token_source.h"

struct gpt_index_config {
    int64_t first_sequence, end_sequence; /* the range of the split */
    int64_t seq_length;                   /* S */
    int64_t num_samples;                  /* wanted; negative: what one epoch holds */
    uint32_t seed;
    const char *split_name;      /* "train" */
    const char *cache_directory; /* NULL: compute, do not store */
};

struct sample_start {
    uint32_t entry;  /* of document_index */
    uint32_t offset; /* tokens into that sequence */
};

struct gpt_index {
    int64_t num_entries, num_samples; /* num_samples >= what was wanted */
    int64_t num_epochs;
    const uint32_t *document_index;          /* [num_entries] */
    const struct sample_start *sample_index; /* [num_samples + 1] */
    const uint32_t *shuffle_index;           /* [num_samples] */
    struct index_array arrays[3];
};

int gpt_index_open(struct gpt_index *index, const struct token_source *source,
                   const struct gpt_index_config *config);
void gpt_index_close(struct gpt_index *index);

#endif
