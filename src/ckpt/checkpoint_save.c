/* Order of a save, so that a crash between any two steps leaves a complete checkpoint:
 *   1. each rank writes and syncs its files in iter_X.tmp-HOST-PID
 *   2. rank 0 writes the manifest there and syncs the directories
 *   3. rank 0 renames it to iter_X (exchanging it with an existing iter_X), syncs the parent
 *   4. rank 0 replaces the tracker, atomically
 * Until 3 the directory is garbage that the next save clears; between 3 and 4 the tracker still
 * names the previous checkpoint. */
#include "ckpt/checkpoint.h"

#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

#include "base/check.h"
#include "base/log.h"
#include "ckpt/checkpoint_layout.h"
#include "ckpt/checkpoint_shard.h"
#include "ckpt/checkpoint_table.h"
#include "ckpt/manifest.h"

enum { FOREIGN_STALE_SECONDS = 3600, FILES_PER_RANK = 2 };

struct save {
    const struct checkpoint_save_request *request;
    char name[CHECKPOINT_NAME_MAX];
    char temporary[PATH_LENGTH_MAX], final[PATH_LENGTH_MAX];
    struct manifest_file
        *files; /* [num_ranks][FILES_PER_RANK]; those of absent kinds have no name */
};

static void reach(const char *stage)
{
    if (checkpoint_test_hook != NULL) {
        checkpoint_test_hook(stage);
    }
}

/* ---- leftovers of dead runs ---- */

/* No other process has this number; one that was this process's own is left by a failed save. */
static bool is_dead(long pid)
{
    return pid == (long)getpid() || (kill((pid_t)pid, 0) != 0 && errno == ESRCH);
}

static bool is_abandoned(const struct checkpoint_entry *entry, const char *path)
{
    struct stat info;

    if (entry->is_local) {
        return is_dead(entry->pid);
    }
    return stat(path, &info) == 0 && time(NULL) - info.st_mtime > FOREIGN_STALE_SECONDS;
}

/* The temporary file of path_write_file_atomic: "TRACKER.tmp.PID". */
static bool is_abandoned_tracker(const char *file_name)
{
    static const char prefix[] = CHECKPOINT_TRACKER ".tmp.";

    return strncmp(file_name, prefix, strlen(prefix)) == 0 &&
           is_dead(strtol(file_name + strlen(prefix), NULL, 10));
}

/* A replaced checkpoint is put back if its successor never arrived, and deleted otherwise. */
static int settle_old(const struct checkpoint_entry *entry, const char *directory, const char *path)
{
    char final[PATH_LENGTH_MAX];

    TRY(path_format(final, "%s/%s", directory, entry->name));
    if (checkpoint_is_at(final)) {
        return path_remove_tree(path);
    }
    return rename(path, final) == 0
               ? 0
               : error_set("cannot rename %s to %s: %s", path, final, strerror(errno));
}

static int clear_entry(const char *directory, const char *file_name)
{
    char path[PATH_LENGTH_MAX];
    struct checkpoint_entry entry;

    checkpoint_parse_entry(&entry, file_name);
    TRY(path_format(path, "%s/%s", directory, file_name));
    if (is_abandoned_tracker(file_name)) {
        return path_remove_tree(path);
    }
    if (entry.kind == ENTRY_TEMPORARY && is_abandoned(&entry, path)) {
        return path_remove_tree(path);
    }
    if (entry.kind == ENTRY_OLD && is_abandoned(&entry, path)) {
        return settle_old(&entry, directory, path);
    }
    return 0;
}

static int clear_leftovers(const char *directory)
{
    DIR *entries = opendir(directory);
    int result = 0;

    if (entries == NULL) {
        return error_set("cannot open directory %s: %s", directory, strerror(errno));
    }
    for (struct dirent *entry; result == 0 && (entry = readdir(entries)) != NULL;) {
        result = clear_entry(directory, entry->d_name);
    }
    closedir(entries);
    return result;
}

/* ---- the steps ---- */

static int prepare(struct save *save)
{
    const char *directory = save->request->directory;
    char optimizer[PATH_LENGTH_MAX];

    TRY(path_make_directories(directory));
    TRY(clear_leftovers(directory));
    TRY(path_format(optimizer, "%s/%s", save->temporary, CHECKPOINT_OPTIMIZER_FOLDER));
    return path_make_directories(optimizer);
}

static int write_shards(struct save *save, struct manifest_file files[FILES_PER_RANK])
{
    reach("weights");
    TRY(checkpoint_shard_write(save->request, false, save->temporary, &files[0]));
    reach("optimizer");
    return checkpoint_shard_write(save->request, true, save->temporary, &files[1]);
}

/* How many files there can be. */
static int file_capacity(const struct save *save)
{
    return checkpoint_ranks_count(&save->request->ranks) * FILES_PER_RANK;
}

static int write_manifest(const struct save *save, const struct manifest *manifest)
{
    char path[PATH_LENGTH_MAX];
    char *text = manifest_write(manifest);
    int result = path_format(path, "%s/%s", save->temporary, MANIFEST_NAME);

    if (result == 0) {
        result = path_write_file_atomic(path, text, strlen(text)); /* syncs the directory, too */
    }
    free(text);
    return result;
}

/* Opens what all ranks have written: whether they wrote it where this rank sees it, and each
 * element of each tensor once. */
static int check_files(const struct save *save, const struct manifest *manifest)
{
    struct checkpoint_table table;
    const int result = checkpoint_table_load(&table, save->temporary, manifest);

    checkpoint_table_free(&table);
    return result;
}

