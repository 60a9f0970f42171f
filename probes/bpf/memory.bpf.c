/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Which tasks wait for memory reclaim, for how long, and because of which shortage: the node's or a cgroup's limit?
 *
 * mm_vmscan_direct_reclaim_begin/end and mm_vmscan_memcg_reclaim_begin/end → reclaim_record. The stalls of a cgroup's tasks
 * are added up here. A record leaves when the sum reaches reclaim_burst_ns, when the OOM killer comes (oom.bpf.c), or when
 * user space fetches the sums. Threads of the kernel, as kswapd, are ignored: they reclaim for others and stall no task.
 */
#include "reclaim.h"

#define RECLAIMING_TASKS_MAX 4096
#define PF_KTHREAD 0x00200000

/* Time since when a thread reclaims. One whose end was missed gives way to the next thread with its id. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, RECLAIMING_TASKS_MAX);
	__type(key, u32);
	__type(value, u64);
} reclaiming SEC(".maps");

static __always_inline int reclaim_begins(void)
{
	u32 tid = bpf_get_current_pid_tgid();
	u64 now = bpf_ktime_get_boot_ns();

	if (READ_CURRENT(current_task(), flags) & PF_KTHREAD)
		return 0;
	bpf_map_update_elem(&reclaiming, &tid, &now, BPF_ANY);
	return 0;
}

static __always_inline int reclaim_ends(u64 pages, bool memcg)
{
	u32 tid = bpf_get_current_pid_tgid();
	u64 *since = bpf_map_lookup_elem(&reclaiming, &tid);
	struct tuning *tuning = tuned();
	struct stall_key key = { .memcg = memcg };
	struct stall none = {}, *stall;
	bool is_new;
	u64 ns;

	if (!since || !tuning)
		return 0;
	ns = bpf_ktime_get_boot_ns() - *since;
	bpf_map_delete_elem(&reclaiming, &tid);
	key.cgroup_id = current_cgroup_id();
	stall = aggregate_sum(stalls, &key, &none, &is_new);
	if (!stall) {
		count_unsummed(KIND_RECLAIM);
		return 0;
	}
	__sync_fetch_and_add(&stall->ns, ns);
	__sync_fetch_and_add(&stall->pages, pages);
	emit_stall(stall, &key, *(volatile u64 *)&tuning->reclaim_burst_ns);
	return 0;
}

SEC("raw_tracepoint/mm_vmscan_direct_reclaim_begin")
int reclaim_begin(struct bpf_raw_tracepoint_args *ctx)
{
	return reclaim_begins();
}

SEC("raw_tracepoint/mm_vmscan_direct_reclaim_end")
int reclaim_end(struct bpf_raw_tracepoint_args *ctx)
{
	return reclaim_ends(ctx->args[0], false);
}

SEC("raw_tracepoint/mm_vmscan_memcg_reclaim_begin")
int reclaim_mcg_begin(struct bpf_raw_tracepoint_args *ctx)
{
	return reclaim_begins();
}

SEC("raw_tracepoint/mm_vmscan_memcg_reclaim_end")
int reclaim_mcg_end(struct bpf_raw_tracepoint_args *ctx)
{
	return reclaim_ends(ctx->args[0], true);
}
