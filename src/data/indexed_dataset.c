/* The layout of PREFIX.idx, little endian, no padding:
 *
 *     9 bytes   "MMIDIDX\0\0"
 *     u64       version, 1
 *     u8        dtype code of .bin
 *     u64       n, sequences
 *     u64       m, entries of the document index: documents + 1
 *     i32[n]    length of each sequence in tokens
 *     i64[n]    its byte offset in .bin
 *     i64[m]    first sequence of each document; begins with 0 and ends with n
 *
 * The header has 34 bytes, so no array is aligned: all reads are by memcpy. Multimodal sets append
 * i8[n]; those are refused, since nothing here could train on them. */
#include "data/indexed_dataset.h"

#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/checked.h"
#include "data/token_source.h"

_Static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "the formats here are little endian");

enum { HEADER_BYTES = 34 };
static const char magic[9] = "MMIDIDX\0";

static const struct {
    const char *name;
    int num_bytes;
} dtypes[] = {
    [TOKEN_U8] = {"uint8", 1},    [TOKEN_I8] = {"int8", 1},    [TOKEN_I16] = {"int16", 2},
    [TOKEN_I32] = {"int32", 4},   [TOKEN_I64] = {"int64", 8},  [TOKEN_F64] = {"float64", 8},
    [TOKEN_F32] = {"float32", 4}, [TOKEN_U16] = {"uint16", 2},
};

int token_dtype_bytes(int code)
{
    return code >= TOKEN_U8 && code <= TOKEN_U16 ? dtypes[code].num_bytes : 0;
}

const char *token_dtype_name(int code)
{
    return code >= TOKEN_U8 && code <= TOKEN_U16 ? dtypes[code].name : "?";
}

enum token_dtype token_dtype_for_vocab(int64_t vocab_size)
{
    return vocab_size < 65500 ? TOKEN_U16 : TOKEN_I32;
}

static int32_t load_i32(const uint8_t *at)
{
    int32_t value;

    memcpy(&value, at, sizeof value);
    return value;
}

static int64_t load_i64(const uint8_t *at)
{
    int64_t value;

    memcpy(&value, at, sizeof value);
    return value;
}

int32_t indexed_dataset_length(const struct indexed_dataset *set, int64_t sequence)
{
    return load_i32(set->lengths + 4 * sequence);
}

int64_t indexed_dataset_pointer(const struct indexed_dataset *set, int64_t sequence)
{
    return load_i64(set->pointers + 8 * sequence);
}

int64_t indexed_dataset_document_start(const struct indexed_dataset *set, int64_t document)
{
    return load_i64(set->document_starts + 8 * document);
}

/* Checks the 34 bytes and that the file holds exactly the arrays they announce. */
static int parse_header(struct indexed_dataset *set, const char *path)
{
    const uint8_t *bytes = set->idx.bytes;
    const int64_t size_bytes = set->idx.size_bytes;
    int64_t version, num_sequences, num_starts;

    if (size_bytes < HEADER_BYTES || memcmp(bytes, magic, sizeof magic) != 0) {
        return error_set("%s is not an index of a Megatron data set (it does not begin with "
                         "MMIDIDX)",
                         path);
    }
    version = load_i64(bytes + 9);
    num_sequences = load_i64(bytes + 18);
    num_starts = load_i64(bytes + 26);
    if (version != 1) {
        return error_set("%s has version %lld of the format; only version 1 is known", path,
                         (long long)version);
    }
    if (token_dtype_bytes(bytes[17]) == 0) {
        return error_set("%s has dtype code %d; the codes are 1 to 8", path, bytes[17]);
    }
    if (num_sequences < 0 || num_sequences > INT32_MAX || num_starts < 1 ||
        num_starts > size_bytes / 8) {
        return error_set("%s announces %llu sequences and %llu document starts, which its %lld "
                         "bytes cannot hold",
                         path, (unsigned long long)num_sequences, (unsigned long long)num_starts,
                         (long long)size_bytes);
    }
    if (size_bytes != HEADER_BYTES + 12 * num_sequences + 8 * num_starts) {
        return error_set("%s holds %lld bytes, but %lld sequences and %lld documents take %lld%s",
                         path, (long long)size_bytes, (long long)num_sequences,
                         (long long)num_starts - 1,
                         (long long)(HEADER_BYTES + 12 * num_sequences + 8 * num_starts),
                         size_bytes == HEADER_BYTES + 13 * num_sequences + 8 * num_starts
                             ? " (a multimodal set; only text is supported)"
                             : "");
    }
    set->dtype = bytes[17];
    set->num_sequences = num_sequences;
    set->num_documents = num_starts - 1;
    set->lengths = bytes + HEADER_BYTES;
    set->pointers = set->lengths + 4 * num_sequences;
    set->document_starts = set->pointers + 8 * num_sequences;
    return 0;
}

static bool sequence_is_inside(const struct indexed_dataset *set, int64_t sequence)
{
    const int64_t length = indexed_dataset_length(set, sequence);
    const int64_t pointer = indexed_dataset_pointer(set, sequence);

    return length >= 0 && pointer >= 0 && pointer <= set->bin.size_bytes &&
           length * token_dtype_bytes(set->dtype) <= set->bin.size_bytes - pointer;
}

