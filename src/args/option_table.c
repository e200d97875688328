#include "args/option_table.h"

#include <ctype.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>

#include "args/edit_distance.h"
#include "args/option_value.h"
#include "base/check.h"

bool option_row_is_switch(const struct option_row *row)
{
    return row->type == OPTION_FLAG || row->type == OPTION_NO_FLAG;
}

bool option_row_is_list(const struct option_row *row)
{
    return row->type == OPTION_STRINGS || row->type == OPTION_CHOICES || row->type == OPTION_INTS ||
           row->type == OPTION_FLOATS;
}

void option_row_name(const struct option_row *row, char name[OPTION_NAME_MAX])
{
    const char *from = row->flag + strspn(row->flag, "-");
    size_t length;

    if (row->type == OPTION_NO_FLAG && strncmp(from, "no-", 3) == 0) {
        from += 3;
    }
    length = strlen(from);
    CHECK(length < OPTION_NAME_MAX, "%s", row->flag);
    for (size_t i = 0; i <= length; i++) {
        name[i] = (char)(from[i] == '-' ? '_' : from[i]);
    }
}

const char *option_origin_name(enum option_origin origin)
{
    static const char *const names[] = {"default", "derived", "checkpoint", "environment",
                                        "command line"};

    return names[origin];
}

/* Appends to text at *used; a text that is full stays cut off. */
static void append(char *text, size_t text_bytes, size_t *used, const char *format, ...)
    PRINTF_LIKE(4, 5);

static void append(char *text, size_t text_bytes, size_t *used, const char *format, ...)
{
    va_list args;
    int length;

    if (*used >= text_bytes) {
        return;
    }
    va_start(args, format);
    length = vsnprintf(text + *used, text_bytes - *used, format, args);
    va_end(args);
    *used += (size_t)length;
}

static void describe_range(const struct option_row *row, const char *what, char *text,
                           size_t text_bytes)
{
    char low[64], high[64];
    size_t used = 0;

    option_value_format_double(row->min, low, sizeof low);
    option_value_format_double(row->max, high, sizeof high);
    append(text, text_bytes, &used, "%s", what);
    if (row->min == OPTION_ABOVE_ZERO) {
        append(text, text_bytes, &used, " above 0");
    } else if (row->min > OPTION_NO_MIN && row->max == OPTION_NO_MAX) {
        append(text, text_bytes, &used, " of at least %s", low);
    } else if (row->min > OPTION_NO_MIN) {
        append(text, text_bytes, &used, " from %s", low);
    }
    if (row->max == OPTION_BELOW_ONE) {
        append(text, text_bytes, &used, " to below 1");
    } else if (row->max < OPTION_NO_MAX) {
        append(text, text_bytes, &used, " %s %s",
               row->min == OPTION_ABOVE_ZERO ? "and at most" : "to", high);
    }
}

void option_row_describe_legal(const struct option_row *row, char *text, size_t text_bytes)
{
    size_t used = 0;

    text[0] = '\0';
    if (row->choices != NULL) {
        append(text, text_bytes, &used, "%s", strchr(row->choices, ' ') == NULL ? "" : "one of ");
        for (const char *c = row->choices; *c != '\0'; c++) {
            append(text, text_bytes, &used, *c == ' ' ? ", " : "%c", *c);
        }
    } else if (row->type == OPTION_INT || row->type == OPTION_INTS) {
        describe_range(row, "an integer", text, text_bytes);
    } else if (row->type == OPTION_FLOAT || row->type == OPTION_FLOATS) {
        describe_range(row, "a number", text, text_bytes);
    }
}

int option_table_index(const struct option_table *table, const struct option_row *row)
{
    CHECK(row >= table->rows && row < table->rows + table->num_rows, "not a row of %s",
          table->command);
    return (int)(row - table->rows);
}

const struct option_row *option_table_find(const struct option_table *table, const char *flag)
{
    for (int i = 0; i < table->num_rows; i++) {
        if (strcmp(table->rows[i].flag, flag) == 0) {
            return &table->rows[i];
        }
    }
    return NULL;
}

const char *option_table_nearest(const struct option_table *table, const char *flag)
{
    const char *nearest = NULL;
    int best = (int)strlen(flag) / 3 + 1; /* further away than this is no help */

    for (int i = 0; i < table->num_rows; i++) {
        const int distance = edit_distance(flag, table->rows[i].flag);

        if (table->rows[i].flag[0] == '-' && distance < best) {
            best = distance;
            nearest = table->rows[i].flag;
        }
    }
    return nearest;
}

