/* What is refused, and with which errno; what is left as it was then. */
#include "mirror.h"
#include <sys/stat.h>

static const enum request all[] = {READ, WRITE, TO_DEVICE, TO_SYSTEM, SNAPSHOT, EXCLUSIVE, CHECK_EXCLUSIVE, RELEASE, FLAGS};
#define EACH_REQUEST(request)                                                                                          \
    for (size_t r_ = 0, on_ = 1; r_ < sizeof all / sizeof *all; r_++, on_ = 1)                                         \
        for (enum request request = all[r_]; on_; on_ = 0)

TEST(addresses_are_those_of_pages, "EINVAL: not aligned, no page, or around the end of all addresses")
{
    EACH_MIRROR(device, fd) {
        char *at = map(4 * PAGE, RW, PRIVATE, -1), *copy = buffer(4 * PAGE);
        EACH_REQUEST(request) {
            REFUSED(EINVAL, fd, request, at + 1, copy, 1);
            REFUSED(EINVAL, fd, request, at + 2048, copy, 1);
            REFUSED(EINVAL, fd, request, at, copy, 0);
            REFUSED(EINVAL, fd, request, at, copy, -(uint64_t)at / PAGE + 1);
            REFUSED(EINVAL, fd, request, at, copy, UINT64_MAX);
            REFUSED(EINVAL, fd, request, at, copy, UINT64_MAX / PAGE + 2);
            REFUSED(EINVAL, fd, request, (void *)-PAGE, copy, 2);
        }
    }
}

TEST(requests_there_are_not, "EINVAL; and EFAULT where the argument is not there")
{
    int fd = open_mirror(0);
    char *at = map(PAGE, RW, PRIVATE, -1);
    struct command command = {(uint64_t)at, (uint64_t)at, 1, 0, 0};
    EQUAL(-1, ioctl(fd, NUMBER(9), &command));
    EQUAL(EINVAL, errno);
    EQUAL(-1, ioctl(fd, _IO('H', 0), &command));
    EQUAL(EINVAL, errno);
    EACH_REQUEST(request) {
        EQUAL(-1, ioctl(fd, NUMBER(request), NULL));
        EQUAL(EFAULT, errno);
        EQUAL(-1, ioctl(fd, NUMBER(request), (void *)8));
        EQUAL(EFAULT, errno);
    }
    /* A struct that ends where nothing is mapped. */
    char *edge = map(2 * PAGE, RW, PRIVATE, -1);
    HOLDS(munmap(edge + PAGE, PAGE) == 0);
    EQUAL(-1, ioctl(fd, NUMBER(READ), edge + PAGE - 16));
    EQUAL(EFAULT, errno);
    /* One that cannot be written: the request is carried out, and cannot say so. */
    struct command *sealed = map(PAGE, RW, PRIVATE, -1);
    *sealed = command;
    HOLDS(mprotect(sealed, PAGE, RO) == 0);
    EQUAL(-1, ioctl(fd, NUMBER(READ), sealed));
    EQUAL(EFAULT, errno);
    EQUAL(0, sealed->cpages);
}

TEST(memory_that_is_not_there, "EFAULT for an access, EINVAL for a migration")
{
    EACH_MIRROR(device, fd) {
        char *at = filled(8 * PAGE, 1), *copy = buffer(8 * PAGE), *kept = buffer(8 * PAGE);
        fill(copy, 8 * PAGE, 2);
        fill(kept, 8 * PAGE, 2);
        HOLDS(munmap(at + 5 * PAGE, PAGE) == 0);
        REFUSED(EFAULT, fd, READ, at, copy, 8);
        REFUSED(EFAULT, fd, EXCLUSIVE, at, copy, 8);
        REFUSED(EINVAL, fd, TO_DEVICE, at, copy, 8);
        REFUSED(EINVAL, fd, TO_SYSTEM, at, copy, 8);
        REFUSED(EFAULT, fd, READ, at + 5 * PAGE, copy, 1);
        REFUSED(EINVAL, fd, TO_DEVICE, at + 5 * PAGE, copy, 1);
        REFUSED(EFAULT, fd, READ, (void *)(1ul << 46), copy, 1);
        REFUSED(EFAULT, fd, READ, (void *)(0xfffful << 48), copy, 1);
        HOLDS(memcmp(copy, kept, 8 * PAGE) == 0);
        REFUSED(EFAULT, fd, WRITE, at + 5 * PAGE, copy, 3);
        /* What is there is as it was, and can be used. */
        FILLED(at, 5 * PAGE, 1);
        FILLED_FROM(at + 6 * PAGE, 2 * PAGE, 1, 6 * PAGE);
        FINDS(1, fd, TO_DEVICE, at, copy, 5);
    }
}

