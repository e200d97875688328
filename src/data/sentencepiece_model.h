/* sentencepiece_model.h - a look at a SentencePiece .model file before its library sees it. */
#ifndef CADRE_DATA_SENTENCEPIECE_MODEL_H
#define CADRE_DATA_SENTENCEPIECE_MODEL_H

#include <stddef.h>
#include <stdint.h>

/* -1 with error_set() naming path if the bytes are not a model that the library can be trusted to
 * load and use. Widely used versions of it follow unchecked offsets out of such files
 * (CVE-2026-1260 and upstream issues 1263 and 1269). */
int sentencepiece_model_check(const uint8_t *bytes, size_t num_bytes, const char *path);

#endif