int option_table_init(const struct option_table *table, void *values, enum option_origin *origins)
{
    for (int i = 0; i < table->num_rows; i++) {
        if (table->rows[i].offset != OPTION_NO_FIELD) {
            TRY(option_value_set_default(&table->rows[i], values));
        }
        if (origins != NULL) {
            origins[i] = ORIGIN_DEFAULT;
        }
    }
    return 0;
}

void option_table_free(const struct option_table *table, void *values)
{
    for (int i = 0; i < table->num_rows; i++) {
        if (table->rows[i].offset != OPTION_NO_FIELD) {
            option_value_free(&table->rows[i], values);
        }
    }
}

/* A command line being read. */
struct parser {
    const struct option_table *table;
    int argc;
    char **argv;
    int next; /* the next word */
    void *values;
    enum option_origin *origins;
};

static bool looks_like_flag(const char *word)
{
    return strncmp(word, "--", 2) == 0 && isalpha((unsigned char)word[2]);
}

/* ALWAYS and REFUSED rows have no field: checks the word only. */
static int check_without_field(const struct option_row *row, const char *word)
{
    struct option_row own_field = *row;
    char *value = NULL;
    int result = 0;

    if (row->status == OPTION_REFUSED) {
        if (option_value_is_default(row, word)) {
            return 0;
        }
        if (row->default_text != NULL) {
            return error_set("%s %s is not built in cadre: %s (%s, the default, is accepted)",
                             row->flag, word, row->reason, row->default_text);
        }
        return error_set("%s is not built in cadre: %s", row->flag, row->reason);
    }
    if (row->type == OPTION_CHOICE) {
        own_field.offset = 0;
        result = option_value_set(&own_field, &value, &word, 1);
        free(value);
    } else if (row->type == OPTION_INT) {
        int64_t number;

        own_field.offset = 0;
        result = option_value_set(&own_field, &number, &word, 1);
    }
    return result;
}

static int take_words(struct parser *p, const struct option_row *row, const char *const *words,
                      int num_words, enum option_origin origin)
{
    if (row->status == OPTION_BUILT) {
        TRY(option_value_set(row, p->values, words, num_words));
    } else {
        TRY(check_without_field(row, words[0]));
    }
    p->origins[option_table_index(p->table, row)] = origin;
    return 0;
}

static int take_switch(struct parser *p, const struct option_row *row)
{
    const char *word = row->type == OPTION_FLAG ? "true" : "false";

    return take_words(p, row, &word, 1, ORIGIN_COMMAND_LINE);
}

static int needs_value(const struct option_row *row)
{
    char legal[1024];

    if (row->status == OPTION_REFUSED) {
        return error_set("%s is not built in cadre: %s", row->flag, row->reason);
    }
    option_row_describe_legal(row, legal, sizeof legal);
    return error_set("%s needs a value%s%s", row->flag, legal[0] == '\0' ? "" : ": ", legal);
}

static int unknown_flag(const struct option_table *table, const char *flag)
{
    const char *nearest = option_table_nearest(table, flag);

    if (nearest != NULL) {
        return error_set("unknown flag %s: did you mean %s?", flag, nearest);
    }
    return error_set("unknown flag %s: `cadre %s --help` lists the flags", flag, table->command);
}

static int parse_flag(struct parser *p)
{
    const char *word = p->argv[p->next++];
    const char *equals = strchr(word, '=');
    const int length = equals != NULL ? (int)(equals - word) : (int)strlen(word);
    char flag[2 * OPTION_NAME_MAX];
    const struct option_row *row;
    int num_words = 0;

    snprintf(flag, sizeof flag, "%.*s", length, word);
    row = option_table_find(p->table, flag);
    if (row == NULL) {
        return unknown_flag(p->table, flag);
    }
    if (option_row_is_switch(row)) {
        return equals == NULL ? take_switch(p, row) : error_set("%s takes no value", flag);
    }
    if (equals != NULL) {
        const char *value = equals + 1;

        return take_words(p, row, &value, 1, ORIGIN_COMMAND_LINE);
    }
    while (p->next + num_words < p->argc && !looks_like_flag(p->argv[p->next + num_words]) &&
           (num_words == 0 || option_row_is_list(row))) {
        num_words++;
    }
    if (num_words == 0) {
        return needs_value(row);
    }
    p->next += num_words;
    return take_words(p, row, (const char *const *)(p->argv + p->next - num_words), num_words,
                      ORIGIN_COMMAND_LINE);
}

