/* content_hash.h - XXH3-128 of files and tensors, streamed. The text form is 32 hex digits, as
 * printed by `xxhsum -H2`. */
#ifndef CADRE_CKPT_CONTENT_HASH_H
#define CADRE_CKPT_CONTENT_HASH_H

#include <stddef.h>

enum { CONTENT_HASH_TEXT_BYTES = 33 };

struct content_hash;

struct content_hash *content_hash_create(void);
void content_hash_add(struct content_hash *hash, const void *bytes, size_t length);
/* Writes the text of all that was added and frees the hash. */
void content_hash_finish(struct content_hash *hash, char text[CONTENT_HASH_TEXT_BYTES]);

void content_hash_of(const void *bytes, size_t length, char text[CONTENT_HASH_TEXT_BYTES]);
int content_hash_file(const char *path, char text[CONTENT_HASH_TEXT_BYTES]);

#endif
