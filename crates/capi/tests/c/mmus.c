/* Devices in C that run code: they use the program's own pointers. */

#include "chip.h"
#include "harness.h"
#include <errno.h>
#include <sys/mman.h>

enum { HOST = 16 << 20, BYTES = 4 << 20 };

/* A space with a compressed store, and a chip of 8 MiB with an MMU; a region of 4 MiB. */
FIXTURE(peer)
{
    struct chip *chip;
    ps_space space;
    ps_device device;
    ps_region region;
    unsigned char *memory;
};

static void set_up(struct fixture_peer *self, uint32_t mode, uint32_t flags)
{
    self->chip = chip_with_mmu("chip", 8 * MIB, mode, flags);
    self->space = space_of(HOST, "compressed:64M", 1, &self->chip);
    self->device = device_at(self->space, 1);
    OK(ps_region_create(self->space, BYTES, &self->region));
    self->memory = memory_of(self->region);
}

FIXTURE_SETUP(peer)
{
    set_up(self, PS_MODE_EXCLUSIVE, 0);
}

FIXTURE_TEARDOWN(peer)
{
    OK(ps_space_check(self->space));
    OK(ps_region_release(self->region));
    OK(ps_space_release(self->space));
    EXPECT_EQ(self->chip->destroyed, 1);
}

/* How many words of the region are not what `fill` made of them, as the chip sees it: one of each page. */
static size_t wrong_for_chip(struct chip *chip, const unsigned char *memory, size_t bytes, uint64_t seed)
{
    size_t n = 0;
    for (size_t at = 0; at < bytes; at += chip->page) {
        uint64_t got;
        OK(chip_read(chip, memory + at, &got));
        n += got != word(seed, at / 8);
    }
    return n;
}

TEST_F(peer, g1_g4_the_same_pointer_is_good_on_the_device)
{
    uint64_t got;
    fill(self->memory, BYTES, 1);
    EXPECT_EQ(wrong_for_chip(self->chip, self->memory, BYTES, 1), 0);
    OK(chip_write(self->chip, self->memory + 64, 77));
    OK(chip_read(self->chip, self->memory + 64, &got));
    EXPECT_EQ(got, 77);
    ps_device_statistics s = device_statistics_of(self->device);
    EXPECT_EQ(s.has_mmu, 1);
    EXPECT_GE(s.mmu_faults, 1);
    EXPECT_EQ(s.mmu_moved, BYTES / self->chip->page);
    /* Z8: an ordinary access brings a page home, with what the device has written, and takes the device's translation away. */
    EXPECT(chip_has(self->chip, self->memory + 64, 1));
    EXPECT_EQ(((uint64_t *)self->memory)[8], 77);
    ((uint64_t *)self->memory)[8] = word(1, 8);
    EXPECT_EQ(chip_has(self->chip, self->memory, 1), 0);
    EXPECT_EQ(wrong(self->memory, BYTES, 1), 0);
    EXPECT_GE(device_statistics_of(self->device).mmu_recalls, 1);
}

TEST_F(peer, g3_untouched_memory_is_zeros_for_the_device)
{
    uint64_t got = 1;
    for (size_t at = 0; at < BYTES; at += MIB) {
        OK(chip_read(self->chip, self->memory + at, &got));
        EXPECT_EQ(got, 0);
    }
}

TEST(g3_a_page_of_zeros_is_shared_until_it_is_written)
{
    struct fixture_peer self;
    uint64_t got = 1;
    set_up(&self, PS_MODE_EXCLUSIVE, PS_MMU_ZERO_PAGE);
    OK(chip_read(self.chip, self.memory, &got));
    EXPECT_EQ(got, 0);
    EXPECT_GE(self.chip->zero_maps, 1);
    EXPECT_EQ(self.chip->stores, 0);
    EXPECT_EQ(chip_has(self.chip, self.memory, 1), 0);
    OK(chip_write(self.chip, self.memory, 5));
    EXPECT_EQ(*(uint64_t *)self.memory, 5);
    OK(chip_read(self.chip, self.memory, &got));
    EXPECT_EQ(got, 5);
    teardown_peer(&self);
}

