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
#define PIECES 8              // a loop has at least so many pieces for each thread, if it has as many iterations
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

// The loop in progress. `ticket` holds its number (32 bits) and the iterations that nobody has taken yet (32). A thread owns a
// piece once it has counted its iterations down in the ticket that it read. The other fields then are those of this loop: they
// stay as they are until the thread has added the piece to `done`.
static struct {
    _Atomic uint64_t ticket;
    _Atomic int threads;        // that may take part
    _Atomic long largest;       // iterations of a piece
    _Atomic int processor;      // the caller's
    Body *body;
    void *argument;
    long count;
    _Alignas(64) _Atomic long done;  // iterations that other threads than the caller have computed
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

static long iterations_left(uint64_t ticket) { return (long)(ticket & 0xffffffff); }

// Take pieces of the loop, as the thread `index`, and compute them until none is left. Return how many iterations they had.
// Pieces become smaller towards the end, so that all threads end at nearly the same time.
static long compute(int index) {
    long computed = 0;
    uint64_t ticket = atomic_load_explicit(&loop.ticket, memory_order_acquire);
    for (long left; (left = iterations_left(ticket)); ) {
        const int threads = atomic_load_explicit(&loop.threads, memory_order_relaxed);
        const long share = left / (2 * threads), most = atomic_load_explicit(&loop.largest, memory_order_relaxed);
        const long size = share > most ? most : share > 1 ? share : 1;
        if (index >= threads) break;
        if (!atomic_compare_exchange_weak_explicit(&loop.ticket, &ticket, ticket - (uint64_t)size, memory_order_acq_rel,
                                                   memory_order_acquire))
            continue;
        loop.body(loop.argument, loop.count - left, loop.count - left + size);
        computed += size;
        ticket = atomic_load_explicit(&loop.ticket, memory_order_acquire);
    }
    return computed;
}

static int waiting(int index) {
    return iterations_left(atomic_load(&loop.ticket)) && index < atomic_load_explicit(&loop.threads, memory_order_relaxed);
}

static void *work(void *number) {
    const int index = (int)(intptr_t)number;
    _Atomic uint32_t *asleep = &worker[index].asleep;
    for (;;) {
        const long computed = compute(index);
        if (computed) atomic_fetch_add_explicit(&loop.done, computed, memory_order_release);
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
    if (threads < 2 || count > UINT32_MAX || atomic_flag_test_and_set_explicit(&loop.taken, memory_order_acquire)) {
        if (count > 0) body(argument, 0, count);
        return;
    }
    threads = start(allowed(threads));
    if (threads < 2) {
        atomic_flag_clear_explicit(&loop.taken, memory_order_release);
        body(argument, 0, count);
        return;
    }
    const long share = count / (threads * PIECES);
    loop.body = body, loop.argument = argument, loop.count = count;
    atomic_store_explicit(&loop.threads, threads, memory_order_relaxed);
    atomic_store_explicit(&loop.largest, share > 1 ? share : 1, memory_order_relaxed);
    atomic_store_explicit(&loop.processor, sched_getcpu(), memory_order_relaxed);
    atomic_store_explicit(&loop.done, 0, memory_order_relaxed);
    const uint64_t number = (atomic_load_explicit(&loop.ticket, memory_order_relaxed) >> 32) + 1;
    atomic_store(&loop.ticket, number << 32 | (uint64_t)count);
    for (int i = 1; i < threads; i++)
        if (atomic_load(&worker[i].asleep) && atomic_exchange(&worker[i].asleep, 0))
            syscall(SYS_futex, &worker[i].asleep, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);

    const int64_t begin = now();
    const long mine = compute(0);
    if (atomic_load_explicit(&loop.done, memory_order_acquire) < count - mine) {
        const int64_t end = now();
        for (long i = 0; atomic_load_explicit(&loop.done, memory_order_acquire) < count - mine; i++) {
            relax();
            if (i % 64 == 63 && now() - end > SPIN) sched_yield();  // the thread may need this processor
        }
        judge(threads, end, mine ? (end - begin) * loop.largest / mine : 0);
    }
    atomic_flag_clear_explicit(&loop.taken, memory_order_release);
}

// Return the most threads that the pool uses at the moment (0: as many as are asked for), and how often it has stalled.
int thread_limit(void) { return limit; }
long stall_count(void) { return stalls; }
