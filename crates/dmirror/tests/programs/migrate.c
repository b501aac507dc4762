/* Migration: to a device's memory and home, by request and by faults, between devices, and evicted. */
#include "mirror.h"

TEST(data_goes_to_a_device, "Z5, G2: and what the device has is told")
{
    EACH_MIRROR(device, fd) {
        for (size_t pages = 1; pages <= 4096; pages *= 8) {
            char *at = filled(pages * PAGE, pages), *copy = buffer(pages * PAGE);
            FINDS(pages, fd, TO_DEVICE, at, copy, pages);
            ALL_SEEN_OF_ANY_SIZE(seen_on(device), fd, at, pages);
            /* It is mapped on the device by now. */
            EQUAL(0, FINDS(pages, fd, READ, at, copy, pages));
            HOLDS(munmap(at, pages * PAGE) == 0);
        }
    }
}

TEST(home_by_the_cpus_faults, "Z8: page by page, all at once, and again")
{
    EACH_MIRROR(device, fd) {
        char *at = filled(1024 * PAGE, 1), *copy = buffer(1024 * PAGE);
        for (int round = 0; round < 10; round++) {
            FINDS(1, fd, TO_DEVICE, at, copy, 1024);
            /* All of it, half of it, single pages. */
            if (round % 3 == 0)
                FILLED(at, 1024 * PAGE, 1);
            else if (round % 3 == 1)
                FILLED(at, 512 * PAGE, 1);
            else
                for (size_t page = 0; page < 1024; page += 97)
                    FILLED_FROM(at + page * PAGE, PAGE, 1, page * PAGE);
        }
        FILLED(at, 1024 * PAGE, 1);
        /* Written, each time. */
        for (uint64_t round = 2; round < 8; round++) {
            DONE(fd, TO_DEVICE, at, copy, 1024);
            fill(at, 1024 * PAGE, round);
            FINDS(round, fd, TO_DEVICE, at, copy, 1024);
        }
    }
}

TEST(home_by_request, "G8: exactly what is asked for, and how much that is")
{
    EACH_MIRROR(device, fd) {
        char *at = filled(300 * PAGE, 1), *copy = buffer(300 * PAGE);
        /* Nothing is there. */
        DONE_IN_PART(0, fd, TO_SYSTEM, at, copy, 300);
        DONE(fd, TO_DEVICE, at, copy, 300);
        DONE(fd, TO_SYSTEM, at + 100 * PAGE, copy, 50);
        unsigned char *seen = snapshot(fd, at, 300);
        for (int page = 0; page < 300; page++)
            EQUAL(page / 50 == 2 ? WRITABLE : seen_on(device), seen[page]);
        /* The other half of what is asked for is home already. */
        DONE_IN_PART(25, fd, TO_SYSTEM, at + 125 * PAGE, copy, 50);
        DONE_IN_PART(225, fd, TO_SYSTEM, at, copy, 300);
        ALL_SEEN(WRITABLE, fd, at, 300);
        FILLED(at, 300 * PAGE, 1);
    }
}

TEST(empty_memory_migrates, "G3: as zeros")
{
    EACH_MIRROR(device, fd) {
        char *at = map(600 * PAGE, RW, PRIVATE, -1), *copy = buffer(600 * PAGE);
        fill(at + 100 * PAGE, 10 * PAGE, 5);
        DONE(fd, TO_DEVICE, at, copy, 600);
        ALL_ZERO(copy, 100 * PAGE);
        FILLED(copy + 100 * PAGE, 10 * PAGE, 5);
        ALL_ZERO(copy + 110 * PAGE, 490 * PAGE);
        ALL_SEEN(seen_on(device), fd, at, 100);
        ALL_ZERO(at, 100 * PAGE);
        FILLED(at + 100 * PAGE, 10 * PAGE, 5);
        fill(at, 600 * PAGE, 6);
        FINDS(6, fd, TO_DEVICE, at, copy, 600);
    }
}

