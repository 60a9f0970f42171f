/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Sums that stay in the kernel until user space fetches them (src/aggregate.rs).
 *
 * Each aggregate has two maps: programs add to one while user space empties the other, and now and then they
 * change places. A map of maps names the one that programs add to. For this map type alone the kernel promises
 * that no program still uses the old value once an update has returned. So user space reads complete sums.
 */
#pragma once

#include "tapio.h"

/* The number of the side that programs add to. */
struct side_number {
	__uint(type, BPF_MAP_TYPE_ARRAY);
	__uint(max_entries, 1);
	__type(key, u32);
	__type(value, u32);
};

struct {
	__uint(type, BPF_MAP_TYPE_ARRAY_OF_MAPS);
	__uint(max_entries, 1);
	__type(key, u32);
	__array(values, struct side_number);
} side SEC(".maps");

static __always_inline u32 filled_side(void)
{
	u32 first = 0;
	void *number = bpf_map_lookup_elem(&side, &first);
	u32 *value = number ? bpf_map_lookup_elem(number, &first) : NULL;

	return value ? *value : 0;
}

/* Declares the maps NAME_0 and NAME_1; a name has at most 13 characters. */
#define AGGREGATE(name, map_type, entries_max, key_type, value_type)                                                           \
	struct name##_side {                                                                                                   \
		__uint(type, map_type);                                                                                        \
		__uint(max_entries, entries_max);                                                                              \
		__type(key, key_type);                                                                                         \
		__type(value, value_type);                                                                                     \
	};                                                                                                                     \
	struct name##_side name##_0 SEC(".maps"), name##_1 SEC(".maps")

/*
 * Returns the key's sum in the map, made of `none` when it has none yet;
 * NULL when the map is full. `is_new` says whether this call made it.
 */
static __always_inline void *sum_in(void *map, const void *key, const void *none, bool *is_new)
{
	void *sum = bpf_map_lookup_elem(map, key);

	*is_new = false;
	if (sum)
		return sum;
	/* An int, see process.bpf.c. */
	*is_new = (int)bpf_map_update_elem(map, key, none, BPF_NOEXIST) == 0;
	return bpf_map_lookup_elem(map, key);
}

/* Returns the key's sum in the aggregate. What finds no space must be counted: see count_unsummed. */
#define aggregate_sum(name, key, none, is_new)                                                                                 \
	(filled_side() ? sum_in(&name##_1, key, none, is_new) : sum_in(&name##_0, key, none, is_new))

/* Counts an event that is in no sum, and will be in no record of that kind. */
static __always_inline void count_unsummed(u16 kind)
{
	count(kind, COUNTER_EMITTED);
	count(kind, COUNTER_DROPPED);
}

#define HISTOGRAM_SLOTS 32

/* The value of an aggregate of durations; where each CPU has its own, user space adds them up. */
struct histogram_sums {
	u64 total_ns;
	u64 max_ns;
	u32 counts[HISTOGRAM_SLOTS];
};

/* Returns the slot of a duration, see the Histogram of src/record.rs. */
static __always_inline u32 histogram_slot(u64 ns)
{
	u64 us = ns / 1000;
	u32 slot = 0;

	if (us >> 32)
		return HISTOGRAM_SLOTS - 1;
	if (us >> 16) {
		us >>= 16;
		slot += 16;
	}
	if (us >> 8) {
		us >>= 8;
		slot += 8;
	}
	if (us >> 4) {
		us >>= 4;
		slot += 4;
	}
	if (us >> 2) {
		us >>= 2;
		slot += 2;
	}
	return slot + (us >> 1 & 1);
}

/* Atomic, also where each CPU has its own: an interrupt may add in between. Of two concurrent maxima the lower may win. */
static __always_inline void histogram_add(struct histogram_sums *sums, u64 ns)
{
	__sync_fetch_and_add(&sums->total_ns, ns);
	__sync_fetch_and_add(&sums->counts[histogram_slot(ns) & (HISTOGRAM_SLOTS - 1)], 1);
	if (sums->max_ns < ns)
		sums->max_ns = ns;
}
