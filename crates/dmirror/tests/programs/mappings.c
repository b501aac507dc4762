/* What the program does to its mappings while devices have to do with them (rule G5). */
#include "mirror.h"
#include <pthread.h>

/* Blocks by huge pages or small ones, filled with 1, with room of `room` blocks behind them in which nothing is mapped. */
static char *blocks(int huge, size_t room)
{
    char *at = map_blocks(1 + room, RW, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE);
    if (room)
        HOLDS(munmap(at + BLOCK, room * BLOCK) == 0);
    fill(at, BLOCK, 1);
    return at;
}

TEST(a_part_is_unmapped, "G5, H11: what is left of a block on a device is as it was")
{
    for (int huge = 0; huge < 2; huge++)
        for (size_t part = 0; part < 3; part++)
        EACH_MIRROR(device, fd) {
            char *at = blocks(huge, 0), *copy = buffer(BLOCK);
            FINDS(1, fd, TO_DEVICE, at, copy, 512);
            size_t from = part * BLOCK / 4, to = from + BLOCK / 2;
            HOLDS(munmap(at + from, to - from) == 0);
            ALL_SEEN(UNREADABLE, fd, at + from, (to - from) / PAGE);
            REFUSED(EFAULT, fd, READ, at, copy, 512);
            FILLED(at, from, 1);
            FILLED_FROM(at + to, BLOCK - to, 1, to);
            /* Something new in its place. */
            HOLDS(mmap(at + from, to - from, RW, PRIVATE | MAP_FIXED, -1, 0) == at + from);
            DONE(fd, READ, at, copy, 512);
            FILLED(copy, from, 1);
            ALL_ZERO(copy + from, to - from);
            FILLED_FROM(copy + to, BLOCK - to, 1, to);
        }
}

TEST(memory_that_moves, "G5: whole, in part, with and without leaving the old mapping, before and after it migrates")
{
    for (int way = 0; way < 8; way++)
        for (size_t shift = 0; shift < 3; shift++)
        EACH_MIRROR(device, fd) {
            int huge = way & 1, stays = way >> 1 & 1, before = way >> 2;
            int flags = MREMAP_MAYMOVE | MREMAP_FIXED | (stays ? MREMAP_DONTUNMAP : 0);
            /* Before there is room for it where memory is to move. */
            char *copy = buffer(BLOCK), *at = blocks(huge, 2), *to = at + BLOCK + shift * BLOCK / 4, *now = at;
            if (before)
                HOLDS((now = mremap(at, BLOCK, BLOCK, flags, to)) == to);
            FINDS(1, fd, TO_DEVICE, now, copy, 512);
            if (!before)
                HOLDS((now = mremap(at, BLOCK, BLOCK, flags, to)) == to);
            ALL_SEEN_OF_ANY_SIZE(seen_on(device), fd, now, 512);
            if (shift == 0)
                DONE(fd, READ, now, copy, 512);
            FILLED(now, BLOCK, 1);
            if (stays) {
                DONE(fd, READ, at, copy, 512);
                ALL_ZERO(copy, BLOCK);
                ALL_ZERO(at, BLOCK);
                fill(at, BLOCK, 2);
            } else {
                REFUSED(EFAULT, fd, READ, at, copy, 512);
                ALL_SEEN(UNREADABLE, fd, at, 512);
            }
            FILLED(now, BLOCK, 1);
            HOLDS(munmap(now, BLOCK) == 0);
        }
}

