// A program that ends in the way it is told to, after using MEGABYTES of memory.
//
//   ends exit STATUS MEGABYTES | ends signal NUMBER MEGABYTES | ends says NOTHING MEGABYTES

#define _GNU_SOURCE
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

int main(int count, char **arguments) {
    if (count != 4) return 99;
    size_t bytes = strtoul(arguments[3], NULL, 10) << 20;
    if (bytes > 0) {
        char *data = malloc(bytes);
        if (data == NULL) return 98;
        for (size_t i = 0; i < bytes; i += 64) data[i] = (char)(i >> 6);
        for (size_t i = 0; i < bytes; i += 64)
            if (data[i] != (char)(i >> 6)) return 97;
    }
    int number = atoi(arguments[2]);
    if (strcmp(arguments[1], "exit") == 0) exit(number);
    if (strcmp(arguments[1], "signal") == 0) {
        raise(number);
        return 96;
    }
    puts("ran");
    return 0;
}
