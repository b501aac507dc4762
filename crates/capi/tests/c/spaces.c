/* Spaces and regions: the budget, what leaves and comes back, hints, pins, adopted memory, forks. */

#include "chip.h"
#include "harness.h"
#include <errno.h>
#include <sys/mman.h>

/* A space of 8 MiB, a chip of 64 MiB that is memory alone, and a region of 32 MiB. */
FIXTURE(tight)
{
    struct chip *chip;
    ps_space space;
    ps_region region;
    unsigned char *memory;
};

enum { HOST = 8 << 20, BYTES = 32 << 20 };

FIXTURE_SETUP(tight)
{
    self->chip = chip_new("chip", 64 * MIB);
    self->space = space_of(HOST, NULL, 1, &self->chip);
    OK(ps_region_create(self->space, BYTES, &self->region));
    self->memory = memory_of(self->region);
}

FIXTURE_TEARDOWN(tight)
{
    OK(ps_region_release(self->region));
    EXPECT_EQ(self->chip->destroyed, 0);
    OK(ps_space_release(self->space));
    EXPECT_EQ(self->chip->destroyed, 1);
    EXPECT_EQ(self->chip->freed_wrongly, 0);
}

TEST_F(tight, g3_memory_begins_as_zeros)
{
    size_t len, set = 0;
    void *start;
    OK(ps_region_memory(self->region, &start, &len));
    EXPECT_EQ(len, BYTES);
    for (size_t i = 0; i < BYTES; i += 512)
        set += self->memory[i] != 0;
    EXPECT_EQ(set, 0);
    EXPECT_EQ(self->chip->stores, 0);
}

TEST_F(tight, g7_four_times_the_budget_is_kept_within_it)
{
    fill(self->memory, BYTES, 1);
    EXPECT_EQ(wrong(self->memory, BYTES, 1), 0);
    ps_statistics s = statistics_of(self->space);
    EXPECT_EQ(s.limit_bytes, HOST);
    EXPECT_LE(s.peak_bytes, HOST);
    EXPECT_EQ(s.forced_bytes, 0);
    EXPECT_GE(s.pages_out, (BYTES - HOST) / self->chip->page);
    EXPECT_EQ(s.pages_out, self->chip->stores);
    EXPECT_GE(self->chip->loads, (BYTES - HOST) / (long)self->chip->page);
    EXPECT_EQ(s.poisoned, 0);
    EXPECT_EQ(s.devices, 1);
    OK(ps_space_check(self->space));
}

TEST_F(tight, z6_each_page_that_was_stored_is_freed_once)
{
    for (int round = 0; round < 3; round++) {
        fill(self->memory, BYTES, round);
        EXPECT_EQ(wrong(self->memory, BYTES, round), 0);
        OK(ps_region_discard(self->region, 0, BYTES));
    }
    /* The space hears of a discard, and follows. */
    size_t held = 1;
    for (int tries = 0; held > 0 && tries < 1000; tries++) {
        usleep(10000);
        held = 0;
        for (size_t p = 0; p < self->chip->pages; p++)
            held += self->chip->holds[p];
    }
    EXPECT_EQ(held, 0);
    EXPECT_EQ(self->chip->freed_wrongly, 0);
    EXPECT_GE(self->chip->freed, 1);
}

TEST_F(tight, g8_discarded_memory_reads_as_zeros_rounded_inwards)
{
    size_t page = self->chip->page;
    fill(self->memory, BYTES, 7);
    OK(ps_region_discard(self->region, page / 2, 3 * page));
    EXPECT_EQ(wrong(self->memory, page, 7), 0);
    EXPECT_EQ(self->memory[page] | self->memory[3 * page - 1], 0);
    EXPECT_EQ(wrong(self->memory + 3 * page, page, 7 + 3 * page / 8), 0);
    REFUSED(ps_region_discard(self->region, BYTES, 1), PS_ERR_RANGE, "does not lie inside");
}

TEST_F(tight, z8_h5_what_is_pinned_stays_in_ram)
{
    ps_pin pin, other;
    fill(self->memory, BYTES, 3);
    OK(ps_pin_create(self->space, self->memory, 2 * MIB, PS_USE_WRITE, &pin));
    EXPECT_EQ(statistics_of(self->space).pinned_bytes, 2 * MIB);
    long loads = self->chip->loads;
    /* Everything else goes by. */
    EXPECT_EQ(wrong(self->memory + 4 * MIB, BYTES - 4 * MIB, 3 + 4 * MIB / 8), 0);
    EXPECT_GE(self->chip->loads, loads + 1);
    loads = self->chip->loads;
    EXPECT_EQ(wrong(self->memory, 2 * MIB, 3), 0);
    EXPECT_EQ(self->chip->loads, loads);
    /* Three quarters of the budget at most, unless it was said otherwise. */
    REFUSED(ps_pin_create(self->space, self->memory, 7 * MIB, PS_USE_READ, &other), PS_ERR_PINNED, "cannot be kept resident");
    REFUSED(ps_pin_create(self->space, self->memory, 7 * MIB, PS_USE_READ, &other), PS_ERR_PINNED, "pin_limit of ps_space_options");
    OK(ps_pin_release(pin));
    REFUSED(ps_pin_release(pin), PS_ERR_HANDLE, "released");
    EXPECT_EQ(statistics_of(self->space).pinned_bytes, 0);
}

