/* option_value.h - one value of one row: text to field and back. Inside src/args only. */
#ifndef CADRE_ARGS_OPTION_VALUE_H
#define CADRE_ARGS_OPTION_VALUE_H

#include "args/option_table.h"

/* The row's field in the struct of values. */
void *option_value_field(const struct option_row *row, void *values);

/* Replaces the field by the words given (exactly one unless the row is a list; "true" or "false"
 * for a switch). On error the field keeps its value and the message names flag, word and what is
 * legal. */
int option_value_set(const struct option_row *row, void *values, const char *const *words,
                     int num_words);
/* Sets the row's default; the old content is overwritten, not freed. */
int option_value_set_default(const struct option_row *row, void *values);
void option_value_free(const struct option_row *row, void *values);

/* Does a word spell the row's default? Needs no field. */
bool option_value_is_default(const struct option_row *row, const char *word);

/* The shortest decimal that reads back as the same double. */
void option_value_format_double(double value, char *text, size_t text_bytes);

#endif
