/* All requests and all changes of mappings, from several threads at once, with every byte checked.
 *
 * Each thread has memory of its own, side by side with the others', and a model of it: what each page holds, and what may be done
 * with it. What requests answer is what the model says, and so is what the CPU and devices read. Beside them one thread tears
 * memory down that others have devices read and write; there only the errors are checked.
 *
 * STRESS_SECONDS says for how long (8), STRESS_SEED where the random numbers begin.
 */
#include "mirror.h"
#include <pthread.h>
#include <time.h>

#define THREADS 4
#define PAGES 640ul
#define ROOM (PAGES * PAGE)
#define ELSEWHERE (ROOM + 8 * PAGE)
/* Operations of a thread that are remembered. */
#define STEPS 4096

enum kind { SMALL, HUGE, SHARED, FROM_FILE };

struct page {
    uint64_t mark;    /* 0: zeros */
    int allowed;      /* of mprotect; -1: not ours any more */
    unsigned devices; /* in whose memory it may be, if not on the host: a bit for each */
};
#define PRIVATE_ONES 3u

struct owner {
    enum kind kind;
    char *at, *copy, *elsewhere;
    struct page pages[PAGES];
    uint64_t random, ops;
    int fds[4];
    pthread_t thread;
    struct step {
        int what, device, why;
        size_t first, count;
    } last[STEPS];
};

static __thread struct owner *self;
/* The page that something is found to be wrong with. */
static __thread size_t subject = PAGES;

/* What the thread that has failed did last, and what it did with the page in question. */
static void explain(void)
{
    for (uint64_t n = self && self->ops >= STEPS ? self->ops - STEPS + 1 : 0; self && n <= self->ops; n++) {
        const struct step *step = &self->last[n % STEPS];
        if (n + 16 > self->ops || (subject - step->first < step->count))
            fprintf(stderr, "#   operation %llu: %d, device %d, pages %zu to %zu: %d\n", (unsigned long long)n, step->what,
                    step->device, step->first, step->first + step->count, step->why);
    }
}

static int stop;
static uint64_t next_mark = 1;

/* A request of the thread's own memory. */
static int request(struct owner *o, enum request what, int device, size_t first, size_t count, void *ptr, struct command *out)
{
    return o->last[o->ops % STEPS].why = ask(o->fds[device], what, o->at + first * PAGE, ptr, count, out);
}

static uint64_t draw(struct owner *o, uint64_t below)
{
    o->random ^= o->random << 13;
    o->random ^= o->random >> 7;
    o->random ^= o->random << 17;
    return o->random % below;
}

static void fill_page(void *at, uint64_t mark)
{
    if (mark)
        fill(at, PAGE, mark);
    else
        memset(at, 0, PAGE);
}

#define HAS(bytes, mark, what)                                                                                         \
    do {                                                                                                               \
        const volatile uint64_t *words_ = (const volatile uint64_t *)(bytes);                                          \
        for (size_t i_ = 0; i_ < PAGE / 8; i_++) {                                                                     \
            uint64_t found_ = words_[i_], expected_ = (mark) ? word(mark, i_) : 0;                                     \
            if (found_ != expected_ && (subject = page, true))                                                         \
                FAIL("%s: page %zu of kind %d, word %zu is %#llx, not %#llx (mark %llu)", what, page, o->kind, i_,     \
                     (unsigned long long)found_, (unsigned long long)expected_, (unsigned long long)(mark));           \
        }                                                                                                              \
    } while (0)

/* The CPU has accessed the page, which has brought it home, if the CPU cannot access it where it was (Z8). */
static void by_cpu(struct page *page)
{
    page->devices &= ~PRIVATE_ONES;
}

/* A device has accessed the page by the same right. */
static void by_device(struct page *page, int device)
{
    page->devices &= ~PRIVATE_ONES | 1u << device;
}

/* Some pages that are still ours. */
static bool choose(struct owner *o, size_t *first, size_t *count)
{
    *first = draw(o, PAGES);
    *count = draw(o, 4) ? 1 + draw(o, 24) : 1 + draw(o, PAGES);
    if (*count > PAGES - *first)
        *count = PAGES - *first;
    for (size_t i = 0; i < *count; i++)
        if (o->pages[*first + i].allowed < 0)
            *count = i;
    return *count > 0;
}

