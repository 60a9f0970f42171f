/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Who sent the signal that ended a process? And which signal did end it?
 *
 * signal_generate → signal_record, signal_deliver → signal_delivered_record, for the signals in signal_mask. A SIGKILL that
 * takes all threads is one record: the kernel spreads it without generating it again.
 */
#include "registers.h"
#include "task.h"

/* Values in place of a pointer: no details, from the running task; and from the kernel itself. */
#define SEND_SIG_NOINFO 0
#define SEND_SIG_PRIV 1

#define SI_USER 0
#define SI_KERNEL 0x80

#define SI_ASYNCNL (-60)
#define SI_SIGIO (-5)
#define SI_ASYNCIO (-4)
#define SI_MESGQ (-3)
#define SI_TIMER (-2)

#define TRACE_SIGNAL_IGNORED 1
#define TRACE_SIGNAL_ALREADY_PENDING 2
#define SIGKILL 9
#define SIGWINCH 28

/*
 * Whether the running task brings the code along, by rt_sigqueueinfo(2) or its like: any process may say that a timer ran out. What
 * it brings lies on its stack. A timer's lies elsewhere, wherever the timer runs out; a message queue's lies on the stack of who
 * writes to it, in another call. Positive codes are refused, except to the caller itself.
 */
static __always_inline bool is_made_up(struct kernel_siginfo *info, s32 code)
{
	struct task_struct *task = current_task();
	registers *regs = call_registers(task);

	if ((u64)info < (u64)READ_CURRENT(task, stack) || (u64)info >= (u64)regs)
		return false;
	return code == SI_TIMER || queues_signal(call_number(regs));
}

/* A timer that ran out, a message queue, finished I/O: the task that was interrupted has nothing to do with it. */
static __always_inline bool is_from_kernel(struct kernel_siginfo *info, s32 code)
{
	if (code > 0)
		return true;
	return ((code <= SI_TIMER && code >= SI_SIGIO) || code == SI_ASYNCNL) && !is_made_up(info, code);
}

/* Whether the target leaves the signal to its default action. */
static __always_inline bool is_unhandled(struct task_struct *target, u32 number)
{
	struct sighand_struct *sighand = BPF_CORE_READ(target, sighand);
	void *actions = __builtin_preserve_access_index(&sighand->action[0]);
	struct k_sigaction *action = actions + (number - 1) * bpf_core_type_size(struct k_sigaction);

	return !BPF_CORE_READ(action, sa.sa_handler);
}

/* Whether the process has used up the CPU time that it may use (RLIMIT_CPU): the kernel kills it for that without details. */
static __always_inline bool is_over_cpu_limit(struct task_struct *target)
{
	struct signal_struct *group = target->signal;
	u64 seconds = group->rlim[0].rlim_max;
	s64 used = group->cputimer.cputime_atomic.utime.counter + group->cputimer.cputime_atomic.stime.counter;

	return seconds < ~0ULL / NSEC_PER_SEC && used > 0 && (u64)used >= seconds * NSEC_PER_SEC;
}

/* Signals that their target handles or ignores: once a second is enough to know of each. */
#define HANDLED_INTERVAL_NS NSEC_PER_SEC

struct handled_key {
	u32 pid;
	u32 signal;
};

struct handled_signal {
	u64 sent_ns;
	u32 repeats;
	u32 pad;
};

struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 4096);
	__type(key, struct handled_key);
	__type(value, struct handled_signal);
} handled SEC(".maps");

/*
 * A program may send itself hundreds of thousands of them a second, across cgroups too: they must not crowd out what kills. Of one
 * that is to be recorded, `repeats` gets the number of those that were not since the one before.
 */
static __always_inline bool was_sent_lately(u32 tgid, u32 number, u32 *repeats)
{
	struct handled_key key = { .pid = tgid, .signal = number };
	struct handled_signal fresh = { .sent_ns = bpf_ktime_get_ns() };
	struct handled_signal *known = bpf_map_lookup_elem(&handled, &key);

	if (!known) {
		bpf_map_update_elem(&handled, &key, &fresh, BPF_ANY);
		return false;
	}
	if (fresh.sent_ns - known->sent_ns < HANDLED_INTERVAL_NS) {
		__sync_fetch_and_add(&known->repeats, 1);
		return true;
	}
	*repeats = known->repeats;
	known->repeats = 0;
	known->sent_ns = fresh.sent_ns;
	return false;
}

