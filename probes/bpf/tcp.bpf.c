/* SPDX-License-Identifier: (GPL-2.0-only OR Apache-2.0) */
/*
 * Which TCP connections were made, refused, given up, ended, and where were segments sent again?
 *
 * inet_sock_set_state, tcp_retransmit_skb, tcp_send_reset, tcp_receive_reset, and the packets
 * that sockets get (received.bpf.c) → tcp_record. A state may change in softirq, outside of any
 * process's context. So a connection's owner is stored by its socket when it starts to connect,
 * and by network namespace and port when a process listens. Both happen in the process's own
 * context. A socket that is older than the probes has its cgroup from the kernel, and no
 * process.
 */
#include "packet.h"

#define CONNECTIONS_MAX 32768
/* Both sides of a connection have a place each; a power of two. */
#define CLOSED_PAIRS 32
#define CLOSED_MAX (2 * CLOSED_PAIRS)
#define LISTENERS_MAX 1024

/* enum sock_flags: the peer's FIN has come, which bytes_received counts as one. */
#define SOCK_DONE 1

#define ETIMEDOUT 110
#define ECONNREFUSED 111
#define ENETUNREACH 101
#define EHOSTUNREACH 113

enum change {
	CHANGE_ESTABLISHED = 1,
	CHANGE_REFUSED,
	CHANGE_TIMED_OUT,
	CHANGE_CLOSED,
	CHANGE_RETRANSMITTED,
	CHANGE_SYN_RETRANSMITTED,
	CHANGE_RESET_SENT,
	CHANGE_RESET_RECEIVED,
	CHANGE_LISTEN_OVERFLOW,
};

struct owner {
	u64 cgroup_id;
	u32 pid;
	u32 tid;
};

struct connection {
	struct owner owner;
	u64 since_ns;
	u64 active;
};

/*
 * By the address of the struct sock. No LRU map, whose updates cost four times as much: a connection whose end was missed gives
 * way to the next one at its address. One that finds no room is recorded as one that is older than the probes.
 */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(max_entries, CONNECTIONS_MAX);
	__type(key, u64);
	__type(value, struct connection);
} connections SEC(".maps");

struct closed {
	/* The address of the struct sock; 0 while it is being filled. */
	u64 key;
	struct connection connection;
};

/*
 * Each CPU remembers the last connections that it closed. A process that gives a connection up closes
 * it first, and sends the reset right after that on the same CPU. A peer on the same node gets the
 * reset and closes before the kernel says that it was sent, so the two sides never share a place.
 */
struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, CLOSED_MAX);
	__type(key, u32);
	__type(value, struct closed);
} closed SEC(".maps");

/* By the hash that finds a connection among others, which its socket keeps when it closes, and by who made the connection. */
static __always_inline struct closed *closed_slot(struct sock *sk, bool active)
{
	u32 index = (sk->__sk_common.skc_hash & (CLOSED_PAIRS - 1)) << 1 | active;

	return bpf_map_lookup_elem(&closed, &index);
}

struct listener_key {
	u64 net;
	u64 port;
};

/* Of processes that share a port, the last that listened. */
struct {
	__uint(type, BPF_MAP_TYPE_LRU_HASH);
	__uint(max_entries, LISTENERS_MAX);
	__type(key, struct listener_key);
	__type(value, struct owner);
} listeners SEC(".maps");

static __always_inline struct owner current_owner(void)
{
	u64 ids = bpf_get_current_pid_tgid();
	struct owner owner = { .cgroup_id = current_cgroup_id(), .pid = ids >> 32, .tid = ids };

	return owner;
}

/*
 * Returns the rest of a full TCP socket; NULL of any other, and before 5.9, when READ_TCP
 * reads its fields all the same. A typed pointer is of another type only after this call.
 */
#define HAS_TYPED_TCP bpf_core_enum_value_exists(enum bpf_func_id, BPF_FUNC_skc_to_tcp_sock)

