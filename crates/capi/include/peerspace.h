/* peerspace: one virtual address space for the CPU and every device. The C library.
 *
 * Generated from crates/capi/src: change it there.
 *
 * All functions can be called by any thread, at the same time. Those that return enum ps_status say PS_OK, or why not; then
 * ps_last_error() has a sentence that says what was wrong, where, and what to do about it.
 *
 * Handles are numbers. One that was released, or never given out, is refused with PS_ERR_HANDLE, and never comes to mean something
 * else. Whoever releases a handle waits for calls of other threads that use it.
 *
 * Structures begin with their size, to be set to sizeof. What is 0 has its default. A structure of an older version of this header
 * is accepted, and one of a newer version as long as it says nothing that this version does not know. Those of which it is said that
 * they stay as they are have no size.
 *
 * "Null or good" is said of pointers that are refused with PS_ERR_ARGUMENT when they are null or not aligned, and otherwise have to
 * lead to what they are said to lead to. Strings are UTF-8.
 *
 * Letters with numbers, such as Z9, are rules of the project's domain: the reference documentation explains them.
 */

#ifndef PEERSPACE_H
#define PEERSPACE_H

#include <stddef.h>
#include <stdint.h>
/* RAM, where a place for data is meant. */
#ifdef __cplusplus
#define PS_HOST (ps_device{0})
#else
#define PS_HOST ((ps_device){0})
#endif


// What an answer of a device is before it answers: the space takes it for a failure.
#define PS_NO_ANSWER INT32_MIN

// The CPU cannot map the device's memory: an access of the CPU migrates the page home.
#define PS_MEMORY_PRIVATE 0

// The CPU maps the device's memory in place: see `shared`.
#define PS_MEMORY_COHERENT 1

// A transfer keeps the calling thread waiting (for a disk, a network), so that others should go on meanwhile.
#define PS_DEVICE_SLOW 1

// `holds` costs about as much as a load, so it pays to compare before writing back.
#define PS_DEVICE_COMPARES 2

// What the device takes up is RAM of this process.
#define PS_DEVICE_IN_RAM 4

// After each store the pages are read back and compared: for a device that may say it has done what it has not.
#define PS_DEVICE_VERIFIED 8

// Of a coherent device: what leaves RAM for want of room may go there, too.
#define PS_DEVICE_TAKES_EVICTED 16

// Of a private device: only what is sent goes there.
#define PS_DEVICE_ONLY_SENT 32

// The MMU can map memory of the host in place, and access it through its port (rule G10).
#define PS_MMU_REMOTE 1

// It can map a page of zeros that takes up no memory (rule G3).
#define PS_MMU_ZERO_PAGE 2

// It cannot fault: its ranges are mapped for the duration of a launch.
#define PS_MMU_NO_FAULTS 4

// How a call ended. Where it is not PS_OK, ps_last_error() says more.
enum ps_status
#if defined(__cplusplus) || __STDC_VERSION__ >= 202311L
  : int32_t
#endif // defined(__cplusplus) || __STDC_VERSION__ >= 202311L
 {
    // It was done.
    PS_OK = 0,
    // An argument is null, unaligned, or has a value that means nothing.
    PS_ERR_ARGUMENT = 1,
    // The size field of a structure says a version that cannot be understood.
    PS_ERR_SIZE = 2,
    // A handle was released, is of something else, or was never given out.
    PS_ERR_HANDLE = 3,
    // A range of bytes does not fit: it wraps, lies elsewhere, overlaps, or is managed already.
    PS_ERR_RANGE = 4,
    // It was called from inside of a callback that must not call it.
    PS_ERR_REENTRANT = 5,
    // This system does not allow what is needed; or it is out of threads or handles.
    PS_ERR_SYSTEM = 6,
    // The kernel refused a single request.
    PS_ERR_KERNEL = 7,
    // The budget of RAM cannot work.
    PS_ERR_BUDGET = 8,
    // There is no such device, or the space has none.
    PS_ERR_NO_DEVICE = 9,
    // A device cannot be used for this, or has failed.
    PS_ERR_DEVICE = 10,
    // There is no room elsewhere for what a device holds, or on a device for what is wanted there.
    PS_ERR_NO_ROOM = 11,
    // More would be kept resident than may be, or the page is kept resident.
    PS_ERR_PINNED = 12,
    // Memory could not be migrated; it is where it was.
    PS_ERR_MIGRATE = 13,
    // The data of a page is lost: its device could not give it back.
    PS_ERR_LOST = 14,
    // A region with a name cannot be had.
    PS_ERR_NAMED = 15,
    // The device may read there, and not write.
    PS_ERR_READ_ONLY = 16,
    // The program has protected the memory.
    PS_ERR_PROTECTED = 17,
    // The host's memory is not mapped there for the device (any more): it is to fault.
    PS_ERR_NOT_MAPPED = 18,
    // The device faults for ever, although it says that it has the translation.
    PS_ERR_NO_HEADWAY = 19,
    // The device has been cut off from its space.
    PS_ERR_CUT = 20,
    // The work of a launch failed.
    PS_ERR_WORK = 21,
    // The program has discarded or unmapped an operand while a device worked on it.
    PS_ERR_DISCARDED = 22,
    // The library itself has failed. Please report it.
    PS_ERR_INTERNAL = 23,
};
#ifndef __cplusplus
#if __STDC_VERSION__ >= 202311L
typedef enum ps_status ps_status;
#else
typedef int32_t ps_status;
#endif // __STDC_VERSION__ >= 202311L
#endif // __cplusplus

// How faults of the CPU reach a space.
typedef enum ps_faults {
    // By threads where this process may have system calls served too, by signal otherwise.
    PS_FAULTS_AUTO = 0,
    // By SIGBUS in the faulting thread: three to five microseconds, no privilege. A system call that meets a page that is
    // not in RAM fails with EFAULT: see ps_pin.
    PS_FAULTS_SIGNAL = 1,
    // By threads of the space. System calls are served as well. Needs root, vm.unprivileged_userfaultfd, or access to
    // /dev/userfaultfd.
    PS_FAULTS_THREADS = 2,
} ps_faults;