SEC("tp_btf/signal_generate")
int signal_sent(u64 *ctx)
{
	u32 number = ctx[0], repeats = 0, pid, tgid;
	struct kernel_siginfo *info = (struct kernel_siginfo *)ctx[1];
	struct task_struct *target = (struct task_struct *)ctx[2];
	u8 result = ctx[4];
	u64 sender, sender_cgroup, target_cgroup;
	struct task_struct *task, *parent;
	struct signal_record *record;
	bool by_kernel;
	s32 code;

	if (number - 1 > 63)
		return 0;
	if ((u64)info == SEND_SIG_NOINFO)
		code = SI_USER;
	else if ((u64)info == SEND_SIG_PRIV)
		code = SI_KERNEL;
	else
		/* By a call: since it may be one of the two numbers above, newer kernels take the argument for no pointer. */
		code = BPF_CORE_READ(info, si_code);
	by_kernel = is_from_kernel(info, code);
	if (!(signal_mask >> (number - 1) & 1)) {
		if (!(signal_mask_unhandled >> (number - 1) & 1))
			return 0;
		/* By default a change of the window's size is no reason to end. A timer's signal says nothing of who was running. */
		if ((number == SIGWINCH || !is_unhandled(target, number)) &&
		    (by_kernel || current_cgroup_id() == typed_set_cgroup_id(target->cgroups) ||
		     was_sent_lately(target->tgid, number, &repeats)))
			return 0;
	} else if ((result == TRACE_SIGNAL_IGNORED || result == TRACE_SIGNAL_ALREADY_PENDING ||
		    !is_unhandled(target, number)) &&
		   (by_kernel || current_cgroup_id() == typed_set_cgroup_id(target->cgroups)) &&
		   was_sent_lately(target->tgid, number, &repeats)) {
		/* Survives a signal that would end it, again and again: a runtime that tests its memory by faults, a loop of abort(). */
		return 0;
	}
	pid = target->pid;
	tgid = target->tgid;
	if (tgid == own_tgid)
		return 0;

	sender_cgroup = current_cgroup_id();
	target_cgroup = typed_set_cgroup_id(target->cgroups);
	/* Of a signal that the kernel sent, the task that was running may know nothing. */
	record = record_begin_of(KIND_SIGNAL, sizeof(*record), by_kernel ? target_cgroup : sender_cgroup,
				 sender_cgroup != target_cgroup);
	if (!record)
		return 0;
	record->sender_cgroup_id = sender_cgroup;
	task = current_task();
	record->sender_start_time_ns = READ_CURRENT(task, group_leader, start_boottime);
	parent = READ_CURRENT(task, real_parent, group_leader);
	record->sender_parent_pid = READ_CURRENT(task, real_parent, tgid);
	task_comm(parent, record->sender_parent_comm);
	record->header.cgroup_id = target_cgroup;
	record->header.pid = tgid;
	record->header.tid = pid;
	record->signal = number;
	record->code = code;
	sender = bpf_get_current_pid_tgid();
	record->sender_pid = sender >> 32;
	record->sender_tid = sender;
	typed_namespace_pid(pid == tgid ? target : target->group_leader, tgid, &record->ns_pid, &record->ns_level);
	record->from_kernel = by_kernel;
	if (number == SIGKILL && code == SI_KERNEL)
		record->over_cpu_limit = is_over_cpu_limit(target);
	record->result = result;
	record->repeats = repeats;
	task_comm(target, record->comm);
	bpf_get_current_comm(record->sender_comm, COMM_BYTES);
	record_end(record, result != TRACE_SIGNAL_IGNORED);
	return 0;
}

#define SIGNAL_UNKILLABLE 0x40

struct killed_key {
	u64 start_time_ns;
	u32 pid;
	u32 pad;
};

/* Processes with such a record: each of their threads takes the signal. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, 8192);
	__type(key, struct killed_key);
	__type(value, u8);
} killed SEC(".maps");

/*
 * A signal that ends the process without a dump ends all threads at once, as a SIGKILL without details; which it was is
 * in the group's exit code then.
 */
SEC("raw_tracepoint/signal_deliver")
int signal_fatal(struct bpf_raw_tracepoint_args *ctx)
{
	u32 number = ctx->args[0];
	u64 info = ctx->args[1];
	struct k_sigaction *action = (struct k_sigaction *)ctx->args[2];
	struct task_struct *task = current_task();
	struct signal_struct *group = READ_CURRENT(task, signal);
	u32 flags = READ_CURRENT(group, flags);
	struct signal_delivered_record *record;
	struct killed_key key = {};
	s32 code = SI_USER;
	u64 cgroup_id;
	u8 mark = 1;

	if (BPF_CORE_READ(action, sa.sa_handler))
		return 0;
	if (flags & SIGNAL_GROUP_EXIT)
		/* 0 for a process that exits by itself. */
		number = READ_CURRENT(group, group_exit_code) & 0x7f;
	else if (info == SEND_SIG_NOINFO)
		/* The other threads of a process that replaces its image. */
		return 0;
	else if (flags & SIGNAL_UNKILLABLE && number != SIGKILL)
		/* The init of a namespace lives on. */
		return 0;
	if (info > SEND_SIG_PRIV)
		code = BPF_CORE_READ((struct kernel_siginfo *)info, si_code);
	if (number - 1 > 63 || !((signal_mask | signal_mask_unhandled) >> (number - 1) & 1))
		return 0;
	key.start_time_ns = READ_CURRENT(task, group_leader, start_boottime);
	key.pid = current_tgid();
	if (key.pid == own_tgid)
		return 0;
	/* An int, see process.bpf.c. */
	if ((int)bpf_map_update_elem(&killed, &key, &mark, BPF_NOEXIST) == -EEXIST)
		return 0;
	cgroup_id = current_cgroup_id();
	record = record_begin_of(KIND_SIGNAL_DELIVERED, sizeof(*record), cgroup_id, false);
	if (!record)
		return 0;
	set_current_subject(&record->header, cgroup_id);
	record->signal = number;
	record->code = code;
	current_namespace_pid(READ_CURRENT(task, group_leader), record->header.pid, &record->ns_pid, &record->ns_level);
	bpf_get_current_comm(record->comm, COMM_BYTES);
	record_end(record, true);
	return 0;
}
