#include "base/arena.h"

#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

enum { BLOCKS_MAX = 256, ARENAS_MAX = 256 };

static const size_t block_min_bytes = (size_t)16 << 20;

struct block {
    char *memory;
    size_t size_bytes;
};

struct arena {
    const char *name;
    struct memory_source source;
    struct block blocks[BLOCKS_MAX];
    int num_blocks;
    int current;        /* block being filled */
    size_t used_bytes;  /* of the current block */
    size_t total_bytes; /* handed out, over all blocks */
    size_t peak_bytes;
};

static struct arena *all_arenas[ARENAS_MAX]; /* for the out-of-memory message */
static pthread_mutex_t all_arenas_lock = PTHREAD_MUTEX_INITIALIZER;
static char explanation[1024]; /* "" or "; TEXT" */

static void list_replace(struct arena *from, struct arena *to)
{
    pthread_mutex_lock(&all_arenas_lock);
    for (int i = 0; i < ARENAS_MAX; i++) {
        if (all_arenas[i] == from) {
            all_arenas[i] = to;
            break;
        }
    }
    pthread_mutex_unlock(&all_arenas_lock);
}

struct arena *arena_create(const char *name, const struct memory_source *source)
{
    struct arena *arena = calloc(1, sizeof *arena);

    CHECK(arena != NULL, "out of memory for arena %s", name);
    arena->name = name;
    arena->source = *source;
    list_replace(NULL, arena);
    return arena;
}

void arena_destroy(struct arena *arena)
{
    if (arena == NULL) {
        return;
    }
    for (int i = 0; i < arena->num_blocks; i++) {
        arena->source.release(arena->source.context, arena->blocks[i].memory,
                              arena->blocks[i].size_bytes);
    }
    list_replace(arena, NULL);
    free(arena);
}

static void print_arenas(void)
{
    for (int i = 0; i < ARENAS_MAX; i++) {
        const struct arena *arena = all_arenas[i];

        if (arena != NULL) {
            fprintf(stderr, "cadre:   arena %-24s %10.1f MB in use, %10.1f MB at most\n",
                    arena->name, (double)arena->total_bytes / 1e6, (double)arena->peak_bytes / 1e6);
        }
    }
}

static void add_block(struct arena *arena, size_t size_bytes)
{
    struct block *block = &arena->blocks[arena->num_blocks];

    CHECK(arena->num_blocks < BLOCKS_MAX, "arena %s has %d blocks", arena->name, BLOCKS_MAX);
    block->memory = arena->source.allocate(arena->source.context, size_bytes);
    if (block->memory == NULL) {
        print_arenas();
        PANIC("out of memory: arena %s asked for %.1f MB more%s", arena->name,
              (double)size_bytes / 1e6, explanation);
    }
    block->size_bytes = size_bytes;
    arena->num_blocks++;
}

void arena_explain(const char *format, ...)
{
    const int start = snprintf(explanation, sizeof explanation, "; ");
    va_list args;

    va_start(args, format);
    vsnprintf(explanation + start, sizeof explanation - (size_t)start, format, args);
    va_end(args);
}

static size_t round_up(size_t size_bytes)
{
    return (size_bytes + ARENA_ALIGNMENT_BYTES - 1) / ARENA_ALIGNMENT_BYTES * ARENA_ALIGNMENT_BYTES;
}

void arena_reserve(struct arena *arena, size_t size_bytes)
{
    CHECK(arena->num_blocks == 0, "arena %s is in use", arena->name);
    if (size_bytes > 0) {
        add_block(arena, round_up(size_bytes));
    }
}

/* Moves to the next block that holds size_bytes; adds one when there is none. */
static void next_block(struct arena *arena, size_t size_bytes)
{
    while (arena->current + 1 < arena->num_blocks) {
        arena->current++;
        if (arena->blocks[arena->current].size_bytes >= size_bytes) {
            arena->used_bytes = 0;
            return;
        }
    }
    add_block(arena, size_bytes > block_min_bytes ? size_bytes : block_min_bytes);
    arena->current = arena->num_blocks - 1;
    arena->used_bytes = 0;
}

void *arena_allocate(struct arena *arena, size_t size_bytes)
{
    const size_t rounded = round_up(size_bytes > 0 ? size_bytes : 1);
    void *address;

    if (arena->num_blocks == 0 ||
        arena->blocks[arena->current].size_bytes - arena->used_bytes < rounded) {
        next_block(arena, rounded);
    }
    address = arena->blocks[arena->current].memory + arena->used_bytes;
    arena->used_bytes += rounded;
    arena->total_bytes += rounded;
    if (arena->total_bytes > arena->peak_bytes) {
        arena->peak_bytes = arena->total_bytes;
    }
    return address;
}

struct arena_mark arena_mark(const struct arena *arena)
{
    return (struct arena_mark){arena->current, arena->used_bytes, arena->total_bytes};
}

void arena_release(struct arena *arena, struct arena_mark mark)
{
    CHECK(mark.total_bytes <= arena->total_bytes, "arena %s released out of order", arena->name);
    arena->current = mark.block;
    arena->used_bytes = mark.used_bytes;
    arena->total_bytes = mark.total_bytes;
}

size_t arena_used_bytes(const struct arena *arena)
{
    return arena->total_bytes;
}

size_t arena_peak_bytes(const struct arena *arena)
{
    return arena->peak_bytes;
}
