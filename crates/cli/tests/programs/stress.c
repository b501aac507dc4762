// A program that uses its memory in every way a program can, and knows what each byte of it must be.
//
//   stress PART MEGABYTES
//
// Each part fills about that much memory from a generator, does things to it, and compares every byte. It prints one
// line that depends on nothing but its arguments, so that runs can be compared, and ends with 0; or it says what it
// found instead of what, and ends with 1.

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <unistd.h>

#define PAGE 4096ul
#define MIB (1ul << 20)

static size_t budget;

static void fail(const char *what, const void *at, uint64_t found, uint64_t expected) {
    fprintf(stderr, "stress: %s at %p: found %016lx, expected %016lx (process %d)\n", what, at, (unsigned long)found,
            (unsigned long)expected, (int)getpid());
    _exit(1);
}

static void must(int good, const char *what) {
    if (!good) {
        fprintf(stderr, "stress: %s: %s\n", what, strerror(errno));
        _exit(1);
    }
}

static uint64_t value(uint64_t i, uint64_t salt) {
    uint64_t x = (i + 1) * 0x9e3779b97f4a7c15ull ^ salt * 0xd6e8feb86659fd93ull;
    return x ^ x >> 29;
}

// Bytes [from, to) of what `salt` generates; both are multiples of 8.
static void fill(void *memory, size_t from, size_t to, uint64_t salt) {
    uint64_t *words = memory;
    for (size_t i = from / 8; i < to / 8; i++) words[i] = value(i, salt);
}

static void check(const char *what, const void *memory, size_t from, size_t to, uint64_t salt) {
    const uint64_t *words = memory;
    for (size_t i = from / 8; i < to / 8; i++) {
        uint64_t found = ((volatile const uint64_t *)words)[i];
        if (found != value(i, salt)) fail(what, words + i, found, value(i, salt));
    }
}

static void check_zeros(const char *what, const void *memory, size_t from, size_t to) {
    const uint64_t *words = memory;
    for (size_t i = from / 8; i < to / 8; i++)
        if (words[i] != 0) fail(what, words + i, words[i], 0);
}

static uint64_t next(uint64_t *state) {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    return *state;
}

static void *map(size_t bytes) {
    void *p = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    must(p != MAP_FAILED, "mmap");
    return p;
}

static void in_threads(int n, void *(*body)(void *)) {
    pthread_t threads[16];
    for (long i = 0; i < n; i++) must((errno = pthread_create(&threads[i], NULL, body, (void *)i)) == 0, "thread");
    for (int i = 0; i < n; i++) {
        void *result;
        must((errno = pthread_join(threads[i], &result)) == 0, "join");
        if (result != NULL) _exit(1);
    }
}

// The pages of a block are visited in an order of no pattern.
static size_t scattered(size_t i, size_t n) { return (i * 7919 + 13) % n; }

// --- heap: malloc, realloc and free at random.

#define THREADS 3

struct block {
    uint64_t *at;
    size_t bytes;
    uint64_t salt;
};

static void *heap_thread(void *which) {
    enum { BLOCKS = 512 };
    static struct block all[THREADS][BLOCKS];
    struct block *blocks = all[(long)which];
    size_t share = budget / THREADS, held = 0;
    uint64_t random = 88172645463325252ull + (uint64_t)which;
    uint64_t salt = (uint64_t)which << 32;
    for (int step = 0; step < 6000; step++) {
        struct block *b = &blocks[next(&random) % BLOCKS];
        // Mostly small; some of the kind that malloc maps by itself.
        uint64_t kind = next(&random) % 16;
        size_t bytes = kind < 10 ? next(&random) % 4096 : kind < 15 ? next(&random) % (256 << 10) : next(&random) % (3 * MIB);
        bytes = (bytes + 8) & ~7ul;
        if (b->at != NULL && next(&random) % 3 == 0) {
            size_t both = b->bytes < bytes ? b->bytes : bytes;
            if (held - b->bytes + bytes > share) continue;
            uint64_t *moved = realloc(b->at, bytes);
            must(moved != NULL, "realloc");
            check("a block that was made larger or smaller", moved, 0, both, b->salt);
            fill(moved, both, bytes, b->salt);
            held = held - b->bytes + bytes;
            b->at = moved, b->bytes = bytes;
        } else {
            if (b->at != NULL) {
                check("a block of the heap", b->at, 0, b->bytes, b->salt);
                free(b->at);
                held -= b->bytes;
                b->at = NULL;
            }
            if (held + bytes > share) continue;
            b->at = step % 5 ? malloc(bytes) : calloc(1, bytes);
            must(b->at != NULL, "malloc");
            if (step % 5 == 0) check_zeros("memory from calloc", b->at, 0, bytes);
            b->bytes = bytes, b->salt = ++salt;
            held += bytes;
            fill(b->at, 0, bytes, b->salt);
        }
    }
    // To the full share, so that the rest has to leave, and all over again.
    for (int i = 0; i < BLOCKS; i++) {
        if (blocks[i].at != NULL) continue;
        size_t bytes = 512 << 10;
        if (held + bytes > share) break;
        blocks[i] = (struct block){malloc(bytes), bytes, ++salt};
        must(blocks[i].at != NULL, "malloc");
        fill(blocks[i].at, 0, bytes, blocks[i].salt);
        held += bytes;
    }
    for (int i = 0; i < BLOCKS; i++) {
        if (blocks[i].at != NULL) check("a block of the heap, at the end", blocks[i].at, 0, blocks[i].bytes, blocks[i].salt);
        free(blocks[i].at);
        blocks[i].at = NULL;
    }
    return NULL;
}

