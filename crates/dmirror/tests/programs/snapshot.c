/* What a mirror would see, byte by byte, without anything being touched for it. */
#include "mirror.h"

TEST(nothing_is_there, "0xff where nothing is mapped or can be read, 0 where nothing has been touched")
{
    EACH_MIRROR(device, fd) {
        char *at = map(6 * PAGE, RW, PRIVATE, -1);
        HOLDS(munmap(at + 2 * PAGE, PAGE) == 0);
        HOLDS(mprotect(at + 4 * PAGE, PAGE, NO_RW) == 0);
        at[0] = 1;
        at[4 * PAGE - 1] = 1;
        unsigned char *seen = snapshot(fd, at, 6);
        static const unsigned char expected[] = {WRITABLE, NOTHING, UNREADABLE, WRITABLE, UNREADABLE, NOTHING};
        for (int page = 0; page < 6; page++)
            EQUAL(expected[page], seen[page]);
        /* To have looked has changed nothing. */
        seen = snapshot(fd, at, 6);
        EQUAL(NOTHING, seen[1]);
        ALL_SEEN(UNREADABLE, fd, (void *)(1ul << 46), 3);
    }
}

TEST(what_the_cpu_maps, "1 to be read, 2 to be written, 0x10 zeros (G3)")
{
    EACH_MIRROR(device, fd) {
        char *at = map(64 * PAGE, RW, PRIVATE, -1);
        HOLDS(madvise(at, 64 * PAGE, MADV_NOHUGEPAGE) == 0);
        fill(at, 16 * PAGE, 1);
        HOLDS(mprotect(at + 8 * PAGE, 8 * PAGE, RO) == 0);
        ALL_ZERO(at + 16 * PAGE, 16 * PAGE);
        ALL_SEEN(WRITABLE, fd, at, 8);
        ALL_SEEN(READABLE, fd, at + 8 * PAGE, 8);
        ALL_SEEN(ZEROS | READABLE, fd, at + 16 * PAGE, 16);
        ALL_SEEN(NOTHING, fd, at + 32 * PAGE, 32);
        /* The first write takes the place of the zeros, and only there. */
        at[20 * PAGE] = 1;
        ALL_SEEN(WRITABLE, fd, at + 20 * PAGE, 1);
        ALL_SEEN(ZEROS | READABLE, fd, at + 21 * PAGE, 11);
        /* A device that reads populates what it reads: with zeros. */
        void *copy = buffer(8 * PAGE);
        DONE(fd, READ, at + 40 * PAGE, copy, 8);
        ALL_SEEN(ZEROS | READABLE, fd, at + 40 * PAGE, 8);
        DONE(fd, WRITE, at + 44 * PAGE, copy, 2);
        ALL_SEEN(WRITABLE, fd, at + 44 * PAGE, 2);
    }
}

TEST(what_is_on_devices, "0x20, 0x40, 0x50; 0 for private memory of another device (Z5, Z7)")
{
    int fds[4];
    char *at = filled(64 * PAGE, 1), *copy = buffer(64 * PAGE);
    for (int device = 0; device < 4; device++) {
        fds[device] = open_mirror(device);
        DONE(fds[device], TO_DEVICE, at + 16 * device * PAGE, copy, 8);
    }
    for (int viewer = 0; viewer < 4; viewer++)
        for (int device = 0; device < 4; device++) {
            char *part = at + 16 * device * PAGE;
            unsigned there = device == viewer     ? seen_on(device)
                             : is_coherent(device) ? COHERENT_ELSEWHERE | WRITABLE
                                                   : NOTHING;
            ALL_SEEN(there, fds[viewer], part, 8);
            ALL_SEEN(WRITABLE, fds[viewer], part + 8 * PAGE, 8);
        }
    /* Read-only, where they are. */
    HOLDS(mprotect(at, 64 * PAGE, RO) == 0);
    ALL_SEEN(PRIVATE_HERE | READABLE, fds[0], at, 8);
    ALL_SEEN(COHERENT_HERE | READABLE, fds[2], at + 32 * PAGE, 8);
    ALL_SEEN(COHERENT_ELSEWHERE | READABLE, fds[3], at + 32 * PAGE, 8);
    ALL_SEEN(NOTHING, fds[1], at, 8);
    FILLED(at, 64 * PAGE, 1);
}

TEST(large_entries, "4 where a block is mapped as one, with one permission")
{
    EACH_MIRROR(device, fd) {
        char *at = map_blocks(2, RW, 0);
        fill(at, 2 * BLOCK, 1);
        if (madvise(at, 2 * BLOCK, MADV_COLLAPSE) != 0)
            skip("there is no huge page to be had");
        ALL_SEEN(WRITABLE | BY_2M, fd, at, 1024);
        /* Of any part of it. */
        ALL_SEEN(WRITABLE | BY_2M, fd, at + 37 * PAGE, 5);
        HOLDS(mprotect(at, BLOCK, RO) == 0);
        ALL_SEEN(READABLE | BY_2M, fd, at, 512);
        ALL_SEEN(WRITABLE | BY_2M, fd, at + BLOCK, 512);
        HOLDS(mprotect(at, BLOCK, RW) == 0);
        /* A part that differs is the end of it. */
        HOLDS(mprotect(at + BLOCK, PAGE, RO) == 0);
        ALL_SEEN(READABLE, fd, at + BLOCK, 1);
        ALL_SEEN(WRITABLE, fd, at + BLOCK + PAGE, 511);
        FILLED(at, 2 * BLOCK, 1);
    }
}

TEST(many_pages, "of a hole of a gigabyte, and of what is in it")
{
    int fd = open_mirror(0);
    size_t bytes = 1ul << 30;
    char *at = map(bytes, RW, PRIVATE | MAP_NORESERVE, -1);
    at[bytes / 2] = 1;
    unsigned char *seen = snapshot(fd, at, bytes / PAGE);
    for (size_t page = 0; page < bytes / PAGE; page++)
        if (page == bytes / PAGE / 2)
            EQUAL(WRITABLE, seen[page]);
        else if (seen[page] != NOTHING && seen[page] != (WRITABLE | BY_2M))
            FAIL("page %zu is seen as %#x", page, seen[page]);
}
