/* loaded_model.h - a model ready to run forward, from a cadre checkpoint or a Hugging Face
 * directory. */
#ifndef CADRE_CMD_LOADED_MODEL_H
#define CADRE_CMD_LOADED_MODEL_H

#include "args/options.h"
#include "base/path.h"
#include "model/transformer_stage.h"

struct loaded_model {
    char path[PATH_LENGTH_MAX]; /* of the checkpoint that was found */
    struct options options;     /* the model's and the tokenizer's, as saved */
    struct model_config config;
    struct groups groups;
    struct stream *stream;
    struct arena *run, *saved, *scratch;
    struct param_list params;
    struct transformer_stage stage;
};

/* directory: of a checkpoint (its parent, or iter_X itself) or in Hugging Face form. num_positions:
 * the longest sequence that will be run; config.seq_length is what the model has room for, which is
 * less where it learned fewer positions. The model computes in dtype, whatever the files hold. */
struct loaded_model_request {
    const char *directory;
    int64_t num_positions;
    enum dtype dtype;
    const struct device *device;
    const struct ops *ops;
};

/* Chooses the request's device and ops by the value of --device. */
int loaded_model_choose_device(struct loaded_model_request *request, const char *name);
int loaded_model_open(struct loaded_model *model, const struct loaded_model_request *request);
void loaded_model_close(struct loaded_model *model);

/* A pass over token [S*B] (s * num_sequences + b) at positions first_position + s. The tensors live
 * in model->saved until the caller releases it. */
struct pass loaded_model_pass(struct loaded_model *model, const int32_t *tokens, int64_t num_tokens,
                              int64_t num_sequences, int64_t first_position);
/* logits [B,S,V] f32 of tokens [B,S], V the vocabulary without its padding. */
int loaded_model_logits(struct loaded_model *model, const int64_t *tokens, int64_t num_sequences,
                        int64_t seq_length, float *logits);

#endif
