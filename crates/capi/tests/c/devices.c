/* Devices in C that are memory alone: what they are asked, how they fail, how they come and go. */

#include "chip.h"
#include "harness.h"
#include <errno.h>
#include <sys/mman.h>

enum { HOST = 8 << 20, BYTES = 32 << 20 };

/* A region that is filled, and mostly on the chips. */
static unsigned char *filled(ps_space space, ps_region *region, uint64_t seed)
{
    OK(ps_region_create(space, BYTES, region));
    fill(memory_of(*region), BYTES, seed);
    return memory_of(*region);
}

TEST(z11_devices_without_their_functions_are_refused)
{
    struct chip *first = chip_new("first", 64 * MIB);
    ps_space space = space_of(HOST, NULL, 1, &first);
    ps_device device;
    struct chip *chip = chip_with_mmu("chip", 16 * MIB, PS_MODE_EXCLUSIVE, 0);
    const ps_device_ops good = chip->ops;
    const ps_mmu_ops good_mmu = chip->mmu;
#define LACKS(change, words)                                                                                           \
    do {                                                                                                               \
        chip->ops = good;                                                                                              \
        chip->mmu = good_mmu;                                                                                          \
        change;                                                                                                        \
        REFUSED(ps_device_attach(space, &chip->ops, &device), PS_ERR_ARGUMENT, words);                                 \
    } while (0)
    LACKS(chip->ops.store = NULL, "no function `store`");
    LACKS(chip->ops.load = NULL, "no function `load`");
    LACKS(chip->ops.freed = NULL, "no function `freed`");
    LACKS(chip->ops.memory = PS_MEMORY_COHERENT, "no function `shared`");
    LACKS(chip->ops.memory = 2, "PS_MEMORY_COHERENT");
    LACKS(chip->ops.flags = PS_DEVICE_COMPARES, "no function `holds`");
    LACKS(chip->ops.flags = 1 << 30, "mean nothing");
    LACKS(chip->ops.name = NULL, "name is null");
    LACKS(chip->ops.name = "", "1 to 63 bytes");
    LACKS(chip->ops.name = "\xff", "UTF-8");
    LACKS(chip->ops.name = "more than sixty-three bytes, which is more than a name for reports needs", "1 to 63 bytes");
    LACKS(chip->mmu.map = NULL, "no function `map`");
    LACKS(chip->mmu.unmap = NULL, "no function `unmap`");
    LACKS(chip->mmu.attached = NULL, "no function `attached`");
    LACKS((chip_halts(chip), chip->mmu.go_on = NULL), "no function `go_on`");
    LACKS((chip_halts(chip), chip->mmu.halt = NULL), "no function `halt`");
    LACKS(chip->mmu.mode = 3, "mode is 3");
    LACKS(chip->mmu.mode = PS_MODE_SHARE, "needs PS_MMU_REMOTE");
    LACKS(chip->mmu.flags = 8, "mean nothing");
    LACKS((chip->mmu.first_address = 8192, chip->mmu.end_address = 4096), "no address");
#undef LACKS
    chip->ops = good;
    chip->mmu = good_mmu;
    chip->ops.pages = 0;
    EXPECT_NE(ps_device_attach(space, &chip->ops, &device), PS_OK);
    /* What was refused was not taken. */
    EXPECT_EQ(chip->destroyed, 0);
    chip->ops = good;
    OK(ps_device_attach(space, &chip->ops, &device));
    OK(ps_device_detach(device));
    EXPECT_EQ(chip->destroyed, 1);
    OK(ps_space_release(space));
}

TEST(a_space_that_cannot_be_made_takes_no_device)
{
    struct chip *chip = chip_new("chip", 16 * MIB);
    ps_device_choice devices[] = { { .ops = &chip->ops }, { .spec = "file:/nowhere/at/all" } };
    ps_space_options options = {
        .size = sizeof options, .host_bytes = HOST, .devices = devices, .device_count = 2,
    };
    ps_space space;
    REFUSED(ps_space_create(&options, &space), PS_ERR_DEVICE, "/nowhere");
    options.host_bytes = 1;
    options.device_count = 1;
    REFUSED(ps_space_create(&options, &space), PS_ERR_BUDGET, "bytes are needed");
    EXPECT_EQ(chip->destroyed, 0);
}

