/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * The maps that all questions share, and how a record gets into its ring.
 */
#pragma once

#include "record.h"

/* Set by the loader. */
const volatile u32 own_tgid = 0;
const volatile u64 signal_mask = 0;
/* Signals that are frequent where they are handled: recorded only where they are not, or come from another cgroup. */
const volatile u64 signal_mask_unhandled = 0;
/* The memory controller is of version 1: its hierarchy may name a container that version 2's does not. */
const volatile u32 memory_is_version_1 = 0;
/* Kinds of the lethal lane that are switched off, a bit each. */
const volatile u64 lethal_kinds_off = 0;
const volatile u64 page_bytes = 4096;
/* How far apart the records of one cgroup are in the lethal lane on average, 0 for no bound; and how much may come at once. */
const volatile u64 share_interval_ns = 0;
const volatile u64 share_burst_ns = 0;
/* A quarter of a ring's bytes: a power of two. */
const volatile u32 lethal_quarter = 1024;
const volatile u32 bulk_quarter = 16384;

/* The loader sets the size. */
struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 4096);
} lethal SEC(".maps");

/* The template's size is a ring's where a kernel (before 5.10) takes no other inside. */
struct bulk_ring {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 65536);
};

/* One ring a CPU, which the loader makes: a lock that all CPUs share would be the wall on a big node. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, u32);
	__array(values, struct bulk_ring);
} bulk SEC(".maps");

#define KINDS 64
enum counter { COUNTER_EMITTED, COUNTER_DROPPED, COUNTER_SAMPLED, COUNTER_EXCLUDED, COUNTER_LIMITED, COUNTERS };

/* u64[cpu][KINDS][COUNTERS], mapped by the reader; the loader sets the number of CPUs. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, KINDS *COUNTERS);
	__type(key, u32);
	__type(value, u64);
} counters SEC(".maps");

#define NSEC_PER_SEC 1000000000ULL
#define SHARES_BITS 12
#define SHARES (1 << SHARES_BITS)
/* Places where a cgroup may be. */
#define SHARE_PLACES 4
/* Time without records after which a cgroup loses its place; the reader has seen what was left out by then. */
#define SHARE_IDLE_NS (10 * NSEC_PER_SEC)

/* The lethal lane's use by a cgroup. Two CPUs may change it at once: it is a bound, not an account. */
struct share {
	u64 cgroup_id;
	/* The time at which the cgroup has had no more than its share. */
	u64 due_ns;
	/* The time at which the reserve, which is used when the share is used up, is free again. */
	u64 reserve_due_ns;
	/* Records that were left out since the cgroup has this place. */
	u64 left_out;
};

/* Mapped by the reader. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(map_flags, BPF_F_MMAPABLE);
	__uint(max_entries, SHARES);
	__type(key, u32);
	__type(value, struct share);
} shares SEC(".maps");

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

/* Settings that may change while the programs run. */
struct tuning {
	/* Sampling of the bulk lane: one of this many records is kept; 1 keeps all, 0 none. */
	u32 bulk_sampling;
	/* 0 while `excluded` is empty: the programs then skip it. */
	u32 excluded_cgroups;
	u64 block_io_slow_ns;
	u64 reclaim_burst_ns;
	/* Kinds of the bulk lane that are switched off, a bit each. */
	u64 bulk_kinds_off;
	u64 run_queue_slow_ns;
	u64 dns_slow_ns;
	/* 0 exec_record, 1 exec_command_record with the path, 2 with the arguments too. */
	u32 exec_command;
	u32 pad;
};

/* Apart from control: the reader stores its flag there at any time. */
struct {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, struct tuning);
} tuning SEC(".maps");

/* Cgroups without records in the bulk lane. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, 8192);
	__type(key, u64);
	__type(value, u8);
} excluded SEC(".maps");

/* Atomic: an interrupt's program may count on the same CPU between load and store. */
static __always_inline void count(u16 kind, enum counter counter)
{
	u32 index = (bpf_get_smp_processor_id() * KINDS + kind) * COUNTERS + counter;
	u64 *value = bpf_map_lookup_elem(&counters, &index);

	if (value)
		__sync_fetch_and_add(value, 1);
}

