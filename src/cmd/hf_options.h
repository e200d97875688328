/* hf_options.h - a Mixtral config.json as cadre's options, and back. */
#ifndef CADRE_CMD_HF_OPTIONS_H
#define CADRE_CMD_HF_OPTIONS_H

#include <jansson.h>

#include "args/options.h"
#include "ckpt/hf_config.h"

/* Sets every option of the model (as if from a checkpoint, so that flags win). The options are
 * initialised and not yet validated. tokenizer_model: path of the model's tokenizer.model, or NULL.
 */
int hf_options_import(struct options *options, const struct hf_mixtral_config *config,
                      const char *tokenizer_model);

/* The config of a checkpoint's model from its state; refuses models that Mixtral is not. */
int hf_options_export(struct hf_mixtral_config *config, const json_t *state);

#endif