static int check_sequences(const struct indexed_dataset *set)
{
    for (int64_t i = 0; i < set->num_sequences; i++) {
        if (!sequence_is_inside(set, i)) {
            return error_set("%s.idx places sequence %lld at byte %lld with %d tokens of %d bytes, "
                             "but %s.bin has %lld bytes",
                             set->prefix, (long long)i, (long long)indexed_dataset_pointer(set, i),
                             indexed_dataset_length(set, i), token_dtype_bytes(set->dtype),
                             set->prefix, (long long)set->bin.size_bytes);
        }
    }
    return 0;
}

static int check_documents(const struct indexed_dataset *set)
{
    int64_t previous = 0;

    for (int64_t d = 0; d <= set->num_documents; d++) {
        const int64_t start = indexed_dataset_document_start(set, d);

        if (start < previous || start > set->num_sequences || (d == 0 && start != 0)) {
            return error_set(
                "%s.idx lets document %lld start at sequence %lld, after %lld and with "
                "%lld sequences in all",
                set->prefix, (long long)d, (long long)start, (long long)previous,
                (long long)set->num_sequences);
        }
        previous = start;
    }
    if (previous != set->num_sequences) {
        return error_set("%s.idx ends its documents at sequence %lld of %lld", set->prefix,
                         (long long)previous, (long long)set->num_sequences);
    }
    return 0;
}

static int open_and_check(struct indexed_dataset *set, const char *prefix)
{
    char path[PATH_LENGTH_MAX];

    TRY(path_format(set->prefix, "%s", prefix));
    TRY(path_format(path, "%s.idx", prefix));
    TRY(mapped_file_open(&set->idx, path));
    TRY(parse_header(set, path));
    TRY(path_format(path, "%s.bin", prefix));
    TRY(mapped_file_open(&set->bin, path));
    TRY(check_sequences(set));
    return check_documents(set);
}

int indexed_dataset_open(struct indexed_dataset *set, const char *prefix)
{
    *set = (struct indexed_dataset){0};
    if (open_and_check(set, prefix) != 0) {
        indexed_dataset_close(set);
        return -1;
    }
    return 0;
}

void indexed_dataset_close(struct indexed_dataset *set)
{
    mapped_file_close(&set->idx);
    mapped_file_close(&set->bin);
}

/* One token of a type other than u16, as a 64-bit value. */
static int64_t load_token(enum token_dtype dtype, const uint8_t *at)
{
    int16_t i16;

    switch (dtype) {
    case TOKEN_U8:
        return *at;
    case TOKEN_I8:
        return (int8_t)*at;
    case TOKEN_I16:
        memcpy(&i16, at, sizeof i16);
        return i16;
    case TOKEN_I32:
        return load_i32(at);
    default:
        return load_i64(at);
    }
}

int indexed_dataset_read(const struct indexed_dataset *set, int64_t sequence, int64_t first,
                         int64_t count, int32_t *tokens)
{
    const int item_bytes = token_dtype_bytes(set->dtype);
    const uint8_t *from;

    CHECK(first >= 0 && count >= 0 && first + count <= indexed_dataset_length(set, sequence),
          "tokens %lld + %lld of sequence %lld", (long long)first, (long long)count,
          (long long)sequence);
    if (set->dtype == TOKEN_F32 || set->dtype == TOKEN_F64) {
        return error_set("%s holds %s numbers, not tokens", set->prefix,
                         token_dtype_name(set->dtype));
    }
    from = set->bin.bytes + indexed_dataset_pointer(set, sequence) + first * item_bytes;
    for (int64_t i = 0; i < count; i++) {
        int64_t token;

        if (set->dtype == TOKEN_U16) {
            uint16_t u16;

            memcpy(&u16, from + 2 * i, sizeof u16);
            token = u16;
        } else {
            token = load_token(set->dtype, from + i * item_bytes);
        }
        if (token < 0 || token > INT32_MAX) {
            return error_set("%s: sequence %lld holds token %lld at position %lld", set->prefix,
                             (long long)sequence, (long long)token, (long long)(first + i));
        }
        tokens[i] = (int32_t)token;
    }
    return 0;
}

struct indexed_source {
    struct token_source base;
    struct indexed_dataset set;
};

static int32_t source_length(const struct token_source *source, int64_t sequence)
{
    return indexed_dataset_length(&((const struct indexed_source *)source)->set, sequence);
}

static int source_read(const struct token_source *source, int64_t sequence, int64_t first,
                       int64_t count, int32_t *tokens)
{
    return indexed_dataset_read(&((const struct indexed_source *)source)->set, sequence, first,
                                count, tokens);
}

static void source_close(struct token_source *source)
{
    indexed_dataset_close(&((struct indexed_source *)source)->set);
    free(source);
}

struct token_source *token_source_open_indexed(const char *prefix)
{
    struct indexed_source *source = calloc(1, sizeof *source);

    CHECK(source != NULL, "out of memory");
    if (indexed_dataset_open(&source->set, prefix) != 0) {
        free(source);
        return NULL;
    }
    source->base = (struct token_source){
        .name = source->set.prefix,
        .num_sequences = source->set.num_sequences,
        .length = source_length,
        .read = source_read,
        .close = source_close,
    };
    return &source->base;
}

void token_source_close(struct token_source *source)
{
    if (source != NULL) {
        source->close(source);
    }
}
