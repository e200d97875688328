/* option_table.h - command lines as tables of rows.
 *
 * A command states its flags as an array of struct option_row over a plain struct of values. From
 * the same rows come parsing, --help, the man page, shell completion, docs and the checkpoint's
 * saved config. A command of its own:
 *
 *     struct greet_options { char *name; int64_t times; bool loud; };
 *     static const struct option_row rows[] = {
 *         OPTION_TEXT(struct greet_options, "--name", name, "world", "greet", "whom to greet"),
 *         OPTION_INTEGER(struct greet_options, "--times", times, "1", 1, 100, "greet", "how
 * often"), OPTION_SWITCH(struct greet_options, "--loud", loud, "greet", "in capitals"),
 *     };
 *     static const struct option_table table = OPTION_TABLE("greet", "Says hello.", rows);
 *
 *     struct greet_options o;
 *     TRY(option_table_init(&table, &o, NULL));
 *     if (option_table_parse(&table, argc, argv, &o, NULL) != 0) { ... }
 *     option_table_free(&table, &o);
 *
 * Rules of the command line: `--flag value` and `--flag=value`; the last of a repeated flag wins;
 * flags are never abbreviated; a list takes every word up to the next flag. A word that itself
 * starts with "--" and a letter must be given as --flag=--word. */
#ifndef CADRE_ARGS_OPTION_TABLE_H
#define CADRE_ARGS_OPTION_TABLE_H

#include <float.h>
#include <jansson.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>

enum option_type {
    OPTION_FLAG,    /* bool: false by default, true when given */
    OPTION_NO_FLAG, /* bool: true by default, "--no-x" makes field x false */
    OPTION_INT,     /* int64_t */
    OPTION_FLOAT,   /* double */
    OPTION_STRING,  /* char *, NULL when none */
    OPTION_CHOICE,  /* char *, one of row->choices */
    OPTION_STRINGS, /* struct option_strings */
    OPTION_CHOICES, /* struct option_strings, each one of row->choices */
    OPTION_INTS,    /* struct option_ints */
    OPTION_FLOATS,  /* struct option_floats */
};

enum option_status {
    OPTION_BUILT,   /* sets its field */
    OPTION_ALWAYS,  /* accepted; row->reason says why cadre keeps the promise with or without it */
    OPTION_REFUSED, /* an error with row->reason, unless the value given is the default */
};

/* Where a value comes from. Later entries do not override earlier ones by themselves. */
enum option_origin {
    ORIGIN_DEFAULT,
    ORIGIN_DERIVED, /* computed from other flags by validation */
    ORIGIN_CHECKPOINT,
    ORIGIN_ENVIRONMENT,
    ORIGIN_COMMAND_LINE,
};

struct option_strings {
    char **items;
    int num_items;
};

struct option_ints {
    int64_t *items;
    int num_items;
};

struct option_floats {
    double *items;
    int num_items;
};

enum { OPTION_NAME_MAX = 96, OPTION_NO_FIELD = -1 };

struct option_row {
    const char *flag; /* "--num-layers"; a name without dashes is a positional argument */
    enum option_type type;
    enum option_status status;
    bool is_model_arg;        /* describes the model: restored from a checkpoint's saved config */
    ptrdiff_t offset;         /* of the field in the struct of values, or OPTION_NO_FIELD */
    const char *default_text; /* as typed; NULL: none (0, NULL, an empty list) */
    double min, max;          /* legal values of numbers, both ends included */
    const char *choices;      /* the legal words, separated by blanks; NULL: any */
    const char *environment;  /* variable that gives the value when the command line does not */
    const char *group;        /* heading in --help */
    const char *help;
    const char *reason; /* of ALWAYS and REFUSED */
};

struct option_table {
    const char *command; /* "pretrain" */
    const char *summary; /* one sentence, for --help and the man page */
    const struct option_row *rows;
    int num_rows;
};

#define OPTION_TABLE(command_, summary_, rows_)                                                    \
    {                                                                                              \
        .command = (command_), .summary = (summary_), .rows = (rows_),                             \
        .num_rows = (int)(sizeof(rows_) / sizeof((rows_)[0]))                                      \
    }

/* Bounds for open intervals: OPTION_ABOVE_ZERO as min, OPTION_BELOW_ONE as max; and for no bound.
 */
#define OPTION_ABOVE_ZERO DBL_MIN
#define OPTION_BELOW_ONE (1.0 - DBL_EPSILON / 2)
#define OPTION_NO_MAX 9007199254740992.0 /* 2^53: integers beyond it are not exact in a double */
#define OPTION_NO_MIN (-OPTION_NO_MAX)

