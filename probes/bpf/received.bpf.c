/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * What does a packet answer, or ask for, that a socket of the version 2 hierarchy gets?
 *
 * Every such packet → dns_answer of dns.bpf.c, tcp_asked of tcp.bpf.c. One program for both: most packets are neither, and for
 * those the way into a program is most of its cost. Every packet passes.
 */
#include "dns.bpf.c"
#include "tcp.bpf.c"

SEC("cgroup_skb/ingress")
int packet_received(struct __sk_buff *skb)
{
	struct packet packet;
	u32 offset;

	if (!find_payload(skb, &packet))
		return 1;
	if (packet.protocol == IPPROTO_TCP) {
		tcp_asked(skb, &packet);
	} else if (packet.protocol == IPPROTO_UDP) {
		offset = message_offset(skb, &packet, false);
		if (offset)
			dns_answer(skb, offset);
	}
	return 1;
}
