#include "ckpt/manifest.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "base/check.h"
#include "base/path.h"

static const char format_name[] = "cadre-checkpoint";
static const char seal_key[] = ",\n  \"manifest_xxh3_128\": \"";
static const char seal_end[] = "\"\n}\n";
static const int64_t text_max_bytes = 256 << 20;

/* ---- writing ---- */

static json_t *files_json(const struct manifest *manifest)
{
    json_t *files = json_array();

    for (int i = 0; i < manifest->num_files; i++) {
        const struct manifest_file *file = &manifest->files[i];

        json_array_append_new(files,
                              json_pack("{s:s, s:I, s:s}", "name", file->name, "size_bytes",
                                        (json_int_t)file->size_bytes, "xxh3_128", file->hash));
    }
    return files;
}

char *manifest_write(const struct manifest *manifest)
{
    json_t *root = json_pack("{s:s, s:i, s:I, s:O, s:o}", "format", format_name, "version",
                             MANIFEST_VERSION, "iteration", (json_int_t)manifest->iteration,
                             "state", manifest->state, "files", files_json(manifest));
    char *body = json_dumps(root, JSON_INDENT(2));
    char hash[CONTENT_HASH_TEXT_BYTES];
    char *text;
    size_t length, text_bytes;

    json_decref(root);
    CHECK(body != NULL, "the state of a checkpoint cannot be written as JSON");
    length = strlen(body) - strlen("\n}");
    content_hash_of(body, length, hash);
    text_bytes = length + sizeof seal_key + sizeof hash + sizeof seal_end;
    text = malloc(text_bytes);
    CHECK(text != NULL, "out of memory");
    snprintf(text, text_bytes, "%.*s%s%s%s", (int)length, body, seal_key, hash, seal_end);
    free(body);
    return text;
}

/* ---- reading ---- */

/* The text must end in the seal, and the seal's hash must be that of everything before it. */
static int check_seal(const char *text, size_t length)
{
    const size_t seal_bytes = strlen(seal_key) + CONTENT_HASH_TEXT_BYTES - 1 + strlen(seal_end);
    char hash[CONTENT_HASH_TEXT_BYTES];
    const char *seal;

    if (length < seal_bytes) {
        return error_set("it is cut short");
    }
    seal = text + length - seal_bytes;
    content_hash_of(text, length - seal_bytes, hash);
    if (memcmp(seal, seal_key, strlen(seal_key)) != 0 ||
        memcmp(text + length - strlen(seal_end), seal_end, strlen(seal_end)) != 0) {
        return error_set("it is cut short, or was not written by cadre");
    }
    if (memcmp(seal + strlen(seal_key), hash, strlen(hash)) != 0) {
        return error_set("its content does not match its hash");
    }
    return 0;
}

/* Relative, inside the directory, without surprises for a shell. */
static bool is_safe_name(const char *name)
{
    static const char allowed[] = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
                                  "0123456789._-/";

    return name[0] != '\0' && strlen(name) < MANIFEST_FILE_NAME_MAX && name[0] != '/' &&
           name[strspn(name, allowed)] == '\0' && strstr(name, "..") == NULL;
}

static int parse_file(struct manifest_file *file, const json_t *entry)
{
    const char *name = json_string_value(json_object_get(entry, "name"));
    const char *hash = json_string_value(json_object_get(entry, "xxh3_128"));
    const json_t *size = json_object_get(entry, "size_bytes");

    if (name == NULL || !is_safe_name(name)) {
        return error_set("a file name is missing or not of a checkpoint: \"%.100s\"",
                         name != NULL ? name : "");
    }
    if (!json_is_integer(size) || json_integer_value(size) < 0) {
        return error_set("the size of %s is missing", name);
    }
    if (hash == NULL || strlen(hash) != CONTENT_HASH_TEXT_BYTES - 1) {
        return error_set("the hash of %s is missing", name);
    }
    snprintf(file->name, sizeof file->name, "%s", name);
    snprintf(file->hash, sizeof file->hash, "%s", hash);
    file->size_bytes = json_integer_value(size);
    return 0;
}

static int parse_root(struct manifest *manifest, const json_t *root)
{
    const char *format = json_string_value(json_object_get(root, "format"));
    const json_t *version = json_object_get(root, "version");
    const json_t *iteration = json_object_get(root, "iteration");
    json_t *state = json_object_get(root, "state"), *files = json_object_get(root, "files");
    const size_t num_files = json_array_size(files);

    if (format == NULL || strcmp(format, format_name) != 0 || !json_is_integer(version)) {
        return error_set("it is not a cadre checkpoint's");
    }
    if (json_integer_value(version) != MANIFEST_VERSION) {
        return error_set("its version is %lld, this cadre reads version %d",
                         (long long)json_integer_value(version), MANIFEST_VERSION);
    }
    if (!json_is_integer(iteration) || json_integer_value(iteration) < 0 ||
        !json_is_object(state) || !json_is_array(files)) {
        return error_set("iteration, state or files is missing");
    }
    manifest->iteration = json_integer_value(iteration);
    manifest->files = calloc(num_files + 1, sizeof *manifest->files);
    CHECK(manifest->files != NULL, "out of memory");
    for (size_t i = 0; i < num_files; i++) {
        TRY(parse_file(&manifest->files[i], json_array_get(files, i)));
    }
    manifest->num_files = (int)num_files;
    manifest->state = json_incref(state);
    return 0;
}

int manifest_parse(struct manifest *manifest, const char *text, size_t length)
{
    json_error_t error;
    json_t *root;
    int result;

    *manifest = (struct manifest){0};
    TRY(check_seal(text, length));
    root = json_loadb(text, length, JSON_REJECT_DUPLICATES, &error);
    if (root == NULL) {
        return error_set("line %d: %s", error.line, error.text);
    }
    result = parse_root(manifest, root);
    json_decref(root);
    if (result != 0) {
        manifest_free(manifest);
    }
    return result;
}

int manifest_read(struct manifest *manifest, const char *directory)
{
    char path[PATH_LENGTH_MAX];
    size_t length;
    char *text;
    int result;

    *manifest = (struct manifest){0};
    TRY(path_format(path, "%s/%s", directory, MANIFEST_NAME));
    text = path_read_file(path, text_max_bytes, &length);
    if (text == NULL) {
        return -1;
    }
    result = manifest_parse(manifest, text, length);
    free(text);
    return result == 0 ? 0 : error_prepend("%s", path);
}

void manifest_free(struct manifest *manifest)
{
    json_decref(manifest->state);
    free(manifest->files);
    *manifest = (struct manifest){0};
}
