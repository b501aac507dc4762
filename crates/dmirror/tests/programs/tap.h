/* Tests, each in a process of its own, with TAP on standard output.
 *
 *   TEST(name, "G3: what it shows")
 *   {
 *       EQUAL(2, 1 + 1);
 *   }
 *
 * A test fails at the first thing that is not so, by a signal, and when it takes too long. Names given to the program choose among
 * the tests. Every number that is compared is one of 64 bits.
 */
#ifndef TAP_H
#define TAP_H

#include <errno.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

struct tap_test {
    const char *name, *shows;
    void (*run)(void);
};

static struct tap_test tap_tests[256];
static int tap_count;

/* Seconds that a test may take. */
#ifndef TAP_LIMIT
#define TAP_LIMIT 60
#endif

static inline void tap_add(const char *name, const char *shows, void (*run)(void))
{
    tap_tests[tap_count++] = (struct tap_test){name, shows, run};
}

#define TEST(test, shows)                                                                                              \
    static void test(void);                                                                                            \
    __attribute__((constructor)) static void tap_add_##test(void)                                                     \
    {                                                                                                                  \
        tap_add(#test, shows, test);                                                                                   \
    }                                                                                                                  \
    static void test(void)

#define TAP_SKIPPED 77

/* The rest of the test needs something that is not there. */
static inline void skip(const char *why)
{
    printf("# %s\n", why);
    fflush(stdout);
    _exit(TAP_SKIPPED);
}

/* Says more about a failure, if a test has something to say. */
static void (*tap_explain)(void);

#define FAIL(...)                                                                                                      \
    do {                                                                                                               \
        fprintf(stderr, "# %s:%d: ", __FILE__, __LINE__);                                                              \
        fprintf(stderr, __VA_ARGS__);                                                                                  \
        fprintf(stderr, "\n");                                                                                         \
        if (tap_explain)                                                                                               \
            tap_explain();                                                                                             \
        _exit(1);                                                                                                      \
    } while (0)

#define HOLDS(what)                                                                                                    \
    do {                                                                                                               \
        if (!(what))                                                                                                   \
            FAIL("it does not hold that %s (errno %d)", #what, errno);                                                 \
    } while (0)

/* What is expected comes first. */
#define EQUAL(expected, found)                                                                                         \
    do {                                                                                                               \
        int64_t tap_expected = (int64_t)(expected), tap_found = (int64_t)(found);                                      \
        if (tap_expected != tap_found)                                                                                 \
            FAIL("%s is %lld (%#llx), not %lld (%#llx)", #found, (long long)tap_found, (long long)tap_found,           \
                 (long long)tap_expected, (long long)tap_expected);                                                    \
    } while (0)

/* Forks. The block that follows is all that the child does; it ends well if it comes to the end of that. */
#define FORK(child)                                                                                                    \
    pid_t child = fork();                                                                                              \
    HOLDS(child >= 0);                                                                                                 \
    if (child == 0)                                                                                                    \
        for (;; _exit(0))

/* Waits for a child that ends well. */
#define ENDS_WELL(child)                                                                                               \
    do {                                                                                                               \
        int tap_status = -1;                                                                                           \
        EQUAL(child, waitpid(child, &tap_status, 0));                                                                  \
        if (!WIFEXITED(tap_status) || WEXITSTATUS(tap_status) != 0)                                                    \
            FAIL("the child ended with status %#x", tap_status);                                                       \
    } while (0)

static int tap_run(const struct tap_test *test)
{
    pid_t child = fork();
    if (child == 0) {
        setpgid(0, 0);
        alarm(TAP_LIMIT);
        test->run();
        fflush(stdout);
        _exit(0);
    }
    int status = 0;
    waitpid(child, &status, 0);
    /* What it has started goes with it. */
    kill(-child, SIGKILL);
    return status;
}

int main(int argc, char **argv)
{
    int failed = 0, number = 0, chosen = 0;
    for (int i = 0; i < tap_count; i++)
        for (int a = 1; a < argc || a == 1; a++)
            chosen += argc == 1 || strcmp(argv[a], tap_tests[i].name) == 0;
    printf("TAP version 13\n1..%d\n", chosen);
    fflush(stdout);
    for (int i = 0; i < tap_count; i++) {
        const struct tap_test *test = &tap_tests[i];
        int wanted = argc == 1;
        for (int a = 1; a < argc; a++)
            wanted |= strcmp(argv[a], test->name) == 0;
        if (!wanted)
            continue;
        int status = tap_run(test);
        int skipped = WIFEXITED(status) && WEXITSTATUS(status) == TAP_SKIPPED;
        int well = skipped || (WIFEXITED(status) && WEXITSTATUS(status) == 0);
        if (WIFSIGNALED(status))
            fprintf(stderr, "# %s was ended by signal %d\n", test->name, WTERMSIG(status));
        printf("%s %d - %s (%s)%s\n", well ? "ok" : "not ok", ++number, test->name, test->shows, skipped ? " # SKIP" : "");
        fflush(stdout);
        failed += !well;
    }
    return failed != 0;
}

#endif