// How memory is going to be used.
typedef enum ps_hint {
    // Nothing is known: small pages at first, and huge folios where faults show a stream.
    PS_HINT_NORMAL = 0,
    // Most of it will be used, and neighbours together: huge folios from the first fault on.
    PS_HINT_DENSE = 1,
    // Single pages here and there: never huge folios.
    PS_HINT_SPARSE = 2,
    // Small pages, and huge folios only where ps_region_collapse makes them.
    PS_HINT_ON_REQUEST = 3,
    // Read far more often than written: devices that read it get copies, all of which go when anybody writes.
    PS_HINT_READ_MOSTLY = 4,
    // Takes PS_HINT_READ_MOSTLY back.
    PS_HINT_NOT_READ_MOSTLY = 5,
    // The data had best be on the device that is named with the hint, or in RAM for PS_HOST.
    PS_HINT_PREFER = 6,
    // Takes PS_HINT_PREFER back.
    PS_HINT_NO_PREFERENCE = 7,
    // The device that is named with the hint accesses the memory of the host in place.
    PS_HINT_ACCESSED_BY = 8,
    // Takes PS_HINT_ACCESSED_BY back for that device.
    PS_HINT_NOT_ACCESSED_BY = 9,
} ps_hint;

// What an access may do.
typedef enum ps_use {
    // The memory is only read.
    PS_USE_READ = 0,
    // It is written, or read and written.
    PS_USE_WRITE = 1,
} ps_use;

// What a device wants to do with a page.
typedef enum ps_access {
    // It reads.
    PS_ACCESS_READ = 0,
    // It writes, or reads and writes.
    PS_ACCESS_WRITE = 1,
    // It reads and writes in one step, for which nobody else may access the page (rule G14).
    PS_ACCESS_ATOMIC = 2,
} ps_access;

// Where a device's accesses go, as long as no hint says otherwise (rule G9).
typedef enum ps_mode {
    // To its own memory: a page is on the CPU or on one device, and moves to whoever uses it.
    PS_MODE_EXCLUSIVE = 0,
    // To where the page is on the host: nothing moves. Needs PS_MMU_REMOTE.
    PS_MODE_SHARE = 1,
    // To its own memory: reads get copies, all of which go when anybody writes; writes move the page.
    PS_MODE_REPLICATE = 2,
} ps_mode;

// What a translation leads to.
typedef enum ps_target {
    // The device's own memory.
    PS_TARGET_OWN = 0,
    // Memory of the host at the same addresses: to be accessed by ps_port_read and ps_port_write alone.
    PS_TARGET_HOST = 1,
    // Zeros. Never writable.
    PS_TARGET_ZERO = 2,
} ps_target;

// Pages to be written to a device. This structure stays as it is.
typedef struct ps_store {
    // The first page of the device to write.
    uint64_t page;
    // The bytes of one or more whole pages, aligned to the page size.
    const void *bytes;
    // How many bytes.
    size_t len;
    // What became of it; the device sets it: 0, or an errno. ENOSPC: it is full. ENODEV: it is gone for good.
    int32_t result;
} ps_store;

// Pages to be read from a device. This structure stays as it is.
typedef struct ps_load {
    // The first page of the device to read.
    uint64_t page;
    // Where one or more whole pages go, aligned to the page size.
    void *bytes;
    // How many bytes.
    size_t len;
    // What became of it; the device sets it: 0, or an errno. EBADMSG: what is there is not what was stored.
    int32_t result;
} ps_load;

// Bytes to be copied from one device to another. This structure stays as it is.
typedef struct ps_peer_copy {
    // Where they go, in bytes from the start of the device's memory.
    uint64_t to;
    // Where they are, in bytes from the start of the peer's.
    uint64_t from;
    // How many.
    uint64_t bytes;
    // What became of it; the device sets it: 0, or an errno. EOPNOTSUPP: it is to go through the host.
    int32_t result;
} ps_peer_copy;

// A device's way to its space: by it the device has its faults resolved, and accesses the host's memory in place. It needs no
// release: it is good until the device is destroyed. To be used by the device's own threads, never inside of a callback.
typedef struct ps_port {
    // A handle; 0 is none.
    uint64_t id;
} ps_port;

// A translation to be entered: of one page, or of a block of ps_block_size() bytes that is aligned to its size on both sides.
// This structure stays as it is.
typedef struct ps_mapping {
    // Its first address.
    uint64_t address;
    // Its bytes.
    uint64_t bytes;
    // The first page of the device's own memory, with PS_TARGET_OWN.
    uint64_t page;
    // An enum ps_target.
    uint32_t target;
    // The device may write; otherwise a write is a fault.
    uint32_t writable;
} ps_mapping;

