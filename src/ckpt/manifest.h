/* manifest.h - metadata.json, the file that makes a directory a checkpoint: what was saved beside
 * the tensors, and which files belong to it, with their sizes and hashes. Its last line is the hash
 * of all bytes before that line, so damage to the manifest itself is seen as well.
 *
 *     {
 *       "format": "cadre-checkpoint",
 *       "version": 1,
 *       "iteration": 20,
 *       "state": {...},                    the caller's: see checkpoint.h
 *       "files": [{"name": "...", "size_bytes": 1, "xxh3_128": "..."}, ...],
 *       "manifest_xxh3_128": "..."
 *     } */
#ifndef CADRE_CKPT_MANIFEST_H
#define CADRE_CKPT_MANIFEST_H

#include <jansson.h>
#include <stdint.h>

#include "ckpt/content_hash.h"

enum { MANIFEST_FILE_NAME_MAX = 128, MANIFEST_VERSION = 1 };
#define MANIFEST_NAME "metadata.json"

struct manifest_file {
    char name[MANIFEST_FILE_NAME_MAX]; /* relative: "x.safetensors" or "folder/x.safetensors" */
    int64_t size_bytes;
    char hash[CONTENT_HASH_TEXT_BYTES];
};

struct manifest {
    int64_t iteration;
    json_t *state;
    struct manifest_file *files;
    int num_files;
};

/* The text of the file; the caller frees. */
char *manifest_write(const struct manifest *manifest);
/* Checks everything that the text alone can tell. On success the caller calls manifest_free. */
int manifest_parse(struct manifest *manifest, const char *text, size_t length);
/* Of the checkpoint in the directory (iter_X). */
int manifest_read(struct manifest *manifest, const char *directory);
void manifest_free(struct manifest *manifest);

#endif
