/* dist_run.h - a training run from flags, for the programs that build whole trainers. */
#ifndef CADRE_TESTS_DIST_DIST_RUN_H
#define CADRE_TESTS_DIST_DIST_RUN_H

#include <string.h>

#include "args/options.h"
#include "base/check.h"
#include "comm/launch.h"
#include "dist_test.h"

/* Options of the flags in three texts, separated by blanks, validated for the ranks of this job. */
static inline int dist_parse(struct options *options, const char *base, const char *model,
                             const char *mapping)
{
    static char words[4096];
    char *argv[128];
    int argc = 0;

    snprintf(words, sizeof words, "%s %s %s", base, model, mapping);
    for (char *word = strtok(words, " "); word != NULL; word = strtok(NULL, " ")) {
        argv[argc++] = word;
    }
    TRY(options_init(options));
    TRY(options_parse(options, argc, argv));
    return options_validate(options, launch_size());
}

/* After a case: result, what its function returned; before, num_failures when it began. */
static inline void dist_judge(int result, int before, const char *flags)
{
    if (result != 0) {
        dist_failed("%s", error_text());
    }
    if (num_failures > before) {
        dist_failed("... with the flags %s", flags);
    }
}

#endif
