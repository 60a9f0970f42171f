/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* Where things are in a packet that a cgroup's program sees: it begins with the header of IP. */
#pragma once

#include "socket.h"

struct packet {
	/* Of the header after IP's. */
	u32 offset;
	u8 protocol;
	bool is_ipv6;
};

/* False for a fragment other than the first, and for IPv6 with extension headers. */
static __always_inline bool find_payload(struct __sk_buff *skb, struct packet *packet)
{
	u8 *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end;

	if (data + 20 > end)
		return false;
	packet->is_ipv6 = data[0] >> 4 == 6;
	if (packet->is_ipv6) {
		if (data + 40 > end)
			return false;
		packet->protocol = data[6];
		packet->offset = 40;
		return true;
	}
	packet->protocol = data[9];
	packet->offset = (data[0] & 0xf) * 4;
	return data[0] >> 4 == 4 && !(data[6] & 0x1f) && !data[7];
}
