/* Rows to and from JSON. Reading goes through the text of the command line, so that a saved config
 * is checked by the same code, with the same messages, as what a user types. */
#include <stdlib.h>
#include <string.h>

#include "args/option_table.h"
#include "args/option_value.h"
#include "base/check.h"

enum { JSON_LIST_MAX = 4096, NUMBER_TEXT_MAX = 64 };

static json_t *list_to_json(const struct option_row *row, const void *field)
{
    const struct option_strings *strings = field;
    const struct option_ints *ints = field;
    const struct option_floats *floats = field;
    json_t *array = json_array();

    if (row->type == OPTION_INTS) {
        for (int i = 0; i < ints->num_items; i++) {
            json_array_append_new(array, json_integer(ints->items[i]));
        }
    } else if (row->type == OPTION_FLOATS) {
        for (int i = 0; i < floats->num_items; i++) {
            json_array_append_new(array, json_real(floats->items[i]));
        }
    } else {
        for (int i = 0; i < strings->num_items; i++) {
            json_array_append_new(array, json_string(strings->items[i]));
        }
    }
    return array;
}

static json_t *value_to_json(const struct option_row *row, const void *values)
{
    const void *field = (const char *)values + row->offset;
    const char *string;

    switch (row->type) {
    case OPTION_FLAG:
    case OPTION_NO_FLAG:
        return json_boolean(*(const bool *)field);
    case OPTION_INT:
        return json_integer(*(const int64_t *)field);
    case OPTION_FLOAT:
        return json_real(*(const double *)field);
    case OPTION_STRING:
    case OPTION_CHOICE:
        string = *(char *const *)field;
        return string == NULL ? json_null() : json_string(string);
    case OPTION_STRINGS:
    case OPTION_CHOICES:
    case OPTION_INTS:
    case OPTION_FLOATS:
        return list_to_json(row, field);
    }
    PANIC("%s: type %d", row->flag, row->type);
}

json_t *option_table_to_json(const struct option_table *table, const void *values)
{
    json_t *object = json_object();

    for (int i = 0; i < table->num_rows; i++) {
        char name[OPTION_NAME_MAX];

        if (table->rows[i].offset == OPTION_NO_FIELD) {
            continue;
        }
        option_row_name(&table->rows[i], name);
        /* fails for a NULL value (out of memory, or a string that is not UTF-8) */
        if (json_object_set_new(object, name, value_to_json(&table->rows[i], values)) != 0) {
            json_decref(object);
            return FAIL_NULL("%s: its value is not UTF-8, or out of memory", table->rows[i].flag);
        }
    }
    return object;
}

static int wrong_json_type(const struct option_row *row, const json_t *value)
{
    static const char *const names[] = {"an object", "a list", "a string", "an integer",
                                        "a number",  "true",   "false",    "null"};
    char legal[1024];

    option_row_describe_legal(row, legal, sizeof legal);
    if (legal[0] == '\0') {
        snprintf(legal, sizeof legal, option_row_is_switch(row) ? "true or false" : "a string");
    }
    return error_set("%s: must be %s%s, found %s", row->flag,
                     option_row_is_list(row) ? "a list, each " : "", legal,
                     names[json_typeof(value)]);
}

/* The word for one JSON scalar: the string itself, or number (room for a number's digits). */
static const char *scalar_word(const struct option_row *row, const json_t *value,
                               char number[NUMBER_TEXT_MAX])
{
    const bool is_text = row->type == OPTION_STRING || row->type == OPTION_CHOICE ||
                         row->type == OPTION_STRINGS || row->type == OPTION_CHOICES;
    const bool is_float = row->type == OPTION_FLOAT || row->type == OPTION_FLOATS;

    if (option_row_is_switch(row)) {
        return !json_is_boolean(value) ? NULL : json_is_true(value) ? "true" : "false";
    }
    if (is_text) {
        return json_string_value(value);
    }
    if (json_is_integer(value)) {
        snprintf(number, NUMBER_TEXT_MAX, "%lld", (long long)json_integer_value(value));
        return number;
    }
    if (is_float && json_is_real(value)) {
        option_value_format_double(json_real_value(value), number, NUMBER_TEXT_MAX);
        return number;
    }
    return NULL;
}

static int apply_list(const struct option_row *row, const json_t *array, void *values)
{
    const size_t length = json_array_size(array);
    const char **words;
    char(*numbers)[NUMBER_TEXT_MAX];
    int result = 0;

    if (!json_is_array(array) || length > JSON_LIST_MAX) {
        return wrong_json_type(row, array);
    }
    if (length == 0) {
        option_value_free(row, values);
        return 0;
    }
    words = calloc(length, sizeof *words);
    numbers = calloc(length, sizeof *numbers);
    if (words == NULL || numbers == NULL) {
        result = error_set("%s: out of memory", row->flag);
    }
    for (size_t i = 0; i < length && result == 0; i++) {
        words[i] = scalar_word(row, json_array_get(array, i), numbers[i]);
        if (words[i] == NULL) {
            result = wrong_json_type(row, json_array_get(array, i));
        }
    }
    if (result == 0) {
        result = option_value_set(row, values, words, (int)length);
    }
    free(words);
    free(numbers);
    return result;
}

/* A number that equals the default is taken even where it is no legal value to type (0: none). */
static bool is_none(const struct option_row *row, const json_t *value)
{
    return json_is_null(value) ||
           (json_is_number(value) && row->default_text == NULL && json_number_value(value) == 0.0);
}

static int apply_value(const struct option_row *row, const json_t *value, void *values)
{
    char number[NUMBER_TEXT_MAX];
    const char *word;

    if (option_row_is_list(row)) {
        return apply_list(row, value, values);
    }
    if (is_none(row, value)) {
        option_value_free(row, values);
        return option_value_set_default(row, values);
    }
    word = scalar_word(row, value, number);
    if (word == NULL) {
        return wrong_json_type(row, value);
    }
    return option_value_set(row, values, &word, 1);
}

int option_table_apply_json(const struct option_table *table, const json_t *object, void *values,
                            enum option_origin *origins)
{
    if (!json_is_object(object)) {
        return error_set("the saved config is not a JSON object");
    }
    for (int i = 0; i < table->num_rows; i++) {
        const struct option_row *row = &table->rows[i];
        char name[OPTION_NAME_MAX];
        const json_t *value;

        option_row_name(row, name);
        value = json_object_get(object, name);
        if (!row->is_model_arg || value == NULL || origins[i] != ORIGIN_DEFAULT) {
            continue;
        }
        if (apply_value(row, value, values) != 0) {
            return error_prepend("saved config");
        }
        origins[i] = ORIGIN_CHECKPOINT;
    }
    return 0;
}
