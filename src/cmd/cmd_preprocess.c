
#include <errno.h>
#include <glob.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "args/help.h"
#include "base/check.h"
#include "base/clock.h"
#include "base/log.h"
#include "cmd/cmd.h"
#include "data/preprocess.h"
#include "train/progress.h"

struct preprocess_options {
    struct option_strings input, json_keys;
    char *input_format, *output_prefix;
    char *tokenizer_type, *tokenizer_model;
    int64_t vocab_size;
    bool append_eod;
    int64_t workers, log_interval;
};

#define REFUSED(flag_, type_, default_, help_, reason_)                                            \
    {                                                                                              \
        .flag = (flag_), .type = (type_), .status = OPTION_REFUSED, .offset = OPTION_NO_FIELD,     \
        .default_text = (default_), .min = OPTION_NO_MIN, .max = OPTION_NO_MAX,                    \
        .group = "not built", .help = (help_), .reason = (reason_)                                 \
    }
#define ROW(kind_, flag_, ...) kind_(struct preprocess_options, flag_, __VA_ARGS__)

static const struct option_row rows[] = {
    ROW(OPTION_TEXTS, "--input", input, "input",
        "files, or patterns such as 'corpus/*.jsonl' (sorted by name)"),
    ROW(OPTION_ONE_OF, "--input-format", input_format, "auto", "auto jsonl text", "input",
        "jsonl: a JSON object a line; text: a file is one document; auto: text for *.txt"),
    ROW(OPTION_TEXTS, "--json-keys", json_keys, "input",
        "keys of the objects to take, each into a data set of its own; text if not given"),
    ROW(OPTION_TEXT, "--output-prefix", output_prefix, NULL, "output",
        "the data set is PREFIX_KEY_document.bin and .idx"),
    ROW(OPTION_SWITCH, "--append-eod", append_eod, "output",
        "put the end-of-document token behind each document"),
    ROW(OPTION_ONE_OF, "--tokenizer-type", tokenizer_type, NULL, TOKENIZER_TYPES, "tokenizer",
        "how text becomes tokens"),
    ROW(OPTION_TEXT, "--tokenizer-model", tokenizer_model, NULL, "tokenizer",
        "SentencePiece .model file"),
    ROW(OPTION_INTEGER, "--vocab-size", vocab_size, NULL, 1, INT32_MAX, "tokenizer",
        "vocabulary of NullTokenizer"),
    ROW(OPTION_INTEGER, "--workers", workers, NULL, 1, 1024, "run",
        "threads that encode; all cores if not given"),
    ROW(OPTION_INTEGER, "--log-interval", log_interval, "1000", 1, OPTION_NO_MAX, "run",
        "documents between two lines of progress"),
    REFUSED("--split-sentences", OPTION_FLAG, NULL, "split documents into sentences",
            "sentences are not split here: give lists of sentences as the value of the key"),
    REFUSED("--keep-newlines", OPTION_FLAG, NULL, "keep newlines between sentences",
            "it belongs to --split-sentences, which is not built"),
    REFUSED("--lang", OPTION_STRING, "english", "language of the sentences",
            "it belongs to --split-sentences, which is not built"),
    REFUSED("--partitions", OPTION_INT, "1", "files to split the output into",
            "one data set is written; --workers makes use of several cores"),
    REFUSED("--keep-sequential-samples", OPTION_FLAG, NULL, "keep the order over partitions",
            "it belongs to --partitions, which is not built; the order is always kept"),
    REFUSED("--vocab-file", OPTION_STRING, NULL, "vocabulary of GPT2BPETokenizer or BERT",
            "that tokenizer is not built; use a SentencePiece model (--tokenizer-model)"),
    REFUSED("--merge-file", OPTION_STRING, NULL, "merges of GPT2BPETokenizer",
            "that tokenizer is not built; use a SentencePiece model (--tokenizer-model)"),
};

const struct option_table preprocess_table =
    OPTION_TABLE("preprocess", "Turns jsonl or plain text into a data set of tokens.", rows);

/* Progress for a person: a live line on a terminal, a line every log_interval documents elsewhere.
 */
struct reporter {
    struct progress line;
    double started_at;
    int64_t log_interval, next_documents, reported_bytes;
};

enum { MEGABYTE = 1000000 };

static void report(void *context, const struct preprocess_progress *progress)
{
    struct reporter *reporter = context;
    const double seconds = clock_seconds() - reporter->started_at;
    char note[PROGRESS_NOTE_BYTES];

    snprintf(note, sizeof note, "%lld documents", (long long)progress->num_documents);
    progress_update(&reporter->line, progress->done_bytes / MEGABYTE,
                    progress->done_bytes - reporter->reported_bytes, note);
    reporter->reported_bytes = progress->done_bytes;
    if (!reporter->line.on && progress->num_documents >= reporter->next_documents) {
        log_info("Processed %lld documents (%.1f docs/s, %.2f MB/s).",
                 (long long)progress->num_documents, (double)progress->num_documents / seconds,
                 (double)progress->done_bytes / MEGABYTE / seconds);
        reporter->next_documents =
            (progress->num_documents / reporter->log_interval + 1) * reporter->log_interval;
    }
}

