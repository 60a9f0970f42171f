/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Which packets does the kernel throw away, why, and whose are they?
 *
 * kfree_skb → packet_drop records, written by user space from sums by reason, cgroup and interface: a flood of drops costs a
 * count each. Since 5.17 the tracepoint has a reason, since 6.11 the socket that a received packet was for.
 */
#include "aggregate.h"
#include "socket.h"

#define DROP_SUMS_MAX 1024
#define REASONS_WITH_NAME 256

/* Reasons that are no loss, a bit each: their numbers differ between kernels, so the loader fills it in. */
const volatile u64 harmless_drops[REASONS_WITH_NAME / 64] = {};

struct drop_key {
	u64 cgroup_id;
	/* enum skb_drop_reason of this kernel, 0 where it has none. */
	u32 reason;
	u32 interface;
};

AGGREGATE(packet_drops, BPF_MAP_TYPE_PERCPU_HASH, DROP_SUMS_MAX, struct drop_key, u64);

/*
 * Returns the packet's device. A packet in a socket's queue has another pointer
 * there. A device is recognised by its transmit queue, which points back to it.
 */
static __always_inline u32 interface_of(struct sk_buff *skb)
{
	u32 received_by = skb->skb_iif;
	struct net_device *device;

	if (received_by)
		return received_by;
	device = skb->dev;
	if (!device || device->_tx->dev != device)
		return 0;
	return device->ifindex;
}

static __always_inline u64 cgroup_of_socket(struct sock *sk)
{
	u16 family;

	if (!sk)
		return CGROUP_ROOT;
	family = sk->__sk_common.skc_family;
	if ((family != AF_INET && family != AF_INET6) || !is_full(sk))
		return CGROUP_ROOT;
	return socket_cgroup_id(sk);
}

SEC("tp_btf/kfree_skb")
int packet_drop(u64 *ctx)
{
	struct sk_buff *skb = (struct sk_buff *)ctx[0];
	struct sock *sk = skb->sk;
	struct drop_key key = {};
	u64 none = 0, *sum;
	bool is_new;

	if (bpf_core_field_exists(struct trace_event_raw_kfree_skb, reason)) {
		key.reason = ctx[2];
		if (key.reason < REASONS_WITH_NAME && harmless_drops[key.reason >> 6 & 3] >> (key.reason & 63) & 1)
			return 0;
	}
	if (!kind_is_on(KIND_PACKET_DROP))
		return 0;
	if (!sk && bpf_core_field_exists(struct trace_event_raw_kfree_skb, rx_sk))
		sk = (struct sock *)ctx[3];
	key.cgroup_id = cgroup_of_socket(sk);
	if (cgroup_is_excluded(key.cgroup_id))
		return 0;
	key.interface = interface_of(skb);
	sum = aggregate_sum(packet_drops, &key, &none, &is_new);
	if (sum)
		__sync_fetch_and_add(sum, 1);
	else
		count_unsummed(KIND_PACKET_DROP);
	return 0;
}
