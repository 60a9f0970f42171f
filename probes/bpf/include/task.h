/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* Who a task is: its ids, its place in pid namespaces, its cgroup. */
#pragma once

#include "tapio.h"

#define SIGNAL_GROUP_EXIT 4
#define EEXIST 17

static __always_inline struct task_struct *current_task(void)
{
	return (struct task_struct *)bpf_get_current_task();
}

/* The task's memory cgroup, NULL on a kernel without. */
static __always_inline struct cgroup_subsys_state *task_memory_css(struct task_struct *task)
{
	struct cgroup_subsys_state *css = NULL;
	struct css_set *set;
	u32 index;

	if (!bpf_core_enum_value_exists(enum cgroup_subsys_id, memory_cgrp_id))
		return NULL;
	index = bpf_core_enum_value(enum cgroup_subsys_id, memory_cgrp_id);
	set = BPF_CORE_READ(task, cgroups);
	bpf_probe_read_kernel(&css, sizeof(css), __builtin_preserve_access_index(&set->subsys[0]) + index);
	return css;
}

/* The id by which user space knows it (the inode of its directory); ids of hierarchies other than version 2's are marked. */
static __always_inline u64 cgroup_id(struct cgroup *cgroup)
{
	u64 id = BPF_CORE_READ(cgroup, kn, id);

	return BPF_CORE_READ(cgroup, root, hierarchy_id) ? id | CGROUP_V1_MEMORY : id;
}

/* Of a task in version 2's root. */
static __always_inline u64 version_1_cgroup_id(struct task_struct *task)
{
	struct cgroup_subsys_state *css = task_memory_css(task);
	struct cgroup *memory = css ? BPF_CORE_READ(css, cgroup) : NULL;

	return memory && BPF_CORE_READ(memory, level) > 0 ? cgroup_id(memory) : CGROUP_ROOT;
}

/* Version 2 identifies, unless the task is in its root: then the version 1 memory hierarchy may know more. */
static __always_inline u64 task_cgroup_id(struct task_struct *task)
{
	u64 id = BPF_CORE_READ(task, cgroups, dfl_cgrp, kn, id);

	return id != CGROUP_ROOT ? id : version_1_cgroup_id(task);
}

/* The same of the running task: one call where the above reads four times. Raw tracepoints only. */
static __always_inline u64 current_cgroup_id(struct task_struct *task)
{
	u64 id = bpf_get_current_cgroup_id();

	return id != CGROUP_ROOT ? id : version_1_cgroup_id(task);
}

static __always_inline void set_subject(struct header *header, struct task_struct *task)
{
	header->cgroup_id = task_cgroup_id(task);
	header->pid = BPF_CORE_READ(task, tgid);
	header->tid = BPF_CORE_READ(task, pid);
}

static __always_inline void set_current_subject(struct header *header, struct task_struct *task)
{
	u64 ids = bpf_get_current_pid_tgid();

	header->cgroup_id = current_cgroup_id(task);
	header->pid = ids >> 32;
	header->tid = ids;
}

static __always_inline u32 current_tgid(void)
{
	return bpf_get_current_pid_tgid() >> 32;
}

/* The thread that the process's ids are of: itself, where it has them. */
static __always_inline struct task_struct *leader_of(struct task_struct *task, struct header *subject)
{
	return subject->pid == subject->tid ? task : BPF_CORE_READ(task, group_leader);
}

/* The id of a process in its own pid namespace, and that namespace's depth. `leader` is of the process `tgid`. */
static __always_inline void leader_namespace_pid(struct task_struct *leader, u32 tgid, u32 *ns_pid, u32 *ns_level)
{
	struct pid *pid = BPF_CORE_READ(leader, thread_pid);
	u32 level = BPF_CORE_READ(pid, level);
	void *numbers = __builtin_preserve_access_index(&pid->numbers[0]);
	struct upid *own = numbers + level * bpf_core_type_size(struct upid);

	/* The ids that tasks have are those of the node's namespace, the outermost. */
	*ns_pid = level ? BPF_CORE_READ(own, nr) : tgid;
	*ns_level = level;
}

/* The same of any thread. */
static __always_inline void task_namespace_pid(struct task_struct *task, struct header *subject, u32 *ns_pid, u32 *ns_level)
{
	leader_namespace_pid(leader_of(task, subject), subject->pid, ns_pid, ns_level);
}

static __always_inline void task_comm(struct task_struct *task, char comm[COMM_BYTES])
{
	bpf_probe_read_kernel_str(comm, COMM_BYTES, __builtin_preserve_access_index(&task->comm));
}
