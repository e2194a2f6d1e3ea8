// A pool of threads for the compiled kernels of this process, for machines that other programs use too.
//
// A team of OpenMP waits for each of its threads. Where another program keeps a core busy, one of them is descheduled for a whole
// time slice, some milliseconds, and a product of 30 microseconds takes as long. Here
// - a loop is cut into small pieces, and each thread takes the next one when it is free, the caller too;
// - the caller waits for nothing but pieces that a thread has already begun. It cannot compute such a piece again itself: its
//   buffers are freed when the call returns, and the thread that was descheduled would later read and write them;
// - so a wait that is much longer than a piece takes is a stall, and the pool then uses fewer threads for a time that is a
//   multiple of what the stall has cost: stalls take a small share of the time, whatever the neighbour does;
// - a thread without work spins for some microseconds, within which the next product of a pass begins, and then sleeps.
// A second caller (another Python thread, or a piece that calls `parallel` itself) computes its loop alone instead of waiting.

#define _GNU_SOURCE
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

typedef void Body(void *argument, long from, long to);  // as in pool.h

#define MOST 256              // threads, the caller included
#define PIECES 16             // pieces of a loop for each thread
// Nanoseconds:
#define SPIN 30000            // a thread without work spins so long before it sleeps
#define STALL 150000          // a wait is a stall if it is longer, and longer than STALL_PIECES times a piece takes
#define STALL_PIECES 4
#define COST 10               // after a stall the pool uses one thread fewer for this multiple of its duration,
#define COST_MOST 160         // doubled for each stall within SOON of the last attempt with more threads, up to this multiple
#define SOON 50000000
#define LONGEST 2000000000    // and to this time
#define STEP 10000000         // between an attempt with more threads and the next, if nothing stalls

static inline void relax(void) {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ volatile("yield");
#endif
}

static inline int64_t now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

// The loop in progress. `ticket` holds its number (32 bits), the threads that may take part (16) and the pieces that nobody has
// taken yet (16). A thread owns a piece once it has counted the pieces down, and only then reads the other fields: they stay as
// they are until the piece is done. A number never returns while a thread that has read it is about to count down.
static struct {
    _Atomic uint64_t ticket;
    Body *body;
    void *argument;
    long count, pieces;
    _Atomic int processor;  // the caller's
    _Alignas(64) _Atomic long done;  // pieces
    _Alignas(64) atomic_flag taken;  // a caller uses the pool
} loop;

static struct {
    _Alignas(64) _Atomic uint32_t asleep;  // 1: waits on this word
} worker[MOST];

// How many threads the caller that uses the pool takes; only that caller writes these.
static int started;                // threads started
static _Atomic int limit;          // most threads to use, the caller included; 0: as many as are asked for
static _Atomic long stalls;        // since the process began
static int64_t tried, next_try;    // when a thread was last added to the limit, when to add the next
static int64_t cost = COST;

// Take a piece of the loop, as the thread `index`, and compute it. Return 0 if there is none.
static int take(int index) {
    uint64_t ticket = atomic_load_explicit(&loop.ticket, memory_order_acquire);
    while (ticket & 0xffff) {
        if (index >= (int)(ticket >> 16 & 0xffff)) return 0;
        if (!atomic_compare_exchange_weak_explicit(&loop.ticket, &ticket, ticket - 1, memory_order_acq_rel, memory_order_acquire))
            continue;
        const long i = loop.pieces - (long)(ticket & 0xffff);
        loop.body(loop.argument, loop.count * i / loop.pieces, loop.count * (i + 1) / loop.pieces);
        atomic_fetch_add_explicit(&loop.done, 1, memory_order_release);
        return 1;
    }
    return 0;
}

static int waiting(int index) {
    const uint64_t ticket = atomic_load(&loop.ticket);
    return ticket & 0xffff && index < (int)(ticket >> 16 & 0xffff);
}

static void *work(void *number) {
    const int index = (int)(intptr_t)number;
    _Atomic uint32_t *asleep = &worker[index].asleep;
    for (;;) {
        while (take(index)) {}
        // On the caller's processor it would keep the caller from running.
        const int64_t until = sched_getcpu() == atomic_load_explicit(&loop.processor, memory_order_relaxed) ? 0 : now() + SPIN;
        do {
            for (int i = 0; i < 32 && !waiting(index); i++) relax();
        } while (!waiting(index) && now() < until);
        if (waiting(index)) continue;
        atomic_store(asleep, 1);
        while (!waiting(index) && atomic_load(asleep)) syscall(SYS_futex, asleep, FUTEX_WAIT_PRIVATE, 1, NULL, NULL, 0);
        atomic_store(asleep, 0);
    }
    return NULL;
}

