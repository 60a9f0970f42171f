/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Who sent the signal that ended a process?
 *
 * signal_generate → signal_record, for the signals in signal_mask. A SIGKILL that takes all threads is one record: the
 * kernel spreads it without generating it again.
 */
#include "task.h"

/* Instead of a pointer: no details, from the running task; and from the kernel itself. */
#define SEND_SIG_NOINFO 0
#define SEND_SIG_PRIV 1

#define SI_USER 0
#define SI_KERNEL 0x80

#define TRACE_SIGNAL_IGNORED 1

SEC("raw_tracepoint/signal_generate")
int signal_sent(struct bpf_raw_tracepoint_args *ctx)
{
	u32 number = ctx->args[0];
	u64 info = ctx->args[1];
	struct task_struct *target = (struct task_struct *)ctx->args[2];
	u8 result = ctx->args[4];
	struct task_struct *sender = current_task();
	struct signal_record *record;
	s32 code;

	if (number - 1 > 63 || !(signal_mask >> (number - 1) & 1))
		return 0;
	if ((u32)BPF_CORE_READ(target, tgid) == own_tgid)
		return 0;
	if (info == SEND_SIG_NOINFO)
		code = SI_USER;
	else if (info == SEND_SIG_PRIV)
		code = SI_KERNEL;
	else
		code = BPF_CORE_READ((struct kernel_siginfo *)info, si_code);

	record = record_begin(KIND_SIGNAL, sizeof(*record));
	if (!record)
		return 0;
	set_subject(&record->header, target);
	record->signal = number;
	record->code = code;
	record->sender_pid = BPF_CORE_READ(sender, tgid);
	record->sender_tid = BPF_CORE_READ(sender, pid);
	record->sender_cgroup_id = task_cgroup_id(sender);
	task_namespace_pid(target, &record->ns_pid, &record->ns_level);
	record->from_kernel = code > 0;
	record->result = result;
	task_comm(target, record->comm);
	task_comm(sender, record->sender_comm);
	record_end(record, result != TRACE_SIGNAL_IGNORED);
	return 0;
}
