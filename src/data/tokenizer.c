#include "data/tokenizer.h"

#include <ctype.h>
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/path.h"
#include "data/sentencepiece_model.h"
#include "data/sentencepiece_shim.h"

enum { MODEL_BYTES_MAX = 64 << 20, TEXT_BYTES_MAX = 1 << 30, SPECIALS_MAX = 8, REASON_BYTES = 512 };

enum kind { LLAMA2, GPT_SENTENCEPIECE, SENTENCEPIECE, NUMBERS };

static const char *const type_names[] = {
    [LLAMA2] = "Llama2Tokenizer",
    [GPT_SENTENCEPIECE] = "GPTSentencePieceTokenizer",
    [SENTENCEPIECE] = "SentencePieceTokenizer",
    [NUMBERS] = "NullTokenizer",
    NULL,
};

/* A token that SentencePieceTokenizer cuts out of text before encoding the rest. */
struct special {
    const char *text;
    int32_t id;
};

struct tokenizer {
    enum kind kind;
    struct sentencepiece_processor *pieces; /* NULL for NUMBERS */
    int64_t vocab_size;
    int32_t bos, eod, pad;
    struct special specials[SPECIALS_MAX];
    int num_specials;
};

void token_list_append(struct token_list *list, const int32_t *ids, int64_t count)
{
    if (list->count + count > list->capacity) {
        list->capacity = 2 * (list->count + count);
        list->ids = realloc(list->ids, (size_t)list->capacity * sizeof list->ids[0]);
        CHECK(list->ids != NULL, "out of memory for %lld tokens", (long long)list->capacity);
    }
    if (count > 0) {
        memcpy(list->ids + list->count, ids, (size_t)count * sizeof ids[0]);
    }
    list->count += count;
}

void token_list_free(struct token_list *list)
{
    free(list->ids);
    *list = (struct token_list){0};
}

static int find_kind(const char *type)
{
    for (int kind = 0; type != NULL && type_names[kind] != NULL; kind++) {
        if (strcmp(type, type_names[kind]) == 0) {
            return kind;
        }
    }
    return error_set("--tokenizer-type %s is not known; there are " TOKENIZER_TYPES,
                     type != NULL ? type : "(none)");
}

static int load_pieces(struct tokenizer *tokenizer, const char *path)
{
    char reason[REASON_BYTES];
    size_t num_bytes;
    char *bytes;
    int result;

    if (path == NULL) {
        return error_set("%s needs --tokenizer-model", type_names[tokenizer->kind]);
    }
    bytes = path_read_file(path, MODEL_BYTES_MAX, &num_bytes);
    if (bytes == NULL) {
        return -1;
    }
    result = sentencepiece_model_check((const uint8_t *)bytes, num_bytes, path);
    if (result == 0) {
        tokenizer->pieces = sentencepiece_load(bytes, num_bytes, reason, sizeof reason);
        if (tokenizer->pieces == NULL) {
            result = error_set("%s: the SentencePiece library refuses it: %s", path, reason);
        }
    }
    free(bytes);
    return result;
}

/* The special token text: the model's piece of that name, or a new id. */
static int32_t add_special(struct tokenizer *tokenizer, const char *text)
{
    int32_t id = (int32_t)tokenizer->vocab_size;

    for (int32_t i = 0; i < sentencepiece_num_pieces(tokenizer->pieces); i++) {
        if (strcmp(sentencepiece_piece(tokenizer->pieces, i), text) == 0) {
            id = i;
        }
    }
    if (id == tokenizer->vocab_size) {
        tokenizer->vocab_size++;
    }
    tokenizer->specials[tokenizer->num_specials++] = (struct special){text, id};
    return id;
}

/* The model's own token, or else a special one of the given name. */
static int32_t add_special_of_model(struct tokenizer *tokenizer, int32_t id, const char *text)
{
    return add_special(tokenizer, id >= 0 ? sentencepiece_piece(tokenizer->pieces, id) : text);
}

/* In the order in which Megatron gives out ids. */
static void add_specials(struct tokenizer *tokenizer)
{
    add_special(tokenizer, "<CLS>");
    add_special(tokenizer, "<SEP>");
    tokenizer->eod = add_special(tokenizer, "<EOD>");
    add_special(tokenizer, "<MASK>");
    tokenizer->pad = add_special_of_model(tokenizer, tokenizer->pad, "<PAD>");
    tokenizer->bos = add_special_of_model(tokenizer, tokenizer->bos, "<BOS>");
    add_special_of_model(tokenizer, sentencepiece_eos(tokenizer->pieces), "<EOS>");
}

