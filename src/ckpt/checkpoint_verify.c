#include "ckpt/checkpoint_verify.h"

#include <dirent.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "ckpt/checkpoint.h"
#include "ckpt/checkpoint_layout.h"

enum { NO_CHECKPOINT = -2 };

static int verify_file(const char *path, const struct manifest_file *file, bool with_hash)
{
    char file_path[PATH_LENGTH_MAX], hash[CONTENT_HASH_TEXT_BYTES];
    int64_t size_bytes;

    TRY(path_format(file_path, "%s/%s", path, file->name));
    TRY(path_file_size(file_path, &size_bytes));
    if (size_bytes != file->size_bytes) {
        return error_set("%s: %lld bytes, the manifest says %lld", file->name,
                         (long long)size_bytes, (long long)file->size_bytes);
    }
    if (!with_hash) {
        return 0;
    }
    TRY(content_hash_file(file_path, hash));
    if (strcmp(hash, file->hash) != 0) {
        return error_set("%s: its content has hash %s, the manifest says %s", file->name, hash,
                         file->hash);
    }
    return 0;
}

int checkpoint_verify_files(const char *path, const struct manifest *manifest, int part,
                            int num_parts)
{
    for (int i = 0; i < manifest->num_files; i++) {
        TRY(verify_file(path, &manifest->files[i], i % num_parts == part));
    }
    return 0;
}

static bool is_complete(const char *path)
{
    struct manifest manifest;
    bool complete;

    if (manifest_read(&manifest, path) != 0) {
        return false;
    }
    complete = checkpoint_verify_files(path, &manifest, 0, 1) == 0;
    manifest_free(&manifest);
    return complete;
}

/* ---- the newest ---- */

struct candidate {
    int64_t iteration;
    char *file_name;
};

static int newest_first(const void *left, const void *right)
{
    const struct candidate *a = left, *b = right;

    if (a->iteration != b->iteration) {
        return a->iteration > b->iteration ? -1 : 1;
    }
    return strcmp(a->file_name, b->file_name); /* "iter_X" before "iter_X.old-..." */
}

/* The checkpoints in the directory by their names; the caller frees. */
static struct candidate *list_candidates(const char *directory, int *num_candidates)
{
    struct candidate *candidates = NULL;
    DIR *entries = opendir(directory);

    *num_candidates = 0;
    for (struct dirent *entry; entries != NULL && (entry = readdir(entries)) != NULL;) {
        struct checkpoint_entry parsed;

        checkpoint_parse_entry(&parsed, entry->d_name);
        if (parsed.kind != ENTRY_COMPLETE && parsed.kind != ENTRY_OLD) {
            continue;
        }
        candidates = realloc(candidates, (size_t)(*num_candidates + 1) * sizeof *candidates);
        CHECK(candidates != NULL, "out of memory");
        candidates[*num_candidates].iteration = parsed.iteration;
        candidates[*num_candidates].file_name = strdup(entry->d_name);
        CHECK(candidates[*num_candidates].file_name != NULL, "out of memory");
        ++*num_candidates;
    }
    if (entries != NULL) {
        closedir(entries);
    }
    if (*num_candidates > 1) {
        qsort(candidates, (size_t)*num_candidates, sizeof *candidates, newest_first);
    }
    return candidates;
}

int64_t checkpoint_newest_complete(const char *directory, const char *except,
                                   char path[PATH_LENGTH_MAX])
{
    int num_candidates;
    struct candidate *candidates = list_candidates(directory, &num_candidates);
    int64_t newest = NO_CHECKPOINT;

    for (int i = 0; i < num_candidates; i++) {
        if (newest == NO_CHECKPOINT &&
            path_format(path, "%s/%s", directory, candidates[i].file_name) == 0 &&
            (except == NULL || strcmp(candidates[i].file_name, except) != 0) && is_complete(path)) {
            newest = candidates[i].iteration;
        }
    }
    for (int i = 0; i < num_candidates; i++) {
        free(candidates[i].file_name);
    }
    free(candidates);
    return newest;
}

int checkpoint_offer_other(const char *directory, const char *except)
{
    char *message = strdup(error_text());
    char path[PATH_LENGTH_MAX];
    int64_t newest;

    CHECK(message != NULL, "out of memory");
    newest = checkpoint_newest_complete(directory, except, path);
    if (newest >= 0) {
        error_set("%s; the newest complete one is %s: pass --ckpt-step %lld", message, path,
                  (long long)newest);
    } else if (newest != NO_CHECKPOINT) {
        error_set("%s; a complete one is %s: pass --load %s", message, path, path);
    } else {
        error_set("%s; there is no other complete one in %s", message, directory);
    }
    free(message);
    return -1;
}