static bool all(struct owner *o, size_t first, size_t count, int allowed)
{
    for (size_t page = first; page < first + count; page++)
        if ((o->pages[page].allowed & allowed) != allowed)
            return false;
    return true;
}

static void verify(struct owner *o, size_t first, size_t count)
{
    for (size_t page = first; page < first + count; page++)
        if (o->pages[page].allowed > 0) {
            HAS(o->at + page * PAGE, o->pages[page].mark, "the CPU");
            by_cpu(&o->pages[page]);
        }
}

static void cpu_write(struct owner *o, size_t first, size_t count)
{
    for (size_t page = first; page < first + count; page++)
        if (o->pages[page].allowed == RW) {
            o->pages[page].mark = __atomic_fetch_add(&next_mark, 1, __ATOMIC_RELAXED);
            fill_page(o->at + page * PAGE, o->pages[page].mark);
            by_cpu(&o->pages[page]);
        }
}

static void copied(struct owner *o, size_t first, size_t count, const char *what)
{
    for (size_t page = first; page < first + count; page++)
        HAS(o->copy + (page - first) * PAGE, o->pages[page].mark, what);
}

static void device_read(struct owner *o, int device, size_t first, size_t count)
{
    struct command done;
    int why = request(o, READ, device, first, count, o->copy, &done);
    EQUAL(all(o, first, count, RO) ? 0 : EFAULT, why);
    if (why == 0) {
        EQUAL(count, done.cpages);
        copied(o, first, count, "a device");
        for (size_t i = 0; i < count; i++)
            by_device(&o->pages[first + i], device);
    }
}

static void device_write(struct owner *o, int device, size_t first, size_t count)
{
    uint64_t marks[PAGES];
    int expected = 0;
    for (size_t i = 0; i < count; i++) {
        marks[i] = __atomic_fetch_add(&next_mark, 1, __ATOMIC_RELAXED);
        fill_page(o->copy + i * PAGE, marks[i]);
        int allowed = o->pages[first + i].allowed;
        if (!expected && allowed != RW)
            expected = allowed & PROT_READ ? EPERM : EFAULT;
    }
    EQUAL(expected, request(o, WRITE, device, first, count, o->copy, NULL));
    for (size_t i = 0; i < count; i++) {
        struct page *page = &o->pages[first + i];
        /* Of what was refused, that before the page in question may be written. */
        uint64_t now = page->allowed == RW ? *(volatile uint64_t *)(o->at + (first + i) * PAGE) : 0;
        if (page->allowed == RW && (!expected || now == word(marks[i], 0)))
            page->mark = marks[i];
    }
    verify(o, first, count);
}

static void to_device(struct owner *o, int device, size_t first, size_t count)
{
    bool elsewhere = o->kind == SHARED, file = o->kind == FROM_FILE;
    for (size_t i = 0; i < count; i++) {
        struct page *page = &o->pages[first + i];
        elsewhere |= (page->devices & ~(1u << device)) != 0;
        /* Never written: the file's own. */
        elsewhere |= file && page->mark == 0;
    }
    struct command done;
    int why = request(o, TO_DEVICE, device, first, count, o->copy, &done);
    if (!all(o, first, count, RO)) {
        EQUAL(EINVAL, why);
    } else if (why == ENOENT) {
        for (size_t i = 0; i < count && !elsewhere; i++) {
            unsigned char seen;
            DONE(o->fds[device], SNAPSHOT, o->at + (first + i) * PAGE, &seen, 1);
            subject = seen & (is_coherent(device) ? COHERENT_HERE : PRIVATE_HERE) ? subject : first + i;
        }
        HOLDS(elsewhere);
    } else {
        EQUAL(0, why);
        EQUAL(count, done.cpages);
        copied(o, first, count, "a migration");
    }
    for (size_t i = 0; i < count && o->kind != SHARED; i++)
        o->pages[first + i].devices = 1u << device | (why ? o->pages[first + i].devices : 0);
}

static void to_system(struct owner *o, int device, size_t first, size_t count)
{
    int why = request(o, TO_SYSTEM, device, first, count, o->copy, NULL);
    EQUAL(all(o, first, count, RO) ? 0 : EINVAL, why);
    for (size_t i = 0; i < count && !why; i++)
        o->pages[first + i].devices &= ~(1u << device);
}

