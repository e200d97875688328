#include "nn/rope.h"

#include <math.h>
#include <stdlib.h>

#include "base/check.h"

int64_t rope_rotary_dim(const struct rope_config *config)
{
    return (int64_t)((double)config->head_dim * config->percent) / 2 * 2;
}

struct tensor rope_table(struct stream *stream, struct arena *arena,
                         const struct rope_config *config)
{
    const int64_t num_pairs = rope_rotary_dim(config) / 2;
    struct tensor table = tensor_new(arena, DTYPE_F32, config->num_positions, num_pairs, 2);
    float *host;

    if (stream->device->kind == DEVICE_NULL) {
        return table;
    }
    host = malloc(tensor_size_bytes(&table) + 1);
    CHECK(host != NULL, "out of memory for %s", tensor_describe(&table));
#pragma omp parallel for schedule(static) if (config->num_positions * num_pairs > 4096)
    for (int64_t i = 0; i < num_pairs; i++) {
        /* float as in the reference implementations, whose angles are products of floats */
        const float frequency =
            (float)pow(config->base, -2.0 * (double)i / (double)(2 * num_pairs));

        for (int64_t p = 0; p < config->num_positions; p++) {
            const float angle = (float)((double)p / config->interpolation_factor) * frequency;

            host[(p * num_pairs + i) * 2] = (float)cos((double)angle);
            host[(p * num_pairs + i) * 2 + 1] = (float)sin((double)angle);
        }
    }
    stream_copy_from_host(stream, table.data, host, tensor_size_bytes(&table));
    free(host);
    return table;
}