// Start threads until there are `threads`, the caller included, and return how many there are. All signals are blocked in them:
// they are for the program's own threads.
static int start(int threads) {
    if (started + 1 >= threads) return threads;
    sigset_t all, before;
    pthread_attr_t detached;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    pthread_attr_init(&detached);
    pthread_attr_setdetachstate(&detached, PTHREAD_CREATE_DETACHED);
    for (pthread_t id; started + 1 < threads; started++)
        if (pthread_create(&id, &detached, work, (void *)(intptr_t)(started + 1))) break;
    pthread_attr_destroy(&detached);
    pthread_sigmask(SIG_SETMASK, &before, NULL);
    return started + 1;
}

// A child of fork() has none of the threads, and its parent may have been in the middle of a loop.
static void forget(void) {
    started = limit = 0;
    atomic_store(&loop.ticket, 0);
    for (int i = 0; i < MOST; i++) atomic_store(&worker[i].asleep, 0);
    atomic_flag_clear(&loop.taken);
}

__attribute__((constructor)) static void prepare(void) { pthread_atfork(NULL, NULL, forget); }

// Return how many of `threads` to use, and add one to the limit if it is time to try.
static int allowed(int threads) {
    int most = limit;
    if (!most) return threads;
    const int64_t t = now();
    if (t >= next_try) {
        tried = t, next_try = t + STEP;
        limit = most = most + 1 < threads ? most + 1 : 0;
    }
    return most && most < threads ? most : threads;
}

// Use fewer than `threads` threads if the wait from `begin` to now is much longer than `piece`, the duration of a piece.
static void judge(int threads, int64_t begin, int64_t piece) {
    const int64_t end = now(), waited = end - begin;
    if (waited < STALL || waited < STALL_PIECES * piece) return;
    cost = begin - tried > SOON ? COST : cost < COST_MOST ? 2 * cost : COST_MOST;
    limit = threads - 1;
    next_try = end + (waited * cost < LONGEST ? waited * cost : LONGEST);
    stalls++;
}

void parallel(Body *body, void *argument, long count, int threads) {
    if (threads > MOST) threads = MOST;
    if (threads > count) threads = (int)count;
    if (threads < 2 || atomic_flag_test_and_set_explicit(&loop.taken, memory_order_acquire)) {
        if (count > 0) body(argument, 0, count);
        return;
    }
    threads = start(allowed(threads));
    if (threads < 2) {
        atomic_flag_clear_explicit(&loop.taken, memory_order_release);
        body(argument, 0, count);
        return;
    }
    loop.body = body, loop.argument = argument, loop.count = count;
    loop.pieces = count < threads * PIECES ? count : threads * PIECES;
    atomic_store_explicit(&loop.done, 0, memory_order_relaxed);
    atomic_store_explicit(&loop.processor, sched_getcpu(), memory_order_relaxed);
    const uint64_t number = (atomic_load_explicit(&loop.ticket, memory_order_relaxed) >> 32) + 1;
    atomic_store(&loop.ticket, number << 32 | (uint64_t)threads << 16 | (uint64_t)loop.pieces);
    for (int i = 1; i < threads; i++)
        if (atomic_load(&worker[i].asleep) && atomic_exchange(&worker[i].asleep, 0))
            syscall(SYS_futex, &worker[i].asleep, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);

    int64_t begin = now(), mine = 0;
    const int64_t first = begin;
    while (take(0)) mine++;
    if (atomic_load_explicit(&loop.done, memory_order_acquire) < loop.pieces) {
        begin = now();
        for (long i = 0; atomic_load_explicit(&loop.done, memory_order_acquire) < loop.pieces; i++) {
            relax();
            if (i % 64 == 63 && now() - begin > SPIN) sched_yield();  // the thread may need this processor
        }
        judge(threads, begin, mine ? (begin - first) / mine : 0);
    }
    atomic_flag_clear_explicit(&loop.taken, memory_order_release);
}

// Return the most threads that the pool uses at the moment (0: as many as are asked for), and how often it has stalled.
int thread_limit(void) { return limit; }
long stall_count(void) { return stalls; }
