/* options_rules.h - what the files of rules share. Inside src/args only.
 *
 * Rules cite reference/megatron.md section 4.5 by number as "M4.5.n". */
#ifndef CADRE_ARGS_OPTIONS_RULES_H
#define CADRE_ARGS_OPTIONS_RULES_H

#include "args/options.h"

/* Stores a value that follows from others, unless the flag was given. */
void options_derive_int(struct options *o, const char *flag, int64_t *field, int64_t value);
void options_derive_float(struct options *o, const char *flag, double *field, double value);
int options_derive_text(struct options *o, const char *flag, const char *text);
/* Overrides a field whatever was given, and says so in its origin. */
void options_mark_derived(struct options *o, const char *flag);

/* "--x V is not divisible by --y D: ..." listing the divisors of V, or 0. */
int options_check_divisible(const char *what, int64_t value, const char *by, int64_t divisor);

/* Warns when the flag was typed although it has no effect; needs says what it would take. */
void options_warn_unless(const struct options *o, const char *flag, bool has_effect,
                         const char *needs);

bool options_balances_by(const struct options *o, const char *type);

#endif
