/* A model is a protobuf message (proto2). What is checked here is what the library does not check:
 *
 *   - pieces: not empty, of bounded length (it recurses over them), without NUL bytes (it measures
 *     them with strlen), valid UTF-8, finite scores, known types, one unknown piece, byte pieces
 * that are bytes;
 *   - the normaliser's precompiled_charsmap: a double-array trie whose nodes are followed without
 *     bounds, into strings that are read without bounds, with at most 32 matches on one path. */
#include "data/sentencepiece_model.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"

enum {
    PIECES_MAX = 1 << 22,
    PIECE_BYTES_MAX = 4096,
    CHARSMAP_BYTES_MAX = 1 << 22,
    REPLACEMENT_BYTES_MAX = 4096,
    TRIE_DEPTH_MAX = 256,
    TRIE_MATCHES_MAX = 32, /* the library's array of results */
};

enum wire { WIRE_VARINT = 0, WIRE_64 = 1, WIRE_BYTES = 2, WIRE_32 = 5 };

/* A stretch of the file. */
struct span {
    const uint8_t *at, *end;
};

struct field {
    uint64_t number;
    enum wire wire;
    uint64_t value;    /* varint or fixed */
    struct span bytes; /* WIRE_BYTES */
};

static size_t span_bytes(struct span span)
{
    return (size_t)(span.end - span.at);
}

static bool read_varint(struct span *span, uint64_t *value)
{
    *value = 0;
    for (int shift = 0; shift < 64 && span->at < span->end; shift += 7) {
        const uint8_t byte = *span->at++;

        *value |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80) {
            return true;
        }
    }
    return false;
}

static bool read_fixed(struct span *span, uint64_t *value, size_t num_bytes)
{
    if (span_bytes(*span) < num_bytes) {
        return false;
    }
    *value = 0;
    memcpy(value, span->at, num_bytes);
    span->at += num_bytes;
    return true;
}

/* The next field. Groups (wire types 3 and 4), which no model uses, count as broken. */
static bool read_field(struct span *span, struct field *field)
{
    uint64_t tag;

    if (!read_varint(span, &tag)) {
        return false;
    }
    field->number = tag >> 3;
    field->wire = (enum wire)(tag & 7);
    switch (field->wire) {
    case WIRE_VARINT:
        return read_varint(span, &field->value);
    case WIRE_64:
        return read_fixed(span, &field->value, 8);
    case WIRE_32:
        return read_fixed(span, &field->value, 4);
    case WIRE_BYTES:
        if (!read_varint(span, &field->value) || field->value > span_bytes(*span)) {
            return false;
        }
        field->bytes = (struct span){span->at, span->at + field->value};
        span->at += field->value;
        return true;
    }
    return false;
}

/* Well-formed UTF-8 (no surrogates, no overlong forms), as the library assumes of pieces. */
static bool is_utf8(struct span text)
{
    while (text.at < text.end) {
        const uint8_t lead = *text.at++;
        const int num_more = lead < 0x80 ? 0 : lead < 0xe0 ? 1 : lead < 0xf0 ? 2 : 3;
        uint32_t code = lead;

        if ((lead >= 0x80 && lead < 0xc2) || lead > 0xf4 || text.end - text.at < num_more) {
            return false;
        }
        for (int i = 0; i < num_more; i++) {
            const uint8_t byte = *text.at++;

            if ((byte & 0xc0) != 0x80) {
                return false;
            }
            code = i == 0 ? (lead & (0x3fu >> num_more)) << 6 | (byte & 0x3fu)
                          : code << 6 | (byte & 0x3fu);
        }
        if ((num_more == 2 && (code < 0x800 || (code >= 0xd800 && code < 0xe000))) ||
            (num_more == 3 && (code < 0x10000 || code > 0x10ffff))) {
            return false;
        }
    }
    return true;
}

enum piece_type { PIECE_NORMAL = 1, PIECE_UNKNOWN = 2, PIECE_BYTE = 6 };

