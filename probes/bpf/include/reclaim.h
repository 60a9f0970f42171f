/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* How long the tasks of a cgroup have stalled in reclaim since the last record of it. */
#pragma once

#include "aggregate.h"
#include "task.h"

#define RECLAIMING_CGROUPS_MAX 2048

struct stall_key {
	u64 cgroup_id;
	/* 1 for a memory cgroup's own limit, 0 for the node's. */
	u64 memcg;
};

/* Not yet recorded; user space records what is left when it fetches the sums. */
struct stall {
	s64 ns;
	s64 pages;
};

AGGREGATE(stalls, BPF_MAP_TYPE_HASH, RECLAIMING_CGROUPS_MAX, struct stall_key, struct stall);

/* Writes a record of what is not recorded yet, if that is `at_least` or more. */
static __always_inline void emit_stall(struct stall *stall, struct stall_key *key, u64 at_least)
{
	struct reclaim_record *record;
	s64 ns, pages;

	ns = *(volatile s64 *)&stall->ns;
	pages = *(volatile s64 *)&stall->pages;
	if (ns <= 0 || (u64)ns < at_least)
		return;
	/* Two CPUs may get here with the same sum: the sum is then below 0, and that much must come before the next record. */
	__sync_fetch_and_add(&stall->ns, -ns);
	__sync_fetch_and_add(&stall->pages, -pages);

	record = bulk_begin(KIND_RECLAIM, sizeof(*record));
	if (!record)
		return;
	set_current_subject(&record->header, current_cgroup_id());
	record->stall_ns = ns;
	record->pages_reclaimed = pages > 0 ? pages : 0;
	record->memcg = key->memcg;
	bulk_end(record);
}

/* Writes a record of what is not recorded yet, without a bound, for sums that others keep. */
static __always_inline void emit_rest(struct stall_key *key)
{
	struct stall *stall = filled_side() ? bpf_map_lookup_elem(&stalls_1, key) : bpf_map_lookup_elem(&stalls_0, key);

	if (stall)
		emit_stall(stall, key, 1);
}
