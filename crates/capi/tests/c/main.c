/* Runs the tests, each in a process of its own: all of them, or those whose names contain an argument. */

#include "harness.h"

struct test *first_test, **last_test = &first_test;
int failures;

static int wanted(const struct test *test, int argc, char **argv)
{
    for (int i = 1; i < argc; i++)
        if (strstr(test->name, argv[i]) != NULL)
            return 1;
    return argc == 1;
}

int main(int argc, char **argv)
{
    int count = 0, number = 0, bad = 0;
    for (struct test *test = first_test; test != NULL; test = test->next)
        count += wanted(test, argc, argv);
    printf("TAP version 13\n1..%d\n", count);
    for (struct test *test = first_test; test != NULL; test = test->next) {
        int status = 0;
        if (!wanted(test, argc, argv))
            continue;
        number++;
        fflush(stdout);
        pid_t child = fork();
        if (child < 0) {
            perror("fork");
            return 1;
        }
        if (child == 0) {
            alarm(TEST_SECONDS);
            test->run();
            fflush(stdout);
            _exit(failures == 0 ? 0 : TEST_FAILED);
        }
        if (waitpid(child, &status, 0) != child) {
            perror("waitpid");
            return 1;
        }
        if (WIFEXITED(status) && WEXITSTATUS(status) == TEST_SKIPPED) {
            printf("ok %d %s # SKIP\n", number, test->name);
            continue;
        }
        if (WIFSIGNALED(status))
            printf("# ended by signal %d\n", WTERMSIG(status));
        bad += status != 0;
        printf("%sok %d %s\n", status == 0 ? "" : "not ", number, test->name);
    }
    return bad != 0;
}