TEST(g7_a_device_that_is_full_says_so_and_the_next_one_is_used)
{
    struct chip *chips[] = { chip_new("small", 64 * MIB), chip_new("large", 64 * MIB) };
    chips[0]->room = 1024;
    ps_space space = space_of(HOST, NULL, 2, chips);
    ps_region region;
    unsigned char *memory = filled(space, &region, 1);
    EXPECT_EQ(wrong(memory, BYTES, 1), 0);
    EXPECT_GE(chips[0]->stores, 1);
    EXPECT_GE(chips[1]->stores, 1);
    EXPECT_EQ(statistics_of(space).poisoned, 0);
    EXPECT_EQ(statistics_of(space).device_errors, 0);
    OK(ps_region_release(region));
    OK(ps_space_release(space));
}

TEST(z3_a_device_that_is_detached_has_given_everything_back)
{
    struct chip *chips[] = { chip_new("goes", 64 * MIB), chip_new("stays", 64 * MIB) };
    ps_space space = space_of(HOST, NULL, 2, chips);
    ps_region region;
    unsigned char *memory = filled(space, &region, 2);
    ps_device goes = device_at(space, 0), stays = device_at(space, 1);
    EXPECT_GE(chips[0]->stores, (BYTES - HOST) / (long)chips[0]->page);
    OK(ps_device_detach(goes));
    EXPECT_EQ(chips[0]->destroyed, 1);
    REFUSED(ps_device_detach(goes), PS_ERR_HANDLE, "released");
    EXPECT_EQ(wrong(memory, BYTES, 2), 0);
    EXPECT_EQ(chips[0]->freed_wrongly, 0);
    /* There is no room for what the other one holds: nothing has changed, and it is said how much is missing. */
    REFUSED(ps_device_detach(stays), PS_ERR_NO_ROOM, "bytes of what it holds have no room");
    EXPECT_EQ(chips[1]->destroyed, 0);
    EXPECT_EQ(wrong(memory, BYTES, 2), 0);
    OK(ps_region_release(region));
    OK(ps_space_release(space));
    EXPECT_EQ(chips[1]->destroyed, 1);
}

TEST(z9_a_page_that_cannot_be_had_back_is_lost_and_no_other)
{
    static uint64_t buffer[512];
    struct chip *chip = chip_new("chip", 64 * MIB);
    ps_space space = space_of(HOST, NULL, 1, &chip);
    ps_region region;
    unsigned char *memory = filled(space, &region, 3);
    size_t page = chip->page, lost = 0, at = 0;
    chip->bad_page = 100;
    for (size_t i = 0; i < BYTES; i += page) {
        ps_status status = ps_read(space, memory + i, buffer, page < sizeof buffer ? page : sizeof buffer);
        if (status == PS_ERR_LOST) {
            char where[32];
            snprintf(where, sizeof where, "%zx", (size_t)(memory + i));
            EXPECT(strstr(ps_last_error(), where) != NULL && strstr(ps_last_error(), "chip") != NULL);
            lost++;
            at = i;
            continue;
        }
        ASSERT_EQ(status, PS_OK);
        EXPECT_EQ(wrong(buffer, page < sizeof buffer ? page : sizeof buffer, 3 + i / 8), 0);
    }
    ASSERT_EQ(lost, 1);
    EXPECT_EQ(statistics_of(space).poisoned, 1);
    EXPECT_GE(statistics_of(space).device_errors, 1);
    /* A plain access says so by SIGBUS. */
    int status;
    pid_t child = fork();
    ASSERT_GE(child, 0);
    if (child == 0) {
        signal(SIGBUS, SIG_DFL);
        volatile unsigned char *byte = memory + at;
        _exit(*byte == 0 ? 42 : 43);
    }
    ASSERT_EQ(waitpid(child, &status, 0), child);
    EXPECT(WIFSIGNALED(status) && WTERMSIG(status) == SIGBUS);
    /* Once discarded, the page is usable again. */
    OK(ps_region_discard(region, at, page));
    fill(memory + at, page, 3 + at / 8);
    EXPECT_EQ(wrong(memory + at, page, 3 + at / 8), 0);
    /* And nothing else is put where it was. */
    EXPECT_EQ(device_statistics_of(device_at(space, 0)).retired_bytes, page);
    fill(memory, BYTES, 4);
    EXPECT_EQ(wrong(memory, BYTES, 4), 0);
    EXPECT_EQ(statistics_of(space).poisoned, 1);
    OK(ps_region_release(region));
    OK(ps_space_release(space));
}

