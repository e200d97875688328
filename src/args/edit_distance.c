#include "args/edit_distance.h"

#include <string.h>

enum { NAME_MAX_BYTES = 96 };

/* By one row of the usual table. */
int edit_distance(const char *a, const char *b)
{
    int cost[NAME_MAX_BYTES + 1];
    const int length_a = (int)strlen(a), length_b = (int)strlen(b);

    if (length_a > NAME_MAX_BYTES || length_b > NAME_MAX_BYTES) {
        return 2 * NAME_MAX_BYTES;
    }
    for (int j = 0; j <= length_b; j++) {
        cost[j] = j;
    }
    for (int i = 1; i <= length_a; i++) {
        int diagonal = cost[0];

        cost[0] = i;
        for (int j = 1; j <= length_b; j++) {
            const int change = diagonal + (a[i - 1] != b[j - 1]);
            const int shorter = (cost[j] < cost[j - 1] ? cost[j] : cost[j - 1]) + 1;

            diagonal = cost[j];
            cost[j] = change < shorter ? change : shorter;
        }
    }
    return cost[length_b];
}
