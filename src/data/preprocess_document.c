#include "data/preprocess_document.h"

#include <jansson.h>

#include "base/check.h"

void encoded_clear(struct encoded *encoded)
{
    encoded->tokens.count = encoded->lengths.count = encoded->num_sequences.count = 0;
}

void encoded_free(struct encoded *encoded)
{
    token_list_free(&encoded->tokens);
    token_list_free(&encoded->lengths);
    token_list_free(&encoded->num_sequences);
}

/* A sentence is one sequence; one without tokens is none. */
static int encode_sentence(const struct preprocess_config *config, const char *text,
                           size_t num_bytes, struct encoded *encoded)
{
    const int64_t before = encoded->tokens.count;
    int32_t length;

    TRY(tokenizer_encode(config->tokenizer, text, num_bytes, &encoded->tokens));
    if (encoded->tokens.count - before >= INT32_MAX) {
        return error_set("a document of %lld tokens is longer than the format holds",
                         (long long)(encoded->tokens.count - before));
    }
    length = (int32_t)(encoded->tokens.count - before);
    if (length > 0) {
        token_list_append(&encoded->lengths, &length, 1);
    }
    return 0;
}

/* Closes the document whose sequences begin at number first. The end of document joins its last
 * sequence; an empty document gets none. */
static void end_document(const struct preprocess_config *config, int64_t first,
                         struct encoded *encoded)
{
    const int32_t num_sequences = (int32_t)(encoded->lengths.count - first);
    const int32_t eod = tokenizer_eod(config->tokenizer);

    if (config->append_eod && num_sequences > 0) {
        token_list_append(&encoded->tokens, &eod, 1);
        encoded->lengths.ids[encoded->lengths.count - 1]++;
    }
    token_list_append(&encoded->num_sequences, &num_sequences, 1);
}

int encode_text(const struct preprocess_config *config, const char *text, size_t num_bytes,
                struct encoded *encoded)
{
    const int64_t first = encoded->lengths.count;

    TRY(encode_sentence(config, text, num_bytes, encoded));
    end_document(config, first, encoded);
    return 0;
}

static int encode_value(const struct preprocess_config *config, const json_t *value,
                        const char *key, struct encoded *encoded)
{
    const int64_t first = encoded->lengths.count;

    if (json_is_string(value)) {
        TRY(encode_sentence(config, json_string_value(value), json_string_length(value), encoded));
    } else if (json_is_array(value)) {
        for (size_t i = 0; i < json_array_size(value); i++) {
            const json_t *sentence = json_array_get(value, i);

            if (!json_is_string(sentence)) {
                return error_set("\"%s\" is a list that holds something other than strings", key);
            }
            TRY(encode_sentence(config, json_string_value(sentence), json_string_length(sentence),
                                encoded));
        }
    } else {
        return error_set(value == NULL ? "there is no key \"%s\" (--json-keys)"
                                       : "\"%s\" is neither a string nor a list of strings",
                         key);
    }
    end_document(config, first, encoded);
    return 0;
}

int encode_json_line(const struct preprocess_config *config, const char *line, size_t num_bytes,
                     struct encoded *encoded)
{
    json_error_t error;
    /* numbers are not used: as reals, none is too large */
    json_t *object = json_loadb(line, num_bytes, JSON_ALLOW_NUL | JSON_DECODE_INT_AS_REAL, &error);
    int result = 0;

    if (!json_is_object(object)) {
        json_decref(object);
        return object == NULL ? error_set("not JSON: %s", error.text)
                              : error_set("not a JSON object");
    }
    for (int k = 0; result == 0 && k < config->num_keys; k++) {
        result = encode_value(config, json_object_get(object, config->keys[k]), config->keys[k],
                              &encoded[k]);
    }
    json_decref(object);
    return result;
}
