/* Golden ids: sentencepiece 0.2.3 on the models of tests/fixtures/tokenizer, which spm_train made
 * from the text of the Apache licence: bpe.model has byte pieces and no normaliser; unigram.model
 * has a precompiled_charsmap and a pad piece. */
#include "data_test.h"

#include <math.h>

#include "data/sentencepiece_model.h"
#include "data/tokenizer.h"

static struct tokenizer *open_fixture(const char *type, const char *model)
{
    char path[PATH_LENGTH_MAX];
    struct tokenizer *tokenizer;

    assert_int_equal(path_format(path, "%s/tokenizer/%s", FIXTURES, model), 0);
    tokenizer = tokenizer_open(&(struct tokenizer_config){.type = type, .model = path});
    assert_non_null(tokenizer);
    return tokenizer;
}

static void assert_encodes(const struct tokenizer *tokenizer, const char *text,
                           const int32_t *expected, int64_t count)
{
    struct token_list list = {0};

    assert_int_equal(tokenizer_encode(tokenizer, text, strlen(text), &list), 0);
    assert_int_equal(list.count, count);
    assert_memory_equal(list.ids, expected, (size_t)count * sizeof *expected);
    token_list_free(&list);
}

static void assert_decodes(const struct tokenizer *tokenizer, const int32_t *ids, int64_t count,
                           const char *expected)
{
    size_t num_bytes;
    char *text = tokenizer_decode(tokenizer, ids, count, &num_bytes);

    assert_non_null(text);
    assert_string_equal(text, expected);
    assert_int_equal(num_bytes, strlen(expected));
    free(text);
}

#define IDS(...) ((const int32_t[]){__VA_ARGS__}), sizeof((int32_t[]){__VA_ARGS__}) / 4

static void gpt_sentencepiece_is_the_library_itself(void **state)
{
    struct tokenizer *bpe = open_fixture("GPTSentencePieceTokenizer", "bpe.model");
    struct tokenizer *unigram = open_fixture("GPTSentencePieceTokenizer", "unigram.model");

    assert_int_equal(tokenizer_vocab_size(bpe), 400);
    assert_int_equal(tokenizer_bos(bpe), 1);
    assert_int_equal(tokenizer_eod(bpe), 2);
    assert_int_equal(tokenizer_pad(bpe), -1);
    assert_int_equal(tokenizer_pad(unigram), 3);
    assert_encodes(bpe, "The License is good.",
                   IDS(325, 360, 335, 326, 323, 325, 284, 325, 345, 329, 329, 336, 349));
    assert_encodes(
        bpe, "  two  spaces 2004",
        IDS(325, 325, 259, 346, 329, 325, 279, 341, 332, 334, 297, 325, 376, 373, 373, 385));
    assert_encodes(unigram, "The License is good.", IDS(236, 9, 30, 97, 4, 55, 18, 18, 15, 12));
    assert_encodes(unigram, "caf\u00e9 \U0001f600 \ufb01",
                   IDS(239, 47, 9, 0, 4, 0, 4, 47, 8)); /* the charsmap makes it cafe, fi */
    assert_decodes(bpe, IDS(274, 332, 339, 198, 172, 325, 243, 162, 155, 131),
                   "caf\u00e9 \U0001f600");
    tokenizer_close(bpe);
    tokenizer_close(unigram);
}

static void llama2_puts_bos_in_front(void **state)
{
    struct tokenizer *tokenizer = open_fixture("Llama2Tokenizer", "bpe.model");

    assert_encodes(tokenizer, "", IDS(1));
    assert_encodes(tokenizer, "A\tB\nC", IDS(1, 325, 361, 12, 379, 13, 354));
    assert_decodes(tokenizer, IDS(1, 325, 361, 12, 379, 13, 354), "A\tB\nC");
    assert_int_equal(tokenizer_eod(tokenizer), 2);
    tokenizer_close(tokenizer);
}

/* Ids behind the 300 pieces: <CLS> 300, <SEP> 301, <EOD> 302, <MASK> 303; pad, bos and eos are the
 * model's own. */
