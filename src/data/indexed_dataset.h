/* indexed_dataset.h - Megatron's data set on disk: PREFIX.bin holds raw tokens, PREFIX.idx says
 * where each sequence lies (the byte layout is in indexed_dataset.c).
 *
 * Both files are mapped. Opening reads .idx once, to check it, and touches nothing of .bin, so a
 * set of any size opens as fast as its index can be read. */
#ifndef CADRE_DATA_INDEXED_DATASET_H
#define CADRE_DATA_INDEXED_DATASET_H

#include <stdbool.h>
#include <stdint.h>

#include "base/path.h"
#include "data/mapped_file.h"

/* The values are the format's codes. */
enum token_dtype {
    TOKEN_U8 = 1,
    TOKEN_I8,
    TOKEN_I16,
    TOKEN_I32,
    TOKEN_I64,
    TOKEN_F64,
    TOKEN_F32,
    TOKEN_U16,
};

/* 0 for a code that is none. */
int token_dtype_bytes(int code);
const char *token_dtype_name(int code);
/* The type that preprocessing stores: u16 below 65500 tokens, else i32. */
enum token_dtype token_dtype_for_vocab(int64_t vocab_size);

struct indexed_dataset {
    char prefix[PATH_LENGTH_MAX];
    struct mapped_file idx, bin;
    enum token_dtype dtype;
    int64_t num_sequences, num_documents;
    /* Arrays inside idx, none of them aligned: read them with the functions below. */
    const uint8_t *lengths, *pointers, *document_starts;
};

int indexed_dataset_open(struct indexed_dataset *set, const char *prefix);
void indexed_dataset_close(struct indexed_dataset *set);

/* Tokens in a sequence. */
int32_t indexed_dataset_length(const struct indexed_dataset *set, int64_t sequence);
/* Where a sequence starts in .bin, in bytes. */
int64_t indexed_dataset_pointer(const struct indexed_dataset *set, int64_t sequence);
/* First sequence of a document; document = num_documents gives num_sequences. */
int64_t indexed_dataset_document_start(const struct indexed_dataset *set, int64_t document);
/* Tokens [first, first + count) of a sequence, which must lie inside it. Sets of floats, and tokens
 * outside [0, INT32_MAX], are errors. */
int indexed_dataset_read(const struct indexed_dataset *set, int64_t sequence, int64_t first,
                         int64_t count, int32_t *tokens);

#endif
