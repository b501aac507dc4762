/* The device of chip.h. Its memory and tables are mappings of its own, which no space manages; callbacks allocate nothing. */

#include "chip.h"

#include "harness.h"
#include <errno.h>
#include <sys/mman.h>
#include <time.h>

static void *map_memory(size_t bytes)
{
    void *at = mmap(NULL, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    ASSERT(at != MAP_FAILED);
    return at;
}

static void wait_a_little(struct chip *chip)
{
    int ms = atomic_load(&chip->slow);
    struct timespec time = { ms / 1000, (ms % 1000) * 1000000L };
    if (ms > 0)
        nanosleep(&time, NULL);
}

static void chip_store(void *context, ps_store *batch, size_t count)
{
    struct chip *chip = context;
    if (atomic_load(&chip->reenters)) {
        uint64_t faults;
        ps_region region;
        int refused = ps_region_create(chip->space, 1, &region) == PS_ERR_REENTRANT;
        refused &= ps_space_faults(chip->space, (uint32_t *)&faults) == PS_ERR_REENTRANT;
        refused &= ps_space_release(chip->space) == PS_ERR_REENTRANT;
        refused &= ps_port_fault(chip->port, (uint64_t)(uintptr_t)batch, PS_ACCESS_READ) == PS_ERR_REENTRANT;
        refused &= strstr(ps_last_error(), "ps_port_fault: called from inside of a callback") != NULL;
        atomic_store(&chip->reentered, refused ? 1 : -1);
    }
    wait_a_little(chip);
    for (size_t i = 0; i < count && !atomic_load(&chip->silent); i++) {
        size_t n = batch[i].len / chip->page;
        batch[i].result = atomic_load(&chip->store_result);
        if (batch[i].result != 0)
            continue;
        if (atomic_load(&chip->room) >= 0 && atomic_fetch_sub(&chip->room, (long)n) < (long)n) {
            atomic_fetch_add(&chip->room, (long)n);
            batch[i].result = ENOSPC;
            continue;
        }
        memcpy(chip->memory + batch[i].page * chip->page, batch[i].bytes, batch[i].len);
        for (size_t p = 0; p < n; p++)
            atomic_store(&chip->holds[batch[i].page + p], 1);
        atomic_fetch_add(&chip->stores, (long)n);
    }
}

static void chip_load(void *context, ps_load *batch, size_t count)
{
    struct chip *chip = context;
    wait_a_little(chip);
    for (size_t i = 0; i < count && !atomic_load(&chip->silent); i++) {
        uint64_t n = batch[i].len / chip->page;
        long bad = atomic_load(&chip->bad_page);
        batch[i].result = atomic_load(&chip->load_result);
        if (bad >= 0 && (uint64_t)bad - batch[i].page < n)
            batch[i].result = EBADMSG;
        memcpy(batch[i].bytes, chip->memory + batch[i].page * chip->page, batch[i].len);
        atomic_fetch_add(&chip->loads, (long)n);
    }
}

static void chip_freed(void *context, uint64_t first, uint64_t count)
{
    struct chip *chip = context;
    for (uint64_t p = first; p < first + count; p++)
        if (!atomic_exchange(&chip->holds[p], 0))
            atomic_fetch_add(&chip->freed_wrongly, 1);
    atomic_fetch_add(&chip->freed, (long)count);
    if (atomic_load(&chip->room) >= 0)
        atomic_fetch_add(&chip->room, (long)count);
}

static void chip_before_fork(void *context)
{
    struct chip *chip = context;
    atomic_fetch_add(&chip->forks_before, 1);
    pthread_mutex_lock(&chip->lock);
}

static void chip_after_fork(void *context, int child)
{
    struct chip *chip = context;
    pthread_mutex_unlock(&chip->lock);
    atomic_fetch_add(&chip->forks_after, child ? 100 : 1);
}

static void chip_destroy(void *context)
{
    struct chip *chip = context;
    atomic_fetch_add(&chip->destroyed, 1);
}

static void chip_copy_from(void *context, void *peer_context, ps_peer_copy *batch, size_t count)
{
    struct chip *chip = context, *peer = peer_context;
    for (size_t i = 0; i < count; i++) {
        memcpy(chip->memory + batch[i].to, peer->memory + batch[i].from, batch[i].bytes);
        for (uint64_t at = batch[i].to; at < batch[i].to + batch[i].bytes; at += chip->page)
            atomic_store(&chip->holds[at / chip->page], 1);
        batch[i].result = 0;
    }
    atomic_fetch_add(&chip->copies, (long)count);
}

/* The MMU. */

static size_t place(const struct chip *chip, uint64_t address)
{
    return (size_t)(address / chip->page * 0x9e3779b97f4a7c15u >> 32) % chip->slots;
}

/* The entry of a page, or the empty one where it would be. Locked. */
static struct entry *look_up(struct chip *chip, uint64_t address)
{
    address -= address % chip->page;
    size_t i = place(chip, address);
    while (chip->table[i].address != 0 && chip->table[i].address != address + 1)
        i = (i + 1) % chip->slots;
    return &chip->table[i];
}

static void forget(struct chip *chip, uint64_t address)
{
    struct entry *hole = look_up(chip, address);
    if (hole->address == 0)
        return;
    /* What follows and could have been here moves up. */
    for (size_t i = hole - chip->table;;) {
        i = (i + 1) % chip->slots;
        struct entry *next = &chip->table[i];
        if (next->address == 0)
            break;
        size_t home = place(chip, next->address - 1), at = hole - chip->table;
        if ((i - home + chip->slots) % chip->slots >= (i - at + chip->slots) % chip->slots) {
            *hole = *next;
            hole = next;
        }
    }
    hole->address = 0;
}

static void chip_attached(void *context, ps_port port)
{
    struct chip *chip = context;
    chip->port = port;
}

static int chip_map(void *context, const ps_mapping *batch, size_t count)
{
    struct chip *chip = context;
    int result = atomic_load(&chip->map_result);
    if (result != 0)
        return result;
    pthread_mutex_lock(&chip->lock);
    for (size_t i = 0; i < count; i++) {
        const ps_mapping *m = &batch[i];
        for (uint64_t at = 0; at < m->bytes; at += chip->page) {
            struct entry *entry = look_up(chip, m->address + at);
            *entry = (struct entry){ m->address + at + 1, m->page + at / chip->page, m->target, m->writable };
        }
        atomic_fetch_add(&chip->zero_maps, m->target == PS_TARGET_ZERO);
        atomic_fetch_add(&chip->host_maps, m->target == PS_TARGET_HOST);
    }
    pthread_mutex_unlock(&chip->lock);
    atomic_fetch_add(&chip->maps, (long)count);
    return 0;
}

static int chip_unmap(void *context, uint64_t start, uint64_t end, uint64_t *fence)
{
    struct chip *chip = context;
    int result = atomic_load(&chip->unmap_result);
    if (result != 0)
        return result;
    pthread_mutex_lock(&chip->lock);
    if ((end - start) / chip->page < chip->slots) {
        for (uint64_t at = start; at < end; at += chip->page)
            forget(chip, at);
    } else {
        /* Whatever moves up to a place is looked at there. */
        for (size_t i = 0; i < chip->slots; i++)
            while (chip->table[i].address > start && chip->table[i].address <= end)
                forget(chip, chip->table[i].address - 1);
    }
    pthread_mutex_unlock(&chip->lock);
    atomic_fetch_add(&chip->unmaps, 1);
    if (atomic_load(&chip->fences) != 0)
        *fence = 77;
    return 0;
}

static int chip_halt(void *context, uint64_t *fence)
{
    struct chip *chip = context;
    (void)fence;
    int result = atomic_load(&chip->halt_result);
    /* Each access holds the lock. */
    pthread_mutex_lock(&chip->lock);
    chip->halted = result == 0;
    pthread_mutex_unlock(&chip->lock);
    atomic_fetch_add(&chip->halts, 1);
    return result;
}

static void chip_go_on(void *context)
{
    struct chip *chip = context;
    pthread_mutex_lock(&chip->lock);
    chip->halted = 0;
    pthread_cond_broadcast(&chip->goes_on);
    pthread_mutex_unlock(&chip->lock);
}

static int chip_is_done(void *context, uint64_t fence, uint32_t *done)
{
    struct chip *chip = context;
    int after = atomic_load(&chip->fences);
    *done = fence == 77 && after >= 0 && atomic_fetch_add(&chip->asked, 1) % (after + 1) == after;
    return 0;
}

static int chip_reserve(void *context, uint64_t start, uint64_t end)
{
    struct chip *chip = context;
    return start < chip->taken_end && chip->taken_start < end ? EEXIST : 0;
}

struct chip *chip_new(const char *name, size_t bytes)
{
    struct chip *chip = map_memory(sizeof *chip);
    chip->page = ps_page_size();
    chip->pages = bytes / chip->page;
    chip->memory = map_memory(bytes);
    chip->holds = map_memory(chip->pages);
    chip->room = -1;
    chip->bad_page = -1;
    pthread_mutex_init(&chip->lock, NULL);
    pthread_cond_init(&chip->goes_on, NULL);
    chip->ops = (ps_device_ops){
        .size = sizeof chip->ops,
        .context = chip,
        .name = name,
        .pages = chip->pages,
        .store = chip_store,
        .load = chip_load,
        .freed = chip_freed,
        .before_fork = chip_before_fork,
        .after_fork = chip_after_fork,
        .destroy = chip_destroy,
    };
    return chip;
}

struct chip *chip_with_mmu(const char *name, size_t bytes, uint32_t mode, uint32_t flags)
{
    struct chip *chip = chip_new(name, bytes);
    chip->slots = 1 << 17;
    chip->table = map_memory(chip->slots * sizeof *chip->table);
    chip->mmu = (ps_mmu_ops){
        .size = sizeof chip->mmu,
        .mode = mode,
        .flags = flags,
        .attached = chip_attached,
        .map = chip_map,
        .unmap = chip_unmap,
        .is_done = chip_is_done,
        .reserve = chip_reserve,
    };
    chip->ops.mmu = &chip->mmu;
    return chip;
}

void chip_halts(struct chip *chip)
{
    chip->mmu.halt = chip_halt;
    chip->mmu.go_on = chip_go_on;
}

void chip_copies(struct chip *chip)
{
    chip->ops.copy_from = chip_copy_from;
}

/* One access; `old` gets the word, and `word` is written, or added. */
static ps_status chip_access(struct chip *chip, const void *at, uint32_t access, uint64_t word, uint64_t *old)
{
    uint64_t address = (uint64_t)(uintptr_t)at;
    for (;;) {
        ps_status status = PS_ERR_NOT_MAPPED;
        pthread_mutex_lock(&chip->lock);
        while (chip->halted)
            pthread_cond_wait(&chip->goes_on, &chip->lock);
        struct entry entry = *look_up(chip, address);
        if (entry.address != 0 && (access == PS_ACCESS_READ || entry.writable)) {
            unsigned char *own = chip->memory + entry.page * chip->page + address % chip->page;
            status = PS_OK;
            if (entry.target == PS_TARGET_ZERO)
                *old = 0;
            else if (entry.target == PS_TARGET_OWN)
                memcpy(old, own, sizeof *old);
            else
                status = ps_port_read(chip->port, address, old, sizeof *old);
            uint64_t new = access == PS_ACCESS_ATOMIC ? *old + word : word;
            if (status == PS_OK && access != PS_ACCESS_READ) {
                if (entry.target == PS_TARGET_OWN)
                    memcpy(own, &new, sizeof new);
                else
                    status = ps_port_write(chip->port, address, &new, sizeof new);
            }
        }
        pthread_mutex_unlock(&chip->lock);
        if (status != PS_ERR_NOT_MAPPED)
            return status;
        status = ps_port_fault(chip->port, address, access);
        if (status != PS_OK)
            return status;
    }
}

ps_status chip_read(struct chip *chip, const void *at, uint64_t *word)
{
    return chip_access(chip, at, PS_ACCESS_READ, 0, word);
}

ps_status chip_write(struct chip *chip, void *at, uint64_t word)
{
    uint64_t old;
    return chip_access(chip, at, PS_ACCESS_WRITE, word, &old);
}

ps_status chip_add(struct chip *chip, void *at, uint64_t n)
{
    uint64_t old;
    return chip_access(chip, at, PS_ACCESS_ATOMIC, n, &old);
}

int chip_has(struct chip *chip, const void *at, int writable)
{
    pthread_mutex_lock(&chip->lock);
    /* As an access does: what a halted chip has, it does not use (rule G5). */
    while (chip->halted)
        pthread_cond_wait(&chip->goes_on, &chip->lock);
    struct entry entry = *look_up(chip, (uint64_t)(uintptr_t)at);
    pthread_mutex_unlock(&chip->lock);
    return entry.address != 0 && (entry.writable || !writable);
}

/* Spaces. */

uint32_t faults_to_test(void)
{
    const char *faults = getenv("PEERSPACE_TEST_FAULTS");
    if (faults == NULL)
        return PS_FAULTS_AUTO;
    return strcmp(faults, "thread") == 0 ? PS_FAULTS_THREADS : PS_FAULTS_SIGNAL;
}

ps_space space_of(size_t host, const char *spec, size_t chips, struct chip **of)
{
    ps_device_choice devices[8];
    size_t count = 0;
    if (spec != NULL)
        devices[count++] = (ps_device_choice){ .spec = spec };
    for (size_t i = 0; i < chips; i++)
        devices[count++] = (ps_device_choice){ .ops = &of[i]->ops };
    ps_space_options options = {
        .size = sizeof options,
        .host_bytes = host,
        .faults = faults_to_test(),
        .devices = devices,
        .device_count = count,
    };
    ps_space space;
    ps_status status = ps_space_create(&options, &space);
    if (status == PS_ERR_SYSTEM)
        SKIP("%s", ps_last_error());
    OK(status);
    for (size_t i = 0; i < chips; i++)
        of[i]->space = space;
    return space;
}

void *memory_of(ps_region region)
{
    void *start;
    size_t len;
    OK(ps_region_memory(region, &start, &len));
    return start;
}

ps_statistics statistics_of(ps_space space)
{
    ps_statistics s = { .size = sizeof s };
    OK(ps_space_get_statistics(space, &s));
    return s;
}

ps_device_statistics device_statistics_of(ps_device device)
{
    ps_device_statistics s = { .size = sizeof s };
    OK(ps_device_get_statistics(device, &s));
    return s;
}

ps_device device_at(ps_space space, size_t i)
{
    ps_device devices[8];
    size_t count;
    OK(ps_space_devices(space, devices, 8, &count));
    ASSERT(i < count && count <= 8);
    return devices[i];
}

void fill(void *at, size_t bytes, uint64_t seed)
{
    uint64_t *words = at;
    for (size_t i = 0; i < bytes / sizeof *words; i++)
        words[i] = word(seed, i);
}

size_t wrong(const void *at, size_t bytes, uint64_t seed)
{
    const uint64_t *words = at;
    size_t n = 0;
    for (size_t i = 0; i < bytes / sizeof *words; i++)
        n += words[i] != word(seed, i);
    return n;
}