TEST_F(tight, a_pinned_buffer_can_be_handed_to_a_system_call)
{
    int ends[2];
    ps_pin pin;
    fill(self->memory, BYTES, 5);
    ASSERT_EQ(pipe(ends), 0);
    OK(ps_pin_create(self->space, self->memory, 4096, PS_USE_READ, &pin));
    EXPECT_EQ(write(ends[1], self->memory, 4096), 4096);
    OK(ps_pin_release(pin));
    OK(ps_pin_create(self->space, self->memory + BYTES - 4096, 4096, PS_USE_WRITE, &pin));
    EXPECT_EQ(read(ends[0], self->memory + BYTES - 4096, 4096), 4096);
    OK(ps_pin_release(pin));
    EXPECT_EQ(wrong(self->memory + BYTES - 4096, 4096, 5), 0);
}

TEST_F(tight, g8_copies_need_no_access_by_the_program)
{
    fill(self->memory, 8 * MIB, 9);
    fill(self->memory + 16 * MIB, 8 * MIB, 10);
    OK(ps_copy(self->space, self->memory + 16 * MIB + 24, self->memory, 5 * MIB + 8));
    EXPECT_EQ(wrong(self->memory + 16 * MIB, 24, 10), 0);
    EXPECT_EQ(wrong(self->memory + 16 * MIB + 24, 5 * MIB + 8, 9), 0);
    EXPECT_EQ(wrong(self->memory + 21 * MIB + 32, 3 * MIB - 32, 10 + (5 * MIB + 32) / 8), 0);
    REFUSED(ps_copy(self->space, self->memory, self->memory + 8, 16), PS_ERR_RANGE, "overlap");
    REFUSED(ps_copy(self->space, self->memory + BYTES, self->memory, 16), PS_ERR_RANGE, "not managed");
}

TEST_F(tight, reads_and_writes_with_errors_instead_of_signals)
{
    static uint64_t buffer[1 << 17];
    fill(self->memory, BYTES, 11);
    for (size_t at = 8; at < BYTES; at += sizeof buffer) {
        size_t n = BYTES - at < sizeof buffer ? BYTES - at : sizeof buffer;
        OK(ps_read(self->space, self->memory + at, buffer, n));
        EXPECT_EQ(wrong(buffer, n, 11 + at / 8), 0);
    }
    fill(buffer, sizeof buffer, 12);
    OK(ps_write(self->space, self->memory + 3 * MIB + 8, buffer, sizeof buffer));
    EXPECT_EQ(wrong(self->memory + 3 * MIB + 8, sizeof buffer, 12), 0);
    EXPECT_EQ(wrong(self->memory, 3 * MIB + 8, 11), 0);
    REFUSED(ps_read(self->space, self->memory + BYTES - 8, buffer, 16), PS_ERR_RANGE, "not managed");
    REFUSED(ps_read(self->space, self->memory, self->memory + 8, 16), PS_ERR_RANGE, "overlap");
}

TEST_F(tight, h3_small_pages_become_huge_on_request)
{
    size_t huge = 0, block = ps_block_size();
    OK(ps_region_advise(self->region, PS_HINT_ON_REQUEST, PS_HOST));
    fill(self->memory, 4 * MIB, 13);
    EXPECT_EQ(statistics_of(self->space).huge_bytes, 0);
    OK(ps_region_collapse(self->region, 0, 4 * MIB, &huge));
    EXPECT_EQ(huge % block, 0);
    EXPECT_EQ(wrong(self->memory, 4 * MIB, 13), 0);
    if (huge == 0)
        SKIP("there is no huge page to be had");
    EXPECT_GE(statistics_of(self->space).collapses, huge / block);
    /* H1, H4: whoever says that pages are to be small is taken at his word. */
    OK(ps_region_advise(self->region, PS_HINT_SPARSE, PS_HOST));
    REFUSED(ps_region_collapse(self->region, 0, 4 * MIB, &huge), PS_ERR_RANGE, "small pages");
}