static __always_inline struct tcp_sock *typed_tcp(struct sock *sk)
{
	return HAS_TYPED_TCP ? (struct tcp_sock *)bpf_skc_to_tcp_sock(sk) : NULL;
}

/* A field of a full TCP socket: `tcp` is what typed_tcp() returned of `sk`. 0 where that is NULL although it need not be. */
#define READ_TCP(sk, tcp, field)                                                                                               \
	({                                                                                                                     \
		typeof((tcp)->field) value = 0;                                                                                \
                                                                                                                               \
		if (!HAS_TYPED_TCP)                                                                                            \
			BPF_CORE_READ_INTO(&value, (struct tcp_sock *)(sk), field);                                            \
		else if (tcp)                                                                                                  \
			value = (tcp)->field;                                                                                  \
		value;                                                                                                         \
	})

/* In host order. The port that a socket is bound to is gone from skc_num when it closes. */
#define own_port(sk, tcp) __builtin_bswap16(READ_TCP(sk, tcp, inet_conn.icsk_inet.inet_sport))

static __always_inline void mapped(u8 address[16], u32 ipv4)
{
	address[10] = address[11] = 0xff;
	__builtin_memcpy(address + 12, &ipv4, sizeof(ipv4));
}

/* `tcp` is typed_tcp() of a full socket; `now_ns` is when it happened, 0 for now. */
static __always_inline void emit(struct sock *sk, struct tcp_sock *tcp, struct connection *connection, enum change change,
				 u64 now_ns)
{
	u16 family = sk->__sk_common.skc_family;
	bool full = is_full(sk);
	struct tcp_record *record;

	if (connection && own_tgid && connection->owner.pid == own_tgid)
		return;
	if (family != AF_INET && family != AF_INET6)
		return;
	record = bulk_begin_at(KIND_TCP, sizeof(*record), now_ns);
	if (!record)
		return;
	if (connection) {
		record->header.cgroup_id = connection->owner.cgroup_id;
		record->header.pid = connection->owner.pid;
		record->header.tid = connection->owner.tid;
		record->duration_ns = record->header.time_ns - connection->since_ns;
		record->active = connection->active;
	} else {
		record->header.cgroup_id = full ? socket_cgroup_id(sk) : CGROUP_ROOT;
	}
	if (family == AF_INET) {
		mapped(record->source, sk->__sk_common.skc_rcv_saddr);
		mapped(record->destination, sk->__sk_common.skc_daddr);
	} else {
		BPF_CORE_READ_INTO(&record->source, sk, __sk_common.skc_v6_rcv_saddr);
		BPF_CORE_READ_INTO(&record->destination, sk, __sk_common.skc_v6_daddr);
	}
	record->source_port = full ? own_port(sk, tcp) : sk->__sk_common.skc_num;
	record->destination_port = __builtin_bswap16(sk->__sk_common.skc_dport);
	record->change = change;
	/* Nothing was sent or received on a connection that was just made. */
	if (full && change != CHANGE_ESTABLISHED) {
		u64 received = READ_TCP(sk, tcp, bytes_received);

		if (received && sk->__sk_common.skc_flags >> SOCK_DONE & 1)
			received--;
		record->bytes_sent = READ_TCP(sk, tcp, bytes_sent) - READ_TCP(sk, tcp, bytes_retrans);
		record->bytes_received = received;
	}
	bulk_end(record);
}

/* Why a connection that was never established is closed. */
static __always_inline enum change failure(struct sock *sk, struct tcp_sock *tcp)
{
	switch (sk->sk_err) {
	case ECONNREFUSED:
		return CHANGE_REFUSED;
	case ETIMEDOUT:
	case ENETUNREACH:
	case EHOSTUNREACH:
		return CHANGE_TIMED_OUT;
	default:
		/* The process gave up: for want of an answer when it was asked for again, whatever the process's patience. */
		return READ_TCP(sk, tcp, inet_conn.icsk_retransmits) ? CHANGE_TIMED_OUT : CHANGE_CLOSED;
	}
}

