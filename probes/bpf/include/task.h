/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* Who a task is: its ids, its place in pid namespaces, its cgroup. */
#pragma once

#include "tapio.h"

#define SIGNAL_GROUP_EXIT 4
#define EEXIST 17

/*
 * Returns the running task as a pointer whose type the verifier knows. Plain loads read
 * its fields, and what they point to, at a tenth of the price of a call. Since 5.11;
 * before, it is as any other task. The loader leaves one of the two ways. Tracepoints
 * only. Those of section tp_btf have such pointers as arguments too, on every kernel.
 */
#define HAS_TYPED_TASK bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_get_current_task_btf)

static __always_inline struct task_struct *current_task(void)
{
	if (HAS_TYPED_TASK)
		return (struct task_struct *)bpf_get_current_task_btf();
	return (struct task_struct *)bpf_get_current_task();
}

/* Reads a field of what current_task() returned: READ_CURRENT(task, signal, flags) is task->signal->flags. */
#define READ_CURRENT(task, ...)                                                                                                \
	({                                                                                                                     \
		typeof(___arrow(task, __VA_ARGS__)) field;                                                                     \
                                                                                                                               \
		if (HAS_TYPED_TASK)                                                                                            \
			field = ___arrow(task, __VA_ARGS__);                                                                   \
		else                                                                                                           \
			BPF_CORE_READ_INTO(&field, task, __VA_ARGS__);                                                         \
		field;                                                                                                         \
	})

/* Returns where a css_set has its pointer to the memory controller's state; NULL on a kernel without. */
static __always_inline struct cgroup_subsys_state **memory_slot(struct css_set *set)
{
	if (!bpf_core_enum_value_exists(enum cgroup_subsys_id, memory_cgrp_id))
		return NULL;
	return __builtin_preserve_access_index(&set->subsys[0]) + bpf_core_enum_value(enum cgroup_subsys_id, memory_cgrp_id);
}

/* Returns the task's memory cgroup, NULL on a kernel without. */
static __always_inline struct cgroup_subsys_state *task_memory_css(struct task_struct *task)
{
	struct cgroup_subsys_state *css = NULL, **slot = memory_slot(BPF_CORE_READ(task, cgroups));

	if (slot)
		bpf_probe_read_kernel(&css, sizeof(css), slot);
	return css;
}

/* Returns a cgroup's id for user space (its directory's inode); ids of hierarchies other than version 2's are marked. */
static __always_inline u64 cgroup_id(struct cgroup *cgroup)
{
	u64 id = BPF_CORE_READ(cgroup, kn, id);

	return BPF_CORE_READ(cgroup, root, hierarchy_id) ? id | CGROUP_V1_MEMORY : id;
}

/*
 * Returns, for a task in version 2's root, its memory cgroup's id as found. Every root has the same
 * number. A memory cgroup other than the root is of version 1 then: in version 2 the task would be in it.
 */
static __always_inline u64 below_version_2_root(u64 memory_cgroup_id)
{
	return memory_cgroup_id > CGROUP_ROOT ? memory_cgroup_id | CGROUP_V1_MEMORY : CGROUP_ROOT;
}

#define CONTAINER_ID_DIGITS 64

/* A container's cgroup has at least its id in its name. */
static __always_inline bool names_container(const char *name)
{
	char bytes[CONTAINER_ID_DIGITS + 8];

	return bpf_probe_read_kernel_str(bytes, sizeof(bytes), name) > CONTAINER_ID_DIGITS;
}

/*
 * Returns the cgroup of a typed pointer's task, see current_task(). With a cgroupfs driver on a hybrid host, version 2 only has the
 * runtime's own unit, and the version 1 memory hierarchy has the container. Then it is the container: deeper, and named like one.
 */
static __always_inline u64 typed_set_cgroup_id(struct css_set *set)
{
	u64 id = set->dfl_cgrp->kn->id;

	if (memory_is_version_1 && id != CGROUP_ROOT) {
		struct cgroup_subsys_state **slot = memory_slot(set);

		if (slot && (*slot)->cgroup->level > set->dfl_cgrp->level && names_container((*slot)->cgroup->kn->name))
			return (*slot)->cgroup->kn->id | CGROUP_V1_MEMORY;
	}
	if (id == CGROUP_ROOT) {
		struct cgroup_subsys_state **slot = memory_slot(set);

		if (slot)
			return below_version_2_root((*slot)->cgroup->kn->id);
	}
	return id;
}

