/* Forks (rule G12): with data on devices, and devices at work. */
#include "mirror.h"
#include <pthread.h>

TEST(both_have_what_was_on_the_device, "G12: small and huge; each writes, the other does not see it")
{
    EACH_KIND(device)
    for (int way = 0; way < 4; way++) {
        int fd = open_mirror(device), huge = way & 1, migrated = way >> 1;
        size_t bytes = 2 * BLOCK;
        char *at = map_blocks(2, RW, huge ? MADV_HUGEPAGE : MADV_NOHUGEPAGE), *copy = buffer(bytes);
        fill(at, bytes, 1);
        if (migrated)
            DONE(fd, TO_DEVICE, at, copy, bytes / PAGE);
        else
            DONE(fd, READ, at, copy, bytes / PAGE);
        pid_t child = fork();
        if (child == 0) {
            FILLED(at, bytes, 1);
            int own = open_mirror(device);
            fill(copy, bytes, 2);
            EQUAL(1, DONE(own, WRITE, at, copy, bytes / PAGE));
            FILLED(at, bytes, 2);
            DONE(own, TO_DEVICE, at, copy, bytes / PAGE);
            FILLED(copy, bytes, 2);
            FILLED(at, bytes, 2);
            _exit(0);
        }
        /* While the child is at it. */
        fill(copy, BLOCK, 3);
        DONE(fd, WRITE, at, copy, 512);
        FILLED(at, BLOCK, 3);
        FILLED_FROM(at + BLOCK, BLOCK, 1, BLOCK);
        ENDS_WELL(child);
        FILLED(at, BLOCK, 3);
        FILLED_FROM(at + BLOCK, BLOCK, 1, BLOCK);
        ALL_SEEN_OF_ANY_SIZE(WRITABLE, fd, at, 512);
        close(fd);
    }
}

TEST(a_child_writes_and_the_parent_does_not_see_it, "G12: by the CPU alone, copy on write")
{
    EACH_KIND(device) {
        int fd = open_mirror(device);
        char *at = map(64 * PAGE, RW, PRIVATE, -1), *copy = buffer(64 * PAGE);
        fill(at, 64 * PAGE, 1);
        DONE(fd, TO_DEVICE, at, copy, 64);
        pid_t child = fork();
        if (child == 0) {
            FILLED(at, 64 * PAGE, 1);
            fill(at, 64 * PAGE, 2);
            FILLED(at, 64 * PAGE, 2);
            _exit(0);
        }
        fill(at, 64 * PAGE, 3);
        ENDS_WELL(child);
        FILLED(at, 64 * PAGE, 3);
        ALL_SEEN(WRITABLE, fd, at, 64);
        close(fd);
    }
}

TEST(a_child_that_is_killed, "G12, Z6: takes nothing with it")
{
    EACH_KIND(device) {
        int fd = open_mirror(device);
        char *at = map(256 * PAGE, RW, PRIVATE, -1), *copy = buffer(256 * PAGE);
        fill(at, 256 * PAGE, 1);
        for (int round = 0; round < 5; round++) {
            DONE(fd, TO_DEVICE, at, copy, 256);
            FILLED(copy, 256 * PAGE, 1);
            pid_t child = fork();
            if (child == 0) {
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
        close(fd);
    }
}

TEST(files_of_the_parent_are_of_no_use, "EINVAL: a child opens its own")
{
    EACH_KIND(device) {
        int fd = open_mirror(device);
        char *at = map(8 * PAGE, RW, PRIVATE, -1), *copy = buffer(8 * PAGE);
        fill(at, 8 * PAGE, 1);
        DONE(fd, TO_DEVICE, at, copy, 8);
        pid_t child = fork();
        if (child == 0) {
            EQUAL(EINVAL, ask(fd, READ, at, copy, 8, NULL));
            EQUAL(EINVAL, ask(fd, RELEASE, at, copy, 8, NULL));
            EQUAL(0, close(fd));
            int own = open_mirror(device);
            EQUAL(1, DONE(own, READ, at, copy, 8));
            FILLED(copy, 8 * PAGE, 1);
            _exit(0);
        }
        ENDS_WELL(child);
        /* Closed in the child alone. */
        DONE(fd, READ, at, copy, 8);
        FILLED(copy, 8 * PAGE, 1);
        close(fd);
    }
}

TEST(generations, "G12: a child's child, each with devices of its own")
{
    EACH_KIND(device) {
        char *at = map(600 * PAGE, RW, PRIVATE, -1), *copy = buffer(600 * PAGE);
        fill(at, 600 * PAGE, 1);
        pid_t child = fork();
        if (child == 0) {
            /* Nobody has opened a device before. */
            int own = open_mirror(device);
            DONE(own, TO_DEVICE, at, copy, 300);
            pid_t grandchild = fork();
            if (grandchild == 0) {
                int mine = open_mirror(3 - device);
                DONE(mine, READ, at, copy, 600);
                FILLED(copy, 600 * PAGE, 1);
                fill(at, 600 * PAGE, 2);
                DONE(mine, TO_DEVICE, at, copy, 600);
                FILLED(copy, 600 * PAGE, 2);
                _exit(0);
            }
            ENDS_WELL(grandchild);
            FILLED(at, 600 * PAGE, 1);
            DONE(own, TO_DEVICE, at, copy, 600);
            FILLED(copy, 600 * PAGE, 1);
            _exit(0);
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
    char *at = map(64 * PAGE, RW, PRIVATE, -1), *copy = buffer(64 * PAGE);
    fill(at, 64 * PAGE, 7);
    for (int i = 0; i < 3; i++) {
        workers[i] = (struct worker){open_mirror(i), map(128 * PAGE, RW, PRIVATE, -1), 0};
        HOLDS(pthread_create(&threads[i], NULL, work, &workers[i]) == 0);
    }
    for (int round = 0; round < 12; round++) {
        pid_t child = fork();
        if (child == 0) {
            int own = open_mirror(round % 4);
            DONE(own, TO_DEVICE, at, copy, 64);
            FILLED(copy, 64 * PAGE, 7);
            fill(at, 64 * PAGE, 8);
            _exit(0);
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
    char *at = map(PAGE, RW, PRIVATE, -1), *copy = buffer(PAGE);
    fill(at, PAGE, 1);
    DONE(fd, TO_DEVICE, at, copy, 1);
    FILLED(at, PAGE, 1);
}