/* An interrupt in between may take the same place: the key says whose it is, and stands there only while all of it does. */
static __always_inline void remember_closed(struct sock *sk, u64 key, struct connection *connection)
{
	struct closed *slot = closed_slot(sk, connection->active);

	if (!slot)
		return;
	*(volatile u64 *)&slot->key = 0;
	slot->connection = *connection;
	*(volatile u64 *)&slot->key = key;
}

/* Returns a connection that this CPU has just closed, NULL when it is not known. */
static __always_inline struct connection *just_closed(struct sock *sk, u64 key)
{
	struct closed *accepted = closed_slot(sk, false), *made = closed_slot(sk, true);

	if (accepted && *(volatile u64 *)&accepted->key == key)
		return &accepted->connection;
	if (made && *(volatile u64 *)&made->key == key)
		return &made->connection;
	return NULL;
}

static __always_inline void accepted(struct sock *sk, struct tcp_sock *tcp, u64 key, struct listener_key *listener)
{
	struct owner *owner = bpf_map_lookup_elem(&listeners, listener);
	struct connection connection = { .since_ns = bpf_ktime_get_boot_ns() };

	if (owner)
		connection.owner = *owner;
	else
		connection.owner.cgroup_id = socket_cgroup_id(sk);
	bpf_map_update_elem(&connections, &key, &connection, BPF_ANY);
	emit(sk, tcp, &connection, CHANGE_ESTABLISHED, connection.since_ns);
}

SEC("tp_btf/inet_sock_set_state")
int tcp_state(u64 *ctx)
{
	struct sock *sk = (struct sock *)ctx[0];
	int old = ctx[1], new = ctx[2];
	u64 key = (u64)sk;
	struct listener_key listener = {};
	struct connection *connection;
	struct tcp_sock *tcp;

	/* Most changes end here. */
	if (new != CLOSE && new != ESTABLISHED && new != SYN_SENT && new != LISTEN)
		return 0;
	if (sk->sk_protocol != IPPROTO_TCP)
		return 0;
	if (new == SYN_SENT) {
		struct connection started = { .owner = current_owner(), .since_ns = bpf_ktime_get_boot_ns(), .active = 1 };

		bpf_map_update_elem(&connections, &key, &started, BPF_ANY);
		return 0;
	}
	/* A change of state belongs to a full socket. */
	tcp = typed_tcp(sk);
	if (new == LISTEN || old == LISTEN || (new == ESTABLISHED && old == SYN_RECV)) {
		listener.net = (u64)sk->__sk_common.skc_net.net;
		listener.port = own_port(sk, tcp);
	}
	if (new == LISTEN) {
		struct owner owner = current_owner();

		/* The port may be chosen only after this: then it is 0, and the connections' owner unknown. */
		if (!listener.port)
			listener.port = sk->__sk_common.skc_num;
		bpf_map_update_elem(&listeners, &listener, &owner, BPF_ANY);
		return 0;
	}
	if (new == ESTABLISHED && old == SYN_RECV) {
		connection = bpf_map_lookup_elem(&connections, &key);
		/* Both sides connected to each other at once. */
		if (connection && connection->active)
			emit(sk, tcp, connection, CHANGE_ESTABLISHED, 0);
		else
			accepted(sk, tcp, key, &listener);
		return 0;
	}
	if (new == ESTABLISHED) {
		connection = bpf_map_lookup_elem(&connections, &key);
		emit(sk, tcp, connection, CHANGE_ESTABLISHED, 0);
		return 0;
	}
	if (old == LISTEN) {
		struct owner *owner = bpf_map_lookup_elem(&listeners, &listener);

		/* Not when one of several processes that share the port ends, and another was the last to listen. */
		if (owner && owner->pid == (u32)(bpf_get_current_pid_tgid() >> 32))
			bpf_map_delete_elem(&listeners, &listener);
		return 0;
	}
	connection = bpf_map_lookup_elem(&connections, &key);
	if (old == SYN_SENT)
		emit(sk, tcp, connection, failure(sk, tcp), 0);
	else if (old != SYN_RECV && old != CLOSE)
		emit(sk, tcp, connection, sk->sk_err == ETIMEDOUT ? CHANGE_TIMED_OUT : CHANGE_CLOSED, 0);
	if (connection) {
		/* After its last acknowledgement, which ends half of all connections, no reset follows. */
		if (old != LAST_ACK)
			remember_closed(sk, key, connection);
		bpf_map_delete_elem(&connections, &key);
	}
	return 0;
}

