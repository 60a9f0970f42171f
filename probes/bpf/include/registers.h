/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* What a task had in its registers when it made a system call. */
#pragma once

#include "task.h"

/* No typedef: the kernel has no type of that name, and the loader looks for one. */
#if defined(__TARGET_ARCH_x86)
#define registers struct pt_regs___x86

static __always_inline u32 call_number(registers *regs)
{
	return BPF_CORE_READ(regs, orig_ax);
}

/* rt_sigqueueinfo, rt_tgsigqueueinfo and pidfd_send_signal; then as 32-bit processes and those of the x32 ABI call them. */
static __always_inline bool queues_signal(u32 call)
{
	return call == 129 || call == 297 || call == 424 || call == 178 || call == 335 || call == 0x4000020c ||
	       call == 0x40000218 || call == 0x400001a8;
}
#else
#define registers struct pt_regs___arm64

static __always_inline u32 call_number(registers *regs)
{
	return BPF_CORE_READ(regs, syscallno);
}

/* rt_sigqueueinfo, rt_tgsigqueueinfo and pidfd_send_signal; then as 32-bit processes call them. */
static __always_inline bool queues_signal(u32 call)
{
	return call == 138 || call == 240 || call == 424 || call == 178 || call == 363;
}
#endif

#define HAS_TASK_REGISTERS bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_task_pt_regs)
/* Of a kernel with pages of 4 KiB and without KASAN. */
#define STACK_BYTES_BEFORE_5_15 16384

/*
 * Returns the registers of the system call that the running task is in. They are at the top of its stack: what is between
 * task->stack and them is on it.
 */
static __always_inline registers *call_registers(struct task_struct *task)
{
	if (HAS_TASK_REGISTERS)
		return (registers *)bpf_task_pt_regs(task);
	return READ_CURRENT(task, stack) + STACK_BYTES_BEFORE_5_15 - bpf_core_type_size(registers);
}
