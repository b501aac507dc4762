/* A harness for tests in C, in the manner of the kernel's self-tests: TEST and TEST_F define tests that register themselves, each
 * named for the rule that it shows; every test runs in a process of its own, with a limit on its time; results are TAP.
 *
 *     TEST(z11_a_device_without_its_functions_is_refused) { EXPECT_EQ(...); }
 *
 *     FIXTURE(space) { ps_space space; };
 *     FIXTURE_SETUP(space) { OK(ps_space_create(..., &self->space)); }
 *     FIXTURE_TEARDOWN(space) { OK(ps_space_release(self->space)); }
 *     TEST_F(space, g3_memory_begins_as_zeros) { ... self->space ... }
 *
 * EXPECT_* go on after a failure, ASSERT_* end the test, SKIP says why it cannot be had here. */

#ifndef HARNESS_H
#define HARNESS_H

#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

struct test {
    const char *name;
    void (*run)(void);
    struct test *next;
};

extern struct test *first_test, **last_test;
/* Failures of the running test. */
extern int failures;

/* Statuses of the processes of tests that have not passed. */
enum { TEST_FAILED = 1, TEST_SKIPPED = 77 };
/* Seconds that a test may take: far more than any does. */
enum { TEST_SECONDS = 120 };

#define TEST(test_name)                                                                                                \
    static void run_##test_name(void);                                                                                 \
    static struct test test_##test_name = { #test_name, run_##test_name, NULL };                                       \
    __attribute__((constructor)) static void register_##test_name(void)                                                \
    {                                                                                                                  \
        *last_test = &test_##test_name;                                                                                \
        last_test = &test_##test_name.next;                                                                            \
    }                                                                                                                  \
    static void run_##test_name(void)

#define FIXTURE(fixture) struct fixture_##fixture
#define FIXTURE_SETUP(fixture) static void setup_##fixture(struct fixture_##fixture *self)
#define FIXTURE_TEARDOWN(fixture) static void teardown_##fixture(struct fixture_##fixture *self)
#define TEST_F(fixture, test_name)                                                                                     \
    static void body_##test_name(struct fixture_##fixture *self);                                                      \
    TEST(test_name)                                                                                                    \
    {                                                                                                                  \
        static struct fixture_##fixture self;                                                                          \
        setup_##fixture(&self);                                                                                        \
        body_##test_name(&self);                                                                                       \
        teardown_##fixture(&self);                                                                                     \
    }                                                                                                                  \
    static void body_##test_name(struct fixture_##fixture *self)

/* Says where and what, as a TAP diagnostic. */
__attribute__((format(printf, 3, 4))) static inline void failed(const char *file, int line, const char *format, ...)
{
    va_list list;
    failures++;
    printf("# %s:%d: ", file, line);
    va_start(list, format);
    vprintf(format, list);
    va_end(list);
    printf("\n");
}

#define CHECK_(condition, otherwise, ...)                                                                              \
    do {                                                                                                               \
        if (!(condition)) {                                                                                            \
            failed(__FILE__, __LINE__, __VA_ARGS__);                                                                   \
            otherwise;                                                                                                 \
        }                                                                                                              \
    } while (0)
#define END_ (fflush(stdout), _exit(TEST_FAILED))
#define COMPARE_(a, op, b, otherwise)                                                                                  \
    do {                                                                                                               \
        long long a_ = (long long)(a), b_ = (long long)(b);                                                            \
        CHECK_(a_ op b_, otherwise, "%s %s %s: %lld and %lld (the library says: %s)", #a, #op, #b, a_, b_,             \
               ps_last_error());                                                                                       \
    } while (0)

#define EXPECT(condition) CHECK_(condition, (void)0, "expected: %s", #condition)
#define ASSERT(condition) CHECK_(condition, END_, "expected: %s", #condition)
#define EXPECT_EQ(a, b) COMPARE_(a, ==, b, (void)0)
#define EXPECT_NE(a, b) COMPARE_(a, !=, b, (void)0)
#define EXPECT_GE(a, b) COMPARE_(a, >=, b, (void)0)
#define EXPECT_LE(a, b) COMPARE_(a, <=, b, (void)0)
#define ASSERT_EQ(a, b) COMPARE_(a, ==, b, END_)
#define ASSERT_GE(a, b) COMPARE_(a, >=, b, END_)
/* A call that is to do what it is asked to. */
#define OK(call) ASSERT_EQ(call, PS_OK)
/* A call that is to be refused with this status, and a message with these words. */
#define REFUSED(call, status, words)                                                                                   \
    do {                                                                                                               \
        EXPECT_EQ(call, status);                                                                                       \
        CHECK_(strstr(ps_last_error(), words) != NULL, (void)0, "%s: no \"%s\" in the message: %s", #call, words,      \
               ps_last_error());                                                                                       \
    } while (0)
#define SKIP(...)                                                                                                      \
    do {                                                                                                               \
        printf("# SKIP ");                                                                                             \
        printf(__VA_ARGS__);                                                                                           \
        printf("\n");                                                                                                  \
        fflush(stdout);                                                                                                \
        _exit(TEST_SKIPPED);                                                                                           \
    } while (0)

#endif