// The translations of a device that runs code. `context` of the device is passed to each function.
//
// What the device promises: when `unmap` has returned 0 without a fence, or its fence is reached, the device makes no access by
// those addresses any more before they are mapped again. Whoever does not keep to it is quarantined: its port is cut, nothing is
// asked of it again, and what it alone holds is lost (rule Z9). The functions return soon, and never call this library. They may
// wait for accesses under way by ps_port_read and ps_port_write, and not for a ps_port_fault.
typedef struct ps_mmu_ops {
    // sizeof(struct ps_mmu_ops).
    size_t size;
    // The addresses it can translate begin here (rule G13).
    uint64_t first_address;
    // And end here, exclusively; 0 for all addresses of a program.
    uint64_t end_address;
    // Milliseconds that it may take to stop using pages; 0 for two seconds.
    uint64_t deadline_ms;
    // An enum ps_mode.
    uint32_t mode;
    // PS_MMU_REMOTE and so on.
    uint32_t flags;
    // The device belongs to a space, and resolves its faults by `port`. Called once, before anything else. Needed unless it
    // cannot fault.
    void (*attached)(void *context, struct ps_port port);
    // Enters translations, in place of those there are for the same addresses. Returns 0, or an errno when it could not enter
    // all of them; all of the batch are taken away then. Needed.
    int (*map)(void *context, const struct ps_mapping *batch, size_t count);
    // Takes away the translations of the addresses from `start` to `end`, exclusively: whole pages, some of which may have none. A
    // block of which a part is meant goes as a whole. A device without `halt` is also asked for all its addresses at once: it had
    // best look through its translations then, and not through the addresses. Where that is not done on return, sets `*fence` to a
    // number, not 0, of which `is_done` is asked. Returns 0, or an errno when it cannot: the device is quarantined. Needed.
    int (*unmap)(void *context, uint64_t start, uint64_t end, uint64_t *fence);
    // Sets `*done` to whether the request with this fence is done. Returns 0, or an errno when it will never be. Needed where
    // `unmap` sets fences.
    int (*is_done)(void *context, uint64_t fence, uint32_t *done);
    // Keeps addresses free for a region of the space (rule G13). Returns 0, or an errno when something else of the device's is
    // there; the space looks elsewhere then. May be null.
    int (*reserve)(void *context, uint64_t start, uint64_t end);
    // Gives addresses back that were reserved. May be null.
    void (*release)(void *context, uint64_t start, uint64_t end);
    // Returns whether the device has used a page among these addresses since it was last asked. What was not used is evicted
    // first. May be null.
    int (*take_accessed)(void *context, uint64_t start, uint64_t end);
    // Halts the device: from when this has returned 0 without a fence, or its fence is reached, until `go_on`, it makes no access
    // by any translation. Translations stay, and faults that its port is resolving go on. For moments in which the meaning of
    // addresses changes without its having been told before (rule G5). Returns 0, or an errno when it cannot: the device is
    // quarantined. May be null together with `go_on`: then all of its translations are taken away instead.
    int (*halt)(void *context, uint64_t *fence);
    // Ends what `halt` began.
    void (*go_on)(void *context);
} ps_mmu_ops;

// A device: what it is, and what it does. `context` is passed to each function.
//
// Functions are called by faulting threads and by those of the space, concurrently; no two at a time are about the same page.
// They run with pages locked, and where faults are delivered by signal also inside of the handler of SIGBUS. So they must not
// touch memory that a space manages, nor wait for a lock that somebody holds who does (or whose handler of a signal does: block
// signals while it is held), nor allocate from a heap that is managed, nor call this library (PS_ERR_REENTRANT), nor end by
// longjmp or a C++ exception.
//
// Nothing is believed where it can be checked: a result that was not set counts as a failure; a load that fails is tried once
// more, and if it fails again its page is lost (rule Z9), alone; a page that could not be stored stays in RAM or goes elsewhere.
typedef struct ps_device_ops {
    // sizeof(struct ps_device_ops).
    size_t size;
    // Whatever the functions need.
    void *context;
    // For reports and errors; at most 63 bytes.
    const char *name;
    // Pages it can number, from 0 on, of ps_page_size() bytes. What it really holds may be less: ENOSPC says so.
    uint64_t pages;
    // The bytes that bound it, for reports; 0 where the pages do.
    uint64_t capacity_bytes;
    // PS_MEMORY_PRIVATE or PS_MEMORY_COHERENT (rule Z5).
    uint32_t memory;
    // PS_DEVICE_SLOW and so on.
    uint32_t flags;
    // Milliseconds that a call has, or 0. After the first that takes longer the device is gone for good. Costs two wake-ups
    // and a copy for each call: for a device that may hang.
    uint64_t deadline_ms;
    // Writes pages, all of the batch; sets each result. A page may be written again without having been freed. After an error
    // the page holds what it held, or nothing; it is freed then. Needed.
    void (*store)(void *context, struct ps_store *batch, size_t count);
    // Reads pages that were written, all of the batch; sets each result. On error the bytes may be anything. Needed.
    void (*load)(void *context, struct ps_load *batch, size_t count);
    // These pages are not needed any more: exactly once for each page that was stored (rule Z6). Needed.
    void (*freed)(void *context, uint64_t first, uint64_t count);
    // Sets `*same` to whether `page` holds exactly these bytes, of one page. Returns 0, or an errno. Needed with
    // PS_DEVICE_COMPARES.
    int (*holds)(void *context, uint64_t page, const void *bytes, size_t len, uint32_t *same);
    // What it takes up by its own account, for reports: bytes now, and the most. May be null.
    void (*usage)(void *context, uint64_t *used_bytes, uint64_t *peak_bytes);
    // Where the memory of `page` is for the CPU to map: a descriptor of a file or a device node, and bytes from its start. Pages
    // that follow each other lie side by side. Returns 0, or an errno. The descriptor stays open as long as the device is there.
    // Needed with PS_MEMORY_COHERENT.
    int (*shared)(void *context, uint64_t page, int *fd, uint64_t *offset);
    // Makes pages zero without a transfer. Returns 0, or an errno. May be null.
    int (*clear)(void *context, uint64_t first, uint64_t count);
    // Copies bytes from the memory of a peer to its own, without the host (rule G6); sets each result. The peer is a device with
    // this same function, and may be this device. May be null.
    void (*copy_from)(void *context, void *peer_context, struct ps_peer_copy *batch, size_t count);
    // The process is about to fork; nothing is in flight. May be null.
    void (*before_fork)(void *context);
    // The process has forked; called in both, with `child` 0 or 1 (rule G12). May be null.
    void (*after_fork)(void *context, int child);
    // The device belongs to no space any more, and no other function is called again. Once for each device that was taken; not
    // for one that was refused. May be null.
    void (*destroy)(void *context);
    // How it translates addresses, of a device that runs code (rule G1); null for one that does not. Copied.
    const struct ps_mmu_ops *mmu;
} ps_device_ops;

