#include "comm/delay.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"

enum { DELAYS_MAX = 32, GROUP_NAME_MAX = 32 };

static struct {
    char group[GROUP_NAME_MAX];
    struct comm_delay delay;
} delays[DELAYS_MAX];
static int num_delays;

/* The entry [text, text + length). */
static int parse_entry(const char *text, size_t length)
{
    const char *colon = memchr(text, ':', length);
    const size_t name_length = colon != NULL ? (size_t)(colon - text) : 0;
    char *end = NULL;
    double ms = -1.0;
    bool is_rate = false;

    if (name_length > 0) {
        ms = strtod(colon + 1, &end);
        is_rate = end != colon + 1 && end + 3 == text + length && memcmp(end, "/MB", 3) == 0;
        end += is_rate ? 3 : 0;
    }
    if (name_length == 0 || name_length >= GROUP_NAME_MAX || end != text + length ||
        end == colon + 1 || !isfinite(ms) || ms < 0.0 || num_delays == DELAYS_MAX) {
        return error_set("CADRE_COMM_DELAY_MS has '%.*s'; legal: at most %d entries GROUP:MS "
                         "or GROUP:MS/MB separated by commas, such as dp-cp:20,ep:5/MB",
                         (int)length, text, DELAYS_MAX);
    }
    memcpy(delays[num_delays].group, text, name_length);
    delays[num_delays].group[name_length] = '\0';
    delays[num_delays++].delay = (struct comm_delay){.seconds = is_rate ? 0.0 : 1e-3 * ms,
                                                     .seconds_per_byte = is_rate ? 1e-9 * ms : 0.0};
    return 0;
}

int comm_delay_parse(const char *text)
{
    num_delays = 0;
    while (text != NULL && *text != '\0') {
        const size_t length = strcspn(text, ",");

        TRY(parse_entry(text, length));
        text += length;
        text += *text == ',';
    }
    return 0;
}

struct comm_delay comm_delay_of(const char *group)
{
    for (int i = 0; i < num_delays; i++) {
        if (strcmp(delays[i].group, group) == 0 || strcmp(delays[i].group, "all") == 0) {
            return delays[i].delay;
        }
    }
    return (struct comm_delay){0};
}
