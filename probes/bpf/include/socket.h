/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* Whose a socket is. */
#pragma once

#include "task.h"

#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17

enum { ESTABLISHED = 1, SYN_SENT = 2, SYN_RECV = 3, TIME_WAIT = 6, CLOSE = 7, LAST_ACK = 9, LISTEN = 10, NEW_SYN_RECV = 12 };

/* The ends of a connection, as every kernel has had them at the beginning of a socket. */
struct ends {
	u32 destination;
	u32 source;
	u32 hash;
	u16 destination_port;
	u16 own_port;
	u16 family;
	u8 state;
	u8 pad;
};

/* In one read, unless this kernel has them elsewhere: the loader knows, and of the two ways only one is left. */
static __always_inline void read_ends(struct sock *sk, struct ends *ends)
{
	struct sock_common *common = (struct sock_common *)sk;

	if (!bpf_core_field_offset(sk->__sk_common) && !bpf_core_field_offset(common->skc_daddr) &&
	    bpf_core_field_offset(common->skc_rcv_saddr) == 4 && bpf_core_field_offset(common->skc_dport) == 12 &&
	    bpf_core_field_offset(common->skc_num) == 14 && bpf_core_field_offset(common->skc_family) == 16 &&
	    bpf_core_field_offset(common->skc_state) == 18) {
		bpf_probe_read_kernel(ends, sizeof(*ends), sk);
		return;
	}
	ends->destination = BPF_CORE_READ(sk, __sk_common.skc_daddr);
	ends->source = BPF_CORE_READ(sk, __sk_common.skc_rcv_saddr);
	ends->destination_port = BPF_CORE_READ(sk, __sk_common.skc_dport);
	ends->own_port = BPF_CORE_READ(sk, __sk_common.skc_num);
	ends->family = BPF_CORE_READ(sk, __sk_common.skc_family);
	ends->state = BPF_CORE_READ(sk, __sk_common.skc_state);
}

/* Time-wait and request sockets are smaller than a struct sock. */
static __always_inline bool is_full(struct sock *sk)
{
	u8 state = BPF_CORE_READ(sk, __sk_common.skc_state);

	return state != TIME_WAIT && state != NEW_SYN_RECV;
}

/* The version 2 cgroup that made the socket, or its root. */
static __always_inline u64 socket_cgroup_id(struct sock *sk)
{
	struct sock_cgroup_data___before_5_15 *old;
	struct cgroup *cgroup = NULL;

	if (bpf_core_field_exists(struct sock_cgroup_data, cgroup)) {
		cgroup = BPF_CORE_READ(sk, sk_cgrp_data.cgroup);
	} else if (bpf_core_field_exists(struct sock_cgroup_data___before_5_15, val) &&
		   bpf_core_field_exists(sk->sk_cgrp_data)) {
		u64 val;

		old = (void *)__builtin_preserve_access_index(&sk->sk_cgrp_data);
		val = BPF_CORE_READ(old, val);
		cgroup = val & 1 ? NULL : (struct cgroup *)val;
	}
	return cgroup ? cgroup_id(cgroup) : CGROUP_ROOT;
}
