/* preprocess_document.h - one document of preprocess.h: a line of JSON, or a whole text, to tokens.
 */
#ifndef CADRE_DATA_PREPROCESS_DOCUMENT_H
#define CADRE_DATA_PREPROCESS_DOCUMENT_H

#include <stddef.h>

#include "data/preprocess.h"

/* Documents of one key, encoded, one after the other. */
struct encoded {
    struct token_list tokens;
    struct token_list lengths;       /* tokens of each sequence */
    struct token_list num_sequences; /* sequences of each document */
};

/* Both append one document to each key's encoded [num_keys]. */
int encode_json_line(const struct preprocess_config *config, const char *line, size_t num_bytes,
                     struct encoded *encoded);
int encode_text(const struct preprocess_config *config, const char *text, size_t num_bytes,
                struct encoded *encoded);

void encoded_clear(struct encoded *encoded);
void encoded_free(struct encoded *encoded);

#endif
