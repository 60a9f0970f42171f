/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Whom did the OOM killer choose, who asked for the memory, and which limit left no room?
 *
 * mark_victim → oom_record. Limit and usage are read here because they are different, or gone, a moment later. Before it, as a
 * reclaim_record, how long the allocator's cgroup stood still to win memory back: the last is often too short for a burst.
 */
#include "reclaim.h"

#define CGROUP_DEPTH_MAX 12
/* More than any machine has: no limit is represented as some 2^51 or 2^52 pages, by the page size. */
#define LIMIT_PAGES_MAX (1ULL << 50)

enum { MM_FILEPAGES, MM_ANONPAGES, MM_SWAPENTS, MM_SHMEMPAGES };

/* Without what single CPUs, or before 6.2 single threads, have not yet added: some dozens of pages each. */
static __always_inline u64 rss_bytes(struct mm_struct *mm, u32 member)
{
	s64 pages = 0;

	if (bpf_core_field_exists(struct percpu_counter, count) && bpf_core_field_exists(mm->rss_stat[0].count)) {
		void *counters = __builtin_preserve_access_index(&mm->rss_stat[0]);
		struct percpu_counter *counter = counters + member * bpf_core_type_size(struct percpu_counter);

		pages = BPF_CORE_READ(counter, count);
	} else {
		struct mm_struct___before_6_2 *old = (void *)mm;
		void *counters = __builtin_preserve_access_index(&old->rss_stat.count[0]);

		bpf_probe_read_kernel(&pages, sizeof(pages), counters + member * sizeof(atomic_long_t));
	}
	return pages > 0 ? pages * page_bytes : 0;
}

#define INSIDE 1
#define OUTSIDE 2
#define KILLS_FOR_IT 3

/* Returns what a task's memory is charged to, NULL on a kernel without. */
static __always_inline struct page_counter *memory_counter(struct task_struct *task)
{
	struct cgroup_subsys_state *css = task_memory_css(task);

	if (!css)
		return NULL;
	return (void *)css - bpf_core_field_offset(struct mem_cgroup, css) + bpf_core_field_offset(struct mem_cgroup, memory);
}

/*
 * Returns the lowest counter that both are charged to, NULL when there is none. Each end goes up, then continues from the start of the
 * other: so both have come equally far when they meet. Lengths need not be counted, which would multiply the states of the verifier.
 */
static __always_inline struct page_counter *common_counter(struct page_counter *one, struct page_counter *other)
{
	struct page_counter *left = one, *right = other;
	u32 step;

	for (step = 0; step < 2 * CGROUP_DEPTH_MAX + 2 && left != right; step++) {
		left = left ? BPF_CORE_READ(left, parent) : other;
		right = right ? BPF_CORE_READ(right, parent) : one;
	}
	return left == right ? left : NULL;
}

/* Room that a full limit may still have, in pages: the kernel charges in batches. tapio-server has the same rule. */
static __always_inline s64 room_of_a_full_limit(u64 limit)
{
	u64 bytes = limit * page_bytes / 64;

	if (bytes < (1 << 20))
		bytes = 1 << 20;
	if (bytes > (16 << 20))
		bytes = 16 << 20;
	return bytes / page_bytes;
}

static __always_inline struct mem_cgroup *memcg_of(struct page_counter *counter)
{
	return (void *)counter - bpf_core_field_offset(struct mem_cgroup, memory);
}

/* Whether the OOM killer works for the limit of this cgroup or of one above it. Not on a kernel without cgroup v1's memory part. */
static __always_inline bool is_locked(struct page_counter *counter)
{
	struct mem_cgroup *memcg = memcg_of(counter);

	return bpf_core_field_exists(struct mem_cgroup, oom_lock) && BPF_CORE_READ(memcg, oom_lock);
}

#define for_each_counter(counter, height, own)                               \
	for (counter = own, height = 0; height < CGROUP_DEPTH_MAX && counter; \
	     counter = BPF_CORE_READ(counter, parent), height++)

static __always_inline void put_limit(struct page_counter *counter, u32 height, u8 inside, struct oom_record *record)
{
	s64 usage = BPF_CORE_READ(counter, usage.counter);

	record->limit_bytes = BPF_CORE_READ(counter, max) * page_bytes;
	record->usage_bytes = usage > 0 ? usage * page_bytes : 0;
	record->limit_height = height;
	record->allocator_inside = inside;
	/* The cgroup itself is looked up when the counter is sure. */
	record->limit_cgroup_id = (u64)counter;
}

static __always_inline bool is_tightest(u64 limit, s64 usage, struct oom_record *record)
{
	s64 least_room = record->limit_bytes - record->usage_bytes;

	return !record->allocator_inside || ((s64)limit - usage) * (s64)page_bytes < least_room;
}

/*
 * Finds, among the victim's memory cgroups up to the root, the one whose limit was full. The failed allocation
 * is charged to it as well, so the allocator is below it. Of several full ones it is the lowest. Kubelet gives a
 * pod the sum of its containers' limits. With the sandbox's own memory, that sum is reached a few pages before
 * the container's limit. Where none is full any more, because others gave memory back while the victim was
 * chosen, it is the highest above the allocator that the kernel has locked for this. Else it is the one with the
 * least room, and the kill was not for that one's limit, unless it was lowered under its use.
 *
 * What was found so far is kept in the record, whose content the verifier does not follow. In variables, each
 * combination of them is a state of its own, and older kernels refused the program after a million instructions.
 */
