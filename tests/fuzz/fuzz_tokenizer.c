/* Bytes as a SentencePiece model. One that is accepted encodes and decodes a fixed text. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "data/tokenizer.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static char path[64];

static void remove_file(void)
{
    unlink(path);
}

static void write_model(const uint8_t *data, size_t size)
{
    FILE *file;

    if (path[0] == '\0') {
        snprintf(path, sizeof path, "/tmp/cadre-fuzz-tokenizer-%ld.model", (long)getpid());
        atexit(remove_file);
    }
    file = fopen(path, "wb");
    if (file == NULL || (size > 0 && fwrite(data, 1, size, file) != size)) {
        abort();
    }
    fclose(file);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const char text[] = "A caf\xc3\xa9 \xef\xac\x81 \xff\xe2\x96 \0 2004\n  License <EOD>";
    static const char *const types[] = {"GPTSentencePieceTokenizer", "SentencePieceTokenizer"};

    write_model(data, size);
    for (int t = 0; t < 2; t++) {
        struct tokenizer *tokenizer =
            tokenizer_open(&(struct tokenizer_config){.type = types[t], .model = path});
        struct token_list list = {0};

        if (tokenizer != NULL && tokenizer_encode(tokenizer, text, sizeof text - 1, &list) == 0) {
            free(tokenizer_decode(tokenizer, list.ids, list.count, NULL));
        }
        token_list_free(&list);
        tokenizer_close(tokenizer);
    }
    return 0;
}
