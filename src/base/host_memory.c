#include "base/host_memory.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

enum { PATH_BYTES = 4096, LINE_BYTES = 512 };

/* The number after key at the start of a line; -1 where there is none. */
static int64_t number_after(const char *path, const char *key)
{
    FILE *file = fopen(path, "r");
    const size_t length = strlen(key);
    int64_t number = -1;
    char line[LINE_BYTES];

    while (file != NULL && number < 0 && fgets(line, sizeof line, file) != NULL) {
        if (strncmp(line, key, length) != 0 || sscanf(line + length, "%" SCNd64, &number) != 1) {
            number = -1;
        }
    }
    if (file != NULL) {
        fclose(file);
    }
    return number;
}

/* The files of the memory controller, in both versions of control groups. */
struct group_files {
    const char *prefix; /* of its line in /proc/self/cgroup, after the hierarchy's number */
    const char *folder, *limit, *usage, *active_file, *inactive_file;
};

static const struct group_files versions[] = {
    {"::", "sys/fs/cgroup", "memory.max", "memory.current", "active_file ", "inactive_file "},
    {":memory:", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes",
     "total_active_file ", "total_inactive_file "},
};

/* The path of this process's group below the controller's folder; "" where it is not listed. */
static void own_group(const char *root, const struct group_files *files, char *group)
{
    char path[PATH_BYTES], line[PATH_BYTES];
    FILE *file;

    group[0] = '\0';
    snprintf(path, sizeof path, "%s/proc/self/cgroup", root);
    file = fopen(path, "r");
    while (file != NULL && fgets(line, sizeof line, file) != NULL) {
        const char *rest = line + strspn(line, "0123456789");

        line[strcspn(line, "\n")] = '\0';
        if (strncmp(rest, files->prefix, strlen(files->prefix)) == 0) {
            snprintf(group, PATH_BYTES, "%s", rest + strlen(files->prefix));
        }
    }
    if (file != NULL) {
        fclose(file);
    }
}

static int64_t number_in_group(const char *root, const struct group_files *files, const char *group,
                               const char *name, const char *key)
{
    char path[2 * PATH_BYTES + LINE_BYTES];

    snprintf(path, sizeof path, "%s/%s%s/%s", root, files->folder, group, name);
    return number_after(path, key);
}

/* limit - usage, with the file pages that the kernel gives up when asked. */
static int64_t left_in_group(const char *root, const struct group_files *files)
{
    char group[PATH_BYTES];
    int64_t limit, usage, active, inactive;

    own_group(root, files, group);
    limit = number_in_group(root, files, group, files->limit, "");
    if (limit < 0) {
        group[0] = '\0'; /* in a container its own group is the folder itself */
        limit = number_in_group(root, files, group, files->limit, "");
    }
    usage = number_in_group(root, files, group, files->usage, "");
    if (limit < 0 || usage < 0) {
        return INT64_MAX;
    }
    active = number_in_group(root, files, group, "memory.stat", files->active_file);
    inactive = number_in_group(root, files, group, "memory.stat", files->inactive_file);
    usage -= (active > 0 ? active : 0) + (inactive > 0 ? inactive : 0);
    return limit > usage ? limit - usage : 0;
}

static int64_t available_in_machine(const char *root)
{
    char path[PATH_BYTES];
    int64_t available_kib, swap_kib;

    snprintf(path, sizeof path, "%s/proc/meminfo", root);
    available_kib = number_after(path, "MemAvailable:");
    swap_kib = number_after(path, "SwapFree:");
    if (available_kib < 0) {
        return INT64_MAX;
    }
    return 1024 * (available_kib + (swap_kib > 0 ? swap_kib : 0));
}

int64_t host_memory_available_bytes(const char *root)
{
    int64_t bytes = available_in_machine(root);

    for (size_t i = 0; i < sizeof versions / sizeof versions[0]; i++) {
        const int64_t left = left_in_group(root, &versions[i]);

        bytes = left < bytes ? left : bytes;
    }
    return bytes;
}