// A device that a space begins with: one of the two. This structure stays as it is.
typedef struct ps_device_choice {
    // As on a command line: "compressed:1G", "file:/var/tmp:8G", "dax:1G", "soft:64M". Null where `ops` is meant.
    const char *spec;
    // Implemented in C: see struct ps_device_ops. Null where `spec` is meant.
    const struct ps_device_ops *ops;
} ps_device_choice;

// What a space is made with. What is 0 has its default.
typedef struct ps_space_options {
    // sizeof(struct ps_space_options).
    size_t size;
    // How much RAM the space's memory may take up, in bytes. Has no default.
    uint64_t host_bytes;
    // How many bytes may be kept resident at once: three quarters of `host_bytes` otherwise.
    uint64_t pin_limit;
    // An enum ps_faults.
    uint32_t faults;
    // How many threads serve faults when they are delivered to threads: one for each two processors otherwise, from two
    // to eight.
    uint32_t handlers;
    // The devices, in the order in which they are tried. At least one.
    const struct ps_device_choice *devices;
    // How many there are.
    size_t device_count;
    // Does without these features of userfaultfd, bits as in <linux/userfaultfd.h>: to find out how a space works on an
    // older kernel.
    uint64_t without_features;
} ps_space_options;

// A space: one address space for the CPU and its devices.
typedef struct ps_space {
    // A handle; 0 is none.
    uint64_t id;
} ps_space;

// Numbers of a space, from its start to now; in a forked process, from the fork on. Bytes are bytes, pages are pages of
// ps_page_size() bytes.
//
// They are read one after the other while the space goes on: each is right, but they need not add up.
typedef struct ps_statistics {
    // sizeof(struct ps_statistics); afterwards, the bytes that were filled in.
    size_t size;
    // The budget.
    uint64_t limit_bytes;
    // RAM in use by managed memory: mapped, on standby, staged.
    uint64_t used_bytes;
    // The most that was in use.
    uint64_t peak_bytes;
    // Charged beyond the budget because no device had room.
    uint64_t forced_bytes;
    // Of the bytes in use, those on standby: they can be had back without any transfer.
    uint64_t standby_bytes;
    // Of the bytes in use, those in adopted memory that nobody has looked at yet.
    uint64_t native_bytes;
    // Kept resident; what is so several times counts several times.
    uint64_t pinned_bytes;
    // Faults that were served, whatever became of them.
    uint64_t faults;
    // Of those, on memory never touched.
    uint64_t faults_zero_fill;
    // Resolved from standby.
    uint64_t faults_standby;
    // Resolved from a device.
    uint64_t faults_device;
    // Resolved by a huge folio.
    uint64_t faults_huge;
    // Pages made writable by a first write.
    uint64_t faults_upgrades;
    // On pages that were there already when the fault was looked at.
    uint64_t faults_spurious;
    // Half of all faults took no longer, in nanoseconds.
    uint64_t faults_p50_ns;
    // 99 % of all faults took no longer.
    uint64_t faults_p99_ns;
    // Pages brought in from devices, those read ahead included.
    uint64_t pages_in;
    // Pages written to devices.
    uint64_t pages_out;
    // Pages dropped without being written, because their device still had them.
    uint64_t clean_dropped;
    // Of those, the ones that were compared first.
    uint64_t compared_equal;
    // Pages that were all zeros when they left, and took no place on a device.
    uint64_t zero_dropped;
    // Pages read ahead of streams.
    uint64_t read_ahead;
    // Huge mappings made.
    uint64_t huge_mapped;
    // Huge mappings broken into small ones.
    uint64_t splits;
    // Blocks of small pages put together into huge ones.
    uint64_t collapses;
    // Blocks that were not, for want of a huge page.
    uint64_t collapses_failed;
    // Faults that wanted a huge folio, and made do with small pages (rule H2).
    uint64_t huge_fallbacks;
    // Huge folios split into folios of one page (rule H6).
    uint64_t folio_splits;
    // Splits that were refused because somebody relied on the folio (rules H5, H6).
    uint64_t folio_splits_failed;
    // Huge folios queued to be split when memory is short (rule H11).
    uint64_t folio_splits_deferred;
    // Managed memory that is mapped in huge folios now, in bytes.
    uint64_t huge_bytes;
    // Pages unmapped to standby.
    uint64_t unmapped;
    // Pages of adopted memory that were looked at for the first time.
    uint64_t taken_in_hand;
    // Pages that were to be unmapped and could not be.
    uint64_t busy;
    // Rounds of reclaim that a faulting thread had to do itself.
    uint64_t direct_reclaims;
    // Times the background reclaimer was woken.
    uint64_t background_reclaims;
    // Attempts that had to wait for the program's own changes of its mappings.
    uint64_t waits_for_changes;
    // Pages lost (rule Z9).
    uint64_t poisoned;
    // Transfers that devices failed, other than for want of space.
    uint64_t device_errors;
    // Pages that went to and fro so often that they were left where they were for a while.
    uint64_t truces;
    // Devices there are.
    uint64_t devices;
} ps_statistics;

// A device of a space. It needs no release: it is good until it is detached, or its space is released. Where a place for
// data is meant, PS_HOST is RAM.
typedef struct ps_device {
    // A handle; 0 is none.
    uint64_t id;
} ps_device;

