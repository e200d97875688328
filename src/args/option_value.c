#include "args/option_value.h"

#include <errno.h>
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"

enum { LEGAL_TEXT_MAX = 1024 };

void *option_value_field(const struct option_row *row, void *values)
{
    CHECK(row->offset != OPTION_NO_FIELD, "%s has no field", row->flag);
    return (char *)values + row->offset;
}

static int illegal_word(const struct option_row *row, const char *word)
{
    char legal[LEGAL_TEXT_MAX];

    option_row_describe_legal(row, legal, sizeof legal);
    return error_set("%s %.200s: must be %s", row->flag, word, legal);
}

/* Only plain decimals: strtod alone would also take blanks, "nan", "inf" and hexadecimal. */
static bool holds_only(const char *word, const char *characters)
{
    return word[0] != '\0' && word[strspn(word, characters)] == '\0';
}

static int parse_int(const struct option_row *row, const char *word, int64_t *value)
{
    char *end;

    errno = 0;
    *value = strtoll(word, &end, 10);
    if (!holds_only(word, "+-0123456789") || *end != '\0' || errno != 0 ||
        (double)*value < row->min || (double)*value > row->max) {
        return illegal_word(row, word);
    }
    return 0;
}

static int parse_float(const struct option_row *row, const char *word, double *value)
{
    char *end;

    *value = strtod(word, &end);
    if (!holds_only(word, "+-.eE0123456789") || *end != '\0' || !isfinite(*value) ||
        *value < row->min || *value > row->max) {
        return illegal_word(row, word);
    }
    return 0;
}

static int check_choice(const struct option_row *row, const char *word)
{
    const size_t length = strlen(word);

    for (const char *choice = row->choices; *choice != '\0'; choice += strspn(choice, " ")) {
        const size_t choice_length = strcspn(choice, " ");

        if (choice_length == length && memcmp(choice, word, length) == 0) {
            return 0;
        }
        choice += choice_length;
    }
    return illegal_word(row, word);
}

static int set_string(const struct option_row *row, char **field, const char *word)
{
    char *copy;

    if (row->type == OPTION_CHOICE) {
        TRY(check_choice(row, word));
    }
    copy = strdup(word);
    if (copy == NULL) {
        return error_set("%s: out of memory", row->flag);
    }
    free(*field);
    *field = copy;
    return 0;
}

static void free_strings(struct option_strings *list)
{
    for (int i = 0; i < list->num_items; i++) {
        free(list->items[i]);
    }
    free(list->items);
    *list = (struct option_strings){0};
}

static int set_strings(const struct option_row *row, struct option_strings *field,
                       const char *const *words, int num_words)
{
    struct option_strings list = {calloc((size_t)num_words, sizeof(char *)), 0};

    if (list.items == NULL) {
        return error_set("%s: out of memory", row->flag);
    }
    for (; list.num_items < num_words; list.num_items++) {
        const char *word = words[list.num_items];

        if (row->type == OPTION_CHOICES && check_choice(row, word) != 0) {
            free_strings(&list);
            return -1;
        }
        list.items[list.num_items] = strdup(word);
        if (list.items[list.num_items] == NULL) {
            free_strings(&list);
            return error_set("%s: out of memory", row->flag);
        }
    }
    free_strings(field);
    *field = list;
    return 0;
}

static int set_ints(const struct option_row *row, struct option_ints *field,
                    const char *const *words, int num_words)
{
    struct option_ints list = {calloc((size_t)num_words, sizeof(int64_t)), num_words};

    if (list.items == NULL) {
        return error_set("%s: out of memory", row->flag);
    }
    for (int i = 0; i < num_words; i++) {
        if (parse_int(row, words[i], &list.items[i]) != 0) {
            free(list.items);
            return -1;
        }
    }
    free(field->items);
    *field = list;
    return 0;
}

static int set_floats(const struct option_row *row, struct option_floats *field,
                      const char *const *words, int num_words)
{
    struct option_floats list = {calloc((size_t)num_words, sizeof(double)), num_words};

    if (list.items == NULL) {
        return error_set("%s: out of memory", row->flag);
    }
    for (int i = 0; i < num_words; i++) {
        if (parse_float(row, words[i], &list.items[i]) != 0) {
            free(list.items);
            return -1;
        }
    }
    free(field->items);
    *field = list;
    return 0;
}

