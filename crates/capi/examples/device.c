/* A device in C: somewhere pages can live while they are not in RAM.
 *
 *     cc device.c $(pkg-config --cflags --libs peerspace) -o device && ./device
 *
 * What an author of a device has to know:
 * - Its memory consists of numbered pages, and the space decides which page holds what. `store` writes pages, `load` reads them
 *   back, `freed` says that they are not needed any more.
 * - The space calls from any thread, and from several at a time, but no two calls at a time are about the same page. This device
 *   has a place for each page, so it needs no lock.
 * - It is called with pages locked: it must not touch memory that the space manages, nor allocate where the heap is managed, nor
 *   call the library. So everything it needs is made at the start.
 * - Each transfer is answered for itself: 0, or an errno. What is not answered counts as failed. */

#include <peerspace.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

/* The device begins here. */

struct shelf {
    unsigned char *memory;
    size_t page;
};

static void shelf_store(void *context, ps_store *batch, size_t count)
{
    struct shelf *shelf = context;
    for (size_t i = 0; i < count; i++) {
        memcpy(shelf->memory + batch[i].page * shelf->page, batch[i].bytes, batch[i].len);
        batch[i].result = 0;
    }
}

static void shelf_load(void *context, ps_load *batch, size_t count)
{
    struct shelf *shelf = context;
    for (size_t i = 0; i < count; i++) {
        memcpy(batch[i].bytes, shelf->memory + batch[i].page * shelf->page, batch[i].len);
        batch[i].result = 0;
    }
}

/* A device that allocates for each page would free it here. */
static void shelf_freed(void *context, uint64_t first, uint64_t count)
{
    (void)context, (void)first, (void)count;
}

/* The space is done with the device, and calls it no more. */
static void shelf_destroy(void *context)
{
    struct shelf *shelf = context;
    free(shelf->memory);
}

/* The device ends here. What follows uses it. */

/* Ends the program if a call has failed, with what the library says about it. */
static void must(ps_status status)
{
    if (status != PS_OK) {
        fprintf(stderr, "%s (%s)\n", ps_last_error(), ps_strerror(status));
        exit(1);
    }
}

int main(void)
{
    const size_t device_bytes = 64 << 20, region_bytes = 48 << 20, host_bytes = 8 << 20;
    struct shelf shelf = { .memory = malloc(device_bytes), .page = ps_page_size() };
    if (shelf.memory == NULL)
        return 1;
    ps_device_ops ops = {
        .size = sizeof ops,
        .context = &shelf,
        .name = "shelf",
        .pages = device_bytes / shelf.page,
        .flags = PS_DEVICE_IN_RAM,
        .store = shelf_store,
        .load = shelf_load,
        .freed = shelf_freed,
        .destroy = shelf_destroy,
    };

    /* A space of 8 MiB of RAM, with the device behind it, and a region six times as large. */
    ps_device_choice devices[] = { { .ops = &ops } };
    ps_space_options options = {
        .size = sizeof options, .host_bytes = host_bytes, .devices = devices, .device_count = 1,
    };
    ps_space space;
    ps_region region;
    must(ps_space_create(&options, &space));
    must(ps_region_create(space, region_bytes, &region));

    /* Its memory is used like any other. */
    void *start;
    size_t len;
    must(ps_region_memory(region, &start, &len));
    uint64_t *words = start, count = len / sizeof *words, wrong = 0;
    for (uint64_t i = 0; i < count; i++)
        words[i] = i * i;
    for (uint64_t i = 0; i < count; i++)
        wrong += words[i] != i * i;

    ps_statistics s = { .size = sizeof s };
    must(ps_space_get_statistics(space, &s));
    printf("%zu MiB in at most %zu MiB of RAM: %llu pages went to the shelf, %llu came back, %llu words are wrong\n",
           len >> 20, (size_t)(s.peak_bytes >> 20), (unsigned long long)s.pages_out, (unsigned long long)s.pages_in,
           (unsigned long long)wrong);

    must(ps_region_release(region));
    must(ps_space_release(space));
    return wrong != 0;
}