// Numbers of a device, from when it came to now.
typedef struct ps_device_statistics {
    // sizeof(struct ps_device_statistics); afterwards, the bytes that were filled in.
    size_t size;
    // Its name; what does not fit is cut off, and the last byte is 0.
    char name[64];
    // "private", "coherent" or "persistent".
    char memory[16];
    // The bytes that bound it.
    uint64_t capacity_bytes;
    // Bytes it takes up.
    uint64_t used_bytes;
    // The most it took up.
    uint64_t peak_bytes;
    // Pages read from it.
    uint64_t loads;
    // Pages written to it.
    uint64_t stores;
    // Transfers it failed, other than for want of space.
    uint64_t errors;
    // Host memory that the descriptors of its pages take up.
    uint64_t metadata_bytes;
    // Its own memory that they take up (rule A2).
    uint64_t own_metadata_bytes;
    // Bytes of it that the CPU maps in place (rule Z5).
    uint64_t in_place_bytes;
    // 1 for a device that runs code; what follows is 0 for others.
    uint64_t has_mmu;
    // Faults of the device.
    uint64_t mmu_faults;
    // Pages that moved to it because it used them.
    uint64_t mmu_moved;
    // Pages of which it got copies.
    uint64_t mmu_replicated;
    // Times that memory of the host was mapped in place for it.
    uint64_t mmu_remote;
    // Times that translations were taken away.
    uint64_t mmu_recalls;
    // Pages evicted from it for want of room.
    uint64_t mmu_evicted;
    // Bytes of it that are not used any more, because what was there could not be had back (rule Z9).
    uint64_t retired_bytes;
} ps_device_statistics;

// Memory of a space. It begins as zeros, and takes up RAM only where it is used.
typedef struct ps_region {
    // A handle; 0 is none.
    uint64_t id;
} ps_region;

// Memory that the program got elsewhere, and that a space manages.
typedef struct ps_adopted {
    // A handle; 0 is none.
    uint64_t id;
} ps_adopted;

// Pages that are kept resident.
typedef struct ps_pin {
    // A handle; 0 is none.
    uint64_t id;
} ps_pin;

// A prefetch.
typedef struct ps_prefetch {
    // A handle; 0 is none.
    uint64_t id;
} ps_prefetch;

// An operand of a launch. This structure stays as it is.
typedef struct ps_operand {
    // Its first byte.
    void *start;
    // The bytes that each item needs, one after the other, or those that every piece needs.
    uint64_t bytes;
    // Not 0: each item has its own part. 0: every piece needs all of it.
    uint64_t each;
} ps_operand;

// Bytes of an operand. This structure stays as it is.
typedef struct ps_range {
    // The first.
    uint64_t start;
    // The one after the last.
    uint64_t end;
} ps_range;

// What a piece of a launch works on. This structure stays as it is.
typedef struct ps_piece {
    // The first item.
    uint64_t first_item;
    // How many there are.
    uint64_t items;
    // The addresses of the operands' parts, in the order in which they were named: all of them are mapped on the device.
    const struct ps_range *operands;
    // How many operands there are.
    size_t operand_count;
} ps_piece;

// Work for a device.
typedef struct ps_launch {
    // sizeof(struct ps_launch).
    size_t size;
    // The device.
    struct ps_device device;
    // The work is that on so many items, which can be done in pieces; 0 for one item.
    uint64_t items;
    // No piece has more items than this; 0 for no limit.
    uint64_t at_most;
    // The operands; at least one.
    const struct ps_operand *operands;
    // How many there are.
    size_t operand_count;
    // Does a piece of the work, in the calling thread. Returns 0, or a number that says what went wrong. While it runs, an access
    // of the CPU to the operands' pages waits until it is over: so it must not touch them but through the device, nor allocate
    // where they are on the heap, nor wait for somebody who does, nor fork; of this library it can use ports, and questions.
    int (*work)(void *context, const struct ps_piece *piece);
    // Passed to `work`.
    void *context;
} ps_launch;

// How a launch went.
typedef struct ps_launch_report {
    // sizeof(struct ps_launch_report); afterwards, the bytes that were filled in.
    size_t size;
    // Pieces it took: 1 when all of it fitted.
    uint64_t pieces;
    // Items done.
    uint64_t items;
} ps_launch_report;

// A region of a persistent device, which was opened by its name. It is used in place; a forked process has the same memory, not
// a copy.
typedef struct ps_persistent {
    // A handle; 0 is none.
    uint64_t id;
} ps_persistent;

#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

// The version of the library. Never null; good for ever.
const char *ps_version(void);

// Bytes of a page: what devices number, and what migrates.
size_t ps_page_size(void);

// Bytes of a block: what a huge folio has, and regions are made of. 2 MiB where pages have 4 KiB.
size_t ps_block_size(void);

// For a handler of SIGBUS that was installed after the first space was made, with the arguments it got: returns 1 if a space has
// resolved the fault, so that the access can be repeated, and 0 if it is the program's own business.
//
// Pointers: To be called from a handler of SIGBUS that was installed with SA_SIGINFO; `info` and `context` are what it got.
int ps_forward_sigbus(const void *info,
                      const void *context);

// What went wrong in the last call of this thread that did not end with PS_OK: a sentence that says which call, what was
// wrong, where, and what to do about it. Never null; empty where nothing went wrong yet.
//
// Good until the thread's next call that fails, and until it ends. Messages longer than 1023 bytes are cut off.
const char *ps_last_error(void);

// What a status means, in general. Never null; good for ever. For any number: "unknown status" for those that are none.
const char *ps_strerror(int32_t status);

// Makes a space.
//
// A program that handles SIGBUS itself does so before it makes its first space, or calls ps_forward_sigbus from its handler.
//
// Errors: PS_ERR_BUDGET; PS_ERR_NO_DEVICE without a device; PS_ERR_DEVICE when one cannot be had; PS_ERR_SYSTEM when this
// system does not allow what is needed. Devices in C are not destroyed then.
//
// Pointers: `options`, what it points to, and `space` are null or good; so are the functions of devices, until those are destroyed.
ps_status ps_space_create(const struct ps_space_options *options,
                          struct ps_space *space);

