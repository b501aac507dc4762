// Runs a program as somebody else is allowed to, or where the kernel is not what it was:
//
//   as_other user PROGRAM [ARGS]          without privileges, as user and group 65534
//   as_other without-userfaultfd PROGRAM  userfaultfd fails with ENOSYS, as where a container forbids it
//   as_other old-kernel PROGRAM           PAGEMAP_SCAN (Linux 6.7) and PROCMAP_QUERY (6.11) are not there
//
// A filter of system calls stays with the program and everything that it starts.

#define _GNU_SOURCE
#include <errno.h>
#include <grp.h>
#include <linux/audit.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <stddef.h>
#include <stdio.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

static int filter(struct sock_filter *code, unsigned short n) {
    struct sock_fprog program = {n, code};
    return prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program);
}

#define LOAD(field) BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, field))
#define REFUSE(error) BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | (error))
#define ALLOW BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW)

int main(int count, char **arguments) {
    if (count < 3) return 99;
    int failed = 1;
    if (strcmp(arguments[1], "user") == 0) {
        failed = setgroups(0, NULL) || setresgid(65534, 65534, 65534) || setresuid(65534, 65534, 65534);
    } else if (strcmp(arguments[1], "without-userfaultfd") == 0) {
        struct sock_filter code[] = {LOAD(nr), BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_userfaultfd, 0, 1),
                                     REFUSE(ENOSYS), ALLOW};
        failed = filter(code, sizeof code / sizeof *code);
    } else if (strcmp(arguments[1], "old-kernel") == 0) {
        // By the low half of ioctl's second argument, which holds the whole number.
        struct sock_filter code[] = {LOAD(nr),
                                     BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, __NR_ioctl, 1, 0),
                                     ALLOW,
                                     LOAD(args[1]),
                                     BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0xc0606610, 2, 0), // PAGEMAP_SCAN
                                     BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0xc0686611, 1, 0), // PROCMAP_QUERY
                                     ALLOW,
                                     REFUSE(ENOTTY)};
        failed = filter(code, sizeof code / sizeof *code);
    }
    if (failed) {
        perror("as_other");
        return 98;
    }
    execvp(arguments[2], arguments + 2);
    perror(arguments[2]);
    return 97;
}
