/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * What does a hook cost by itself? A program that does nothing, attached by tapio-perf to any raw tracepoint, for comparison.
 */
#include "kernel.h"

SEC("raw_tracepoint/empty")
int empty(struct bpf_raw_tracepoint_args *ctx)
{
	return 0;
}

char _license[] SEC("license") = "GPL";