TEST_F(peer, g4_faults_that_cannot_be_resolved_say_why)
{
    uint64_t got, before = 42;
    void *none = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    fill(self->memory, BYTES, 2);
    REFUSED(chip_read(self->chip, none, &got), PS_ERR_RANGE, "no region");
    REFUSED(ps_port_fault(self->chip->port, 0, PS_ACCESS_READ), PS_ERR_RANGE, "0x0");
    REFUSED(ps_port_fault(self->chip->port, UINT64_MAX, PS_ACCESS_WRITE), PS_ERR_RANGE, "0xffff");
    REFUSED(ps_port_fault(self->chip->port, (uint64_t)(uintptr_t)self->memory, 3), PS_ERR_ARGUMENT, "access is 3");
    REFUSED(ps_port_read(self->chip->port, (uint64_t)(uintptr_t)self->memory, NULL, 8), PS_ERR_ARGUMENT, "to is null");
    REFUSED(ps_port_read(self->chip->port, (uint64_t)(uintptr_t)self->memory, &before, 8), PS_ERR_NOT_MAPPED, "not mapped");
    EXPECT_EQ(before, 42);
    OK(ps_region_allow_devices(self->region, 0, MIB, PS_USE_READ));
    OK(chip_read(self->chip, self->memory, &got));
    REFUSED(chip_write(self->chip, self->memory, 1), PS_ERR_READ_ONLY, "not written");
    OK(chip_write(self->chip, self->memory + MIB, word(2, MIB / 8)));
    *(volatile uint64_t *)self->memory = word(2, 0);
    OK(ps_region_allow_devices(self->region, 0, MIB, PS_USE_WRITE));
    OK(chip_write(self->chip, self->memory, word(2, 0)));
    EXPECT_EQ(wrong(self->memory, BYTES, 2), 0);
}