TEST(memory_that_may_not_be_read, "EFAULT for an access, EINVAL for a migration (G4)")
{
    EACH_MIRROR(device, fd) {
        char *at = filled(64 * PAGE, 1), *copy = buffer(64 * PAGE);
        fill(copy, 64 * PAGE, 2);
        HOLDS(mprotect(at + 60 * PAGE, PAGE, NO_RW) == 0);
        REFUSED(EFAULT, fd, READ, at, copy, 64);
        REFUSED(EFAULT, fd, WRITE, at + 60 * PAGE, copy, 1);
        REFUSED(EINVAL, fd, TO_DEVICE, at + 60 * PAGE, copy, 1);
        REFUSED(EINVAL, fd, TO_SYSTEM, at + 60 * PAGE, copy, 1);
        FILLED(copy, 64 * PAGE, 2);
        HOLDS(mprotect(at + 60 * PAGE, PAGE, RW) == 0);
        FILLED(at, 64 * PAGE, 1);
        FINDS(1, fd, READ, at, copy, 64);
        /* Taken back after it was given. */
        HOLDS(mprotect(at, 64 * PAGE, NO_RW) == 0);
        REFUSED(EFAULT, fd, READ, at, copy, 64);
        HOLDS(mprotect(at, 64 * PAGE, RW) == 0);
        EQUAL(1, DONE(fd, READ, at, copy, 64));
    }
}

TEST(memory_that_may_not_be_written, "EPERM (G4), and nothing is")
{
    EACH_MIRROR(device, fd) {
        char *at = filled(64 * PAGE, 1), *copy = buffer(64 * PAGE);
        HOLDS(mprotect(at, 64 * PAGE, RO) == 0);
        fill(copy, 64 * PAGE, 2);
        REFUSED(EPERM, fd, WRITE, at, copy, 64);
        REFUSED(EFAULT, fd, EXCLUSIVE, at, copy, 64);
        FILLED(at, 64 * PAGE, 1);
        DONE(fd, READ, at, copy, 64);
        REFUSED(EPERM, fd, WRITE, at, copy, 1);
        HOLDS(mprotect(at, 64 * PAGE, RW) == 0);
        EQUAL(1, WRITES(2, fd, at, copy, 64));
        FILLED(at, 64 * PAGE, 2);
        /* Never touched, and read-only: zeros, that no write takes the place of. */
        char *zeros = map(8 * PAGE, RO, PRIVATE, -1);
        EQUAL(1, DONE(fd, READ, zeros, copy, 8));
        ALL_ZERO(copy, 8 * PAGE);
        REFUSED(EPERM, fd, WRITE, zeros, copy, 8);
        ALL_ZERO(zeros, 8 * PAGE);
    }
}

TEST(addresses_beyond_all_memory, "EFAULT, EINVAL: they are not those whose lower bits they share, that the device has")
{
    EACH_MIRROR(device, fd) {
        char *at = filled(4 * PAGE, 1), *copy = buffer(4 * PAGE);
        FINDS(1, fd, EXCLUSIVE, at, copy, 4);
        for (int bit = 47; bit < 64; bit++) {
            void *beyond = (void *)((uintptr_t)at | 1ul << bit);
            REFUSED(EFAULT, fd, READ, beyond, copy, 4);
            REFUSED(EFAULT, fd, WRITE, beyond, copy, 4);
            REFUSED(EINVAL, fd, TO_DEVICE, beyond, copy, 4);
            DONE(fd, CHECK_EXCLUSIVE, beyond, copy, 4);
            EQUAL(0, *(uint32_t *)copy);
            ALL_SEEN(UNREADABLE, fd, beyond, 4);
        }
        FINDS(1, fd, READ, at, copy, 4);
        FILLED(at, 4 * PAGE, 1);
    }
}

TEST(buffers_that_are_not_there, "EFAULT")
{
    EACH_MIRROR(device, fd) {
        char *at = map(8 * PAGE, RW, PRIVATE, -1), *copy = map(8 * PAGE, RW, PRIVATE, -1);
        fill(at, 8 * PAGE, 1);
        fill(copy, 8 * PAGE, 2);
        REFUSED(EFAULT, fd, READ, at, NULL, 8);
        REFUSED(EFAULT, fd, WRITE, at, NULL, 8);
        REFUSED(EFAULT, fd, SNAPSHOT, at, NULL, 8);
        REFUSED(EFAULT, fd, TO_DEVICE, at, NULL, 8);
        FILLED(at, 8 * PAGE, 1);
        HOLDS(mprotect(copy, 8 * PAGE, RO) == 0);
        REFUSED(EFAULT, fd, READ, at, copy, 8);
        FILLED(copy, 8 * PAGE, 2);
        DONE(fd, WRITE, at, copy, 8);
        FILLED(at, 8 * PAGE, 2);
        /* It is not there as far as it is asked for. */
        HOLDS(munmap(copy + 4 * PAGE, 4 * PAGE) == 0);
        REFUSED(EFAULT, fd, WRITE, at, copy, 8);
        DONE(fd, WRITE, at, copy, 4);
        FILLED(at, 8 * PAGE, 2);
    }
}