TEST(a_part_moves, "G5: out of the middle of what is on a device")
{
    for (int huge = 0; huge < 2; huge++)
    EACH_MIRROR(device, fd) {
        char *copy = buffer(BLOCK), *at = blocks(huge, 1), *to = at + BLOCK + 3 * PAGE;
        DONE(fd, TO_DEVICE, at, copy, 512);
        HOLDS(mremap(at + 100 * PAGE, 50 * PAGE, 50 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
        FILLED_FROM(to, 50 * PAGE, 1, 100 * PAGE);
        FILLED(at, 100 * PAGE, 1);
        FILLED_FROM(at + 150 * PAGE, 362 * PAGE, 1, 150 * PAGE);
        REFUSED(EFAULT, fd, READ, at, copy, 512);
        DONE(fd, READ, at + 150 * PAGE, copy, 362);
        FILLED_FROM(copy, 362 * PAGE, 1, 150 * PAGE);
    }
}

TEST(memory_of_several_mappings_moves, "G5: parts that devices have had to do with, and others: all of it, to a fixed place or any")
{
    for (size_t first = 0; first < 48; first += 16)
    EACH_MIRROR(device, fd) {
        char *copy = buffer(128 * PAGE), *to = map(64 * PAGE, RW, PRIVATE, -1), *at = filled(64 * PAGE, 1);
        fill(to, 64 * PAGE, 2);
        /* The library manages what it was asked about. */
        DONE(fd, TO_DEVICE, at + first * PAGE, copy, 8);
        DONE(fd, READ, at + (first + 12) * PAGE, copy, 2);
        HOLDS(mremap(at, 64 * PAGE, 64 * PAGE, MREMAP_MAYMOVE | MREMAP_FIXED, to) == to);
        REFUSED(EFAULT, fd, READ, at, copy, 64);
        ALL_SEEN(seen_on(device), fd, to + first * PAGE, 8);
        FINDS(1, fd, READ, to, copy, 64);
        FILLED(to, 64 * PAGE, 1);
        /* Anywhere, and longer. */
        char *now = mremap(to, 64 * PAGE, 128 * PAGE, MREMAP_MAYMOVE);
        HOLDS(now != MAP_FAILED);
        DONE(fd, READ, now, copy, 128);
        FILLED(copy, 64 * PAGE, 1);
        ALL_ZERO(copy + 64 * PAGE, 64 * PAGE);
        FILLED(now, 64 * PAGE, 1);
        HOLDS(munmap(now, 128 * PAGE) == 0);
    }
}

TEST(memory_grows_and_shrinks, "G5: in place, and elsewhere")
{
    EACH_MIRROR(device, fd) {
        char *at = filled(64 * PAGE, 1), *copy = buffer(256 * PAGE);
        DONE(fd, TO_DEVICE, at, copy, 64);
        at = mremap(at, 64 * PAGE, 256 * PAGE, MREMAP_MAYMOVE);
        HOLDS(at != MAP_FAILED);
        DONE(fd, READ, at, copy, 256);
        FILLED(copy, 64 * PAGE, 1);
        ALL_ZERO(copy + 64 * PAGE, 192 * PAGE);
        WRITES(2, fd, at, copy, 256);
        DONE(fd, TO_DEVICE, at, copy, 256);
        HOLDS(mremap(at, 256 * PAGE, 32 * PAGE, 0) == at);
        FILLED(at, 32 * PAGE, 2);
        ALL_SEEN(UNREADABLE, fd, at + 32 * PAGE, 1);
        REFUSED(EFAULT, fd, READ, at, copy, 33);
    }
}

TEST(memory_is_given_up, "G5: discarded, on the host and on a device: zeros, for both")
{
    for (int huge = 0; huge < 2; huge++)
    EACH_MIRROR(device, fd) {
        char *at = blocks(huge, 0), *copy = buffer(BLOCK);
        DONE(fd, TO_DEVICE, at, copy, 512);
        HOLDS(madvise(at, 100 * PAGE, MADV_DONTNEED) == 0);
        DONE(fd, READ, at, copy, 512);
        ALL_ZERO(copy, 100 * PAGE);
        FILLED_FROM(copy + 100 * PAGE, 412 * PAGE, 1, 100 * PAGE);
        ALL_ZERO(at, 100 * PAGE);
        FILLED_FROM(at + 100 * PAGE, 412 * PAGE, 1, 100 * PAGE);
        HOLDS(madvise(at, BLOCK, MADV_DONTNEED) == 0);
        DONE(fd, TO_DEVICE, at, copy, 512);
        ALL_ZERO(copy, BLOCK);
    }
}

TEST(memory_may_be_given_up, "G5: MADV_FREE after a migration; what was there or zeros, each page")
{
    for (int huge = 0; huge < 2; huge++)
    EACH_MIRROR(device, fd) {
        char *at = blocks(huge, 0), *copy = buffer(BLOCK);
        DONE(fd, TO_DEVICE, at, copy, 512);
        HOLDS(madvise(at, BLOCK, MADV_FREE) == 0);
        for (size_t page = 0; page < 512; page++) {
            volatile uint64_t *words = (volatile uint64_t *)(at + page * PAGE);
            bool zero = words[0] == 0;
            for (size_t i = 0; i < PAGE / 8; i++)
                EQUAL(zero ? 0 : word(1, page * PAGE / 8 + i), words[i]);
        }
        fill(at, BLOCK, 2);
        FINDS(2, fd, TO_DEVICE, at, copy, 512);
        FILLED(at, BLOCK, 2);
    }
}

TEST(something_else_is_mapped_there, "G5: at once, nothing of what was is seen any more")
{
    EACH_MIRROR(device, fd) {
        char *at = map(64 * PAGE, RW, PRIVATE, -1), *copy = buffer(64 * PAGE);
        for (uint64_t round = 0; round < 50; round++) {
            fill(at, 64 * PAGE, round);
            FINDS(round, fd, round % 2 ? READ : TO_DEVICE, at, copy, 64);
            HOLDS(mmap(at + 16 * PAGE, 32 * PAGE, RW, PRIVATE | MAP_FIXED, -1, 0) == at + 16 * PAGE);
            EQUAL(1, DONE(fd, READ, at, copy, 64));
            FILLED(copy, 16 * PAGE, round);
            ALL_ZERO(copy + 16 * PAGE, 32 * PAGE);
            FILLED_FROM(copy + 48 * PAGE, 16 * PAGE, round, 48 * PAGE);
        }
    }
}

TEST(protection_changes, "G4, G5: what devices may do follows at once")
{
    EACH_MIRROR(device, fd) {
        char *at = filled(64 * PAGE, 1), *copy = buffer(64 * PAGE);
        DONE(fd, WRITE, at, memcpy(copy, at, 64 * PAGE), 64);
        for (int round = 0; round < 50; round++) {
            if (round % 3 == 0)
                DONE(fd, TO_DEVICE, at, copy, 64);
            HOLDS(mprotect(at + round * PAGE, PAGE, RO) == 0);
            REFUSED(EPERM, fd, WRITE, at, copy, 64);
            HOLDS(mprotect(at + round * PAGE, PAGE, NO_RW) == 0);
            REFUSED(EFAULT, fd, READ, at, copy, 64);
            HOLDS(mprotect(at + round * PAGE, PAGE, RW) == 0);
            DONE(fd, WRITE, at, copy, 64);
            FILLED(at, 64 * PAGE, 1);
        }
    }
}

struct teardown {
    char *at;
    unsigned delay;
};

static void *tear_down(void *of)
{
    struct teardown *teardown = of;
    for (volatile unsigned i = 0; i < teardown->delay; i++)
        ;
    munmap(teardown->at + 512 * PAGE, 512 * PAGE);
    return NULL;
}

TEST(teardown_races_reads, "G5: a read that succeeds has read what was there")
{
    EACH_MIRROR(device, fd) {
        int won = 0;
        for (unsigned round = 0; round < 60; round++) {
            char *at = filled(1024 * PAGE, round), *copy = buffer(1024 * PAGE);
            if (round % 3 == 0)
                DONE(fd, TO_DEVICE, at, copy, 1024);
            struct teardown teardown = {at, round * round * 300};
            pthread_t thread;
            HOLDS(pthread_create(&thread, NULL, tear_down, &teardown) == 0);
            struct command done;
            int why = ask(fd, READ, at, copy, 1024, &done);
            HOLDS(why == 0 || why == EFAULT);
            if (why == 0) {
                EQUAL(1024, done.cpages);
                FILLED(copy, 1024 * PAGE, round);
                won++;
            }
            pthread_join(thread, NULL);
            REFUSED(EFAULT, fd, READ, at, copy, 1024);
            FILLED(at, 512 * PAGE, round);
            HOLDS(munmap(at, 512 * PAGE) == 0);
            free(copy);
        }
        printf("# %d of 60 reads were faster\n", won);
    }
}

TEST(the_file_of_a_device_is_mapped, "its pages are there from the start, to be read")
{
    EACH_MIRROR(device, fd) {
        char *at = map(4 * PAGE, RW, MAP_PRIVATE, fd), *copy = buffer(4 * PAGE);
        ALL_SEEN(READABLE, fd, at, 4);
        EQUAL(1, DONE(fd, READ, at, copy, 4));
        ALL_ZERO(copy, 4 * PAGE);
    }
}

TEST(memory_of_the_heap, "G1, G5, Z5: migrates, and can be freed wherever it is")
{
    EACH_MIRROR(device, fd) {
        char *copy = buffer(4 * BLOCK);
        for (uint64_t round = 0; round < 40; round++) {
            size_t bytes = (size_t[]){3 * PAGE, 40 * PAGE, BLOCK + PAGE, 3 * BLOCK}[round % 4];
            char *at = aligned_alloc(PAGE, bytes);
            HOLDS(at);
            fill(at, bytes, round);
            FINDS(round, fd, TO_DEVICE, at, copy, bytes / PAGE);
            if (round % 3 == 0) {
                at = realloc(at, 2 * bytes);
                HOLDS(at);
                FILLED(at, bytes, round);
            }
            free(at);
            /* Something else is there by now, perhaps. */
            char *other = malloc(bytes);
            HOLDS(other);
            fill(other, bytes, 1000 + round);
            FILLED(other, bytes, 1000 + round);
            free(other);
        }
    }
}
