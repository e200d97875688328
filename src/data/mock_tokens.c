/* Megatron's mock data: 100000 documents of 1 to 4095 tokens; document i is 1, 2, 3 ... and the end
 * token. Tokens wrap at the vocabulary, as in newer Megatron, so that small vocabularies work. */
#include <stdlib.h>

#include "base/check.h"
#include "data/numpy_random.h"
#include "data/token_source.h"

enum { NUM_MOCK_DOCUMENTS = 100000 };

struct mock_source {
    struct token_source base;
    int64_t vocab_size;
    int32_t eod;
    int32_t lengths[NUM_MOCK_DOCUMENTS];
};

static int32_t mock_length(const struct token_source *source, int64_t sequence)
{
    return ((const struct mock_source *)source)->lengths[sequence];
}

static int mock_read(const struct token_source *source, int64_t sequence, int64_t first,
                     int64_t count, int32_t *tokens)
{
    const struct mock_source *mock = (const struct mock_source *)source;

    for (int64_t i = 0; i < count; i++) {
        tokens[i] = first + i == mock->lengths[sequence] - 1
                        ? mock->eod
                        : (int32_t)((first + i + 1) % mock->vocab_size);
    }
    return 0;
}

static void mock_close(struct token_source *source)
{
    free(source);
}

struct token_source *token_source_open_mock(int64_t vocab_size, int32_t eod)
{
    struct mock_source *mock = malloc(sizeof *mock);

    CHECK(mock != NULL, "out of memory");
    CHECK(vocab_size > 0 && eod >= 0 && eod < vocab_size, "end token %d of %lld", eod,
          (long long)vocab_size);
    mock->base = (struct token_source){
        .name = "mock data",
        .num_sequences = NUM_MOCK_DOCUMENTS,
        .length = mock_length,
        .read = mock_read,
        .close = mock_close,
    };
    mock->vocab_size = vocab_size;
    mock->eod = eod;
    numpy_mock_lengths(mock->lengths, NUM_MOCK_DOCUMENTS);
    return &mock->base;
}
