/* A client of the mirror devices: their interface, and what tests of it have in common. */
#ifndef MIRROR_H
#define MIRROR_H

#define _GNU_SOURCE
#include "tap.h"
#include <fcntl.h>
#include <stdbool.h>
#include <sys/ioctl.h>
#include <sys/mman.h>

struct command {
    uint64_t addr, ptr, npages, cpages, faults;
};

enum request { READ, WRITE, TO_DEVICE, TO_SYSTEM, SNAPSHOT, EXCLUSIVE, CHECK_EXCLUSIVE, RELEASE, FLAGS };
#define NUMBER(request) _IOWR('H', request, struct command)
#define FAIL_ALLOC 1

/* What a snapshot says of a page. */
enum seen {
    UNREADABLE = 0xff,
    NOTHING = 0,
    READABLE = 1,
    WRITABLE = 2,
    BY_2M = 4,
    BY_1G = 8,
    ZEROS = 0x10,
    PRIVATE_HERE = 0x20,
    COHERENT_HERE = 0x40,
    COHERENT_ELSEWHERE = 0x50,
};

#define PAGE 4096ul
#define BLOCK (512 * PAGE)
#define NO_RW PROT_NONE
#define RO PROT_READ
#define RW (PROT_READ | PROT_WRITE)
#define PRIVATE (MAP_PRIVATE | MAP_ANONYMOUS)

#ifndef MADV_COLLAPSE
#define MADV_COLLAPSE 25
#endif

static inline int open_mirror(int device)
{
    char path[32];
    snprintf(path, sizeof path, "/dev/hmm_dmirror%d", device);
    int fd = open(path, O_RDWR);
    HOLDS(fd >= 0);
    return fd;
}

static inline bool is_coherent(int device)
{
    return device >= 2;
}

/* Makes a request; returns 0, or the errno. */
static inline int ask(int fd, enum request request, const void *at, void *ptr, uint64_t pages, struct command *out)
{
    struct command command = {(uint64_t)at, (uint64_t)ptr, pages, 0x1234, 0x5678};
    errno = 0;
    int result = ioctl(fd, NUMBER(request), &command);
    if (out)
        *out = command;
    HOLDS(result == 0 || result == -1);
    return result == 0 ? 0 : errno;
}

/* Makes a request that succeeds with all pages; returns whether anything had to be faulted. */
#define DONE(fd, request, at, ptr, pages) DONE_IN_PART(pages, fd, request, at, ptr, pages)

/* Makes a request that succeeds with so many of the pages. */
#define DONE_IN_PART(of_them, fd, request, at, ptr, pages)                                                             \
    ({                                                                                                                 \
        struct command done_;                                                                                          \
        EQUAL(0, ask(fd, request, at, ptr, pages, &done_));                                                            \
        EQUAL(of_them, done_.cpages);                                                                                  \
        HOLDS(done_.faults <= 1);                                                                                      \
        done_.faults;                                                                                                  \
    })

/* A request is refused, and the struct as it was. */
#define REFUSED(code, fd, request, at, ptr, pages)                                                                     \
    do {                                                                                                               \
        struct command after_;                                                                                         \
        EQUAL(code, ask(fd, request, at, ptr, pages, &after_));                                                        \
        EQUAL(0x1234, after_.cpages);                                                                                  \
        EQUAL(0x5678, after_.faults);                                                                                  \
    } while (0)

static inline void *map(size_t bytes, int protection, int flags, int fd)
{
    void *at = mmap(NULL, bytes, protection, flags, fd, 0);
    HOLDS(at != MAP_FAILED);
    return at;
}

/* Blocks at an address that is a multiple of their size, with room of a block on either side. */
static inline void *map_blocks(size_t blocks, int protection, int advice)
{
    uintptr_t at = (uintptr_t)map((blocks + 2) * BLOCK, protection, PRIVATE, -1);
    void *start = (void *)((at + BLOCK) & ~(BLOCK - 1));
    if (advice)
        HOLDS(madvise(start, blocks * BLOCK, advice) == 0);
    return start;
}

/* A buffer of the program's, for what devices read and write. */
static inline void *buffer(size_t bytes)
{
    void *at = malloc(bytes);
    HOLDS(at);
    memset(at, 0xa5, bytes);
    return at;
}

/* Word `i` of what is marked with `mark`: no two are alike. */
static inline uint64_t word(uint64_t mark, uint64_t i)
{
    return (mark << 40) + i * 0x9e3779b97f4a7c15ull + 1;
}