TEST(more_than_there_is, "ENOMEM, and EFAULT: no data that large can be")
{
    int fd = open_mirror(0);
    char *at = map(PAGE, RW, PRIVATE, -1);
    /* A byte for each page, too. */
    static const enum request with_data[] = {READ, WRITE, EXCLUSIVE, SNAPSHOT, CHECK_EXCLUSIVE};
    for (size_t i = 0; i < sizeof with_data / sizeof *with_data; i++)
        REFUSED(ENOMEM, fd, with_data[i], at, at, 1ull << 50);
    REFUSED(EINVAL, fd, TO_DEVICE, at, at, 1ull << 50);
    int why = ask(fd, READ, at, at, 1ull << 40, NULL);
    HOLDS(why == ENOMEM || why == EFAULT);
    why = ask(fd, WRITE, at, at, 1ull << 33, NULL);
    HOLDS(why == ENOMEM || why == EFAULT);
}

TEST(memory_that_is_not_the_programs_to_share, "never adopted: the stack, the code that runs")
{
    int fd = open_mirror(0);
    char copy[PAGE], on_stack[3 * PAGE];
    memset(on_stack, 7, sizeof on_stack);
    char *page = (char *)(((uintptr_t)on_stack + PAGE - 1) & ~(PAGE - 1));
    REFUSED(EFAULT, fd, READ, page, copy, 1);
    REFUSED(EINVAL, fd, TO_DEVICE, page, copy, 1);
    HOLDS(on_stack[5] == 7 && page[5] == 7);
}

TEST(descriptors, "EBADF, ENOTTY, close and its kind")
{
    struct command command = {0};
    int fd = open("/dev/hmm_dmirror1", O_RDWR | O_CLOEXEC);
    HOLDS(fd >= 0);
    EQUAL(FD_CLOEXEC, fcntl(fd, F_GETFD));
    char *at = map(PAGE, RW, PRIVATE, -1), *copy = buffer(PAGE);
    int many[4] = {dup(fd), dup2(fd, 200), dup3(fd, 201, O_CLOEXEC), fcntl(fd, F_DUPFD, 300)};
    EQUAL(0, close(fd));
    EQUAL(-1, ioctl(fd, NUMBER(READ), &command));
    EQUAL(EBADF, errno);
    EQUAL(-1, close(fd));
    for (int i = 0; i < 4; i++) {
        HOLDS(many[i] >= 0);
        EQUAL(i > 0 ? 0 : 1, DONE(many[i], READ, at, copy, 1));
    }
    EQUAL(0, close_range(200, 299, 0));
    REFUSED(EBADF, 201, READ, at, copy, 1);
    DONE(many[3], READ, at, copy, 1);
    /* Another file takes the place. */
    int null = open("/dev/null", O_RDWR);
    HOLDS(null >= 0 && dup2(null, many[3]) == many[3]);
    REFUSED(ENOTTY, many[3], READ, at, copy, 1);
    EQUAL(0, ask(many[0], READ, at, copy, 1, NULL));
    EQUAL(ENOENT, open("/dev/hmm_dmirror4", O_RDWR) < 0 ? errno : 0);
    EQUAL(ENOENT, open("/dev/hmm_dmirror", O_RDWR) < 0 ? errno : 0);
    EQUAL(ENOENT, open("/dev/hmm_dmirror00", O_RDWR) < 0 ? errno : 0);
    EQUAL(ENOTDIR, open("/dev/hmm_dmirror0", O_RDONLY | O_DIRECTORY) < 0 ? errno : 0);
    EQUAL(EEXIST, open("/dev/hmm_dmirror0", O_RDWR | O_CREAT | O_EXCL, 0600) < 0 ? errno : 0);
    HOLDS(openat(AT_FDCWD, "/dev/hmm_dmirror2", O_RDWR) >= 0);
}

TEST(descriptors_closed_unseen, "ENOTTY for what has their numbers then; and files do not run out")
{
    char *at = filled(PAGE, 1), *copy = buffer(PAGE);
    int kept = open_mirror(1), fd = -1, ends[2];
    for (int i = 0; i < 2000; i++) {
        fd = open_mirror(0);
        if (i % 50 == 0)
            FINDS(1, fd, READ, at, copy, 1);
        FILE *stream = fdopen(fd, "r+");
        HOLDS(stream && fclose(stream) == 0);
    }
    /* A call of the kernel's that nobody looks at, and one that is. */
    HOLDS(pipe(ends) == 0 && ends[0] == fd);
    REFUSED(ENOTTY, fd, READ, at, copy, 1);
    fd = open_mirror(0);
    HOLDS(fclose(fdopen(fd, "r+")) == 0);
    EQUAL(fd, open("/dev/null", O_RDWR));
    REFUSED(ENOTTY, fd, READ, at, copy, 1);
    FINDS(1, kept, READ, at, copy, 1);
}

TEST(everything_is_closed, "the space's own descriptors are not the program's to close")
{
    int fd = open_mirror(0);
    char *at = filled(BLOCK, 1), *copy = buffer(BLOCK);
    DONE(fd, TO_DEVICE, at, copy, 512);
    EQUAL(0, close_range(3, ~0u, 0));
    for (int i = 3; i < 1024; i++)
        close(i);
    FILLED(at, BLOCK, 1);
    fd = open_mirror(0);
    FINDS(1, fd, TO_DEVICE, at, copy, 512);
    FILLED(at, BLOCK, 1);
}
