/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * The records, the maps that all questions share, and how a record gets into its ring.
 *
 * The structs are those of src/record.rs, byte for byte; a test compares them. Padding is a member, and a record is zeroed
 * before it is filled: no byte of the kernel's memory leaves it by accident.
 */
#pragma once

#include "kernel.h"

enum {
	KIND_EXEC = 1,
	KIND_EXIT = 2,
	KIND_OOM = 3,
	KIND_SIGNAL = 4,
	KIND_CGROUP_MKDIR = 5,
	KIND_CGROUP_RMDIR = 6,
};

#define CGROUP_V1_MEMORY (1ULL << 63)
#define COMM_BYTES 16
#define CGROUP_PATH_BYTES 256
#define LIMIT_NAME_BYTES 128

struct header {
	u16 kind;
	u16 size;
	u32 cpu;
	u64 time_ns;
	u64 cgroup_id;
	u32 pid;
	u32 tid;
};

struct exec_record {
	struct header header;
	u32 parent_pid;
	u32 ns_pid;
	u32 ns_level;
	u32 pad;
	char comm[COMM_BYTES];
};

struct exit_record {
	struct header header;
	u32 parent_pid;
	u32 ns_pid;
	u32 ns_level;
	u32 status;
	u64 start_time_ns;
	s16 oom_score_adj;
	u8 pad[6];
	char comm[COMM_BYTES];
};

struct oom_record {
	struct header header;
	u32 ns_pid;
	u32 ns_level;
	u32 allocator_pid;
	u32 allocator_tid;
	u64 allocator_cgroup_id;
	u64 anon_rss_bytes;
	u64 file_rss_bytes;
	u64 shmem_rss_bytes;
	u64 limit_cgroup_id;
	u64 limit_bytes;
	u64 usage_bytes;
	u32 limit_height;
	s16 oom_score_adj;
	u8 pad[2];
	char comm[COMM_BYTES];
	char allocator_comm[COMM_BYTES];
	char limit_name[LIMIT_NAME_BYTES];
};

struct signal_record {
	struct header header;
	u32 signal;
	s32 code;
	u32 sender_pid;
	u32 sender_tid;
	u64 sender_cgroup_id;
	u32 ns_pid;
	u32 ns_level;
	u8 from_kernel;
	u8 result;
	u8 pad[6];
	char comm[COMM_BYTES];
	char sender_comm[COMM_BYTES];
};

struct cgroup_record {
	struct header header;
	u32 hierarchy;
	u32 level;
	u32 path_bytes;
	u32 pad;
	char path[CGROUP_PATH_BYTES];
};

/* Keeps the layouts in the object's type information, where the test of src/record.rs finds them. */
const volatile union {
	struct exec_record exec;
	struct exit_record exit;
	struct oom_record oom;
	struct signal_record signal;
	struct cgroup_record cgroup;
} layouts = {};

/* Set by the loader. */
const volatile u32 own_tgid = 0;
const volatile u64 signal_mask = 0;
const volatile u64 page_bytes = 4096;

/* The loader sets the size. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} lethal SEC(".maps");

#define KINDS 64
enum counter { COUNTER_EMITTED, COUNTER_DROPPED, COUNTERS };

/* u64[cpu][KINDS][COUNTERS], mapped by the reader; the loader sets the number of CPUs. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, KINDS *COUNTERS);
	__type(key, u32);
	__type(value, u64);
} counters SEC(".maps");

struct control {
	/* 1 while the reader sleeps, or is about to. */
	u32 need_wakeup;
	u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct control);
} control SEC(".maps");

/* Atomic: an interrupt's program may count on the same CPU between load and store. */
static __always_inline void count(u16 kind, enum counter counter)
{
	u32 index = (bpf_get_smp_processor_id() * KINDS + kind) * COUNTERS + counter;
	u64 *value = bpf_map_lookup_elem(&counters, &index);

	if (value)
		__sync_fetch_and_add(value, 1);
}

/* A zeroed record with its header but for the subject, or NULL, which is counted, when the ring is full. */
static __always_inline void *record_begin(u16 kind, u16 bytes)
{
	struct header *header;

	count(kind, COUNTER_EMITTED);
	header = bpf_ringbuf_reserve(&lethal, bytes, 0);
	if (!header) {
		count(kind, COUNTER_DROPPED);
		return NULL;
	}
	__builtin_memset(header, 0, bytes);
	header->kind = kind;
	header->size = bytes;
	header->cpu = bpf_get_smp_processor_id();
	header->time_ns = bpf_ktime_get_boot_ns();
	return header;
}

/*
 * Hands a record to the reader, and wakes the reader when the record cannot wait or the reader sleeps.
 *
 * The reader raises need_wakeup, issues a full barrier, looks at the ring once more and sleeps only if it is empty. The
 * submit is a full barrier too (it exchanges the record's header), so of the reader's last look and the second look at
 * need_wakeup below at least one sees the other side. The only way to wake without a record is to discard one.
 */
static __always_inline void record_end(void *record, bool at_once)
{
	u32 first = 0;
	struct control *flags = bpf_map_lookup_elem(&control, &first);
	volatile u32 *need_wakeup = flags ? &flags->need_wakeup : NULL;
	bool wake = at_once || (need_wakeup && *need_wakeup);

	bpf_ringbuf_submit(record, wake ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
	if (!wake && need_wakeup && *need_wakeup) {
		void *nudge = bpf_ringbuf_reserve(&lethal, 8, 0);

		if (nudge)
			bpf_ringbuf_discard(nudge, BPF_RB_FORCE_WAKEUP);
	}
}