TEST(z9_answers_that_were_not_given_count_as_failures)
{
    uint64_t word_read;
    struct chip *chip = chip_new("chip", 64 * MIB);
    ps_space space = space_of(HOST, NULL, 1, &chip);
    ps_region region;
    unsigned char *memory = filled(space, &region, 4);
    size_t lost = 0;
    chip->silent = 1;
    for (size_t i = 0; i < BYTES; i += 64 * chip->page) {
        ps_status status = ps_read(space, memory + i, &word_read, sizeof word_read);
        lost += status == PS_ERR_LOST;
        EXPECT(status == PS_ERR_LOST || word_read == word(4, i / 8));
    }
    EXPECT_GE(lost, 1);
    OK(ps_region_release(region));
    OK(ps_space_release(space));
}

TEST(z9_a_device_that_is_gone_loses_what_it_alone_has)
{
    uint64_t word_read;
    struct chip *chips[] = { chip_new("gone", 64 * MIB), chip_new("other", 64 * MIB) };
    ps_space space = space_of(HOST, NULL, 2, chips);
    ps_region region, after;
    unsigned char *memory = filled(space, &region, 5);
    size_t lost = 0, pages = BYTES / chips[0]->page;
    OK(ps_device_fail(device_at(space, 0)));
    long asked = chips[0]->loads + chips[0]->stores;
    for (size_t p = 0; p < pages; p++) {
        ps_status status = ps_read(space, memory + p * chips[0]->page, &word_read, sizeof word_read);
        lost += status == PS_ERR_LOST;
        EXPECT(status == PS_ERR_LOST || word_read == word(5, p * chips[0]->page / 8));
    }
    EXPECT_GE(lost, (BYTES - HOST) / chips[0]->page / 2);
    EXPECT_LE(lost, pages - 1);
    /* The other one takes its part. */
    unsigned char *more = filled(space, &after, 6);
    EXPECT_EQ(wrong(more, BYTES, 6), 0);
    EXPECT_GE(chips[1]->stores, 1);
    EXPECT_EQ(chips[0]->loads + chips[0]->stores, asked);
    OK(ps_region_release(after));
    OK(ps_region_release(region));
    OK(ps_space_release(space));
}

TEST(g16_pages_that_cannot_be_stored_stay)
{
    struct chip *chips[] = { chip_new("refuses", 64 * MIB), chip_new("other", 64 * MIB) };
    chips[0]->store_result = EIO;
    ps_space space = space_of(HOST, NULL, 2, chips);
    ps_region region;
    unsigned char *memory = filled(space, &region, 7);
    EXPECT_EQ(wrong(memory, BYTES, 7), 0);
    EXPECT_EQ(statistics_of(space).poisoned, 0);
    EXPECT_GE(statistics_of(space).device_errors, 1);
    EXPECT_EQ(chips[0]->stores, 0);
    EXPECT_GE(device_statistics_of(device_at(space, 0)).errors, 1);
    OK(ps_region_release(region));
    OK(ps_space_release(space));
}

TEST(z9_a_device_that_hangs_is_given_up_after_its_deadline)
{
    uint64_t word_read;
    struct chip *chips[] = { chip_new("hangs", 64 * MIB), chip_new("other", 64 * MIB) };
    chips[0]->ops.deadline_ms = 300;
    ps_space space = space_of(HOST, NULL, 2, chips);
    ps_region region;
    unsigned char *memory = filled(space, &region, 8);
    size_t lost = 0;
    EXPECT_GE(chips[0]->stores, 1);
    chips[0]->slow = 3000;
    for (size_t i = 0; i < BYTES; i += 64 * chips[0]->page)
        lost += ps_read(space, memory + i, &word_read, sizeof word_read) == PS_ERR_LOST;
    EXPECT_GE(lost, 1);
    chips[0]->slow = 0;
    /* Everything else goes on. */
    OK(ps_region_discard(region, 0, BYTES));
    fill(memory, BYTES, 9);
    EXPECT_EQ(wrong(memory, BYTES, 9), 0);
    EXPECT_GE(chips[1]->stores, 1);
    OK(ps_region_release(region));
    OK(ps_space_release(space));
}