static __always_inline struct tuning *tuned(void)
{
	u32 first = 0;

	return bpf_map_lookup_elem(&tuning, &first);
}

/* Whether a kind of the bulk lane is on. What is off is counted where it would become a record, and not summed up. */
static __always_inline bool kind_is_on(u16 kind)
{
	struct tuning *tuning = tuned();

	return !tuning || !(*(volatile u64 *)&tuning->bulk_kinds_off >> kind & 1);
}

static __always_inline bool cgroup_is_excluded(u64 cgroup)
{
	struct tuning *tuning = tuned();

	return tuning && *(volatile u32 *)&tuning->excluded_cgroups && bpf_map_lookup_elem(&excluded, &cgroup);
}

static __always_inline void *bulk_ring_here(void)
{
	u32 cpu = bpf_get_smp_processor_id();

	return bpf_map_lookup_elem(&bulk, &cpu);
}

/* `now_ns` is when it happened, 0 for now: reading the clock is a good part of a record's price. */
static __always_inline void fill_header(struct header *header, u16 kind, u16 bytes, u64 now_ns)
{
	header->kind = kind;
	header->size = bytes;
	header->cpu = bpf_get_smp_processor_id();
	header->time_ns = now_ns ? now_ns : bpf_ktime_get_boot_ns();
}

/*
 * Takes a record's time from what is due, unless more has come at once than may: the generic cell rate algorithm of ITU-T I.371.
 */
static __always_inline bool is_within(u64 *due_ns, u64 now_ns, u64 interval_ns)
{
	u64 due = *due_ns > now_ns ? *due_ns : now_ns;

	if (due - now_ns > share_burst_ns)
		return false;
	*due_ns = due + interval_ns;
	return true;
}

/*
 * Whether a cgroup may have another record: one that floods the lane must not crowd out records of others. `is_reserved` is for
 * what matters even then, of which a quarter as much is taken on top. Where all places are taken by cgroups that are busy, yes.
 */
static __always_inline bool has_share(u64 cgroup_id, u64 now_ns, bool is_reserved)
{
	u32 home = cgroup_id * 0x9e3779b97f4a7c15ULL >> (64 - SHARES_BITS);
	struct share *own = NULL, *idle = NULL;

#pragma unroll
	for (u32 place = 0; place < SHARE_PLACES; place++) {
		u32 index = (home + place) & (SHARES - 1);
		struct share *share = bpf_map_lookup_elem(&shares, &index);

		if (!share)
			return true;
		if (share->cgroup_id == cgroup_id) {
			own = share;
			break;
		}
		if (!idle && share->due_ns + SHARE_IDLE_NS < now_ns)
			idle = share;
	}
	if (!own) {
		if (!idle)
			return true;
		own = idle;
		own->left_out = 0;
		own->due_ns = 0;
		own->reserve_due_ns = 0;
		own->cgroup_id = cgroup_id;
	}
	if (is_within(&own->due_ns, now_ns, share_interval_ns))
		return true;
	if (is_reserved && is_within(&own->reserve_due_ns, now_ns, 4 * share_interval_ns))
		return true;
	__sync_fetch_and_add(&own->left_out, 1);
	return false;
}

/*
 * Reserves a zeroed record with its header, except for the subject. Returns NULL, which is counted, when the ring is full or when
 * `payer`, the causing cgroup, has used up its share. Returns NULL also when the kind is off, as if there were no such program.
 */
static __always_inline void *record_begin_of(u16 kind, u16 bytes, u64 payer, bool is_reserved)
{
	struct header *header;
	u64 now_ns;

	if (lethal_kinds_off >> kind & 1)
		return NULL;
	now_ns = bpf_ktime_get_boot_ns();
	count(kind, COUNTER_EMITTED);
	if (share_interval_ns && payer && !has_share(payer, now_ns, is_reserved)) {
		count(kind, COUNTER_LIMITED);
		return NULL;
	}
	header = bpf_ringbuf_reserve(&lethal, bytes, 0);
	if (!header) {
		count(kind, COUNTER_DROPPED);
		return NULL;
	}
	__builtin_memset(header, 0, bytes);
	fill_header(header, kind, bytes, now_ns);
	return header;
}

/* Reserves a record that no cgroup's share bounds. */
static __always_inline void *record_begin(u16 kind, u16 bytes)
{
	return record_begin_of(kind, bytes, 0, false);
}