// Releases a space, and the handles of its devices. The space lives until its last region, adopted memory and pin are
// released as well; then its devices are destroyed.
//
// Calls under way are waited for. Errors: PS_ERR_HANDLE.
ps_status ps_space_release(struct ps_space space);

// How faults reach the space: PS_FAULTS_SIGNAL or PS_FAULTS_THREADS.
//
// Pointers: `faults` is null or good.
ps_status ps_space_faults(struct ps_space space, uint32_t *faults);

// What the space is doing, in numbers. Set `statistics->size` before; it comes back as the number of bytes that were filled
// in.
//
// Pointers: `statistics` is null or good.
ps_status ps_space_get_statistics(struct ps_space space,
                                  struct ps_statistics *statistics);

// Walks everything and checks the invariants of the space. Nothing else may use it meanwhile. For tests.
//
// Errors: PS_ERR_INTERNAL when one does not hold, with a message that says which.
ps_status ps_space_check(struct ps_space space);

// The devices of the space, in the order in which they are tried: as many as `room` allows go to `devices`, and `count` gets
// how many there are.
//
// Pointers: `devices` is null, or has room for `room` handles; `count` is null or good.
ps_status ps_space_devices(struct ps_space space,
                           struct ps_device *devices,
                           size_t room,
                           size_t *count);

// Adds a device that is implemented in C, to be tried after those that are there. What `ops` points to is copied.
//
// Errors: PS_ERR_ARGUMENT when it lacks a function that it needs; PS_ERR_DEVICE when it cannot be used. It is not destroyed
// then.
//
// Pointers: `ops`, what it points to, and `device` are null or good; so are the functions, until the device is destroyed.
ps_status ps_device_attach(struct ps_space space,
                           const struct ps_device_ops *ops,
                           struct ps_device *device);

// Adds a device as it is written on a command line, such as "compressed:1G", to be tried after those that are there.
//
// Errors: PS_ERR_ARGUMENT when it cannot be understood; PS_ERR_DEVICE when it cannot be had.
//
// Pointers: `spec` and `device` are null or good.
ps_status ps_device_attach_spec(struct ps_space space,
                                const char *spec,
                                struct ps_device *device);

// Adds persistent memory: the file or device node at `path`, made with `bytes` bytes where there is none (0: as large as it
// is). Nothing goes there but regions that have names: see ps_persistent_create (rule Z5).
//
// Errors: PS_ERR_DEVICE when it cannot be had, or this build is without it.
//
// Pointers: `path` and `device` are null or good.
ps_status ps_device_attach_persistent(struct ps_space space,
                                      const char *path,
                                      uint64_t bytes,
                                      struct ps_device *device);

// Takes a device away, and destroys it (rule Z3): what it holds moves to other devices and free RAM first, while everything
// goes on.
//
// Errors: PS_ERR_NO_ROOM when there is less room than it takes, with the number of bytes; PS_ERR_NO_DEVICE when another
// thread detaches it; PS_ERR_DEVICE when its pages are in use without pause. It is in use as before then.
ps_status ps_device_detach(struct ps_device device);

// Marks a device as failed: nothing is asked of it any more, and what it alone holds is lost, page by page, when it is asked
// for (rule Z9).
ps_status ps_device_fail(struct ps_device device);

// Numbers of a device. Set `statistics->size` before; it comes back as the number of bytes that were filled in.
//
// Pointers: `statistics` is null or good.
ps_status ps_device_get_statistics(struct ps_device device,
                                   struct ps_device_statistics *statistics);

// Makes a region of at least `bytes` bytes, in whole blocks of ps_block_size(): zeros, none of them in RAM yet. Takes the same
// time for any size. Where it is, ps_region_memory says.
//
// Errors: PS_ERR_RANGE for no bytes, or more than there are addresses; PS_ERR_KERNEL.
//
// Pointers: `region` is null or good.
ps_status ps_region_create(struct ps_space space,
                           uint64_t bytes,
                           struct ps_region *region);

// Gives a region and its memory back. Nobody may use the memory any more. Calls under way are waited for.
//
// Errors: PS_ERR_HANDLE.
ps_status ps_region_release(struct ps_region region);

// Where a region is, and how many bytes it has. Takes a few nanoseconds. Its memory is used like any other, by every thread.
//
// Pointers: `start` and `len` are null or good.
ps_status ps_region_memory(struct ps_region region,
                           void **start,
                           size_t *len);

// Says how a region is going to be used; `hint` is an enum ps_hint, `device` the one it is about, or PS_HOST. What is in RAM
// already stays as it is.
//
// Errors: PS_ERR_ARGUMENT; PS_ERR_DEVICE for a device that runs no code; PS_ERR_RANGE when the space has as many regions as it
// can have.
ps_status ps_region_advise(struct ps_region region,
                           uint32_t hint,
                           struct ps_device device);

// Says what devices may do with whole pages of a region: with PS_USE_READ a write of a device is an error (rule G4). The CPU may
// write as before. `how` is an enum ps_use.
//
// Errors: PS_ERR_RANGE when the `len` bytes from `at` on do not lie inside.
ps_status ps_region_allow_devices(struct ps_region region,
                                  size_t at,
                                  size_t len,
                                  uint32_t how);

// Forgets the content of every page that lies wholly inside `len` bytes from `at` on (rule G8); it reads as zeros. Lost pages
// become usable again. Nobody may use these bytes meanwhile. Takes no transfer.
//
// Errors: PS_ERR_RANGE when the range does not lie inside.
ps_status ps_region_discard(struct ps_region region,
                            size_t at,
                            size_t len);