static void exclusive(struct owner *o, int device, size_t first, size_t count)
{
    int why = request(o, EXCLUSIVE, device, first, count, o->copy, NULL);
    if (!all(o, first, count, RW))
        EQUAL(EFAULT, why);
    else if (o->kind == SHARED || o->kind == FROM_FILE)
        HOLDS(why == 0 || why == EBUSY);
    else
        EQUAL(0, why);
    if (why == 0)
        copied(o, first, count, "sole access");
    for (size_t i = 0; i < count && why != EFAULT; i++)
        o->pages[first + i].devices = 1u << device | (why ? o->pages[first + i].devices : 0);
}

static void look(struct owner *o, int device, size_t first, size_t count)
{
    unsigned char seen[PAGES];
    DONE(o->fds[device], SNAPSHOT, o->at + first * PAGE, seen, count);
    for (size_t i = 0; i < count; i++) {
        const struct page *page = &o->pages[first + i];
        bool readable = page->allowed & PROT_READ;
        subject = first + i;
        EQUAL(readable, seen[i] != UNREADABLE);
        if (!readable)
            continue;
        unsigned here = 1u << device, on = page->devices;
        bool may_be = !(seen[i] & WRITABLE) || page->allowed == RW;
        switch (seen[i] & 0xf0) {
        case 0: break;
        case ZEROS: may_be &= page->mark == 0; break;
        case PRIVATE_HERE: may_be &= (on & here & PRIVATE_ONES) != 0; break;
        case COHERENT_HERE: may_be &= (on & here & ~PRIVATE_ONES) != 0; break;
        case COHERENT_ELSEWHERE: may_be &= (on & ~here & ~PRIVATE_ONES) != 0; break;
        default: may_be = false;
        }
        if (!may_be)
            FAIL("page %zu of kind %d, which may be %s and on devices %#x, and has mark %llu, is seen as %#x", first + i, o->kind,
                 page->allowed == RW ? "written" : "read", on, (unsigned long long)page->mark, seen[i]);
    }
    subject = PAGES;
}

static void protect(struct owner *o, size_t first, size_t count)
{
    static const int ways[] = {RW, RW, RO, NO_RW};
    int allowed = ways[draw(o, 4)];
    HOLDS(mprotect(o->at + first * PAGE, count * PAGE, allowed) == 0);
    for (size_t i = 0; i < count; i++)
        o->pages[first + i].allowed = allowed;
}

static void renew(struct owner *o, size_t first, size_t count)
{
    char *at = o->at + first * PAGE;
    int flags = o->kind == SHARED ? MAP_SHARED | MAP_ANONYMOUS : PRIVATE;
    if (o->kind == FROM_FILE)
        return;
    void *now;
    if (draw(o, 2)) {
        now = mmap(at, count * PAGE, RW, flags | MAP_FIXED, -1, 0);
        HOLDS(now == at);
    } else {
        HOLDS(munmap(at, count * PAGE) == 0);
        /* Another thread's memory may have come to be there. */
        now = mmap(at, count * PAGE, RW, flags | MAP_FIXED_NOREPLACE, -1, 0);
    }
    if (now == at && o->kind == HUGE)
        madvise(at, count * PAGE, MADV_HUGEPAGE);
    for (size_t i = 0; i < count; i++)
        o->pages[first + i] = (struct page){0, now == at ? RW : -1, 0};
}

static void give_up(struct owner *o, size_t first, size_t count)
{
    if (o->kind == FROM_FILE || o->kind == SHARED)
        return;
    HOLDS(madvise(o->at + first * PAGE, count * PAGE, MADV_DONTNEED) == 0);
    for (size_t i = 0; i < count; i++) {
        o->pages[first + i].mark = 0;
        o->pages[first + i].devices = 0;
    }
}

