/* preprocess.h - text files to data sets: reads documents, encodes them in several threads, writes
 * one set a key in the order of the input. What is written does not depend on the number of
 * threads. */
#ifndef CADRE_DATA_PREPROCESS_H
#define CADRE_DATA_PREPROCESS_H

#include <stdbool.h>
#include <stdint.h>

#include "data/tokenizer.h"

enum preprocess_format {
    PREPROCESS_BY_NAME, /* text for names that end in .txt, else jsonl */
    PREPROCESS_JSONL,   /* a JSON object a line; empty lines are passed over */
    PREPROCESS_TEXT,    /* the whole file is one document, under the first key */
};

enum { PREPROCESS_KEYS_MAX = 16 };

struct preprocess_progress {
    int64_t num_documents, num_tokens;
    int64_t done_bytes, total_bytes; /* of the input files */
};

struct preprocess_config {
    const char *const *inputs; /* file names */
    int num_inputs;
    enum preprocess_format format;
    const char *const *keys; /* of the JSON objects: a string, or a list of strings (sentences) */
    int num_keys;
    const char *output_prefix; /* files are PREFIX_KEY_document.bin and .idx */
    const struct tokenizer *tokenizer;
    bool append_eod;
    int num_workers;
    /* Called now and then while it runs, and at the end; may be NULL. */
    void (*report)(void *context, const struct preprocess_progress *progress);
    void *context;
};

/* Sets progress to the start: total_bytes of all inputs. */
int preprocess_measure(const struct preprocess_config *config,
                       struct preprocess_progress *progress);
/* -1 names the file and line; then no output is left. */
int preprocess_run(const struct preprocess_config *config, struct preprocess_progress *progress);

#endif