TEST(calls_from_inside_of_a_device_are_refused)
{
    struct chip *chip = chip_new("chip", 64 * MIB);
    ps_space space = space_of(HOST, NULL, 1, &chip);
    ps_region region;
    chip->reenters = 1;
    unsigned char *memory = filled(space, &region, 10);
    EXPECT_EQ(wrong(memory, BYTES, 10), 0);
    EXPECT_EQ(chip->reentered, 1);
    OK(ps_region_release(region));
    OK(ps_space_release(space));
}

static int shared_fd;

static int coherent_shared(void *context, uint64_t page, int *fd, uint64_t *offset)
{
    struct chip *chip = context;
    *fd = shared_fd;
    *offset = page * chip->page;
    return 0;
}

TEST(z5_coherent_memory_is_used_in_place)
{
    struct chip *chips[] = { chip_new("behind", 64 * MIB), chip_new("beside", 16 * MIB) };
    shared_fd = memfd_create("beside", 0);
    ASSERT_GE(shared_fd, 0);
    ASSERT_EQ(ftruncate(shared_fd, 16 * MIB), 0);
    munmap(chips[1]->memory, 16 * MIB);
    chips[1]->memory = mmap(NULL, 16 * MIB, PROT_READ | PROT_WRITE, MAP_SHARED, shared_fd, 0);
    ASSERT(chips[1]->memory != MAP_FAILED);
    chips[1]->ops.memory = PS_MEMORY_COHERENT;
    chips[1]->ops.shared = coherent_shared;
    ps_space space = space_of(HOST, NULL, 2, chips);
    ps_device beside = device_at(space, 1);
    ps_region region;
    size_t bytes;
    unsigned char *memory = filled(space, &region, 11);
    OK(ps_region_migrate(region, 0, 4 * MIB, beside, &bytes));
    EXPECT_EQ(bytes, 4 * MIB);
    EXPECT_EQ(device_statistics_of(beside).in_place_bytes, 4 * MIB);
    EXPECT(strcmp(device_statistics_of(beside).memory, "coherent") == 0);
    /* Accesses move nothing. */
    long loads = chips[1]->loads;
    EXPECT_EQ(wrong(memory, 4 * MIB, 11), 0);
    fill(memory, MIB, 12);
    EXPECT_EQ(chips[1]->loads, loads);
    EXPECT_EQ(device_statistics_of(beside).in_place_bytes, 4 * MIB);
    /* A long-term pin moves the page out. */
    ps_pin pin;
    OK(ps_pin_create(space, memory, 4096, PS_USE_WRITE, &pin));
    EXPECT_LE(device_statistics_of(beside).in_place_bytes, 4 * MIB - 4096);
    OK(ps_pin_release(pin));
    OK(ps_region_migrate(region, 0, 4 * MIB, PS_HOST, &bytes));
    EXPECT_EQ(device_statistics_of(beside).in_place_bytes, 0);
    EXPECT_EQ(wrong(memory, MIB, 12), 0);
    EXPECT_EQ(wrong(memory + MIB, BYTES - MIB, 11 + MIB / 8), 0);
    EXPECT_EQ(chips[1]->freed_wrongly, 0);
    OK(ps_region_release(region));
    OK(ps_space_release(space));
}

TEST(z8_sent_to_private_memory_pages_come_home_when_they_are_touched)
{
    struct chip *chips[] = { chip_new("behind", 64 * MIB), chip_new("private", 16 * MIB) };
    chips[1]->ops.flags = PS_DEVICE_ONLY_SENT;
    ps_space space = space_of(HOST, NULL, 2, chips);
    ps_device private = device_at(space, 1);
    ps_region region;
    size_t bytes;
    unsigned char *memory = filled(space, &region, 13);
    EXPECT_EQ(chips[1]->stores, 0);
    OK(ps_region_migrate(region, 0, 4 * MIB, private, &bytes));
    EXPECT_EQ(bytes, 4 * MIB);
    EXPECT_EQ(device_statistics_of(private).used_bytes, 4 * MIB);
    EXPECT_EQ(wrong(memory, BYTES, 13), 0);
    EXPECT_GE(chips[1]->loads, 4 * (long)MIB / (long)chips[1]->page);
    REFUSED(ps_region_migrate(region, 0, BYTES, private, &bytes), PS_ERR_MIGRATE, "private");
    EXPECT_EQ(wrong(memory, BYTES, 13), 0);
    OK(ps_region_release(region));
    OK(ps_space_release(space));
}