TEST(zeros_that_were_read_migrate, "G3: the page of zeros, by 4 KiB and by 2 MiB")
{
    EACH_MIRROR(device, fd) {
        for (int huge = 0; huge < 2; huge++) {
            char *at = map_blocks(2, RW, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE), *copy = buffer(2 * BLOCK);
            ALL_ZERO(at, BLOCK);
            DONE(fd, TO_DEVICE, at, copy, 1024);
            ALL_ZERO(copy, 2 * BLOCK);
            ALL_ZERO(at, 2 * BLOCK);
            at[5]++;
            HOLDS(at[4] == 0 && at[5] == 1 && at[6] == 0);
        }
    }
}

TEST(mixed_memory_migrates, "H1: never touched, zeros, read-only, written, in one range")
{
    EACH_MIRROR(device, fd) {
        char *at = map(6 * PAGE, NO_RW, PRIVATE, -1), *copy = buffer(6 * PAGE);
        REFUSED(EINVAL, fd, TO_DEVICE, at, copy, 6);
        HOLDS(mprotect(at + PAGE, PAGE, RO) == 0);
        ALL_ZERO(at + PAGE, PAGE);
        HOLDS(mprotect(at + 2 * PAGE, 3 * PAGE, RW) == 0);
        fill(at + 2 * PAGE, PAGE, 2);
        fill(at + 3 * PAGE, PAGE, 3);
        HOLDS(mprotect(at + 2 * PAGE, PAGE, RO) == 0);
        DONE(fd, TO_DEVICE, at + PAGE, copy, 4);
        ALL_ZERO(copy, PAGE);
        FILLED(copy + PAGE, PAGE, 2);
        FILLED(copy + 2 * PAGE, PAGE, 3);
        ALL_ZERO(copy + 3 * PAGE, PAGE);
        /* The last page of it can be read by nobody. */
        REFUSED(EINVAL, fd, TO_DEVICE, at + PAGE, copy, 5);
        REFUSED(EINVAL, fd, TO_DEVICE, at, copy, 2);
        FILLED(at + 2 * PAGE, PAGE, 2);
        FILLED(at + 3 * PAGE, PAGE, 3);
        HOLDS(mprotect(at, 6 * PAGE, RW) == 0);
        DONE(fd, TO_DEVICE, at, copy, 6);
        FILLED(at + 2 * PAGE, PAGE, 2);
    }
}

TEST(read_only_memory_migrates, "Z7: and is read-only on the device")
{
    EACH_MIRROR(device, fd) {
        char *at = filled(520 * PAGE, 1), *copy = buffer(520 * PAGE);
        HOLDS(mprotect(at, 520 * PAGE, RO) == 0);
        FINDS(1, fd, TO_DEVICE, at, copy, 520);
        REFUSED(EPERM, fd, WRITE, at, copy, 520);
        FILLED(at, 260 * PAGE, 1);
        HOLDS(mprotect(at, 520 * PAGE, RW) == 0);
        WRITES(2, fd, at, copy, 520);
        FILLED(at, 520 * PAGE, 2);
    }
}

TEST(huge_pages_stay_huge, "H2, H6: and come home whole, or in part")
{
    EACH_MIRROR(device, fd) {
        char *at = map_blocks(3, RW, 0), *copy = buffer(3 * BLOCK);
        fill(at, 3 * BLOCK, 1);
        if (madvise(at, 3 * BLOCK, MADV_COLLAPSE) != 0)
            skip("there is no huge page to be had");
        FINDS(1, fd, TO_DEVICE, at, copy, 3 * 512);
        /* How large the entries are by which the CPU maps coherent memory is a matter of the kernel's settings. */
        if (is_coherent(device)) {
            FILLED(at, 3 * BLOCK, 1);
            continue;
        }
        ALL_SEEN(seen_on(device) | BY_2M, fd, at, 3 * 512);
        /* One page of the first, all of the second by request. */
        EQUAL(1, DONE(fd, TO_SYSTEM, at + 77 * PAGE, copy, 1) == 0);
        ALL_SEEN(WRITABLE, fd, at + 77 * PAGE, 1);
        ALL_SEEN(seen_on(device), fd, at, 77);
        ALL_SEEN(seen_on(device) | BY_2M, fd, at + BLOCK, 512);
        DONE(fd, TO_SYSTEM, at + BLOCK, copy, 512);
        ALL_SEEN(WRITABLE | BY_2M, fd, at + BLOCK, 512);
        FILLED(at, 3 * BLOCK, 1);
        FINDS(1, fd, TO_DEVICE, at, copy, 3 * 512);
    }
}