/* To another place and back. */
static void move(struct owner *o, size_t first, size_t count)
{
    if (o->kind == SHARED || o->kind == FROM_FILE)
        return;
    for (size_t i = 1; i < count; i++)
        if (o->pages[first + i].allowed != o->pages[first].allowed)
            count = i;
    char *at = o->at + first * PAGE, *there = o->elsewhere + draw(o, 8) * PAGE;
    size_t bytes = count * PAGE;
    /* Of how many mappings it consists is nothing that the program knows. */
    HOLDS(mremap(at, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, there) == there);
    if (o->pages[first].allowed & PROT_READ)
        for (size_t page = first; page < first + count; page += 1 + draw(o, 8))
            HAS(there + (page - first) * PAGE, o->pages[page].mark, "moved memory");
    /* Whatever has come to be there is another thread's. */
    void *taken = mmap(at, bytes, NO_RW, PRIVATE | MAP_FIXED_NOREPLACE, -1, 0);
    if (taken != at) {
        for (size_t i = 0; i < count; i++)
            o->pages[first + i].allowed = -1;
        HOLDS(mmap(there, bytes, NO_RW, PRIVATE | MAP_FIXED, -1, 0) == there);
        return;
    }
    HOLDS(mremap(there, bytes, bytes, MREMAP_MAYMOVE | MREMAP_FIXED, at) == at);
    taken = mmap(there, bytes, NO_RW, PRIVATE | MAP_FIXED_NOREPLACE, -1, 0);
    if (taken != there) {
        /* So it is here: there has to be another place to go to. */
        char *end = o->elsewhere + ELSEWHERE;
        HOLDS(there == o->elsewhere || munmap(o->elsewhere, there - o->elsewhere) == 0);
        HOLDS(there + bytes == end || munmap(there + bytes, end - there - bytes) == 0);
        o->elsewhere = map(ELSEWHERE, NO_RW, PRIVATE, -1);
    }
}

static void fork_once(struct owner *o)
{
    pid_t child = fork();
    if (child == 0) {
        alarm(60);
        int device = draw(o, 4);
        o->fds[device] = open_mirror(device);
        for (int round = 0; round < 4; round++) {
            size_t first, count;
            if (!choose(o, &first, &count))
                continue;
            device_read(o, device, first, count);
            if (o->kind != SHARED) {
                cpu_write(o, first, count);
                device_write(o, device, first, count);
            }
            verify(o, first, count);
        }
        _exit(0);
    }
    HOLDS(child > 0);
    ENDS_WELL(child);
}

static void *own_memory(void *of)
{
    struct owner *o = self = of;
    for (; !__atomic_load_n(&stop, __ATOMIC_RELAXED); o->ops++) {
        size_t first, count;
        int device = draw(o, 4);
        if (!choose(o, &first, &count))
            continue;
        int what = draw(o, 32);
        o->last[o->ops % STEPS] = (struct step){what, device, -1, first, count};
        switch (what) {
        case 0: case 1: case 2: case 3: cpu_write(o, first, count); break;
        case 4: case 5: case 6: verify(o, first, count); break;
        case 7: case 8: case 9: case 10: device_read(o, device, first, count); break;
        case 11: case 12: case 13: device_write(o, device, first, count); break;
        case 14: case 15: case 16: case 17: case 18: to_device(o, device, first, count); break;
        case 19: case 20: to_system(o, device, first, count); break;
        case 21: exclusive(o, device, first, count); break;
        case 22: look(o, device, first, count); break;
        case 23: case 24: protect(o, first, count); break;
        case 25: renew(o, first, count); break;
        case 26: give_up(o, first, count); break;
        case 27: case 28: move(o, first, count); break;
        case 29: EQUAL(0, ask(o->fds[device], FLAGS, o->at, NULL, FAIL_ALLOC, NULL)); break;
        case 30:
            if (draw(o, 4) == 0)
                EQUAL(0, ask(o->fds[device], RELEASE, o->at, NULL, 1, NULL));
            break;
        default:
            if (draw(o, 4) == 0)
                fork_once(o);
            HOLDS(close(o->fds[device]) == 0);
            o->fds[device] = open_mirror(device);
        }
    }
    verify(o, 0, PAGES);
    return NULL;
}

/* Memory that is torn down while devices use it. */
static char *torn;