/* Every pattern's files, sorted. The caller frees files with globfree, whatever is returned. */
static int find_inputs(const struct option_strings *patterns, glob_t *files)
{
    *files = (glob_t){0};
    for (int i = 0; i < patterns->num_items; i++) {
        const int status = glob(patterns->items[i], i == 0 ? 0 : GLOB_APPEND, NULL, files);

        if (status != 0) {
            return error_set("--input %s: %s", patterns->items[i],
                             status == GLOB_NOMATCH ? "there is no such file" : strerror(errno));
        }
    }
    if (files->gl_pathc == 0) {
        return error_set("--input is missing: which files?");
    }
    return 0;
}

static int check_options(const struct preprocess_options *options)
{
    if (options->output_prefix == NULL) {
        return error_set("--output-prefix is missing: where to?");
    }
    if (options->tokenizer_type == NULL) {
        return error_set("--tokenizer-type is missing: one of " TOKENIZER_TYPES);
    }
    if (options->json_keys.num_items > PREPROCESS_KEYS_MAX) {
        return error_set("--json-keys names %d keys, more than %d", options->json_keys.num_items,
                         PREPROCESS_KEYS_MAX);
    }
    return 0;
}

static enum preprocess_format find_format(const char *name)
{
    if (strcmp(name, "jsonl") == 0) {
        return PREPROCESS_JSONL;
    }
    return strcmp(name, "text") == 0 ? PREPROCESS_TEXT : PREPROCESS_BY_NAME;
}

static int run(const struct preprocess_options *options, const struct tokenizer *tokenizer,
               const glob_t *files)
{
    static const char *const default_keys[] = {"text"};
    const bool has_keys = options->json_keys.num_items > 0;
    struct reporter reporter = {.started_at = clock_seconds(),
                                .log_interval = options->log_interval,
                                .next_documents = options->log_interval};
    struct preprocess_progress progress;
    const struct preprocess_config config = {
        .inputs = (const char *const *)files->gl_pathv,
        .num_inputs = (int)files->gl_pathc,
        .format = find_format(options->input_format),
        .keys = has_keys ? (const char *const *)options->json_keys.items : default_keys,
        .num_keys = has_keys ? options->json_keys.num_items : 1,
        .output_prefix = options->output_prefix,
        .tokenizer = tokenizer,
        .append_eod = options->append_eod,
        .num_workers =
            options->workers > 0 ? (int)options->workers : (int)sysconf(_SC_NPROCESSORS_ONLN),
        .report = report,
        .context = &reporter,
    };
    int result;

    TRY(preprocess_measure(&config, &progress));
    progress_begin(&reporter.line, 0, progress.total_bytes / MEGABYTE, "B");
    result = preprocess_run(&config, &progress);
    progress_clear();
    TRY(result);
    log_info("%lld documents, %lld tokens in %.1f s (%.2f MB/s) -> %s_%s_document.bin, .idx%s",
             (long long)progress.num_documents, (long long)progress.num_tokens,
             clock_seconds() - reporter.started_at,
             (double)progress.done_bytes / MEGABYTE / (clock_seconds() - reporter.started_at),
             config.output_prefix, config.keys[0],
             config.num_keys > 1 ? " (and one for each other key)" : "");
    return 0;
}

static int open_and_run(const struct preprocess_options *options)
{
    const struct tokenizer_config config = {options->tokenizer_type, options->tokenizer_model,
                                            options->vocab_size};
    struct tokenizer *tokenizer;
    glob_t files;
    int result;

    TRY(check_options(options));
    tokenizer = tokenizer_open(&config);
    if (tokenizer == NULL) {
        return -1;
    }
    result = find_inputs(&options->input, &files);
    if (result == 0) {
        result = run(options, tokenizer, &files);
    }
    globfree(&files);
    tokenizer_close(tokenizer);
    return result;
}

int cmd_preprocess(int argc, char **argv)
{
    struct preprocess_options options;
    int result;

    if (help_requested(&preprocess_table, argc, argv, stdout)) {
        return 0;
    }
    TRY(option_table_init(&preprocess_table, &options, NULL));
    result = option_table_parse(&preprocess_table, argc, argv, &options, NULL);
    if (result == 0) {
        result = open_and_run(&options);
    }
    option_table_free(&preprocess_table, &options);
    return result;
}