TEST_F(tight, g3_what_is_set_aside_comes_back_without_input)
{
    size_t bytes;
    fill(self->memory, 4 * MIB, 14);
    long loads = self->chip->loads;
    OK(ps_region_cold(self->region, 0, 4 * MIB, &bytes));
    EXPECT_GE(bytes, 1);
    EXPECT_EQ(wrong(self->memory, 4 * MIB, 14), 0);
    ps_statistics s = statistics_of(self->space);
    EXPECT_GE(s.faults_standby, 1);
    EXPECT_LE(self->chip->loads - loads, (long)(4 * MIB / self->chip->page / 2));
}

TEST_F(tight, g1_g11_memory_of_the_program_takes_part)
{
    size_t bytes = 24 * MIB, len;
    void *start;
    ps_adopted adopted, again;
    unsigned char *own = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASSERT(own != MAP_FAILED);
    fill(own, bytes / 2, 15);
    OK(ps_adopt(self->space, own + 100, bytes - 100, &adopted));
    OK(ps_adopted_memory(adopted, &start, &len));
    EXPECT(start == own + self->chip->page && len == bytes - self->chip->page);
    fill(own + bytes / 2, bytes / 2, 16);
    EXPECT_EQ(wrong(own, bytes / 2, 15), 0);
    EXPECT_EQ(wrong(own + bytes / 2, bytes / 2, 16), 0);
    EXPECT_GE(self->chip->stores, 1);
    REFUSED(ps_adopt(self->space, own, bytes, &again), PS_ERR_RANGE, "managed already");
    /* The program goes on to own it. */
    EXPECT_EQ(munmap(own + bytes / 2, bytes / 4), 0);
    OK(ps_adopted_advise(adopted, PS_HINT_SPARSE, PS_HOST));
    OK(ps_adopted_cold(adopted, &len));
    OK(ps_adopted_release(adopted));
    EXPECT_EQ(wrong(own, bytes / 2, 15), 0);
    EXPECT_EQ(wrong(own + bytes / 2 + bytes / 4, bytes / 4, 16 + bytes / 4 / 8), 0);
    REFUSED(ps_adopted_release(adopted), PS_ERR_HANDLE, "released");
}

TEST_F(tight, reads_within_one_page_of_adopted_memory)
{
    ps_adopted adopted;
    unsigned char *own = mmap(NULL, MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASSERT(own != MAP_FAILED);
    OK(ps_adopt(self->space, own, MIB, &adopted));
    for (int away = 0; away < 2; away++) {
        size_t bytes;
        fill(own, MIB, 17);
        if (away)
            OK(ps_adopted_cold(adopted, &bytes));
        OK(ps_read(self->space, own, own + 1024, 512));
        OK(ps_write(self->space, own + 2048, own, 512));
        EXPECT_EQ(wrong(own + 1024, 512, 17), 0);
        EXPECT_EQ(wrong(own + 2048, 512, 17), 0);
    }
    OK(ps_adopted_release(adopted));
}

TEST_F(tight, g12_parent_and_child_both_keep_all_data)
{
    int status;
    fill(self->memory, BYTES, 18);
    pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
        /* Half of it is on the chip: everything is there, and goes on apart; handles are good. */
        EXPECT_EQ(wrong(self->memory, BYTES, 18), 0);
        fill(self->memory, BYTES, 19);
        EXPECT_EQ(wrong(self->memory, BYTES, 19), 0);
        ps_region more;
        OK(ps_region_create(self->space, 4 * MIB, &more));
        fill(memory_of(more), 4 * MIB, 20);
        OK(ps_region_release(more));
        OK(ps_region_release(self->region));
        EXPECT_EQ(self->chip->forks_after, 100);
        fflush(stdout);
        _exit(failures);
    }
    fill(self->memory, BYTES / 2, 21);
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0);
    EXPECT_EQ(wrong(self->memory, BYTES / 2, 21), 0);
    EXPECT_EQ(wrong(self->memory + BYTES / 2, BYTES / 2, 18 + BYTES / 2 / 8), 0);
    EXPECT_EQ(self->chip->forks_before, 1);
    EXPECT_EQ(self->chip->forks_after, 1);
}

static void *touches(void *of)
{
    struct fixture_tight *self = of;
    for (int round = 0; round < 200; round++) {
        size_t at = word(99, round) % (BYTES / 8) * 8;
        EXPECT_EQ(wrong(self->memory + at, 8, 22 + at / 8), 0);
    }
    return NULL;
}

static _Atomic int enough;

/* Asks all the time what devices there are. */
static void *asks(void *of)
{
    struct fixture_tight *self = of;
    size_t count = 0;
    while (!enough)
        OK(ps_space_devices(self->space, NULL, 0, &count));
    return NULL;
}