static int open_pieces(struct tokenizer *tokenizer, const char *path)
{
    TRY(load_pieces(tokenizer, path));
    tokenizer->vocab_size = sentencepiece_num_pieces(tokenizer->pieces);
    tokenizer->bos = sentencepiece_bos(tokenizer->pieces);
    tokenizer->eod = sentencepiece_eos(tokenizer->pieces);
    tokenizer->pad = sentencepiece_pad(tokenizer->pieces);
    if (tokenizer->kind == SENTENCEPIECE) {
        add_specials(tokenizer);
    }
    if (tokenizer->eod < 0 || (tokenizer->kind == LLAMA2 && tokenizer->bos < 0)) {
        return error_set("%s has no %s piece, which %s needs", path,
                         tokenizer->eod < 0 ? "end of sentence (</s>)"
                                            : "beginning of sentence (<s>)",
                         type_names[tokenizer->kind]);
    }
    return 0;
}

static int open_numbers(struct tokenizer *tokenizer, int64_t vocab_size)
{
    if (vocab_size < 1 || vocab_size > INT32_MAX) {
        return error_set("NullTokenizer needs --vocab-size from 1 to %d, not %lld", INT32_MAX,
                         (long long)vocab_size);
    }
    tokenizer->vocab_size = vocab_size;
    tokenizer->eod = (int32_t)vocab_size - 1;
    tokenizer->bos = tokenizer->pad = -1;
    return 0;
}

struct tokenizer *tokenizer_open(const struct tokenizer_config *config)
{
    struct tokenizer *tokenizer;
    const int kind = find_kind(config->type);

    if (kind < 0) {
        return NULL;
    }
    tokenizer = calloc(1, sizeof *tokenizer);
    CHECK(tokenizer != NULL, "out of memory");
    tokenizer->kind = (enum kind)kind;
    if ((kind == NUMBERS ? open_numbers(tokenizer, config->vocab_size)
                         : open_pieces(tokenizer, config->model)) != 0) {
        tokenizer_close(tokenizer);
        return NULL;
    }
    return tokenizer;
}

void tokenizer_close(struct tokenizer *tokenizer)
{
    if (tokenizer != NULL) {
        sentencepiece_free(tokenizer->pieces);
        free(tokenizer);
    }
}

int64_t tokenizer_vocab_size(const struct tokenizer *tokenizer)
{
    return tokenizer->vocab_size;
}

int32_t tokenizer_eod(const struct tokenizer *tokenizer)
{
    return tokenizer->eod;
}

int32_t tokenizer_bos(const struct tokenizer *tokenizer)
{
    return tokenizer->bos;
}

int32_t tokenizer_pad(const struct tokenizer *tokenizer)
{
    return tokenizer->pad;
}

static int encode_pieces(const struct tokenizer *tokenizer, const char *text, size_t num_bytes,
                         struct token_list *list)
{
    char reason[REASON_BYTES];
    int32_t *ids = NULL;
    int64_t num_ids;

    if (num_bytes > TEXT_BYTES_MAX) { /* the library counts symbols in an int */
        return error_set("a text of %zu bytes is longer than the %d that can be encoded at once",
                         num_bytes, TEXT_BYTES_MAX);
    }
    if (sentencepiece_encode(tokenizer->pieces, text, num_bytes, &ids, &num_ids, reason,
                             sizeof reason) != 0) {
        return error_set("cannot encode a text of %zu bytes: %s", num_bytes, reason);
    }
    token_list_append(list, ids, num_ids);
    free(ids);
    return 0;
}

/* The special token that begins earliest in text (the first added where several begin there), NULL
 * if there is none. */
static const struct special *first_special(const struct tokenizer *tokenizer, const char *text,
                                           size_t num_bytes, const char **where)
{
    const struct special *first = NULL;

    for (int i = 0; i < tokenizer->num_specials; i++) {
        const struct special *special = &tokenizer->specials[i];
        const char *at = memmem(text, num_bytes, special->text, strlen(special->text));

        if (at != NULL && (first == NULL || at < *where)) {
            first = special;
            *where = at;
        }
    }
    return first;
}

static int encode_around_specials(const struct tokenizer *tokenizer, const char *text,
                                  size_t num_bytes, struct token_list *list)
{
    const char *end = text + num_bytes, *where = NULL;
    const struct special *special;

    while ((special = first_special(tokenizer, text, (size_t)(end - text), &where)) != NULL) {
        TRY(encode_pieces(tokenizer, text, (size_t)(where - text), list));
        token_list_append(list, &special->id, 1);
        text = where + strlen(special->text);
    }
    return encode_pieces(tokenizer, text, (size_t)(end - text), list);
}

/* Numbers separated by white space. */
static int encode_numbers(const struct tokenizer *tokenizer, const char *text, size_t num_bytes,
                          struct token_list *list)
{
    const char *end = text + num_bytes;

