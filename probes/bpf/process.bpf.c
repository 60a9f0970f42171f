/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Which processes begin and end, and how did they end?
 *
 * sched_process_fork → fork_record, sched_process_exec → exec_record or, when asked for, exec_command_record,
 * sched_process_exit → exit_record; one a process.
 */
#include "task.h"

#define COMMAND_WITH_ARGUMENTS 2

SEC("tp_btf/sched_process_fork")
int process_fork(u64 *ctx)
{
	struct task_struct *task = (struct task_struct *)ctx[1];
	u32 pid = task->pid, tgid = task->tgid, parent;
	struct fork_record *record;

	/* A thread has its process's id as tgid. */
	if (pid != tgid)
		return 0;
	parent = task->real_parent->tgid;
	if (parent == own_tgid)
		return 0;
	record = bulk_begin(KIND_FORK, sizeof(*record));
	if (!record)
		return 0;
	record->header.cgroup_id = typed_set_cgroup_id(task->cgroups);
	record->header.pid = tgid;
	record->header.tid = pid;
	record->parent_pid = parent;
	typed_namespace_pid(task, tgid, &record->ns_pid, &record->ns_level);
	task_comm(task, record->comm);
	bulk_end(record);
	return 0;
}

/* Adds who started the process, where that process is, and when. */
static __always_inline void set_origin(struct task_struct *task, u32 *parent_pid, u64 *start_time_ns, u64 *parent_cgroup_id)
{
	*parent_pid = READ_CURRENT(task, real_parent, tgid);
	*start_time_ns = READ_CURRENT(task, group_leader, start_boottime);
	if (HAS_TYPED_TASK)
		*parent_cgroup_id = typed_set_cgroup_id(task->real_parent->cgroups);
	else
		*parent_cgroup_id = set_cgroup_id(BPF_CORE_READ(task, real_parent, cgroups));
}

/* Adds what runs, and its first arguments as the process has them: each ends with a NUL, the last perhaps cut. */
static __always_inline void emit_command(struct linux_binprm *binary, bool with_arguments)
{
	struct task_struct *task = current_task();
	u64 start = READ_CURRENT(task, mm, arg_start);
	u64 bytes = READ_CURRENT(task, mm, arg_end) - start, cgroup_id = current_cgroup_id();
	struct exec_command_record *record;

	record = record_begin_of(KIND_EXEC_COMMAND, sizeof(*record), cgroup_id, false);
	if (!record)
		return;
	set_current_subject(&record->header, cgroup_id);
	set_origin(task, &record->parent_pid, &record->start_time_ns, &record->parent_cgroup_id);
	/* A thread that replaces its image has become the leader. */
	current_namespace_pid(task, record->header.pid, &record->ns_pid, &record->ns_level);
	bpf_get_current_comm(record->comm, COMM_BYTES);
	bpf_probe_read_kernel_str(record->path, EXEC_PATH_BYTES, BPF_CORE_READ(binary, filename));
	if (with_arguments) {
		if (bytes > EXEC_ARGUMENT_BYTES)
			bytes = EXEC_ARGUMENT_BYTES;
		if (!bpf_probe_read_user(record->arguments, bytes, (void *)start))
			record->argument_bytes = bytes;
	}
	record_end(record, false);
}

SEC("raw_tracepoint/sched_process_exec")
int process_exec(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = current_task();
	struct tuning *tuning = tuned();
	u32 command = tuning ? *(volatile u32 *)&tuning->exec_command : 0;
	struct exec_record *record;
	u64 cgroup_id;

	if (current_tgid() == own_tgid)
		return 0;
	if (command) {
		emit_command((struct linux_binprm *)ctx->args[2], command >= COMMAND_WITH_ARGUMENTS);
		return 0;
	}
	cgroup_id = current_cgroup_id();
	record = record_begin_of(KIND_EXEC, sizeof(*record), cgroup_id, false);
	if (!record)
		return 0;
	set_current_subject(&record->header, cgroup_id);
	set_origin(task, &record->parent_pid, &record->start_time_ns, &record->parent_cgroup_id);
	/* A thread that replaces its image has become the leader. */
	current_namespace_pid(task, record->header.pid, &record->ns_pid, &record->ns_level);
	bpf_get_current_comm(record->comm, COMM_BYTES);
	record_end(record, false);
	return 0;
}

struct process_key {
	u64 start_time_ns;
	u32 pid;
	u32 pad;
};

/* Processes whose end was recorded, on kernels that do not say which thread was the last. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct process_key);
	__type(value, u8);
} ended SEC(".maps");

/*
 * Whether the process ends with this thread. Older kernels only have the count of live threads, lowered before the
 * tracepoint: the last two threads, ending at once, may both find 0 there.
 */
static __always_inline bool is_last_thread(struct bpf_raw_tracepoint_args *ctx, struct task_struct *task)
{
	struct process_key key = {};
	u8 mark = 1;
	int error;

	if (bpf_core_field_exists(struct trace_event_raw_sched_process_exit, group_dead))
		return (u8)ctx->args[1];
	if (READ_CURRENT(task, signal, live.counter))
		return false;
	key.start_time_ns = READ_CURRENT(task, group_leader, start_boottime);
	key.pid = READ_CURRENT(task, tgid);
	/* An int: before 6.4 the map's own function is called, which returns one, and the upper half of the register is not set. */
	error = bpf_map_update_elem(&ended, &key, &mark, BPF_NOEXIST);
	return error != -EEXIST;
}

SEC("raw_tracepoint/sched_process_exit")
int process_exit(struct bpf_raw_tracepoint_args *ctx)
{
	struct task_struct *task = current_task(), *leader;
	struct signal_struct *signal;
	struct exit_record *record;
	u32 status, ns_pid, ns_level;
	u64 cgroup_id;

	if (!is_last_thread(ctx, task))
		return 0;
	cgroup_id = current_cgroup_id();
	leader = READ_CURRENT(task, group_leader);
	signal = READ_CURRENT(task, signal);
	current_namespace_pid(leader, current_tgid(), &ns_pid, &ns_level);
	/* When the init of a pid namespace ends, its container ends, as a rule. */
	record = record_begin_of(KIND_EXIT, sizeof(*record), cgroup_id, ns_level && ns_pid == 1);
	if (!record)
		return 0;
	set_current_subject(&record->header, cgroup_id);
	record->ns_pid = ns_pid;
	record->ns_level = ns_level;
	record->parent_pid = READ_CURRENT(leader, real_parent, tgid);
	if (READ_CURRENT(signal, flags) & SIGNAL_GROUP_EXIT)
		status = READ_CURRENT(signal, group_exit_code);
	else
		status = READ_CURRENT(leader, exit_code);
	record->status = status;
	record->start_time_ns = READ_CURRENT(leader, start_boottime);
	record->oom_score_adj = READ_CURRENT(signal, oom_score_adj);
	task_comm(leader, record->comm);
	record_end(record, status != 0);
	return 0;
}
