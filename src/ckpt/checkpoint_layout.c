#include "ckpt/checkpoint_layout.h"

#include <ctype.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

void (*checkpoint_test_hook)(const char *stage);
bool checkpoint_can_exchange = true;

void checkpoint_directory_name(char name[CHECKPOINT_NAME_MAX], int64_t iteration, bool release)
{
    if (release) {
        snprintf(name, CHECKPOINT_NAME_MAX, "%s", CHECKPOINT_RELEASE);
    } else {
        snprintf(name, CHECKPOINT_NAME_MAX, "iter_%07lld", (long long)iteration);
    }
}

static void host_name(char host[65])
{
    if (gethostname(host, 64) != 0) {
        strcpy(host, "host");
    }
    host[64] = '\0';
}

void checkpoint_aside_name(char aside[CHECKPOINT_NAME_MAX], const char *name, const char *kind)
{
    char host[65];

    host_name(host);
    snprintf(aside, CHECKPOINT_NAME_MAX, "%.100s.%s-%s-%ld", name, kind, host, (long)getpid());
}

/* Length of "release" or "iter_DIGITS" at the start of text, 0 if there is neither. */
static size_t name_length(const char *text, int64_t *iteration)
{
    const size_t prefix = strlen("iter_");
    size_t digits;

    *iteration = -1;
    if (strncmp(text, CHECKPOINT_RELEASE, strlen(CHECKPOINT_RELEASE)) == 0) {
        return strlen(CHECKPOINT_RELEASE);
    }
    if (strncmp(text, "iter_", prefix) != 0) {
        return 0;
    }
    digits = strspn(text + prefix, "0123456789");
    if (digits < 7 || digits > 18) {
        return 0;
    }
    *iteration = strtoll(text + prefix, NULL, 10);
    return prefix + digits;
}

/* suffix: "HOST-PID". */
static void parse_owner(struct checkpoint_entry *entry, const char *suffix)
{
    const char *dash = strrchr(suffix, '-');
    char host[65];

    host_name(host);
    if (dash != NULL && isdigit((unsigned char)dash[1])) {
        entry->is_local =
            strlen(host) == (size_t)(dash - suffix) && strncmp(host, suffix, strlen(host)) == 0;
        entry->pid = strtol(dash + 1, NULL, 10);
    }
}

void checkpoint_parse_entry(struct checkpoint_entry *entry, const char *file_name)
{
    int64_t iteration;
    const size_t length = name_length(file_name, &iteration);
    const char *rest = file_name + length;

    *entry = (struct checkpoint_entry){.iteration = iteration};
    if (length == 0) {
        return;
    }
    snprintf(entry->name, sizeof entry->name, "%.*s", (int)length, file_name);
    if (*rest == '\0') {
        entry->kind = ENTRY_COMPLETE;
    } else if (strncmp(rest, ".tmp-", 5) == 0) {
        entry->kind = ENTRY_TEMPORARY;
        parse_owner(entry, rest + 5);
    } else if (strncmp(rest, ".old-", 5) == 0) {
        entry->kind = ENTRY_OLD;
        parse_owner(entry, rest + 5);
    }
}