static __always_inline u64 set_cgroup_id(struct css_set *set)
{
	u64 id = BPF_CORE_READ(set, dfl_cgrp, kn, id);
	struct cgroup_subsys_state *css = NULL, **slot = memory_slot(set);

	if ((id != CGROUP_ROOT && !memory_is_version_1) || !slot)
		return id;
	bpf_probe_read_kernel(&css, sizeof(css), slot);
	if (id != CGROUP_ROOT) {
		if (css && BPF_CORE_READ(css, cgroup, level) > BPF_CORE_READ(set, dfl_cgrp, level) &&
		    names_container(BPF_CORE_READ(css, cgroup, kn, name)))
			return BPF_CORE_READ(css, cgroup, kn, id) | CGROUP_V1_MEMORY;
		return id;
	}
	return below_version_2_root(css ? BPF_CORE_READ(css, cgroup, kn, id) : CGROUP_ROOT);
}

/* Version 2 identifies, unless the task is in its root or only version 1 names a container: then the version 1 memory hierarchy may know more. */
static __always_inline u64 task_cgroup_id(struct task_struct *task)
{
	return set_cgroup_id(BPF_CORE_READ(task, cgroups));
}

/* Returns the cgroup of the running task. */
static __always_inline u64 current_cgroup_id(void)
{
	struct task_struct *task = current_task();

	return HAS_TYPED_TASK ? typed_set_cgroup_id(task->cgroups) : task_cgroup_id(task);
}

struct ids {
	u32 pid;
	u32 tgid;
};

/* Reads both in one read, where they are neighbours. */
static __always_inline struct ids task_ids(struct task_struct *task)
{
	struct ids ids = {};

	if (bpf_core_field_offset(task->tgid) == bpf_core_field_offset(task->pid) + sizeof(u32)) {
		bpf_probe_read_kernel(&ids, sizeof(ids), __builtin_preserve_access_index(&task->pid));
	} else {
		ids.pid = BPF_CORE_READ(task, pid);
		ids.tgid = BPF_CORE_READ(task, tgid);
	}
	return ids;
}

static __always_inline void set_subject(struct header *header, struct task_struct *task)
{
	struct ids ids = task_ids(task);

	header->cgroup_id = task_cgroup_id(task);
	header->pid = ids.tgid;
	header->tid = ids.pid;
}

/* `cgroup_id` is the task's own: the caller has asked for it already. */
static __always_inline void set_current_subject(struct header *header, u64 cgroup_id)
{
	u64 ids = bpf_get_current_pid_tgid();

	header->cgroup_id = cgroup_id;
	header->pid = ids >> 32;
	header->tid = ids;
}

static __always_inline u32 current_tgid(void)
{
	return bpf_get_current_pid_tgid() >> 32;
}

/* Returns the thread whose ids are the process's: the task itself, where it has them. */
static __always_inline struct task_struct *leader_of(struct task_struct *task, struct header *subject)
{
	return subject->pid == subject->tid ? task : BPF_CORE_READ(task, group_leader);
}

/* Reads the id of a process in its own pid namespace, and that namespace's depth. `leader` is of the process `tgid`. */
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

/* Reads the same ids through a typed pointer. */
static __always_inline void typed_namespace_pid(struct task_struct *leader, u32 tgid, u32 *ns_pid, u32 *ns_level)
{
	u32 level = leader->thread_pid->level;

	*ns_pid = tgid;
	*ns_level = level;
	/* A typed pointer cannot be indexed by a value that is known only at run time. */
	if (level)
		leader_namespace_pid(leader, tgid, ns_pid, ns_level);
}

/* Reads the same ids of a task that READ_CURRENT may read. */
static __always_inline void current_namespace_pid(struct task_struct *leader, u32 tgid, u32 *ns_pid, u32 *ns_level)
{
	if (HAS_TYPED_TASK)
		typed_namespace_pid(leader, tgid, ns_pid, ns_level);
	else
		leader_namespace_pid(leader, tgid, ns_pid, ns_level);
}

static __always_inline void task_comm(struct task_struct *task, char comm[COMM_BYTES])
{
	bpf_probe_read_kernel_str(comm, COMM_BYTES, __builtin_preserve_access_index(&task->comm));
}
