/* Any bytes as a Hugging Face config.json; what is accepted survives being written and read again.
 */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "ckpt/hf_config.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct hf_mixtral_config config, again;
    json_t *written, *rewritten;
    char *text;

    if (hf_config_parse(&config, (const char *)data, size) != 0) {
        return 0;
    }
    written = hf_config_json(&config);
    text = json_dumps(written, 0);
    if (hf_config_parse(&again, text, strlen(text)) != 0) {
        abort();
    }
    rewritten = hf_config_json(&again);
    if (!json_equal(rewritten, written)) {
        abort();
    }
    free(text);
    json_decref(written);
    json_decref(rewritten);
    return 0;
}