static __always_inline int happened(struct sock *sk, enum change change)
{
	u64 key = (u64)sk;
	struct connection *connection;

	if (!sk)
		return 0;
	connection = bpf_map_lookup_elem(&connections, &key);
	if (!connection && sk->__sk_common.skc_state == CLOSE)
		connection = just_closed(sk, key);
	emit(sk, typed_tcp(sk), connection, change, 0);
	return 0;
}

SEC("tp_btf/tcp_retransmit_skb")
int tcp_retransmit(u64 *ctx)
{
	struct sock *sk = (struct sock *)ctx[0];
	u8 state = sk->__sk_common.skc_state;

	return happened(sk, state == SYN_SENT || state == SYN_RECV || state == NEW_SYN_RECV ? CHANGE_SYN_RETRANSMITTED :
											      CHANGE_RETRANSMITTED);
}

SEC("tp_btf/tcp_send_reset")
int tcp_reset_sent(u64 *ctx)
{
	return happened((struct sock *)ctx[0], CHANGE_RESET_SENT);
}

SEC("tp_btf/tcp_receive_reset")
int tcp_reset_recv(u64 *ctx)
{
	return happened((struct sock *)ctx[0], CHANGE_RESET_RECEIVED);
}

#define TCP_FLAGS 0x17
#define TCP_SYN 0x02

/*
 * A connection that is asked for when the listener's queue is full is not refused: nothing is sent at all, and no tracepoint
 * records it. But the cgroup's program sees the packet just before the kernel looks at that queue, and may look at it too.
 */
static __always_inline void tcp_asked(struct __sk_buff *skb, struct packet *packet)
{
	u8 *data = (void *)(long)skb->data, *end = (void *)(long)skb->data_end, *tcp = data + packet->offset;
	struct listener_key key = {};
	struct tcp_record *record;
	struct bpf_sock *sk;
	struct owner *owner;
	struct sock *listener;

	if (!HAS_TYPED_TCP || tcp + 20 > end || (tcp[13] & TCP_FLAGS) != TCP_SYN)
		return;
	sk = skb->sk;
	if (!sk || sk->state != LISTEN)
		return;
	listener = (struct sock *)bpf_skc_to_tcp_sock(sk);
	if (!listener || listener->sk_ack_backlog <= listener->sk_max_ack_backlog)
		return;
	key.net = (u64)BPF_CORE_READ(listener, __sk_common.skc_net.net);
	key.port = BPF_CORE_READ(listener, __sk_common.skc_num);
	owner = bpf_map_lookup_elem(&listeners, &key);
	if (owner && own_tgid && owner->pid == own_tgid)
		return;
	record = bulk_begin(KIND_TCP, sizeof(*record));
	if (!record)
		return;
	if (owner) {
		record->header.cgroup_id = owner->cgroup_id;
		record->header.pid = owner->pid;
		record->header.tid = owner->tid;
	} else {
		record->header.cgroup_id = socket_cgroup_id(listener);
	}
	/* The source is this side: the side to which the packet goes. */
	if (packet->is_ipv6) {
		bpf_skb_load_bytes(skb, 24, record->source, 16);
		bpf_skb_load_bytes(skb, 8, record->destination, 16);
	} else {
		u32 address = 0;

		bpf_skb_load_bytes(skb, 16, &address, 4);
		mapped(record->source, address);
		bpf_skb_load_bytes(skb, 12, &address, 4);
		mapped(record->destination, address);
	}
	record->source_port = key.port;
	record->destination_port = tcp[0] << 8 | tcp[1];
	record->change = CHANGE_LISTEN_OVERFLOW;
	bulk_end(record);
}