TEST(a_part_of_a_huge_page_migrates, "H6: the rest stays, and both can be used")
{
    EACH_MIRROR(device, fd) {
        char *at = map_blocks(1, RW, MADV_HUGEPAGE), *copy = buffer(BLOCK);
        fill(at, BLOCK, 1);
        DONE(fd, TO_DEVICE, at + 100 * PAGE, copy, 50);
        FILLED_FROM(copy, 50 * PAGE, 1, 100 * PAGE);
        unsigned char *seen = snapshot(fd, at, 512);
        for (int page = 0; page < 512; page++)
            EQUAL(page >= 100 && page < 150 ? seen_on(device) : WRITABLE, seen[page] & ~BY_2M);
        FILLED(at, BLOCK, 1);
        fill(at, BLOCK, 2);
        FINDS(2, fd, READ, at, copy, 512);
    }
}

TEST(huge_allocations_that_fail, "H2: small pages do, in either direction, without an error")
{
    EACH_MIRROR(device, fd) {
        char *at = map_blocks(2, RW, MADV_HUGEPAGE), *copy = buffer(2 * BLOCK);
        fill(at, 2 * BLOCK, 1);
        bool huge = madvise(at, 2 * BLOCK, MADV_COLLAPSE) == 0;
        EQUAL(0, ask(fd, FLAGS, at, copy, FAIL_ALLOC, NULL));
        FINDS(1, fd, TO_DEVICE, at, copy, 1024);
        /* One of the two. */
        ALL_SEEN(seen_on(device), fd, at, 512);
        if (huge && !is_coherent(device))
            ALL_SEEN(seen_on(device) | BY_2M, fd, at + BLOCK, 512);
        HOLDS(at[2048] == ((char *)copy)[2048]);
        EQUAL(0, ask(fd, FLAGS, at, copy, FAIL_ALLOC, NULL));
        DONE(fd, TO_SYSTEM, at + BLOCK, copy, 512);
        ALL_SEEN(WRITABLE, fd, at + BLOCK, 512);
        FILLED(at, 2 * BLOCK, 1);
        /* Of memory that was never touched. */
        char *empty = map_blocks(1, RO, MADV_HUGEPAGE);
        EQUAL(0, ask(fd, FLAGS, at, copy, FAIL_ALLOC, NULL));
        DONE(fd, TO_DEVICE, empty, copy, 512);
        ALL_ZERO(copy, BLOCK);
        ALL_ZERO(empty, BLOCK);
        /* A flag can be taken back by other ones. */
        char *third = map_blocks(1, RW, MADV_HUGEPAGE);
        fill(third, BLOCK, 3);
        huge = madvise(third, BLOCK, MADV_COLLAPSE) == 0;
        EQUAL(0, ask(fd, FLAGS, at, copy, FAIL_ALLOC, NULL));
        EQUAL(0, ask(fd, FLAGS, at, copy, 2, NULL));
        DONE(fd, TO_DEVICE, third, copy, 512);
        if (huge && !is_coherent(device))
            ALL_SEEN(seen_on(device) | BY_2M, fd, third, 512);
        FILLED(third, BLOCK, 3);
    }
}

TEST(from_one_device_to_the_other, "G6: by way of the host, as it is asked for")
{
    for (int first = 0; first < 4; first++)
        for (int second = 0; second < 4; second++)
        OPENED(one, first) OPENED(two, second) {
            if (first == second)
                continue;
            char *at = filled(96 * PAGE, 1), *copy = buffer(96 * PAGE);
            DONE(one, TO_DEVICE, at, copy, 96);
            /* What another device has it keeps. */
            REFUSED(ENOENT, two, TO_DEVICE, at, copy, 96);
            ALL_SEEN(seen_on(first), one, at, 96);
            DONE_IN_PART(0, two, TO_SYSTEM, at, copy, 96);
            ALL_SEEN(seen_on(first), one, at, 96);
            DONE(one, TO_SYSTEM, at, copy, 96);
            FINDS(1, two, TO_DEVICE, at, copy, 96);
            ALL_SEEN(seen_on(second), two, at, 96);
            /* The first one reads what the second has. */
            EQUAL(1, FINDS(1, one, READ, at, copy, 96));
            WRITES(2, one, at, copy, 96);
            memset(copy, 0, 96 * PAGE);
            FINDS(2, two, READ, at, copy, 96);
            FILLED(at, 96 * PAGE, 2);
            HOLDS(munmap(at, 96 * PAGE) == 0);
        }
}

