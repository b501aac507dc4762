/* Memory that is not private and anonymous (rule G11): shared, of files, huge pages of the kernel's pool. */
#include "mirror.h"
#include <pthread.h>

/* A file without a name, of so many bytes. */
static int make_file(size_t bytes)
{
    FILE *file = tmpfile();
    HOLDS(file && ftruncate(fileno(file), bytes) == 0);
    return fileno(file);
}

#define SIZE (700 * PAGE)

/* The program writes a file of that size, or finds in it what was written. */
static void put(int file, char *copy, uint64_t mark)
{
    fill(copy, SIZE, mark);
    EQUAL(SIZE, pwrite(file, copy, SIZE, 0));
}

static void has(int file, char *copy, uint64_t mark)
{
    memset(copy, 0, SIZE);
    EQUAL(SIZE, pread(file, copy, SIZE, 0));
    FILLED(copy, SIZE, mark);
}

/* Devices use shared memory where it is. */
static void in_place(int device, char *at, size_t bytes, size_t unit)
{
    int fd = open_mirror(device), other = open_mirror((device + 2) % 4);
    char *copy = buffer(bytes);
    EQUAL(1, WRITES(1, fd, at, copy, bytes / PAGE));
    FILLED(at, bytes, 1);
    EQUAL(0, DONE(fd, WRITE, at, copy, bytes / PAGE));
    fill(at, bytes, 2);
    EQUAL(1, FINDS(2, other, READ, at, copy, bytes / PAGE));
    REFUSED(ENOENT, fd, TO_DEVICE, at, copy, bytes / PAGE);
    REFUSED(ENOENT, fd, TO_DEVICE, at + 5 * PAGE, copy, 1);
    DONE_IN_PART(0, fd, TO_SYSTEM, at, copy, bytes / PAGE);
    HOLDS(ask(fd, EXCLUSIVE, at, copy, 1, NULL) != 0);
    ALL_SEEN_OF_ANY_SIZE(WRITABLE, fd, at, bytes / PAGE);
    FILLED(at, bytes, 2);
    /* Permissions hold, and change. */
    HOLDS(mprotect(at, unit, RO) == 0);
    REFUSED(EPERM, fd, WRITE, at, copy, bytes / PAGE);
    DONE(fd, READ, at, copy, bytes / PAGE);
    ALL_SEEN_OF_ANY_SIZE(READABLE, fd, at, unit / PAGE);
    HOLDS(mprotect(at, unit, NO_RW) == 0);
    REFUSED(EFAULT, fd, READ, at, copy, bytes / PAGE);
    REFUSED(EINVAL, fd, TO_DEVICE, at, copy, bytes / PAGE);
    HOLDS(mprotect(at, unit, RW) == 0);
    FINDS(2, fd, READ, at, copy, bytes / PAGE);
    /* A child and its devices see the same memory. */
    FORK(child) {
        int own = open_mirror(device);
        FILLED(at, bytes, 2);
        EQUAL(1, WRITES(3, own, at, copy, bytes / PAGE));
    }
    ENDS_WELL(child);
    FILLED(at, bytes, 3);
    FINDS(3, fd, READ, at, copy, bytes / PAGE);
    HOLDS(munmap(at, unit) == 0);
    REFUSED(EFAULT, fd, READ, at, copy, bytes / PAGE);
    REFUSED(EINVAL, fd, TO_DEVICE, at, copy, 1);
    ALL_SEEN(UNREADABLE, fd, at, unit / PAGE);
    close(fd);
    close(other);
}

TEST(shared_anonymous_memory, "G11: accessed in place, and stays")
{
    EACH_KIND(device)
    in_place(device, map(SIZE, RW, MAP_SHARED | MAP_ANONYMOUS, -1), SIZE, PAGE);
}

TEST(memory_files, "G11: accessed in place, and stays")
{
    EACH_KIND(device) {
        int file = memfd_create("kinds", 0);
        HOLDS(file >= 0 && ftruncate(file, SIZE) == 0);
        in_place(device, map(SIZE, RW, MAP_SHARED, file), SIZE, PAGE);
    }
}

