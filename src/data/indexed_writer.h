/* indexed_writer.h - writes PREFIX.bin and PREFIX.idx, byte for byte as Megatron's builder does.
 *
 *     struct indexed_writer *writer = indexed_writer_open(prefix, TOKEN_U16);
 *     for each document:
 *         for each of its sequences: indexed_writer_add_sequence(writer, tokens, count);
 *         indexed_writer_end_document(writer);
 *     indexed_writer_finish(writer) or indexed_writer_abandon(writer);
 *
 * Tokens are streamed; 4 bytes a sequence and 8 a document are kept in memory. The files appear
 * under their names only in finish, complete and synced. */
#ifndef CADRE_DATA_INDEXED_WRITER_H
#define CADRE_DATA_INDEXED_WRITER_H

#include <stdint.h>

#include "data/indexed_dataset.h"

struct indexed_writer;

/* dtype is an integer type. NULL with error_set(). */
struct indexed_writer *indexed_writer_open(const char *prefix, enum token_dtype dtype);
/* A token that dtype cannot hold is an error. */
int indexed_writer_add_sequence(struct indexed_writer *writer, const int32_t *tokens,
                                int64_t count);
/* A document may have no sequence. */
void indexed_writer_end_document(struct indexed_writer *writer);
int64_t indexed_writer_num_tokens(const struct indexed_writer *writer);
/* Both free the writer. After a failed finish no new file is left. */
int indexed_writer_finish(struct indexed_writer *writer);
void indexed_writer_abandon(struct indexed_writer *writer); /* NULL is fine */

#endif