static void sentencepiece_recognises_special_tokens_in_text(void **state)
{
    struct tokenizer *tokenizer = open_fixture("SentencePieceTokenizer", "unigram.model");
    struct tokenizer *bpe = open_fixture("SentencePieceTokenizer", "bpe.model");

    assert_int_equal(tokenizer_vocab_size(tokenizer), 304);
    assert_int_equal(tokenizer_eod(tokenizer), 302);
    assert_int_equal(tokenizer_pad(tokenizer), 3);
    assert_encodes(tokenizer, "The<EOD>The<CLS><SEP>", IDS(236, 9, 302, 236, 9, 300, 301));
    assert_encodes(tokenizer, "</s>The", IDS(2, 236, 9));
    assert_decodes(tokenizer, IDS(236, 9, 302, 236, 9), "The <EOD> The");
    assert_int_equal(tokenizer_vocab_size(bpe), 405);
    assert_int_equal(tokenizer_pad(bpe), 404);
    tokenizer_close(tokenizer);
    tokenizer_close(bpe);
}

static void null_tokenizer_reads_numbers(void **state)
{
    struct tokenizer *tokenizer =
        tokenizer_open(&(struct tokenizer_config){.type = "NullTokenizer", .vocab_size = 100});
    static const char *const bad[] = {"100", "1 x", "-1", "1,2", "99999999999999999999", "1\xff"};
    struct token_list list = {0};

    assert_int_equal(tokenizer_vocab_size(tokenizer), 100);
    assert_int_equal(tokenizer_eod(tokenizer), 99);
    assert_int_equal(tokenizer_bos(tokenizer), -1);
    assert_encodes(tokenizer, " 0 7\n99 ", IDS(0, 7, 99));
    assert_decodes(tokenizer, IDS(0, 7, 99), "0 7 99");
    for (size_t i = 0; i < sizeof bad / sizeof bad[0]; i++) {
        assert_int_equal(tokenizer_encode(tokenizer, bad[i], strlen(bad[i]), &list), -1);
        assert_error_mentions("NullTokenizer reads numbers from 0 to 99");
    }
    assert_null(tokenizer_decode(tokenizer, (int32_t[]){100}, 1, NULL));
    assert_null(tokenizer_decode(tokenizer, (int32_t[]){-1}, 1, NULL));
    token_list_free(&list);
    tokenizer_close(tokenizer);
}

static void what_cannot_be_opened_says_why(void **state)
{
    assert_null(tokenizer_open(&(struct tokenizer_config){.type = "GPT2BPETokenizer"}));
    assert_error_mentions("GPT2BPETokenizer is not known");
    assert_null(tokenizer_open(&(struct tokenizer_config){.type = "Llama2Tokenizer"}));
    assert_error_mentions("needs --tokenizer-model");
    assert_null(tokenizer_open(&(struct tokenizer_config){.type = "NullTokenizer"}));
    assert_error_mentions("--vocab-size");
    assert_null(tokenizer_open(
        &(struct tokenizer_config){.type = "Llama2Tokenizer", .model = "/nonexistent.model"}));
    assert_error_mentions("/nonexistent.model");
}

/* A model under construction. */
struct message {
    uint8_t bytes[1 << 16];
    size_t count;
};

static void put_byte(struct message *message, int byte)
{
    message->bytes[message->count++] = (uint8_t)byte;
}

static void put_varint(struct message *message, uint64_t value)
{
    for (; value >= 0x80; value >>= 7) {
        put_byte(message, (int)(value & 0x7f) | 0x80);
    }
    put_byte(message, (int)value);
}

static void put_field(struct message *message, int number, const void *bytes, size_t count)
{
    put_varint(message, (uint64_t)number << 3 | 2);
    put_varint(message, count);
    memcpy(message->bytes + message->count, bytes, count);
    message->count += count;
}

static void put_piece(struct message *model, const char *text, size_t length, float score, int type)
{
    struct message piece = {.count = 0};

    put_field(&piece, 1, text, length);
    put_byte(&piece, 2 << 3 | 5);
    memcpy(piece.bytes + piece.count, &score, 4);
    piece.count += 4;
    put_byte(&piece, 3 << 3);
    put_varint(&piece, (uint64_t)type);
    put_field(model, 1, piece.bytes, piece.count);
}

static int check(const struct message *model)
{
    return sentencepiece_model_check(model->bytes, model->count, "m");
}

/* <unk> and one more piece. */
static struct message model_with_piece(const char *text, size_t length, float score, int type)
{
    struct message model = {.count = 0};

    put_piece(&model, "<unk>", 5, 0.0f, 2);
    put_piece(&model, text, length, score, type);
    return model;
}

