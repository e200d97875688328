/* edit_distance.h - how far apart two names are, for "did you mean". */
#ifndef CADRE_ARGS_EDIT_DISTANCE_H
#define CADRE_ARGS_EDIT_DISTANCE_H

/* Letters to insert, delete or change (Levenshtein 1966); a large number for names too long to be
 * ours. */
int edit_distance(const char *a, const char *b);

#endif
