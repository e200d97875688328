/* layers.h - which layers of the model a chunk of a pipeline stage holds. Pure arithmetic. */
#ifndef CADRE_PIPELINE_LAYERS_H
#define CADRE_PIPELINE_LAYERS_H

struct pipeline_place {
    int stage, num_stages, chunk, num_chunks;
};

/* Layers [*first_layer, *first_layer + *num_local) of num_layers. first_stage_layers and
 * last_stage_layers: how many the first and the last stage have over all their chunks
 * (--decoder-first-pipeline-num-layers, --decoder-last-pipeline-num-layers); 0: as many as the
 * others. Fails where something does not divide. */
int pipeline_layers(const struct pipeline_place *place, int num_layers, int first_stage_layers,
                    int last_stage_layers, int *first_layer, int *num_local);

#endif
