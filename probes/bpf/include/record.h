/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * The layouts of the records.
 *
 * The structs are those of src/record.rs, byte for byte; a test compares them. Padding is a member, and a record is zeroed
 * before it is filled: no byte of the kernel's memory leaves it by accident.
 */
#pragma once

#include "kernel.h"

enum {
	KIND_EXEC = 1,
	KIND_EXIT = 2,
	KIND_OOM = 3,
	KIND_SIGNAL = 4,
	KIND_CGROUP_MKDIR = 5,
	KIND_CGROUP_RMDIR = 6,
	KIND_SIGNAL_DELIVERED = 7,
	KIND_EXEC_COMMAND = 8,
	KIND_LEFT_OUT = 9,
	KIND_TCP = 32,
	KIND_RECLAIM = 33,
	KIND_BLOCK_IO = 34,
	KIND_SYSCALL_ERROR = 35,
	KIND_DNS = 36,
	KIND_RUN_QUEUE = 37,
	KIND_PACKET_DROP = 38,
	KIND_FORK = 39,
	KIND_FILE_OPEN = 40,
	KIND_HISTOGRAM = 41,
};

#define CGROUP_V1_MEMORY (1ULL << 63)
/* The root of version 2: its directory is inode 1. Used where the cgroup is unknown. */
#define CGROUP_ROOT 1
#define COMM_BYTES 16
#define CGROUP_PATH_BYTES 256
#define LIMIT_NAME_BYTES 128
#define EXEC_PATH_BYTES 128
#define EXEC_ARGUMENT_BYTES 256
#define OPEN_PATH_BYTES 128

struct header {
	u16 kind;
	u16 size;
	u32 cpu;
	u64 time_ns;
	u64 cgroup_id;
	u32 pid;
	u32 tid;
};

struct exec_record {
	struct header header;
	u32 parent_pid;
	u32 ns_pid;
	u32 ns_level;
	u32 pad;
	u64 start_time_ns;
	u64 parent_cgroup_id;
	char comm[COMM_BYTES];
};

struct exit_record {
	struct header header;
	u32 parent_pid;
	u32 ns_pid;
	u32 ns_level;
	u32 status;
	u64 start_time_ns;
	s16 oom_score_adj;
	u8 pad[6];
	char comm[COMM_BYTES];
};

struct oom_record {
	struct header header;
	u32 ns_pid;
	u32 ns_level;
	u32 allocator_pid;
	u32 allocator_tid;
	u64 allocator_cgroup_id;
	u64 anon_rss_bytes;
	u64 file_rss_bytes;
	u64 shmem_rss_bytes;
	u64 total_vm_bytes;
	u64 limit_cgroup_id;
	u64 limit_bytes;
	u64 usage_bytes;
	u32 limit_height;
	s16 oom_score_adj;
	u8 allocator_inside;
	u8 pad;
	u64 start_time_ns;
	u32 parent_pid;
	u32 pad2;
	char comm[COMM_BYTES];
	char allocator_comm[COMM_BYTES];
	char limit_name[LIMIT_NAME_BYTES];
};

struct signal_record {
	struct header header;
	u32 signal;
	s32 code;
	u32 sender_pid;
	u32 sender_tid;
	u64 sender_cgroup_id;
	u32 ns_pid;
	u32 ns_level;
	u8 from_kernel;
	u8 result;
	u8 over_cpu_limit;
	u8 pad;
	/* Signals of the same number to the same process that were not recorded since the record before. */
	u32 repeats;
	u64 sender_start_time_ns;
	u32 sender_parent_pid;
	u32 pad2;
	char comm[COMM_BYTES];
	char sender_comm[COMM_BYTES];
	char sender_parent_comm[COMM_BYTES];
};

struct cgroup_record {
	struct header header;
	u32 hierarchy;
	u32 level;
	u32 path_bytes;
	u32 pad;
	u64 creator_cgroup_id;
	char path[CGROUP_PATH_BYTES];
};

struct tcp_record {
	struct header header;
	u64 duration_ns;
	u8 source[16];
	u8 destination[16];
	u16 source_port;
	u16 destination_port;
	u8 change;
	u8 active;
	u8 pad[2];
	u64 bytes_sent;
	u64 bytes_received;
};

struct reclaim_record {
	struct header header;
	u64 stall_ns;
	u64 pages_reclaimed;
	u8 memcg;
	u8 pad[7];
};

struct block_io_record {
	struct header header;
	u64 latency_ns;
	u64 bytes;
	u32 device;
	s32 error;
	u8 operation;
	u8 pad[7];
};

struct run_queue_record {
	struct header header;
	u64 wait_ns;
};

struct signal_delivered_record {
	struct header header;
	u32 signal;
	s32 code;
	u32 ns_pid;
	u32 ns_level;
	char comm[COMM_BYTES];
};

struct exec_command_record {
	struct header header;
	u32 parent_pid;
	u32 ns_pid;
	u32 ns_level;
	u32 argument_bytes;
	u64 start_time_ns;
	u64 parent_cgroup_id;
	char comm[COMM_BYTES];
	char path[EXEC_PATH_BYTES];
	char arguments[EXEC_ARGUMENT_BYTES];
};

struct fork_record {
	struct header header;
	u32 parent_pid;
	u32 ns_pid;
	u32 ns_level;
	u32 pad;
	char comm[COMM_BYTES];
};

struct file_open_record {
	struct header header;
	u32 flags;
	u32 pad;
	char comm[COMM_BYTES];
	char path[OPEN_PATH_BYTES];
};

struct syscall_error_record {
	struct header header;
	u32 syscall;
	u32 errno;
	u64 count;
};

#define DNS_NAME_BYTES 72

struct dns_record {
	struct header header;
	u64 latency_ns;
	u8 rcode;
	u8 pad;
	u16 query_type;
	u32 pad2;
	u8 name[DNS_NAME_BYTES];
};

/* Written by user space: */
struct packet_drop_record {
	struct header header;
	u32 reason;
	u32 interface;
	u64 count;
};

struct left_out_record {
	struct header header;
	u64 count;
	u64 interval_ns;
	u32 records_per_second;
	u32 is_over;
};

/* Keeps the layouts in the object's type information, where the test of src/record.rs finds them. */
const volatile union {
	struct exec_record exec;
	struct exit_record exit;
	struct oom_record oom;
	struct signal_record signal;
	struct cgroup_record cgroup;
	struct tcp_record tcp;
	struct reclaim_record reclaim;
	struct block_io_record block_io;
	struct run_queue_record run_queue;
	struct signal_delivered_record signal_delivered;
	struct exec_command_record exec_command;
	struct fork_record fork;
	struct file_open_record file_open;
	struct syscall_error_record syscall_error;
	struct dns_record dns;
	struct packet_drop_record packet_drop;
	struct left_out_record left_out;
} layouts = {};