static void pieces_the_library_chokes_on_are_refused(void **state)
{
    static char long_text[5000];
    struct message model = model_with_piece("a", 1, -1.0f, 1);

    memset(long_text, 'a', sizeof long_text);
    assert_int_equal(check(&model), 0);
#define ASSERT_REFUSED(...)                                                                        \
    model = model_with_piece(__VA_ARGS__);                                                         \
    assert_int_equal(check(&model), -1);                                                           \
    assert_error_mentions("piece 1")
    ASSERT_REFUSED("", 0, 0.0f, 1);
    ASSERT_REFUSED("a\0b", 3, 0.0f, 1); /* CVE-2026-1260: keys measured with strlen */
    ASSERT_REFUSED(long_text, sizeof long_text, 0.0f, 1); /* recursion over its length */
    ASSERT_REFUSED("\xff", 1, 0.0f, 1);
    ASSERT_REFUSED("\xc0\xaf", 2, 0.0f, 1);         /* overlong */
    ASSERT_REFUSED("\xed\xa0\x80", 3, 0.0f, 1);     /* surrogate */
    ASSERT_REFUSED("\xf4\x90\x80\x80", 4, 0.0f, 1); /* above U+10FFFF */
    ASSERT_REFUSED("\xe2\x96", 2, 0.0f, 1);         /* cut short */
    ASSERT_REFUSED("a", 1, NAN, 1);
    ASSERT_REFUSED("a", 1, INFINITY, 1);
    ASSERT_REFUSED("a", 1, 0.0f, 0);
    ASSERT_REFUSED("a", 1, 0.0f, 7);
    ASSERT_REFUSED("a", 1, 0.0f, 6);
    ASSERT_REFUSED("<0xg0>", 6, 0.0f, 6);
#undef ASSERT_REFUSED
    model = model_with_piece("\xf4\x8f\xbf\xbf\xe2\x96\x81", 7, 0.0f, 1);
    assert_int_equal(check(&model), 0);
    model = model_with_piece("a", 1, 0.0f, 2);
    assert_int_equal(check(&model), -1);
    assert_error_mentions("2 of them unknown");
    model.count = 0;
    assert_int_equal(check(&model), -1);
    assert_error_mentions("0 pieces");
}

/* Units of a trie with the one key "A", replaced with the string at 0: root -> 'A' -> value. */
enum { NUM_UNITS = 512, NODE_A = 1 ^ 'A' };

static void build_trie(uint32_t units[NUM_UNITS])
{
    memset(units, 0xff, NUM_UNITS * sizeof units[0]); /* values, which no label matches */
    units[0] = 1u << 10;                              /* root: children at 0 ^ 1 ^ label */
    units[NODE_A] = 'A' | 1u << 8 | 0x100u << 10;     /* ends a key; children at NODE_A ^ 0x100 */
    units[NODE_A ^ 0x100] = 0x80000000u;              /* the value 0 */
}

static int check_trie(const uint32_t *units, uint32_t num_units, const char *strings,
                      size_t num_bytes)
{
    static struct message model, normalizer, charsmap;
    const uint32_t trie_bytes = num_units * 4;

    model = model_with_piece("a", 1, 0.0f, 1);
    memcpy(charsmap.bytes, &trie_bytes, 4);
    memcpy(charsmap.bytes + 4, units, trie_bytes);
    memcpy(charsmap.bytes + 4 + trie_bytes, strings, num_bytes);
    normalizer.count = 0;
    put_field(&normalizer, 2, charsmap.bytes, 4 + trie_bytes + num_bytes);
    put_field(&model, 3, normalizer.bytes, normalizer.count);
    return check(&model);
}