// Makes huge folios of the blocks that lie wholly inside `len` bytes from `at` on, now (rule H3). `huge_bytes` gets how many
// bytes of them are huge then; the rest stays in small pages, because somebody relies on where they are, or there is no huge
// page to be had.
//
// Errors: PS_ERR_RANGE when the range does not lie inside, or the hint PS_HINT_SPARSE was given.
//
// Pointers: `huge_bytes` is null or good.
ps_status ps_region_collapse(struct ps_region region,
                             size_t at,
                             size_t len,
                             size_t *huge_bytes);

// Sets aside the pages that lie wholly inside `len` bytes from `at` on, because they will not be needed soon: they are the first
// to leave RAM, and a use takes them back without input as long as they have not. `bytes` gets how many were set aside.
//
// Errors: PS_ERR_RANGE when the range does not lie inside.
//
// Pointers: `bytes` is null or good.
ps_status ps_region_cold(struct ps_region region,
                         size_t at,
                         size_t len,
                         size_t *bytes);

// Migrates the blocks that lie wholly inside `len` bytes from `at` on to a device, or home to RAM for PS_HOST, while other threads
// go on to use them (rules Z5, G8). `bytes` gets how many are there then; the rest is kept resident, or in use without pause.
//
// On a coherent device they are used in place from then on; from a private one the next access brings them home.
//
// Errors: PS_ERR_MIGRATE with the first block that cannot go, and why: what comes before has gone; PS_ERR_LOST; PS_ERR_RANGE when
// the range does not lie inside.
//
// Pointers: `bytes` is null or good.
ps_status ps_region_migrate(struct ps_region region,
                            size_t at,
                            size_t len,
                            struct ps_device device,
                            size_t *bytes);

// Manages memory that the program already has, from now on: the whole pages of `len` bytes from `start` (rule G1). Nothing moves
// before memory is scarce or a device wants it, every pointer stays good, and the program goes on to own the memory: it may unmap,
// move, discard, protect and fork as it likes.
//
// Private anonymous memory takes part in everything. All else (shared memory, mappings of files, huge pages of the kernel's pool,
// executable memory, the page in which an arena of the C library's heap begins) stays where it is: devices with PS_MMU_REMOTE use
// it in place, others cannot (rule G11).
//
// Not to be adopted: stacks, thread-local storage, and whatever devices and handlers of signals use.
//
// Errors: PS_ERR_RANGE for a range that is empty, wraps, is not wholly mapped, is managed already, belongs to this library, or is
// a stack or memory of the kernel's own; PS_ERR_KERNEL. Nothing is changed then.
//
// Pointers: `adopted` is null or good.
ps_status ps_adopt(struct ps_space space,
                   void *start,
                   size_t len,
                   struct ps_adopted *adopted);

// Brings everything home, beyond the budget if need be, and gives the memory back to the kernel's care. Calls under way are
// waited for.
//
// Errors: PS_ERR_KERNEL when the kernel refuses: the memory is managed for as long as the process lives then. The handle is
// released all the same.
ps_status ps_adopted_release(struct ps_adopted adopted);

// The addresses that are managed: whole pages.
//
// Pointers: `start` and `len` are null or good.
ps_status ps_adopted_memory(struct ps_adopted adopted, void **start, size_t *len);

// Says how adopted memory is going to be used, as ps_region_advise does.
ps_status ps_adopted_advise(struct ps_adopted adopted, uint32_t hint, struct ps_device device);

// Makes huge folios of the blocks that lie wholly inside adopted memory, as ps_region_collapse does.
//
// Pointers: `huge_bytes` is null or good.
ps_status ps_adopted_collapse(struct ps_adopted adopted, size_t *huge_bytes);

// Sets adopted memory aside, as ps_region_cold does.
//
// Pointers: `bytes` is null or good.
ps_status ps_adopted_cold(struct ps_adopted adopted, size_t *bytes);

// Copies `len` bytes of managed memory at `from` to `to`. What a plain access says by SIGBUS, this says by an error.
//
// Errors: PS_ERR_LOST if one of the pages cannot be had back from its device (rule Z9), with the address: what comes before it is
// copied; PS_ERR_RANGE where `from` is not managed by the space, or the ranges overlap; PS_ERR_KERNEL.
//
// Pointers: `to` is null, or has room for `len` bytes.
ps_status ps_read(struct ps_space space,
                  const void *from,
                  void *to,
                  size_t len);

// Copies `len` bytes at `from` to managed memory at `to`. What a plain access says by SIGBUS, this says by an error.
//
// Errors: as for ps_read; a lost page of which all is to be written is discarded first, by ps_region_discard.
//
// Pointers: `from` is null, or leads to `len` bytes.
ps_status ps_write(struct ps_space space,
                   void *to,
                   const void *from,
                   size_t len);

// Copies `len` bytes of managed memory, wherever both ends are: what is on devices stays there, and goes from one to the other
// without the host where they can (rule G8). Nobody may use the destination meanwhile, nor write to either end.
//
// Errors: PS_ERR_RANGE where the two overlap, or one is not managed by the space; PS_ERR_LOST. What comes before is copied then.
ps_status ps_copy(struct ps_space space,
                  void *to,
                  const void *from,
                  size_t len);

// Gives a device sole access to the pages that `len` bytes at `start` touch, for atomic operations of its code (rule G14): they
// move there and are mapped. Any access of the CPU or of another device ends it, page by page.
//
// Errors: PS_ERR_MIGRATE with the first page that cannot go: what comes before has gone; PS_ERR_DEVICE for a device that runs no
// code; PS_ERR_RANGE.
ps_status ps_exclusive(struct ps_space space,
                       void *start,
                       size_t len,
                       struct ps_device device);

// Brings the pages that `len` bytes at `start` touch into RAM, permits `how` (an enum ps_use), and keeps them so until the pin is
// released (rules Z8, H5): before memory is handed to a system call where faults are delivered by signal, or to hardware.
//
// Errors: PS_ERR_PINNED beyond the limit of the space; PS_ERR_LOST; PS_ERR_RANGE where one is not managed by the space;
// PS_ERR_KERNEL. Nothing is kept then.
//
// Pointers: `pin` is null or good.
ps_status ps_pin_create(struct ps_space space,
                        const void *start,
                        size_t len,
                        uint32_t how,
                        struct ps_pin *pin);