static void *tear(void *of)
{
    (void)of;
    struct owner rng = {.random = 77};
    while (!__atomic_load_n(&stop, __ATOMIC_RELAXED)) {
        char *at = torn + draw(&rng, 256) * PAGE;
        size_t bytes = (1 + draw(&rng, 128)) * PAGE;
        int allowed = draw(&rng, 3) ? RW : NO_RW;
        switch (draw(&rng, 4)) {
        case 0: HOLDS(mmap(at, bytes, allowed, PRIVATE | MAP_FIXED, -1, 0) == at); break;
        case 1: HOLDS(mmap(at, bytes, allowed, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at); break;
        case 2: HOLDS(mprotect(at, bytes, allowed) == 0); break;
        default: madvise(at, bytes, MADV_DONTNEED);
        }
        usleep(draw(&rng, 300));
    }
    return NULL;
}

static void *use_torn(void *of)
{
    struct owner rng = {.random = (uintptr_t)of + 99};
    int fd = open_mirror((uintptr_t)of);
    char *copy = buffer(384 * PAGE);
    while (!__atomic_load_n(&stop, __ATOMIC_RELAXED)) {
        char *at = torn + draw(&rng, 256) * PAGE;
        size_t pages = 1 + draw(&rng, 128);
        int why = ask(fd, (enum request[]){READ, WRITE, TO_DEVICE, TO_SYSTEM, EXCLUSIVE, SNAPSHOT}[draw(&rng, 6)], at, copy,
                      pages, NULL);
        HOLDS(why == 0 || why == EFAULT || why == EINVAL || why == ENOENT || why == EBUSY || why == EPERM);
    }
    return NULL;
}

/* Says what is mapped where an access was refused. */
static void refused(int signal, siginfo_t *info, void *context)
{
    (void)signal, (void)context;
    static char line[512];
    FILE *maps = fopen("/proc/self/maps", "r");
    unsigned long start, end, at = (unsigned long)info->si_addr;
    fprintf(stderr, "# refused at %#lx (code %d):\n", at, info->si_code);
    while (maps && fgets(line, sizeof line, maps))
        if (sscanf(line, "%lx-%lx", &start, &end) == 2 && start <= at + 4 * PAGE && at < end + 4 * PAGE)
            fprintf(stderr, "# %s", line);
    explain();
    _exit(1);
}

TEST(everything_at_once, "G1 to G14: every byte is what it must be")
{
    const char *seconds = getenv("STRESS_SECONDS"), *seed = getenv("STRESS_SEED");
    unsigned limit = seconds ? atoi(seconds) : 8;
    uint64_t random = seed ? strtoull(seed, NULL, 0) : (uint64_t)time(NULL);
    printf("# STRESS_SEED=%llu\n", (unsigned long long)random);
    fflush(stdout);
    alarm(limit + 120);
    tap_explain = explain;
    struct sigaction action = {.sa_sigaction = refused, .sa_flags = SA_SIGINFO};
    sigaction(SIGSEGV, &action, NULL);
    sigaction(SIGBUS, &action, NULL);
    static struct owner owners[THREADS];
    FILE *file = tmpfile();
    HOLDS(file && ftruncate(fileno(file), ROOM) == 0);
    char *huge = map_blocks(2, RW, MADV_HUGEPAGE), *side_by_side = map(2 * ROOM, RW, PRIVATE, -1);
    torn = map(384 * PAGE, RW, PRIVATE, -1);
    for (int i = 0; i < THREADS; i++) {
        struct owner *o = &owners[i];
        o->kind = (enum kind[]){SMALL, HUGE, SHARED, FROM_FILE}[i];
        o->at = i == 0   ? side_by_side
                : i == 1 ? huge
                : i == 2 ? mmap(side_by_side + ROOM, ROOM, RW, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0)
                         : map(ROOM, RW, MAP_PRIVATE, fileno(file));
        HOLDS(o->at != MAP_FAILED);
        o->copy = map(ROOM, RW, PRIVATE, -1);
        o->elsewhere = map(ELSEWHERE, NO_RW, PRIVATE, -1);
        o->random = random * 31 + i * 1000003 + 1;
        for (size_t page = 0; page < PAGES; page++)
            o->pages[page] = (struct page){0, RW, 0};
        for (int device = 0; device < 4; device++)
            o->fds[device] = open_mirror(device);
    }
    pthread_t others[4];
    HOLDS(pthread_create(&others[0], NULL, tear, NULL) == 0);
    for (uintptr_t i = 1; i < 4; i++)
        HOLDS(pthread_create(&others[i], NULL, use_torn, (void *)i) == 0);
    for (int i = 0; i < THREADS; i++)
        HOLDS(pthread_create(&owners[i].thread, NULL, own_memory, &owners[i]) == 0);
    for (unsigned second = 0; second < limit; second++)
        sleep(1);
    __atomic_store_n(&stop, 1, __ATOMIC_RELAXED);
    for (int i = 0; i < 4; i++)
        pthread_join(others[i], NULL);
    for (int i = 0; i < THREADS; i++) {
        pthread_join(owners[i].thread, NULL);
        printf("# kind %d: %llu operations\n", owners[i].kind, (unsigned long long)owners[i].ops);
    }
}
