/* Forks (rule G12): with data on devices, and devices at work. */
#include "mirror.h"
#include <pthread.h>

TEST(both_have_what_was_on_the_device, "G12: small and huge; each writes, the other does not see it")
{
    for (int way = 0; way < 4; way++)
    EACH_MIRROR(device, fd) {
        int huge = way & 1, migrated = way >> 1;
        size_t bytes = 2 * BLOCK;
        char *at = map_blocks(2, RW, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE), *copy = buffer(bytes);
        fill(at, bytes, 1);
        DONE(fd, migrated ? TO_DEVICE : READ, at, copy, bytes / PAGE);
        FORK(child) {
            FILLED(at, bytes, 1);
            int own = open_mirror(device);
            EQUAL(1, WRITES(2, own, at, copy, bytes / PAGE));
            FILLED(at, bytes, 2);
            FINDS(2, own, TO_DEVICE, at, copy, bytes / PAGE);
            FILLED(at, bytes, 2);
        }
        /* While the child is at it. */
        WRITES(3, fd, at, copy, 512);
        FILLED(at, BLOCK, 3);
        FILLED_FROM(at + BLOCK, BLOCK, 1, BLOCK);
        ENDS_WELL(child);
        FILLED(at, BLOCK, 3);
        FILLED_FROM(at + BLOCK, BLOCK, 1, BLOCK);
        ALL_SEEN_OF_ANY_SIZE(WRITABLE, fd, at, 512);
    }
}

TEST(a_child_writes_and_the_parent_does_not_see_it, "G12: by the CPU alone, copy on write")
{
    EACH_MIRROR(device, fd) {
        char *at = filled(64 * PAGE, 1), *copy = buffer(64 * PAGE);
        DONE(fd, TO_DEVICE, at, copy, 64);
        FORK(child) {
            FILLED(at, 64 * PAGE, 1);
            fill(at, 64 * PAGE, 2);
            FILLED(at, 64 * PAGE, 2);
        }
        fill(at, 64 * PAGE, 3);
        ENDS_WELL(child);
        FILLED(at, 64 * PAGE, 3);
        ALL_SEEN(WRITABLE, fd, at, 64);
    }
}

TEST(a_child_that_is_killed, "G12, Z6: takes nothing with it")
{
    EACH_MIRROR(device, fd) {
        char *at = filled(256 * PAGE, 1), *copy = buffer(256 * PAGE);
        for (int round = 0; round < 5; round++) {
            FINDS(1, fd, TO_DEVICE, at, copy, 256);
            FORK(child) {
                int own = open_mirror(device);
                for (;;) {
                    DONE(own, TO_DEVICE, at, copy, 256);
                    fill(at, 256 * PAGE, 2);
                }
            }
            usleep(1000 * (round + 1) * (round + 1));
            HOLDS(kill(child, SIGKILL) == 0 && waitpid(child, NULL, 0) == child);
            FILLED(at, 256 * PAGE, 1);
        }
    }
}

TEST(files_of_the_parent_are_of_no_use, "EINVAL: a child opens its own")
{
    EACH_MIRROR(device, fd) {
        char *at = filled(8 * PAGE, 1), *copy = buffer(8 * PAGE);
        DONE(fd, TO_DEVICE, at, copy, 8);
        FORK(child) {
            REFUSED(EINVAL, fd, READ, at, copy, 8);
            REFUSED(EINVAL, fd, RELEASE, at, copy, 8);
            EQUAL(0, close(fd));
            int own = open_mirror(device);
            EQUAL(1, FINDS(1, own, READ, at, copy, 8));
        }
        ENDS_WELL(child);
        /* Closed in the child alone. */
        FINDS(1, fd, READ, at, copy, 8);
    }
}

TEST(generations, "G12: a child's child, each with devices of its own")
{
    EACH_KIND(device) {
        char *at = filled(600 * PAGE, 1), *copy = buffer(600 * PAGE);
        FORK(child) {
            /* Nobody has opened a device before. */
            int own = open_mirror(device);
            DONE(own, TO_DEVICE, at, copy, 300);
            FORK(grandchild) {
                int mine = open_mirror(3 - device);
                FINDS(1, mine, READ, at, copy, 600);
                fill(at, 600 * PAGE, 2);
                FINDS(2, mine, TO_DEVICE, at, copy, 600);
            }
            ENDS_WELL(grandchild);
            FILLED(at, 600 * PAGE, 1);
            FINDS(1, own, TO_DEVICE, at, copy, 600);
        }
        ENDS_WELL(child);
        FILLED(at, 600 * PAGE, 1);
    }
}

struct worker {
    int fd;
    char *at;
    int stop;
};

static void *work(void *of)
{
    struct worker *worker = of;
    char *copy = buffer(128 * PAGE);
    for (uint64_t round = 0; !__atomic_load_n(&worker->stop, __ATOMIC_RELAXED); round++) {
        fill(copy, 128 * PAGE, round);
        DONE(worker->fd, WRITE, worker->at, copy, 128);
        DONE(worker->fd, round % 2 ? TO_DEVICE : READ, worker->at, copy, 128);
        FILLED(copy, 128 * PAGE, round);
        FILLED(worker->at, 128 * PAGE, round);
    }
    return NULL;
}

TEST(devices_work_while_the_process_forks, "G12: they come to rest, and go on in the parent")
{
    struct worker workers[3];
    pthread_t threads[3];
    char *at = filled(64 * PAGE, 7), *copy = buffer(64 * PAGE);
    for (int i = 0; i < 3; i++) {
        workers[i] = (struct worker){open_mirror(i), map(128 * PAGE, RW, PRIVATE, -1), 0};
        HOLDS(pthread_create(&threads[i], NULL, work, &workers[i]) == 0);
    }
    for (int round = 0; round < 12; round++) {
        FORK(child) {
            int own = open_mirror(round % 4);
            FINDS(7, own, TO_DEVICE, at, copy, 64);
            fill(at, 64 * PAGE, 8);
        }
        ENDS_WELL(child);
    }
    for (int i = 0; i < 3; i++) {
        __atomic_store_n(&workers[i].stop, 1, __ATOMIC_RELAXED);
        pthread_join(threads[i], NULL);
    }
    FILLED(at, 64 * PAGE, 7);
}

TEST(programs_that_are_started, "a file that is inherited is nothing to the program that is run")
{
    int fd = open_mirror(0);
    char command[128];
    snprintf(command, sizeof command, "test -e /proc/self/fd/%d && true", fd);
    EQUAL(0, system(command));
    char *at = filled(PAGE, 1), *copy = buffer(PAGE);
    DONE(fd, TO_DEVICE, at, copy, 1);
    FILLED(at, PAGE, 1);
}