static __always_inline void find_limit(struct task_struct *task, struct task_struct *allocator, struct oom_record *record)
{
	struct page_counter *own = memory_counter(task);
	struct page_counter *common = common_counter(own, memory_counter(allocator));
	struct page_counter *counter;
	bool is_common = false;
	u32 height;

	for_each_counter(counter, height, own) {
		u64 limit = BPF_CORE_READ(counter, max);
		s64 usage = BPF_CORE_READ(counter, usage.counter);

		is_common |= counter == common;
		if (is_common && limit < LIMIT_PAGES_MAX && is_tightest(limit, usage, record)) {
			put_limit(counter, height, INSIDE, record);
			if ((s64)limit - usage <= room_of_a_full_limit(limit))
				goto found;
		}
	}
	is_common = false;
	for_each_counter(counter, height, own) {
		is_common |= counter == common;
		if (is_common && BPF_CORE_READ(counter, max) < LIMIT_PAGES_MAX && is_locked(counter))
			put_limit(counter, height, KILLS_FOR_IT, record);
	}
	if (record->allocator_inside)
		goto found;
	for_each_counter(counter, height, own) {
		u64 limit = BPF_CORE_READ(counter, max);

		if (limit < LIMIT_PAGES_MAX && is_tightest(limit, BPF_CORE_READ(counter, usage.counter), record))
			put_limit(counter, height, OUTSIDE, record);
	}
found:
	if (record->allocator_inside) {
		struct mem_cgroup *memcg = memcg_of((struct page_counter *)record->limit_cgroup_id);
		struct cgroup *cgroup = BPF_CORE_READ(memcg, css.cgroup);

		record->limit_cgroup_id = cgroup_id(cgroup);
		bpf_probe_read_kernel_str(record->limit_name, LIMIT_NAME_BYTES, BPF_CORE_READ(cgroup, kn, name));
	}
}

/*
 * Finds the task with this id in the node's own pid namespace, as find_task_by_pid_ns() does. Level 0 of any
 * process's numbers is that namespace, whose idr is a radix tree of struct pid. NULL when there is none.
 */
static __always_inline struct task_struct *find_task(u32 id)
{
	struct pid *own = BPF_CORE_READ(current_task(), thread_pid);
	struct pid_namespace *node = BPF_CORE_READ(own, numbers[0].ns);
	u64 entry = (u64)BPF_CORE_READ(node, idr.idr_rt.xa_head);
	u32 slots = bpf_core_field_size(struct xa_node, slots) / sizeof(void *);
	struct hlist_node *link;
	struct task_struct *task;
	int depth;

	/* An inner node's address is marked by bit 1; 32 bits of id are at most 8 levels of 16 slots. */
	for (depth = 0; depth < 8 && (entry & 3) == 2; depth++) {
		struct xa_node *inner = (struct xa_node *)(entry & ~3ULL);
		u8 shift = BPF_CORE_READ(inner, shift);
		void **first = __builtin_preserve_access_index(&inner->slots[0]);
		u64 next = 0;

		bpf_probe_read_kernel(&next, sizeof(next), first + ((id >> (shift & 31)) & (slots - 1)));
		entry = next;
	}
	if (!entry || entry & 3)
		return NULL;
	link = BPF_CORE_READ((struct pid *)entry, tasks[0].first);
	if (!link)
		return NULL;
	task = (void *)link - bpf_core_field_offset(struct task_struct, pid_links);
	return (u32)BPF_CORE_READ(task, pid) == id ? task : NULL;
}

SEC("raw_tracepoint/mark_victim")
int oom_victim(struct bpf_raw_tracepoint_args *ctx)
{
	/* A task since 6.9 and in stable kernels that took it over, before that a process id. */
	u64 subject = ctx->args[0];
	bool is_task = subject >> 32;
	struct task_struct *allocator = current_task();
	struct task_struct *victim = is_task ? (struct task_struct *)subject : find_task(subject);
	struct stall_key of_node = { .cgroup_id = current_cgroup_id() };
	struct stall_key of_cgroup = { .cgroup_id = of_node.cgroup_id, .memcg = 1 };
	struct oom_record *record;

	emit_rest(&of_cgroup);
	emit_rest(&of_node);
	record = record_begin(KIND_OOM, sizeof(*record));
	if (!record)
		return 0;
	record->allocator_pid = READ_CURRENT(allocator, tgid);
	record->allocator_tid = READ_CURRENT(allocator, pid);
	record->allocator_cgroup_id = of_node.cgroup_id;
	task_comm(allocator, record->allocator_comm);
	if (victim) {
		struct mm_struct *mm = BPF_CORE_READ(victim, mm);

		set_subject(&record->header, victim);
		task_namespace_pid(victim, &record->header, &record->ns_pid, &record->ns_level);
		record->oom_score_adj = BPF_CORE_READ(victim, signal, oom_score_adj);
		record->start_time_ns = BPF_CORE_READ(victim, group_leader, start_boottime);
		record->parent_pid = BPF_CORE_READ(victim, group_leader, real_parent, tgid);
		task_comm(victim, record->comm);
		if (mm) {
			record->anon_rss_bytes = rss_bytes(mm, MM_ANONPAGES);
			record->file_rss_bytes = rss_bytes(mm, MM_FILEPAGES);
			record->total_vm_bytes = BPF_CORE_READ(mm, total_vm) * page_bytes;
			record->shmem_rss_bytes = rss_bytes(mm, MM_SHMEMPAGES);
		}
	} else {
		/* The allocator shares the limit with the victim, most often the cgroup too. */
		record->header.cgroup_id = record->allocator_cgroup_id;
		record->header.pid = subject;
		record->header.tid = subject;
	}
	find_limit(victim ? victim : allocator, allocator, record);
	record_end(record, true);
	return 0;
}
