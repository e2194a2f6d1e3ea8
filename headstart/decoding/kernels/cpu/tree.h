// Windows whose rows are the nodes of a tree. Row i is cached at position start + i, but represents position start + depth[i] of
// the sequence. It sees the positions before the window, the rows on its path and nothing else. A tree may be computed in several
// windows: its first rows are then in the cache, and the arrays hold the rows that follow.

typedef struct {
    const long *depth;  // (W,): 0 for row 0, the root
    const long *path;   // (W, deep): the rows from the root to each row, ascending; the row itself is at [depth]
    long deep;
    long stride;  // rows of each slot in the arrays, where each slot has its own tree; 0: one tree for all slots
    long first;   // number of the tree's rows before those in the arrays
} Tree;

// Move the scores of a row's path from the positions of its keys to the positions that they represent, and hide the rest. The
// sums that follow are then those of a window that is this path alone, in the same lanes. Returns the largest score.
static inline float arrange(float *score, const long *path, long depth, long start, long span) {
    for (long j = 0; j <= depth; j++) score[start + j] = score[start + path[j]];
    for (long t = start + depth + 1; t < span; t++) score[t] = -1e30f;
    float top = score[0];
    for (long t = 1; t <= start + depth; t++) top = score[t] > top ? score[t] : top;
    return top;
}

// Move keys and values of the path to node[s] to the positions that they represent, in all layers. keys and values: the cache of
// the first layer, (S, G, capacity / 16, E, 16) and (S, G, capacity, E); the next layer starts `layer` floats later.
void compact(float *keys, float *values, long layers, long layer, const long *start, const long *node, const Tree *tree, long S,
             long G, long E, long capacity) {
    for (long s = 0; s < S; s++) {
        if (start[s] < 0) continue;  // takes no part
        const long row = s * tree->stride + node[s], *path = tree->path + row * tree->deep;
        for (long j = 1; j <= tree->depth[row]; j++) {
            const long from = start[s] + path[j], to = start[s] + j;
            if (from == to) continue;
            for (long l = 0; l < layers; l++) {
                for (long g = 0; g < G; g++) {
                    const long at = l * layer + (s * G + g) * E * capacity;
                    float *k = keys + at, *v = values + at;
                    for (long e = 0; e < E; e++) {
                        k[to / 16 * 16 * E + e * 16 + to % 16] = k[from / 16 * 16 * E + e * 16 + from % 16];
                        v[to * E + e] = v[from * E + e];
                    }
                }
            }
        }
    }
}
