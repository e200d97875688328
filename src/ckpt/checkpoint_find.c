#include <dirent.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/log.h"
#include "ckpt/checkpoint.h"
#include "ckpt/checkpoint_layout.h"
#include "ckpt/checkpoint_verify.h"
#include "ckpt/manifest.h"

enum { TRACKER_MAX_BYTES = 64 };

bool checkpoint_is_at(const char *path)
{
    char manifest_path[PATH_LENGTH_MAX];

    return path_format(manifest_path, "%s/%s", path, MANIFEST_NAME) == 0 &&
           path_exists(manifest_path);
}

/* The tracker's content: a decimal iteration or "release", perhaps with a newline. */
static int parse_tracker(const char *path, int64_t *iteration, bool *release)
{
    size_t length;
    char *text = path_read_file(path, TRACKER_MAX_BYTES, &length);
    size_t digits;
    int result = 0;

    if (text == NULL) {
        return -1;
    }
    text[strcspn(text, " \r\n")] = '\0';
    digits = strspn(text, "0123456789");
    *release = strcmp(text, CHECKPOINT_RELEASE) == 0;
    *iteration = 0;
    if (digits > 0 && digits <= 18 && text[digits] == '\0') {
        *iteration = strtoll(text, NULL, 10);
    } else if (!*release) {
        result = error_set("%s holds \"%s\", neither an iteration nor \"release\"", path, text);
    }
    free(text);
    return result;
}

/* A checkpoint that was being replaced where directories cannot be exchanged (checkpoint_save.c).
 */
static bool find_old(const char *directory, const char *name, char path[PATH_LENGTH_MAX])
{
    DIR *entries = opendir(directory);
    bool found = false;

    for (struct dirent *entry; entries != NULL && !found && (entry = readdir(entries)) != NULL;) {
        struct checkpoint_entry parsed;

        checkpoint_parse_entry(&parsed, entry->d_name);
        found = parsed.kind == ENTRY_OLD && strcmp(parsed.name, name) == 0 &&
                path_format(path, "%s/%s", directory, entry->d_name) == 0;
    }
    if (entries != NULL) {
        closedir(entries);
    }
    return found;
}

static enum checkpoint_found find_named(const char *directory, int64_t iteration, bool release,
                                        char path[PATH_LENGTH_MAX])
{
    char name[CHECKPOINT_NAME_MAX];

    checkpoint_directory_name(name, iteration, release);
    TRY(path_format(path, "%s/%s", directory, name));
    if (path_is_directory(path) || find_old(directory, name, path)) {
        return CHECKPOINT_FOUND;
    }
    error_set("there is no checkpoint %s in %s", name, directory);
    return checkpoint_offer_other(directory, NULL);
}

static enum checkpoint_found find_without_tracker(const char *directory, char path[PATH_LENGTH_MAX])
{
    if (checkpoint_newest_complete(directory, NULL, path) < -1) {
        return CHECKPOINT_NONE;
    }
    log_warn("%s has no %s; taking its newest complete checkpoint, %s", directory,
             CHECKPOINT_TRACKER, path);
    return CHECKPOINT_FOUND;
}

enum checkpoint_found checkpoint_find(const char *load_directory, int64_t ckpt_step,
                                      char path[PATH_LENGTH_MAX])
{
    char tracker[PATH_LENGTH_MAX];
    int64_t iteration;
    bool release;

    if (ckpt_step >= 0) {
        return find_named(load_directory, ckpt_step, false, path);
    }
    if (checkpoint_is_at(load_directory)) {
        return path_format(path, "%s", load_directory) == 0 ? CHECKPOINT_FOUND : CHECKPOINT_ERROR;
    }
    TRY(path_format(tracker, "%s/%s", load_directory, CHECKPOINT_TRACKER));
    if (!path_exists(tracker)) {
        return find_without_tracker(load_directory, path);
    }
    if (parse_tracker(tracker, &iteration, &release) != 0) {
        return checkpoint_offer_other(load_directory, NULL);
    }
    return find_named(load_directory, iteration, release, path);
}

enum checkpoint_found checkpoint_find_together(const struct checkpoint_ranks *ranks,
                                               const char *load_directory, int64_t ckpt_step,
                                               char path[PATH_LENGTH_MAX])
{
    enum checkpoint_found found = CHECKPOINT_NONE;

    path[0] = '\0';
    if (checkpoint_ranks_index(ranks) == 0) {
        found = checkpoint_find(load_directory, ckpt_step, path);
    }
    checkpoint_ranks_share(ranks, &found, sizeof found);
    if (found == CHECKPOINT_ERROR) {
        checkpoint_ranks_share_error(ranks);
    } else if (found == CHECKPOINT_FOUND) {
        checkpoint_ranks_share(ranks, path, PATH_LENGTH_MAX);
    }
    return found;
}
