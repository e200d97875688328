/* The public face: thin, over the same code as the commands. */
#include "cadre.h"

#include <stdlib.h>

#include "base/check.h"
#include "cmd/cmd.h"
#include "cmd/loaded_model.h"

struct cadre_model {
    struct loaded_model loaded;
};

const char *cadre_version(void)
{
    return CADRE_VERSION;
}

const char *cadre_error_text(void)
{
    return error_text();
}

int cadre_pretrain(int argc, char **argv)
{
    return cmd_pretrain(argc, argv);
}

struct cadre_model *cadre_model_open(const char *directory, int64_t max_positions)
{
    struct loaded_model_request request = {
        .directory = directory, .num_positions = max_positions, .dtype = DTYPE_F32};
    struct cadre_model *model;

    if (max_positions < 1) {
        return FAIL_NULL("max_positions is %lld; it is at least 1", (long long)max_positions);
    }
    if (loaded_model_choose_device(&request, "auto") != 0) {
        return NULL;
    }
    model = calloc(1, sizeof *model);
    CHECK(model != NULL, "out of memory");
    if (loaded_model_open(&model->loaded, &request) != 0) {
        cadre_model_close(model);
        return NULL;
    }
    return model;
}

void cadre_model_close(struct cadre_model *model)
{
    if (model != NULL) {
        loaded_model_close(&model->loaded);
        free(model);
    }
}

int64_t cadre_model_vocab_size(const struct cadre_model *model)
{
    return model->loaded.config.vocab_size;
}

int cadre_model_logits(struct cadre_model *model, const int64_t *tokens, int64_t num_sequences,
                       int64_t seq_length, float *logits)
{
    if (num_sequences < 1 || seq_length < 1) {
        return error_set("tokens are [%lld, %lld]; both are at least 1", (long long)num_sequences,
                         (long long)seq_length);
    }
    return loaded_model_logits(&model->loaded, tokens, num_sequences, seq_length, logits);
}
