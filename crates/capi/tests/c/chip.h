/* A device in C for tests: memory, a table of translations, code that uses the program's own pointers, and every way to fail. */

#ifndef CHIP_H
#define CHIP_H

#include <peerspace.h>
#include <pthread.h>
#include <stdatomic.h>

#define MIB ((size_t)1 << 20)

/* Where a page of the program is for the chip. */
struct entry {
    uint64_t address; /* of the page, plus 1; 0: none */
    uint64_t page;
    uint32_t target;
    uint32_t writable;
};

struct chip {
    ps_device_ops ops;
    ps_mmu_ops mmu;
    size_t page, pages;
    unsigned char *memory;
    /* One byte for each page: it was stored, and not freed since. */
    atomic_uchar *holds;
    pthread_mutex_t lock;
    /* Its code makes no access while it is halted. */
    pthread_cond_t goes_on;
    int halted;
    struct entry *table;
    size_t slots;
    ps_port port;

    /* What was asked of it. */
    atomic_long stores, loads, freed, maps, unmaps, zero_maps, host_maps, copies, halts, destroyed, forks_before, forks_after;
    /* Pages that were freed and had not been stored. */
    atomic_long freed_wrongly;

    /* What to answer. */
    atomic_int store_result, load_result, map_result, unmap_result, halt_result;
    /* Answers nothing. */
    atomic_int silent;
    /* Pages it takes before it is full; negative: no limit. */
    atomic_long room;
    /* A load of this page fails, if it is not negative. */
    atomic_long bad_page;
    /* Milliseconds that a transfer takes. */
    atomic_int slow;
    /* Unmaps are answered with a fence, which is reached after so many questions; negative: never. */
    atomic_int fences;
    atomic_long asked;
    /* Addresses it has something else at. */
    uint64_t taken_start, taken_end;
    /* What calls of the library have returned that were made inside of `store`. */
    atomic_int reenters, reentered;
    ps_space space;
};

/* A chip of so many bytes: memory alone. */
struct chip *chip_new(const char *name, size_t bytes);
/* The same with an MMU: flags are PS_MMU_*, mode is an enum ps_mode. */
struct chip *chip_with_mmu(const char *name, size_t bytes, uint32_t mode, uint32_t flags);
/* Adds the functions that halt it. */
void chip_halts(struct chip *chip);
/* Adds the function that copies from other chips. */
void chip_copies(struct chip *chip);

/* Accesses of the chip's code to a word of the program. */
ps_status chip_read(struct chip *chip, const void *at, uint64_t *word);
ps_status chip_write(struct chip *chip, void *at, uint64_t word);
ps_status chip_add(struct chip *chip, void *at, uint64_t n);
/* Accesses to words that have to be mapped already: 0 where one is not. */
int chip_has(struct chip *chip, const void *at, int writable);

/* A space of so much RAM with these chips, and `spec` before them unless it is null. */
ps_space space_of(size_t host, const char *spec, size_t chips, struct chip **of);
/* As the environment says: PEERSPACE_TEST_FAULTS=signal or thread. */
uint32_t faults_to_test(void);
/* Its start. */
void *memory_of(ps_region region);
ps_statistics statistics_of(ps_space space);
ps_device_statistics device_statistics_of(ps_device device);
/* The device at this place in the space's order. */
ps_device device_at(ps_space space, size_t i);

/* What a word at `i` is after `fill` with `seed`. */
static inline uint64_t word(uint64_t seed, size_t i)
{
    uint64_t x = (seed + i) * 0x9e3779b97f4a7c15u;
    return x ^ x >> 29;
}
void fill(void *at, size_t bytes, uint64_t seed);
/* How many words are not as they were filled. */
size_t wrong(const void *at, size_t bytes, uint64_t seed);

#endif