static void tries_that_lead_out_of_their_array_are_refused(void **state)
{
    uint32_t units[NUM_UNITS];

    build_trie(units);
    assert_int_equal(check_trie(units, NUM_UNITS, "a", 2), 0);
    assert_int_equal(check_trie(units, NUM_UNITS, "a", 1), -1); /* no NUL */
    assert_int_equal(check_trie(units, NUM_UNITS, "\xff", 2), -1);
    assert_int_equal(check_trie(units, NUM_UNITS, "", 0), -1);
    assert_int_equal(check_trie(units, 0, "a", 2), -1);

    units[0] = 0x3ffu << 10 | 1u << 9; /* upstream issue 1269: a root offset of 2^18 */
    assert_int_equal(check_trie(units, NUM_UNITS, "a", 2), -1);
    assert_error_mentions("precompiled_charsmap");

    build_trie(units);
    units[0] = NUM_UNITS << 10; /* just behind the array */
    assert_int_equal(check_trie(units, NUM_UNITS, "a", 2), -1);

    build_trie(units);
    units[NODE_A ^ 0x100] = 0x80000002u; /* a replacement behind the strings */
    assert_int_equal(check_trie(units, NUM_UNITS, "a", 2), -1);

    build_trie(units);
    units[NODE_A] = 'A' | (uint32_t)(NODE_A ^ 1) << 10; /* 'A' leads to the root's children again */
    assert_int_equal(check_trie(units, NUM_UNITS, "a", 2), -1);
}

/* Keys A, AA, AAA, ...: the library has room for 32 matches. */
static void too_many_matches_on_one_path_are_refused(void **state)
{
    enum { NUM_BLOCKS = 48 };
    static uint32_t units[NUM_BLOCKS * 256];

    for (uint32_t num_keys = 32; num_keys <= 33; num_keys++) {
        uint32_t node = 0;

        memset(units, 0xff, sizeof units);
        for (uint32_t k = 0; k <= num_keys; k++) { /* node k has its children in block k + 1 */
            const uint32_t block = (k + 1) * 256;

            units[node] = (k > 0 ? 'A' | 1u << 8 : 0) | (node ^ block) << 10;
            units[block] = 0x80000000u;
            node = block ^ 'A';
        }
        assert_int_equal(check_trie(units, NUM_BLOCKS * 256, "a", 2), num_keys == 32 ? 0 : -1);
    }
}

/* Every byte of a real model set to something else: an error, or a tokenizer that works. */
static void damaged_models_never_crash(void **state)
{
    static const char *const models[] = {"bpe.model", "unigram.model"};

    for (int m = 0; m < 2; m++) {
        char path[PATH_LENGTH_MAX];
        size_t num_bytes;
        char *bytes;
        int num_loaded = 0;

        assert_int_equal(path_format(path, "%s/tokenizer/%s", FIXTURES, models[m]), 0);
        bytes = path_read_file(path, 1 << 20, &num_bytes);
        for (size_t i = 0; i < num_bytes; i += 7) {
            const char good = bytes[i];
            struct tokenizer *tokenizer;

            bytes[i] = (char)(good ^ (1 << i % 8));
            write_bytes(scratch_path("damaged.model"), bytes, num_bytes);
            tokenizer = tokenizer_open(&(struct tokenizer_config){
                .type = "GPTSentencePieceTokenizer", .model = scratch_path("damaged.model")});
            if (tokenizer != NULL) {
                struct token_list list = {0};

                if (tokenizer_encode(tokenizer, "A caf\xc3\xa9\xff\0 2004", 13, &list) == 0) {
                    free(tokenizer_decode(tokenizer, list.ids, list.count, NULL));
                }
                token_list_free(&list);
                tokenizer_close(tokenizer);
                num_loaded++;
            }
            bytes[i] = good;
        }
        assert_true(num_loaded > 0);
        for (size_t length = 0; length < num_bytes; length += 13) {
            write_bytes(scratch_path("damaged.model"), bytes, length);
            tokenizer_close(tokenizer_open(&(struct tokenizer_config){
                .type = "Llama2Tokenizer", .model = scratch_path("damaged.model")}));
        }
        free(bytes);
    }
}

int main(void)
{
    const struct CMUnitTest tests[] = {
        cmocka_unit_test(gpt_sentencepiece_is_the_library_itself),
        cmocka_unit_test(llama2_puts_bos_in_front),
        cmocka_unit_test(sentencepiece_recognises_special_tokens_in_text),
        cmocka_unit_test(null_tokenizer_reads_numbers),
        cmocka_unit_test(what_cannot_be_opened_says_why),
        cmocka_unit_test(pieces_the_library_chokes_on_are_refused),
        cmocka_unit_test(tries_that_lead_out_of_their_array_are_refused),
        cmocka_unit_test(too_many_matches_on_one_path_are_refused),
        cmocka_unit_test(damaged_models_never_crash),
    };

    return cmocka_run_group_tests(tests, make_scratch, remove_scratch);
}
