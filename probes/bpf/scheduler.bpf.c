/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * How long do tasks that could run wait for a CPU?
 *
 * sched_wakeup, sched_wakeup_new, sched_switch → a histogram for each cgroup, and run_queue_record for a wait of at least
 * run_queue_slow_ns. Off unless asked for: the hooks are among the hottest that there are.
 */
#include "aggregate.h"
#include "task.h"

#define WAITING_TASKS_MAX 16384
#define WAITING_CGROUPS_MAX 512

#define TASK_RUNNING 0

/* Time since when a thread could run. It is removed when the thread runs, so that no dead task stays here. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, WAITING_TASKS_MAX);
	__type(key, u32);
	__type(value, u64);
} waiting SEC(".maps");

AGGREGATE(run_queue, BPF_MAP_TYPE_PERCPU_HASH, WAITING_CGROUPS_MAX, u64, struct histogram_sums);

static __always_inline void begins_to_wait(struct task_struct *task)
{
	u32 tid = task->pid;
	u64 now = bpf_ktime_get_boot_ns();

	/* Each CPU's idle task is number 0. */
	if (!tid || (u32)task->tgid == own_tgid)
		return;
	if ((int)bpf_map_update_elem(&waiting, &tid, &now, BPF_ANY))
		count_unsummed(KIND_HISTOGRAM);
}

SEC("tp_btf/sched_wakeup")
int sched_wakeup(u64 *ctx)
{
	begins_to_wait((struct task_struct *)ctx[0]);
	return 0;
}

SEC("tp_btf/sched_wakeup_new")
int sched_wake_new(u64 *ctx)
{
	begins_to_wait((struct task_struct *)ctx[0]);
	return 0;
}

/* The tracepoint has it as an argument since 5.18 only. */
static __always_inline bool could_run_on(struct task_struct *task)
{
	struct task_struct___before_5_14 *old = (void *)task;

	if (bpf_core_field_exists(task->__state))
		return task->__state == TASK_RUNNING;
	return old->state == TASK_RUNNING;
}

SEC("tp_btf/sched_switch")
int sched_switch(u64 *ctx)
{
	bool is_preempted = ctx[0];
	struct task_struct *previous = (struct task_struct *)ctx[1];
	struct task_struct *next = (struct task_struct *)ctx[2];
	u32 tid = next->pid;
	struct tuning *tuning = tuned();
	struct histogram_sums none = {}, *sums;
	struct run_queue_record *record;
	u64 *since, ns, cgroup;
	bool is_new;

	if (is_preempted || could_run_on(previous))
		begins_to_wait(previous);
	since = bpf_map_lookup_elem(&waiting, &tid);
	if (!since || !tuning)
		return 0;
	ns = bpf_ktime_get_boot_ns() - *since;
	bpf_map_delete_elem(&waiting, &tid);
	cgroup = typed_set_cgroup_id(next->cgroups);
	if (cgroup_is_excluded(cgroup))
		return 0;
	if (kind_is_on(KIND_HISTOGRAM)) {
		sums = aggregate_sum(run_queue, &cgroup, &none, &is_new);
		if (sums)
			histogram_add(sums, ns);
		else
			count_unsummed(KIND_HISTOGRAM);
	}
	if (ns < *(volatile u64 *)&tuning->run_queue_slow_ns)
		return 0;
	record = bulk_begin(KIND_RUN_QUEUE, sizeof(*record));
	if (!record)
		return 0;
	record->header.cgroup_id = cgroup;
	record->header.pid = next->tgid;
	record->header.tid = tid;
	record->wait_ns = ns;
	bulk_end(record);
	return 0;
}