TEST(shared_files, "G11: accessed in place; the file has it")
{
    EACH_MIRROR(device, fd) {
        int file = make_file(SIZE);
        char *at = map(SIZE, RW, MAP_SHARED, file), *copy = buffer(SIZE);
        put(file, copy, 1);
        memset(copy, 0, SIZE);
        EQUAL(1, FINDS(1, fd, READ, at, copy, SIZE / PAGE));
        WRITES(2, fd, at, copy, SIZE / PAGE);
        has(file, copy, 2);
        in_place(device, at, SIZE, PAGE);
    }
}

TEST(files_that_are_only_read, "G4, G11")
{
    EACH_MIRROR(device, fd) {
        int file = make_file(SIZE);
        char *copy = buffer(SIZE);
        put(file, copy, 1);
        for (int kind = 0; kind < 2; kind++) {
            char *at = map(SIZE, RO, kind ? MAP_PRIVATE : MAP_SHARED, file);
            memset(copy, 0, SIZE);
            EQUAL(1, FINDS(1, fd, READ, at, copy, SIZE / PAGE));
            REFUSED(EPERM, fd, WRITE, at, copy, SIZE / PAGE);
            ALL_SEEN_OF_ANY_SIZE(READABLE, fd, at, SIZE / PAGE);
        }
    }
}

TEST(files_that_end_early, "EFAULT beyond the end of a file, and nothing worse")
{
    EACH_MIRROR(device, fd) {
        int file = make_file(8 * PAGE);
        char *at = map(8 * PAGE, RW, MAP_SHARED, file), *copy = buffer(8 * PAGE);
        WRITES(1, fd, at, copy, 8);
        HOLDS(ftruncate(file, 4 * PAGE) == 0);
        REFUSED(EFAULT, fd, READ, at, copy, 8);
        REFUSED(EFAULT, fd, WRITE, at, copy, 8);
        FINDS(1, fd, READ, at, copy, 4);
        HOLDS(ftruncate(file, 8 * PAGE) == 0);
        DONE(fd, READ, at, copy, 8);
        ALL_ZERO(copy + 4 * PAGE, 4 * PAGE);
    }
}

TEST(private_files, "G11: their copied pages migrate; the file is as it was")
{
    EACH_MIRROR(device, fd) {
        int file = make_file(SIZE);
        char *at = map(SIZE, RW, MAP_PRIVATE, file), *copy = buffer(SIZE);
        put(file, copy, 1);
        /* A device reads what is in the file, and writes to copies. */
        EQUAL(1, FINDS(1, fd, READ, at, copy, SIZE / PAGE));
        fill(at, 100 * PAGE, 2);
        WRITES(3, fd, at + 100 * PAGE, copy, 100);
        ALL_SEEN_OF_ANY_SIZE(WRITABLE, fd, at, 200);
        /* What is copied by now migrates. */
        DONE(fd, TO_DEVICE, at, copy, 200);
        FILLED(copy, 100 * PAGE, 2);
        FILLED(copy + 100 * PAGE, 100 * PAGE, 3);
        ALL_SEEN_OF_ANY_SIZE(seen_on(device), fd, at, 200);
        FILLED(at, 100 * PAGE, 2);
        FILLED(at + 100 * PAGE, 100 * PAGE, 3);
        FILLED_FROM(at + 200 * PAGE, SIZE - 200 * PAGE, 1, 200 * PAGE);
        has(file, copy, 1);
        /* And goes on to be private. */
        put(file, copy, 4);
        FILLED(at, 100 * PAGE, 2);
        FORK(child) {
            FILLED(at, 100 * PAGE, 2);
            fill(at, SIZE, 5);
            int own = open_mirror(device);
            FINDS(5, own, TO_DEVICE, at, copy, SIZE / PAGE);
        }
        ENDS_WELL(child);
        FILLED(at, 100 * PAGE, 2);
    }
}

static struct sigaction earlier;
static int *handled;

/* Of a program that leaves to the handler before its own what it does not know. */
static void leave_it(int signal, siginfo_t *info, void *context)
{
    if (++*handled > 100)
        _exit(3);
    if (earlier.sa_flags & SA_SIGINFO)
        earlier.sa_sigaction(signal, info, context);
    else
        sigaction(signal, &earlier, NULL);
}

