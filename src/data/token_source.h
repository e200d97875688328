/* token_source.h - documents of tokens, wherever they come from: an indexed data set on disk or
 * mock data. What the sample order and the samples are built on.
 *
 * "Sequence" is the format's word for the unit that is shuffled; a preprocessed document is one
 * sequence unless it was split into sentences. */
#ifndef CADRE_DATA_TOKEN_SOURCE_H
#define CADRE_DATA_TOKEN_SOURCE_H

#include <stdint.h>

struct token_source {
    const char *name;      /* for messages: the path prefix */
    int64_t num_sequences; /* at most INT32_MAX */
    /* Tokens in a sequence, >= 0. sequence is in range. */
    int32_t (*length)(const struct token_source *source, int64_t sequence);
    /* Tokens [first, first + count) of a sequence; the range lies inside it. -1 where a stored
     * token is not representable as a token id. */
    int (*read)(const struct token_source *source, int64_t sequence, int64_t first, int64_t count,
                int32_t *tokens);
    void (*close)(struct token_source *source); /* frees it */
};

/* Opens <prefix>.idx and <prefix>.bin. NULL with error_set(). */
struct token_source *token_source_open_indexed(const char *prefix);
/* Mock data (see mock_tokens.c); eod ends each document and vocab_size bounds its tokens. */
struct token_source *token_source_open_mock(int64_t vocab_size, int32_t eod);
void token_source_close(struct token_source *source); /* NULL is fine */

#endif
