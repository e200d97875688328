/* oracle_case.h - one case of an oracle program: what was computed is compared with what the
 * reference wrote down, and one line is printed.
 *
 *     struct oracle_case c;
 *     oracle_case_begin(&c, "drop-probs", 1e-5);
 *     oracle_compare(&c, "y", got, expected, count);
 *     oracle_case_end(&c, 0);      "ok   drop-probs   worst 1.2e-07 (y)"
 */
#ifndef CADRE_TESTS_ORACLE_ORACLE_CASE_H
#define CADRE_TESTS_ORACLE_ORACLE_CASE_H

#include <math.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "base/check.h"

struct oracle_case {
    char name[128];
    double tolerance;
    double worst;
    char worst_of[128];
};

struct oracle_tally {
    int num_cases, num_failed;
};
static struct oracle_tally oracle_tally;

static inline void oracle_case_begin(struct oracle_case *c, const char *name, double tolerance)
{
    *c = (struct oracle_case){.tolerance = tolerance};
    snprintf(c->name, sizeof c->name, "%s", name);
}

static inline void oracle_note(struct oracle_case *c, const char *what, double error)
{
    if (c->worst_of[0] == '\0' || !(error <= c->worst)) { /* a NaN is the worst */
        c->worst = error;
        snprintf(c->worst_of, sizeof c->worst_of, "%s", what);
    }
}

/* The largest error of got[n], relative to the largest expected value; the error itself where all
 * expected values are zero. */
static inline double oracle_error(const float *got, const float *expected, int64_t n)
{
    double largest = 0.0, error = 0.0;

    for (int64_t i = 0; i < n; i++) {
        const double difference = fabs((double)got[i] - (double)expected[i]);

        if (!isfinite(difference)) {
            return NAN;
        }
        error = fmax(error, difference);
        largest = fmax(largest, fabs((double)expected[i]));
    }
    return largest > 0.0 ? error / largest : error;
}

static inline void oracle_compare(struct oracle_case *c, const char *what, const float *got,
                                  const float *expected, int64_t n)
{
    oracle_note(c, what, oracle_error(got, expected, n));
}

/* status: of the function that ran the case; where it is not 0, the recorded error is the reason.
 */
static inline void oracle_case_end(const struct oracle_case *c, int status)
{
    const bool good = status == 0 && c->worst <= c->tolerance;

    oracle_tally.num_cases++;
    oracle_tally.num_failed += !good;
    if (status != 0) {
        printf("FAIL %-34s %s\n", c->name, error_text());
    } else {
        printf("%s %-34s worst %.1e (%s)\n", good ? "ok  " : "FAIL", c->name, c->worst,
               c->worst_of[0] != '\0' ? c->worst_of : "nothing compared");
    }
    fflush(stdout);
}

#endif