/* Makes the files a checkpoint. */
static int seal(const struct save *save)
{
    struct manifest manifest = {.iteration = save->request->iteration,
                                .state = save->request->state};
    int result;

    manifest.files = calloc((size_t)file_capacity(save), sizeof *manifest.files);
    CHECK(manifest.files != NULL, "out of memory");
    for (int i = 0; i < file_capacity(save); i++) {
        if (save->files[i].name[0] != '\0') {
            manifest.files[manifest.num_files++] = save->files[i];
        }
    }
    result = check_files(save, &manifest);
    if (result == 0) {
        result = write_manifest(save, &manifest);
    }
    free(manifest.files);
    return result;
}

static int sync_optimizer_folder(const struct save *save)
{
    char path[PATH_LENGTH_MAX];

    TRY(path_format(path, "%s/%s", save->temporary, CHECKPOINT_OPTIMIZER_FOLDER));
    return path_sync_directory(path);
}

static int rename_error(const char *from, const char *to)
{
    return error_set("cannot rename %s to %s: %s", from, to, strerror(errno));
}

/* Replaces final by temporary where the file system cannot exchange them: in between, the old one
 * is found under its other name. */
static int replace_in_two_steps(const struct save *save)
{
    char aside[CHECKPOINT_NAME_MAX], old[PATH_LENGTH_MAX];

    checkpoint_aside_name(aside, save->name, "old");
    TRY(path_format(old, "%s/%s", save->request->directory, aside));
    TRY(path_remove_tree(old));
    if (rename(save->final, old) != 0) {
        return rename_error(save->final, old);
    }
    reach("between renames");
    if (rename(save->temporary, save->final) != 0) {
        rename_error(save->temporary, save->final);
        if (rename(old, save->final) != 0) {
            error_prepend("%s is now %s", save->final, old);
        }
        return -1;
    }
    TRY(path_sync_directory(save->request->directory));
    return path_remove_tree(old);
}

static int publish(const struct save *save)
{
    if (!path_exists(save->final)) {
        if (rename(save->temporary, save->final) != 0) {
            return rename_error(save->temporary, save->final);
        }
        return path_sync_directory(save->request->directory);
    }
    if (checkpoint_can_exchange &&
        renameat2(AT_FDCWD, save->temporary, AT_FDCWD, save->final, RENAME_EXCHANGE) == 0) {
        TRY(path_sync_directory(save->request->directory));
        reach("exchanged");
        return path_remove_tree(save->temporary); /* now the old one */
    }
    if (checkpoint_can_exchange && errno != EINVAL && errno != ENOSYS) {
        return rename_error(save->temporary, save->final);
    }
    checkpoint_can_exchange = false;
    return replace_in_two_steps(save);
}

static int write_tracker(const struct save *save)
{
    char path[PATH_LENGTH_MAX], text[64];

    if (save->request->release) {
        snprintf(text, sizeof text, "%s", CHECKPOINT_RELEASE);
    } else {
        snprintf(text, sizeof text, "%lld", (long long)save->request->iteration);
    }
    TRY(path_format(path, "%s/%s", save->request->directory, CHECKPOINT_TRACKER));
    return path_write_file_atomic(path, text, strlen(text));
}

static int finish(struct save *save)
{
    reach("manifest");
    TRY(sync_optimizer_folder(save));
    TRY(seal(save));
    reach("publish");
    TRY(publish(save));
    reach("tracker");
    TRY(write_tracker(save));
    reach("done");
    return 0;
}

/* ---- interface ---- */

static int name_paths(struct save *save)
{
    const struct checkpoint_save_request *request = save->request;
    char aside[CHECKPOINT_NAME_MAX] = {0};

    checkpoint_directory_name(save->name, request->iteration, request->release);
    checkpoint_aside_name(aside, save->name, "tmp");
    checkpoint_ranks_share(&request->ranks, aside, sizeof aside); /* all write where rank 0 says */
    TRY(path_format(save->final, "%s/%s", request->directory, save->name));
    return path_format(save->temporary, "%s/%s", request->directory, aside);
}

/* After each step all ranks know whether it succeeded everywhere. */
static int run_steps(struct save *save)
{
    const struct checkpoint_ranks *ranks = &save->request->ranks;
    const bool leads = checkpoint_ranks_index(ranks) == 0;
    struct manifest_file mine[FILES_PER_RANK] = {0};

    TRY(checkpoint_ranks_agree(ranks, leads ? prepare(save) : 0));
    TRY(checkpoint_ranks_agree(ranks, write_shards(save, mine)));
    checkpoint_ranks_gather(ranks, mine, save->files, sizeof mine);
    return checkpoint_ranks_agree(ranks, leads ? finish(save) : 0);
}

/* Keeps the message of what went wrong, whatever happens while clearing up. */
static void remove_temporary(const struct save *save)
{
    char *message = strdup(error_text());

    CHECK(message != NULL, "out of memory");
    if (path_remove_tree(save->temporary) != 0) {
        log_warn("%s", error_text());
    }
    error_set("%s", message);
    free(message);
}

int checkpoint_save(const struct checkpoint_save_request *request)
{
    const bool leads = checkpoint_ranks_index(&request->ranks) == 0;
    struct save save = {.request = request};
    int result;

    CHECK(!leads || json_is_object(request->state), "a checkpoint without state");
    save.files = calloc((size_t)file_capacity(&save), sizeof *save.files);
    CHECK(save.files != NULL, "out of memory");
    result = checkpoint_ranks_agree(&request->ranks, name_paths(&save));
    if (result == 0) {
        result = run_steps(&save);
        if (result != 0 && leads) {
            remove_temporary(&save);
        }
    }
    free(save.files);
    return result == 0 ? 0 : error_prepend("checkpoint %s was not saved", save.final);
}