static void heap(void) { in_threads(THREADS, heap_thread); }

// --- maps: mmap, munmap, mremap, madvise and mprotect, in several threads that race for the same address space.

static void *maps_thread(void *which) {
    size_t bytes = budget / THREADS / 2 & ~(PAGE - 1);
    uint64_t salt = ((uint64_t)which + 1) << 40, random = 0x2545f4914f6cdd1dull + (uint64_t)which;
    char *kept = map(bytes);
    fill(kept, 0, bytes, salt);
    for (int round = 0; round < 24; round++) {
        size_t n = bytes / PAGE, size = (1 + next(&random) % (n / 2)) * PAGE;
        char *p = map(size);
        check_zeros("a new mapping", p, 0, size < 64 * PAGE ? size : 64 * PAGE);
        fill(p, 0, size, ++salt);
        uint64_t mine = salt;
        switch (next(&random) % 6) {
        case 0: { // It moves, or grows where it is.
            size_t larger = size + (1 + next(&random) % 512) * PAGE;
            char *moved = mremap(p, size, larger, MREMAP_MAYMOVE);
            must(moved != MAP_FAILED, "mremap");
            check("a mapping that has moved", moved, 0, size, mine);
            check_zeros("what it has gained", moved, size, larger);
            fill(moved, size, larger, mine);
            p = moved, size = larger;
            break;
        }
        case 1: { // A hole, and something else in the hole.
            size_t at = next(&random) % (size / PAGE) * PAGE;
            must(munmap(p + at, PAGE) == 0, "munmap");
            check("before a hole", p, 0, at, mine);
            check("behind a hole", p, at + PAGE, size, mine);
            // The hole may be somebody else's by now: all of the rest is to go without it.
            if (at > 0) must(munmap(p, at) == 0, "munmap");
            if (at + PAGE < size) must(munmap(p + at + PAGE, size - at - PAGE) == 0, "munmap");
            p = NULL;
            break;
        }
        case 2: { // Thrown away: zeros from then on.
            size_t half = size / 2 & ~(PAGE - 1);
            must(madvise(p, half, MADV_DONTNEED) == 0, "madvise");
            check_zeros("what was thrown away", p, 0, half);
            check("beside what was thrown away", p, half, size, mine);
            fill(p, 0, half, mine);
            break;
        }
        case 3: { // Read-only for a while.
            must(mprotect(p, size, PROT_READ) == 0, "mprotect");
            check("what is read-only", p, 0, size, mine);
            must(mprotect(p, size, PROT_READ | PROT_WRITE) == 0, "mprotect");
            fill(p, 0, size, ++salt);
            mine = salt;
            break;
        }
        case 4: { // Not accessible for a while.
            must(mprotect(p, size, PROT_NONE) == 0, "mprotect");
            check("meanwhile", kept, 0, bytes / 4, (((uint64_t)which + 1) << 40));
            must(mprotect(p, size, PROT_READ | PROT_WRITE) == 0, "mprotect");
            break;
        }
        case 5: { // Something new in its place, in one go.
            must(mmap(p, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == p, "mmap over");
            check_zeros("what has replaced it", p, 0, size);
            fill(p, 0, size, mine);
            break;
        }
        }
        if (p != NULL) {
            for (size_t i = 0; i < size / PAGE; i++) {
                size_t at = scattered(i, size / PAGE) * PAGE;
                check("a mapping", p, at, at + PAGE, mine);
            }
            must(munmap(p, size) == 0, "munmap");
        }
    }
    check("what was left alone", kept, 0, bytes, ((uint64_t)which + 1) << 40);
    must(munmap(kept, bytes) == 0, "munmap");
    return NULL;
}

static void maps(void) { in_threads(THREADS, maps_thread); }

// --- remap: one mapping to the program, two to the kernel: each half got its pages elsewhere. The kernel refuses this.

static void remap(void) {
    size_t half = 16 * PAGE;
    char *both = map(3 * half);
    for (int i = 0; i < 2; i++) {
        char *part = map(half);
        fill(part, 0, half, 70 + i);
        must(mremap(part, half, half, MREMAP_MAYMOVE | MREMAP_FIXED, both + i * half) == both + i * half, "mremap");
    }
    char *moved = mremap(both, 2 * half, 8 * half, MREMAP_MAYMOVE);
    must(moved != MAP_FAILED, "mremap of both");
    for (int i = 0; i < 2; i++) check("a half", moved + i * half, 0, half, 70 + i);
    check_zeros("what they have gained", moved, 2 * half, 8 * half);
    // What nobody manages, and what somebody does behind it, to a fixed place: the kernel may move the first and then refuse.
    for (int i = 0; i < 2; i++) {
        char *room = map(8 * half), *kept = map(3 * half);
        fill(kept, 0, 3 * half, 80);
        int file = open("/proc/self/exe", O_RDONLY);
        must(file >= 0, "open");
        char *unmanaged = mmap(kept + i * half, half, PROT_READ, MAP_PRIVATE | MAP_FIXED, file, 0);
        must(unmanaged == kept + i * half && close(file) == 0, "mmap of a file");
        must(mremap(kept, 3 * half, 3 * half, MREMAP_MAYMOVE | MREMAP_FIXED, room + half) == room + half, "mremap of all");
        for (int n = 0; n < 3; n++)
            if (n != i) check("what is managed", room + half, n * half, (n + 1) * half, 80);
        must(memcmp(room + half + i * half, "\177ELF", 4) == 0, "the file");
        check_zeros("what was there", room, 0, half);
    }
}

// --- fork: with data away, from a process with threads; both sides check and change everything.

static char *shared;
static atomic_int stop;

static void *bystander(void *which) {
    size_t bytes = budget / 8;
    char *mine = map(bytes);
    uint64_t salt = 0x700 + (uint64_t)which;
    fill(mine, 0, bytes, salt);
    do {
        check("a thread's own memory, while others fork", mine, 0, bytes, salt);
        salt += 16;
        fill(mine, 0, bytes, salt);
    } while (!atomic_load(&stop));
    check("a thread's own memory, after the forks", mine, 0, bytes, salt);
    munmap(mine, bytes);
    return NULL;
}

static void wait_for(pid_t pid) {
    int status;
    must(waitpid(pid, &status, 0) == pid, "waitpid");
    if (status != 0) {
        fprintf(stderr, "stress: a child ended with %x\n", status);
        _exit(1);
    }
}

static void forks(void) {
    size_t bytes = budget / 2;
    shared = map(bytes);
    char *heap = malloc(bytes / 4);
    fill(shared, 0, bytes, 1);
    fill(heap, 0, bytes / 4, 2);
    pthread_t thread;
    must(pthread_create(&thread, NULL, bystander, NULL) == 0, "thread");
    uint64_t salt = 1;
    for (int round = 0; round < 4; round++) {
        pid_t pid = fork();
        must(pid >= 0, "fork");
        if (pid == 0) {
            check("in a child, a mapping", shared, 0, bytes, salt);
            check("in a child, the heap", heap, 0, bytes / 4, 2);
            fill(shared, 0, bytes / 2, 1000 + round);
            check("in a child, what the parent wrote", shared, bytes / 2, bytes, salt);
            pid_t grandchild = fork();
            must(grandchild >= 0, "fork");
            if (grandchild == 0) {
                check("in a grandchild, what the child wrote", shared, 0, bytes / 2, 1000 + round);
                check("in a grandchild, what the parent wrote", shared, bytes / 2, bytes, salt);
                check("in a grandchild, the heap", heap, 0, bytes / 4, 2);
                _exit(0);
            }
            fill(heap, 0, bytes / 4, 3000 + round);
            check("in a child, what it wrote", shared, 0, bytes / 2, 1000 + round);
            check("in a child, what it wrote to the heap", heap, 0, bytes / 4, 3000 + round);
            wait_for(grandchild);
            exit(0);
        }
        // While the child looks, the parent changes what the child must not see.
        check("in the parent", shared, 0, bytes / 4, salt);
        fill(shared, 0, bytes, salt + 1);
        salt++;
        wait_for(pid);
        check("in the parent, after the child", shared, 0, bytes, salt);
        check("in the parent, the heap", heap, 0, bytes / 4, 2);
    }
    atomic_store(&stop, 1);
    must(pthread_join(thread, NULL) == 0, "join");
    free(heap);
    munmap(shared, bytes);
}

// --- closes: the program closes every descriptor it did not open.

static void closes(void) {
    size_t bytes = budget / 2;
    char *data = map(bytes);
    fill(data, 0, bytes, 5);
    check("before anything is closed", data, 0, bytes, 5);
    closefrom(3);
    check("after closefrom", data, 0, bytes, 5);
    for (int fd = 3; fd < 4096; fd++) close(fd);
    check("after many closes", data, 0, bytes, 5);
    must(close_range(3, ~0u, 0) == 0, "close_range");
    check("after close_range", data, 0, bytes, 5);
    int null = open("/dev/null", O_RDWR | O_CLOEXEC);
    must(null >= 0, "open");
    for (int fd = 500; fd < 600; fd++) dup2(null, fd);
    fill(data, 0, bytes, 6);
    check("after descriptors were taken by number", data, 0, bytes, 6);
    pid_t pid = fork();
    must(pid >= 0, "fork");
    if (pid == 0) {
        check("in a child of all that", data, 0, bytes, 6);
        closefrom(3);
        fill(data, 0, bytes, 7);
        check("in a child that closes too", data, 0, bytes, 7);
        _exit(0);
    }
    wait_for(pid);
    check("in the parent of it", data, 0, bytes, 6);
}

// --- exits: threads that begin and end all the time while others fault.

static __thread uint64_t own[64];

static void *short_lived(void *argument) {
    uint64_t salt = (uint64_t)argument;
    char on_stack[40 * 1024];
    fill(own, 0, sizeof own, salt);
    fill(on_stack, 0, sizeof on_stack, salt + 1);
    char *block = malloc(200 << 10);
    fill(block, 0, 200 << 10, salt + 2);
    check("what lies before the threads", shared, salt % 64 * 16 * PAGE, (salt % 64 + 1) * 16 * PAGE, 9);
    check("on a stack", on_stack, 0, sizeof on_stack, salt + 1);
    check("in a thread's own storage", own, 0, sizeof own, salt);
    check("on the heap of a thread", block, 0, 200 << 10, salt + 2);
    free(block);
    if (salt % 3 == 0) pthread_exit(NULL);
    return NULL;
}

static void exits(void) {
    size_t bytes = budget * 3 / 4;
    shared = map(bytes);
    fill(shared, 0, bytes, 9);
    pthread_t thread;
    must(pthread_create(&thread, NULL, bystander, NULL) == 0, "thread");
    for (uint64_t round = 0; round < 100; round++) {
        pthread_t threads[4];
        for (uint64_t i = 0; i < 4; i++)
            must(pthread_create(&threads[i], NULL, short_lived, (void *)(round * 4 + i)) == 0, "thread");
        size_t part = bytes / 100 & ~7ul;
        check("between threads", shared, round * part, (round + 1) * part, 9);
        for (int i = 0; i < 4; i++) must(pthread_join(threads[i], NULL) == 0, "join");
    }
    atomic_store(&stop, 1);
    must(pthread_join(thread, NULL) == 0, "join");
    check("after the threads", shared, 0, bytes, 9);
}

// --- handlers: the program's own SIGSEGV and SIGBUS see its own faults, and none but those.

static sigjmp_buf back;
static volatile sig_atomic_t seen_segv, seen_bus;
static char *volatile expected_at;

static void on_fault(int number, siginfo_t *info, void *context) {
    (void)context;
    if ((char *)info->si_addr != expected_at) {
        fprintf(stderr, "stress: signal %d for %p, expected %p\n", number, info->si_addr, (void *)expected_at);
        _exit(1);
    }
    if (number == SIGSEGV) seen_segv++;
    if (number == SIGBUS) seen_bus++;
    siglongjmp(back, 1);
}

static void must_fault(char *at) {
    expected_at = at;
    if (sigsetjmp(back, 1) == 0) {
        *(volatile char *)at = 1;
        fail("no fault", at, 0, 0);
    }
    expected_at = NULL;
}

static void handlers(void) {
    struct sigaction action = {.sa_sigaction = on_fault, .sa_flags = SA_SIGINFO}, before;
    must(sigaction(SIGSEGV, &action, &before) == 0 && sigaction(SIGBUS, &action, &before) == 0, "sigaction");
    must(before.sa_handler == SIG_DFL, "there was a handler before");
    must(sigaction(SIGBUS, NULL, &before) == 0 && before.sa_sigaction == on_fault, "the handler that was set");
    sigset_t all;
    sigfillset(&all);
    sigdelset(&all, SIGSEGV);
    sigdelset(&all, SIGBUS);
    must(sigprocmask(SIG_SETMASK, &all, NULL) == 0, "sigprocmask");
    size_t bytes = budget;
    char *data = map(bytes), *guard = map(16 * PAGE);
    must(mprotect(guard, 16 * PAGE, PROT_NONE) == 0, "mprotect");
    int file = memfd_create("short", MFD_CLOEXEC);
    must(file >= 0 && ftruncate(file, PAGE) == 0, "a short file");
    char *beyond = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    must(beyond != MAP_FAILED, "map the file");
    fill(data, 0, bytes, 11);
    for (int round = 0; round < 8; round++) {
        size_t part = bytes / 8 & ~7ul;
        check("between faults of its own", data, round * part, (round + 1) * part, 11);
        must_fault(guard + round * PAGE + 123);
        must_fault(beyond + PAGE + round);
        // A page of what is managed, made inaccessible: the fault is the program's as well.
        char *page = (char *)(((uintptr_t)data + round * part + PAGE) & ~(PAGE - 1));
        must(mprotect(page, PAGE, PROT_READ) == 0, "mprotect");
        check("a page that is read-only", data, page - data, page - data + PAGE, 11);
        must_fault(page + 8);
        must(mprotect(page, PAGE, PROT_READ | PROT_WRITE) == 0, "mprotect");
    }
    check("after faults of its own", data, 0, bytes, 11);
    must(seen_segv == 16 && seen_bus == 8, "as many faults as were made");
}

// --- calls: memory that is away is handed to the kernel.

static void calls(void) {
    size_t bytes = budget, piece = 48 << 10;
    char *data = map(bytes);
    fill(data, 0, bytes, 13);
    char name[] = "/tmp/stress-XXXXXX";
    int file = mkstemp(name);
    must(file >= 0, "a file");
    unlink(name);
    size_t n = bytes / piece;
    for (size_t i = 0; i < n; i++) {
        size_t at = scattered(i, n) * piece;
        struct iovec parts[2] = {{data + at, piece / 2}, {data + at + piece / 2, piece / 2}};
        ssize_t wrote = i % 2 ? pwrite(file, data + at, piece, at) : (lseek(file, at, SEEK_SET), writev(file, parts, 2));
        must(wrote == (ssize_t)piece, "write from memory that is away");
    }
    memset(data, 0xee, n * piece);
    for (size_t i = 0; i < n; i++) {
        size_t at = scattered(i, n) * piece;
        struct iovec parts[2] = {{data + at, piece / 2}, {data + at + piece / 2, piece / 2}};
        ssize_t got = i % 2 ? pread(file, data + at, piece, at) : (lseek(file, at, SEEK_SET), readv(file, parts, 2));
        must(got == (ssize_t)piece, "read to memory that is away");
    }
    check("what went to a file and came back", data, 0, bytes, 13);
}

// --- limit: memory that is read-only stays; everything is right all the same.

static void limit(void) {
    size_t bytes = budget & ~(PAGE - 1);
    char *data = map(bytes);
    fill(data, 0, bytes, 15);
    must(mprotect(data, bytes / 8 & ~(PAGE - 1), PROT_READ) == 0, "mprotect");
    for (int round = 0; round < 3; round++) check("partly read-only", data, 0, bytes, 15);
    fill(data, bytes / 8, bytes, 16);
    check("the part that is read-only", data, 0, bytes / 8 & ~7ul, 15);
    check("the part that is not", data, bytes / 8, bytes, 16);
}

// --- hold: fills memory, says so, and goes round in it until it is ended.

static void hold(void) {
    char *data = map(budget);
    fill(data, 0, budget, 17);
    for (;;) {
        check("held", data, 0, budget, 17);
        if (write(1, "round\n", 6) != 6) _exit(1);
    }
}

int main(int count, char **arguments) {
    static const struct {
        const char *name;
        void (*run)(void);
    } parts[] = {{"heap", heap},   {"maps", maps},         {"remap", remap}, {"forks", forks}, {"closes", closes}, {"exits", exits},
                 {"handlers", handlers}, {"calls", calls}, {"limit", limit}, {"hold", hold}};
    if (count != 3) return 2;
    budget = strtoul(arguments[2], NULL, 10) * MIB;
    for (size_t i = 0; i < sizeof parts / sizeof *parts; i++)
        if (strcmp(arguments[1], parts[i].name) == 0) {
            parts[i].run();
            printf("%s %s: every byte was right\n", arguments[1], arguments[2]);
            return 0;
        }
    return 2;
}