/* Pages that are copied, and writers to them held, on their way to a device. */
static void migrate_copied(int fd)
{
    int file = make_file(SIZE);
    char *at = map(SIZE, RW, MAP_PRIVATE, file), *copy = buffer(SIZE);
    fill(at, SIZE, 1);
    FINDS(1, fd, TO_DEVICE, at, copy, SIZE / PAGE);
    HOLDS(munmap(at, SIZE) == 0);
}

TEST(handlers_that_call_the_one_before, "G11: what is no business of the mirror's ends the program, and comes to its handler once")
{
    handled = map(PAGE, RW, MAP_SHARED | MAP_ANONYMOUS, -1);
    EACH_MIRROR(device, fd) {
        char *read_only = map(PAGE, RO, PRIVATE, -1);
        struct sigaction own = {.sa_sigaction = leave_it, .sa_flags = SA_SIGINFO};
        migrate_copied(fd);
        HOLDS(sigaction(SIGSEGV, &own, &earlier) == 0);
        migrate_copied(fd);
        *handled = 0;
        pid_t child = fork();
        if (child == 0) {
            *(volatile char *)read_only = 1;
            _exit(2);
        }
        int status;
        HOLDS(child > 0 && waitpid(child, &status, 0) == child);
        HOLDS(WIFSIGNALED(status));
        EQUAL(SIGSEGV, WTERMSIG(status));
        EQUAL(1, *handled);
    }
}

TEST(huge_pages_of_the_pool, "G11: accessed in place; 4 in each byte of a snapshot")
{
    EACH_KIND(device) {
        char *at = mmap(NULL, 2 * BLOCK, RW, PRIVATE | MAP_HUGETLB, -1, 0);
        if (at == MAP_FAILED)
            skip("the pool of huge pages is empty");
        int fd = open_mirror(device);
        char *copy = buffer(2 * BLOCK);
        EQUAL(1, WRITES(1, fd, at, copy, 1024));
        FILLED(at, 2 * BLOCK, 1);
        ALL_SEEN(WRITABLE | BY_2M, fd, at, 1024);
        HOLDS(mprotect(at, BLOCK, RO) == 0);
        ALL_SEEN(READABLE | BY_2M, fd, at, 512);
        ALL_SEEN(WRITABLE | BY_2M, fd, at + BLOCK, 512);
        REFUSED(EPERM, fd, WRITE, at, copy, 1024);
        HOLDS(ask(fd, TO_DEVICE, at, copy, 1024, NULL) != 0);
        HOLDS(mprotect(at, BLOCK, RW) == 0);
        fill(at, 2 * BLOCK, 2);
        FINDS(2, fd, READ, at, copy, 1024);
        HOLDS(munmap(at, 2 * BLOCK) == 0);
        REFUSED(EFAULT, fd, READ, at, copy, 1);
    }
}

TEST(ranges_of_several_kinds, "G1, G11: in one request, whatever they are made of")
{
    EACH_MIRROR(device, fd) {
        int file = make_file(64 * PAGE);
        char *at = map(5 * 64 * PAGE, RW, PRIVATE, -1), *copy = buffer(5 * 64 * PAGE);
        size_t part = 64 * PAGE;
        HOLDS(mmap(at + part, part, RW, MAP_SHARED | MAP_ANONYMOUS | MAP_FIXED, -1, 0) == at + part);
        HOLDS(mmap(at + 2 * part, part, RW, MAP_PRIVATE | MAP_FIXED, file, 0) == at + 2 * part);
        HOLDS(mmap(at + 3 * part, part, RW, MAP_SHARED | MAP_FIXED, file, 0) == at + 3 * part);
        fill(copy, 5 * part, 1);
        EQUAL(1, DONE(fd, WRITE, at, copy, 320));
        FILLED(at, 5 * part, 1);
        memset(copy, 0, 5 * part);
        EQUAL(0, DONE(fd, READ, at, copy, 320));
        FILLED(copy, 5 * part, 1);
        REFUSED(ENOENT, fd, TO_DEVICE, at, copy, 320);
        /* All that can have gone. */
        ALL_SEEN_OF_ANY_SIZE(seen_on(device), fd, at, 64);
        ALL_SEEN_OF_ANY_SIZE(seen_on(device), fd, at + 2 * part, 64);
        ALL_SEEN_OF_ANY_SIZE(seen_on(device), fd, at + 4 * part, 64);
        FILLED(at, 5 * part, 1);
    }
}
