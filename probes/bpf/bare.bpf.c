/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Measures the least cost of a record. The program reserves one, zeroes, stamps and submits
 * it, and reads nothing. tapio-perf attaches it to any raw tracepoint, for comparison.
 */
#include "kernel.h"

/* As long as most of ours. */
#define RECORD_BYTES 96

struct {
	__uint(type, BPF_MAP_TYPE_RINGBUF);
	__uint(max_entries, 1048576);
} ring SEC(".maps");

SEC("raw_tracepoint/bare")
int bare(struct bpf_raw_tracepoint_args *ctx)
{
	u64 *record = bpf_ringbuf_reserve(&ring, RECORD_BYTES, 0);

	if (!record)
		return 0;
	__builtin_memset(record, 0, RECORD_BYTES);
	record[0] = (u64)bpf_get_smp_processor_id() << 32 | RECORD_BYTES << 16;
	record[1] = bpf_ktime_get_boot_ns();
	bpf_ringbuf_submit(record, BPF_RB_NO_WAKEUP);
	return 0;
}

char _license[] SEC("license") = "GPL";