TEST(pages_of_one_range_on_two_devices, "G6, ENOENT: the others have gone all the same")
{
    EACH_PAIR(device, one, two) {
        char *at = filled(9 * PAGE, 1), *copy = buffer(9 * PAGE);
        DONE(one, TO_DEVICE, at + 3 * PAGE, copy, 3);
        REFUSED(ENOENT, two, TO_DEVICE, at, copy, 9);
        ALL_SEEN(seen_on(device), two, at, 3);
        ALL_SEEN(is_coherent(device) ? COHERENT_ELSEWHERE | WRITABLE : NOTHING, two, at + 3 * PAGE, 3);
        ALL_SEEN(seen_on(device), one, at + 3 * PAGE, 3);
        FILLED(at, 9 * PAGE, 1);
    }
}

TEST(a_device_is_released, "Z3, G7: everything leaves its memory, and nothing another's")
{
    EACH_PAIR(device, fd, other) {
        char *at = filled(5000 * PAGE, 1), *copy = buffer(5000 * PAGE);
        DONE(fd, TO_DEVICE, at, copy, 3000);
        DONE(other, TO_DEVICE, at + 3000 * PAGE, copy, 2000);
        EQUAL(0, ask(fd, RELEASE, at, copy, 1, NULL));
        ALL_SEEN_OF_ANY_SIZE(WRITABLE, fd, at, 3000);
        ALL_SEEN_OF_ANY_SIZE(seen_on(device + 1), other, at + 3000 * PAGE, 2000);
        FILLED(at, 5000 * PAGE, 1);
        /* It goes on to be used. */
        FINDS(1, fd, TO_DEVICE, at, copy, 3000);
        FILLED(at, 5000 * PAGE, 1);
    }
}

TEST(a_quarter_of_a_gigabyte, "G7: what fits on the device goes there")
{
    EACH_MIRROR(device, fd) {
        size_t bytes = 256 << 20;
        char *at = map(bytes, RW, PRIVATE, -1), *copy = buffer(bytes);
        HOLDS(madvise(at, bytes, MADV_HUGEPAGE) == 0);
        fill(at, bytes, 1);
        FINDS(1, fd, TO_DEVICE, at, copy, bytes / PAGE);
        DONE(fd, TO_SYSTEM, at, copy, bytes / PAGE);
        FILLED(at, bytes, 1);
        HOLDS(munmap(at, bytes) == 0);
        free(copy);
    }
}

TEST(the_page_map_says_swapped, "Z7: of what is in private memory of a device")
{
    int fd = open_mirror(0), map_fd = open("/proc/self/pagemap", O_RDONLY);
    HOLDS(map_fd >= 0);
    char *at = filled(8 * PAGE, 1), *copy = buffer(8 * PAGE);
    DONE(fd, TO_DEVICE, at + 2 * PAGE, copy, 3);
    uint64_t entries[8];
    EQUAL(64, pread(map_fd, entries, 64, (uintptr_t)at / PAGE * 8));
    for (int page = 0; page < 8; page++) {
        bool there = page < 2 || page > 4;
        EQUAL(there, entries[page] >> 63);
        EQUAL(!there, entries[page] >> 62 & 1);
    }
    EQUAL((uintptr_t)at / PAGE * 8, lseek(map_fd, (uintptr_t)at / PAGE * 8, SEEK_SET));
    uint64_t again[8];
    EQUAL(64, read(map_fd, again, 64));
    HOLDS(memcmp(entries, again, 64) == 0);
    EQUAL((uintptr_t)at / PAGE * 8 + 64, lseek(map_fd, 0, SEEK_CUR));
    FILLED(at, 8 * PAGE, 1);
    EQUAL(8, pread(map_fd, entries, 8, ((uintptr_t)at / PAGE + 2) * 8));
    EQUAL(2, entries[0] >> 62);
}