// Lets pages go that were kept resident.
//
// Errors: PS_ERR_HANDLE.
ps_status ps_pin_release(struct ps_pin pin);

// Has managed memory sent to where it is going to be used, by a thread of the space; returns at once. The range is rounded out to
// blocks, as far as they are managed (rule G8). PS_HOST is RAM.
//
// Errors: PS_ERR_DEVICE for a device that runs no code; PS_ERR_RANGE.
//
// Pointers: `prefetch` is null or good.
ps_status ps_prefetch_create(struct ps_space space,
                             const void *start,
                             size_t len,
                             struct ps_device to,
                             struct ps_prefetch *prefetch);

// Whether a prefetch is over: `done` gets 1 or 0.
//
// Pointers: `done` is null or good.
ps_status ps_prefetch_is_done(struct ps_prefetch prefetch, int *done);

// Ends a prefetch as soon as may be; what has gone stays there.
ps_status ps_prefetch_cancel(struct ps_prefetch prefetch);

// Waits until a prefetch is over. `bytes` gets how many are where they were sent.
//
// Errors: PS_ERR_MIGRATE says the first page that could not go, and why: all others have gone, and it is where it was.
//
// Pointers: `bytes` is null or good.
ps_status ps_prefetch_wait(struct ps_prefetch prefetch,
                           size_t *bytes);

// Releases the handle of a prefetch, which goes on.
//
// Errors: PS_ERR_HANDLE.
ps_status ps_prefetch_release(struct ps_prefetch prefetch);

// Resolves a fault of the device: an access to `address` that found no translation, or none that permits it; `access` is an
// enum ps_access. Afterwards the access can be repeated. May take as long as a device takes to give a page back.
//
// Errors: PS_ERR_RANGE where no memory of the space is, the device cannot translate, or the program's file has ended;
// PS_ERR_MIGRATE for memory that stays where it is (rule G11), if the device is without PS_MMU_REMOTE or wants it alone;
// PS_ERR_READ_ONLY; PS_ERR_PROTECTED; PS_ERR_LOST; PS_ERR_NO_ROOM; PS_ERR_PINNED; PS_ERR_NO_HEADWAY; PS_ERR_DEVICE; PS_ERR_CUT.
// Nothing has changed for the device then.
ps_status ps_port_fault(struct ps_port port,
                        uint64_t address,
                        uint32_t access);

// Reads memory of the host that is mapped in place for the device, up to the end of the page.
//
// Errors: PS_ERR_NOT_MAPPED when it is not: the device faults then; PS_ERR_CUT.
//
// Pointers: `to` is null, or has room for `len` bytes.
ps_status ps_port_read(struct ps_port port, uint64_t address, void *to, size_t len);

// Writes memory of the host that is mapped in place for the device, and writable, up to the end of the page.
//
// Errors: as for ps_port_read.
//
// Pointers: `from` is null, or leads to `len` bytes.
ps_status ps_port_write(struct ps_port port, uint64_t address, const void *from, size_t len);

// Says that so many accesses to the page of `address` went to the host of late: where they are many, the page moves.
ps_status ps_port_note_remote(struct ps_port port,
                              uint64_t address,
                              uint32_t accesses);

// Does work on a device: calls `work` for each piece, with the pages of its operands mapped on the device, to read and to write, and
// held there. Returns when the last one is done. `report` may be null.
//
// Errors: PS_ERR_WORK with the items at which `work` returned another number than 0; PS_ERR_DISCARDED when the program has
// discarded or unmapped an operand meanwhile; PS_ERR_RANGE, PS_ERR_MIGRATE, PS_ERR_DEVICE when the operands cannot be brought there.
// The pieces before are done.
//
// Pointers: `launch`, what it points to, and `report` are null or good.
ps_status ps_launch_run(const struct ps_launch *launch,
                        struct ps_launch_report *report);

// Makes a region of `bytes` bytes, all zero, on a persistent device, and opens it. That it is there is durable on return.
//
// Errors: PS_ERR_NAMED when there is one of that name, or no room; PS_ERR_DEVICE for a device that is not persistent.
//
// Pointers: `name` and `region` are null or good.
ps_status ps_persistent_create(struct ps_device device,
                               const char *name,
                               uint64_t bytes,
                               struct ps_persistent *region);

// Opens a region that is there already.
//
// Errors: PS_ERR_NAMED when there is none of that name, or it is open already; PS_ERR_DEVICE for a device that is not persistent.
//
// Pointers: `name` and `region` are null or good.
ps_status ps_persistent_open(struct ps_device device,
                             const char *name,
                             struct ps_persistent *region);

// Removes a region that is not open, with everything in it.
//
// Errors: PS_ERR_NAMED when there is none of that name, or it is open; PS_ERR_DEVICE for a device that is not persistent.
//
// Pointers: `name` is null or good.
ps_status ps_persistent_remove(struct ps_device device,
                               const char *name);

// Where an open region is, and how many bytes it has.
//
// Pointers: `start` and `len` are null or good.
ps_status ps_persistent_memory(struct ps_persistent region, void **start, size_t *len);

// Makes `len` bytes from `at` on durable: on return they survive a crash, of the machine as well.
//
// Errors: PS_ERR_DEVICE when they may not be durable; PS_ERR_RANGE when the range does not lie inside.
ps_status ps_persistent_flush(struct ps_persistent region, size_t at, size_t len);

// Closes a region. Its bytes stay on the device. Calls under way are waited for.
//
// Errors: PS_ERR_HANDLE.
ps_status ps_persistent_release(struct ps_persistent region);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* PEERSPACE_H */