/* The first positional row not yet given takes the word; one of a list type takes all the rest. */
static int parse_positional(struct parser *p)
{
    for (int i = 0; i < p->table->num_rows; i++) {
        const struct option_row *row = &p->table->rows[i];
        int num_words = 1;

        if (row->flag[0] == '-' || p->origins[i] == ORIGIN_COMMAND_LINE) {
            continue;
        }
        while (option_row_is_list(row) && p->next + num_words < p->argc &&
               p->argv[p->next + num_words][0] != '-') {
            num_words++;
        }
        p->next += num_words;
        return take_words(p, row, (const char *const *)(p->argv + p->next - num_words), num_words,
                          ORIGIN_COMMAND_LINE);
    }
    return error_set("unexpected argument '%s'%s", p->argv[p->next],
                     p->next == 1 ? "" : ": the flag before it takes fewer values");
}

static int parse_environment(struct parser *p)
{
    for (int i = 0; i < p->table->num_rows; i++) {
        const struct option_row *row = &p->table->rows[i];
        const char *value = row->environment != NULL ? getenv(row->environment) : NULL;

        if (value == NULL || value[0] == '\0' || p->origins[i] == ORIGIN_COMMAND_LINE) {
            continue;
        }
        if (take_words(p, row, &value, 1, ORIGIN_ENVIRONMENT) != 0) {
            return error_prepend("environment variable %s", row->environment);
        }
    }
    return 0;
}

static int parse_all(struct parser *p)
{
    while (p->next < p->argc) {
        const char *word = p->argv[p->next];

        if (word[0] == '-' && word[1] != '\0') {
            TRY(parse_flag(p));
        } else {
            TRY(parse_positional(p));
        }
    }
    return parse_environment(p);
}

int option_table_parse(const struct option_table *table, int argc, char **argv, void *values,
                       enum option_origin *origins)
{
    struct parser p = {table, argc, argv, 1, values, origins};
    enum option_origin *own = NULL;
    int result;

    if (origins == NULL) {
        own = calloc((size_t)table->num_rows, sizeof *own);
        if (own == NULL) {
            return error_set("out of memory for %d flags", table->num_rows);
        }
        p.origins = own;
    }
    result = parse_all(&p);
    free(own);
    return result;
}

int option_table_set(const struct option_table *table, const char *flag, const char *text,
                     enum option_origin origin, void *values, enum option_origin *origins)
{
    const struct option_row *row = option_table_find(table, flag);

    CHECK(row != NULL, "no row %s", flag);
    TRY(option_value_set(row, values, &text, 1));
    if (origins != NULL) {
        origins[option_table_index(table, row)] = origin;
    }
    return 0;
}

static void format_list(const struct option_row *row, const void *field, char *text,
                        size_t text_bytes)
{
    const struct option_strings *strings = field;
    const struct option_ints *ints = field;
    const struct option_floats *floats = field;
    char number[64];
    size_t used = 0;

    text[0] = '\0';
    if (row->type == OPTION_INTS) {
        for (int i = 0; i < ints->num_items; i++) {
            append(text, text_bytes, &used, "%s%lld", i == 0 ? "" : " ", (long long)ints->items[i]);
        }
    } else if (row->type == OPTION_FLOATS) {
        for (int i = 0; i < floats->num_items; i++) {
            option_value_format_double(floats->items[i], number, sizeof number);
            append(text, text_bytes, &used, "%s%s", i == 0 ? "" : " ", number);
        }
    } else {
        for (int i = 0; i < strings->num_items; i++) {
            append(text, text_bytes, &used, "%s%s", i == 0 ? "" : " ", strings->items[i]);
        }
    }
    if (used == 0) {
        snprintf(text, text_bytes, "none");
    }
}

void option_row_format(const struct option_row *row, const void *values, char *text,
                       size_t text_bytes)
{
    const void *field = (const char *)values + row->offset;

    CHECK(row->offset != OPTION_NO_FIELD, "%s has no field", row->flag);
    switch (row->type) {
    case OPTION_FLAG:
    case OPTION_NO_FLAG:
        snprintf(text, text_bytes, "%s", *(const bool *)field ? "true" : "false");
        break;
    case OPTION_INT:
        snprintf(text, text_bytes, "%lld", (long long)*(const int64_t *)field);
        break;
    case OPTION_FLOAT:
        option_value_format_double(*(const double *)field, text, text_bytes);
        break;
    case OPTION_STRING:
    case OPTION_CHOICE:
        snprintf(text, text_bytes, "%s",
                 *(char *const *)field == NULL ? "none" : *(char *const *)field);
        break;
    case OPTION_STRINGS:
    case OPTION_CHOICES:
    case OPTION_INTS:
    case OPTION_FLOATS:
        format_list(row, field, text, text_bytes);
        break;
    }
}
