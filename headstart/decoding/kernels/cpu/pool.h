// How a kernel shares a loop among threads: `parallel(body, argument, count, threads)` calls body(argument, from, to) for ranges
// that cover 0 .. count - 1, in any order, from up to `threads` threads, the caller one of them, and returns when all are done.
// With one thread, or while another caller uses the pool, it is one call of `body` for the whole loop.
//
//     typedef struct { const float *x; float *y; } Doubling;              // what the loop reads and writes
//     static void double_part(void *argument, long from, long to) {
//         const Doubling *a = argument;
//         for (long i = from; i < to; i++) a->y[i] = 2 * a->x[i];
//     }
//     parallel(double_part, &(Doubling){x, y}, count, threads);
//
// Each iteration must compute what it writes alone, so that results do not depend on the ranges. Waking a thread takes some
// microseconds, so a kernel passes 1 thread for less work than that.
//
// All libraries share one pool (pool.c): the loader sets this pointer in each (`_load` in __init__.py).
typedef void Body(void *argument, long from, long to);
void (*parallel)(Body *body, void *argument, long count, int threads);
