/* What devices read and write of the program's memory: zeros, data, and how many rounds of faults that takes. */
#include "mirror.h"
#include <pthread.h>

TEST(untouched_memory_reads_as_zeros, "G3")
{
    EACH_MIRROR(device, fd) {
        void *at = map(64 * PAGE, RW, PRIVATE, -1), *copy = buffer(64 * PAGE);
        EQUAL(1, DONE(fd, READ, at, copy, 64));
        ALL_ZERO(copy, 64 * PAGE);
        /* Nothing was made writable by it, and a write takes the place of the zeros. */
        EQUAL(1, WRITES(3, fd, at, copy, 64));
        FILLED(at, 64 * PAGE, 3);
    }
}

TEST(what_the_cpu_wrote_is_read, "G1: the same pointers on both sides")
{
    EACH_MIRROR(device, fd) {
        size_t bytes = 5 * BLOCK + 3 * PAGE;
        void *at = filled(bytes, 1), *copy = buffer(bytes);
        EQUAL(1, FINDS(1, fd, READ, at, copy, bytes / PAGE));
        FILLED(at, bytes, 1);
    }
}

TEST(what_a_device_wrote_is_seen, "G1, G9: by the CPU, and by the other device")
{
    EACH_PAIR(device, fd, other) {
        void *at = map(BLOCK, RW, PRIVATE, -1), *copy = buffer(BLOCK);
        EQUAL(1, WRITES(2, fd, at, copy, 512));
        FILLED(at, BLOCK, 2);
        memset(copy, 0, BLOCK);
        EQUAL(1, FINDS(2, other, READ, at, copy, 512));
    }
}

TEST(what_is_mapped_is_not_faulted_again, "G4: rounds of faults")
{
    EACH_MIRROR(device, fd) {
        char *at = filled(100 * PAGE, 1), *copy = buffer(100 * PAGE);
        EQUAL(1, DONE(fd, READ, at, copy, 100));
        EQUAL(0, DONE(fd, READ, at, copy, 100));
        EQUAL(0, DONE(fd, READ, at + 7 * PAGE, copy, 1));
        /* It changes under the translations, which stay good. */
        fill(at, 100 * PAGE, 9);
        EQUAL(0, FINDS(9, fd, READ, at, copy, 100));
        /* One page that is not mapped is one round, however many there are. */
        HOLDS(munmap(at + 40 * PAGE, PAGE) == 0);
        HOLDS(mmap(at + 40 * PAGE, PAGE, RW, PRIVATE | MAP_FIXED, -1, 0) == at + 40 * PAGE);
        EQUAL(1, DONE(fd, READ, at, copy, 100));
        ALL_ZERO(copy + 40 * PAGE, PAGE);
        EQUAL(0, DONE(fd, READ, at, copy, 100));
    }
}

TEST(each_file_counts_its_own_faults, "G4")
{
    EACH_KIND(device) {
        int one = open_mirror(device), two = open_mirror(device);
        void *at = filled(10 * PAGE, 1), *copy = buffer(10 * PAGE);
        EQUAL(1, DONE(one, READ, at, copy, 10));
        EQUAL(1, DONE(two, READ, at, copy, 10));
        EQUAL(0, DONE(one, READ, at, copy, 10));
        /* A duplicate is the same file; one that is opened later knows nothing of those before it. */
        int same = dup(two);
        EQUAL(0, DONE(same, READ, at, copy, 10));
        close(one);
        close(two);
        EQUAL(0, DONE(same, READ, at, copy, 10));
        close(same);
        for (int i = 0; i < 100; i++) {
            int later = open_mirror(device);
            EQUAL(1, DONE(later, READ, at, copy, 10));
            close(later);
        }
        FILLED(copy, 10 * PAGE, 1);
    }
}

TEST(sizes_from_a_page_to_many_blocks, "H1, H2: whatever the alignment")
{
    EACH_MIRROR(device, fd) {
        static const size_t pages[] = {1, 2, 63, 64, 65, 511, 512, 513, 1024, 3333, 16384};
        char *at = map_blocks(34, RW, MADV_HUGEPAGE), *copy = buffer(64 << 20);
        for (size_t i = 0; i < sizeof pages / sizeof *pages; i++)
            for (size_t shift = 0; shift < 3; shift++) {
                char *start = at + shift * 5 * PAGE;
                WRITES(i + 100 * shift, fd, start, copy, pages[i]);
                FILLED(start, pages[i] * PAGE, i + 100 * shift);
                start[17]++;
                DONE(fd, READ, start, copy, pages[i]);
                HOLDS(copy[17] == start[17]);
                start[17]--;
                copy[17]--;
                FILLED(copy, pages[i] * PAGE, i + 100 * shift);
            }
    }
}

TEST(the_buffer_may_be_managed_memory, "G1: also what a device has to do with, or is on one")
{
    EACH_MIRROR(device, fd) {
        char *at = map(32 * PAGE, RW, PRIVATE, -1), *copy = map(32 * PAGE, RW, PRIVATE, -1);
        fill(at, 32 * PAGE, 1);
        fill(copy, 32 * PAGE, 2);
        DONE(fd, TO_DEVICE, copy, buffer(32 * PAGE), 32);
        FINDS(1, fd, READ, at, copy, 32);
        fill(copy, 32 * PAGE, 3);
        DONE(fd, TO_DEVICE, copy, buffer(32 * PAGE), 32);
        DONE(fd, TO_DEVICE, at, buffer(32 * PAGE), 32);
        DONE(fd, WRITE, at, copy, 32);
        FILLED(at, 32 * PAGE, 3);
        /* Both at once, at the same place, which changes nothing. */
        DONE(fd, READ, at, at, 32);
        FILLED(at, 32 * PAGE, 3);
    }
}

struct racer {
    int fd;
    char *at;
    uint64_t mark;
    pthread_t thread;
};

static void *race(void *of)
{
    struct racer *racer = of;
    char *copy = buffer(96 * PAGE);
    for (int round = 0; round < 30; round++) {
        fill(copy, 96 * PAGE, racer->mark + round);
        DONE(racer->fd, WRITE, racer->at, copy, 96);
        memset(copy, 0, 96 * PAGE);
        DONE(racer->fd, round % 2 ? READ : TO_DEVICE, racer->at, copy, 96);
        FILLED(copy, 96 * PAGE, racer->mark + round);
        FILLED(racer->at, 96 * PAGE, racer->mark + round);
    }
    free(copy);
    return NULL;
}

TEST(threads_use_devices_at_the_same_time, "G4, H12: neighbours in one mapping, one file or several")
{
    int fds[] = {open_mirror(0), open_mirror(1), open_mirror(2), open_mirror(3), open_mirror(0)};
    struct racer racers[10];
    char *at = map(10 * 96 * PAGE, RW, PRIVATE, -1);
    for (int i = 0; i < 10; i++) {
        racers[i] = (struct racer){fds[i % 5], at + i * 96 * PAGE, 1000 * i, 0};
        HOLDS(pthread_create(&racers[i].thread, NULL, race, &racers[i]) == 0);
    }
    for (int i = 0; i < 10; i++)
        pthread_join(racers[i].thread, NULL);
}
