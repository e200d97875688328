#include "model/model_config.h"

int model_config_num_moe_layers(const struct model_config *config)
{
    int count = 0;

    for (int layer = 0; layer < config->num_layers; layer++) {
        count += config->num_experts > 0 && config->is_moe_layer[layer];
    }
    return count;
}