static int set_int(const struct option_row *row, int64_t *field, const char *word)
{
    int64_t value;

    TRY(parse_int(row, word, &value));
    *field = value;
    return 0;
}

static int set_float(const struct option_row *row, double *field, const char *word)
{
    double value;

    TRY(parse_float(row, word, &value));
    *field = value;
    return 0;
}

int option_value_set(const struct option_row *row, void *values, const char *const *words,
                     int num_words)
{
    void *field = option_value_field(row, values);

    CHECK(num_words > 0 && (num_words == 1 || option_row_is_list(row)), "%s: %d words", row->flag,
          num_words);
    switch (row->type) {
    case OPTION_FLAG:
    case OPTION_NO_FLAG:
        *(bool *)field = strcmp(words[0], "true") == 0;
        return 0;
    case OPTION_INT:
        return set_int(row, field, words[0]);
    case OPTION_FLOAT:
        return set_float(row, field, words[0]);
    case OPTION_STRING:
    case OPTION_CHOICE:
        return set_string(row, field, words[0]);
    case OPTION_STRINGS:
    case OPTION_CHOICES:
        return set_strings(row, field, words, num_words);
    case OPTION_INTS:
        return set_ints(row, field, words, num_words);
    case OPTION_FLOATS:
        return set_floats(row, field, words, num_words);
    }
    PANIC("%s: type %d", row->flag, row->type);
}

static size_t field_bytes(enum option_type type)
{
    switch (type) {
    case OPTION_FLAG:
    case OPTION_NO_FLAG:
        return sizeof(bool);
    case OPTION_INT:
        return sizeof(int64_t);
    case OPTION_FLOAT:
        return sizeof(double);
    case OPTION_STRING:
    case OPTION_CHOICE:
        return sizeof(char *);
    case OPTION_STRINGS:
    case OPTION_CHOICES:
        return sizeof(struct option_strings);
    case OPTION_INTS:
        return sizeof(struct option_ints);
    case OPTION_FLOATS:
        return sizeof(struct option_floats);
    }
    PANIC("type %d", type);
}

int option_value_set_default(const struct option_row *row, void *values)
{
    void *field = option_value_field(row, values);
    struct option_row unbounded = *row; /* a default such as -1 may lie outside the legal range */

    memset(field, 0, field_bytes(row->type));
    if (row->type == OPTION_NO_FLAG) {
        *(bool *)field = true;
    }
    if (row->default_text == NULL) {
        return 0;
    }
    unbounded.min = OPTION_NO_MIN;
    unbounded.max = OPTION_NO_MAX;
    return option_value_set(&unbounded, values, &row->default_text, 1);
}

void option_value_free(const struct option_row *row, void *values)
{
    void *field = option_value_field(row, values);

    switch (row->type) {
    case OPTION_STRING:
    case OPTION_CHOICE:
        free(*(char **)field);
        *(char **)field = NULL;
        break;
    case OPTION_STRINGS:
    case OPTION_CHOICES:
        free_strings(field);
        break;
    case OPTION_INTS:
        free(((struct option_ints *)field)->items);
        *(struct option_ints *)field = (struct option_ints){0};
        break;
    case OPTION_FLOATS:
        free(((struct option_floats *)field)->items);
        *(struct option_floats *)field = (struct option_floats){0};
        break;
    case OPTION_FLAG:
    case OPTION_NO_FLAG:
    case OPTION_INT:
    case OPTION_FLOAT:
        break;
    }
}

bool option_value_is_default(const struct option_row *row, const char *word)
{
    double given, standard;

    if (row->default_text == NULL) {
        return false;
    }
    if (row->type == OPTION_INT || row->type == OPTION_FLOAT) {
        if (parse_float(row, word, &given) != 0 ||
            parse_float(row, row->default_text, &standard) != 0) {
            return false;
        }
        return given == standard;
    }
    return strcmp(word, row->default_text) == 0;
}

void option_value_format_double(double value, char *text, size_t text_bytes)
{
    for (int digits = 15; digits <= 17; digits++) {
        snprintf(text, text_bytes, "%.*g", digits, value);
        if (strtod(text, NULL) == value) {
            return;
        }
    }
}