/* The program changes memory that the chip has mapped. */
static void changes_mappings(struct fixture_peer *self)
{
    uint64_t got;
    ps_adopted adopted;
    unsigned char *own = mmap(NULL, 2 * MIB, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASSERT(own != MAP_FAILED);
    fill(own, 2 * MIB, 3);
    OK(ps_adopt(self->space, own, 2 * MIB, &adopted));
    EXPECT_EQ(wrong_for_chip(self->chip, own, 2 * MIB, 3), 0);
    OK(ps_region_discard(self->region, 0, BYTES));
    ASSERT_EQ(madvise(own, MIB, MADV_DONTNEED), 0);
    EXPECT_EQ(*(volatile uint64_t *)own, 0);
    OK(chip_read(self->chip, own, &got));
    EXPECT_EQ(got, 0);
    ASSERT_EQ(munmap(own, MIB), 0);
    EXPECT_EQ(chip_has(self->chip, own, 0), 0);
    EXPECT_EQ(chip_read(self->chip, own, &got), PS_ERR_RANGE);
    EXPECT_EQ(wrong_for_chip(self->chip, own + MIB, MIB, 3 + MIB / 8), 0);
    OK(ps_adopted_release(adopted));
    EXPECT_EQ(wrong(own + MIB, MIB, 3 + MIB / 8), 0);
}

TEST_F(peer, g5_a_device_that_cannot_be_halted_loses_all_translations_when_mappings_change)
{
    changes_mappings(self);
    EXPECT_EQ(self->chip->halts, 0);
}

TEST(g5_a_device_is_halted_while_the_space_hears_of_a_change)
{
    struct fixture_peer self;
    struct chip *chip = chip_with_mmu("chip", 8 * MIB, PS_MODE_EXCLUSIVE, 0);
    chip_halts(chip);
    self.chip = chip;
    self.space = space_of(HOST, "compressed:64M", 1, &chip);
    self.device = device_at(self.space, 1);
    OK(ps_region_create(self.space, BYTES, &self.region));
    self.memory = memory_of(self.region);
    changes_mappings(&self);
    EXPECT_GE(chip->halts, 1);
    EXPECT_EQ(chip->halted, 0);
    teardown_peer(&self);
}

TEST(g5_g16_a_device_that_does_not_let_go_is_quarantined)
{
    struct fixture_peer self;
    uint64_t got;
    set_up(&self, PS_MODE_REPLICATE, 0);
    fill(self.memory, BYTES, 4);
    EXPECT_EQ(wrong_for_chip(self.chip, self.memory, MIB, 4), 0);
    self.chip->unmap_result = EIO;
    /* The write waits for the copy to go: the device fails to, and is cut off. */
    *(uint64_t *)self.memory = 1;
    EXPECT_EQ(*(uint64_t *)self.memory, 1);
    REFUSED(ps_port_fault(self.chip->port, (uint64_t)(uintptr_t)self.memory + MIB, PS_ACCESS_READ), PS_ERR_CUT, "cut off");
    /* It had copies alone: nothing is lost. */
    *(uint64_t *)self.memory = word(4, 0);
    EXPECT_EQ(wrong(self.memory, BYTES, 4), 0);
    OK(ps_read(self.space, self.memory, &got, sizeof got));
    OK(ps_region_release(self.region));
    OK(ps_space_release(self.space));
}

TEST(g5_unmaps_may_take_their_time_up_to_the_deadline)
{
    struct fixture_peer self;
    set_up(&self, PS_MODE_EXCLUSIVE, 0);
    self.chip->fences = 3;
    fill(self.memory, BYTES, 5);
    EXPECT_EQ(wrong_for_chip(self.chip, self.memory, BYTES, 5), 0);
    EXPECT_EQ(wrong(self.memory, BYTES, 5), 0);
    EXPECT_GE(self.chip->asked, 4);
    self.chip->fences = 0;
    teardown_peer(&self);
}

TEST(g5_a_fence_that_is_never_reached_ends_with_the_deadline)
{
    struct chip *chip = chip_with_mmu("chip", 8 * MIB, PS_MODE_REPLICATE, 0);
    ps_region region;
    chip->mmu.deadline_ms = 200;
    ps_space space = space_of(HOST, "compressed:64M", 1, &chip);
    OK(ps_region_create(space, BYTES, &region));
    unsigned char *memory = memory_of(region);
    fill(memory, BYTES, 6);
    EXPECT_EQ(wrong_for_chip(chip, memory, MIB, 6), 0);
    chip->fences = -1;
    *(volatile uint64_t *)memory = 1;
    *(volatile uint64_t *)memory = word(6, 0);
    EXPECT_EQ(wrong(memory, BYTES, 6), 0);
    EXPECT_EQ(ps_port_fault(chip->port, (uint64_t)(uintptr_t)memory, PS_ACCESS_READ), PS_ERR_CUT);
    OK(ps_region_release(region));
    OK(ps_space_release(space));
}

TEST(g7_a_device_that_is_full_evicts_its_coldest)
{
    struct chip *chip = chip_with_mmu("chip", 2 * MIB, PS_MODE_EXCLUSIVE, 0);
    ps_region region;
    ps_space space = space_of(HOST, "compressed:64M", 1, &chip);
    OK(ps_region_create(space, BYTES, &region));
    unsigned char *memory = memory_of(region);
    fill(memory, BYTES, 7);
    for (int round = 0; round < 2; round++)
        EXPECT_EQ(wrong_for_chip(chip, memory, BYTES, 7), 0);
    EXPECT_GE(device_statistics_of(device_at(space, 1)).mmu_evicted, 1);
    EXPECT_EQ(wrong(memory, BYTES, 7), 0);
    OK(ps_region_release(region));
    OK(ps_space_release(space));
}

TEST(g9_copies_go_when_anybody_writes)
{
    struct fixture_peer self;
    uint64_t got;
    set_up(&self, PS_MODE_REPLICATE, 0);
    fill(self.memory, BYTES, 8);
    EXPECT_EQ(wrong_for_chip(self.chip, self.memory, BYTES, 8), 0);
    EXPECT_GE(device_statistics_of(self.device).mmu_replicated, BYTES / self.chip->page);
    /* Both have it, and reading takes nothing away. */
    EXPECT_EQ(wrong(self.memory, BYTES, 8), 0);
    EXPECT(chip_has(self.chip, self.memory, 0));
    self.memory[0] ^= 1;
    EXPECT_EQ(chip_has(self.chip, self.memory, 0), 0);
    OK(chip_read(self.chip, self.memory, &got));
    EXPECT_EQ(got, word(8, 0) ^ 1);
    teardown_peer(&self);
}

TEST(g10_a_device_that_can_accesses_the_host_in_place)
{
    struct fixture_peer self;
    uint64_t got;
    set_up(&self, PS_MODE_SHARE, PS_MMU_REMOTE);
    fill(self.memory, BYTES, 9);
    EXPECT_EQ(wrong_for_chip(self.chip, self.memory, BYTES, 9), 0);
    EXPECT_GE(self.chip->host_maps, 1);
    EXPECT_EQ(device_statistics_of(self.device).mmu_moved, 0);
    OK(chip_write(self.chip, self.memory, 1));
    EXPECT_EQ(*(uint64_t *)self.memory, 1);
    *(uint64_t *)self.memory = 2;
    OK(chip_read(self.chip, self.memory, &got));
    EXPECT_EQ(got, 2);
    OK(ps_port_note_remote(self.chip->port, (uint64_t)(uintptr_t)self.memory, 10));
    /* Across the end of the page is not. */
    uint64_t last = (uint64_t)(uintptr_t)self.memory + self.chip->page - 4;
    EXPECT_NE(ps_port_read(self.chip->port, last, &got, 8), PS_OK);
    teardown_peer(&self);
}

TEST(g11_memory_that_stays_is_used_in_place_or_the_device_is_told_why_not)
{
    struct chip *chips[] = {chip_with_mmu("far", MIB, PS_MODE_SHARE, PS_MMU_REMOTE),
                            chip_with_mmu("near", MIB, PS_MODE_EXCLUSIVE, 0)};
    ps_space space = space_of(HOST, "compressed:64M", 2, chips);
    size_t page = chips[0]->page;
    ps_adopted adopted;
    uint64_t got;
    int file = memfd_create("stays", 0);
    ASSERT(file >= 0 && ftruncate(file, 4 * page) == 0);
    unsigned char *own = mmap(NULL, 4 * page, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    ASSERT(own != MAP_FAILED);
    fill(own, 4 * page, 22);
    OK(ps_adopt(space, own, 4 * page, &adopted));
    OK(chip_read(chips[0], own, &got));
    EXPECT_EQ(got, word(22, 0));
    OK(chip_write(chips[0], own + page, 5));
    EXPECT_EQ(*(uint64_t *)(own + page), 5);
    REFUSED(chip_read(chips[1], own, &got), PS_ERR_MIGRATE, "stays on the host");
    REFUSED(ps_port_fault(chips[0]->port, (uint64_t)(uintptr_t)own, PS_ACCESS_ATOMIC), PS_ERR_MIGRATE, "have it alone");
    ASSERT(ftruncate(file, 2 * page) == 0);
    REFUSED(chip_read(chips[0], own + 3 * page, &got), PS_ERR_RANGE, "end of its file");
    EXPECT_EQ(*(uint64_t *)own, word(22, 0));
    OK(ps_adopted_release(adopted));
    OK(ps_space_check(space));
    OK(ps_space_release(space));
}

TEST_F(peer, g13_regions_are_where_the_device_has_nothing_else)
{
    ps_region more;
    struct chip *narrow = chip_with_mmu("narrow", MIB, PS_MODE_EXCLUSIVE, 0);
    ps_device device;
    /* One that cannot translate what there is already is refused, with the address. */
    narrow->mmu.first_address = 4096;
    narrow->mmu.end_address = MIB;
    REFUSED(ps_device_attach(self->space, &narrow->ops, &device), PS_ERR_DEVICE, "cannot translate");
    EXPECT_EQ(narrow->destroyed, 0);
    self->chip->taken_start = (uint64_t)1 << 46;
    self->chip->taken_end = UINT64_MAX;
    OK(ps_region_create(self->space, BYTES, &more));
    EXPECT_LE((uint64_t)(uintptr_t)memory_of(more) + BYTES, (uint64_t)1 << 46);
    fill(memory_of(more), BYTES, 10);
    EXPECT_EQ(wrong_for_chip(self->chip, memory_of(more), BYTES, 10), 0);
    OK(ps_region_release(more));
    self->chip->taken_start = 0;
    REFUSED(ps_region_create(self->space, BYTES, &more), PS_ERR_RANGE, "have them free");
    self->chip->taken_end = 0;
}

static void *adds_on_cpu(void *word)
{
    for (int i = 0; i < 2000; i++)
        __atomic_fetch_add((uint64_t *)word, 1, __ATOMIC_SEQ_CST);
    return NULL;
}

TEST_F(peer, g14_atomic_operations_of_both_lose_nothing)
{
    pthread_t thread;
    uint64_t *counter = (uint64_t *)self->memory;
    OK(ps_exclusive(self->space, counter, 8, self->device));
    EXPECT(chip_has(self->chip, counter, 1));
    ASSERT_EQ(pthread_create(&thread, NULL, adds_on_cpu, counter), 0);
    for (int i = 0; i < 2000; i++)
        OK(chip_add(self->chip, counter, 1));
    pthread_join(thread, NULL);
    EXPECT_EQ(*counter, 4000);
    REFUSED(ps_exclusive(self->space, counter, 8, PS_HOST), PS_ERR_ARGUMENT, "PS_HOST");
    REFUSED(ps_exclusive(self->space, counter, 8, device_at(self->space, 0)),
            PS_ERR_DEVICE, "runs no code: pages are sent there by ps_region_migrate");
}

TEST_F(peer, g8_a_prefetch_sends_memory_there_and_back)
{
    ps_prefetch prefetch;
    size_t bytes;
    int done;
    fill(self->memory, BYTES, 11);
    OK(ps_prefetch_create(self->space, self->memory + 100, BYTES - 200, self->device, &prefetch));
    OK(ps_prefetch_wait(prefetch, &bytes));
    /* Rounded out. */
    EXPECT_EQ(bytes, BYTES);
    OK(ps_prefetch_is_done(prefetch, &done));
    EXPECT_EQ(done, 1);
    OK(ps_prefetch_release(prefetch));
    REFUSED(ps_prefetch_wait(prefetch, &bytes), PS_ERR_HANDLE, "released");
    uint64_t faults = device_statistics_of(self->device).mmu_faults;
    EXPECT_EQ(wrong_for_chip(self->chip, self->memory, BYTES, 11), 0);
    EXPECT_EQ(device_statistics_of(self->device).mmu_faults, faults);
    OK(ps_prefetch_create(self->space, self->memory, BYTES, PS_HOST, &prefetch));
    OK(ps_prefetch_cancel(prefetch));
    OK(ps_prefetch_wait(prefetch, &bytes));
    OK(ps_prefetch_release(prefetch));
    EXPECT_EQ(wrong(self->memory, BYTES, 11), 0);
    REFUSED(ps_prefetch_create(self->space, self->memory, BYTES, device_at(self->space, 0), &prefetch), PS_ERR_DEVICE,
            "runs no code");
}

TEST_F(peer, g8_hints_are_heard_and_taken_back)
{
    for (uint32_t hint = PS_HINT_NORMAL; hint <= PS_HINT_NOT_ACCESSED_BY; hint++) {
        int needs = hint >= PS_HINT_ACCESSED_BY;
        OK(ps_region_advise(self->region, hint, needs ? self->device : PS_HOST));
        if (needs)
            REFUSED(ps_region_advise(self->region, hint, PS_HOST), PS_ERR_ARGUMENT, "PS_HOST");
        else if (hint != PS_HINT_PREFER)
            REFUSED(ps_region_advise(self->region, hint, self->device), PS_ERR_ARGUMENT, "about no device");
    }
    REFUSED(ps_region_advise(self->region, 10, PS_HOST), PS_ERR_ARGUMENT, "hint is 10");
    REFUSED(ps_region_advise(self->region, PS_HINT_PREFER, device_at(self->space, 0)),
            PS_ERR_DEVICE, "runs no code: pages are sent there by ps_region_migrate");
    /* Read-mostly: reads of the device leave the CPU its copy, where they took it away before. */
    fill(self->memory, BYTES, 12);
    OK(ps_region_advise(self->region, PS_HINT_READ_MOSTLY, PS_HOST));
    EXPECT_EQ(wrong_for_chip(self->chip, self->memory, BYTES, 12), 0);
    EXPECT_GE(device_statistics_of(self->device).mmu_replicated, BYTES / self->chip->page);
    EXPECT_EQ(wrong(self->memory, BYTES, 12), 0);
    EXPECT(chip_has(self->chip, self->memory, 0));
}

TEST(g8_copies_go_from_device_to_device)
{
    struct chip *chips[2];
    for (int i = 0; i < 2; i++) {
        chips[i] = chip_with_mmu(i ? "second" : "first", 8 * MIB, PS_MODE_EXCLUSIVE, 0);
        chip_copies(chips[i]);
    }
    ps_space space = space_of(HOST, "compressed:64M", 2, chips);
    ps_region region;
    OK(ps_region_create(space, 2 * BYTES, &region));
    unsigned char *memory = memory_of(region);
    fill(memory, BYTES, 13);
    EXPECT_EQ(wrong_for_chip(chips[0], memory, BYTES, 13), 0);
    for (size_t at = BYTES; at < 2 * BYTES; at += chips[1]->page)
        OK(chip_write(chips[1], memory + at, 1));
    long stores = chips[1]->stores;
    OK(ps_copy(space, memory + BYTES, memory, BYTES));
    EXPECT_GE(chips[1]->copies, 1);
    EXPECT_EQ(chips[1]->stores, stores);
    EXPECT(chip_has(chips[0], memory, 0));
    /* G6: and a page that the other one wants goes there directly. */
    long copies = chips[1]->copies;
    OK(chip_write(chips[1], memory, word(13, 0)));
    EXPECT_GE(chips[1]->copies, copies + 1);
    EXPECT_EQ(wrong(memory + BYTES, BYTES, 13), 0);
    EXPECT_EQ(wrong(memory, BYTES, 13), 0);
    for (int i = 0; i < 2; i++)
        EXPECT_EQ(chips[i]->freed_wrongly, 0);
    OK(ps_region_release(region));
    OK(ps_space_release(space));
}

TEST_F(peer, z3_a_device_that_runs_code_can_be_detached)
{
    fill(self->memory, BYTES, 14);
    EXPECT_EQ(wrong_for_chip(self->chip, self->memory, BYTES, 14), 0);
    ps_port port = self->chip->port;
    OK(ps_device_detach(self->device));
    EXPECT_EQ(self->chip->destroyed, 1);
    REFUSED(ps_port_fault(port, (uint64_t)(uintptr_t)self->memory, PS_ACCESS_READ), PS_ERR_HANDLE, "port");
    EXPECT_EQ(chip_has(self->chip, self->memory, 0), 0);
    EXPECT_EQ(wrong(self->memory, BYTES, 14), 0);
}

TEST_F(peer, g12_a_child_has_what_was_on_the_device)
{
    int status;
    fill(self->memory, BYTES, 15);
    EXPECT_EQ(wrong_for_chip(self->chip, self->memory, BYTES, 15), 0);
    pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
        EXPECT_EQ(wrong(self->memory, BYTES, 15), 0);
        fill(self->memory, BYTES, 16);
        fflush(stdout);
        _exit(failures);
    }
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT_EQ(status, 0);
    EXPECT_EQ(wrong_for_chip(self->chip, self->memory, BYTES, 15), 0);
}

/* A launch: every item is a page, whose words are to be doubled by the chip. */
struct job {
    struct fixture_peer *peer;
    uint64_t items;
    int pieces, fail_at, nested;
};

static int doubles(void *context, const ps_piece *piece)
{
    struct job *job = context;
    struct chip *chip = job->peer->chip;
    uint32_t faults;
    ps_region region;
    job->pieces++;
    job->items += piece->items;
    EXPECT_EQ(piece->operand_count, 2);
    for (uint64_t at = piece->operands[0].start; at < piece->operands[0].end; at += 8) {
        pthread_mutex_lock(&chip->lock);
        pthread_mutex_unlock(&chip->lock);
        uint64_t got;
        /* It cannot fault: everything is there. */
        if (!chip_has(chip, (void *)(uintptr_t)at, 1))
            return EFAULT;
        OK(chip_read(chip, (void *)(uintptr_t)at, &got));
        OK(chip_write(chip, (void *)(uintptr_t)at, 2 * got));
    }
    /* Questions are answered, and nothing else. */
    OK(ps_space_faults(job->peer->space, &faults));
    job->nested += ps_region_create(job->peer->space, 1, &region) == PS_ERR_REENTRANT;
    job->nested += ps_region_release(job->peer->region) == PS_ERR_REENTRANT;
    return job->pieces == job->fail_at ? 5 : 0;
}

TEST(g4_launches_of_a_device_that_cannot_fault)
{
    struct fixture_peer self;
    set_up(&self, PS_MODE_EXCLUSIVE, PS_MMU_NO_FAULTS);
    size_t page = self.chip->page;
    struct job job = { .peer = &self };
    fill(self.memory, BYTES, 17);
    ps_operand operands[] = {
        { .start = self.memory, .bytes = page, .each = 1 },
        { .start = self.memory + 3 * MIB, .bytes = 100 },
    };
    ps_launch launch = {
        .size = sizeof launch,
        .device = self.device,
        .items = 64,
        .at_most = 20,
        .operands = operands,
        .operand_count = 2,
        .work = doubles,
        .context = &job,
    };
    ps_launch_report report = { .size = sizeof report };
    OK(ps_launch_run(&launch, &report));
    EXPECT_EQ(report.items, 64);
    EXPECT_EQ(report.pieces, 4);
    EXPECT_EQ(job.items, 64);
    EXPECT_EQ(job.nested, 8);
    const uint64_t *words = (const uint64_t *)self.memory;
    size_t bad = 0;
    for (size_t i = 0; i < 64 * page / 8; i++)
        bad += words[i] != 2 * word(17, i);
    EXPECT_EQ(bad, 0);
    EXPECT_EQ(wrong(self.memory + 64 * page, BYTES - 64 * page, 17 + 64 * page / 8), 0);

    job = (struct job){ .peer = &self, .fail_at = 2 };
    REFUSED(ps_launch_run(&launch, NULL), PS_ERR_WORK, "items 20..40 returned 5");
    operands[1].bytes = 0;
    REFUSED(ps_launch_run(&launch, NULL), PS_ERR_RANGE, "no byte");
    operands[1] = (ps_operand){ .start = &job, .bytes = 8 };
    EXPECT_EQ(ps_launch_run(&launch, NULL), PS_ERR_MIGRATE);
    operands[1] = (ps_operand){ .start = self.memory, .bytes = UINT64_MAX };
    REFUSED(ps_launch_run(&launch, NULL), PS_ERR_RANGE, "operands[1]");
    launch.operand_count = 0;
    REFUSED(ps_launch_run(&launch, NULL), PS_ERR_RANGE, "no operand");
    launch.work = NULL;
    REFUSED(ps_launch_run(&launch, NULL), PS_ERR_ARGUMENT, "work is null");
    launch.device = PS_HOST;
    launch.work = doubles;
    REFUSED(ps_launch_run(&launch, NULL), PS_ERR_HANDLE, "device");
    teardown_peer(&self);
}

/* Two threads of the device and one of the CPU, on the same pages at once. */
struct lane {
    struct fixture_peer *peer;
    int number;
    ps_status status;
};

static void *counts(void *of)
{
    struct lane *lane = of;
    for (int round = 0; round < 400 && lane->status == PS_OK; round++) {
        size_t page = word(lane->number, round) % 32;
        uint64_t *at = (uint64_t *)(lane->peer->memory + page * lane->peer->chip->page) + lane->number;
        if (lane->number == 0)
            ++*at;
        else
            lane->status = chip_add(lane->peer->chip, at, 1);
    }
    return NULL;
}

TEST_F(peer, g4_cpu_and_device_share_pages_word_by_word)
{
    struct lane lanes[3];
    pthread_t threads[3];
    uint64_t counted = 0;
    for (int i = 0; i < 3; i++) {
        lanes[i] = (struct lane){ .peer = self, .number = i, .status = PS_OK };
        ASSERT_EQ(pthread_create(&threads[i], NULL, counts, &lanes[i]), 0);
    }
    for (int i = 0; i < 3; i++) {
        pthread_join(threads[i], NULL);
        EXPECT_EQ(lanes[i].status, PS_OK);
    }
    for (int page = 0; page < 32; page++)
        for (int i = 0; i < 3; i++)
            counted += ((uint64_t *)(self->memory + page * self->chip->page))[i];
    EXPECT_EQ(counted, 3 * 400);
}
