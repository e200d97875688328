/* oracle_data_order PREFIX CACHE SEQ_LENGTH SPLIT SEED TRAIN VALID TEST: computes the order of
 * samples of a data set and leaves it in the folder CACHE as .npy files, for a comparison with
 * numpy itself (scripts/check_data_order_numpy.py). */
#include <stdio.h>
#include <stdlib.h>

#include "base/check.h"
#include "data/datasets.h"

int main(int argc, char **argv)
{
    const char *prefix = argc == 9 ? argv[1] : NULL;
    int64_t num_samples[NUM_SPLITS];
    struct datasets sets;
    struct datasets_config config = {.data_path = {&prefix, 1}};

    if (prefix == NULL) {
        fprintf(stderr,
                "usage: oracle_data_order PREFIX CACHE SEQ_LENGTH SPLIT SEED TRAIN VALID TEST\n");
        return 2;
    }
    config.cache_directory = argv[2];
    config.seq_length = atoll(argv[3]);
    config.split = argv[4];
    config.seed = atoll(argv[5]);
    for (int which = 0; which < NUM_SPLITS; which++) {
        num_samples[which] = atoll(argv[6 + which]);
    }
    if (datasets_build(&sets, &config, num_samples) != 0) {
        fprintf(stderr, "%s\n", error_text());
        return 1;
    }
    datasets_free(&sets);
    return 0;
}