static inline void fill(void *at, size_t bytes, uint64_t mark)
{
    volatile uint64_t *words = at;
    for (size_t i = 0; i < bytes / 8; i++)
        words[i] = word(mark, i);
}

/* New memory of the program's, filled. */
static inline void *filled(size_t bytes, uint64_t mark)
{
    void *at = map(bytes, RW, PRIVATE, -1);
    fill(at, bytes, mark);
    return at;
}

/* Everything at `at` is as `fill` left it. */
#define FILLED(at, bytes, mark) FILLED_FROM(at, bytes, mark, 0)

/* The same of what begins `skipped` bytes behind the start of what was filled. */
#define FILLED_FROM(at, bytes, mark, skipped)                                                                          \
    do {                                                                                                               \
        const volatile uint64_t *words_ = (const volatile uint64_t *)(at);                                             \
        for (size_t i_ = 0; i_ < (bytes) / 8; i_++) {                                                                  \
            uint64_t found_ = words_[i_];                                                                              \
            if (found_ != word(mark, i_ + (skipped) / 8))                                                              \
                FAIL("word %zu of %s is %#llx, not that of mark %llu", i_, #at, (unsigned long long)found_,            \
                     (unsigned long long)(mark));                                                                      \
        }                                                                                                              \
    } while (0)

#define ALL_ZERO(at, bytes)                                                                                            \
    do {                                                                                                               \
        const volatile uint64_t *words_ = (const volatile uint64_t *)(at);                                             \
        for (size_t i_ = 0; i_ < (bytes) / 8; i_++)                                                                    \
            if (words_[i_] != 0)                                                                                       \
                FAIL("word %zu of %s is %#llx, not zero", i_, #at, (unsigned long long)words_[i_]);                    \
    } while (0)

/* A request succeeds with all pages, and what it copies to `ptr` is as `fill` left it. Returns what `DONE` does. */
#define FINDS(mark, fd, request, at, ptr, pages)                                                                       \
    ({                                                                                                                 \
        uint64_t finds_ = DONE(fd, request, at, ptr, pages);                                                           \
        FILLED(ptr, (pages) * PAGE, mark);                                                                             \
        finds_;                                                                                                        \
    })

/* The device fills all pages, by way of `ptr`. Returns what `DONE` does. */
#define WRITES(mark, fd, at, ptr, pages)                                                                               \
    ({                                                                                                                 \
        fill(ptr, (pages) * PAGE, mark);                                                                               \
        DONE(fd, WRITE, at, ptr, pages);                                                                               \
    })

/* What a snapshot by this device says of each page. */
static inline unsigned char *snapshot(int fd, const void *at, size_t pages)
{
    unsigned char *seen = malloc(pages);
    HOLDS(seen);
    DONE(fd, SNAPSHOT, at, seen, pages);
    return seen;
}

/* A snapshot says the same of all pages. */
#define ALL_SEEN(expected, fd, at, pages) ALL_SEEN_BUT(0, expected, fd, at, pages)

/* The same, whether or not they are mapped by large entries: mirrors may gather small pages to large ones. */
#define ALL_SEEN_OF_ANY_SIZE(expected, fd, at, pages) ALL_SEEN_BUT(BY_2M, expected, fd, at, pages)

#define ALL_SEEN_BUT(mask, expected, fd, at, pages)                                                                    \
    do {                                                                                                               \
        unsigned char *seen_ = snapshot(fd, at, pages);                                                                \
        for (size_t i_ = 0; i_ < (size_t)(pages); i_++)                                                                \
            if ((seen_[i_] & ~(mask)) != (unsigned char)(expected))                                                    \
                FAIL("page %zu of %s is seen as %#x, not %#x", i_, #at, seen_[i_], (unsigned)(expected));              \
        free(seen_);                                                                                                   \
    } while (0)

/* What a snapshot says of memory that is on this device, and may be written. */
static inline unsigned seen_on(int device)
{
    return (is_coherent(device) ? COHERENT_HERE : PRIVATE_HERE) | WRITABLE;
}

/* The same test for one device of each kind. */
#define EACH_KIND(device) for (int device = 0; device < 4; device += 2)

/* The same with a file that is open on the device, and closed afterwards. */
#define EACH_MIRROR(device, fd) EACH_KIND(device) OPENED(fd, device)

/* The same with a second device of the kind. */
#define EACH_PAIR(device, fd, other) EACH_MIRROR(device, fd) OPENED(other, device + 1)

#define OPENED(fd, device) for (int fd = open_mirror(device); fd >= 0; close(fd), fd = -1)

#endif