/*
 * Reserves a bulk record of something that happened at `now_ns`. NULL, which is counted, also when the kind is off or the record
 * is sampled away. Sampling is random: every second record of a series like made, accepted, closed, closed might miss one.
 */
static __always_inline void *bulk_begin_at(u16 kind, u16 bytes, u64 now_ns)
{
	struct tuning *tuning = tuned();
	struct header *header = NULL;
	u32 one_in = tuning ? *(volatile u32 *)&tuning->bulk_sampling : 1;
	void *ring;

	count(kind, COUNTER_EMITTED);
	if (!kind_is_on(kind)) {
		count(kind, COUNTER_EXCLUDED);
		return NULL;
	}
	if (one_in != 1 && (!one_in || bpf_get_prandom_u32() % one_in)) {
		count(kind, COUNTER_SAMPLED);
		return NULL;
	}
	ring = bulk_ring_here();
	if (ring)
		header = bpf_ringbuf_reserve(ring, bytes, 0);
	if (!header) {
		count(kind, COUNTER_DROPPED);
		return NULL;
	}
	__builtin_memset(header, 0, bytes);
	fill_header(header, kind, bytes, now_ns);
	return header;
}

static __always_inline void *bulk_begin(u16 kind, u16 bytes)
{
	return bulk_begin_at(kind, bytes, 0);
}

static __always_inline volatile u32 *need_wakeup(void)
{
	u32 first = 0;
	struct control *flags = bpf_map_lookup_elem(&control, &first);

	return flags ? &flags->need_wakeup : NULL;
}

/* The only way to wake the reader without a record is to discard one. */
static __always_inline void nudge(void *ring)
{
	void *nothing = bpf_ringbuf_reserve(ring, 8, 0);

	if (nothing)
		bpf_ringbuf_discard(nothing, BPF_RB_FORCE_WAKEUP);
}

/*
 * Whether the record, not yet submitted, has filled another quarter of its ring: a reader that naps
 * is woken then. Records that were reserved meanwhile, by other CPUs or an interrupt, are counted as
 * well. So two racing CPUs may both miss a boundary; enough of the ring is free until the next one.
 */
static __always_inline bool crosses_quarter(void *ring, struct header *header, u32 quarter)
{
	u64 pending = bpf_ringbuf_query(ring, BPF_RB_AVAIL_DATA);

	return (pending ^ (pending - header->size - BPF_RINGBUF_HDR_SZ)) & ~(u64)(quarter - 1);
}

/*
 * Hands a record to the reader, and wakes the reader when the record cannot wait,
 * the ring fills, or the reader sleeps. The reader raises need_wakeup, issues a
 * full barrier, looks at the rings once more and sleeps only if they are empty. The
 * submit is a full barrier too (it exchanges the record's header). So either the
 * reader's last look or the second look at need_wakeup below sees the other side.
 */
static __always_inline void record_end(void *record, bool at_once)
{
	volatile u32 *wanted = need_wakeup();
	bool wake = at_once || (wanted && *wanted) || crosses_quarter(&lethal, record, lethal_quarter);

	bpf_ringbuf_submit(record, wake ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
	if (!wake && wanted && *wanted)
		nudge(&lethal);
}

/*
 * Hands over a record of the bulk lane: no record there is worth a wakeup that the reader did not ask for, but a
 * ring that fills is. The subject is known by now: the record of an excluded cgroup is discarded, and counted.
 */
static __always_inline void bulk_end(void *record)
{
	volatile u32 *wanted = need_wakeup();
	bool wake = wanted && *wanted;
	struct header *header = record;
	void *ring;

	if (cgroup_is_excluded(header->cgroup_id)) {
		count(header->kind, COUNTER_EXCLUDED);
		bpf_ringbuf_discard(record, BPF_RB_NO_WAKEUP);
		return;
	}
	ring = bulk_ring_here();
	if (!wake && ring)
		wake = crosses_quarter(ring, header, bulk_quarter);
	bpf_ringbuf_submit(record, wake ? BPF_RB_FORCE_WAKEUP : BPF_RB_NO_WAKEUP);
	if (!wake && wanted && *wanted && ring)
		nudge(ring);
}
