/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Measures the cost of a hook by itself. tapio-perf attaches these empty programs
 * to any raw tracepoint, and to the packets of all cgroups, for comparison.
 */
#include "kernel.h"

SEC("raw_tracepoint/empty")
int empty(struct bpf_raw_tracepoint_args *ctx)
{
	return 0;
}

SEC("cgroup_skb/egress")
int empty_egress(struct __sk_buff *skb)
{
	return 1;
}

SEC("cgroup_skb/ingress")
int empty_ingress(struct __sk_buff *skb)
{
	return 1;
}

char _license[] SEC("license") = "GPL";
