/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Which system calls fail because room, descriptors or processes ran out, or a disk failed? And who opens the files that are audited?
 *
 * sys_exit → syscall_error_record, the first of each cgroup, call and errno in an interval at once and the others summed up;
 * sys_exit → file_open_record. Both are off unless asked for: with them every system call of the node takes the slow way out.
 */
#include "aggregate.h"
#include "registers.h"
#include "task.h"

#define ERRNO_WORDS 3
#define FAILING_MAX 4096
#define PREFIXES_MAX 8
#define PREFIX_BYTES 64

/* The errnos that are counted, a bit each, and those that are counted only where a process should have been made. */
const volatile u64 errnos[ERRNO_WORDS] = {};
const volatile u64 errnos_of_fork[ERRNO_WORDS] = {};

#if defined(__TARGET_ARCH_x86)
#define NR_OPEN 2
#define NR_OPENAT 257
#define NR_OPENAT2 437
#define TS_COMPAT 2

static __always_inline u64 argument(struct pt_regs___x86 *regs, u32 index)
{
	if (index == 0)
		return BPF_CORE_READ(regs, di);
	return index == 1 ? BPF_CORE_READ(regs, si) : BPF_CORE_READ(regs, dx);
}

static __always_inline bool makes_process(u32 call)
{
	return call == 56 || call == 57 || call == 58 || call == 435;
}

/* Calls of 32-bit processes have other numbers. */
static __always_inline bool has_other_numbers(void)
{
	struct task_struct___x86 *task = (void *)bpf_get_current_task();

	return BPF_CORE_READ(task, thread_info.status) & TS_COMPAT;
}

#else
/* There is no such call. */
#define NR_OPEN 0xffffffff
#define NR_OPENAT 56
#define NR_OPENAT2 437
#define TIF_32BIT 22

/* Not of the first: the result is in its place. */
static __always_inline u64 argument(struct pt_regs___arm64 *regs, u32 index)
{
	return BPF_CORE_READ(regs, regs[index]);
}

static __always_inline bool makes_process(u32 call)
{
	return call == 220 || call == 435;
}

static __always_inline bool has_other_numbers(void)
{
	struct task_struct___arm64 *task = (void *)bpf_get_current_task();

	return BPF_CORE_READ(task, thread_info.flags) >> TIF_32BIT & 1;
}

#endif

struct failing_key {
	u64 cgroup_id;
	u32 call;
	u32 errno;
};

/* Number of further failures; the first had a record at once. */
AGGREGATE(failing, BPF_MAP_TYPE_HASH, FAILING_MAX, struct failing_key, u64);

static __always_inline bool is_in(const volatile u64 *set, u32 errno)
{
	return set[errno >> 6] >> (errno & 63) & 1;
}

SEC("raw_tracepoint/sys_exit")
int syscall_errors(struct bpf_raw_tracepoint_args *ctx)
{
	u64 errno = -(s64)ctx->args[1];
	registers *regs = (registers *)ctx->args[0];
	struct failing_key key = {};
	struct syscall_error_record *record;
	u64 none = 0, *sum;
	bool is_new, is_counted;

	/* Most calls end here: they return no errno, or none that matters. */
	if (errno >= ERRNO_WORDS * 64)
		return 0;
	is_counted = is_in(errnos, errno);
	if (!is_counted && !is_in(errnos_of_fork, errno))
		return 0;
	key.call = call_number(regs);
	if (!is_counted && !makes_process(key.call))
		return 0;
	if (current_tgid() == own_tgid || has_other_numbers() || !kind_is_on(KIND_SYSCALL_ERROR))
		return 0;
	key.cgroup_id = current_cgroup_id();
	key.errno = errno;
	if (cgroup_is_excluded(key.cgroup_id))
		return 0;
	sum = aggregate_sum(failing, &key, &none, &is_new);
	if (!sum) {
		count_unsummed(KIND_SYSCALL_ERROR);
		return 0;
	}
	if (!is_new) {
		__sync_fetch_and_add(sum, 1);
		return 0;
	}
	record = bulk_begin(KIND_SYSCALL_ERROR, sizeof(*record));
	if (!record)
		return 0;
	set_current_subject(&record->header, current_cgroup_id());
	record->syscall = key.call;
	record->errno = errno;
	record->count = 1;
	bulk_end(record);
	return 0;
}

struct prefix {
	u32 bits;
	char text[PREFIX_BYTES];
};

/* How the paths begin that are audited; the loader fills it. */
struct {
	__uint(type, BPF_MAP_TYPE_LPM_TRIE);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, PREFIXES_MAX);
	__type(key, struct prefix);
	__type(value, u8);
} audited SEC(".maps");

/*
 * Whether kubelet wrote the file. It puts the files of a secret, a config map or a projected volume into a directory
 * named ..YYYY_MM_DD_… inside the volume, wherever that is mounted. Files may be in directories of their own below that.
 */
static __always_inline bool is_of_volume(struct task_struct *task, s64 descriptor)
{
	struct file **files = (struct file **)BPF_CORE_READ(task, files, fdt, fd);
	struct file *file = NULL;
	struct dentry *entry;
	char name[4];
	int depth;

	bpf_probe_read_kernel(&file, sizeof(file), files + descriptor);
	entry = BPF_CORE_READ(file, f_path.dentry);
	for (depth = 0; depth < 4; depth++) {
		struct dentry *parent = BPF_CORE_READ(entry, d_parent);

		if (!parent || parent == entry)
			return false;
		if (bpf_probe_read_kernel(name, sizeof(name), BPF_CORE_READ(parent, d_name.name)))
			return false;
		if (name[0] == '.' && name[1] == '.' && name[2] == '2' && name[3] == '0')
			return true;
		entry = parent;
	}
	return false;
}

SEC("raw_tracepoint/sys_exit")
int file_open(struct bpf_raw_tracepoint_args *ctx)
{
	registers *regs = (registers *)ctx->args[0];
	s64 descriptor = ctx->args[1];
	struct prefix prefix = {};
	struct file_open_record *record;
	struct task_struct *task;
	const char *path;
	u64 flags;
	u32 call;

	if (descriptor < 0 || descriptor > 0xffffff)
		return 0;
	call = call_number(regs);
	if (call != NR_OPENAT && call != NR_OPENAT2 && call != NR_OPEN)
		return 0;
	task = current_task();
	if (current_tgid() == own_tgid || has_other_numbers())
		return 0;
	path = (const char *)argument(regs, call == NR_OPEN ? 0 : 1);
	/* The kernel has just read it: it is in memory. */
	if (bpf_probe_read_user_str(prefix.text, sizeof(prefix.text), path) < 0)
		return 0;
	prefix.bits = PREFIX_BYTES * 8;
	if (!bpf_map_lookup_elem(&audited, &prefix) && !is_of_volume(task, descriptor))
		return 0;
	record = bulk_begin(KIND_FILE_OPEN, sizeof(*record));
	if (!record)
		return 0;
	set_current_subject(&record->header, current_cgroup_id());
	flags = argument(regs, call == NR_OPEN ? 1 : 2);
	/* openat2 has a struct there, which begins with them. */
	if (call == NR_OPENAT2)
		bpf_probe_read_user(&flags, sizeof(flags), (void *)flags);
	record->flags = flags;
	task_comm(task, record->comm);
	bpf_probe_read_user_str(record->path, sizeof(record->path), path);
	bulk_end(record);
	return 0;
}
