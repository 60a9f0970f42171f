/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/* Whose a socket is. */
#pragma once

#include "task.h"

#define AF_INET 2
#define AF_INET6 10
#define IPPROTO_TCP 6
#define IPPROTO_UDP 17

enum { ESTABLISHED = 1, SYN_SENT = 2, SYN_RECV = 3, TIME_WAIT = 6, CLOSE = 7, LAST_ACK = 9, LISTEN = 10, NEW_SYN_RECV = 12 };

/* Time-wait and request sockets are smaller than a struct sock. The pointer is typed, see current_task(). */
static __always_inline bool is_full(struct sock *sk)
{
	u8 state = sk->__sk_common.skc_state;

	return state != TIME_WAIT && state != NEW_SYN_RECV;
}

/* Returns the version 2 cgroup that made the socket, or its root. */
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