/* "<0x00>" to "<0xFF>" */
static bool is_byte_piece(struct span text)
{
    static const char digits[] = "0123456789ABCDEF";

    return span_bytes(text) == 6 && memcmp(text.at, "<0x", 3) == 0 && text.at[5] == '>' &&
           text.at[3] != 0 && text.at[4] != 0 && strchr(digits, text.at[3]) != NULL &&
           strchr(digits, text.at[4]) != NULL;
}

struct model_facts {
    int64_t num_pieces, num_unknown;
    const char *path;
};

/* piece = 1 string, score = 2 float, type = 3 enum */
static int check_piece(struct span message, struct model_facts *facts)
{
    struct span text = {0};
    uint64_t type = PIECE_NORMAL;
    float score = 0.0f;
    struct field field;

    while (message.at < message.end) {
        if (!read_field(&message, &field) || (field.number == 1 && field.wire != WIRE_BYTES) ||
            (field.number == 2 && field.wire != WIRE_32) ||
            (field.number == 3 && field.wire != WIRE_VARINT)) {
            return error_set("%s: piece %lld is broken", facts->path, (long long)facts->num_pieces);
        }
        if (field.number == 1) {
            text = field.bytes;
        } else if (field.number == 2) {
            memcpy(&score, &field.value, sizeof score);
        } else if (field.number == 3) {
            type = field.value;
        }
    }
    if (span_bytes(text) == 0 || span_bytes(text) > PIECE_BYTES_MAX ||
        memchr(text.at, '\0', span_bytes(text)) != NULL || !is_utf8(text)) {
        return error_set(
            "%s: piece %lld (%zu bytes) is not UTF-8 text of 1 to %d bytes without NUL",
            facts->path, (long long)facts->num_pieces, span_bytes(text), PIECE_BYTES_MAX);
    }
    if (!isfinite(score) || type < PIECE_NORMAL || type > PIECE_BYTE ||
        (type == PIECE_BYTE && !is_byte_piece(text))) {
        return error_set(
            "%s: piece %lld has score %g and type %llu; legal are finite scores, types "
            "1 to 6, and type 6 for <0x00> to <0xFF>",
            facts->path, (long long)facts->num_pieces, (double)score, (unsigned long long)type);
    }
    facts->num_pieces++;
    facts->num_unknown += type == PIECE_UNKNOWN;
    return 0;
}

/* A double array (Aoe 1989) as Darts-clone lays it out. A unit has a label (8 bits), an offset to
 * its children and a flag that says whether it ends a key; the value of a key is the low 31 bits of
 * the child with label 0. Suffixes may be shared, so the graph has no cycle but need not be a tree.
 */
struct trie {
    const uint8_t *units; /* unaligned */
    uint32_t num_units;
    size_t replacements_bytes;
    uint8_t *most_matches; /* [num_units] below a node and at it; NOT_SEEN, ON_PATH */
};

/* A node on the path to itself is a cycle: it counts as more matches than are allowed. */
enum { NOT_SEEN = 255, ON_PATH = 254 };

static uint32_t trie_unit(const struct trie *trie, uint32_t i)
{
    uint32_t unit;

    memcpy(&unit, trie->units + 4 * (size_t)i, sizeof unit);
    return unit;
}

/* Visits what the library can reach from node; false where it could leave the array. */
static bool visit_node(struct trie *trie, uint32_t node, int depth)
{
    const uint32_t unit = trie_unit(trie, node);
    const uint32_t base = node ^ ((unit >> 10) << ((unit & 0x200) >> 6));
    const bool ends_key = (unit >> 8 & 1) != 0;
    int most = 0;

    if ((base | 0xff) >= trie->num_units || depth > TRIE_DEPTH_MAX) {
        return false;
    }
    if (ends_key && (trie_unit(trie, base) & 0x7fffffff) >= trie->replacements_bytes) {
        return false;
    }
    trie->most_matches[node] = ON_PATH;
    for (uint32_t label = 0; label < 256; label++) {
        const uint32_t child = base ^ label;

        if ((trie_unit(trie, child) & 0x800000ff) != label) {
            continue; /* the unit of another node, or a value (bit 31) */
        }
        if (trie->most_matches[child] == NOT_SEEN && !visit_node(trie, child, depth + 1)) {
            return false;
        }
        most = trie->most_matches[child] > most ? trie->most_matches[child] : most;
    }
    most += ends_key;
    trie->most_matches[node] = (uint8_t)most;
    return most <= TRIE_MATCHES_MAX;
}

