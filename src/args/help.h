/* help.h - what a user reads about the flags, written from the rows. */
#ifndef CADRE_ARGS_HELP_H
#define CADRE_ARGS_HELP_H

#include "args/option_table.h"

/* If argv holds --help or -h: prints the help to out (NULL: nothing) and returns true. `--help moe`
 * prints one group; `--help --seq-length` one flag. Call it before parsing. */
bool help_requested(const struct option_table *table, int argc, char **argv, FILE *out);

/* topic: a group, a flag, or NULL for everything. -1 with error_set() for an unknown topic. */
int help_print(const struct option_table *table, const char *topic, FILE *out);

/* The documents of the whole program, from the tables of its commands. */
void help_print_man(const struct option_table *const *tables, int num_tables, FILE *out);
void help_print_completion(const struct option_table *const *tables, int num_tables, FILE *out);
void help_print_markdown(const struct option_table *const *tables, int num_tables, FILE *out);

#endif
