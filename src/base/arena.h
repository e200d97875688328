/* arena.h - memory by lifetime: an arena is a stack of bytes with a name and a high-water mark.
 *
 * Three lifetimes cover a training run: "run" (parameters, gradients, optimizer), "microbatch"
 * (what forward saves for backward, released layer by layer in reverse) and "call" (scratch of one
 * layer or op). Memory comes from a source (a device's allocator) in blocks that are kept until
 * arena_destroy, so after the first step nothing is allocated. */
#ifndef CADRE_BASE_ARENA_H
#define CADRE_BASE_ARENA_H

#include <stddef.h>

#include "base/check.h"

enum { ARENA_ALIGNMENT_BYTES = 256 }; /* of every address handed out */

/* Where an arena's blocks come from. allocate returns ARENA_ALIGNMENT_BYTES-aligned memory or NULL.
 */
struct memory_source {
    void *(*allocate)(void *context, size_t size_bytes);
    void (*release)(void *context, void *address, size_t size_bytes);
    void *context;
};

struct arena;

struct arena_mark {
    int block;
    size_t used_bytes, total_bytes;
};

/* The name (a literal) and all arenas' peaks appear in the out-of-memory message. */
struct arena *arena_create(const char *name, const struct memory_source *source);
void arena_destroy(struct arena *arena);
/* Makes the first block at least this large, so that a planned size needs one block. */
void arena_reserve(struct arena *arena, size_t size_bytes);
/* Uninitialised memory. Stops the job with a table of all arenas when the source is exhausted. */
void *arena_allocate(struct arena *arena, size_t size_bytes);
/* What makes memory swell, such as uneven routing, if anything does: one line of the out-of-memory
 * message, in place of the one given before. */
void arena_explain(const char *format, ...) PRINTF_LIKE(1, 2);
/* Everything allocated after the mark is given up by arena_release. */
struct arena_mark arena_mark(const struct arena *arena);
void arena_release(struct arena *arena, struct arena_mark mark);

size_t arena_used_bytes(const struct arena *arena);
size_t arena_peak_bytes(const struct arena *arena);

#endif
