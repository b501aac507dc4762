/* Memory that is exclusive to a device (rule G14): until the CPU or another device uses it. */
#include "mirror.h"

/* Which pages are exclusive still. */
static unsigned char *check(int fd, const void *at, size_t pages)
{
    unsigned char *exclusive = malloc(pages);
    HOLDS(exclusive);
    memset(exclusive, 0xee, pages);
    DONE(fd, CHECK_EXCLUSIVE, at, exclusive, pages);
    return exclusive;
}

#define ALL_EXCLUSIVE(yes, fd, at, pages)                                                                              \
    do {                                                                                                               \
        unsigned char *exclusive_ = check(fd, at, pages);                                                              \
        for (size_t i_ = 0; i_ < (size_t)(pages); i_++)                                                                \
            EQUAL(yes, exclusive_[i_]);                                                                                \
        free(exclusive_);                                                                                              \
    } while (0)

TEST(the_cpu_ends_it, "G14: page by page, and finds what the device had")
{
    EACH_MIRROR(device, fd) {
        char *at = filled(256 * PAGE, 1), *copy = buffer(256 * PAGE);
        ALL_EXCLUSIVE(0, fd, at, 256);
        FINDS(1, fd, EXCLUSIVE, at, copy, 256);
        ALL_EXCLUSIVE(1, fd, at, 256);
        /* To ask is not to use. */
        ALL_EXCLUSIVE(1, fd, at, 256);
        FILLED_FROM(at + 100 * PAGE, PAGE, 1, 100 * PAGE);
        EQUAL(0, check(fd, at + 100 * PAGE, 1)[0]);
        volatile uint64_t *words = (volatile uint64_t *)at;
        for (size_t i = 0; i < 256 * PAGE / 8; i++) {
            EQUAL(word(1, i), words[i]);
            words[i] = word(2, i);
        }
        ALL_EXCLUSIVE(0, fd, at, 256);
        FILLED(at, 256 * PAGE, 2);
        FINDS(2, fd, EXCLUSIVE, at, copy, 256);
    }
}

TEST(another_device_ends_it, "G14")
{
    EACH_PAIR(device, one, two) {
        char *at = filled(32 * PAGE, 1), *copy = buffer(32 * PAGE);
        DONE(one, EXCLUSIVE, at, copy, 32);
        ALL_EXCLUSIVE(0, two, at, 32);
        DONE(two, READ, at + 8 * PAGE, copy, 8);
        FILLED_FROM(copy, 8 * PAGE, 1, 8 * PAGE);
        ALL_EXCLUSIVE(0, one, at + 8 * PAGE, 8);
        DONE(two, EXCLUSIVE, at + 8 * PAGE, copy, 24);
        ALL_EXCLUSIVE(1, two, at + 8 * PAGE, 24);
        ALL_EXCLUSIVE(0, one, at + 8 * PAGE, 24);
        FILLED(at, 32 * PAGE, 1);
    }
}

TEST(the_device_itself_goes_on, "G14: it reads and writes what is exclusive to it, without a fault")
{
    EACH_MIRROR(device, fd) {
        char *at = filled(32 * PAGE, 1), *copy = buffer(32 * PAGE);
        DONE(fd, EXCLUSIVE, at, copy, 32);
        EQUAL(0, FINDS(1, fd, READ, at, copy, 32));
        EQUAL(0, WRITES(2, fd, at, copy, 32));
        ALL_EXCLUSIVE(1, fd, at, 32);
        FILLED(at, 32 * PAGE, 2);
    }
}

TEST(memory_of_all_states_becomes_exclusive, "G14: never touched, zeros, on this device, on the other one, huge")
{
    EACH_PAIR(device, fd, other) {
        char *at = map_blocks(1, RW, MADV_HUGEPAGE), *copy = buffer(BLOCK);
        fill(at, BLOCK, 1);
        DONE(fd, EXCLUSIVE, at + 5 * PAGE, copy, 7);
        ALL_EXCLUSIVE(1, fd, at + 5 * PAGE, 7);
        FINDS(1, fd, EXCLUSIVE, at, copy, 512);
        ALL_EXCLUSIVE(1, fd, at, 512);
        FILLED(at, BLOCK, 1);
        char *small = map(16 * PAGE, RW, PRIVATE, -1);
        ALL_ZERO(small, PAGE);
        fill(small + 2 * PAGE, 4 * PAGE, 2);
        DONE(fd, TO_DEVICE, small + 2 * PAGE, copy, 2);
        DONE(other, TO_DEVICE, small + 4 * PAGE, copy, 2);
        DONE(fd, EXCLUSIVE, small, copy, 16);
        ALL_ZERO(copy, 2 * PAGE);
        FILLED(copy + 2 * PAGE, 4 * PAGE, 2);
        ALL_EXCLUSIVE(1, fd, small, 16);
        ALL_ZERO(small, 2 * PAGE);
        FILLED(small + 2 * PAGE, 4 * PAGE, 2);
        ALL_ZERO(small + 6 * PAGE, 10 * PAGE);
        ALL_EXCLUSIVE(0, fd, small, 16);
    }
}

TEST(a_change_of_protection_ends_it, "G5: and what it forbids is forbidden")
{
    EACH_MIRROR(device, fd) {
        char *at = filled(64 * PAGE, 1), *copy = buffer(64 * PAGE);
        DONE(fd, EXCLUSIVE, at, copy, 64);
        HOLDS(mprotect(at, 32 * PAGE, RO) == 0);
        REFUSED(EPERM, fd, WRITE, at, copy, 64);
        REFUSED(EPERM, fd, WRITE, at + 31 * PAGE, copy, 1);
        REFUSED(EFAULT, fd, EXCLUSIVE, at, copy, 64);
        ALL_EXCLUSIVE(0, fd, at, 32);
        ALL_EXCLUSIVE(1, fd, at + 32 * PAGE, 32);
        FILLED(at, 64 * PAGE, 1);
    }
}

TEST(a_fork_ends_it, "G12: both have everything, and go on apart")
{
    EACH_MIRROR(device, fd) {
        char *at = filled(600 * PAGE, 1), *copy = buffer(600 * PAGE);
        DONE(fd, EXCLUSIVE, at, copy, 600);
        FORK(child) {
            FILLED(at, 600 * PAGE, 1);
            fill(at, 600 * PAGE, 2);
            FILLED(at, 600 * PAGE, 2);
            int own = open_mirror(device);
            ALL_EXCLUSIVE(0, own, at, 600);
            FINDS(2, own, EXCLUSIVE, at, copy, 600);
        }
        FILLED(at, 600 * PAGE, 1);
        fill(at, 600 * PAGE, 3);
        ENDS_WELL(child);
        FILLED(at, 600 * PAGE, 3);
        ALL_EXCLUSIVE(0, fd, at, 600);
    }
}

TEST(it_is_not_seen_by_mirrors, "a snapshot says that nothing is there")
{
    EACH_PAIR(device, fd, other) {
        char *at = filled(4 * PAGE, 1), *copy = buffer(4 * PAGE);
        DONE(fd, EXCLUSIVE, at, copy, 2);
        ALL_SEEN(NOTHING, fd, at, 2);
        ALL_SEEN(NOTHING, other, at, 2);
        ALL_SEEN(WRITABLE, fd, at + 2 * PAGE, 2);
        /* It may be sent to the device's memory, where it stays. */
        FINDS(1, fd, TO_DEVICE, at, copy, 4);
        FILLED(at, 4 * PAGE, 1);
    }
}