TEST_F(tight, g12_a_fork_amid_other_threads_leaves_no_call_under_way)
{
    pthread_t threads[2], asking;
    size_t devices;
    int status;
    enough = 0;
    ASSERT_EQ(pthread_create(&asking, NULL, asks, self), 0);
    fill(self->memory, BYTES, 22);
    for (int i = 0; i < 2; i++)
        ASSERT_EQ(pthread_create(&threads[i], NULL, touches, self), 0);
    for (int round = 0; round < 40; round++) {
        pid_t child = fork();
        ASSERT_GE(child, 0);
        if (child == 0) {
            /* Would wait for calls that other threads had under way. */
            alarm(20);
            OK(ps_space_devices(self->space, NULL, 0, &devices));
            OK(ps_region_release(self->region));
            OK(ps_space_release(self->space));
            _exit(failures);
        }
        ASSERT_EQ(waitpid(child, &status, 0), child);
        EXPECT_EQ(status, 0);
    }
    enough = 1;
    pthread_join(asking, NULL);
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
}

TEST(a_space_lives_as_long_as_its_regions)
{
    struct chip *chip = chip_new("chip", 64 * MIB);
    ps_space space = space_of(HOST, NULL, 1, &chip);
    ps_region region, none;
    OK(ps_region_create(space, BYTES, &region));
    ps_device device = device_at(space, 0);
    OK(ps_space_release(space));
    EXPECT_EQ(chip->destroyed, 0);
    fill(memory_of(region), BYTES, 23);
    EXPECT_EQ(wrong(memory_of(region), BYTES, 23), 0);
    REFUSED(ps_region_create(space, 1, &none), PS_ERR_HANDLE, "released");
    REFUSED(ps_device_fail(device), PS_ERR_HANDLE, "released");
    OK(ps_region_release(region));
    EXPECT_EQ(chip->destroyed, 1);
}

TEST(devices_by_their_specifications)
{
    ps_space space = space_of(HOST, "compressed:64M", 0, NULL);
    ps_region region;
    ps_device more, soft;
    OK(ps_region_create(space, BYTES, &region));
    fill(memory_of(region), BYTES, 24);
    OK(ps_device_attach_spec(space, "soft:64M", &soft));
    REFUSED(ps_device_attach_spec(space, "tape:64M", &more), PS_ERR_ARGUMENT, "compressed[:SIZE]");
    REFUSED(ps_device_attach_spec(space, "soft:-1", &more), PS_ERR_ARGUMENT, "size");
    REFUSED(ps_device_attach_spec(space, "file:/nowhere/at/all", &more), PS_ERR_DEVICE, "nowhere");
    /* Z3: what was compressed moves to the other one. */
    OK(ps_device_detach(device_at(space, 0)));
    EXPECT_EQ(wrong(memory_of(region), BYTES, 24), 0);
    ps_device_statistics s = device_statistics_of(soft);
    EXPECT(strcmp(s.memory, "private") == 0);
    EXPECT_GE(s.loads, 1);
    EXPECT_EQ(s.has_mmu, 0);
    OK(ps_region_release(region));
    OK(ps_space_release(space));
}

TEST(z5_what_is_on_persistent_memory_is_found_by_its_name)
{
    char path[] = "/tmp/peerspace-capi-XXXXXX";
    int fd = mkstemp(path);
    ASSERT_GE(fd, 0);
    close(fd);
    unlink(path);
    for (int round = 0; round < 2; round++) {
        ps_space space = space_of(HOST, "soft:64M", 0, NULL);
        ps_device device;
        ps_persistent region, none;
        void *start;
        size_t len;
        OK(ps_device_attach_persistent(space, path, 16 * MIB, &device));
        if (round == 0)
            OK(ps_persistent_create(device, "log", 3 * MIB, &region));
        else
            OK(ps_persistent_open(device, "log", &region));
        OK(ps_persistent_memory(region, &start, &len));
        EXPECT_EQ(len, 3 * MIB);
        if (round == 0)
            fill(start, len, 25);
        EXPECT_EQ(wrong(start, len, 25), 0);
        OK(ps_persistent_flush(region, 0, len));
        REFUSED(ps_persistent_flush(region, 1, len), PS_ERR_RANGE, "\"log\"");
        REFUSED(ps_persistent_open(device, "log", &none), PS_ERR_NAMED, "open");
        REFUSED(ps_persistent_remove(device, "log"), PS_ERR_NAMED, "open");
        REFUSED(ps_persistent_open(device_at(space, 0), "log", &none), PS_ERR_DEVICE, "not persistent");
        OK(ps_persistent_release(region));
        if (round == 1) {
            OK(ps_persistent_remove(device, "log"));
            REFUSED(ps_persistent_open(device, "log", &none), PS_ERR_NAMED, "\"log\"");
            REFUSED(ps_persistent_open(device, "log", &none), PS_ERR_NAMED, "ps_persistent_create makes one");
        }
        OK(ps_space_release(space));
    }
    unlink(path);
}
