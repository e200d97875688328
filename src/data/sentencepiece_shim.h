/* sentencepiece_shim.h - libsentencepiece, which is C++, for C. No exception leaves it. Load only
 * what sentencepiece_model_check has passed. Functions on a const processor are safe from several
 * threads. */
#ifndef CADRE_DATA_SENTENCEPIECE_SHIM_H
#define CADRE_DATA_SENTENCEPIECE_SHIM_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

struct sentencepiece_processor;

/* NULL with the reason in message. */
struct sentencepiece_processor *sentencepiece_load(const void *model, size_t num_bytes,
                                                   char *message, size_t message_bytes);
void sentencepiece_free(struct sentencepiece_processor *processor); /* NULL is fine */

int32_t sentencepiece_num_pieces(const struct sentencepiece_processor *processor);
/* -1 where the model has none. */
int32_t sentencepiece_bos(const struct sentencepiece_processor *processor);
int32_t sentencepiece_eos(const struct sentencepiece_processor *processor);
int32_t sentencepiece_pad(const struct sentencepiece_processor *processor);
/* The text of a piece, 0 <= id < num_pieces; lives as long as the processor. */
const char *sentencepiece_piece(const struct sentencepiece_processor *processor, int32_t id);

/* ids is malloc'd. -1 with the reason in message. */
int sentencepiece_encode(const struct sentencepiece_processor *processor, const char *text,
                         size_t num_bytes, int32_t **ids, int64_t *num_ids, char *message,
                         size_t message_bytes);
/* Every id is in range. *text is malloc'd and NUL-terminated. */
int sentencepiece_decode(const struct sentencepiece_processor *processor, const int32_t *ids,
                         int64_t num_ids, char **text, size_t *num_bytes, char *message,
                         size_t message_bytes);

#ifdef __cplusplus
}
#endif

#endif