/* offsetof that does not compile unless the field has the type the row says. */
#define OPTION_FIELD(struct_, field_, type_)                                                       \
    ((ptrdiff_t)(offsetof(struct_, field_) +                                                       \
                 0 * sizeof(_Generic(((struct_ *)0)->field_, type_ : 1))))

#define OPTION_SWITCH(struct_, flag_, field_, group_, help_)                                       \
    {                                                                                              \
        .flag = (flag_), .type = OPTION_FLAG, .offset = OPTION_FIELD(struct_, field_, bool),       \
        .group = (group_), .help = (help_)                                                         \
    }
#define OPTION_NO_SWITCH(struct_, flag_, field_, group_, help_)                                    \
    {                                                                                              \
        .flag = (flag_), .type = OPTION_NO_FLAG, .offset = OPTION_FIELD(struct_, field_, bool),    \
        .group = (group_), .help = (help_)                                                         \
    }
#define OPTION_INTEGER(struct_, flag_, field_, default_, min_, max_, group_, help_)                \
    {                                                                                              \
        .flag = (flag_), .type = OPTION_INT, .offset = OPTION_FIELD(struct_, field_, int64_t),     \
        .default_text = (default_), .min = (min_), .max = (max_), .group = (group_),               \
        .help = (help_)                                                                            \
    }
#define OPTION_NUMBER(struct_, flag_, field_, default_, min_, max_, group_, help_)                 \
    {                                                                                              \
        .flag = (flag_), .type = OPTION_FLOAT, .offset = OPTION_FIELD(struct_, field_, double),    \
        .default_text = (default_), .min = (min_), .max = (max_), .group = (group_),               \
        .help = (help_)                                                                            \
    }
#define OPTION_TEXT(struct_, flag_, field_, default_, group_, help_)                               \
    {                                                                                              \
        .flag = (flag_), .type = OPTION_STRING, .offset = OPTION_FIELD(struct_, field_, char *),   \
        .default_text = (default_), .group = (group_), .help = (help_)                             \
    }
#define OPTION_ONE_OF(struct_, flag_, field_, default_, choices_, group_, help_)                   \
    {                                                                                              \
        .flag = (flag_), .type = OPTION_CHOICE, .offset = OPTION_FIELD(struct_, field_, char *),   \
        .default_text = (default_), .choices = (choices_), .group = (group_), .help = (help_)      \
    }
#define OPTION_TEXTS(struct_, flag_, field_, group_, help_)                                        \
    {                                                                                              \
        .flag = (flag_), .type = OPTION_STRINGS,                                                   \
        .offset = OPTION_FIELD(struct_, field_, struct option_strings), .group = (group_),         \
        .help = (help_)                                                                            \
    }

/* Sets every field to its default. The struct owns its strings and lists from here on, so it must
 * be freed and must not be copied. origins is [num_rows], or NULL where nobody asks. */
int option_table_init(const struct option_table *table, void *values, enum option_origin *origins);

/* Parses argv[1..argc), then the rows' environment variables. Values must be initialised; they hold
 * what was parsed so far when it fails. */
int option_table_parse(const struct option_table *table, int argc, char **argv, void *values,
                       enum option_origin *origins);

/* Sets one field from text, with the checks of the command line. For lists: the one item text. */
int option_table_set(const struct option_table *table, const char *flag, const char *text,
                     enum option_origin origin, void *values, enum option_origin *origins);

void option_table_free(const struct option_table *table, void *values);

/* The row of a flag or positional name, NULL if there is none. */
const struct option_row *option_table_find(const struct option_table *table, const char *flag);
int option_table_index(const struct option_table *table, const struct option_row *row);
/* The flag most like an unknown one, NULL if none is close. */
const char *option_table_nearest(const struct option_table *table, const char *flag);

/* "--no-load-optim" -> "load_optim": the field's name, also the key in JSON. */
void option_row_name(const struct option_row *row, char name[OPTION_NAME_MAX]);
bool option_row_is_switch(const struct option_row *row);
bool option_row_is_list(const struct option_row *row);
/* What values a row accepts, for help and messages: "an integer from 1 to 64", "one of a, b". */
void option_row_describe_legal(const struct option_row *row, char *text, size_t text_bytes);
const char *option_origin_name(enum option_origin origin);

/* The value of a row with a field, as the command line would spell it: "true", "1e-05", "a b",
 * "none". */
void option_row_format(const struct option_row *row, const void *values, char *text,
                       size_t text_bytes);

/* An object of all rows with a field. NULL with error_set() when out of memory. */
json_t *option_table_to_json(const struct option_table *table, const void *values);
/* Takes the model arguments in the object whose origin is still the default (so the command line
 * wins), checked like typed values. Keys that are no row are left alone: the object may hold more.
 */
int option_table_apply_json(const struct option_table *table, const json_t *object, void *values,
                            enum option_origin *origins);

#endif