/* The strings that keys are replaced with, each ended by a NUL. */
static bool check_replacements(struct span strings)
{
    while (strings.at < strings.end) {
        const uint8_t *nul = memchr(strings.at, '\0', span_bytes(strings));
        const struct span text = {strings.at, nul != NULL ? nul : strings.end};

        if (nul == NULL || span_bytes(text) > REPLACEMENT_BYTES_MAX || !is_utf8(text)) {
            return false;
        }
        strings.at = nul + 1;
    }
    return true;
}

/* u32 bytes of trie, trie, strings */
static bool check_charsmap(struct span charsmap)
{
    struct trie trie;
    uint64_t trie_bytes;
    bool is_good;

    if (span_bytes(charsmap) > CHARSMAP_BYTES_MAX || !read_fixed(&charsmap, &trie_bytes, 4) ||
        trie_bytes == 0 || trie_bytes % 4 != 0 || trie_bytes >= span_bytes(charsmap)) {
        return false;
    }
    trie.units = charsmap.at;
    trie.num_units = (uint32_t)(trie_bytes / 4);
    charsmap.at += trie_bytes;
    trie.replacements_bytes = span_bytes(charsmap);
    trie.most_matches = malloc(trie.num_units);
    CHECK(trie.most_matches != NULL, "out of memory");
    memset(trie.most_matches, NOT_SEEN, trie.num_units);
    is_good = check_replacements(charsmap) && visit_node(&trie, 0, 0);
    free(trie.most_matches);
    return is_good;
}

/* precompiled_charsmap = 2 bytes; empty: none */
static int check_normalizer(struct span message, const char *path)
{
    struct field field;

    while (message.at < message.end) {
        if (!read_field(&message, &field) || (field.number == 2 && field.wire != WIRE_BYTES)) {
            return error_set("%s: the normalizer is broken", path);
        }
        if (field.number == 2 && span_bytes(field.bytes) > 0 && !check_charsmap(field.bytes)) {
            return error_set("%s: the normalizer's precompiled_charsmap (%zu bytes) is not a trie "
                             "that stays inside its array",
                             path, span_bytes(field.bytes));
        }
    }
    return 0;
}

int sentencepiece_model_check(const uint8_t *bytes, size_t num_bytes, const char *path)
{
    enum { PIECES = 1, DENORMALIZER = 5, NORMALIZER = 3 };
    struct model_facts facts = {.path = path};
    struct span message = {bytes, bytes + num_bytes};
    struct field field;

    while (message.at < message.end) {
        if (!read_field(&message, &field) ||
            (field.number >= PIECES && field.number <= DENORMALIZER && field.wire != WIRE_BYTES)) {
            return error_set("%s is not a SentencePiece model (broken at byte %zu of %zu)", path,
                             (size_t)(message.at - bytes), num_bytes);
        }
        if (field.number == PIECES) {
            TRY(check_piece(field.bytes, &facts));
        } else if (field.number == NORMALIZER || field.number == DENORMALIZER) {
            TRY(check_normalizer(field.bytes, path));
        }
        if (facts.num_pieces > PIECES_MAX) {
            return error_set("%s has more than %d pieces", path, PIECES_MAX);
        }
    }
    if (facts.num_unknown != 1) {
        return error_set("%s is not a SentencePiece model: %lld pieces, %lld of them unknown; one "
                         "must be",
                         path, (long long)facts.num_pieces, (long long)facts.num_unknown);
    }
    return 0;
}