    while (text < end) {
        int64_t id = 0;
        const char *start = text;
        int32_t token;

        if (isspace((unsigned char)*text)) {
            text++;
            continue;
        }
        while (text < end && isdigit((unsigned char)*text) && id < tokenizer->vocab_size) {
            id = 10 * id + (*text++ - '0');
        }
        if (text == start || (text < end && !isspace((unsigned char)*text)) ||
            id >= tokenizer->vocab_size) {
            return error_set("NullTokenizer reads numbers from 0 to %lld; \"%.*s\" is none",
                             (long long)tokenizer->vocab_size - 1,
                             (int)(end - start < 20 ? end - start : 20), start);
        }
        token = (int32_t)id;
        token_list_append(list, &token, 1);
    }
    return 0;
}

int tokenizer_encode(const struct tokenizer *tokenizer, const char *text, size_t num_bytes,
                     struct token_list *list)
{
    switch (tokenizer->kind) {
    case LLAMA2:
        token_list_append(list, &tokenizer->bos, 1);
        return encode_pieces(tokenizer, text, num_bytes, list);
    case GPT_SENTENCEPIECE:
        return encode_pieces(tokenizer, text, num_bytes, list);
    case SENTENCEPIECE:
        return encode_around_specials(tokenizer, text, num_bytes, list);
    case NUMBERS:
        break;
    }
    return encode_numbers(tokenizer, text, num_bytes, list);
}

/* A string that grows. */
struct text {
    char *bytes;
    size_t count, capacity;
};

static void text_append(struct text *text, const char *bytes, size_t count)
{
    if (text->count + count + 1 > text->capacity) {
        text->capacity = 2 * (text->count + count + 1);
        text->bytes = realloc(text->bytes, text->capacity);
        CHECK(text->bytes != NULL, "out of memory for a text of %zu bytes", text->capacity);
    }
    memcpy(text->bytes + text->count, bytes, count);
    text->count += count;
    text->bytes[text->count] = '\0';
}

static int decode_pieces(const struct tokenizer *tokenizer, const int32_t *ids, int64_t num_ids,
                         struct text *text)
{
    char reason[REASON_BYTES];
    size_t num_bytes;
    char *bytes;

    if (sentencepiece_decode(tokenizer->pieces, ids, num_ids, &bytes, &num_bytes, reason,
                             sizeof reason) != 0) {
        return error_set("cannot decode %lld tokens: %s", (long long)num_ids, reason);
    }
    text_append(text, bytes, num_bytes);
    free(bytes);
    return 0;
}

static const struct special *special_of_id(const struct tokenizer *tokenizer, int32_t id)
{
    for (int i = 0; i < tokenizer->num_specials; i++) {
        if (tokenizer->specials[i].id == id) {
            return &tokenizer->specials[i];
        }
    }
    return NULL;
}

/* Special tokens are written with a space on either side, as Megatron does. */
static int decode_around_specials(const struct tokenizer *tokenizer, const int32_t *ids,
                                  int64_t num_ids, struct text *text)
{
    int64_t first = 0;

    for (int64_t i = 0; i < num_ids; i++) {
        const struct special *special = special_of_id(tokenizer, ids[i]);

        if (special != NULL) {
            TRY(decode_pieces(tokenizer, ids + first, i - first, text));
            text_append(text, " ", 1);
            text_append(text, special->text, strlen(special->text));
            text_append(text, " ", 1);
            first = i + 1;
        }
    }
    return decode_pieces(tokenizer, ids + first, num_ids - first, text);
}

static void decode_numbers(const int32_t *ids, int64_t num_ids, struct text *text)
{
    for (int64_t i = 0; i < num_ids; i++) {
        char number[16];
        const int length = snprintf(number, sizeof number, i == 0 ? "%d" : " %d", ids[i]);

        text_append(text, number, (size_t)length);
    }
}

char *tokenizer_decode(const struct tokenizer *tokenizer, const int32_t *ids, int64_t num_ids,
                       size_t *num_bytes)
{
    struct text text = {0};
    int result = 0;

    for (int64_t i = 0; i < num_ids; i++) {
        if (ids[i] < 0 || ids[i] >= tokenizer->vocab_size) {
            return FAIL_NULL("token %d is none of the tokenizer's %lld", ids[i],
                             (long long)tokenizer->vocab_size);
        }
    }
    text_append(&text, "", 0);
    if (tokenizer->kind == NUMBERS) {
        decode_numbers(ids, num_ids, &text);
    } else {
        result = decode_around_specials(tokenizer, ids, num_ids, &text);
    }
    if (result != 0) {
        free(text.bytes);
        return NULL;
    }
    if (num_bytes != NULL) {
        *num_bytes = text.count;
    }
    return text.bytes;
}
