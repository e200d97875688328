#include "ckpt/hf_index.h"

#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"

static bool is_plain_name(const char *name)
{
    return name[0] != '\0' && strchr(name, '/') == NULL && strcmp(name, ".") != 0 &&
           strcmp(name, "..") != 0 && strlen(name) <= 255;
}

static int parse_map(struct hf_index *index, const json_t *map)
{
    const size_t count = json_object_size(map);
    const char *name;
    json_t *value;

    if (!json_is_object(map)) {
        return error_set("weight_map is missing or not an object");
    }
    index->tensor_names = calloc(count + 1, sizeof *index->tensor_names);
    index->file_names = calloc(count + 1, sizeof *index->file_names);
    CHECK(index->tensor_names != NULL && index->file_names != NULL, "out of memory");
    json_object_foreach((json_t *)map, name, value)
    {
        const char *file_name = json_string_value(value);

        if (file_name == NULL) {
            return error_set("the file of tensor %.200s is not a string", name);
        }
        if (!is_plain_name(file_name)) {
            return error_set("the file of tensor %.200s is \"%.200s\", not a plain file name", name,
                             file_name);
        }
        index->tensor_names[index->num_tensors] = name;
        index->file_names[index->num_tensors++] = file_name;
    }
    return 0;
}

int hf_index_parse(struct hf_index *index, const char *text, size_t length)
{
    json_error_t error;

    *index = (struct hf_index){0};
    index->root = json_loadb(text, length, JSON_REJECT_DUPLICATES, &error);
    if (index->root == NULL) {
        return error_set("line %d: %s", error.line, error.text);
    }
    if (parse_map(index, json_object_get(index->root, "weight_map")) != 0) {
        hf_index_free(index);
        return -1;
    }
    return 0;
}

void hf_index_free(struct hf_index *index)
{
    json_decref(index->root);
    free(index->tensor_names);
    free(index->file_names);
    *index = (struct hf_index){0};
}
