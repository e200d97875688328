/* Any bytes as model.safetensors.index.json: no file name that leads elsewhere gets through. */
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "ckpt/hf_index.h"

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    struct hf_index index;

    if (hf_index_parse(&index, (const char *)data, size) != 0) {
        return 0;
    }
    for (int i = 0; i < index.num_tensors; i++) {
        if (strchr(index.file_names[i], '/') != NULL || strcmp(index.file_names[i], "..") == 0) {
            abort();
        }
    }
    hf_index_free(&index);
    return 0;
}
