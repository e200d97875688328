#include "pipeline/layers.h"

#include <stdio.h>

#include "base/check.h"

/* Layers of the model's stages: the first, the last, and each of those between. */
struct split {
    int first, last, middle;
};

static int stage_layers(const struct split *split, const struct pipeline_place *place, int stage)
{
    return stage == 0 ? split->first : stage == place->num_stages - 1 ? split->last : split->middle;
}

/* The stages without a number of their own share evenly what the others leave. */
static int split_layers(const struct pipeline_place *place, int num_layers, int first, int last,
                        struct split *split)
{
    const int num_sharing = place->num_stages - (first > 0 ? 1 : 0) - (last > 0 ? 1 : 0);
    const int rest = num_layers - first - last;
    const int share = num_sharing > 0 ? rest / num_sharing : 0;

    if (place->num_stages == 1 && (first > 0 || last > 0)) {
        return error_set("--decoder-first-pipeline-num-layers and --decoder-last-pipeline-num-"
                         "layers need --pipeline-model-parallel-size of at least 2");
    }
    if (rest < num_sharing || share * num_sharing != rest) {
        char legal[64] = "0";

        if (num_sharing > 0) {
            snprintf(legal, sizeof legal, "positive and a multiple of %d", num_sharing);
        }
        return error_set("--num-layers %d, less %d on the first stage "
                         "(--decoder-first-pipeline-num-layers) and %d on the last "
                         "(--decoder-last-pipeline-num-layers), leaves %d for %d stages: must be "
                         "%s",
                         num_layers, first, last, rest, num_sharing, legal);
    }
    *split = (struct split){first > 0 ? first : share, last > 0 ? last : share, share};
    return 0;
}

static int check_chunks(const struct split *split, const struct pipeline_place *place)
{
    for (int stage = 0; stage < place->num_stages; stage++) {
        const int count = stage_layers(split, place, stage);

        if (count % place->num_chunks != 0) {
            return error_set("pipeline stage %d has %d layers: must be a multiple of the %d chunks "
                             "on each stage (--num-layers-per-virtual-pipeline-stage)",
                             stage, count, place->num_chunks);
        }
    }
    return 0;
}

/* Chunk 0 of all stages, then chunk 1 of all stages, ... (M5.5, M5.6). */
int pipeline_layers(const struct pipeline_place *place, int num_layers, int first_stage_layers,
                    int last_stage_layers, int *first_layer, int *num_local)
{
    struct split split = {0};

    TRY(split_layers(place, num_layers, first_stage_layers, last_stage_layers, &split));
    TRY(check_chunks(&split, place));
    *first_layer = place->chunk * (num_layers / place->num_chunks);
    for (int stage = 0; stage < place->stage; stage++) {
        *first_layer += stage_layers(&split, place, stage) / place->num_chunks;
    }
    *num_local = stage_layers(&split, place, place->stage) / place->num_chunks;
    return 0;
}
